"""Stage 1: pre-training of the whole encoder on image classification (3.2, 4.1 and A.3).

    python pretrain.py                              generated pictures, minutes on a laptop
    python pretrain.py --data path/to/folder        any folder with train/CLASS/ and val/CLASS/
    torchrun --nproc_per_node=8 pretrain.py --variant lite --data imagenet    the paper's recipe (DeiT)
    torchrun --nproc_per_node=8 pretrain.py --data imagenet21k --tree T.json --init X.pt      A.3

`finetune.py --pretrained` takes the encoder from the last.pt of a run. The authors released no training
code of this stage. It follows the paper, DeiT (Touvron et al. 2021) and, for ImageNet-21k-P, Ridnik et
al. 2021.

This file holds the semantic softmax, the recipe, repeated augmentation and the training loop. Mixup,
CutMix, RandAugment and Cutout are in extras/augment.py.
"""
import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, default_collate

import engine
from data import (CLASSIFICATION_DATA, EMBEDDED_SETS, ClassificationSet, classification_set, digest,
                  to_image)
from deform_attn import operator_path
from engine import InputError, one_line
from extras import pictures, released
from extras.augment import mix, smooth_targets
from model import VARIANTS, Classifier, Config

# ------------------------------------------------------- the semantic softmax (A.3, Ridnik et al. 2021)
# ImageNet-21k labels an image with one class, but a dog is an animal too. So every level of the WordNet
# hierarchy has a softmax of its own.

@dataclass
class Tree:
    """The classes' hierarchy. A class's level is the number of its
    ancestors that are classes themselves."""
    classes: list[str] | None  # their names, if the file has them
    members: list[Tensor]      # (n_k,) int64: the classes of each level that has two or more
    targets: Tensor            # (K, levels) int64: where a class, or its ancestor, stands in members[k],
    #                            or -1 if neither is on the level
    weights: list[float]       # W_k of each level


def load_tree(path: str | Path) -> Tree:
    """Reads {"class_tree_list": [[class, its nearest ancestor that is a class, ...,
    root], ...]}, the format of the authors of ImageNet-21k-P and of
    extras/imagenet21k_tree.py. InputError if it is not that."""
    try:
        content = json.loads(Path(path).read_bytes())
        chains, names = content["class_tree_list"], content.get("class_list")
        levels = [len(chain) - 1 for chain in chains]
        if not all(type(c) is int and 0 <= c < len(chains) for chain in chains for c in chain):
            raise ValueError("an index outside of the classes")
        for i, chain in enumerate(chains):
            if chain[0] != i or (chain[1:] and chain[1:] != chains[chain[1]]):
                raise ValueError(f"the chain of class {i} is not {i} and then its parent's chain")
        if max(levels.count(level) for level in levels) < 2:
            raise ValueError("no level with two classes to tell apart")
    except FileNotFoundError:
        raise InputError(f"tree {path} is missing: python -m extras.imagenet21k_tree makes it") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        form = '{"class_tree_list": [[class, parent, ..., root], ...]}'
        raise InputError(f"tree {path} is not {form}: {one_line(e)}") from None
    members = [[c for c, level in enumerate(levels) if level == k] for k in range(max(levels) + 1)]
    place_of = {c: i for classes in members for i, c in enumerate(classes)}
    kept = [k for k, classes in enumerate(members) if len(classes) > 1]
    targets = torch.full((len(chains), len(kept)), -1)
    for i, chain in enumerate(chains):
        for c in chain:
            if levels[c] in kept:
                targets[i, kept.index(levels[c])] = place_of[c]
    # W_k = N_0 / N_k, at most 20, where N_k classes are on level k or deeper. Few classes reach the deep
    # levels, so these count more. Computed in float32, as in the authors' code.
    counts = [sum(level >= k for level in levels) for k in kept]
    weights = (torch.tensor(len(levels), dtype=torch.float32) / torch.tensor(counts)).clamp(max=20)
    return Tree(names, [torch.tensor(members[k]) for k in kept], targets, weights.tolist())


def semantic_softmax_loss(logits: Tensor, target: Tensor, tree: Tree, smoothing: float = 0.2) -> Tensor:
    """sum_k W_k CE_k over the levels that have two or more classes. CE_k sums the cross-entropy among
    the classes of level k, with label smoothing, over the images with a class on this level, and divides
    by the number of *all* images.

    logits: (B, K). target: (B,) int64 -> scalar.
    """
    loss = 0
    for k, (members, weight) in enumerate(zip(tree.members, tree.weights)):
        place = tree.targets[target, k]  # (B,)
        level_logits = logits[:, members]  # (B, n_k)
        log_p = level_logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        picked = log_p.gather(1, place.clamp(min=0)[:, None])[:, 0]
        losses = -(1 - smoothing) * picked - smoothing * log_p.mean(-1)
        loss = loss + weight * losses[place >= 0].sum() / len(target)
    return loss


def semantic_accuracy(logits: Tensor, target: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """(right, asked): the number of (image, level) pairs in which the level's best class is right, and
    the number of pairs with a target. Their quotient is the semantic top-1 accuracy."""
    right = asked = torch.zeros((), dtype=torch.int64, device=logits.device)
    for k, members in enumerate(tree.members):
        place = tree.targets[target, k]
        right = right + (logits[:, members].argmax(-1) == place).sum()  # -1 is never the best
        asked = asked + (place >= 0).sum()
    return right, asked


# ------------------------------------------------------------------------------------- the recipe (4.1)

# ImageNet-21k-P (A.3). Where the paper is silent, we follow the public script of Ridnik et al. 2021. We
# differ in three things. The optimiser is AdamW, because A.3 says "True-weight-decay"; the script has
# Adam with the decay in the gradient. Colours are normalised, as for the ImageNet-1k weights that it
# starts from. Validation images are centre crops; the script squeezes them.
RECIPE_21K = dict(variant="base", epochs=80, batch_size=4096, lr=3e-4, weight_decay=1e-4, augment="21k",
                  schedule="one-cycle", repeats=1, mixup=0.0, cutmix=0.0, smoothing=0.2, drop_path=0.0)
FEW_STEPS = 3000  # with fewer, a fresh model learns little
# Ours, for the generated data.
SHAPES_RECIPE = dict(epochs=4, batch_size=32, micro_batch=32, lr=1e-3, schedule="one-cycle",
                     image_size=64, augment="flip", repeats=1, mixup=0.0, cutmix=0.0, drop_path=0.0,
                     workers=0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=engine.Help, allow_abbrev=False,
        epilog=f"The defaults are the paper's for ImageNet-1k, or DeiT's. With --data imagenet21k they "
        f"are instead: {engine.as_flags(RECIPE_21K)}. With --data shapes or shapes-hard: "
        f"{engine.as_flags(SHAPES_RECIPE)}")
    parser.add_argument("--data", type=os.path.normpath, default="shapes", help=CLASSIFICATION_DATA)
    parser.add_argument("--init",
                        help="checkpoint of pretrain.py to start from (A.3: that of ImageNet-1k)")
    parser.add_argument("--epochs", type=engine.positive, default=300,
                        help="passes over the training set (4.1)")
    parser.add_argument("--batch-size", type=engine.positive, default=1024,
                        help="images per step, over all GPUs (4.1)")
    # DeiT's own rule, 5e-4 * batch / 512, would give 1e-3. We follow the paper.
    parser.add_argument("--lr", type=engine.rate, default=5e-4, help="highest learning rate (4.1)")
    parser.add_argument("--schedule", choices=("cosine", "one-cycle"), default="cosine",
                        help="cosine: after a warm-up, by epochs (DeiT); one-cycle: by steps, torch's "
                             "(ImageNet-21k-P)")
    parser.add_argument("--warmup-epochs", type=engine.natural, default=5,
                        help="of --schedule cosine (DeiT)")
    parser.add_argument("--weight-decay", type=engine.rate, default=0.05,
                        help="AdamW's, not on norms, biases, class token and positions (DeiT)")
    parser.add_argument("--image-size", type=engine.number(int, 64), default=224,
                        help="side of the square, 64 or more: the coarsest tokens are 64 pixels wide")
    parser.add_argument("--augment", choices=("deit", "21k", "flip", "none"), default="deit",
                        help="deit: crop, flip, RandAugment, random erasing; 21k: Cutout, RandAugment")
    parser.add_argument("--repeats", type=engine.positive, default=3,
                        help="copies of an image in a row, each augmented anew; an epoch shows 1/N of "
                             "all images")
    parser.add_argument("--mixup", type=engine.rate, default=0.8, help="alpha of mixup; 0 for none")
    parser.add_argument("--cutmix", type=engine.rate, default=1.0, help="alpha of CutMix; 0 for none")
    parser.add_argument("--smoothing", type=engine.fraction, default=0.1, help="label smoothing")
    parser.add_argument("--drop-path", type=engine.fraction, default=0.1,
                        help="stochastic depth: probability in the last layer, growing from 0 in the "
                             "first")
    parser.add_argument("--tree", help="train with the semantic softmax over this tree (A.3)")
    parser.add_argument("--class-tokens", type=engine.positive, default=1,
                        help="pooled into one before the classifier (A.2, Table 7: 300 for FP-EncDec)")
    machine = engine.add_training_flags(parser, VARIANTS)
    machine.add_argument("--compile", action="store_true",
                         help="torch.compile: slow start, faster steps (not in fine-tuning, where images "
                              "have many sizes)")
    parser.set_defaults(micro_batch=128)

    known, _ = parser.parse_known_args(arguments)
    if known.data in EMBEDDED_SETS:
        parser.set_defaults(**SHAPES_RECIPE)
    elif known.data == "imagenet21k":
        parser.set_defaults(**RECIPE_21K)
    args = parser.parse_args(arguments)
    if args.data == "imagenet21k" and not args.tree:
        parser.error("--data imagenet21k needs --tree: make one with python -m extras.imagenet21k_tree")
    if args.tree and (args.mixup or args.cutmix):
        parser.error("--tree needs --mixup 0 --cutmix 0: the semantic softmax has one label per image")
    return args


def build_optimizer(model: Classifier, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW. Norms, biases, the class token, its position and the level embedding have no weight decay.
    (DeiT exempts its class token and position embeddings.)"""
    decayed, spared = [], []
    for name, p in model.named_parameters():
        (decayed if "weight" in name and p.ndim > 1 else spared).append(p)
    return torch.optim.AdamW([{"params": decayed}, {"params": spared, "weight_decay": 0.0}],
                             lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)


WARMUP_START, COSINE_END = 1e-6, 1e-5  # DeiT's learning rates at the start of its warm-up and at the end


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """The learning rate at `step`, counted from 0 over the whole run.

    cosine (DeiT): constant within an epoch t. Linear in t during the warm-up, then end + (lr - end)(1 +
    cos(pi t / epochs)) / 2. one-cycle (Smith 2018; torch's OneCycleLR, as in Ridnik et al.): from lr /
    20 up by a cosine in the first tenth of the steps, then down by a cosine to lr / 200,000.
    """
    def cosine(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    if args.schedule == "cosine":
        epoch = step // steps_per_epoch
        if epoch < args.warmup_epochs:
            return WARMUP_START + (args.lr - WARMUP_START) * epoch / args.warmup_epochs
        return cosine(args.lr, COSINE_END, epoch / args.epochs)
    top, last = 0.1 * args.epochs * steps_per_epoch - 1, args.epochs * steps_per_epoch - 1
    if step < top:
        return cosine(args.lr / 20, args.lr, step / top)
    return cosine(args.lr, args.lr / 20 / 1e4, (step - top) / (last - top) if last > top else 1)


class RepeatedSampler(engine.BatchSampler):
    """Repeated augmentation (Berman et al. 2019, in the version of DeiT): each image of a shuffled
    order comes `repeats` times in a row. An epoch has as many items as there are images, rounded down
    to a multiple of 256. With repeats 1 this is plain shuffling. An incomplete last batch is dropped,
    unless it is the only one.

    A copy of image i has the index i + copy * length. Mixup and CutMix mix the items at the positions p
    and B - 1 - p of a batch of B. So the same process gets both.
    """

    def __init__(self, length: int, batch_size: int, seed: int, repeats: int):
        super().__init__(length, batch_size, seed)
        self.repeats = repeats
        self.used = length // 256 * 256 if repeats > 1 and length >= 256 else length

    def __len__(self) -> int:
        return max(1, self.used // self.batch_size)

    def images_after(self, step: int) -> int:
        return step * min(self.batch_size, self.used)

    def batches(self) -> tuple[Tensor, ...]:
        order = self.order()[:, None] + torch.arange(self.repeats) * self.length  # (length, repeats)
        return order.flatten()[:self.used].split(self.batch_size)[:len(self)]

    def share(self, batch: Tensor) -> list[int]:
        position = torch.arange(len(batch))
        pair = torch.minimum(position, len(batch) - 1 - position)
        return batch[pair % engine.world_size() == engine.rank()].tolist()


def train_step(model: Classifier, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
               num_classes: int, rng: np.random.Generator, tree: Tree | None,
               args: argparse.Namespace) -> dict[str, Tensor]:
    """One step on this process's share of a batch.

    Args:
        images: (B, 3, H, W). labels: (B,) int64. rng: of mixup and CutMix.
    Returns:
        this process's share of the loss and of the right answers of the total batch: scalars.
    Raises:
        FloatingPointError: the gradient is not finite. No weight has changed.
    """
    targets = None
    if tree is None:
        targets = smooth_targets(labels, num_classes, args.smoothing)  # (B, K)
        # The whole share is mixed at once, so that the pairs do not depend on --micro-batch.
        images, targets = mix(images, targets, rng, args.mixup, args.cutmix)
    total = engine.sum_over_processes(len(images), images.device)
    optimizer.zero_grad(set_to_none=True)
    sums = {k: torch.zeros((), device=images.device) for k in ("loss", "right")}
    for start in range(0, len(images), args.micro_batch):
        part = slice(start, start + args.micro_batch)
        with engine.autocast(args, images.device):
            logits = model(images[part])  # (b, K)
        if tree is None:
            loss = -(targets[part] * logits.float().log_softmax(-1)).sum() / total
        else:
            mean = semantic_softmax_loss(logits, labels[part], tree, args.smoothing)
            loss = mean * len(logits) / total
        loss.backward()
        sums["loss"] += loss.detach()
        sums["right"] += (logits.argmax(-1) == labels[part]).sum() / total
    engine.sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # clips nothing
    if not norm.isfinite():
        raise FloatingPointError
    optimizer.step()
    return sums


@torch.no_grad()
def evaluate(model: Classifier, dataset: ClassificationSet, tree: Tree | None, args: argparse.Namespace,
             device: torch.device) -> dict[str, float]:
    """{"top1", "top5"} and, with a tree, {"semantic_top1"}, in [0, 1], on the middle of every image."""
    model.eval()
    share = Subset(dataset, range(engine.rank(), len(dataset), engine.world_size()))
    loader = engine.make_loader(share, default_collate, args, device, batch_size=args.micro_batch)
    counts = torch.zeros(4, device=device)  # top-1, top-5, right and asked of the tree
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with engine.autocast(args, device):
            logits = model(images)
        best = logits.topk(min(5, logits.shape[1]), -1).indices == labels[:, None]  # (B, 5)
        counts[:2] += torch.stack([best[:, 0].sum(), best.sum()])
        if tree is not None:
            counts[2:] += torch.stack(semantic_accuracy(logits, labels, tree))
    top1, top5, right, asked = engine.sum_over_processes(counts, device).tolist()
    scores = {"top1": top1 / len(dataset), "top5": top5 / len(dataset)}
    return scores if tree is None else {**scores, "semantic_top1": right / max(asked, 1)}


# ------------------------------------ the command: the paper ends here, the rest is reading and writing

def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A process's share of a batch. It is empty if there are more processes than pairs of images."""
    if not samples:
        return torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64)
    return default_collate(samples)


def read_tree(args: argparse.Namespace, train: ClassificationSet, device: torch.device) -> Tree | None:
    """The tree of --tree, on `device`. InputError if its classes are not those of the training set."""
    if args.tree is None:
        return None
    tree = load_tree(args.tree)
    if len(tree.targets) != len(train.classes) or tree.classes not in (None, train.classes):
        differ = ", ".join(sorted(set(tree.classes or []) ^ set(train.classes)))[:200]
        raise InputError(f"tree {args.tree} has {len(tree.targets)} classes, {train.name} has "
                         f"{len(train.classes)} ({differ} differ): build the tree from the list of just "
                         f"these classes")
    return replace(tree, members=[classes.to(device) for classes in tree.members],
                   targets=tree.targets.to(device))


@torch.no_grad()
def draw_predictions(model: Classifier, val: ClassificationSet, device: torch.device,
                     path: Path) -> None:
    """Writes a sheet of 16 pictures from all over the validation set, with the model's answers."""
    chosen = [val[i] for i in range(0, len(val), max(1, len(val) // 16))[:16]]
    # One by one: a batch of another size may round differently.
    probabilities = torch.cat([model(pixels[None].to(device)).softmax(-1).cpu() for pixels, _ in chosen])
    pictures.predictions_sheet([to_image(pixels) for pixels, _ in chosen], probabilities,
                               [label for _, label in chosen], val.classes).save(path)


def main(classifier: Callable[[Config, int], Classifier] = Classifier,
         read_data: Callable[..., ClassificationSet] = classification_set) -> None:
    """The command. A fork passes a function (config, number of classes) -> its own classifier, or one
    that reads its own data with the arguments of `data.classification_set` by keyword."""
    args = parse()
    device = engine.setup(args)
    run = engine.Run(args, "pretrain")

    # Data, model and weights come before anything is written, so bad input leaves nothing behind.
    options = dict(data=args.data, root=args.data_root, image_size=args.image_size, seed=args.seed)
    train = read_data(split="train", limit=args.limit_train, augment=args.augment, **options)
    val = read_data(split="val", limit=args.limit_val, augment="none", **options)
    engine.check_classes(train, val)
    tree = read_tree(args, train, device)
    config = replace(VARIANTS[args.variant], drop_path=args.drop_path, structure=args.structure,
                     class_tokens=args.class_tokens, adaptor="none")  # adaptors belong to detection
    model = released.build_model(classifier, config, len(train.classes), args.layout)
    description = engine.describe_run(model, args, "pretrain", train.classes, len(train),
                                      training_set=train.digest, validation_set=val.digest,
                                      tree=digest(Path(args.tree).read_bytes()) if args.tree else None)
    checkpoint = released.read_checkpoint(args.init) if args.init and not run.resumed else {}
    state = run.load(model, description, checkpoint, args.init)
    model.to(device)
    model.encoder.checkpointing = args.activation_checkpointing
    engine.broadcast_weights(model)
    optimizer = build_optimizer(model, args)
    if run.resumed:
        optimizer.load_state_dict(state["optimizer"])
    forward = torch.compile(model) if args.compile else model
    sampler = RepeatedSampler(len(train), args.batch_size, args.seed, args.repeats)
    loader = engine.make_loader(train, collate, args, device, batch_sampler=sampler)
    steps = len(loader)  # per epoch
    engine.check_epochs(args, state, steps)
    operator = operator_path(model, device, args.amp == "bf16")
    engine.first_line(args, model, train, steps, device, operator)
    if steps * args.epochs < FEW_STEPS and args.data not in EMBEDDED_SETS and not args.init:
        engine.note(f"this run has fewer than {FEW_STEPS:,} steps, too few to learn from: give a "
                    f"smaller --batch-size and more --epochs")
    run.open(args)
    if engine.rank() == 0 and not run.resumed:
        pictures.training_sheet(train, sampler.order()[:8].tolist(), run.folder / "training.png")

    step, best, scores = state["step"], state["best"], state["scores"]
    recent = []  # losses of the steps since the last entry of the log
    bar = engine.progress_bar(f"pre-training {args.variant} on {train.name}",
                              sampler.images_after(args.epochs * steps), sampler.images_after(step))

    def save(epochs_done: int) -> None:
        run.save(description, model, optimizer, epoch=epochs_done, step=step, best=best, scores=scores)

    for epoch in range(state["epoch"], args.epochs):
        sampler.epoch = train.epoch = epoch
        sampler.skip = step - epoch * steps
        model.train()
        try:
            for images, labels in engine.read_batches(loader, run):
                engine.seed_step(args.seed, step)
                lr = learning_rate(args, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # The mixing is the same in every process.
                rng = np.random.default_rng((args.seed, epoch, step, 1))
                images = images.to(device, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                classes = len(train.classes)
                recent.append(train_step(forward, optimizer, images, labels, classes, rng, tree, args))
                step += 1
                bar.update(sampler.images_after(step) - bar.n)
                if step % 10 == 0 or step % steps == 0:
                    mean = engine.mean_over_steps(recent)
                    recent.clear()
                    # Right answers among mixed pictures would say little.
                    top1 = {} if args.mixup or args.cutmix else {"train_top1": mean["right"]}
                    run.log(epoch=epoch + 1, step=step, loss=mean["loss"], **top1, lr=lr)
                    bar.set_postfix(loss=f"{mean['loss']:.3f}", refresh=False)
                if run.must_save():
                    save(epoch)

            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                save(epoch)  # an evaluation takes long
                with run.interruptible():
                    scores = evaluate(forward, val, tree, args, device)
                run.log(epoch=epoch + 1, step=step, **scores)
                if engine.rank() == 0:
                    draw_predictions(model, val, device, run.folder / "predictions.png")
                    log = engine.read_log(run.folder / "log.jsonl")
                    pictures.draw_curves(log, tuple(scores), run.folder / "curves.png")
                    bar.write(f"epoch {epoch + 1}: {engine.in_percent(scores)}")
                if scores["top1"] > best:
                    best = scores["top1"]
                    content = {**description, "model": model.state_dict(), "scores": scores,
                               "epoch": epoch + 1, "step": step}
                    engine.save_checkpoint(run.folder / "best.pt", content)
                save(epoch + 1)
        except InputError:  # a broken image: --resume goes on here when it is replaced
            save(epoch)
            raise
        except engine.Terminated:
            save(epoch)
            return run.say_how_to_go_on(step)
        except FloatingPointError:
            raise engine.not_finite(train, sampler, step) from None
    bar.close()
    run.finish(model, args, val, scores, step)


if __name__ == "__main__":
    engine.run_script(main)
