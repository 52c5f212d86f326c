"""Where the time of a training step goes: finetune.py --benchmark and pretrain.py --benchmark; and what the
paper's experiments cost, by arithmetic: python benchmark.py.

The stages hand over their own training step and loader, so that what is measured is what trains. Nothing is
written; the weights that the steps change are thrown away.
"""
import argparse
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from engine import no_mark, run_script
from model import VARIANTS, Classifier, Detector
from report import markdown


class Timer:
    """Adds up the seconds between calls by the name of what has just been done. Each waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def endless(loader: Iterable) -> Iterator:
    while True:
        yield from loader


def rate(step: Callable[[], int], device: torch.device, seconds: float) -> float:
    """Images per second of calls of `step`, which returns how many it took; at least two calls."""
    synchronize(device)
    start, images, calls = time.perf_counter(), 0, 0
    while calls < 2 or time.perf_counter() - start < seconds:
        images, calls = images + step(), calls + 1
    synchronize(device)
    return images / (time.perf_counter() - start)


def images_in(batch: list) -> int:
    """Of pretrain.py's [images, labels] or finetune.py's [(images, mask, targets), ...]."""
    return len(batch[0]) if torch.is_tensor(batch[0]) else sum(len(part[0]) for part in batch)


def benchmark(step: Callable[[list, Callable[[str], None]], object], loader: DataLoader, args,
              device: torch.device) -> str:
    """Measures the loader alone, training, and the parts of its steps, each for --benchmark seconds.

    Args:
        step: step(batch, mark) trains on a batch of the loader and calls mark(part) after each of its parts.
    Returns:
        a table of the parts' milliseconds and shares, and all figures as one line of JSON.
    """
    batches, seconds = endless(loader), args.benchmark

    def train_on_next() -> int:
        step(batch := next(batches), no_mark)
        return images_in(batch)
    for _ in range(1 + (loader.prefetch_factor or 0) * args.workers):
        next(batches)  # what was loaded while nobody waited for it is not counted
    result = {"loader_images_per_second": rate(lambda: images_in(next(batches)), device, seconds)}
    for _ in range(2):  # compiles, fills the allocator
        train_on_next()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result["training_images_per_second"] = rate(train_on_next, device, seconds)
    timer, steps, start = Timer(device), 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - start < seconds:
        batch = next(batches)
        timer("waiting for data")
        step(batch, timer)
        steps += 1
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss / 2**20
    result |= {"seconds_per_step": {k: v / steps for k, v in timer.seconds.items()}, "peak_gib": peak,
               "hours": len(loader.dataset) * args.epochs / result["training_images_per_second"] / 3600,
               "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
               "torch": torch.__version__}
    result |= {k: getattr(args, k) for k in ("variant", "image_size", "batch_size", "micro_batch", "workers",
                                             "amp", "epochs")}
    return page(result)


def page(result: dict) -> str:
    whole = sum(result["seconds_per_step"].values())
    rows = [(part, (1000 * s, 100 * s / whole)) for part, s in result["seconds_per_step"].items()]
    return "\n".join((
        f"{result['variant']}, {result['image_size']} pixels, batch {result['batch_size']} in micro-batches "
        f"of {result['micro_batch']}, --amp {result['amp']}, {result['device']}, torch {result['torch']}",
        markdown("part of a step", ("ms", "%"), rows),
        f"training: {result['training_images_per_second']:.2f} images/s; the loader alone: "
        f"{result['loader_images_per_second']:.1f} images/s from {result['workers'] or 1} process(es); peak "
        f"memory {result['peak_gib']:.2f} GiB; {result['epochs']} epochs of this set would take "
        f"{result['hours']:.2f} hours",
        json.dumps(result)))


# ---------------------------------------------------------------------------------------- cost by arithmetic

A100_FLOPS, UTILISATION = 312e12, 0.25  # its bfloat16 peak, and the part of it that we assume is reached
EXPERIMENTS = {  # kind of model, (height, width), training images, epochs (4.1, 4.2, A.3)
    "ImageNet-1k": (Classifier, (224, 224), 1_281_167, 300),
    "ImageNet-21k-P": (Classifier, (224, 224), 11_060_223, 80),
    "COCO": (Detector, (800, 1333), 118_287, 50),
    "Cityscapes, a seed": (Detector, (800, 1600), 2_975, 50)}


def forward_flops(kind: type[Classifier] | type[Detector], variant: str, size: tuple[int, int]) -> int:
    """Of one image, two per multiplication and addition: matrix products and convolutions, without the
    sampling, whose limit is the memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:  # shapes only: nothing is computed
        model = kind(VARIANTS[variant], 1000 if kind is Classifier else 80)
        model(torch.zeros(1, 3, *size))
    return counter.get_total_flops()


def activation_bytes(variant: str, checkpointing: bool, size: tuple[int, int] = (800, 1333)) -> int:
    """What a detector's forward pass on one image keeps for the backward pass, in bfloat16 by the rules of
    the CPU, whose dropout masks take two bytes an element (on GPUs one)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # views of one memory count once
        return tensor
    with FakeTensorMode():
        model = Detector(replace(VARIANTS[variant], dropout=0.1), 80).train()
        model.encoder.checkpointing = checkpointing
        keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with keep, torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 3, *size))
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return sum(t.untyped_storage().nbytes() for t in kept.values())


def cost_table() -> str:
    rows = []
    for name, (kind, size, images, epochs) in EXPERIMENTS.items():
        for variant in ("lite", "small", "base"):
            flops = forward_flops(kind, variant, size)
            hours = 3 * flops * images * epochs / (A100_FLOPS * UTILISATION) / 3600
            rows.append((f"{name}, {variant}", (f"{size[0]} x {size[1]}", f"{flops / 1e9:.0f}",
                                                f"{images:,}", str(epochs), f"{hours:.1f}")))
    header = ("pixels", "GFLOP per forward pass", "images", "epochs", "A100 hours")
    return markdown("experiment", header, rows)


def memory_table() -> str:
    rows = [(variant, tuple(f"{activation_bytes(variant, flag) / 1e9:.2f}" for flag in (False, True)))
            for variant in ("lite", "small", "base")]
    return markdown("GB", ("kept for the backward pass", "with --activation-checkpointing"), rows)


def main() -> None:
    argparse.ArgumentParser(description="Prints what the paper's experiments cost in FLOP and A100 hours, "
                            "and what training keeps in memory, by arithmetic.").parse_args()
    print(f"A100 hours = 3 (forward and backward) x FLOP x images x epochs / ({UTILISATION:.0%} of "
          f"{A100_FLOPS / 1e12:.0f} TFLOP/s)\n{cost_table()}\n\n"
          f"activations of one image of 800 x 1333 pixels, bfloat16, dropout 0.1\n{memory_table()}")


if __name__ == "__main__":
    run_script(main)
