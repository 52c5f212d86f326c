"""Stage 1: pre-training of the whole encoder on image classification (Section 3.2, 4.1 and A.3).

    python pretrain.py                              the embedded data, minutes on a laptop
    python pretrain.py --data path/to/folder        any folder with a folder of images per class
    torchrun --nproc_per_node=8 pretrain.py --variant lite --data imagenet        the paper's recipe (DeiT)

ImageNet-21k-P (A.3): the tree of its classes, then the training.

    python pretrain.py --build-tree T.json --is-a is_a.txt --classes synsets.txt
    torchrun --nproc_per_node=8 pretrain.py --data imagenet21k --tree T.json --init X.pt

`finetune.py --pretrained` takes the encoder from the last.pt that this leaves. The authors released no
training code of this stage: it follows the paper, DeiT and, for ImageNet-21k-P, Ridnik et al. 2021.
"""
import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import checkpoints
import engine
import run_folder
from augment import ClassificationTransform, mix, smooth_targets
from benchmark import benchmark
from data import ClassificationSet, classification_set
from linear_baseline import linear_baseline
from model import VARIANTS, Classifier, Config, InputError
from non_finite import image_name, stop_at_non_finite
from pictures import picture_predictions
from report import write_json
from semantic import Tree, build_tree, load_tree, semantic_accuracy, semantic_softmax_loss
from shapes import COLOURS

# ---------------------------------------------------------------------------------------------------- recipe

# What ImageNet-21k-P (A.3; what it omits, the public script of Ridnik et al. 2021) and the embedded data
# change in the recipe of ImageNet-1k. That script differs in Adam with decay in the gradient (A.3: "true
# weight decay", hence AdamW), colours that are not normalised (our weights come from ImageNet-1k, where they
# were), the defaults of the randaugment package (here RandAugment of stage 1), squeezed validation images.
RECIPE_21K = dict(variant="base", epochs=80, batch_size=4096, lr=3e-4, weight_decay=1e-4, augment="21k",
                  schedule="one-cycle", repeats=1, mixup=0.0, cutmix=0.0, smoothing=0.2, drop_path=0.0)
SHAPES_RECIPE = dict(epochs=4, batch_size=32, micro_batch=32, lr=1e-3, schedule="one-cycle", image_size=64,
                     augment="flip", repeats=1, mixup=0.0, cutmix=0.0, drop_path=0.0, workers=0,
                     eval_every=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=engine.Help,
        epilog=f"The defaults are the paper's for ImageNet-1k, or DeiT's. With --data imagenet21k they are "
        f"instead: {engine.as_flags(RECIPE_21K)}. With --data shapes or shapes-hard: "
        f"{engine.as_flags(SHAPES_RECIPE)}")
    engine.add_run_flags(parser)
    engine.add_data_flags(parser, "shapes or shapes-hard (generated), imagenet, imagenet21k, or any "
                                  "folder with train/ and val/, each with a folder of images per class",
                          "where imagenet or imagenet21k lies (default: data/imagenet, data/imagenet21k)")
    parser.add_argument("--class-tokens", type=engine.positive, default=1,
                        help="pooled into one before the classifier (A.2, Table 7: 300 for FP-EncDec)")
    parser.add_argument("--init", help="checkpoint of pretrain.py to start from (A.3: that of ImageNet-1k)")
    parser.add_argument("--augment", choices=("deit", "21k", "flip", "none"), default="deit",
                        help="deit: crop, flip, RandAugment, random erasing; 21k: Cutout, RandAugment")
    parser.add_argument("--repeats", type=engine.positive, default=3,
                        help="copies of an image in a row, each augmented anew; an epoch shows 1/N of all")
    parser.add_argument("--erasing", type=engine.fraction, default=0.25, help="random erasing: probability")
    parser.add_argument("--mixup", type=engine.rate, default=0.8, help="alpha of mixup; 0 for none")
    parser.add_argument("--cutmix", type=engine.rate, default=1.0, help="alpha of CutMix; 0 for none")
    parser.add_argument("--smoothing", type=engine.fraction, default=0.1, help="label smoothing")
    parser.add_argument("--drop-path", type=engine.fraction, default=0.1,
                        help="stochastic depth: probability in the last layer, from 0 in the first on")
    parser.add_argument("--tree", type=Path, help="train with the semantic softmax over this tree (A.3)")
    parser.add_argument("--schedule", choices=("cosine", "one-cycle"), default="cosine",
                        help="cosine: after a warm-up, by epochs, as DeiT; one-cycle: by steps, torch's, "
                             "as ImageNet-21k-P")
    parser.add_argument("--warmup-epochs", type=engine.natural, default=5, help="of --schedule cosine")
    parser.add_argument("--warmup-lr", type=engine.rate, default=1e-6, help="where cosine's warm-up starts")
    parser.add_argument("--min-lr", type=engine.rate, default=1e-5, help="where cosine ends")
    parser.add_argument("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    parser.add_argument("--linear-baseline", action="store_true",
                        help="instead of training: top-1 of a linear classifier on the raw pixels")
    tools = parser.add_argument_group("making the tree, instead of training")
    tools.add_argument("--build-tree", type=Path, metavar="TREE.json", help="write this tree, for --tree")
    tools.add_argument("--is-a", type=Path, help="WordNet's is_a list: lines of parent and child")
    tools.add_argument("--classes", type=Path, help="file with a WordNet id per line")
    # 4.1: lr 5e-4 at batch 1024. DeiT's own rule, 5e-4 * batch / 512, would give 1e-3: we follow the paper.
    parser.set_defaults(epochs=300, batch_size=1024, micro_batch=128, lr=5e-4, weight_decay=0.05,
                        image_size=224)
    known, _ = parser.parse_known_args()
    recipes = {**dict.fromkeys(COLOURS, SHAPES_RECIPE), "imagenet21k": RECIPE_21K}
    parser.set_defaults(**recipes.get(known.data, {}))
    args = parser.parse_args()
    check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program, as argparse does, where flags do not fit together."""
    if args.image_size < 64:
        parser.error("--image-size must be 64 or more: the coarsest tokens are 64 pixels wide")
    if args.build_tree and not (args.is_a and args.classes):
        parser.error("--build-tree needs --is-a and --classes")
    if args.data == "imagenet21k" and not (args.tree or args.build_tree):
        parser.error("--data imagenet21k needs --tree: make one with --build-tree (A.3 trains with it)")
    if args.tree and (args.mixup or args.cutmix):
        parser.error("--tree needs --mixup 0 --cutmix 0: the semantic softmax has one label per image")


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """At `step`, counted from 0 over the whole run.

    cosine (DeiT): constant within an epoch t; warm-up linear in t, then min + (lr - min)(1 + cos(pi t /
    epochs)) / 2. one-cycle (Smith 2018, as Ridnik et al. use torch's OneCycleLR): from lr / 20 up
    by a cosine in the first tenth of the steps, then down by a cosine to lr / 200,000.
    """
    def cosine(start, end, progress):
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    if args.schedule == "cosine":
        epoch = step // steps_per_epoch
        if epoch < args.warmup_epochs:
            return args.warmup_lr + (args.lr - args.warmup_lr) * epoch / args.warmup_epochs
        return cosine(args.lr, args.min_lr, epoch / args.epochs)
    top, last = 0.1 * args.epochs * steps_per_epoch - 1, args.epochs * steps_per_epoch - 1
    if step < top:
        return cosine(args.lr / 20, args.lr, step / top)
    return cosine(args.lr, args.lr / 20 / 1e4, (step - top) / (last - top) if last > top else 1)


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A process's share of a batch, which is empty where there are more processes than pairs of images."""
    return default_collate(samples) if samples else (torch.empty(0, 3, 1, 1),
                                                     torch.empty(0, dtype=torch.int64))


class RepeatedSampler(engine.BatchSampler):
    """Repeated augmentation (Berman et al. 2019, as DeiT has it): every image of a shuffled order `repeats`
    times in a row, but only as many as one epoch of single images has, rounded down to a multiple of 256.
    With repeats 1: plain shuffling. An incomplete last batch is dropped, unless it is the only one.

    A copy of image i has the index i + copy * length. A process gets positions p and B - 1 - p of a batch of
    B together, since these two are mixed.
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


# -------------------------------------------------------------------------------------------------- training

def train_step(model: Classifier, optimizer: Optimizer, images: Tensor, labels: Tensor, num_classes: int,
               rng: np.random.Generator, tree: Tree | None, args: argparse.Namespace,
               mark: Callable[[str], None] = engine.no_mark) -> dict[str, Tensor]:
    """One step on this process's share of a batch: images (B, 3, H, W), labels (B,) int64. Returns its share
    of the loss and of the right answers. Raises FloatingPointError, before any weight is changed, if the
    loss is not finite. `mark`: called with the name of each part of the step when it is done."""
    targets = None
    if tree is None:
        targets = smooth_targets(labels, num_classes, args.smoothing)
        # of the whole share, so that the pairs do not depend on --micro-batch
        images, targets = mix(images, targets, rng, args.mixup, args.cutmix)
    total = engine.sum_over_processes(len(images), images.device)
    optimizer.zero_grad(set_to_none=True)
    sums = {"loss": torch.zeros((), device=images.device), "right": torch.zeros((), device=images.device)}
    loss_so_far = sums["loss"].item
    mark("copying and mixing")
    for start in range(0, len(images), args.micro_batch):
        part = slice(start, start + args.micro_batch)
        with engine.autocast(args, images.device):
            logits = model(images[part])
        if tree is None:
            loss = -(targets[part] * logits.float().log_softmax(-1)).sum() / total
        else:
            loss = semantic_softmax_loss(logits, labels[part], tree, args.smoothing) * len(logits) / total
        sums["loss"] += loss.detach()
        sums["right"] += (logits.argmax(-1) == labels[part]).sum() / total
        loss_so_far = engine.on_host(sums["loss"])
        mark("forward and loss")
        loss.backward()
        mark("backward")
    if not math.isfinite(loss_so_far()):
        raise FloatingPointError
    engine.sum_gradients(model)
    optimizer.step()
    mark("optimiser")
    return sums


@torch.no_grad()
def evaluate(model: Classifier, dataset: ClassificationSet, tree: Tree | None, args: argparse.Namespace,
             device: torch.device) -> dict[str, float]:
    """{"top1", "top5"} and, with a tree, {"semantic_top1"}, in [0, 1], on the middle of every image."""
    model.eval()
    share = torch.utils.data.Subset(dataset, range(engine.rank(), len(dataset), engine.world_size()))
    counts = torch.zeros(4, device=device)
    for images, labels in DataLoader(share, args.micro_batch, num_workers=args.workers):
        images, labels = images.to(device), labels.to(device)
        with engine.autocast(args, device):
            logits = model(images)
        best = logits.topk(min(5, logits.shape[1]), -1).indices == labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum(), *(
            semantic_accuracy(logits, labels, tree) if tree else torch.zeros(2, device=device))])
    top1, top5, right, asked = engine.sum_over_processes(counts, device).tolist()
    scores = {"top1": top1 / len(dataset), "top5": top5 / len(dataset)}
    return {**scores, "semantic_top1": right / max(asked, 1)} if tree else scores


def read_sets(args: argparse.Namespace, read_data: Callable) -> tuple[ClassificationSet, ClassificationSet]:
    """The training and the validation set. InputError if they have not the same classes."""
    def read(split: str, kind: str, limit: int | None) -> ClassificationSet:
        transform = ClassificationTransform(args.image_size, kind, args.erasing)
        return read_data(data=args.data, split=split, transform=transform, root=args.data_root, limit=limit,
                         seed=args.seed)
    train = read("train", args.augment, args.limit_train)
    val = read(args.split, "none", args.limit_val)
    if train.classes != val.classes:
        raise InputError(f"{train.name} and {val.name} have different class folders: "
                         f"{', '.join(sorted(set(train.classes) ^ set(val.classes)))[:200]}")
    return train, val


def prepare(args: argparse.Namespace, device: torch.device, classifier: Callable[[Config, int], Classifier],
            read_data: Callable[..., ClassificationSet]
            ) -> tuple[ClassificationSet, ClassificationSet, Tree | None, Classifier, dict | None]:
    """Everything that can fail on bad input, before anything is written: training and validation set, tree,
    model, and the checkpoint of a run that goes on."""
    train, val = read_sets(args, read_data)
    tree = load_tree(args.tree).to(device) if args.tree else None
    if tree and len(tree.targets) != len(train.classes):
        raise InputError(f"tree {args.tree} has {len(tree.targets)} classes, {train.name} has "
                         f"{len(train.classes)}: build the tree from the list of just these classes")
    if tree and tree.classes not in (None, train.classes):
        raise InputError(f"tree {args.tree} names other classes than the folders of {train.name}, "
                         f"{', '.join(sorted(set(tree.classes) ^ set(train.classes)))[:200]}: build the "
                         f"tree from the list of just these classes")
    config = replace(VARIANTS[args.variant], drop_path=args.drop_path, structure=args.structure,
                     class_tokens=args.class_tokens, adaptor="none")  # which only detection has
    model = checkpoints.build(classifier, config, args.layout, len(train.classes))
    state = checkpoints.load_weights(model, args, "pretrain", train.classes, args.init)
    engine.check_images(train, val)
    model.to(device)
    model.encoder.checkpointing = args.activation_checkpointing
    engine.broadcast_weights(model)
    return train, val, tree, model, state


def train_epoch(model: Classifier, optimizer: Optimizer, loader: DataLoader, train: ClassificationSet,
                tree: Tree | None, step: int, args: argparse.Namespace, device: torch.device,
                run: run_folder.Run, save: Callable[[int, int], None], bar: tqdm) -> int:
    """Trains the remaining steps of an epoch and logs every tenth. `step`: how many the run has taken so far
    -> the new number."""
    model.train()
    sampler, steps, meters = loader.batch_sampler, len(loader), run_folder.Mean()
    sampler.skip = step - sampler.epoch * steps
    for images, labels in loader:
        engine.seed_step(args.seed, step)
        lr = learning_rate(args, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        # the same in every process, and for every part of the batch
        seed = (args.seed, sampler.epoch, step, 1)
        try:
            mark = run.within_step(partial(save, sampler.epoch, step))
            meters.add(train_step(model, optimizer, images, labels, len(train.classes),
                                  np.random.default_rng(seed), tree, args, mark))
        except FloatingPointError:
            explain_non_finite(model, images, sampler.share(sampler.batches()[step % steps]), train, args,
                               step)
        step += 1
        bar.update(sampler.images_after(step) - bar.n)
        if step % 10 == 0 or step % steps == 0:
            means = meters.take()
            # the right answers among mixed pictures would say little
            top1 = {} if args.mixup or args.cutmix else {"train_top1": means["right"]}
            run.log(epoch=sampler.epoch + 1, step=step, loss=means["loss"], **top1, lr=lr)
            bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
        run.after_step(partial(save, sampler.epoch, step))
    return step


def explain_non_finite(model: Classifier, images: Tensor, indices: list[int], train: ClassificationSet,
                       args: argparse.Namespace, step: int) -> None:
    """Raises the InputError that says which module and images spoilt the loss of `step`."""
    model = getattr(model, "_orig_mod", model)  # compiled code does not tell of its modules

    def forward(part):
        with engine.autocast(args, images.device):
            return model(part)
    names = [image_name(train.items[i % len(train)][0], i % len(train)) for i in indices]
    stop_at_non_finite(model, [(names[i:i + args.micro_batch],
                                       partial(forward, images[i:i + args.micro_batch]))
                                      for i in range(0, len(names), args.micro_batch)], args, step)


def train(args: argparse.Namespace, device: torch.device, classifier: Callable[[Config, int], Classifier],
          read_data: Callable[..., ClassificationSet]) -> None:
    """One run, to its end; or, with --benchmark, a few steps."""
    run = run_folder.Run(args, "pretrain")
    args.out = run.folder
    train_set, val_set, tree, model, state = prepare(args, device, classifier, read_data)
    groups = engine.parameter_groups(model, args.lr, {}, decay_vectors=False)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    sampler = RepeatedSampler(len(train_set), args.batch_size, args.seed, args.repeats)
    loader = engine.training_loader(train_set, sampler, collate, args, device)
    forward = torch.compile(model) if args.compile else model
    if args.benchmark:
        model.train()
        print(benchmark(lambda batch, mark: train_step(
            forward, optimizer, *(x.to(device, non_blocking=True) for x in batch), len(train_set.classes),
            np.random.default_rng(0), tree, args, mark), loader, args, device))
        return
    run.open(args)
    start, step, best, scores = 0, 0, -1.0, {}
    if state:
        optimizer.load_state_dict(state["optimizer"])
        start, step, best, scores = (state[k] for k in ("epoch", "step", "best", "scores"))
        run.rewind(start, step)

    def save(epoch: int, step: int) -> None:
        """`epoch`: how many are finished, the evaluation included; `step`: how many steps."""
        run.save({**checkpoints.describe(model, args, train_set.classes, "pretrain"), "best": best,
                  "optimizer": optimizer.state_dict(), "epoch": epoch, "step": step, "scores": scores})

    bar = run_folder.progress_bar(f"pre-training {args.variant} on {train_set.name}",
                                  sampler.images_after(args.epochs * len(loader)),
                                  sampler.images_after(step))
    for epoch in range(start, args.epochs):
        sampler.epoch = train_set.epoch = epoch
        step = train_epoch(forward, optimizer, loader, train_set, tree, step, args, device, run, save, bar)
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            save(epoch, step)  # the evaluation may be interrupted
            with run.interruptible():
                scores = evaluate(forward, val_set, tree, args, device)
            run.evaluated(bar, epoch + 1, step, scores, tuple(scores))
            if not engine.rank():
                picture_predictions(model, val_set, device).save(run.folder / "predictions.png")
            if scores["top1"] > best:
                best = scores["top1"]
                checkpoints.save_checkpoint(run.folder / "best.pt", {
                    **checkpoints.describe(model, args, train_set.classes, "pretrain"), "scores": scores})
            save(epoch + 1, step)
    bar.close()
    if not engine.rank():
        finish(model, val_set, scores, args, run)


def finish(model: Classifier, val: ClassificationSet, scores: dict, args: argparse.Namespace,
           run: run_folder.Run) -> None:
    """Writes metrics.json and prints the scores."""
    measured = {"data": val.name, "images": len(val), "class_tokens": args.class_tokens, **scores}
    write_json(run.folder / "metrics.json", run_folder.summary(model, args, measured))
    print(f"{val.name}, {len(val)} images, {run.minutes()}: "
          + ", ".join(f"{k} {100 * v:.1f} %" for k, v in scores.items())
          + f"; everything of this run: {run.folder}")


def main(classifier: Callable[[Config, int], Classifier] = Classifier,
         read_data: Callable[..., ClassificationSet] = classification_set) -> None:
    """The command. A fork gives what makes its own classifiers of (config, number of classes), or what reads
    its own data, with the arguments of `data.classification_set` by keyword, in place of ours."""
    args = parse()
    if args.build_tree:
        print(build_tree(args.is_a, args.classes, args.build_tree))
        return
    device = engine.setup(args)
    if args.benchmark or args.linear_baseline:
        engine.prepare_benchmark(args)
    if args.linear_baseline:
        print(linear_baseline(*read_sets(args, read_data)))
    else:
        train(args, device, classifier, read_data)


if __name__ == "__main__":
    engine.run_script(main)
