"""What the stages share: flags, errors, devices and processes, batches, the optimiser's groups and
schedules. Checkpoints are in checkpoints.py, a run's folder in run_folder.py.

These are helpers that a training loop calls, not a trainer that calls back: the loops stand in pretrain.py
and finetune.py.
"""
import argparse
import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deform_attn_jit import forced_path
from model import VARIANTS, InputError

# ----------------------------------------------------------------------------------------------------- flags

class Help(argparse.HelpFormatter):
    """Shows the default of each flag that has one, unless its text says it in other words, and leaves texts
    of more than one line as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help + ("" if none or "default" in action.help else " (default: %(default)s)")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


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
                             "needed. Larger is faster and needs more memory; the gradient is the same, but "
                             "for the dropout drawn")
    parser.add_argument("--lr", type=rate, default=1e-4, help="initial learning rate (4.1)")
    parser.add_argument("--weight-decay", type=rate, default=1e-4,
                        help="AdamW's; in fine-tuning on all parameters (released code), in "
                             "pre-training not on norms and biases (DeiT)")
    parser.add_argument("--activation-checkpointing", action="store_true",
                        help="keep only the layers' inputs and compute the rest again for the backward "
                             "pass: less memory, more time, the same gradient")
    parser.add_argument("--benchmark", type=positive, nargs="?", const=15, metavar="SECONDS",
                        help="instead of training, measure the loader, training, and the parts of its "
                             "steps, each for so many seconds (default: 15)")
    parser.add_argument("--eval-every", type=positive, default=1, help="epochs between evaluations")
    parser.add_argument("--limit-train", type=positive,
                        help="use the first N training images only (pre-training: taken in turn from the "
                             "classes)")
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
                        help="short side at test time; all sizes of the training recipe scale with it "
                             "(pre-training: side of the square)")
    parser.add_argument("--limit-val", type=positive, help="evaluate on the first N images only")
    parser.add_argument("--split", choices=("val", "train"), default="val",
                        help="which images to evaluate on")
    parser.add_argument("--seed", type=natural, default=0,
                        help="of weights, data order, augmentation, dropout; in an evaluation of the "
                             "corruptions")
    parser.add_argument("--workers", type=natural, default=min(8, os.cpu_count() or 1),
                        help="data loading processes per GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available()
                        else "cpu",
                        help="where to compute (default: the GPU if there is one)")
    parser.add_argument("--amp", choices=("bf16", "off"),
                        help="mixed precision (default: bf16 on GPUs, off on CPUs)")


def as_flags(recipe: dict) -> str:
    """What a recipe changes, for a help text."""
    return ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in recipe.items())


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


class Terminated(BaseException):
    """SIGTERM came, and what is to be kept has been written. No Exception: it has to pass through the code
    that takes any exception of a decoder for a broken file."""


def run_script(main: Callable, **options) -> None:
    """Runs main(**options). What the user can mend ends in one line and exit code 2 rather than in a
    traceback."""
    def end(code: int, text: str) -> None:
        tqdm.write(text, file=sys.stderr)  # on a line of its own where a progress bar is shown
        sys.exit(code)
    try:
        forced_path()  # a misspelt FPDETR_DEFORM_ATTN shows now rather than in the first forward pass
        main(**options)
    except InputError as e:
        # out of a data loading process it comes with that process's traceback before it
        end(2, f"error: {str(e).splitlines()[-1].rpartition('InputError: ')[2]}")
    except torch.OutOfMemoryError:
        end(2, "error: the GPU's memory is full: give a smaller --micro-batch (the same batch, accumulated "
               "in parts); in an evaluation, a smaller --batch-size")
    except FloatingPointError:  # of --benchmark; a training run names the module and the images
        end(2, "error: the loss is not finite: try a lower --lr")
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):  # it raises plain RuntimeErrors
            raise
        end(2, f"error: process {rank()} lost another one, which says above or below why it ended; then go "
               f"on with --resume")
    except FileNotFoundError as e:
        end(2, f"error: {e.filename} is missing")
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

    def images_after(self, step: int) -> int:
        """How many images all processes have had after so many steps of the run."""
        return step // len(self) * self.length + min(step % len(self) * self.batch_size, self.length)

    def order(self) -> Tensor:
        """(length,) shuffled indices."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return torch.randperm(self.length, generator=generator)


def leave_sigterm_to_the_trainer(_: int) -> None:
    """For data loading processes: SIGTERM, sent to all processes of a run, must not take away the batches of
    a step that is to be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_loader(dataset: Dataset, sampler: BatchSampler, collate: Callable, args: argparse.Namespace,
                    device: torch.device) -> DataLoader:
    """The batches of `sampler`, loaded by --workers processes; `collate` makes one of a list of items."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers,
                      pin_memory=device.type == "cuda", worker_init_fn=leave_sigterm_to_the_trainer)


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
