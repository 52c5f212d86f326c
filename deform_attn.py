"""Multi-scale deformable attention (Deformable DETR, Eq. 3), the one operator in which FP-DETR's layers differ from a ViT's.

Every token looks at a few points around its reference point, on every level of the feature pyramid, instead of at all
tokens. This file holds the operator and the module around it; it knows nothing of images, queries or detection.

    ms_deform_attn            the operator, dispatching to the fastest path that can serve its inputs
    ms_deform_attn_reference  the same in grid_sample: slow, short, and the truth that other paths are tested against
    MSDeformAttn              the module: the four projections around the operator (FP-DETR 3.2 and 4.1)
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, or its float32 copy if its dtype is a 16-bit one. Geometry (offsets, locations, boxes) is computed like this:
    bfloat16 has 8 bits of mantissa, which on a map of 168 columns would misplace a sample by a third of a pixel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                   sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """Samples `value` at a few points per query and level and sums the samples, weighted by a softmax.

    With M heads of C channels, L levels, P points per level, B images, Q queries and S = sum_l H_l W_l value tokens:

        output = sum_lp softmax_lp(logits) * bilinear(value_l, reference + offset / (W_l, H_l))

    where bilinear() follows align_corners=False (a pixel is a unit square, its centre at +0.5) and is zero outside the map.

    Args:
        value: (B, S, M, C) floating point; levels one after another, each row by row.
        spatial_shapes: [(H_l, W_l)] as Python ints, so that no kernel launch has to wait for the GPU to read them.
        reference_points: (B, Q, L, 2) in [0, 1] as (x, y) of level l's map, padding included.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y) in pixels of level l.
        attention_logits: (B, Q, M, L, P), before the softmax over all L * P samples.
    Returns:
        (B, Q, M * C) in the dtype of `value`, heads concatenated.
    """
    # The one place where a faster path may take over; each of them must agree with the reference.
    return ms_deform_attn_reference(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)


def ms_deform_attn_reference(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                             sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """`ms_deform_attn` by one grid_sample per level; arguments, result and dtypes as there."""
    B, S, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], *sampling_offsets.shape[3:5]
    if S != sum(h * w for h, w in spatial_shapes):
        raise ValueError(f"value has {S} tokens, but the spatial shapes {spatial_shapes} hold "
                         f"{sum(h * w for h, w in spatial_shapes)}")
    weights = at_least_float32(attention_logits).flatten(3).softmax(-1).unflatten(-1, (L, P))  # (B, Q, M, L, P)
    maps = at_least_float32(value).split([h * w for h, w in spatial_shapes], dim=1)
    output = 0
    for level, (h, w) in enumerate(spatial_shapes):
        maps_l = maps[level].permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        size = reference_points.new_tensor([w, h])
        location = reference_points[:, :, None, level, None] + sampling_offsets[:, :, :, level] / size  # (B, Q, M, P, 2)
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2), grid_sample counts from -1 to 1
        sampled = F.grid_sample(maps_l, grid.to(maps_l.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        weights_l = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P).to(maps_l.dtype)
        output = output + (sampled * weights_l).sum(-1)  # (B * M, C, Q)
    return output.reshape(B, M * C, Q).transpose(1, 2).to(value.dtype)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections: offsets and weights from the query, values from the memory.

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
        """Every head starts by looking in its own direction, point p at distance p, with equal weights (Deformable DETR
        A.4; the released code does the same)."""
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

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor, spatial_shapes: list[tuple[int, int]],
                padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (B, Q, D), position already added. reference_points: (B, Q, L, 2), see `ms_deform_attn`.
            memory: (B, S, D), what is sampled from. padding_mask: (B, S), True where a token is padding, or None.
        Returns:
            (B, Q, D)
        """
        B, Q, _ = query.shape
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)  # as if the map ended there
        with torch.autocast(query.device.type, enabled=False):
            offsets = F.linear(at_least_float32(query), self.sampling_offsets.weight, self.sampling_offsets.bias)
        offsets = offsets.view(B, Q, self.heads, self.levels, self.points, 2)
        logits = self.attention_weights(query).view(B, Q, self.heads, self.levels, self.points)
        value = value.unflatten(-1, (self.heads, -1))  # (B, S, M, C)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, reference_points, offsets, logits))
