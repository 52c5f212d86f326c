"""What the stages share: flags, devices and processes, schedules, checkpoints, and the folder a run leaves
behind.

These are helpers that a training loop calls, not a trainer that calls back: the loops stand in pretrain.py
and finetune.py.
"""
import argparse
import contextlib
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from deform_attn_jit import forced_path
from model import VARIANTS, Classifier, Config, Detector, InputError
from released import (is_released, is_released_pretraining, load_checkpoint, load_released,
                      load_released_encoder,
                      released_layout)


# ----------------------------------------------------------------------------------------------------- flags

def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every training stage has; their defaults are the paper's fine-tuning on COCO."""
    parser.add_argument("--variant", choices=VARIANTS, default="tiny",
                        help="size of the model, Table 1 (tiny is ours)")
    parser.add_argument("--structure", choices=("encoder-only", "encoder-decoder"), default="encoder-only",
                        help="FP-DETR, or FP-EncDec: its last six layers are decoder layers (A.2, Table 7)")
    parser.add_argument("--layout", choices=("paper", "released"), default="paper",
                        help="as the paper's text has it, or as the authors' released code (README: where "
                             "they differ)")
    parser.add_argument("--epochs", type=positive, default=50, help="passes over the training set (4.1)")
    parser.add_argument("--batch-size", type=positive, default=32,
                        help="images per step, over all GPUs (4.1)")
    parser.add_argument("--micro-batch", type=positive, default=2,
                        help="images that one GPU holds at once; the batch is accumulated from as many as "
                             "needed. The gradient is the same; larger is faster and needs more memory")
    parser.add_argument("--lr", type=rate, default=1e-4, help="initial learning rate (4.1)")
    parser.add_argument("--weight-decay", type=rate, default=1e-4,
                        help="AdamW's, on all parameters (released code)")
    parser.add_argument("--activation-checkpointing", action="store_true",
                        help="keep only the layers' inputs and compute the rest again for the backward "
                             "pass: less memory, more time, the same gradient")
    parser.add_argument("--benchmark", type=positive, nargs="?", const=15, metavar="SECONDS",
                        help="instead of training, measure the loader, training, and the parts of its "
                             "steps, each for so many seconds (default: 15)")
    parser.add_argument("--limit-train", type=positive, help="use the first N training images only")
    parser.add_argument("--out", type=Path, help="folder of this run (default: runs/STAGE-VARIANT-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt, exactly")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")


DETECTION_DATA = ("shapes or shapes-hard (generated, no download), coco, cityscapes, or any folder in COCO "
                  "format with train/, val/ and annotations/instances_{train,val}.json")


def add_data_flags(parser: argparse.ArgumentParser, data: str = DETECTION_DATA,
                   root: str = "where coco or cityscapes lies (default: data/NAME)") -> None:
    """The flags that training and evaluation have in common; `data`, `root`: help texts of these two."""
    parser.add_argument("--data", default="shapes", help=data)
    parser.add_argument("--data-root", help=root)
    parser.add_argument("--image-size", type=positive, default=800,
                        help="short side at test time; all sizes of the training recipe scale with it")
    parser.add_argument("--limit-val", type=positive, help="evaluate on the first N images only")
    parser.add_argument("--split", choices=("val", "train"), default="val",
                        help="which images to evaluate on")
    parser.add_argument("--seed", type=natural, default=0,
                        help="of weights, data order, augmentation and dropout")
    parser.add_argument("--workers", type=natural, default=min(8, os.cpu_count() or 1),
                        help="data loading processes per GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available()
                        else "cpu",
                        help="where to compute (default: the GPU if there is one)")
    parser.add_argument("--amp", choices=("bf16", "off"),
                        help="mixed precision (default: bf16 on GPUs, off on CPUs)")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def fraction(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not (0 <= value and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return value


def run_script(main) -> None:
    """Runs main(). What the user can mend ends in one line and exit code 2 rather than in a traceback."""
    def end(code: int, text: str) -> None:
        tqdm.write(text, file=sys.stderr)  # on a line of its own where a progress bar is shown
        sys.exit(code)
    try:
        forced_path()  # a misspelt FPDETR_DEFORM_ATTN shows now rather than in the first forward pass
        main()
    except InputError as e:
        # out of a data loading process it comes with that process's traceback before it
        end(2, f"error: {str(e).splitlines()[-1].rpartition('InputError: ')[2]}")
    except torch.OutOfMemoryError:
        end(2, "error: the GPU's memory is full: give a smaller --micro-batch (the same batch, accumulated "
               "in parts)")
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):  # it raises plain RuntimeErrors
            raise
        end(2, f"error: process {rank()} lost another one, which says above or below why it ended; then go "
               f"on with --resume")
    except OSError as e:  # of a log or a picture; checkpoints have their own words for it
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        end(2, f"error: cannot write {e.filename or 'a file of the run'} ({e.strerror}): mend it; a "
               f"training run goes on with --resume")
    except Terminated as e:
        if not rank():
            end(0, str(e))
    except KeyboardInterrupt:
        end(130, "interrupted; a training run goes on from its last checkpoint with --resume")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------- devices and processes

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(args: argparse.Namespace) -> torch.device:
    """Device, torchrun's processes, mixed precision and seeds, from the flags."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU: use --device cpu")
    device = torch.device(args.device)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if device.type == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise InputError(f"there are more processes than the {torch.cuda.device_count()} "
                                 f"GPUs: lower --nproc_per_node, or give --device cpu")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # gloo for what lies on the CPU, so that no process waits for a GPU to tell another one of it
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    torch.manual_seed(args.seed)
    return device


def seed_step(seed: int, step: int) -> None:
    """Seeds what is random inside a step, dropout and stochastic depth: anew for each step and process, so
    that a run resumed after any step needs no saved random state. (Order and augmentation of the data have
    seeds of their own.)"""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1)[0]))


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def broadcast_weights(model: nn.Module) -> None:
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, in one message. Losses are normalised over the total batch, so
    that the sum is the gradient of the total batch, even if a process had fewer images or none."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = g.view_as(p)


def sum_over_processes(value: float | Tensor, device: torch.device) -> Tensor:
    """The sum over the processes of a number or a float tensor, on `device`; nobody waits for it."""
    total = torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True, copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any of the processes."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def prepare_benchmark(args: argparse.Namespace) -> None:
    """Where a stage measures something instead of training."""
    if world_size() > 1:
        raise InputError("--benchmark and --linear-baseline are for one process: start without torchrun")
    args.overwrite = True  # of a run's folder, into which nothing is written


def no_mark(part: str) -> None:
    """What a training step calls after each of its parts where nobody measures them."""


def on_host(value: Tensor) -> Callable[[], float]:
    """Starts to copy a scalar to the CPU and returns what gives it. A GPU that has been given more work
    in between does not run dry while the CPU waits for the number."""
    if value.device.type == "cpu":
        return value.item
    copy, copied = torch.empty((), dtype=value.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(value, non_blocking=True)
    copied.record()

    def number() -> float:
        copied.synchronize()
        return copy.item()
    return number


def gather(items: list) -> list:
    """The lists of all processes, one after another."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


def check_images(*datasets) -> None:
    """`check_images` of some sets, each process its share. Raises InputError, in all processes, naming the
    first image that is broken."""
    errors = []
    for dataset in datasets:
        try:
            dataset.check_images(range(rank(), len(dataset), world_size()))
        except InputError as e:
            errors.append(str(e))
    if errors := gather(errors):
        raise InputError(errors[0])


class BatchSampler:
    """Shuffled batches of indices, of which this process gets its share. The total batches depend on the
    seed and the epoch only, not on the number of processes; the last one of an epoch may be smaller. `skip`:
    how many batches of the epoch are left out, because a run that is resumed has seen them."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed, self.epoch, self.skip = length, batch_size, seed, 0, 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def __iter__(self):
        for batch in self.batches()[self.skip:]:
            yield self.share(batch)

    def batches(self) -> tuple[Tensor, ...]:
        """The total batches of the epoch."""
        return self.order().split(self.batch_size)

    def share(self, batch: Tensor) -> list[int]:
        return batch[rank()::world_size()].tolist()

    def order(self) -> Tensor:
        """(length,) shuffled indices."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return torch.randperm(self.length, generator=generator)


# ----------------------------------------------------------------------------------- optimiser and schedules

def parameter_groups(model: nn.Module, lr: float, multipliers: dict[str, float],
                     decay_vectors: bool = True) -> list[dict]:
    """One group per learning rate. `multipliers`: {part of a parameter's name: factor on lr}; the first that
    fits counts. Without `decay_vectors`, norms and biases (all 1-D parameters) have no weight decay. (DeiT
    spares its class token and positions as well; ours, which are matrices, decay.)"""
    groups = {}
    for name, parameter in model.named_parameters():
        factor = next((f for part, f in multipliers.items() if part in name), 1.0)
        groups.setdefault((factor, decay_vectors or parameter.ndim > 1), []).append(parameter)
    return [{"params": params, "lr": lr * factor, "initial_lr": lr * factor,
             **({} if decay else {"weight_decay": 0.0})}
            for (factor, decay), params in groups.items()]


def schedule_factor(schedule: str, step: int, steps_per_epoch: int, epochs: int, lr_drop: int) -> float:
    """Factor on every learning rate at `step` (counted from 0 over the whole run).

    "step": x0.1 from epoch `lr_drop` on (4.1). "one-cycle": linear from 1/25 to 1 in the first tenth, then a
    cosine to 0.
    """
    if schedule == "step":
        return 0.1 if step // steps_per_epoch >= lr_drop else 1.0
    progress = (step + 1) / (steps_per_epoch * epochs)
    if progress < 0.1:
        return 0.04 + 0.96 * progress / 0.1
    return (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


# --------------------------------------------------------------------------------------- numbers going wrong

def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs `forward`, a pass of `model`, and names the first of its modules whose output holds NaN or
    infinity; or the first weight that does, and then no pass is needed."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    found = []

    def look(name: str):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in outputs):
                found.append(f"the output of {name}")
        return hook
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def image_name(source: Path | Image.Image, number: int) -> str:
    """Of an item of a data set: its file, or its number if it was generated."""
    return str(source) if isinstance(source, Path) else str(number)


def stop_at_non_finite(model: nn.Module, parts: list[tuple[list[str], Callable[[], object]]], args,
                       step: int) -> None:
    """Raises the InputError for a step whose loss is not finite. `parts`: per micro-batch the names of its
    images and a forward pass on them."""
    for names, forward in parts:
        seed_step(args.seed, step)
        if where := first_non_finite(model, forward):
            break
    else:  # what dropout drew in the step itself
        names, where = [n for part, _ in parts for n in part], "nothing, in a second pass"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise InputError(f"the loss of step {step + 1} is not finite: the first that is not is {where}, at the "
                     f"images {shown}; try a lower --lr; the last checkpoint is untouched")


# ----------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: Path, content: dict) -> None:
    """Written, by the first process, to a temporary name and renamed, so that a file of this name is always
    whole."""
    if rank():
        return
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise InputError(f"cannot write {path} ({reason}): mend it and --resume; an older file is "
                         f"untouched") from None


def describe(model: nn.Module, args: argparse.Namespace, classes: list[str], stage: str) -> dict:
    """The part of a checkpoint from which a model can be built again."""
    return {"stage": stage, "config": asdict(model.encoder.config), "layout": args.layout,
            "classes": classes,
            "model": model.state_dict(), "args": plain_flags(args)}


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as a checkpoint holds them: paths as text."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v)
            for k, v in vars(args).items()}


# Flags that may change when a run is resumed, because the result does not depend on them, or because that is
# their purpose.
FREE_ON_RESUME = {"resume", "overwrite", "out", "pretrained", "init", "compile", "data_root", "workers",
                  "device", "micro_batch", "activation_checkpointing", "benchmark", "epochs", "eval_every",
                  "split", "limit_val"}


def load_resumed(args: argparse.Namespace, stage: str, classes: list[str]) -> dict:
    """The run folder's last.pt, if it was made by the same stage with the same flags on the same classes."""
    path = args.out / "last.pt"
    state = load_checkpoint(path)
    if state.get("stage") != stage or "optimizer" not in state:
        raise InputError(f"{path} cannot be resumed by this script: it is no last.pt of it")
    if state["classes"] != classes:
        raise InputError(f"{path} was trained on {len(state['classes'])} classes, the data have "
                         f"{len(classes)} "
                         f"({', '.join(map(str, sorted(set(state['classes']) ^ set(classes))))[:200]} "
                         f"differ)")
    now = plain_flags(args)
    changed = [f"--{k.replace('_', '-')} {v} (now {now.get(k)})" for k, v in state["args"].items()
               if k not in FREE_ON_RESUME and now.get(k) != v]
    if changed:
        raise InputError(f"{path} was trained with {', '.join(changed)}: give the same flags, or "
                         f"another --out")
    return state


def build_detector(config: Config, layout: str, num_classes: int) -> Detector:
    detector = Detector(config, num_classes)
    return released_layout(detector) if layout == "released" else detector


def load_detector(path: str | Path) -> tuple[Detector, dict]:
    """A detector from a checkpoint of ours or of the authors, in eval mode, with {"classes", "layout",
    "config"}."""
    content = load_checkpoint(path)
    if is_released(content):
        detector = load_released(content)
        num_classes = detector.class_head.out_features
        names = (content.get("meta") or {}).get("CLASSES") or [f"class {i}" for i in range(num_classes)]
        return detector, {"classes": list(names), "layout": "released",
                          "config": asdict(detector.encoder.config)}
    if content.get("stage") != "finetune":
        raise InputError(f"{path} holds no detector: give a checkpoint of finetune.py or a released one")
    try:
        detector = build_detector(Config(**content["config"]), content["layout"], len(content["classes"]))
        detector.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as e:
        raise InputError(f"{path} is not a whole checkpoint of finetune.py: "
                         f"{' '.join(str(e).split())[:200]}") from None
    return detector.eval(), content


def variant_of(config: dict) -> str:
    """The encoder's name: that of its variant, or the sizes that tell a changed one apart."""
    size_keys = ("dim", "mlp_dim", "heads", "tokenizer_dim", "layers", "entry_layer", "points")
    sizes = {k: config.get(k) for k in size_keys}
    names = [n for n, c in VARIANTS.items() if all(asdict(c)[k] == v for k, v in sizes.items())]
    decoder = " encoder-decoder" if config.get("structure") == "encoder-decoder" else ""
    return (names[0] if names else str(sizes)) + decoder


def load_pretrained(model: Classifier | Detector, layout: str, path: str | Path) -> str:
    """Copies a checkpoint's weights into a fresh model and returns a line that says what was loaded and what
    starts fresh. The encoder is loaded strictly. Between the stages that is all; from the same stage also
    those of the other parts that have the same shapes (another number of classes: all but the class head).

    Raises:
        InputError: if it is no checkpoint, or its encoder is of another variant or layout.
    """
    content = load_checkpoint(path)
    try:
        if is_released(content):
            theirs = load_released(content)
            content = {"stage": "finetune", "layout": "released", "config": asdict(theirs.encoder.config),
                       "model": theirs.state_dict()}
        elif is_released_pretraining(content):
            config, weights = load_released_encoder(content)
            content = {"stage": "pretrain", "layout": "released", "config": asdict(config), "model": weights}
    except RuntimeError as e:  # shapes that do not belong together
        raise InputError(f"{path} does not fit: {' '.join(str(e).split())[:200]}") from None
    whole = {"model", "config", "layout", "stage"} <= content.keys()
    if not whole or not all(isinstance(content[k], dict) for k in ("model", "config")):
        raise InputError(f"{path} is neither a checkpoint of this project nor one of the authors'")
    theirs, ours = variant_of(content["config"]), variant_of(asdict(model.encoder.config))
    if (theirs, content["layout"]) != (ours, layout):
        raise InputError(f"{path} holds the variant {theirs} in the {content['layout']} layout, not {ours} "
                         f"in the {layout} layout: change --variant, --structure or --layout")
    loaded, fresh, stage = [], [], "finetune" if isinstance(model, Detector) else "pretrain"
    for name, part in model.named_children():
        state = {k.removeprefix(name + "."): v for k, v in content["model"].items()
                 if k.startswith(name + ".")}
        fits = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in part.state_dict().items()}
        if name == "encoder" or content["stage"] == stage and fits:
            try:
                part.load_state_dict(state)
            except RuntimeError as e:
                raise InputError(f"{path} does not fit: {' '.join(str(e).split())[:200]}") from None
            loaded.append(name)
        else:
            fresh.append(name)
    return f"loaded from {path}: {', '.join(loaded)}; starting fresh: {', '.join(fresh) or 'nothing'}"


def origin_of(pretrained: str | None) -> dict:
    """What Table 7 tells of a run's pre-training: how many class tokens, and their top-1 accuracy."""
    content = load_checkpoint(pretrained) if pretrained else {}
    config, scores = content.get("config"), content.get("scores")
    return {"class_tokens": config.get("class_tokens", 1) if isinstance(config, dict) else 1,
            "top1": scores.get("top1") if isinstance(scores, dict) else None}


def summary(model: nn.Module, args: argparse.Namespace, measured: dict) -> dict:
    """The content of a run's metrics.json: what was trained, how, and what came out."""
    flags = {k: plain_flags(args).get(k) for k in ("variant", "structure", "adaptor", "adaptor_per_layer",
                                                   "layout", "epochs", "seed", "pretrained")}
    return {**flags, "parameters": sum(p.numel() for p in model.parameters()), **measured}


def load_weights(model: Classifier | Detector, args: argparse.Namespace, stage: str, classes: list[str],
                 pretrained: str | None) -> dict | None:
    """A fresh model's weights: of the run to be resumed, whose last.pt is returned, or of `pretrained`,
    or neither. InputError as in `load_resumed` and `load_pretrained`."""
    if args.resume:
        state = load_resumed(args, stage, classes)
        model.load_state_dict(state["model"])
        return state
    if pretrained:
        message = load_pretrained(model, args.layout, pretrained)
        if not rank():
            print(message)
    return None


# ------------------------------------------------------------------------------------------ the run's folder

class Terminated(BaseException):
    """SIGTERM came, and what is to be kept has been written. No Exception: it has to pass through the code
    that takes any exception of a decoder for a broken file."""


class Run:
    """A run's folder: args.json, log.jsonl, curves.png, last.pt, best.pt, metrics.json and what the stage
    adds. Also what ends a run before its time: SIGTERM, as clusters send it before they take a machine back.
    """
    save_every = 600  # seconds between checkpoints inside an epoch

    @staticmethod
    def folder_of(args: argparse.Namespace, stage: str) -> Path:
        named = ("shapes", "shapes-hard", "coco", "cityscapes", "imagenet", "imagenet21k")
        data = args.data if args.data in named else Path(args.data).resolve().name
        return args.out or Path("runs") / f"{stage}-{args.variant}-{data}"

    def __init__(self, args: argparse.Namespace, stage: str):
        self.folder = self.folder_of(args, stage)
        self.last = self.folder / "last.pt"
        self.started = self.saved = time.time()
        begun = (self.folder / "args.json").exists()
        if begun and not (args.resume or args.overwrite):
            raise InputError(f"{self.folder} already holds a run: --resume goes on with it, --overwrite "
                             f"replaces it, --out names another folder")
        if args.resume and not self.last.exists():
            if not begun:
                raise InputError(f"nothing to resume: {self.last} is missing")
            args.resume = False  # killed before its first checkpoint: there is nothing that could be lost
            args.overwrite = True
        self.terminated, self.may_stop = False, True
        signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, *_) -> None:
        self.terminated = True
        if self.may_stop:
            self.stop()

    def stop(self) -> None:
        raise Terminated(f"stopped by SIGTERM; the same command with --resume goes on from {self.last} (one "
                         f"with --seeds goes on by itself)" if self.last.exists() else
                         "stopped by SIGTERM before the first checkpoint: start it again")

    @contextlib.contextmanager
    def interruptible(self):
        """Around what takes long and changes nothing: SIGTERM ends it at once. (Else it waits for the end of
        a step, see `after_step`.)"""
        self.may_stop = True
        if self.terminated:
            self.stop()
        yield
        self.may_stop = False

    def after_step(self, save: Callable[[], None]) -> None:
        """To be called after each step: saves every ten minutes, and at SIGTERM, which ends the run in all
        processes after the same step."""
        stop = any_process(self.terminated)
        if stop or self.seconds_since_save() > self.save_every:
            save()
        if stop:
            self.stop()

    def open(self, args: argparse.Namespace) -> None:
        """Creates the folder. Called only when the input has been found good, so that bad input leaves
        nothing behind."""
        self.may_stop = False
        if rank():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                for name in ("log.jsonl", "last.pt", "best.pt", "metrics.json", "curves.png",
                             "detections.png", "predictions.png"):
                    (self.folder / name).unlink(missing_ok=True)
            (self.folder / "args.json").write_text(json.dumps(vars(args), indent=1, default=str))
        except OSError as e:
            raise InputError(f"cannot write into {self.folder}: {e.strerror}") from None

    def save(self, content: dict) -> None:
        """Writes last.pt, from which --resume goes on. Raises InputError, and leaves the older one, if a
        weight is not finite."""
        if not torch.stack([w.isfinite().all() for w in content["model"].values()]).all():
            raise InputError(f"the weights are not finite after step {content['step']}: try a lower --lr; "
                             f"the last checkpoint is untouched")
        save_checkpoint(self.last, content)
        self.saved = time.time()

    def seconds_since_save(self) -> float:
        return time.time() - self.saved

    def minutes(self) -> str:
        return f"after {(time.time() - self.started) / 60:.1f} minutes"

    def read_log(self) -> list[dict]:
        """The log's entries; a last line that was cut off by a kill is left out."""
        path, entries = self.folder / "log.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def rewind(self, epoch: int, step: int) -> None:
        """Forgets what was logged after `step`, and the evaluations of epochs after `epoch`: a resumed run
        will log them again."""
        if not rank():
            temporary = self.folder / "log.tmp"
            temporary.write_text("".join(json.dumps(e) + "\n" for e in self.read_log() if e["step"] <= step
                                         and ("loss" in e or e["epoch"] <= epoch)))
            temporary.replace(self.folder / "log.jsonl")

    def log(self, **entry) -> None:
        if not rank():
            with open(self.folder / "log.jsonl", "a") as f:
                entry = {**entry, "seconds": time.time() - self.started}
                f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()})
                        + "\n")

    def curves(self, scores: tuple[str, ...]) -> None:
        """Draws the log: losses on the left, the validation scores that are named on the right."""
        if rank():
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        log = self.read_log()
        losses, evaluations = [e for e in log if "loss" in e], [e for e in log if scores[0] in e]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        for key in [k for k in (losses[0] if losses else {}) if k.startswith("loss")]:
            left.plot([e["step"] for e in losses], [e[key] for e in losses], label=key, lw=2 if key == "loss"
                      else 1)
        left.set(xlabel="step", yscale="log", title="training loss")
        for key in scores:
            right.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], "o-", ms=3,
                       label=key)
        right.set(xlabel="step", ylim=(0, 1), title="validation")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=90)
        plt.close(figure)


def leave_sigterm_to_the_trainer(_: int) -> None:
    """For data loading processes: SIGTERM, sent to all processes of a run, must not take away the batches of
    a step that is to be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Mean:
    """Means of tensors that stay on their device until they are asked for, so that no step waits for the
    GPU."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, values: dict[str, Tensor]) -> None:
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + v.detach()
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means over the steps, summed over the processes (whose losses are shares of the total
        batch's), and a fresh start."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in self.sums.values()])
        if world_size() > 1:
            dist.all_reduce(sums)
        means = dict(zip(self.sums, (sums / self.count).tolist()))
        self.__init__()
        return means
