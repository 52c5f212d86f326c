"""What the stages share: flags, devices and processes, schedules, checkpoints, and the folder a run leaves behind.

These are helpers that a training loop calls, not a trainer that calls back: the loops stand in pretrain.py and finetune.py.
"""
import argparse
import json
import math
import os
import pickle
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import VARIANTS, Config, Detector, InputError
from released import is_released, load_released, released_layout


# --------------------------------------------------------------------------------------------------------------- flags

def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every training stage has; their defaults are the paper's fine-tuning on COCO."""
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help="size of the model, Table 1 (tiny is ours)")
    parser.add_argument("--layout", choices=("paper", "released"), default="paper", help="as the paper's text has it, or "
                        "as the authors' released code (README: where they differ)")
    parser.add_argument("--epochs", type=positive, default=50, help="passes over the training set (4.1)")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per step, over all GPUs (4.1)")
    parser.add_argument("--micro-batch", type=positive, help="images that one GPU holds at once; the batch is accumulated "
                        "from as many as needed (default: all of its share)")
    parser.add_argument("--lr", type=float, default=1e-4, help="initial learning rate (4.1)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW's, on all parameters (released code)")
    parser.add_argument("--limit-train", type=positive, help="use the first N training images only")
    parser.add_argument("--out", type=Path, help="folder of this run (default: runs/STAGE-VARIANT-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt, exactly")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run folder holds")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that training and evaluation have in common."""
    parser.add_argument("--data", default="shapes", help="shapes (generated, no download), coco, or any folder in COCO "
                        "format with train/, val/ and annotations/instances_{train,val}.json")
    parser.add_argument("--data-root", help="where coco lies (default: data/coco)")
    parser.add_argument("--image-size", type=positive, default=800, help="short side at test time; all sizes of the "
                        "training recipe scale with it")
    parser.add_argument("--limit-val", type=positive, help="use the first N validation images only")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and dropout")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="data loading processes per GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("bf16", "off"), help="mixed precision (default: bf16 on GPUs, off on CPUs)")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def run_script(main) -> None:
    """Runs main(). What the user can mend ends in one line and exit code 2 rather than in a traceback."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ devices and processes

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
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    torch.manual_seed(args.seed + 1000 * rank())  # dropout differs between processes; weights come from rank 0
    return device


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def broadcast_weights(model: nn.Module) -> None:
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, in one message. Losses are normalised over the total batch, so that the sum
    is the gradient of the total batch, even if a process had fewer images or none."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = g.view_as(p)


def gather(items: list) -> list:
    """The lists of all processes, one after another."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


class BatchSampler:
    """Shuffled batches of indices, of which this process gets its share. The total batches depend on the seed and the
    epoch only, not on the number of processes; the last one of an epoch may be smaller."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
        for batch in order.split(self.batch_size):
            yield batch[rank()::world_size()].tolist()


# --------------------------------------------------------------------------------------------- optimiser and schedules

def parameter_groups(model: nn.Module, lr: float, multipliers: dict[str, float]) -> list[dict]:
    """One group per learning rate. `multipliers`: {part of a parameter's name: factor on lr}; the first that fits counts."""
    groups = {}
    for name, parameter in model.named_parameters():
        factor = next((f for part, f in multipliers.items() if part in name), 1.0)
        groups.setdefault(factor, []).append(parameter)
    return [{"params": params, "lr": lr * factor, "initial_lr": lr * factor} for factor, params in groups.items()]


def schedule_factor(schedule: str, step: int, steps_per_epoch: int, epochs: int, lr_drop: int) -> float:
    """Factor on every learning rate at `step` (counted from 0 over the whole run).

    "step": x0.1 from epoch `lr_drop` on (4.1). "one-cycle": linear from 1/25 to 1 in the first tenth, then a cosine to 0.
    """
    if schedule == "step":
        return 0.1 if step // steps_per_epoch >= lr_drop else 1.0
    progress = (step + 1) / (steps_per_epoch * epochs)
    return 0.04 + 0.96 * progress / 0.1 if progress < 0.1 else (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


# --------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: Path, content: dict) -> None:
    """Written to a temporary name and renamed, so that a file of this name is always whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({e.strerror}); an older one is untouched") from None


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content on the CPU: tensors and plain containers only; any other pickle is refused, not unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} is missing") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} was not unpickled: it holds more than tensors and plain containers, and might run "
                         "anything; give a checkpoint of this project or a plain state dict") from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not a whole checkpoint ({str(e).splitlines()[0][:100]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def describe(model: nn.Module, layout: str, classes: list[str], stage: str) -> dict:
    """The part of a checkpoint from which a model can be built again."""
    return {"stage": stage, "config": asdict(model.encoder.config), "layout": layout, "classes": classes,
            "model": model.state_dict()}


def build_detector(config: Config, layout: str, num_classes: int) -> Detector:
    detector = Detector(config, num_classes)
    return released_layout(detector) if layout == "released" else detector


def load_detector(path: str | Path) -> tuple[Detector, dict]:
    """A detector from a checkpoint of ours or of the authors, in eval mode, with {"classes", "layout", "config"}."""
    content = load_checkpoint(path)
    if is_released(content):
        detector = load_released(content)
        num_classes = detector.class_head.out_features
        names = (content.get("meta") or {}).get("CLASSES") or [f"class {i}" for i in range(num_classes)]
        return detector, {"classes": list(names), "layout": "released", "config": asdict(detector.encoder.config)}
    if content.get("stage") != "finetune":
        raise InputError(f"{path} holds no detector" + (f" but a {content['stage']} model" if "stage" in content else ""))
    detector = build_detector(Config(**content["config"]), content["layout"], len(content["classes"]))
    detector.load_state_dict(content["model"])
    return detector.eval(), content


def variant_of(config: dict) -> str:
    """The variant's name, or the sizes that tell a changed one apart."""
    sizes = {k: config[k] for k in ("dim", "mlp_dim", "heads", "tokenizer_dim", "layers")}
    names = [n for n, c in VARIANTS.items() if all(asdict(c)[k] == v for k, v in sizes.items())]
    return names[0] if names else str(sizes)


def load_pretrained(model: Detector, layout: str, path: str | Path) -> str:
    """Copies a checkpoint's weights into a fresh detector: the encoder strictly; the rest where a detector of as many
    queries, or classes, has it. Returns a line that says what was loaded and what starts fresh.

    Raises:
        InputError: if its encoder is of another variant or layout.
    """
    content = load_checkpoint(path)
    if is_released(content):
        theirs, info = load_detector(path)
        content = {**info, "model": theirs.state_dict(), "stage": "finetune"}
    if not {"model", "config", "layout", "stage"} <= content.keys():
        raise InputError(f"{path} is neither a checkpoint of this project nor one of the released detectors")
    theirs, ours = variant_of(content["config"]), variant_of(asdict(model.encoder.config))
    if (theirs, content["layout"]) != (ours, layout):
        raise InputError(f"{path} holds the variant {theirs} in the {content['layout']} layout, not {ours} in the {layout} "
                         "layout: change --variant or --layout")
    state = content["model"]
    model.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    own = model.state_dict()
    taken = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(taken, strict=False)
    fresh = sorted({k.split(".")[0] for k in own if k not in taken})
    loaded = sorted({k.split(".")[0] for k in taken} - set(fresh))
    return f"loaded from {path}: {', '.join(loaded)}; starting fresh: {', '.join(fresh) or 'nothing'}"


# ----------------------------------------------------------------------------------------------------- the run's folder

class Run:
    """A run's folder: args.json, log.jsonl, curves.png, last.pt, best.pt and what the stage adds."""

    def __init__(self, args: argparse.Namespace, stage: str):
        data = args.data if args.data in ("shapes", "coco") else Path(args.data).resolve().name
        self.folder = args.out or Path("runs") / f"{stage}-{args.variant}-{data}"
        self.last, self.started = self.folder / "last.pt", time.time()
        if (self.folder / "args.json").exists() and not (args.resume or args.overwrite):
            raise InputError(f"{self.folder} already holds a run: --resume goes on with it, --overwrite replaces it, "
                             "--out names another folder")
        if args.resume and not self.last.exists():
            raise InputError(f"nothing to resume: {self.last} is missing")

    def open(self, args: argparse.Namespace) -> None:
        """Creates the folder. Called only when the input has been found good, so that bad input leaves nothing behind."""
        if rank():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                for name in ("log.jsonl", "last.pt", "best.pt", "curves.png", "detections.png"):
                    (self.folder / name).unlink(missing_ok=True)
            (self.folder / "args.json").write_text(json.dumps(vars(args), indent=1, default=str))
        except OSError as e:
            raise InputError(f"cannot write into {self.folder}: {e.strerror}") from None

    def read_log(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, which a resumed run will log again."""
        if not rank():
            lines = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
            (self.folder / "log.jsonl").write_text("".join(lines))

    def log(self, **entry) -> None:
        if not rank():
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}) + "\n")

    def curves(self, scores: tuple[str, ...]) -> None:
        """Draws the log: losses and learning rate on the left, the validation scores named on the right."""
        if rank():
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        log = self.read_log()
        losses, evaluations = [e for e in log if "loss" in e], [e for e in log if scores[0] in e]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        for key in [k for k in (losses[0] if losses else {}) if k.startswith("loss")]:
            left.plot([e["step"] for e in losses], [e[key] for e in losses], label=key, lw=2 if key == "loss" else 1)
        left.set(xlabel="step", yscale="log", title="training loss")
        for key in scores:
            right.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], "o-", ms=3, label=key)
        right.set(xlabel="step", ylim=(0, 1), title="validation")
        for axis in (left, right):
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=90)
        plt.close(figure)


class Mean:
    """Means of tensors that stay on their device until they are asked for, so that no step waits for the GPU."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, values: dict[str, Tensor]) -> None:
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + v.detach()
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means over all processes' sums (losses are shares of the total batch's), and a fresh start."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in self.sums.values()])
        if world_size() > 1:
            dist.all_reduce(sums)
        means = dict(zip(self.sums, (sums / self.count).tolist()))
        self.__init__()
        return means
