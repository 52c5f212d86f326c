"""Multi-scale deformable attention (Deformable DETR, Eq. 3), the one operator in which FP-DETR's layers
differ from a ViT's.

Every token looks at a few points around its reference point, on every level of the feature pyramid, instead
of at all tokens. This file holds the operator and the module around it; it knows nothing of images, queries
or detection.

    ms_deform_attn            the operator, dispatching to the fastest path that can serve its inputs
    ms_deform_attn_reference  the same in grid_sample: slow, short, and the truth that other paths are tested
    against
    MSDeformAttn              the module: the four projections around the operator (FP-DETR 3.2 and 4.1)
"""
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, or its float32 copy if its dtype is a 16-bit one. Geometry (offsets, locations, boxes) is
    computed like this: bfloat16 has 8 bits of mantissa, which on a map of 168 columns would misplace a
    sample by a third of a pixel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                   sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """Samples `value` at a few points per query and level and sums the samples, weighted by a softmax.

    With M heads of C channels, L levels, P points per level, B images, Q queries and S = sum_l H_l W_l value
    tokens:

        output = sum_lp softmax_lp(logits) * bilinear(value_l, reference + offset / (W_l, H_l))

    where bilinear() follows align_corners=False (a pixel is a unit square, its centre at +0.5) and is zero
    outside the map.

    Args:
        value: (B, S, M, C) floating point; levels one after another, each row by row.
        spatial_shapes: [(H_l, W_l)] as Python ints, so that no kernel launch has to wait for the GPU to read
            them.
        reference_points: (B, Q, L, 2) in [0, 1] as (x, y) of level l's map, padding included.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y) in pixels of level l.
        attention_logits: (B, Q, M, L, P), before the softmax over all L * P samples.
    Returns:
        (B, Q, M * C) in the dtype of `value`, heads concatenated.
    """
    # The one place where a faster path takes over; each of them must agree with the reference. (A CUDA
    # kernel goes here.)
    B, S, M, _ = value.shape
    Q, L, P = sampling_offsets.shape[1], *sampling_offsets.shape[3:5]
    if S != sum(h * w for h, w in spatial_shapes) or L != len(spatial_shapes):
        raise ValueError(f"value has {S} tokens and the offsets {L} levels, which does not fit the shapes "
                         f"{spatial_shapes}")
    inputs = (value, reference_points, sampling_offsets, attention_logits)
    fits = (all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() for x in inputs)
            and reference_points.shape == (B, Q, L, 2) and sampling_offsets.shape == (B, Q, M, L, P, 2)
            and attention_logits.shape == (B, Q, M, L, P) and L * P <= 256)
    if fits and compiled():
        return CompiledAttention.apply(*inputs, spatial_shapes)
    return ms_deform_attn_reference(inputs[0], spatial_shapes, *inputs[1:])


def ms_deform_attn_reference(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                             sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """`ms_deform_attn` by one grid_sample per level; arguments, result and dtypes as there."""
    B, S, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], *sampling_offsets.shape[3:5]
    # (B, Q, M, L, P)
    weights = at_least_float32(attention_logits).flatten(3).softmax(-1).unflatten(-1, (L, P))
    maps = at_least_float32(value).split([h * w for h, w in spatial_shapes], dim=1)
    output = 0
    for level, (h, w) in enumerate(spatial_shapes):
        maps_l = maps[level].permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        size = reference_points.new_tensor([w, h])
        # (B, Q, M, P, 2)
        location = reference_points[:, :, None, level, None] + sampling_offsets[:, :, :, level] / size
        # (B * M, Q, P, 2), grid_sample counts from -1 to 1
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps_l, grid.to(maps_l.dtype), mode="bilinear", padding_mode="zeros",
                                align_corners=False)
        weights_l = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P).to(maps_l.dtype)
        output = output + (sampled * weights_l).sum(-1)  # (B * M, C, Q)
    return output.reshape(B, M * C, Q).transpose(1, 2).to(value.dtype)


# ------------------------------------------------------------------------------------- the compiled CPU path

@functools.cache
def compiled() -> ctypes.CDLL | None:
    """deform_attn_kernel.cu as a shared library, built by the system's C++ compiler at first use (two
    seconds) and kept in the temporary folder; None, with one warning, where that cannot be.
    FPDETR_DEFORM_ATTN=reference switches it off."""
    if os.environ.get("FPDETR_DEFORM_ATTN") == "reference":
        return None
    source = Path(__file__).with_name("deform_attn_kernel.cu")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    try:
        folder = Path(tempfile.gettempdir()) / f"fpdetr-{os.getuid()}"
        if compiler is None:
            raise OSError("there is no C++ compiler")
        key = hashlib.sha256(source.read_bytes()
                             + f"{compiler} {platform.machine()} {platform.node()}".encode())
        library = folder / f"deform_attn-{key.hexdigest()[:16]}.so"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # somebody else's: never load code from it
            raise OSError(f"{folder} belongs to another user")
        if not library.exists():
            temporary = library.with_suffix(f".{os.getpid()}.tmp")  # several processes may build at once
            flags = ["-x", "c++", "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, str(source), "-o", str(temporary)], check=True,
                           capture_output=True, text=True)
            temporary.replace(library)
        return ctypes.CDLL(str(library))
    # AttributeError: no os.getuid on Windows
    except (OSError, AttributeError, subprocess.CalledProcessError) as e:
        reason = getattr(e, "stderr", None) or str(e)
        warnings.warn(f"deformable attention runs in grid_sample, more slowly: {reason.strip()[:300]}",
                      stacklevel=2)
        return None


class CompiledAttention(torch.autograd.Function):
    """`ms_deform_attn` of float32 CPU tensors through the compiled kernel; arguments (value, reference,
    offsets, logits, spatial_shapes)."""

    @staticmethod
    def call(name: str, tensors: list[Tensor], shapes: list[tuple[int, int]],
             sizes: tuple[int, ...]) -> None:
        shape = (ctypes.c_longlong * (2 * len(shapes)))(*(n for pair in shapes for n in pair))
        getattr(compiled(), name)(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), shape,
                                  *(ctypes.c_longlong(n) for n in sizes))

    @staticmethod
    def forward(ctx, value, reference, offsets, logits, shapes):
        B, S, M, C = value.shape
        Q, L, P = offsets.shape[1], *offsets.shape[3:5]
        ctx.shapes, ctx.sizes = shapes, (B, S, Q, M, C, L, P)
        inputs = [x.contiguous() for x in (value, reference, offsets, logits)]
        ctx.save_for_backward(*inputs)
        output = value.new_empty(B, Q, M * C)
        CompiledAttention.call("ms_deform_attn_forward", [*inputs, output], shapes, ctx.sizes)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        value, reference, offsets, logits = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grads = [torch.zeros_like(x) for x in (value, offsets, logits)]
        tensors = [value, reference, offsets, logits, grad_output, *grads]
        CompiledAttention.call("ms_deform_attn_backward", tensors, ctx.shapes, ctx.sizes)
        # A reference point moves all of its samples, by (W_l, H_l) pixels per unit.
        size = reference.new_tensor([[w, h] for h, w in ctx.shapes])
        grad_reference = grads[1].sum((2, 4)) * size if ctx.needs_input_grad[1] else None  # (B, Q, L, 2)
        return grads[0], grad_reference, grads[1], grads[2], None


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
        B, Q, _ = query.shape
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)  # as if the map ended there
        with torch.autocast(query.device.type, enabled=False):
            offsets = F.linear(at_least_float32(query), self.sampling_offsets.weight,
                               self.sampling_offsets.bias)
        offsets = offsets.view(B, Q, self.heads, self.levels, self.points, 2)
        logits = self.attention_weights(query).view(B, Q, self.heads, self.levels, self.points)
        value = value.unflatten(-1, (self.heads, -1))  # (B, S, M, C)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, reference_points, offsets, logits))
