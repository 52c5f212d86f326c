"""Multi-scale deformable attention (Deformable DETR, Eq. 3), the one operator in which FP-DETR's layers
differ from a ViT's.

Every token looks at a few points around its reference point, on every level of the feature pyramid, instead
of at all tokens. This file holds the operator and the module around it; it knows nothing of images, queries
or detection.

    ms_deform_attn            the operator: a compiled kernel where one can run, else the reference
    ms_deform_attn_reference  the same in grid_sample: slow, short, and the truth for tests of the kernel
    MSDeformAttn              the module: the four projections around the operator (FP-DETR 3.2 and 4.1)

The kernel is deform_attn_kernel.cu, compiled at first use by deform_attn_jit.py. The environment variable
FPDETR_DEFORM_ATTN=reference, cpu or cuda forces a path.

    python deform_attn.py --benchmark    times all of them on this machine
"""
import argparse
import functools
import math
import platform
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_attn_jit import (Family, InputError, arch_of, compile_kernel, forced_path, kernel_serves, launch,
                             load)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, or its float32 copy if its dtype is a 16-bit one. Geometry (locations, boxes) is computed like
    this: bfloat16 has 8 bits of mantissa, which on a map of 168 columns would misplace a sample by a third
    of a pixel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                   sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """Samples `value` at a few points per query and level and sums the samples, weighted by a softmax.

    With M heads of C channels, L levels, P points per level, B images, Q queries and S = sum_l H_l W_l value
    tokens:

        output = sum_lp softmax_lp(logits) * bilinear(value_l, reference + offset / (W_l, H_l))

    where bilinear() follows align_corners=False (a pixel is a unit square, its centre at +0.5) and is zero
    outside the map. Dtypes may be mixed; whatever they are, softmax, locations and sums are computed in
    float32 or wider.

    On GPUs the gradient of `value` is summed by atomics, and so differs in the last bits from run to run;
    under `torch.use_deterministic_algorithms(True)` it is an error, as for torch's own such operators.
    Everything else, and everything on CPUs, is the same in every run.

    Args:
        value: (B, S, M, C) floating point; levels one after another, each row by row.
        spatial_shapes: [(H_l, W_l)] as Python ints, so that no kernel launch has to wait for the GPU to read
            them.
        reference_points: (B, Q, L, 2) in [0, 1] as (x, y) of level l's map, padding included.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y) in pixels of level l.
        attention_logits: (B, Q, M, L, P), before the softmax over all L * P samples.
    Returns:
        (B, Q, M * C) in the dtype of `value`, heads concatenated.
    Raises:
        ValueError: shapes that do not fit together.
        InputError: FPDETR_DEFORM_ATTN asks for a path that is unknown or cannot run here.
    """
    B, S, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], *sampling_offsets.shape[3:5]
    if S != sum(h * w for h, w in spatial_shapes) or L != len(spatial_shapes):
        raise ValueError(f"value has {S} tokens and the offsets {L} levels, which does not fit the shapes "
                         f"{spatial_shapes}")
    expected = (B, Q, L, 2), (B, Q, M, L, P, 2), (B, Q, M, L, P)
    if (reference_points.shape, sampling_offsets.shape, attention_logits.shape) != expected:
        raise ValueError(f"reference points {tuple(reference_points.shape)}, offsets "
                         f"{tuple(sampling_offsets.shape)} and logits {tuple(attention_logits.shape)} "
                         f"should be {expected[0]}, {expected[1]} and {expected[2]} for a value "
                         f"{tuple(value.shape)}")
    inputs = value, reference_points, sampling_offsets, attention_logits
    fits = S < 2**26 and all(x.device == value.device for x in inputs)
    if fits and kernel_serves(value.device, *(x.dtype for x in inputs), C, M, L, P):
        return kernel_forward(*inputs, [n for shape in spatial_shapes for n in shape])
    return ms_deform_attn_reference(value, spatial_shapes, reference_points, sampling_offsets,
                                    attention_logits)


def ms_deform_attn_reference(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                             sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """`ms_deform_attn` by one grid_sample per level; arguments, result and dtypes as there."""
    B, S, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], *sampling_offsets.shape[3:5]
    # (B, Q, M, L, P)
    weights = at_least_float32(attention_logits).flatten(3).softmax(-1).unflatten(-1, (L, P))
    maps = at_least_float32(value).split([h * w for h, w in spatial_shapes], dim=1)
    output = value.new_zeros(B * M, C, Q, dtype=maps[0].dtype)
    for level, (h, w) in enumerate(spatial_shapes):
        maps_l = maps[level].permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        # (B, Q, M, P, 2). Divided by Python numbers: a tensor of them would be a copy to the GPU.
        x, y = sampling_offsets[:, :, :, level].unbind(-1)
        location = (at_least_float32(reference_points)[:, :, None, level, None]
                    + torch.stack([at_least_float32(x) / w, at_least_float32(y) / h], -1))
        # (B * M, Q, P, 2), grid_sample counts from -1 to 1
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps_l, grid.to(maps_l.dtype), mode="bilinear", padding_mode="zeros",
                                align_corners=False)
        weights_l = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P).to(maps_l.dtype)
        output = output + (sampled * weights_l).sum(-1)  # (B * M, C, Q)
    return output.reshape(B, M * C, Q).transpose(1, 2).to(value.dtype)


# ------------------------------------------------------------------------------- the kernel as an operator

@torch.library.custom_op("fpdetr::ms_deform_attn", mutates_args=())
def kernel_forward(value: Tensor, reference: Tensor, offset: Tensor, logit: Tensor,
                   shapes: list[int]) -> Tensor:
    """`ms_deform_attn` by the kernel; shapes are [H_1, W_1, H_2, ...]."""
    output = value.new_empty(*logit.shape[:2], value.shape[2] * value.shape[3])
    if output.numel():
        launch("forward", shapes, value=value, reference=reference, offset=offset, logit=logit,
               output=output)
    return output


@kernel_forward.register_fake
def _(value, reference, offset, logit, shapes):
    return value.new_empty(*logit.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("fpdetr::ms_deform_attn_backward", mutates_args=())
def kernel_backward(grad_output: Tensor, value: Tensor, reference: Tensor, offset: Tensor, logit: Tensor,
                    shapes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, offset and logit."""
    if value.is_cuda and torch.are_deterministic_algorithms_enabled():
        message = "the gradient of ms_deform_attn's value has no deterministic implementation on a GPU"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"{message}: run on the CPU, or give warn_only=True")
        warnings.warn(message, stacklevel=2)
    wide = torch.promote_types(value.dtype, torch.float32)
    if torch.float64 in (offset.dtype, logit.dtype):
        wide = torch.float64
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)  # sums of many terms: in 32 bits
    grad_offset, grad_logit = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (offset, logit))
    if grad_output.numel():
        launch("backward", shapes, value=value, reference=reference, offset=offset, logit=logit,
               grad_output=grad_output, grad_value=grad_value, grad_offset=grad_offset,
               grad_logit=grad_logit)
    return grad_value.to(value.dtype), grad_offset, grad_logit


@kernel_backward.register_fake
def _(grad_output, value, reference, offset, logit, shapes):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, offset, logit))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output):
    value, reference, offset, logit = ctx.saved_tensors  # asked for once: checkpointing gives them once
    grad_value, grad_offset, grad_logit = kernel_backward(grad_output, value, reference, offset, logit,
                                                          ctx.shapes)
    grad_reference = None
    if ctx.needs_input_grad[1]:  # a reference point moves all of its samples, by (W_l, H_l) pixels per unit
        moved = grad_offset.sum((2, 4), dtype=torch.promote_types(reference.dtype, torch.float32))
        levels = zip(moved.unbind(2), ctx.shapes[::2], ctx.shapes[1::2])  # (B, Q, 2), H_l, W_l
        scaled = [torch.stack([g[..., 0] * w, g[..., 1] * h], -1) for g, h, w in levels]
        grad_reference = torch.stack(scaled, 2).to(reference.dtype)
    return grad_value, grad_reference, grad_offset, grad_logit, None


kernel_forward.register_autograd(_backward, setup_context=_setup_context)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections: offsets and weights from the query, values from
    the memory.

    Args:
        dim: D, channels of queries and values; `heads` must divide it.
        heads, levels, points: M, L, P (the paper: 8 or 10 heads, 4 levels, 4 points).
    """

    def __init__(self, dim: int, heads: int, levels: int = 4, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head starts by looking in its own direction, point p at distance p, with equal weights
        (Deformable DETR A.4; the released code does the same)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the square of half-side 1
        distance = torch.arange(1, self.points + 1)
        grid = direction[:, None, None, :] * distance[None, None, :, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor,
                spatial_shapes: list[tuple[int, int]],
                padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (B, Q, D), position already added. reference_points: (B, Q, L, 2), see `ms_deform_attn`.
            memory: (B, S, D), what is sampled from. padding_mask: (B, S), True where a token is padding, or
                None.
        Returns:
            (B, Q, D)
        """
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)  # as if the map ended there
        value = value.unflatten(-1, (self.heads, -1))  # (B, S, M, C)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, reference_points,
                                               *self.sampling(query)))

    def sampling(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, Q, D) -> offsets (B, Q, M, L, P, 2) and attention logits (B, Q, M, L, P)."""
        B, Q, _ = query.shape
        if torch.is_autocast_enabled(query.device.type):  # once, not in each of the two layers
            query = query.to(torch.get_autocast_dtype(query.device.type))
        # 16-bit under autocast, like the logits: an offset of 8 pixels is then still right to 1/32 pixel,
        # since it is added to its reference point in float32.
        offsets = self.sampling_offsets(query).view(B, Q, self.heads, self.levels, self.points, 2)
        return offsets, self.attention_weights(query).view(B, Q, self.heads, self.levels, self.points)


# ----------------------------------------------------------------------------------------------- benchmark

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


def materialised(spatial_shapes: list[tuple[int, int]], reference_points: Tensor, sampling_offsets: Tensor,
                 attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Operators without fusion take these: locations (B, Q, M, L, P, 2) in [0, 1], softmaxed weights."""
    size = level_sizes(tuple(spatial_shapes), reference_points.device)  # (L, 2) as (H, W)
    locations = reference_points[:, :, None, :, None] + sampling_offsets / size.flip(-1)[:, None]
    return locations, attention_logits.flatten(3).softmax(-1).view_as(attention_logits)


@functools.cache  # no copy to the GPU while a graph is being captured
def level_sizes(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(spatial_shapes, device=device)


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


def seconds(run, device: torch.device, repeats: int) -> float:
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


def time_one(function, device: torch.device, shapes: list[tuple[int, int]], M: int, C: int, B: int,
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


if __name__ == "__main__":
    main()
