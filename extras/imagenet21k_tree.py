"""Builds the class tree of ImageNet-21k-P, which `pretrain.py --tree` reads, from WordNet (A.3).

    python -m extras.imagenet21k_tree TREE.json --is-a is_a.txt --classes synsets.txt

is_a.txt has a line "parent child" for each relation of WordNet.
synsets.txt has a class, a WordNet id, per line.
"""
import argparse
import json
from pathlib import Path

from engine import Help, InputError, run_script


def build_tree(is_a: Path, classes: Path, out: Path) -> str:
    """Writes {"class_list": names, "class_tree_list": [[class, parent, ..., root], ...]} and returns a
    line about it. Ancestors that are not classes are skipped. If a class has several parents, the last
    one counts, as in the original tree. InputError if a file is not as described."""
    parents = {}
    for words in read_words(is_a):
        if len(words) != 2:
            raise InputError(f"{is_a} is no is_a list: needed are lines of two WordNet ids, not "
                             f"{' '.join(words)[:60]!r}")
        parents[words[1]] = words[0]
    names = sorted({words[0] for words in read_words(classes)})
    index = {name: i for i, name in enumerate(names)}
    chains = []
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
        with open(out, "x") as f:  # never replaces an older file
            json.dump({"class_list": names, "class_tree_list": chains}, f)
    except OSError as e:
        raise InputError(f"cannot write {out} ({e.strerror}): give another name") from None
    return f"{out}: {len(names)} classes, {max(map(len, chains))} levels"


def read_words(path: Path) -> list[list[str]]:
    """The words of each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [words for line in lines if (words := line.split())]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read: {e}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("tree", type=Path, help="file to write")
    parser.add_argument("--is-a", type=Path, required=True, help="WordNet's is_a list")
    parser.add_argument("--classes", type=Path, required=True, help="file with a WordNet id per line")
    args = parser.parse_args()
    print(build_tree(args.is_a, args.classes, args.tree))


if __name__ == "__main__":
    run_script(main)
