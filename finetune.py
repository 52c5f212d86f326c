"""Stage 2: fine-tuning for object detection (3.3 and 4.1), from a pre-trained encoder or from scratch.

    python finetune.py                                  generated pictures, minutes on a laptop
    python finetune.py --variant lite --data coco --pretrained X.pt         the paper's recipe
    torchrun --nproc_per_node=8 finetune.py --variant base --data coco --pretrained X.pt

This file holds matching, losses, the recipe and the training loop. The paper names Deformable DETR for
the deep supervision (4.1). Where the paper is silent, we follow the authors' released code, which takes
most of the rest from Deformable DETR, too.
"""
import argparse
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import engine
from data import DETECTION_DATA, EMBEDDED_SETS, DetectionSet, corners, detection_set, micro_batches
from deform_attn import operator_path
from evaluate import coco_metrics, detect
from extras import pictures, released
from model import VARIANTS, Config, Detector

# ---------------------------------------------------------------------------- matching and losses (4.1)

# Weights of the losses. The matching costs have the same.
CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
FOCAL_ALPHA = 0.25  # the focal loss also has gamma 2, written as squares below


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of cxcywh boxes, broadcasting (..., 4) against (..., 4).

    The released code computes it in pixels. IoU does not depend on the unit of an axis, so we compute
    it in [0, 1] and need no image sizes.
    """
    a, b = corners(a), corners(b)
    overlap_low = torch.maximum(a[..., :2], b[..., :2])
    overlap_high = torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (overlap_high - overlap_low).clamp(min=0).prod(-1)
    hull_low = torch.minimum(a[..., :2], b[..., :2])
    hull_high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (hull_high - hull_low).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    union = area_a + area_b - overlap
    tiny = 1e-12  # matters for boxes without area only
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def match(pred_logits: Tensor, pred_boxes: Tensor, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """The cheapest one-to-one assignment of queries to objects, per
    image (Hungarian matching, DETR 3.1). NaN counts as a very high cost.

    Args:
        pred_logits: (B, Q, K). pred_boxes: (B, Q, 4) cxcywh in [0, 1].
        targets: B of {"labels": (n,) int64, "boxes": (n, 4) cxcywh in [0, 1]}.
    Returns:
        per image (query indices, target indices), int64 on the CPU, min(Q, n) each; queries ascending.
    """
    from scipy.optimize import linear_sum_assignment  # imported here, so that --help is fast
    counts = [len(t["labels"]) for t in targets]
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # (B, n_max)
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)  # (B, n_max, 4)
    if not labels.numel():
        return [(torch.empty(0, dtype=torch.int64),) * 2 for _ in targets]
    boxes = boxes.to(pred_boxes)

    p = pred_logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** 2 * -(p + 1e-12).log()
    negative = (1 - FOCAL_ALPHA) * p ** 2 * -(1 - p + 1e-12).log()
    each_query = labels[:, None].expand(-1, p.shape[1], -1)  # (B, Q, n_max)
    class_cost = (positive - negative).gather(2, each_query)  # (B, Q, n_max)
    l1_cost = torch.cdist(pred_boxes, boxes, p=1)  # (B, Q, n_max)
    giou_cost = -giou(pred_boxes[:, :, None], boxes[:, None])  # (B, Q, n_max)
    cost = CLASS_WEIGHT * class_cost + L1_WEIGHT * l1_cost + GIOU_WEIGHT * giou_cost

    cost = cost.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).cpu()  # waits for the GPU
    pairs = (linear_sum_assignment(c[:, :n]) for c, n in zip(cost.numpy(), counts))
    return [(torch.from_numpy(q), torch.from_numpy(t)) for q, t in pairs]


def count_matches(targets: list[dict], queries: int) -> int:
    """The number of queries that `match` will assign. Known before matching, so nothing waits for it."""
    return sum(min(len(t["labels"]), queries) for t in targets)


def detection_loss(outputs: dict, targets: list[dict],
                   num_matches: float | Tensor | None = None) -> dict[str, Tensor]:
    """The set prediction loss, summed over all supervised layers. Each layer is
    matched on its own (deep supervision, 4.1).

    Args:
        outputs: of a Detector. targets: as in `match`, on the same device.
        num_matches: the divisor of all losses, a number or scalar tensor: the matched queries of one
            layer in the *total* batch, over all micro-batches and processes. 0 counts as 1. Default:
            those of `targets`. (Released code. Deformable DETR divides by the number of objects. This
            differs only if an image has more objects than queries.)
    Returns:
        {"loss_class", "loss_bbox", "loss_giou"}: scalars, already weighted by 2, 5, 2. The first sums
        the focal loss of all queries and classes, with alpha for the true class of a matched query and
        1 - alpha elsewhere. The others sum |difference of cxcywh| and 1 - GIoU of the matched boxes.
    """
    layers = [*outputs["aux_outputs"], outputs]
    # All layers are matched at once, as one large batch.
    logits = torch.cat([o["pred_logits"] for o in layers])  # (layers * B, Q, K)
    boxes = torch.cat([o["pred_boxes"] for o in layers])  # (layers * B, Q, 4)
    if num_matches is None:
        num_matches = count_matches(targets, logits.shape[1])
    num_matches = torch.as_tensor(num_matches, dtype=torch.float32).clamp(min=1).to(logits.device)
    pairs = match(logits.detach(), boxes.detach(), targets * len(layers))

    # first[i] is the number of objects in images 0 to i-1.
    first = list(itertools.accumulate([0] + [len(t["labels"]) for t in targets]))
    index = torch.cat([torch.stack([torch.full_like(q, i), q, t + first[i % len(targets)]])
                       for i, (q, t) in enumerate(pairs)], 1)
    image, query, target = index.to(logits.device, non_blocking=True)  # (matches,) each
    true_labels = torch.cat([t["labels"] for t in targets])[target]  # (matches,)
    true_boxes = torch.cat([t["boxes"] for t in targets]).to(boxes)[target]  # (matches, 4)
    matched_boxes = boxes[image, query]  # (matches, 4)

    one_hot = torch.zeros_like(logits)
    one_hot[image, query, true_labels] = 1
    p = logits.sigmoid()
    focal_weight = torch.where(one_hot > 0, FOCAL_ALPHA * (1 - p) ** 2, (1 - FOCAL_ALPHA) * p ** 2)
    focal = focal_weight * F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    l1 = (matched_boxes - true_boxes).abs()
    return {"loss_class": CLASS_WEIGHT * focal.sum() / num_matches,
            "loss_bbox": L1_WEIGHT * l1.sum() / num_matches,
            "loss_giou": GIOU_WEIGHT * (1 - giou(matched_boxes, true_boxes)).sum() / num_matches}


# ------------------------------------------------------------------------------------- the recipe (4.1)

# Ours, for the generated data: a small model, from scratch, in minutes.
SHAPES_RECIPE = dict(epochs=7, batch_size=16, micro_batch=16, lr=1e-3, schedule="one-cycle",
                     image_size=64, augment="flip", dropout=0.0, backbone_lr=1.0, sampling_lr=1.0,
                     workers=0)
FEW_STEPS = 3000  # with fewer, the paper's recipe learns little


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=engine.Help, allow_abbrev=False,
        epilog="The defaults are the paper's, or as marked. With --data cityscapes they are instead: "
        "--batch-size 8, and --lr 2e-4 for lite. With --data shapes or shapes-hard: "
        f"{engine.as_flags(SHAPES_RECIPE)}")
    parser.add_argument("--data", type=os.path.normpath, default="shapes", help=DETECTION_DATA)
    parser.add_argument("--pretrained",
                        help="checkpoint to start from: of either stage, or the authors'")
    parser.add_argument("--epochs", type=engine.positive, default=50,
                        help="passes over the training set (4.1)")
    parser.add_argument("--batch-size", type=engine.positive, default=32,
                        help="images per step, over all GPUs (4.1)")
    parser.add_argument("--lr", type=engine.rate, default=1e-4, help="initial learning rate (4.1)")
    parser.add_argument("--schedule", choices=("step", "one-cycle"), default="step",
                        help="step: x0.1 at --lr-drop (4.1); one-cycle: linearly up from 1/25 in the "
                             "first tenth of the steps, then a cosine to 0 (ours)")
    parser.add_argument("--lr-drop", type=engine.positive, default=40,
                        help="number of epochs after which lr is x0.1 (4.1: 40 of 50); for --schedule "
                             "step")
    parser.add_argument("--backbone-lr", type=engine.rate, default=0.1,
                        help="factor on lr of the tokenizer's convolutions and norms (released code; "
                             "from scratch: 1)")
    parser.add_argument("--sampling-lr", type=engine.rate, default=0.1,
                        help="factor on lr of sampling offsets and reference points (Deformable DETR)")
    parser.add_argument("--weight-decay", type=engine.rate, default=1e-4,
                        help="AdamW's, on all parameters (released code)")
    parser.add_argument("--clip", type=engine.rate, default=0.1,
                        help="largest L2 norm of the gradient (released code); 0: no clipping")
    parser.add_argument("--dropout", type=engine.fraction, default=0.1,
                        help="in all layers (released code)")
    parser.add_argument("--augment", choices=("paper", "flip", "none"), default="paper",
                        help="paper: flip, random sizes and crops, as Deformable DETR")
    parser.add_argument("--image-size", type=engine.positive, default=800,
                        help="short side at test time; all sizes of the training recipe scale with it")
    parser.add_argument("--queries", type=engine.positive,
                        help="object queries (default: those of a --pretrained detector, else the "
                             "variant's: 300 in the paper, 12 in tiny)")
    parser.add_argument("--adaptor", choices=("self-attention", "bilstm", "none"),
                        help="Eq. 5, Table 3 (default: self-attention; none in an encoder-decoder)")
    parser.add_argument("--adaptor-per-layer", action="store_true",
                        help="a task adaptor for each layer with queries, not one for all (Table 3)")
    engine.add_training_flags(parser, VARIANTS)

    known, _ = parser.parse_known_args(arguments)
    if known.data in EMBEDDED_SETS:
        parser.set_defaults(**SHAPES_RECIPE)
    elif known.data == "cityscapes":
        # 4.5, Table 5. Paper: 1e-4 for all downstream tasks (4.1). Released code, ours: 2e-4 for Lite.
        parser.set_defaults(batch_size=8, lr=2e-4 if known.variant == "lite" else 1e-4)
    args = parser.parse_args(arguments)
    args.adaptor = args.adaptor or ("none" if args.structure == "encoder-decoder" else "self-attention")
    try:
        replace(VARIANTS[args.variant], structure=args.structure, adaptor=args.adaptor,
                adaptor_per_layer=args.adaptor_per_layer)
    except ValueError as e:
        raise engine.InputError(str(e)) from None
    return args


def build_optimizer(model: Detector, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with the learning rate factors of the released code. Its "backbone" is the tokenizer's
    convolutions and norms. The projections to D, its "neck", learn at the full rate."""
    factors = {"tokenizer.convs": args.backbone_lr, "tokenizer.norms": args.backbone_lr,
               "tokenizer.out_norms": args.backbone_lr,  # of the released layout
               "sampling_offsets": args.sampling_lr, "reference_points": args.sampling_lr}
    groups = {}
    for name, parameter in model.named_parameters():
        factor = next((f for part, f in factors.items() if part in name), 1.0)
        groups.setdefault(factor, []).append(parameter)
    groups = [{"params": parameters, "lr": args.lr * factor, "initial_lr": args.lr * factor}
              for factor, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)


def schedule_factor(schedule: str, step: int, steps_per_epoch: int, epochs: int, lr_drop: int) -> float:
    """The factor on every learning rate at `step`, counted from 0 over the whole run.

    "step": x0.1 after `lr_drop` epochs (4.1). "one-cycle": linear from 1/25 to 1 in the first tenth of
    the steps, then a cosine to 0.
    """
    if schedule == "step":
        return 0.1 if step // steps_per_epoch >= lr_drop else 1.0
    progress = (step + 1) / (steps_per_epoch * epochs)
    if progress < 0.1:
        return 0.04 + 0.96 * progress / 0.1
    return (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


def train_step(model: Detector, optimizer: torch.optim.Optimizer, batch: list, args: argparse.Namespace,
               device: torch.device) -> dict[str, Tensor]:
    """One step on this process's share of the total batch.

    Args:
        batch: micro-batches [(images (B, 3, H, W), padding mask (B, H, W) or None, targets)], targets as
            in `match`.
    Returns:
        this process's share of the losses of the total batch: scalars.
    Raises:
        FloatingPointError: the gradient is not finite. No weight has changed.
    """
    batch = [to_device(*part, device) for part in batch]
    # Losses are divided by the matches of the total batch, so micro-batches and processes simply add up.
    mine = sum(count_matches(targets, model.encoder.config.queries) for _, _, targets in batch)
    num_matches = engine.sum_over_processes(mine, device)
    names = ("loss", "loss_class", "loss_bbox", "loss_giou")
    totals = {k: torch.zeros((), device=device) for k in names}
    optimizer.zero_grad(set_to_none=True)
    for images, mask, targets in batch:
        with engine.autocast(args, device):
            outputs = model(images, mask)
        losses = detection_loss(outputs, targets, num_matches)
        losses["loss"] = sum(losses.values())
        losses["loss"].backward()
        for k, v in losses.items():
            totals[k] += v.detach()
    engine.sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    if not norm.isfinite():
        raise FloatingPointError
    optimizer.step()
    return totals


def to_device(images: Tensor, mask: Tensor | None, targets: list[dict], device: torch.device) -> tuple:
    """A micro-batch on `device`; its targets keep what the loss needs."""
    images = images.to(device, non_blocking=True)
    mask = None if mask is None else mask.to(device, non_blocking=True)
    targets = [{k: t[k].to(device, non_blocking=True) for k in ("labels", "boxes")} for t in targets]
    return images, mask, targets


# ------------------------------------ the command: the paper ends here, the rest is reading and writing

def main(detector: Callable[[Config, int], Detector] = Detector,
         read_data: Callable[..., DetectionSet] = detection_set) -> None:
    """The command. A fork passes a function (config, number of classes) -> its own detector, or one that
    reads its own data with the arguments of `data.detection_set` by keyword."""
    args = parse()
    device = engine.setup(args)
    run = engine.Run(args, "finetune")
    if args.schedule == "step" and args.lr_drop >= args.epochs:
        engine.note(f"--lr-drop {args.lr_drop} is not below --epochs {args.epochs}, so the learning "
                    f"rate never drops (paper: 40 of 50)")

    # Data, model and weights come before anything is written, so bad input leaves nothing behind.
    options = dict(data=args.data, root=args.data_root, image_size=args.image_size, seed=args.seed)
    train = read_data(split="train", limit=args.limit_train, augment=args.augment, **options)
    val = read_data(split="val", limit=args.limit_val, **options)
    engine.check_classes(train, val)
    if train.annotations.crowd.all():
        raise engine.InputError(f"{train.name} has nothing to learn: {train.describe()}")
    if val.annotations.crowd.all():
        engine.note(f"{val.name} has no objects, so AP is not defined: {val.describe()}")
    checkpoint = released.read_checkpoint(args.pretrained) if args.pretrained and not run.resumed else {}
    start = run.state if run.resumed else checkpoint  # a detector to start from keeps its queries
    before = start.get("config", {}) if start.get("stage") == "finetune" else {}
    args.queries = args.queries or before.get("queries", VARIANTS[args.variant].queries)
    full = int((train.annotations.count_objects() > args.queries).sum())
    if full:
        engine.note(f"{full} training images have more than --queries {args.queries} objects: no more "
                    f"can be found in an image")
    config = replace(VARIANTS[args.variant], dropout=args.dropout, structure=args.structure,
                     adaptor=args.adaptor, adaptor_per_layer=args.adaptor_per_layer,
                     queries=args.queries)
    model = released.build_model(detector, config, len(train.classes), args.layout)
    description = engine.describe_run(model, args, "finetune", train.classes, len(train),
                                      training_set=train.digest, validation_set=val.digest)
    state = run.load(model, description, checkpoint, args.pretrained)
    model.to(device)
    model.encoder.checkpointing = args.activation_checkpointing
    engine.broadcast_weights(model)
    optimizer = build_optimizer(model, args)
    if run.resumed:
        optimizer.load_state_dict(state["optimizer"])
    sampler = engine.BatchSampler(len(train), args.batch_size, args.seed)
    collate = partial(micro_batches, size=args.micro_batch)
    loader = engine.make_loader(train, collate, args, device, batch_sampler=sampler)
    steps = len(loader)  # per epoch
    engine.check_epochs(args, state, steps)
    operator = operator_path(model, device, args.amp == "bf16")
    engine.first_line(args, model, train, steps, device, operator)
    if steps * args.epochs < FEW_STEPS and args.data not in EMBEDDED_SETS:
        advice = ("README.md has flags for small sets (smaller batches, a higher rate, no dropout)"
                  if args.schedule == "step" else "more --epochs may help")
        engine.note(f"this run has fewer than {FEW_STEPS:,} steps, too few for the paper's recipe: "
                    f"{advice}")
    run.open(args)
    if engine.rank() == 0 and not run.resumed:
        pictures.training_sheet(train, sampler.order()[:8].tolist(), run.folder / "training.png")

    step, best, scores = state["step"], state["best"], state["scores"]
    recent = []  # losses of the steps since the last entry of the log
    bar = engine.progress_bar(f"fine-tuning {args.variant} on {train.name}", args.epochs * len(train),
                              sampler.images_after(step))

    def save(epochs_done: int) -> None:
        run.save(description, model, optimizer, epoch=epochs_done, step=step, best=best, scores=scores)

    for epoch in range(state["epoch"], args.epochs):
        sampler.epoch = train.epoch = epoch
        sampler.skip = step - epoch * steps
        model.train()
        try:
            for batch in engine.read_batches(loader, run):
                engine.seed_step(args.seed, step)
                factor = schedule_factor(args.schedule, step, steps, args.epochs, args.lr_drop)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                recent.append(train_step(model, optimizer, batch, args, device))
                step += 1
                bar.update(sampler.images_after(step) - bar.n)
                if step % 10 == 0 or step % steps == 0:
                    losses = engine.mean_over_steps(recent)
                    recent.clear()
                    run.log(epoch=epoch + 1, step=step, **losses, lr=args.lr * factor)
                    bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
                if run.must_save():
                    save(epoch)

            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                save(epoch)  # an evaluation takes long
                with run.interruptible():
                    results = detect(model, val, args, device, args.micro_batch)
                    scores = coco_metrics(val.ground_truth, results)
                run.log(epoch=epoch + 1, step=step, **scores)
                if engine.rank() == 0:
                    pictures.results_sheet(val, results).save(run.folder / "detections.png")
                    log = engine.read_log(run.folder / "log.jsonl")
                    pictures.draw_curves(log, ("AP", "AP50"), run.folder / "curves.png")
                    bar.write(f"epoch {epoch + 1}: {engine.in_percent(scores)}")
                if scores["AP"] > best or scores["AP"] < 0:  # below 0: without objects, the last is kept
                    best = scores["AP"]
                    content = {**description, "model": model.state_dict(), "scores": scores,
                               "epoch": epoch + 1, "step": step}
                    engine.save_checkpoint(run.folder / "best.pt", content)
                save(epoch + 1)
        except engine.InputError:  # a broken image: --resume goes on here when it is replaced
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
