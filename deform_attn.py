"""Multi-scale deformable attention (Deformable DETR, Eq. 3), which FP-DETR's layers have where a ViT has
self-attention.

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
import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_attn_jit import kernel_serves, launch


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
            query: (B, Q, D), position already added. reference_points: (B, Q, L, 2) and spatial_shapes: see
                `ms_deform_attn`. memory: (B, S, D), what is sampled from. padding_mask: (B, S), True where a
                token is padding, or None.
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


# ---------------------------------------------------------------- what the fused operator does not write out

def materialised(spatial_shapes: list[tuple[int, int]], reference_points: Tensor, sampling_offsets: Tensor,
                 attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Operators without fusion take these: locations (B, Q, M, L, P, 2) in [0, 1], softmaxed weights."""
    size = level_sizes(tuple(spatial_shapes), reference_points.device)  # (L, 2) as (H, W)
    locations = reference_points[:, :, None, :, None] + sampling_offsets / size.flip(-1)[:, None]
    return locations, attention_logits.flatten(3).softmax(-1).view_as(attention_logits)


@functools.cache  # no copy to the GPU while a graph is being captured
def level_sizes(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(spatial_shapes, device=device)


if __name__ == "__main__":
    from deform_attn_benchmark import main  # which needs this file
    main()
