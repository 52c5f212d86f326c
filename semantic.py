"""The semantic softmax of ImageNet-21k-P (Ridnik et al. 2021), with which the paper's A.3 pre-trains: its
tree of classes, its loss, its accuracy. ImageNet-21k labels an image with one class, but a dog is an animal
too; so every level of the WordNet hierarchy has a softmax of its own.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deform_attn import at_least_float32
from model import InputError


@dataclass
class Tree:
    """The classes' hierarchy. A class's level is the number of its ancestors that are classes themselves."""
    classes: list[str] | None  # their names, where the file has them
    columns: list[Tensor]      # per level with two or more classes: these classes' indices, (n_k,) int64
    targets: Tensor            # (N, levels) int64: which of a level's columns each class belongs to, or -1
    weights: list[float]       # W_k of each level

    def to(self, device: torch.device) -> "Tree":
        return replace(self, columns=[c.to(device) for c in self.columns], targets=self.targets.to(device))


def load_tree(path: str | Path) -> Tree:
    """Reads {"class_tree_list": [[class, its nearest ancestor that is a class, ..., root], ...]}, the format
    of the authors of ImageNet-21k-P and of --build-tree. InputError if it is not that."""
    try:
        content = json.loads(Path(path).read_text())
        chains, names = content["class_tree_list"], content.get("class_list")
        levels = [len(chain) - 1 for chain in chains]
        if not all(type(c) is int and 0 <= c < len(chains) for chain in chains for c in chain):
            raise ValueError("an index outside of the classes")
        for i, chain in enumerate(chains):
            if chain[0] != i or (chain[1:] and chain[1:] != chains[chain[1]]):
                raise ValueError(f"the chain of class {i} is not itself followed by the chain of its parent")
        if max(levels.count(level) for level in levels) < 2:
            raise ValueError("no level with two classes to tell apart")
    except FileNotFoundError:
        raise InputError(f"tree {path} is missing: make it with --build-tree") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        raise InputError(f"tree {path} is not {{\"class_tree_list\": [[class, parent, ..., root], ...]}}: "
                         f"{type(e).__name__} {e}") from None
    columns = [[c for c, level in enumerate(levels) if level == k] for k in range(max(levels) + 1)]
    place = {c: i for classes in columns for i, c in enumerate(classes)}
    kept = [k for k, classes in enumerate(columns) if len(classes) > 1]
    targets = torch.full((len(chains), len(kept)), -1)
    for i, chain in enumerate(chains):
        for c in chain:
            if levels[c] in kept:
                targets[i, kept.index(levels[c])] = place[c]
    # N_0 / N_k, N_k the classes of level k or deeper: deep levels, which few classes reach, count more, up
    # to 20 times. In float32, as theirs, whose losses we match.
    counts = [sum(level >= k for level in levels) for k in kept]
    weights = (torch.tensor(len(levels), dtype=torch.float32) / torch.tensor(counts)).clamp(max=20)
    return Tree(names, [torch.tensor(columns[k]) for k in kept], targets, weights.tolist())


def semantic_softmax_loss(logits: Tensor, target: Tensor, tree: Tree, smoothing: float = 0.2) -> Tensor:
    """One softmax per level of the tree: sum_k W_k CE_k, where CE_k sums, over the images whose class
    reaches level k, the cross-entropy among the classes of that level, with label smoothing, and divides by
    the number of *all* images. (Weights, smoothing 0.2: Ridnik et al. 2021, which A.3 follows.)

    logits: (B, N). target: (B,) int64 -> scalar.
    """
    loss = 0
    for k, (columns, weight) in enumerate(zip(tree.columns, tree.weights)):
        place = tree.targets[target, k]  # (B,)
        log_p = at_least_float32(logits[:, columns]).log_softmax(-1)  # (B, n_k)
        picked = log_p.gather(1, place.clamp(min=0)[:, None])[:, 0]
        losses = -(1 - smoothing) * picked - smoothing * log_p.mean(-1)
        loss = loss + weight * losses[place >= 0].sum() / len(target)
    return loss


def semantic_accuracy(logits: Tensor, target: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """(right, asked): in how many of all (image, level) pairs with a target the best class of that level is
    the right one, and how many pairs there are. Their quotient is the semantic top-1 accuracy."""
    right = asked = torch.zeros((), dtype=torch.int64, device=logits.device)
    for k, columns in enumerate(tree.columns):
        place = tree.targets[target, k]
        right = right + (logits[:, columns].argmax(-1) == place).sum()  # -1 is never the best
        asked = asked + (place >= 0).sum()
    return right, asked


def build_tree(is_a: Path, classes: Path, out: Path) -> str:
    """Writes the json that load_tree reads, from WordNet's is_a list (a line "parent child" each; of several
    parents the last one counts, as in the original tree) and a file with a class (a WordNet id) per line."""
    def lines(path: Path) -> list[list[str]]:
        try:
            return [words for line in path.read_text().splitlines() if (words := line.split())]
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path} cannot be read: {e}") from None
    parents = {}
    for words in lines(is_a):
        if len(words) != 2:
            raise InputError(f"{is_a} is no is_a list: needed are lines of two WordNet ids, not "
                             f"{' '.join(words)[:60]!r}")
        parents[words[1]] = words[0]
    names = sorted({words[0] for words in lines(classes)})
    index, chains = {name: i for i, name in enumerate(names)}, []
    for name in names:
        chain, seen = [index[name]], {name}
        while (name := parents.get(name)) is not None:
            if name in seen:
                raise InputError(f"{is_a} has a circle through {name}")
            seen.add(name)
            if name in index:
                chain.append(index[name])
        chains.append(chain)
    if len(names) < 2 or max(map(len, chains)) < 2:
        raise InputError(f"none of the {len(names)} classes of {classes} is below another in {is_a}: they "
                         "do not belong together")
    try:
        with open(out, "x") as f:  # never over an older file
            json.dump({"class_list": names, "class_tree_list": chains}, f)
    except OSError as e:
        raise InputError(f"cannot write {out} ({e.strerror}): give another name") from None
    return f"{out}: {len(names)} classes, {max(map(len, chains))} levels"
