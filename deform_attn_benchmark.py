"""What `python deform_attn.py --benchmark` measures: the kernel beside the reference, the formulation in
common use on CPUs and, on GPUs, the public CUDA operators that are installed.
"""
import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deform_attn import level_sizes, materialised, ms_deform_attn, ms_deform_attn_reference
from deform_attn_jit import Family, InputError, arch_of, compile_kernel, forced_path, load


def stacked_formulation(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                        sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """The formulation that is in common use on CPUs (Deformable DETR, Hugging Face): softmax and locations
    as tensors, one grid_sample per level, all samples stacked, multiplied and summed. For comparison
    only."""
    locations, weights = materialised(spatial_shapes, reference_points, sampling_offsets, attention_logits)
    B, _, M, C = value.shape
    Q, L, P = weights.shape[1], *weights.shape[3:]
    samples = []
    for level, tokens in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        maps = tokens.permute(0, 2, 3, 1).reshape(B * M, C, *spatial_shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))  # (B * M, C, Q, P)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    output = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)  # (B * M, C, Q)
    return output.view(B, M * C, Q).transpose(1, 2).contiguous()


def public_operators() -> dict:
    """{name: function with the arguments of ms_deform_attn} of the public CUDA operators that are
    installed."""
    def wrap(function):
        def run(value, spatial_shapes, *rest):
            shapes = level_sizes(tuple(spatial_shapes), value.device)  # they want a tensor
            starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
            locations, weights = materialised(spatial_shapes, *rest)
            return function(value, shapes, starts, locations.to(value.dtype), weights, 64)
        return run
    found = {}
    for name, module in (("mmcv", "mmcv.ops.multi_scale_deform_attn"), ("Deformable-DETR", "functions")):
        try:
            classes = vars(__import__(module, fromlist=["_"]))
            cls = classes.get("MultiScaleDeformableAttnFunction") or classes["MSDeformAttnFunction"]
            found[name] = wrap(cls.apply)
        except (ImportError, KeyError):
            pass
    return found


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of run(). On a GPU it is captured as a graph, so that Python's own time does not
    count."""
    if device.type == "cpu":
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: the roof of everything that only moves memory."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x), device, 20)


def benchmark(device: torch.device, repeats: int) -> None:
    """Times every path, side by side, and prints a table. "of bound" is the time in which the tensors alone
    could be read and written once, at the speed of a copy, over the measured time."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    family = Family(arch_of(device), *[torch.float32] * 3, channels=32, heads=8, levels=4, points=4)
    load(family)  # fills the cache
    load.cache_clear()
    for what, function in ("compilation", compile_kernel), ("loading from the cache", load):
        start = time.perf_counter()
        function(family)
        print(f"{what}: {1000 * (time.perf_counter() - start):.1f} ms")
    print(f"{'size':26} {'path':22} {'dtype':9} {'forward':>11} {'of bound':>8} {'backward':>11} "
          f"{'of bound':>8}")
    cases = [("512x512, D 256", 512, 512, 8, 32, 1, 0), ("tiny, 64x64, batch 16", 64, 64, 4, 16, 16, 50)]
    if device.type == "cuda":
        cases = [(f"{name}, {h}x{w}, batch {B}", h, w, heads, C, B, queries)
                 for name, heads, C in (("lite", 8, 32), ("base", 10, 48))
                 for h, w, queries in ((800, 1344, 300), (224, 224, 1)) for B in (1, 2, 4, 8)]
    for name, height, width, M, C, B, extra in cases:
        shapes = [(math.ceil(height / s), math.ceil(width / s)) for s in (8, 16, 32, 64)]
        paths = {"kernel": ms_deform_attn, "reference": ms_deform_attn_reference,
                 "grid_sample and stack": stacked_formulation,
                 **(public_operators() if device.type == "cuda" else {})}
        for path, function in paths.items():
            for dtype in (torch.float32, torch.bfloat16) if path == "kernel" else (torch.float32,):
                try:
                    forward, backward, bounds = time_one(function, device, shapes, M, C, B, extra, dtype,
                                                         repeats)
                except torch.OutOfMemoryError:
                    print(f"{name:26} {path:22} does not fit into memory")
                    continue
                print(f"{name:26} {path:22} {str(dtype)[6:]:9} {forward * 1e6:8.0f} us "
                      f"{bounds[0] / bandwidth / forward:7.0%} {backward * 1e6:9.0f} us "
                      f"{bounds[1] / bandwidth / backward:7.0%}", flush=True)


def time_one(function: Callable, device: torch.device, shapes: list[tuple[int, int]], M: int, C: int, B: int,
             extra: int, dtype: torch.dtype, repeats: int) -> tuple[float, float, tuple[int, int]]:
    """Seconds of the forward and the backward pass, with all image tokens and `extra` tokens as queries, and
    the bytes that the two must move."""
    g = torch.Generator().manual_seed(0)
    S = sum(h * w for h, w in shapes)
    centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
               for h, w in shapes]
    references = torch.cat([*centres, torch.rand(extra, 2, generator=g)])[None, :, None].expand(B, -1, 4, -1)
    Q = S + extra
    value, offsets, logits, grad = (torch.randn(*shape, generator=g).to(device, dtype) for shape in (
        (B, S, M, C), (B, Q, M, 4, 4, 2), (B, Q, M, 4, 4), (B, Q, M * C)))
    inputs = [x.requires_grad_() for x in (value, 3 * offsets.detach(), logits)]
    references = references.to(device).contiguous()

    def run():
        return function(inputs[0], shapes, references, inputs[1], inputs[2])
    with torch.no_grad():
        forward = seconds(run, device, repeats)
    both = seconds(lambda: torch.autograd.grad(run(), inputs, grad), device, repeats)
    moved = [sum(x.nbytes for x in (*inputs, grad, references)),  # the output is as large as its gradient
             sum(x.nbytes for x in (*inputs, *inputs, grad, references))]
    return forward, both - forward, tuple(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times multi-scale deformable attention on this machine.")
    parser.add_argument("--benchmark", action="store_true", required=True, help="the only thing to do here")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available()
                        else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="the median of so many runs is shown")
    args = parser.parse_args()
    try:
        if forced_path() == "reference":
            raise InputError("FPDETR_DEFORM_ATTN=reference leaves nothing to compare: unset it")
        benchmark(torch.device(args.device), args.repeats)
    except (InputError, OSError) as e:
        print(f"error: {' '.join(str(e).split())[:400]}", file=sys.stderr)
        sys.exit(2)
