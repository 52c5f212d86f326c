"""The parts that the two training scripts share: flags, processes, batches, checkpoints, the run folder.

A reader of the paper may skip this file. It imports nothing of the project.
"""
import argparse
import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# -------------------------------------------------------------------------------- errors and the script

class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line: what, where, the remedy."""


class Terminated(BaseException):
    """SIGTERM or Ctrl-C came while the run waited for data or evaluated. (Not an Exception, because code
    that reads damaged files catches those.)"""


def one_line(e: Exception) -> str:
    """The reason of an error in one line, cut to 200 characters."""
    text = f"the key {e} is missing" if isinstance(e, KeyError) else str(e)
    return " ".join(text.split())[:200]


def note(text: str) -> None:
    """Prints something that is no error but should be known. The first process does it."""
    if rank() == 0:
        tqdm.write(f"note: {text}")


def run_script(main: Callable, **options) -> None:
    """Runs main(**options). Prints a user's mistake as one line, not as a traceback; exit code 2."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook names one that only works inside of it
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # closed, as by `>&-`
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for terminals that know ASCII only
    code, text = 2, ""
    try:
        try:
            main(**options)
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here and not at the exit
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        code, text = 141, None  # what a shell reports for it, and no word
    except ValueError as e:
        # deform_attn.py knows no InputError. It names this variable when it cannot obey it.
        if not isinstance(e, InputError) and "FPDETR_DEFORM_ATTN" not in str(e):
            raise
        # An error in a data loading process arrives with that process's traceback in front.
        text = f"error: {str(e).splitlines()[-1].rpartition('InputError: ')[2]}"
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(e):
            text = ("error: the memory is full: give a smaller --micro-batch (the batch stays the same, "
                    "in more parts); in an evaluation, a smaller --batch-size")
        elif "DataLoader worker" in str(e) and ("killed" in str(e) or "exited" in str(e)):
            text = (f"error: {str(e).splitlines()[0]}: if memory was short, give fewer --workers; "
                    f"--resume goes on from the last checkpoint")
        elif isinstance(e, dist.DistError) or "gloo" in str(e):  # gloo raises plain RuntimeErrors
            text = (f"error: process {rank()} lost contact with another one, which printed its reason; "
                    f"--resume goes on")
        else:
            raise
    except FileNotFoundError as e:
        text = f"error: {e.filename} is missing"
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        text = (f"error: cannot read or write {e.filename or 'a file of the run'} ({e.strerror}); a "
                f"training run goes on with --resume")
    except KeyboardInterrupt:
        code, text = 130, "interrupted; a training run goes on with --resume"
    finally:
        for number, handler in ((signal.SIGTERM, signal.SIG_DFL),
                                (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
        if text != "" or sys.exc_info()[0]:
            kill_loading_processes()  # they ignore SIGTERM, so the exit would wait for them for ever
        if dist.is_initialized():
            dist.destroy_process_group()
    if text:
        tqdm.write(text, file=sys.stderr)  # below a progress bar, not inside it
    if text != "":
        sys.exit(code)


# ------------------------------------------------------------------------------------------------ flags

class Help(argparse.HelpFormatter):
    """Shows the default of each flag, unless its help text does, and keeps the line breaks of texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help + ("" if hidden or "default" in action.help else " (default: %(default)s)")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def number(convert: type, least: float, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: numbers in [least, below)."""
    def parse(text: str) -> float:
        if not least <= (value := convert(text)) < below:
            allowed = f"{least} or more" if below == math.inf else f"in [{least}, {below})"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value
    parse.__name__ = convert.__name__  # argparse shows it
    return parse


positive, natural = number(int, 1), number(int, 0)
seed_number = number(int, 0, 2**32)
fraction, rate = number(float, 0, 1), number(float, 0)

# Flags of the machine and the run folder. They may change with --resume. All others are the recipe.
# (--epochs may change too, but not below the epochs begun.)
MACHINE_FLAGS = {"data_root", "workers", "device", "micro_batch", "activation_checkpointing", "compile",
                 "eval_every", "out", "resume", "overwrite"}


def add_training_flags(parser: argparse.ArgumentParser, variants: dict) -> argparse._ArgumentGroup:
    """Adds the flags that both stages have, except the numbers of their recipes. Returns the group of
    machine flags."""
    parser.add_argument("--variant", choices=variants, default="tiny",
                        help="size of the model, Table 1 (tiny is ours)")
    parser.add_argument("--structure", choices=("encoder-only", "encoder-decoder"),
                        default="encoder-only",
                        help="FP-DETR, or FP-EncDec with decoder layers at the end (A.2, Table 7)")
    parser.add_argument("--layout", choices=("paper", "released"), default="paper",
                        help="modules as in the paper's text, or as in the authors' released code "
                             "(docs/differences.md)")
    parser.add_argument("--seed", type=seed_number, default=0,
                        help="of weights, data order, augmentation and dropout")
    parser.add_argument("--limit-train", type=positive, help="use the first N training images only "
                        "(pre-training: N images, taken in turn from the classes)")
    parser.add_argument("--limit-val", type=positive, help="evaluate on the first N images only")
    machine = parser.add_argument_group("machine and run folder (these may change with --resume)")
    machine.add_argument("--micro-batch", type=positive, default=2,
                         help="images that one GPU holds at once; a batch is accumulated from as many "
                              "as needed. Larger is faster and needs more memory. The gradient is the "
                              "same, except for the random numbers of dropout")
    machine.add_argument("--activation-checkpointing", action="store_true",
                         help="keep only the layers' inputs and compute the rest again in the backward "
                              "pass: less memory, more time, the same gradient")
    machine.add_argument("--eval-every", type=positive, default=1, help="epochs between evaluations")
    machine.add_argument("--out", help="folder of this run (default: runs/STAGE-VARIANT-DATA)")
    machine.add_argument("--resume", action="store_true",
                         help="go on exactly from the folder's last.pt, or start if there is none yet")
    machine.add_argument("--overwrite", action="store_true",
                         help="replace the run in the folder, unless --resume is given")
    add_device_flags(parser, machine)
    return machine


def add_device_flags(parser: argparse.ArgumentParser, machine: argparse._ActionsContainer) -> None:
    """The flags that training and evaluation have: where the data are and which device computes."""
    machine.add_argument("--data-root",
                         help="folder of the sets that --data calls by name (default: data/NAME)")
    machine.add_argument("--workers", type=natural, default=min(8, os.cpu_count() or 1),
                         help="data loading processes per GPU")
    machine.add_argument("--device", choices=("cpu", "cuda"),
                         default="cuda" if torch.cuda.is_available() else "cpu",
                         help="where to compute (default: the GPU if there is one)")
    parser.add_argument("--amp", choices=("bf16", "off"),
                        help="mixed precision (default: bf16 on GPUs that have it, else off)")


def as_flags(recipe: dict) -> str:
    """A recipe as it would be typed, for help texts."""
    return ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in recipe.items())


# -------------------------------------------------------------------------------- devices and processes

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(args: argparse.Namespace) -> torch.device:
    """Sets up the device, torchrun's processes, mixed precision and the seed, as the flags say."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU: use --device cpu")
    device = torch.device(args.device)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        try:  # gloo serves tensors on the CPU, so that exchanging a flag does not wait for the GPU
            local_rank = int(os.environ["LOCAL_RANK"])
            if os.environ.get("RANK") == "0":
                note(f"waiting for all {os.environ['WORLD_SIZE']} processes (WORLD_SIZE)")
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (KeyError, ValueError) as e:
            raise InputError(f"WORLD_SIZE is set, but the variables of torchrun are wrong "
                             f"({one_line(e)}): start with torchrun, or unset WORLD_SIZE") from None
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise InputError(f"there are more processes than the {torch.cuda.device_count()} GPUs: "
                                 f"lower --nproc_per_node, or give --device cpu")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
    # Emulated on older GPUs, it is slower than float32.
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.amp = args.amp or ("bf16" if has_bf16 else "off")
    torch.manual_seed(args.seed)
    return device


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout and stochastic depth for one step of this process. So a run can be resumed after any
    step without a saved random state. (Data order and augmentation have seeds of their own.)"""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1)[0]))


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def broadcast_weights(model: nn.Module) -> None:
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, in one message. Losses are divided by a number of the
    total batch, so the sum is the gradient of the total batch, even if a process had no image."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = g.view_as(p)


def sum_over_processes(value: float | Tensor, device: torch.device) -> Tensor:
    """The sum of a number or float tensor over all processes, on `device`. The CPU does not wait."""
    total = torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True, copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gather(items: list) -> list:
    """The lists of all processes, one after another."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


# --------------------------------------------------------------------------------------------- batches

class BatchSampler:
    """Shuffled batches of indices. Each process gets its share of a batch. The total batches depend on
    the seed and the epoch only, not on the number of processes. The last one of an epoch may be smaller.
    `skip`: how many batches of the epoch a resumed run has seen already."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.share, self.batches()[self.skip:])

    def batches(self) -> tuple[Tensor, ...]:
        """The total batches of the epoch."""
        return self.order().split(self.batch_size)

    def share(self, batch: Tensor) -> list[int]:
        """The indices of a total batch that this process loads."""
        return batch[rank()::world_size()].tolist()

    def order(self) -> Tensor:
        """(length,) shuffled indices."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return torch.randperm(self.length, generator=generator)

    def images_after(self, step: int) -> int:
        """How many images all processes have seen after `step` steps of the run."""
        epochs, steps = divmod(step, len(self))
        return epochs * self.length + min(steps * self.batch_size, self.length)


# Tensors pass from process to process by the name of a file in /dev/shm. By torch's default, each tensor
# of a batch keeps a file open; a batch of 256 images then needs more than the usual limit of 1,024.
torch.multiprocessing.set_sharing_strategy("file_system")


def make_loader(dataset: Dataset, collate: Callable, args: argparse.Namespace, device: torch.device,
                **batches) -> DataLoader:
    """Loads batches in --workers processes. collate: makes a batch of a list of items. batches: the
    arguments batch_sampler or batch_size of a DataLoader."""
    return DataLoader(dataset, collate_fn=partial(collate_and_share, collate), num_workers=args.workers,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals, **batches)


def collate_and_share(collate: Callable, samples: list) -> object:
    """collate(samples), with all tensors moved to shared memory in a loading process. Torch would do it
    in a thread, where an error makes the main process wait for ever."""
    try:
        batch = collate(samples)
        if get_worker_info() is not None:
            to_shared_memory(batch)
    except RuntimeError as e:
        if "shared memory" not in str(e) and "shm" not in str(e):
            raise
        raise InputError(f"the shared memory of the data loading processes is full ({one_line(e)}): "
                         f"give fewer --workers or more memory (docker run --shm-size=8g)") from None
    return batch


def to_shared_memory(batch: object) -> None:
    """Moves the tensors in nested lists, tuples and dicts to shared memory."""
    if isinstance(batch, Tensor):
        if batch.numel():
            batch.share_memory_()
    elif isinstance(batch, (list, tuple, dict)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            to_shared_memory(part)


def ignore_signals(_: int) -> None:
    """For data loading processes. SIGTERM and Ctrl-C reach all processes of a run; these must live until
    the step has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def kill_loading_processes() -> None:
    """Ends them at once. Waiting would take as long as reading their images."""
    if hasattr(signal, "SIGCHLD"):  # by which torch raises an error when one of them ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def read_batches(loader: DataLoader, run: "Run") -> Iterator:
    """The loader's batches. If a process meets a broken image, or gets a signal, all processes raise its
    InputError, or Terminated, before the same step, so that they save and stop together."""
    batches = iter(loader)
    while True:
        batch, error = None, None
        try:
            with run.interruptible():
                batch = next(batches, None)
        except (InputError, Terminated) as e:
            error = e
        if any_process(error is not None):
            kill_loading_processes()
            reasons = [text for text in gather([] if error is None else [str(error)]) if text]
            raise InputError(reasons[0]) if reasons else Terminated
        if batch is None:
            return
        yield batch


def not_finite(train: Dataset, sampler: BatchSampler, step: int) -> InputError:
    """The error of a step, counted from 0, with NaN or infinity in its gradient."""
    batch = sampler.batches()[step % len(sampler)].tolist()
    names = list(dict.fromkeys(map(train.name_of, batch)))  # with repeated augmentation, each once
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return InputError(f"the gradient of step {step + 1} is not finite, at the images {shown}; no weight "
                      f"was changed and the last checkpoint stays: start a new run with a lower --lr")


def mean_over_steps(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means of what a train_step returns: each process's share of the losses. Shares are added up. They
    have stayed on their device, so the CPU waits for the GPU here, and not in each step."""
    sums = torch.stack([sum(step[k] for step in steps) for k in steps[0]])
    return dict(zip(steps[0], (sum_over_processes(sums, sums.device) / len(steps)).tolist()))


def progress_bar(what: str, images: int, done: int) -> tqdm:
    """A bar over the images of a run, with their rate and the time left. The first process shows it."""
    return tqdm(total=images, initial=done, unit="img", desc=what, smoothing=0.05, mininterval=1,
                disable=rank() > 0)


def check_epochs(args: argparse.Namespace, state: dict, steps: int) -> None:
    """Raises InputError if a resumed run has taken more steps than --epochs allows. steps: per epoch."""
    done, planned = math.ceil(state["step"] / steps), state.get("args", {}).get("epochs", args.epochs)
    if done > args.epochs or done == args.epochs < planned:  # it may not have been evaluated there
        least = min(done + 1, planned)
        raise InputError(f"the run to resume is in epoch {done} of {planned}: give --epochs {least} or "
                         f"more")
    if args.epochs != planned and args.schedule != "step":
        note(f"--schedule {args.schedule} depends on --epochs: with {args.epochs} instead of {planned}, "
             f"the learning rate jumps")


def first_line(args: argparse.Namespace, model: nn.Module, train: Dataset, steps: int,
               device: torch.device, operator: str) -> None:
    """Prints what will be trained on what. steps: per epoch. operator: the path of the attention."""
    if rank() == 0:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        precision = "bfloat16" if args.amp == "bf16" else "float32"
        print(f"{args.variant}: {parameters:.1f}M parameters, {len(train.classes)} classes, "
              f"{train.describe()}, {steps:,} steps per epoch, {steps * args.epochs:,} in all, "
              f"{world_size()} x {device.type}, {precision}, attention by {operator}")


def check_classes(train: Dataset, val: Dataset) -> None:
    """Raises InputError unless both sets have the same classes in the same order."""
    if train.classes != val.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(val.classes)))[:200] or "in another order"
        raise InputError(f"{train.name} and {val.name} have different classes: {differ}")


# ------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path: Path, content: dict) -> None:
    """Writes to a temporary name and renames, so that a file of this name is always whole. Only the
    first process writes."""
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
        raise InputError(f"cannot write {path} ({reason}): an older file is untouched; after making "
                         f"room, --resume goes on") from None


def load_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file, on the CPU: tensors and plain containers. Any other pickle could
    run code and is refused. InputError if the file is absent, broken or refused."""
    try:
        with warnings.catch_warnings():  # torch warns of pickles before it refuses them
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name the last.pt or best.pt in it") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path} was not unpickled: it is no checkpoint, or it holds more than tensors "
                         f"and plain containers and might run anything; give a checkpoint of this "
                         f"project or a plain state dict") from None
    except Exception as e:  # torch's readers raise a dozen kinds of error on other files
        raise InputError(f"{path} is not a whole checkpoint ({one_line(e)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def describe_run(model: nn.Module, args: argparse.Namespace, stage: str, classes: list[str],
                 images: int, **content: str) -> dict:
    """The part of a checkpoint that says which run made it. A model can be built from it, and --resume
    compares it. images: number of training images. content: digests of the sets."""
    return {"stage": stage, "model_class": getattr(model, "made_by", type(model).__name__),
            "config": asdict(model.encoder.config), "layout": args.layout, "classes": classes,
            "images": images, "content": content, "args": {**vars(args)}}


def check_resumed(saved: dict, now: dict, path: Path) -> None:
    """Raises InputError in one line unless a checkpoint was made by the run that `now` describes: same
    stage, model, classes, sets and recipe. Machine flags and epochs may differ."""
    def identity(description: dict) -> dict:
        recipe = {f"--{k.replace('_', '-')}": v for k, v in description.get("args", {}).items()
                  if k not in MACHINE_FLAGS | {"epochs"}}
        return {**{k: description.get(k) for k in ("stage", "model_class", "classes", "images")},
                **description.get("content", {}), **description.get("config", {}), **recipe}
    before, today = identity(saved), identity(now)
    changed = [f"{k} {before.get(k)!s:.60} (now {today.get(k)!s:.60})" for k in {**before, **today}
               if before.get(k) != today.get(k)]
    if "optimizer" not in saved:
        raise InputError(f"{path} cannot be resumed: it is no last.pt, and lacks the optimizer's state")
    if changed:
        raise InputError(f"{path} cannot be resumed, it was made with {', '.join(changed)}: give the "
                         f"same flags and data, or another --out")


ENCODER_SIZES = ("dim", "mlp_dim", "heads", "tokenizer_dim", "layers", "entry_layer", "points",
                 "structure")


def copy_weights(model: nn.Module, checkpoint: dict, description: dict, path: str | Path) -> str:
    """Copies a checkpoint's weights into a fresh model. Returns a line that names the parts it loaded.

    The encoder is loaded strictly. From a checkpoint of the same stage, the other parts are loaded too
    where their shapes are equal, and the class head if it is for the same classes in the same order.
    InputError if it is no checkpoint, or if its encoder has another size or layout. description: of
    `describe_run`.
    """
    if not all(isinstance(checkpoint.get(k), dict) for k in ("model", "config")):
        raise InputError(f"{path} is neither a checkpoint of this project nor one of the authors'")
    ours, theirs = ({**c["config"], "layout": c.get("layout")} for c in (description, checkpoint))
    different = [f"{k} {theirs.get(k)} (here {ours[k]})" for k in (*ENCODER_SIZES, "layout")
                 if theirs.get(k) != ours[k]]
    if different:
        raise InputError(f"{path} holds another encoder: {', '.join(different)}: change --variant, "
                         f"--structure or --layout")
    classes = description["classes"]
    unnamed = [f"class {i}" for i in range(len(classes))]  # in some authors' files
    same_classes = checkpoint.get("classes") in (classes, unnamed)
    loaded, fresh = [], []
    for name, part in model.named_children():
        state = {k.removeprefix(name + "."): v for k, v in checkpoint["model"].items()
                 if k.startswith(name + ".")}
        shapes = {k: v.shape for k, v in part.state_dict().items()}
        fits = shapes == {k: v.shape for k, v in state.items()}
        fits = fits and (name != "class_head" or same_classes)
        if name == "encoder" or checkpoint.get("stage") == description["stage"] and fits:
            try:
                part.load_state_dict(state)
            except RuntimeError as e:
                raise InputError(f"{path} does not fit: {one_line(e)}") from None
            loaded.append(name)
        else:
            fresh.append(name)
    return f"loaded from {path}: {', '.join(loaded)}; starting fresh: {', '.join(fresh) or 'nothing'}"


# -------------------------------------------------------------------------------------- the run folder

class Run:
    """The folder that a run leaves: args.json, log.jsonl, training.png, curves.png, last.pt, best.pt,
    metrics.json and the stage's picture."""
    save_every = 600  # seconds between checkpoints inside an epoch

    def __init__(self, args: argparse.Namespace, stage: str):
        data = args.data if "/" not in args.data else Path(args.data).resolve().name
        self.stage = stage
        self.folder = Path(args.out or f"runs/{stage}-{args.variant}-{data}")
        self.last, self.arguments = self.folder / "last.pt", self.folder / "args.json"
        self.found = self.last.stat().st_mtime if self.last.exists() else None
        self.resumed = args.resume and self.last.exists()
        if any_process(self.resumed) != self.resumed:
            raise InputError(f"not all processes see {self.last}: name a folder that they share by "
                             f"--out")
        self.state = {"epoch": 0, "step": 0, "best": -math.inf, "scores": {}}
        if self.resumed:
            self.state = load_checkpoint(self.last)
        elif args.resume and any((self.folder / name).exists() for name in ("best.pt", "metrics.json")):
            raise InputError(f"{self.last} is missing from a run that has results: move it back, or "
                             f"name another --out")
        elif self.holds_a_run() and not (args.resume or args.overwrite):
            raise InputError(f"{self.folder} already holds a run: --resume goes on with it, --overwrite "
                             f"replaces it, --out names another folder")
        self.started = self.saved_at = time.time()
        self.stopped_by, self.waiting = None, False

    def holds_a_run(self) -> bool:
        return any((self.folder / name).exists() for name in ("args.json", "last.pt", "best.pt"))

    def on_signal(self, number: int, _) -> None:
        """Clusters send SIGTERM before they take a machine back, and Ctrl-C sends SIGINT. A step is
        finished first. A second Ctrl-C does not wait."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with suppress(RuntimeError, OSError):  # it may come in the middle of another message
                note("this step is finished and saved; a second Ctrl-C stops at once, without saving")
        self.stopped_by = self.stopped_by or signal.Signals(number).name
        if self.waiting:
            raise Terminated

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In here, a signal raises Terminated at once: while the run waits for data, or evaluates."""
        self.waiting = True
        try:
            if self.stopped_by:
                raise Terminated
            yield
        except Terminated:
            kill_loading_processes()
            raise
        finally:
            self.waiting = False

    def load(self, model: nn.Module, description: dict, checkpoint: dict, path: str | None) -> dict:
        """Loads the weights of the run to resume, or those of the checkpoint from `path`, if given.
        Returns the counters to start from: epoch (finished ones), step, best, scores; of a resumed run
        also its "optimizer". InputError if it is another run, or if the weights do not fit."""
        if self.resumed:
            check_resumed(self.state, description, self.last)
            model.load_state_dict(self.state["model"])
            self.started -= self.state["seconds"]
        elif path:
            message = copy_weights(model, checkpoint, description, path)
            if rank() == 0:
                print(message)
        return self.state

    def open(self, args: argparse.Namespace) -> None:
        """Makes the folder. Called when model and data are good, so bad input leaves nothing behind.
        From now on, a signal lets the step end first."""
        if rank() == 0:
            self.make_folder(args)
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # SIGINT in the background of a script
                signal.signal(number, self.on_signal)

    def make_folder(self, args: argparse.Namespace) -> None:
        """Removes an older run if --overwrite says so, makes the folder and locks it."""
        try:
            if self.holds_a_run() and args.overwrite and not args.resume:
                self.remove(args)
            self.folder.mkdir(parents=True, exist_ok=True)
            mode = "r+" if self.arguments.exists() and args.resume else "x"
            self.locked = open_locked(self.arguments, mode)
            self.locked.truncate()
            json.dump(vars(args), self.locked, indent=1)
            self.locked.flush()
        except OSError as e:  # "File exists": it is a file, or another run has just begun in it
            raise InputError(f"cannot write into {self.folder} ({e.strerror or e}): name another "
                             f"--out") from None
        if args.resume and self.found != (self.last.stat().st_mtime if self.last.exists() else None):
            raise InputError(f"another process has just written {self.last}: run the same command again")
        if args.resume:
            log = self.folder / "log.jsonl"
            if log.exists() and not log.read_bytes().endswith(b"\n"):  # a kill has cut off the last line
                with open(log, "a", encoding="utf-8") as f:
                    f.write("\n")
            self.log(resumed=True, epoch=self.state["epoch"], step=self.state["step"])

    def remove(self, args: argparse.Namespace) -> None:
        """Removes the folder for --overwrite, unless another run is in it or below it, or the data,
        which are read later. (A checkpoint to start from has been read.)"""
        below = [path.parent for path in self.folder.glob("**/args.json") if path != self.arguments]
        if below:
            raise InputError(f"--overwrite would remove {self.folder} and in it the run {below[0]}: "
                             f"name another --out")
        for path in (".", args.data, args.data_root or f"data/{args.data}"):
            if Path(path).resolve().is_relative_to(self.folder.resolve()):
                raise InputError(f"--overwrite would remove {self.folder} and in it {path}, which this "
                                 f"run needs: name another --out")
        open_locked(self.arguments, "a").close()  # an open file cannot be removed on Windows
        folder = self.folder.resolve()  # not a link to it
        shutil.rmtree(folder)
        folder.mkdir()

    def save(self, description: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
             **counters) -> None:
        """Writes last.pt, from which --resume goes on. If a weight is not finite, the older file stays.
        counters: as in `load`."""
        weights = model.state_dict()
        if not torch.stack([w.isfinite().all() for w in weights.values()]).all():
            raise InputError(f"the weights are not finite after step {counters['step']}: start a new "
                             f"run with a lower --lr; the last checkpoint is untouched")
        save_checkpoint(self.last, {**description, "model": weights, "optimizer": optimizer.state_dict(),
                                    "seconds": time.time() - self.started, **counters})
        self.saved_at = time.time()

    def must_save(self) -> bool:
        """Whether the last checkpoint is more than ten minutes old."""
        return time.time() - self.saved_at > self.save_every

    def say_how_to_go_on(self, step: int) -> None:
        if not rank():
            tqdm.write(f"stopped by {self.stopped_by or 'another process'} after step {step}; the same "
                       f"command with --resume goes on from {self.last}", file=sys.stderr)
        if self.stopped_by == "SIGINT":
            sys.exit(130)  # as a shell reports it

    def log(self, **entry) -> None:
        """Adds a line to log.jsonl."""
        if rank():
            return
        entry["seconds"] = time.time() - self.started
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(rounded) + "\n")

    def finish(self, model: nn.Module, args: argparse.Namespace, val: Dataset, scores: dict,
               step: int) -> None:
        """Writes metrics.json (recipe, number of parameters, scores) and prints the scores."""
        if rank():
            return
        recipe = {k: v for k, v in vars(args).items() if k not in MACHINE_FLAGS}
        parameters = sum(p.numel() for p in model.parameters())
        write_json(self.folder / "metrics.json", {
            **recipe, "stage": self.stage, "step": step, "parameters": parameters, "data": val.name,
            "images": len(val), **scores})
        minutes = (time.time() - self.started) / 60
        print(f"{val.name}, {len(val)} images, after {minutes:.1f} minutes: {in_percent(scores)}\n"
              f"everything of this run: {self.folder}")


def open_locked(path: Path, mode: str) -> TextIO:
    """Opens a file and locks it until it is closed or this process ends. So only one process writes into
    its folder. InputError if another one holds the lock. (On Windows, and where the file system has no
    locks, only the mode "x" keeps two new runs apart.)"""
    file = open(path, mode, encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another process is at work in {path.parent}: wait for it, or name another "
                         f"--out") from None
    except OSError:
        pass
    return file


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl. Entries that a resumed run wrote again replace the older ones. A last
    line that a kill has cut off is left out."""
    entries = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "resumed" in entry:  # from a checkpoint that knew of the entries up to this step
            entries = [e for e in entries if e["step"] <= entry["step"]
                       and ("loss" in e or e["epoch"] <= entry["epoch"])]
        else:
            entries.append(entry)
    return entries


def in_percent(scores: dict[str, float]) -> str:
    """Scores in [0, 1] as one line. The metric gives -1 if no object has that size."""
    return ", ".join(f"{k} {100 * v:.1f}" if v >= 0 else f"{k} -" for k, v in scores.items())


def write_json(path: Path, content: dict) -> None:
    """Writes to a temporary name and renames, so that a file of this name is always whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)
