"""The folder that a run leaves behind: arguments, log, curves, checkpoints, scores; and what ends a run
before its time.
"""
import argparse
import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import plain_flags, save_checkpoint
from engine import Terminated, any_process, rank, world_size
from model import InputError


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
                         "stopped by SIGTERM before the first checkpoint: start it again"
                         + (" with --resume" if (self.folder / "args.json").exists() else ""))

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what takes long and changes nothing: SIGTERM ends it at once. (Else it waits for the end of
        a step, see `after_step`.)"""
        self.may_stop = True
        if self.terminated:
            self.stop()
        yield
        self.may_stop = False

    def within_step(self, save: Callable[[], None]) -> Callable[[str], None]:
        """The `mark` of a training step: SIGTERM ends it after any of its parts as if it had not begun, for
        no weight changes before the last part. (Several processes have to agree first: `after_step`.)"""
        def mark(part: str) -> None:
            if self.terminated and part != "optimiser" and world_size() == 1:
                save()
                self.stop()
        return mark

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
                             "detections.png", "predictions.png", "evaluation/metrics.json",
                             "evaluation/corruptions.json"):
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

    def evaluated(self, bar: tqdm, epoch: int, step: int, scores: dict[str, float],
                  drawn: tuple[str, ...]) -> None:
        """Logs an evaluation, draws the curves anew, those of the scores that are `drawn`, and prints it."""
        self.log(epoch=epoch, step=step, **scores)
        self.curves(drawn)
        if not rank():  # -1: of a size that no object has
            shown = ", ".join(f"{k} {100 * v:.1f}" for k, v in scores.items() if v >= 0)
            bar.write(f"epoch {epoch}: {shown}")

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


def progress_bar(what: str, images: int, done: int) -> tqdm:
    """Of the first process, over the images of a run, with their rate and the time left."""
    return tqdm(total=images, initial=done, unit="img", desc=what, smoothing=0.05, mininterval=1,
                disable=rank() > 0)


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


def summary(model: nn.Module, args: argparse.Namespace, measured: dict) -> dict:
    """The content of a run's metrics.json: what was trained, how, and what came out."""
    flags = {k: plain_flags(args).get(k) for k in ("variant", "structure", "adaptor", "adaptor_per_layer",
                                                   "layout", "epochs", "seed", "pretrained")}
    return {**flags, "parameters": sum(p.numel() for p in model.parameters()), **measured}
