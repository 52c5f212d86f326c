"""Stage 2: fine-tuning for object detection (3.3 and 4.1), from a pre-trained encoder or from scratch.

    python finetune.py                                  the embedded data, minutes on a laptop
    python finetune.py --variant lite --data coco       the paper's recipe
    torchrun --nproc_per_node=8 finetune.py --variant base --data coco      the same total batch on 8 GPUs

Matching, losses, the recipe and the training loop are all on this page. They follow Deformable DETR, as the
paper says (4.1); details on which the paper is silent follow the authors' released code.
"""
import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoints
import engine
import run_folder
from benchmark import benchmark
from data import DetectionSet, detection_set, micro_batches
from inference import METRICS, coco_metrics, corners, detect
from model import VARIANTS, Config, Detector, InputError
from non_finite import image_name, stop_at_non_finite
from pictures import picture_results
from report import markdown, mean_and_deviation, write_json
from shapes import COLOURS

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0  # of the losses and, the same, of the matching costs
FOCAL_ALPHA = 0.25  # and gamma 2, written out as squares below


# --------------------------------------------------------------------------------------- matching and losses

def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of cxcywh boxes, broadcasting (..., 4) against (..., 4). The released code takes it in
    pixels; IoU does not depend on the unit of either axis, so we stay in [0, 1] and need no image sizes."""
    a, b = corners(a), corners(b)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    tiny = 1e-12  # only boxes without area ever meet it
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def match(pred_logits: Tensor, pred_boxes: Tensor, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """The cheapest one-to-one assignment of queries to objects, per image (Hungarian matching, DETR 3.1).

    Args:
        pred_logits: (B, Q, K). pred_boxes: (B, Q, 4) cxcywh in [0, 1].
        targets: B of {"labels": (n,) int64, "boxes": (n, 4) cxcywh in [0, 1]}.
    Returns:
        per image (query indices, target indices), int64 on the CPU, min(Q, n) each; queries ascending.
    """
    from scipy.optimize import linear_sum_assignment  # here, so that --help need not wait for it
    counts = [len(t["labels"]) for t in targets]
    labels = torch.nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)  # (B, n_max)
    boxes = torch.nn.utils.rnn.pad_sequence([t["boxes"] for t in targets], batch_first=True)  # (B, n_max, 4)
    if not labels.numel():
        return [(torch.empty(0, dtype=torch.int64),) * 2 for _ in targets]
    p = pred_logits.sigmoid()
    focal = FOCAL_ALPHA * (1 - p) ** 2 * -(p + 1e-12).log()
    focal = focal - (1 - FOCAL_ALPHA) * p ** 2 * -(1 - p + 1e-12).log()
    focal = focal.gather(2, labels[:, None].expand(-1, p.shape[1], -1))  # (B, Q, n_max)
    cost = (CLASS_WEIGHT * focal + L1_WEIGHT * torch.cdist(pred_boxes, boxes.to(pred_boxes), p=1)
            - GIOU_WEIGHT * giou(pred_boxes[:, :, None], boxes[:, None].to(pred_boxes)))
    # the one time that a micro-batch waits for the GPU
    cost = cost.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).cpu()
    pairs = (linear_sum_assignment(c[:, :n]) for c, n in zip(cost.numpy(), counts))
    return [(torch.from_numpy(q), torch.from_numpy(t)) for q, t in pairs]


def count_matches(targets: list[dict], queries: int) -> int:
    """How many queries `match` will assign: it is known beforehand, so no step waits for it."""
    return sum(min(len(t["labels"]), queries) for t in targets)


def detection_loss(outputs: dict, targets: list[dict], num_matches: float | Tensor | None = None,
                   mark: Callable[[str], None] = engine.no_mark) -> dict[str, Tensor]:
    """Set prediction loss, summed over all supervised layers, each matched for itself (deep supervision,
    4.1).

    Args:
        outputs: of a Detector. targets: as in `match`, on the same device.
        num_matches: by which all losses are divided, number or scalar tensor: matched queries of one layer
            in the *total* batch, of all micro-batches and processes (1 if there are none). By default those
            of `targets`. (Released code; Deformable DETR divides by the number of objects, which is the same
            unless an image has more of them than there are queries.)
        mark: called as mark("matching") when that is done, to measure it.
    Returns:
        {"loss_class", "loss_bbox", "loss_giou"}: scalars, already weighted 2, 5, 2.
    """
    layers = [*outputs["aux_outputs"], outputs]
    # (layers * B, Q, K): the layers as one large batch, matched at once
    logits = torch.cat([o["pred_logits"] for o in layers])
    boxes = torch.cat([o["pred_boxes"] for o in layers])
    if num_matches is None:
        num_matches = count_matches(targets, logits.shape[1])
    num_matches = torch.as_tensor(num_matches, dtype=torch.float32).clamp(min=1).to(logits.device)
    pairs = match(logits.detach(), boxes.detach(), targets * len(layers))
    mark("matching")
    # the number of objects in the images before, by which target indices become those of the whole batch
    first = list(itertools.accumulate([0] + [len(t["labels"]) for t in targets]))
    index = torch.cat([torch.stack([torch.full_like(q, i), q, t + first[i % len(targets)]])
                       for i, (q, t) in enumerate(pairs)], 1)
    image, query, target = index.to(logits.device, non_blocking=True)  # (matches,) each
    true_labels = torch.cat([t["labels"] for t in targets])[target]
    true_boxes = torch.cat([t["boxes"] for t in targets]).to(boxes)[target]

    one_hot = torch.zeros_like(logits)
    one_hot[image, query, true_labels] = 1
    p = logits.sigmoid()
    focal = torch.where(one_hot > 0, FOCAL_ALPHA * (1 - p) ** 2, (1 - FOCAL_ALPHA) * p ** 2)
    focal = focal * F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    matched = boxes[image, query]  # (matches, 4)
    return {"loss_class": CLASS_WEIGHT * focal.sum() / num_matches,
            "loss_bbox": L1_WEIGHT * (matched - true_boxes).abs().sum() / num_matches,
            "loss_giou": GIOU_WEIGHT * (1 - giou(matched, true_boxes)).sum() / num_matches}


# ---------------------------------------------------------------------------------------------------- recipe

# Cityscapes (4.5, Table 5): batch 8. The paper gives no learning rate for it; the released code has 2e-4 for
# Lite, else 1e-4.
CITYSCAPES_RECIPE = dict(batch_size=8)
# What the embedded data change in the paper's recipe: a small model, from scratch, in minutes.
SHAPES_RECIPE = dict(epochs=14, batch_size=16, micro_batch=16, lr=1e-3, schedule="one-cycle", image_size=64,
                     augment="flip", dropout=0.0, backbone_lr=1.0, sampling_lr=1.0, queries=25, workers=0,
                     eval_every=7)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=engine.Help,
        epilog="The defaults are the paper's, or as marked. With --data cityscapes they are instead: "
        "--batch-size 8, --lr 2e-4 for lite. With --data shapes or shapes-hard: "
        f"{engine.as_flags(SHAPES_RECIPE)}")
    engine.add_run_flags(parser)
    engine.add_data_flags(parser)
    parser.add_argument("--pretrained", help="checkpoint to start from: of either stage, or released")
    parser.add_argument("--queries", type=int,
                        help="number of object queries (default: the variant's, 300 in the paper, 50 in "
                             "tiny)")
    parser.add_argument("--adaptor", choices=("self-attention", "bilstm", "none"),
                        help="Eq. 5, Table 3 (default: self-attention; none in an encoder-decoder)")
    parser.add_argument("--adaptor-per-layer", action="store_true",
                        help="a task adaptor for each layer that holds queries, not one for all (Table 3)")
    parser.add_argument("--dropout", type=engine.fraction, default=0.1, help="in all layers (released code)")
    parser.add_argument("--augment", choices=("paper", "flip", "none"), default="paper",
                        help="paper: flip, random sizes and crops, as Deformable DETR")
    parser.add_argument("--schedule", choices=("step", "one-cycle"), default="step",
                        help="step: x0.1 at --lr-drop (4.1); one-cycle: linearly up from 1/25 in the "
                             "first tenth of the steps, then a cosine to 0 (ours)")
    parser.add_argument("--lr-drop", type=engine.positive, default=40,
                        help="epoch after which lr is x0.1 (4.1: 40 of 50); of --schedule step only")
    parser.add_argument("--backbone-lr", type=engine.rate, default=0.1,
                        help="factor on lr of the tokenizer but its projections (released code; scratch: 1)")
    parser.add_argument("--sampling-lr", type=engine.rate, default=0.1,
                        help="factor on lr of sampling offsets and reference points (Deformable DETR)")
    parser.add_argument("--clip", type=engine.rate, default=0.1,
                        help="largest L2 norm of the gradient (released code); 0 for any")
    parser.add_argument("--seeds", type=engine.positive, default=1,
                        help="train with this many seeds, from --seed on; finished ones are collected, "
                             "unfinished ones resumed. Prints mean and deviation (Table 5: 5 seeds)")
    known, _ = parser.parse_known_args()
    recipe = {**dict.fromkeys(COLOURS, SHAPES_RECIPE), "cityscapes": CITYSCAPES_RECIPE}.get(known.data, {})
    if (known.data, known.variant) == ("cityscapes", "lite"):
        recipe = {**recipe, "lr": 2e-4}
    parser.set_defaults(**recipe)
    args = parser.parse_args()
    args.adaptor = args.adaptor or ("none" if args.structure == "encoder-decoder" else "self-attention")
    if args.seeds > 1 and args.resume:
        parser.error("--seeds resumes what is unfinished by itself: leave --resume away")
    if args.schedule == "step" and args.lr_drop >= args.epochs:
        print(f"note: --lr-drop {args.lr_drop} is never reached in {args.epochs} epochs (paper: 40 of 50)")
    return args


def optimizer_of(model: Detector, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with the learning rate multipliers of the released code. Its "backbone" is the convolutions and
    norms of the tokenizer; the projections to D are its "neck" and learn at the full rate."""
    multipliers = {"tokenizer.convs": args.backbone_lr, "tokenizer.norms": args.backbone_lr,
                   "tokenizer.out_norms": args.backbone_lr, "sampling_offsets": args.sampling_lr,
                   "reference_points": args.sampling_lr}
    return torch.optim.AdamW(engine.parameter_groups(model, args.lr, multipliers), lr=args.lr,
                             betas=(0.9, 0.999), weight_decay=args.weight_decay)


# -------------------------------------------------------------------------------------------------- training

def train_step(model: Detector, optimizer: Optimizer, batch: list, args: argparse.Namespace,
               device: torch.device, mark: Callable[[str], None] = engine.no_mark) -> dict[str, Tensor]:
    """One step on this process's share of the total batch, given as micro-batches [(images (B, 3, H, W),
    padding mask (B, H, W) or None, targets as in `match`)]. Returns its share of the losses. Raises
    FloatingPointError, before any weight is changed, if they are not finite. `mark`: called with the name of
    each part of the step when it is done."""
    batch = [(images.to(device, non_blocking=True), None if mask is None
              else mask.to(device, non_blocking=True),
              [{k: t[k].to(device, non_blocking=True) for k in ("labels", "boxes")} for t in targets])
             for images, mask, targets in batch]
    queries = model.encoder.config.queries
    num_matches = engine.sum_over_processes(sum(count_matches(targets, queries) for _, _, targets in batch),
                                            device)
    totals = {k: torch.zeros((), device=device) for k in ("loss", "loss_class", "loss_bbox", "loss_giou")}
    optimizer.zero_grad(set_to_none=True)
    loss_so_far = totals["loss"].item
    mark("copying")
    for images, mask, targets in batch:
        with engine.autocast(args, device):
            outputs = model(images, mask)
        mark("forward")
        losses = detection_loss(outputs, targets, num_matches, mark)
        losses["loss"] = sum(losses.values())
        for k, v in losses.items():
            totals[k] += v.detach()
        loss_so_far = engine.on_host(totals["loss"])
        mark("loss")
        losses["loss"].backward()
        mark("backward")
    if not math.isfinite(loss_so_far()):
        raise FloatingPointError
    engine.sum_gradients(model)
    if args.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    mark("optimiser")
    return totals


def evaluate_epoch(model: Detector, dataset: DetectionSet, args: argparse.Namespace, device: torch.device,
                   run: run_folder.Run) -> dict[str, float]:
    """The validation scores of `coco_metrics`; leaves a picture of detections in the run's folder."""
    with run.interruptible():
        results = detect(model, dataset, args, device, args.micro_batch)
        metrics = coco_metrics(dataset.ground_truth, results)
    if not engine.rank():
        picture_results(dataset, results).save(run.folder / "detections.png")
    return metrics


def prepare(args: argparse.Namespace, device: torch.device, detector: Callable[[Config, int], Detector],
            read_data: Callable[..., DetectionSet]
            ) -> tuple[DetectionSet, DetectionSet, Detector, dict | None]:
    """Everything that can fail on bad input, before anything is written: training and validation set, model,
    and the checkpoint of a run that goes on."""
    root = dict(root=args.data_root, image_size=args.image_size, seed=args.seed, cache=args.out)
    train = read_data(data=args.data, split="train", limit=args.limit_train, augment=args.augment, **root)
    val = read_data(data=args.data, split=args.split, limit=args.limit_val, **root)
    if train.classes != val.classes:
        raise InputError(f"{train.name} and {val.name} have different categories: "
                         f"{sorted(set(train.classes) ^ set(val.classes)) or 'in another order'}")
    config = replace(VARIANTS[args.variant], dropout=args.dropout, structure=args.structure,
                     adaptor=args.adaptor, adaptor_per_layer=args.adaptor_per_layer,
                     queries=VARIANTS[args.variant].queries if args.queries is None else args.queries)
    model = checkpoints.build(detector, config, args.layout, len(train.classes))
    state = checkpoints.load_weights(model, args, "finetune", train.classes, args.pretrained)
    engine.check_images(train, val)
    model.to(device)
    model.encoder.checkpointing = args.activation_checkpointing
    engine.broadcast_weights(model)
    return train, val, model, state


def train_epoch(model: Detector, optimizer: Optimizer, loader: DataLoader, step: int,
                args: argparse.Namespace, device: torch.device, run: run_folder.Run,
                save: Callable[[int, int], None], bar: tqdm) -> int:
    """Trains the remaining steps of an epoch and logs every tenth. `step`: how many the run has taken so far
    -> the new number."""
    model.train()
    sampler, steps, meters = loader.batch_sampler, len(loader), run_folder.Mean()
    sampler.skip = step - sampler.epoch * steps
    for batch in loader:
        engine.seed_step(args.seed, step)
        factor = engine.schedule_factor(args.schedule, step, steps, args.epochs, args.lr_drop)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        try:
            mark = run.within_step(partial(save, sampler.epoch, step))
            meters.add(train_step(model, optimizer, batch, args, device, mark))
        except FloatingPointError:
            explain_non_finite(model, batch, loader.dataset, args, device, step)
        step += 1
        bar.update(sampler.images_after(step) - bar.n)
        if step % 10 == 0 or step % steps == 0:
            means = meters.take()
            run.log(epoch=sampler.epoch + 1, step=step, **means, lr=args.lr * factor)
            bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
        run.after_step(partial(save, sampler.epoch, step))
    return step


def explain_non_finite(model: Detector, batch: list, dataset: DetectionSet, args: argparse.Namespace,
                       device: torch.device, step: int) -> None:
    """Raises the InputError that says which module and images spoilt the loss of `step`."""
    def forward(images, mask):
        with engine.autocast(args, device):
            return model(images.to(device), None if mask is None else mask.to(device))
    source = {r.id: r.source for r in dataset.records}
    parts = [([image_name(source[t["image_id"]], t["image_id"]) for t in targets],
              partial(forward, images, mask)) for images, mask, targets in batch]
    stop_at_non_finite(model, parts, args, step)


def train(args: argparse.Namespace, device: torch.device, detector: Callable[[Config, int], Detector],
          read_data: Callable[..., DetectionSet]) -> dict:
    """One run, to its end. Returns what it leaves in metrics.json."""
    torch.manual_seed(args.seed)
    run = run_folder.Run(args, "finetune")
    args.out = run.folder
    train_set, val_set, model, state = prepare(args, device, detector, read_data)
    optimizer = optimizer_of(model, args)
    sampler = engine.BatchSampler(len(train_set), args.batch_size, args.seed)
    loader = engine.training_loader(train_set, sampler, partial(micro_batches, size=args.micro_batch), args,
                                    device)
    if args.benchmark:
        model.train()
        print(benchmark(lambda batch, mark: train_step(model, optimizer, batch, args, device, mark), loader,
                        args, device))
        return {}
    run.open(args)
    start, step, best, metrics = 0, 0, -1.0, {}
    if state:
        optimizer.load_state_dict(state["optimizer"])
        start, step, best, metrics = (state[k] for k in ("epoch", "step", "best", "metrics"))
        run.rewind(start, step)
    origin = state["origin"] if state else checkpoints.origin_of(args.pretrained)

    def save(epoch: int, step: int) -> None:
        """`epoch`: how many are finished, the evaluation included; `step`: how many steps."""
        run.save({**checkpoints.describe(model, args, train_set.classes, "finetune"), "origin": origin,
                  "best": best, "optimizer": optimizer.state_dict(), "epoch": epoch, "step": step,
                  "metrics": metrics})

    bar = run_folder.progress_bar(f"fine-tuning {args.variant} on {train_set.name}",
                                  args.epochs * len(train_set), sampler.images_after(step))
    for epoch in range(start, args.epochs):
        sampler.epoch = train_set.epoch = epoch
        step = train_epoch(model, optimizer, loader, step, args, device, run, save, bar)
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            save(epoch, step)  # the evaluation may be interrupted
            metrics = evaluate_epoch(model, val_set, args, device, run)
            run.evaluated(bar, epoch + 1, step, metrics, ("AP", "AP50"))
            if metrics["AP"] > best:
                best = metrics["AP"]
                checkpoints.save_checkpoint(
                    run.folder / "best.pt", checkpoints.describe(model, args, train_set.classes, "finetune"))
            save(epoch + 1, step)
    bar.close()
    return finish(model, val_set, origin, metrics, args, run)


def finish(model: Detector, val: DetectionSet, origin: dict, metrics: dict, args: argparse.Namespace,
           run: run_folder.Run) -> dict:
    """Writes metrics.json, whose content it returns, and prints the scores."""
    summary = run_folder.summary(model, args, {"data": val.name, "images": len(val), **origin, **metrics})
    if not engine.rank():
        write_json(run.folder / "metrics.json", summary)
        row = [("this model", tuple(100 * metrics[m] for m in METRICS))]
        print(f"{val.name}, {len(val)} images, AP in percent, {run.minutes()}\n"
              f"{markdown('', METRICS, row)}\neverything of this run: {run.folder}")
    return summary


def main(detector: Callable[[Config, int], Detector] = Detector,
         read_data: Callable[..., DetectionSet] = detection_set) -> None:
    """The command. A fork gives what makes its own detectors of (config, number of classes), or what reads
    its own data, with the arguments of `data.detection_set` by keyword, in place of ours."""
    args = parse()
    device = engine.setup(args)
    if args.benchmark:
        engine.prepare_benchmark(args)
    if args.seeds == 1 or args.benchmark:
        train(args, device, detector, read_data)
        return
    folder, runs = run_folder.Run.folder_of(args, "finetune"), []
    for seed in range(args.seed, args.seed + args.seeds):
        out = folder / f"seed-{seed}"
        resume = (out / "last.pt").exists() and not args.overwrite
        # a folder without a checkpoint holds nothing that could be lost
        one = {"seed": seed, "seeds": 1, "out": out, "resume": resume, "overwrite": not resume}
        runs.append(train(argparse.Namespace(**{**vars(args), **one}), device, detector, read_data))
    if not engine.rank():
        row = tuple(mean_and_deviation([r[m] for r in runs]) for m in METRICS)
        print(f"{runs[0]['data']}, {args.seeds} seeds, AP in percent, mean and deviation\n"
              f"{markdown('', METRICS, [('this model', row)])}\neverything of these runs: {folder}")


if __name__ == "__main__":
    engine.run_script(main)
