"""Plants plausible mistakes in copies of the project, one in each. Each must make a test fail.

    python tests/mutations.py           all of them
    python tests/mutations.py 3 17      only these

It prints the test that caught each mistake. test_mutations.py checks that each still fits the code.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTATIONS = [  # the mistake, its file, the right text, the wrong text, the test files that may catch it
    ("x and y exchanged in positions", "model.py",
     "valid.cumsum(axis", "valid.cumsum(3 - axis", "model"),
    ("norm before the residual", "model.py",
     "self.norm1(tokens + self.drop_path(self.dropout(attended)))",
     "tokens + self.drop_path(self.dropout(self.norm1(attended)))", "model"),
    ("padding not seen by reference points", "model.py",
     "[:, :, None] * valid_ratios[:, None]  # (B, N, 4, 2)",
     "[:, :, None].expand(-1, -1, 4, -1)", "model"),
    ("extra tokens pass for image tokens", "model.py",
     "tokens[:, :extra.shape[1]], tokens[:, extra.shape[1]:]",
     "tokens[:, :extra.shape[1]], tokens[:, :-extra.shape[1]]", "model"),
    ("the adaptor does not see the prompts", "model.py",
     "prompted = extra + positions", "prompted = extra", "model"),
    ("one adaptor where each layer has its own", "model.py", "self[index](", "self[0](", "model"),
    ("stochastic depth lowers the mean", "model.py",
     "branch * keep / (1 - self.rate)", "branch * keep", "model"),
    ("boxes start large", "model.py", "[0.0, 0.0, -2.0, -2.0]", "[0.0, 0.0, 2.0, 2.0]", "model"),
    ("class tokens are not pooled", "model.py", "content.mean(1)", "content[:, 0]", "model"),
    ("offsets divided by the other side", "deform_attn.py",
     "at_least_float32(x) / w, at_least_float32(y) / h",
     "at_least_float32(x) / h, at_least_float32(y) / w", "deform_attn"),
    ("a softmax per level", "deform_attn.py",
     "logits.flatten(3).softmax(-1).unflatten(-1, (L, P))", "logits.softmax(-1)", "deform_attn"),
    ("pixel centres at whole numbers", "deform_attn_kernel.cu",
     "to_real(offset[0]) - real(0.5)", "to_real(offset[0])", "deform_attn_kernel"),
    ("the right border counts as outside", "deform_attn_kernel.cu",
     "right = x0 >= -1 && x0 < W - 1", "right = x0 >= -1 && x0 < W - 2", "deform_attn_kernel"),
    ("overlap raises the cost of a match", "finetune.py",
     "giou_cost = -giou(", "giou_cost = giou(", "finetune"),
    ("focal loss: alpha at the negatives", "finetune.py",
     "FOCAL_ALPHA * (1 - p) ** 2, (1 - FOCAL_ALPHA) * p ** 2)",
     "(1 - FOCAL_ALPHA) * (1 - p) ** 2, FOCAL_ALPHA * p ** 2)", "finetune"),
    ("padded objects are matched", "finetune.py",
     "linear_sum_assignment(c[:, :n])", "linear_sum_assignment(c)", "finetune"),
    ("normalised by objects, not by matches", "finetune.py",
     "min(len(t[\"labels\"]), queries)", "len(t[\"labels\"])", "finetune"),
    ("targets of the wrong image", "finetune.py",
     "first[i % len(targets)]", "first[i // len(layers)]", "finetune"),
    ("GIoU without the hull", "finetune.py", " - (hull - union) / hull.clamp(min=tiny)", "", "finetune"),
    ("the learning rate drops an epoch late", "finetune.py",
     "step // steps_per_epoch >= lr_drop", "step // steps_per_epoch > lr_drop", "recipe"),
    ("all parts learn at the same rate", "finetune.py",
     "if part in name)", "if part == name)", "finetune"),
    ("the gradient is not clipped", "finetune.py", "args.clip or math.inf", "math.inf", "recipe"),
    ("the loop ignores the schedule", "finetune.py",
     "group[\"initial_lr\"] * factor", "group[\"initial_lr\"]", "recipe"),
    ("the loop augments every epoch alike", "finetune.py",
     "sampler.epoch = train.epoch = epoch", "sampler.epoch = epoch", "recipe"),
    ("no flip", "data.py", "rng.random() < 0.5:\n            sample = flip",
     "rng.random() < 0:\n            sample = flip", "data"),
    ("evaluation with stochastic depth", "pretrain.py", "    model.eval()\n", "", "pretrain"),
    ("warm-up an epoch early", "pretrain.py",
     "* epoch / args.warmup_epochs", "* (epoch + 1) / args.warmup_epochs", "pretrain"),
    ("one-cycle ends too high", "pretrain.py", "args.lr / 20 / 1e4", "args.lr / 20", "pretrain"),
    ("semantic softmax: a mean over the level's images", "pretrain.py",
     ".sum() / len(target)", ".sum() / (column >= 0).sum().clamp(min=1)", "pretrain"),
    ("CutMix: the ratio drawn, not the ratio cut", "extras/augment.py",
     "        ratio = 1 - (y1 - y0) * (x1 - x0) / (h * w)\n", "", "augment"),
    ("label smoothing over the other classes", "extras/augment.py",
     "smoothing / num_classes", "smoothing / (num_classes - 1)", "recipe"),
    ("shot noise too strong", "extras/corruptions.py",
     "(60,), (25,), (12,)", "(60,), (24,), (12,)", "corruptions"),
    ("contrast around grey", "extras/corruptions.py",
     "mean = (image / 255).mean((0, 1))", "mean = np.full(3, (image / 255).mean())", "corruptions"),
    ("fog grows brighter", "extras/corruptions.py",
     "x * peak / (peak + density) * 255", "x * 255", "corruptions"),
    ("boxes scaled by the other side", "evaluate.py",
     "torch.tensor([w, h, w, h])", "torch.tensor([h, w, h, w])", "evaluate"),
    ("detection with dropout", "evaluate.py", "    model.eval()\n    # GroupNorm", "    # GroupNorm",
     "evaluate"),
    # loops of both stages
    ("best.pt is always the last", "finetune.py", "if scores[\"AP\"] > best", "if True", "recipe"),
    ("best.pt is the first", "finetune.py", "best = scores[\"AP\"]\n", "best = 9\n", "recipe"),
    ("the normaliser is that of the micro-batch", "finetune.py",
     "detection_loss(outputs, targets, num_matches)", "detection_loss(outputs, targets)", "recipe"),
    ("gradients are not cleared", "finetune.py", "    optimizer.zero_grad(set_to_none=True)\n", "",
     "recipe"),
    ("only the last micro-batch counts", "finetune.py", "        losses[\"loss\"].backward()",
     "        optimizer.zero_grad()\n        losses[\"loss\"].backward()", "recipe"),
    ("no weight decay", "finetune.py", "weight_decay=args.weight_decay)", "weight_decay=0)", "recipe"),
    ("one-cycle without warm-up", "finetune.py", "if progress < 0.1:", "if progress < 0:", "recipe"),
    ("weights stay between steps", "finetune.py", "    optimizer.step()\n", "", "recipe"),
    ("fine-tuning in evaluation mode", "finetune.py", "        model.train()\n",
     "        model.eval()\n", "recipe"),
    ("every step draws the same dropout", "finetune.py", "engine.seed_step(args.seed, step)",
     "engine.seed_step(args.seed, epoch)", "recipe"),
    ("all epochs have the same order", "finetune.py", "sampler.epoch = train.epoch = epoch",
     "train.epoch = epoch", "recipe"),
    ("L1 weight 2", "finetune.py", "2.0, 5.0, 2.0", "2.0, 2.0, 2.0", "recipe"),
    ("no deep supervision", "finetune.py", "layers = [*outputs[\"aux_outputs\"], outputs]",
     "layers = [outputs]", "recipe"),
    ("step schedule by steps", "finetune.py", "step // steps_per_epoch >= lr_drop", "step >= lr_drop",
     "recipe"),
    ("the class token decays", "pretrain.py", "\"weight\" in name and p.ndim > 1", "p.ndim > 1",
     "recipe"),
    ("pre-training ignores the schedule", "pretrain.py", "                    group[\"lr\"] = lr\n",
     "                    pass\n", "recipe"),
    ("cosine by steps", "pretrain.py", "cosine(args.lr, COSINE_END, epoch / args.epochs)",
     "cosine(args.lr, COSINE_END, step / args.epochs)", "recipe"),
    ("mixing is the same in every step", "pretrain.py", "(args.seed, epoch, step, 1)", "(args.seed, 1)",
     "recipe"),
    ("pre-training's best.pt is always the last", "pretrain.py", "if scores[\"top1\"] > best:",
     "if True:", "recipe"),
    ("the mean of micro-batches, not of images", "pretrain.py", ".log_softmax(-1)).sum() / total",
     ".log_softmax(-1)).sum() / len(logits)", "recipe"),
    ("no label smoothing", "pretrain.py", "smooth_targets(labels, num_classes, args.smoothing)",
     "smooth_targets(labels, num_classes, 0)", "recipe"),
    ("copies of an image are apart", "pretrain.py", "order.flatten()[:self.used]",
     "order.T.flatten()[:self.used]", "recipe"),
    ("the pre-training set keeps its first epoch", "pretrain.py", "sampler.epoch = train.epoch = epoch",
     "sampler.epoch = epoch", "recipe"),
    ("mixup: targets are not mixed", "extras/augment.py", "targets.lerp(targets.flip(0), 1 - ratio)",
     "targets", "recipe"),
    # flags
    ("--dropout is ignored", "finetune.py", "dropout=args.dropout, ", "", "flags"),
    ("--adaptor-per-layer is ignored", "finetune.py",
     "adaptor=args.adaptor, adaptor_per_layer=args.adaptor_per_layer,", "adaptor=args.adaptor,",
     "flags"),
    ("--drop-path is ignored", "pretrain.py", "drop_path=args.drop_path, ", "", "flags"),
    ("--activation-checkpointing is ignored", "finetune.py",
     "    model.encoder.checkpointing = args.activation_checkpointing\n", "", "flags"),
    ("--compile is ignored", "pretrain.py", "torch.compile(model) if args.compile else model", "model",
     "flags"),
    ("--amp bf16 is ignored", "engine.py", "enabled=args.amp == \"bf16\"", "enabled=False", "flags"),
    ("--limit-val is ignored", "finetune.py",
     "read_data(split=\"val\", limit=args.limit_val, **options)", "read_data(split=\"val\", **options)",
     "flags"),
    ("validation with training augmentation", "pretrain.py", "limit=args.limit_val, augment=\"none\"",
     "limit=args.limit_val, augment=args.augment", "flags"),
    ("--eval-every is ignored", "pretrain.py", "(epoch + 1) % args.eval_every == 0 or ", "", "flags"),
    ("--sampling-lr is ignored", "finetune.py", "\"sampling_offsets\": args.sampling_lr",
     "\"sampling_offsets\": 0.25", "flags"),
    ("--split is ignored", "evaluate.py", "split=args.split,\n", "split=\"val\",\n", "flags"),
    ("--severities are ignored", "evaluate.py", "for s in args.severities]\n    todo",
     "for s in (1,)]\n    todo", "flags"),
    # evaluation, data and reports
    ("top-1 counts the second class", "pretrain.py", "best[:, 0].sum()", "best[:, 1].sum()", "pretrain"),
    ("crowds count as objects of a class", "evaluate.py", "if not a.get(\"iscrowd\")]\n    classes",
     "]\n    classes", "evaluate commands"),
    ("classes are matched by position", "evaluate.py",
     "dataset.classes, dataset.category_ids = classes, [id_of[name] for name in classes]",
     "dataset.classes = classes", "commands"),
    ("released layout in padded batches", "evaluate.py", "        batch_size = 1\n", "        pass\n",
     "evaluate"),
    ("rPC is not divided by the clean AP", "extras/claims.py", "mpc / clean if clean > 0 else 0.0", "mpc",
     "claims"),
    ("mean over severities and corruptions at once", "extras/tables.py",
     "each[name] = 100 * statistics.mean(values)", "each[name] = 100 * max(values)", "tables"),
    ("deviation of the population", "extras/tables.py", "statistics.stdev(values)",
     "statistics.pstdev(values)", "tables"),
    ("runs of other flags count as done", "extras/claims.py",
     "e.get(\"code\") in codes and e.get(\"flags\") == args.flags.get(e[\"arm\"])",
     "e.get(\"code\") in codes", "claims"),
    ("runs of other code count as done", "extras/claims.py", "e.get(\"code\") in codes and ", "",
     "claims"),
    ("C2's none is trained with self-attention", "extras/claims.py", "\"--adaptor none\"", "\"\"",
     "claims"),
    ("the test of a claim is not paired", "extras/claims.py", "test = ttest_rel(",
     "from scipy.stats import ttest_ind\n    test = ttest_ind(", "claims"),
    ("objects may hide each other", "extras/shapes.py", ">= 0.8 * size", ">= 0.0 * size", "data"),
    ("ground truth is not clipped", "data.py", "        xywh = np.concatenate([a.boxes[:, :2], ",
     "        xywh = np.concatenate([a.boxes[:, :2] - 1, ", "data"),
    ("resumed entries stay twice", "engine.py", "if e[\"step\"] <= entry[\"step\"]", "if True",
     "engine"),
    ("other data may be resumed", "engine.py", "                **description.get(\"content\", {}), ",
     "                ", "engine"),
    ("warm-up from zero", "pretrain.py", "WARMUP_START, COSINE_END = 1e-6, 1e-5",
     "WARMUP_START, COSINE_END = 0, 1e-5", "pretrain"),
    ("hours without the backward pass", "extras/benchmark.py", "118_287, 3 * 50", "118_287, 50",
     "benchmark"),
    ("training accuracy among mixed pictures", "pretrain.py",
     "{} if args.mixup or args.cutmix else {\"train_top1\"", "{\"train_top1\"", "flags"),
    ("training accuracy of a micro-batch", "pretrain.py", "labels[part]).sum() / total",
     "labels[part]).sum() / len(logits)", "pretrain"),
    ("--resume takes the weights of --pretrained", "engine.py", "elif path:\n            message",
     "if path:\n            message", "resume"),
    ("classes of the two sets may differ", "finetune.py", "    engine.check_classes(train, val)\n", "",
     "commands"),
    ("ImageNet-21k-P at the rate of ImageNet-1k", "pretrain.py", "batch_size=4096, lr=3e-4",
     "batch_size=4096, lr=5e-4", "pretrain"),
    ("the paper's row below a part of COCO", "evaluate.py", " in tables.PAPER[2] and limit is None:",
     " in tables.PAPER[2]:", "commands"),
    ("AP of a class with ten detections per image", "evaluate.py", "[:, :, :, 0, -1]", "[:, :, :, 0, 1]",
     "evaluate"),
    ("the clock starts anew with --resume", "engine.py",
     "            self.started -= self.state[\"seconds\"]\n", "", "resume"),
    ("a checkpoint in every step, after ten minutes", "engine.py",
     "counters})\n        self.saved_at = time.time()\n", "counters})\n", "engine"),
    ("seed 1 begins with the second epoch of seed 0", "engine.py", "self.seed * 100_003", "self.seed",
     "engine"),
    ("weights that are not finite are saved", "engine.py", "if not torch.stack([w.isfinite()",
     "if False and torch.stack([w.isfinite()", "engine"),
    ("--overwrite removes --data-root", "engine.py", ", args.data_root or f\"data/{args.data}\"):", "):",
     "commands"),
    ("seeds differ in --out, so Table 5 refuses them", "engine.py",
     "items() if k not in MACHINE_FLAGS}\n        parameters", "items()}\n        parameters", "commands"),
    ("--compile must stay with --resume", "engine.py", "\"compile\",\n", "\n", "engine"),
    ("folders of classes are validated on their training set", "data.py", "(prefix + split)",
     "(prefix + \"train\")", "data"),
    ("mirrored pictures are turned the other way", "data.py", "5: Image.Transpose.TRANSPOSE",
     "5: Image.Transpose.TRANSVERSE", "data"),
    ("Sharpness is Contrast", "extras/augment.py", "ImageEnhance.Sharpness", "ImageEnhance.Contrast",
     "augment"),
    ("CutMix has the alpha of mixup", "extras/augment.py", "cutmix if paste else mixup", "mixup or cutmix",
     "augment"),
    ("erased rectangles are squares", "extras/augment.py",
     "eh, ew = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))",
     "eh = ew = round(math.sqrt(area))", "augment"),
    ("a figure of the paper", "extras/tables.py", "50, 43.3, 63.9, 47.7", "50, 43.9, 63.9, 47.7", "tables"),
    ("the lower end of the interval", "extras/claims.py", "max(-low, high)", "high", "claims"),
    ("an asterisk for each test alone", "extras/claims.py", "values, len(COMPARISONS)", "values, 1",
     "claims"),
    ("released class names are lost", "extras/released.py",
     "(content.get(\"meta\") or {}).get(\"CLASSES\") or ", "", "released"),
    ("classes start at 10 %", "model.py", "-math.log(99)", "-math.log(9)", "model"),
    ("each curve is the sum of the losses", "extras/pictures.py", "[e[key] for e in losses]",
     "[e[\"loss\"] for e in losses]", "pictures"),
    ("the clean line at the mean", "extras/pictures.py", "axis.axhline(clean,", "axis.axhline(row[0],",
     "pictures"),
    ("no evaluation at the end", "finetune.py", " == 0 or epoch + 1 == args.epochs:", " == 0:", "flags"),
    ("--resume forgets the best score", "finetune.py", "state[\"best\"], state", "-math.inf, state",
     "recipe"),
    ("augmentation ignores --seed", "finetune.py", "image_size=args.image_size, seed=args.seed)",
     "image_size=args.image_size)", "flags"),
]


def plant(right: str, wrong: str, text: str) -> str:
    """Returns the text with the mistake. ValueError unless the right text occurs exactly once."""
    if text.count(right) != 1:
        raise ValueError(f"{right!r} occurs {text.count(right)} times")
    return text.replace(right, wrong)


def first_failure(tests: str, file: str | None = None, text: str = "") -> str | None:
    """Runs test files in a copy of the project, in which `file` has another text, until a test fails.
    Returns its name, or None."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               *(f"tests/test_{name}.py" for name in tests.split())]
    environment = {"FPDETR_REFERENCE_DATA": str(ROOT.parent / "shared"), **os.environ,
                   "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        leave_out = shutil.ignore_patterns("runs", ".git", "data")
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=leave_out))
        if file is not None:
            (copy / file).write_text(text)
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return found and found[1]  # None if pytest itself was killed


def main() -> None:
    chosen = [MUTATIONS[int(n)] for n in sys.argv[1:]] or MUTATIONS
    pool = ThreadPoolExecutor(os.cpu_count())  # each thread waits for a pytest
    for test in pool.map(first_failure, sorted({tests for *_, tests in chosen})):
        if test:
            sys.exit(f"{test} fails without any mistake")
    survivors = 0
    texts = [plant(right, wrong, (ROOT / file).read_text()) for _, file, right, wrong, _ in chosen]
    failures = pool.map(first_failure, [m[4] for m in chosen], [m[1] for m in chosen], texts)
    for mutation, test in zip(chosen, failures):
        survivors += test is None
        what, file, *_ = mutation
        print(f"{MUTATIONS.index(mutation):2} {what} ({file}): {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes were caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
