"""FP-DETR: one deformable transformer encoder, asked by a few extra tokens (Wang et al., ICLR 2022, Sections
3 and 4.1), with its variants: the task adaptors of Table 3 and the encoder-decoder of Table 7.

With one extra token, the class token, the answer is an image class (`Classifier`, pre-training, 3.2); with
300 of them, the object queries, it is a set of boxes (`Detector`, fine-tuning, 3.3). Both are the same
mechanism here, and the encoder's state dict passes from one to the other with strict=True. Losses, data and
training are elsewhere.

Where the paper is silent, the authors' released code decides; where the two differ, the paper does (but for
positions, see EncoderLayer, and what the adaptor is before and updates, see TaskAdaptor), and a comment says
so. `released.py` turns a model of this file into the released layout. This file has more than 400 lines, so
that Section 3 can be read in one go.

Shapes: B images, N image tokens, E extra tokens (Q where they are queries, the paper's N_q), D channels, K
classes; in attention M heads of C channels, L levels, P points.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deform_attn import MSDeformAttn, at_least_float32
from deform_attn_jit import InputError


@dataclass(frozen=True)
class Config:
    """The size of a model (Table 1). Frozen: derive a changed one with `dataclasses.replace`; InputError if
    it is impossible. FP-EncDec (Table 7) is structure="encoder-decoder" together with adaptor="none"."""
    dim: int = 256            # D, channels of every token
    mlp_dim: int = 1024       # hidden channels of a layer's MLP
    heads: int = 8            # M, attention heads
    tokenizer_dim: int = 192  # D0, channels inside the tokenizer (A.1)
    layers: int = 12          # the paper's T
    entry_layer: int = 7      # the first layer that sees the extra tokens, counted from 1 (4.1, after CaiT)
    points: int = 4           # P, sampling points per head and level (4.1); there are always four levels
    queries: int = 300        # N_q, object queries of a detector (4.1)
    dropout: float = 0.0      # the released fine-tuning uses 0.1 everywhere; the paper does not mention it
    drop_path: float = 0.0    # stochastic depth of the last layer, in pre-training
    adaptor: str = "self-attention"  # of a detector (Eq. 5); or "bilstm" or "none" (Table 3)
    adaptor_per_layer: bool = False  # each layer that holds queries has its own, none is shared (Table 3)
    structure: str = "encoder-only"  # or "encoder-decoder": from entry_layer on, decoder layers (A.2)
    class_tokens: int = 1     # of a classifier; 300 in the better FP-EncDec (A.2)

    def __post_init__(self):
        decoder = self.structure == "encoder-decoder"
        if self.dim % self.heads or self.dim % 4:
            raise InputError(f"dim {self.dim} must be divisible by 4 (positions) and by {self.heads} heads")
        if not decoder and self.structure != "encoder-only":
            raise InputError(f"unknown structure {self.structure!r}: choose encoder-only or encoder-decoder")
        if not 1 + decoder <= self.entry_layer <= self.layers:
            raise InputError(f"entry layer {self.entry_layer} is impossible in an {self.structure}: choose "
                             f"one of {1 + decoder} to {self.layers}")
        if self.queries < 1:
            raise InputError(f"{self.queries} queries cannot detect anything: choose 1 or more")
        if self.class_tokens < 1:
            raise InputError(f"{self.class_tokens} class tokens cannot classify anything: choose 1 or more")
        if self.adaptor not in ("self-attention", "bilstm", "none"):
            raise InputError(f"unknown adaptor {self.adaptor!r}: choose self-attention, bilstm or none")
        if decoder and self.adaptor != "none":
            raise InputError(f"adaptor {self.adaptor} in an encoder-decoder (A.2 has none): choose none")
        if self.adaptor_per_layer and self.adaptor == "none":
            raise InputError("adaptor none cannot be one per layer: choose self-attention or bilstm")

    @property
    def extra_layers(self) -> int:
        """How many layers hold the extra tokens: the last six in the paper (4.1), three in ours for CPUs."""
        return self.layers - self.entry_layer + 1


VARIANTS: dict[str, Config] = {
    # Ours, for CPUs and teaching. On its pictures of 64 pixels, a class token that entered at layer 7 could
    # look at every image token by itself, and those would learn nothing that queries can use (README).
    "tiny": Config(dim=64, mlp_dim=256, heads=4, tokenizer_dim=64, queries=50, entry_layer=10),
    "tiny-wide": Config(dim=96, mlp_dim=384, heads=6, tokenizer_dim=96, queries=50, entry_layer=10),
    "lite": Config(),
    "small": Config(dim=384, mlp_dim=1536, heads=8, tokenizer_dim=384),
    "base": Config(dim=480, mlp_dim=1920, heads=10, tokenizer_dim=384),
}


# ----------------------------------------------------------------------------------- image tokens (3.1, A.1)

class Tokenizer(nn.Module):
    """Table 6: four non-overlapping convolutions in a chain, each followed by a LayerNorm; strides 8, 16,
    32, 64. Each level is projected to D by its own linear layer (A.1). Released code: see released.py."""
    strides = (8, 16, 32, 64)
    multiple = 64  # a detector pads its images to a multiple of this, lest the last patches be cut off

    def __init__(self, config: Config):
        super().__init__()
        d0 = config.tokenizer_dim
        chain = ((3, 8), (d0, 2), (d0, 2), (d0, 2))  # (input channels, kernel size); strides are the same
        self.convs = nn.ModuleList(nn.Conv2d(channels, d0, k, stride=k) for channels, k in chain)
        self.norms = nn.ModuleList(nn.LayerNorm(d0, eps=1e-6) for _ in self.convs)  # eps as released
        self.projections = nn.ModuleList(nn.Linear(d0, config.dim) for _ in self.convs)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W), H, W at least 64 -> four levels, each (B, H // stride, W // stride, D)."""
        if min(images.shape[-2:]) < self.strides[-1]:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels: each side needs at least 64")
        levels, x = [], images
        for conv, norm, projection in zip(self.convs, self.norms, self.projections):
            x = norm(conv(x).permute(0, 2, 3, 1))  # (B, h, w, D0)
            levels.append(projection(x))
            x = x.permute(0, 3, 1, 2)
        return levels


def sine_positions(valid: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sine embedding of each token's place, counted over valid tokens and scaled to [0, 2 pi] (as in
    Deformable DETR). valid: (B, h, w) bool, False at padding -> (B, h, w, dim) of `dtype`, y, then x."""
    places = []
    for axis in (1, 2):
        place = valid.cumsum(axis, dtype=dtype)  # 1, 2, 3, ... along the axis
        places.append((place - 0.5) / (place.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi)
    k = torch.arange(dim // 2, device=valid.device)
    wavelength = 10000 ** (2 * k.div(2, rounding_mode="floor").to(dtype) / (dim // 2))
    angles = torch.stack(places, -1)[..., None] / wavelength  # (B, h, w, 2, dim / 2)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-3)


@dataclass
class ImageTokens:
    """What the encoder knows of a batch of images; N = sum of h_l w_l tokens, levels fine to coarse: 3.1."""
    content: Tensor                # (B, N, D)
    positions: Tensor              # (B, N, D), sine position + level embedding
    references: Tensor             # (B, N, 4, 2), each token's own centre as (x, y) on every level's map
    shapes: list[tuple[int, int]]  # (h_l, w_l)
    padding: Tensor | None         # (B, N), True at padding; None if no image is padded
    valid_ratios: Tensor           # (B, 4, 2), the part of each level's (width, height) that is no padding


# -------------------------------------------------------------------------------- extra tokens (Eq. 1 and 4)

@dataclass
class ExtraTokens:
    """The class tokens or the object queries of a batch, E of them."""
    content: Tensor     # (B, E, D)
    positions: Tensor   # (B, E, D), the visual prompts
    references: Tensor  # (B, E, 2) as (x, y) in [0, 1] of the unpadded image; a fork that refines boxes may
    #                     give (B, E, 4), as (x, y, w, h)


class ExtraTokenEmbedding(nn.Module):
    """Learned content and position of the extra tokens. The position is a *visual prompt* (3.3): a linear
    layer maps it to the reference point, so it says where to look. One token pre-trains (x_cls; A.2: or
    300), N_q tokens detect (x_obj, p)."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.content = nn.Parameter(torch.randn(count, dim))
        self.position = nn.Parameter(torch.randn(count, dim))
        self.reference_points = nn.Linear(dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, batch_size: int) -> ExtraTokens:
        with torch.autocast(self.position.device.type, enabled=False):
            references = self.reference_points(self.position).sigmoid()
        parts = (self.content, self.position, references)
        return ExtraTokens(*(x.expand(batch_size, -1, -1) for x in parts))


class TaskAdaptor(nn.Module):
    """The task adaptor of Eq. 5, before each layer that holds queries; by default self-attention among them,
    shared by these layers, else a Bi-LSTM along them (4.3, Table 3). The relations between objects, which
    one class token could never learn in pre-training, come in here. (Eq. 5 has it before every layer, but
    there are no queries before the 7th; and it updates the content only, as positions are not part of it.)

    Released code: the LayerNorm is one per layer and runs over the image tokens too (see released.py).
    Paper: nothing about a norm; we keep one on the queries, shared like the attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.adaptor == "bilstm":
            # Sized by neither paper nor code. With ours, D / 4 channels a direction, both added, Lite in the
            # released layout has Table 3's rounded number of parameters (README, "Parameters").
            self.lstm = nn.LSTM(config.dim, config.dim // 4, batch_first=True, bidirectional=True)
            self.projection = nn.Linear(config.dim // 4, config.dim)
            for weight in (p for p in self.parameters() if p.dim() == 2):  # as every matrix, released code
                nn.init.xavier_uniform_(weight)
        else:
            self.attention = nn.MultiheadAttention(config.dim, config.heads, dropout=config.dropout,
                                                   batch_first=True)
            nn.init.xavier_uniform_(self.attention.out_proj.weight)  # in_proj is xavier-uniform by default
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """extra, positions: (B, E, D); memory: the image tokens (B, N, D); index: 0 before the first layer
        with queries, then 1, 2, ... -> the new extra and image tokens (the latter unchanged)."""
        return self.norm(self.relate(extra, positions)), memory

    def relate(self, extra: Tensor, positions: Tensor) -> Tensor:
        """extra, positions: (B, E, D) -> (B, E, D), the queries with what they learnt of each other."""
        where = extra + positions
        if hasattr(self, "lstm"):
            forwards, backwards = self.lstm(where)[0].chunk(2, -1)  # (B, E, D / 4) each
            related = self.projection(forwards + backwards)
        else:
            related = self.attention(where, where, extra, need_weights=False)[0]
        return extra + self.dropout(related)


class AdaptorPerLayer(nn.ModuleList):
    """Table 3 without sharing: every layer that holds queries has an adaptor of its own."""

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """As of a TaskAdaptor."""
        return self[index](extra, positions, memory, 0)  # its one layer is its first


def build_adaptor(config: Config, kind: type[TaskAdaptor] = TaskAdaptor) -> nn.Module | None:
    """A row of Table 3: no adaptor, one of its own for each layer, or one for all."""
    if config.adaptor == "none":
        return None
    if config.adaptor_per_layer:
        return AdaptorPerLayer(kind(config) for _ in range(config.extra_layers))
    return kind(config)


# ---------------------------------------------------------------------------------- encoder (3.2, 4.1, A.2)

class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016), one of the DeiT strategies (4.1): in training, a residual branch
    is left out for a random `rate` of the images, and the others' is scaled up to keep the mean."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate  # (B, 1, 1)
        return branch * keep / (1 - self.rate)


class EncoderLayer(nn.Module):
    """z' = LN(MSDSA(z) + z), z = LN(MLP(z') + z'): Eq. 2 and 3, post-norm. `depth` in [0, 1]: where the
    layer is, from the first to the last; stochastic depth grows with it."""

    def __init__(self, config: Config, depth: float):
        super().__init__()
        self.attention = MSDeformAttn(config.dim, config.heads, levels=4, points=config.points)
        self.norm1 = nn.LayerNorm(config.dim)
        # Dropout before ReLU or after it is the same; before, the backward pass needs one tensor less.
        self.mlp = nn.Sequential(nn.Linear(config.dim, config.mlp_dim), nn.Dropout(config.dropout),
                                 nn.ReLU(), nn.Linear(config.mlp_dim, config.dim))
        for linear in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(linear.weight)
        self.norm2 = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path * depth)

    def forward(self, tokens: Tensor, positions: Tensor, references: Tensor, memory: Tensor,
                image: ImageTokens) -> Tensor:
        """
        Args:
            tokens, positions: (B, T, D), the tokens to be updated. references: (B, T, 4, 2), their reference
                points on each level's map, padding included.
            memory: (B, N, D), the image tokens that they sample; `image` gives their shapes and padding.
        Returns:
            (B, T, D)
        """
        # 3.2 makes the extra tokens a fifth level and masks it, so that nobody attends to them. A masked
        # softmax gives that level weight 0; we leave it out instead: the same result exactly, for a fifth
        # less sampling. So the values are the image tokens alone, which cannot depend on the extra tokens.
        # Eq. 4 adds positions to the content once, at the input. Like the released code and Deformable DETR
        # we add them to the query side of every layer instead: a prompt has to be readable in every layer.
        attended = self.attention(tokens + positions, references, memory, image.shapes, image.padding)
        tokens = self.norm1(tokens + self.drop_path(self.dropout(attended)))
        return self.norm2(tokens + self.drop_path(self.dropout(self.mlp(tokens))))


class DecoderLayer(EncoderLayer):
    """A layer of FP-EncDec (A.2), post-norm as in Deformable DETR: standard self-attention among the extra
    tokens, then these alone take an encoder layer's way, so that MSDSA becomes cross-attention to the image
    tokens, which stay as the last encoder layer left them."""

    def __init__(self, config: Config, depth: float):
        super().__init__(config, depth)
        self.self_attention = nn.MultiheadAttention(config.dim, config.heads, dropout=config.dropout,
                                                    batch_first=True)
        nn.init.xavier_uniform_(self.self_attention.out_proj.weight)
        self.norm0 = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor, positions: Tensor, references: Tensor, memory: Tensor,
                image: ImageTokens) -> Tensor:
        """Arguments and result as of an EncoderLayer; `tokens` are extra tokens alone."""
        where = tokens + positions
        related = self.self_attention(where, where, tokens, need_weights=False)[0]
        tokens = self.norm0(tokens + self.drop_path(self.dropout(related)))
        return super().forward(tokens, positions, references, memory, image)


class Encoder(nn.Module):
    """Everything that pre-training hands over: tokenizer, level embedding, the T layers, decoder or not."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.level_embed = nn.Parameter(torch.randn(4, config.dim))
        later = DecoderLayer if config.structure == "encoder-decoder" else EncoderLayer
        kinds = [EncoderLayer] * (config.entry_layer - 1) + [later] * config.extra_layers
        self.layers = nn.ModuleList(kind(config, depth=i / max(1, config.layers - 1))
                                    for i, kind in enumerate(kinds))
        self.checkpointing = False  # whether training keeps only the layers' inputs for the backward pass

    def embed(self, images: Tensor, padding_mask: Tensor | None) -> ImageTokens:
        """images (B, 3, H, W), padding_mask (B, H, W), True at padding, or None -> the sequence of 3.1."""
        levels = self.tokenizer(images)
        valid = [torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) for x in levels]
        if padding_mask is not None:
            # "nearest", as in Deformable DETR: a token is valid if its top left pixel is, where the stride
            # divides the side.
            valid = [~F.interpolate(padding_mask[:, None].float(), v.shape[1:])[:, 0].bool() for v in valid]
        dtype = self.level_embed.dtype
        shapes = [tuple(v.shape[1:]) for v in valid]
        # per level (B, 2), the width and height that are no padding
        counts = [torch.stack([v[:, 0].sum(1), v[:, :, 0].sum(1)], -1).to(dtype) for v in valid]
        valid_ratios = torch.stack([torch.stack([n[:, 0] / w, n[:, 1] / h], -1)
                                    for n, (h, w) in zip(counts, shapes)], 1)  # (B, 4, 2)
        positions, centres = [], []
        for v, n, embed in zip(valid, counts, self.level_embed):
            positions.append((sine_positions(v, self.config.dim, dtype) + embed).flatten(1, 2))
            rows, columns = (torch.arange(s, device=v.device, dtype=dtype) + 0.5 for s in v.shape[1:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([x, y], -1).flatten(0, 1) / n[:, None])  # (B, h w, 2), in the image
        references = torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]  # (B, N, 4, 2)
        padding = None if padding_mask is None else torch.cat([~v.flatten(1) for v in valid], 1)
        content = torch.cat([x.flatten(1, 2) for x in levels], 1)
        return ImageTokens(content, torch.cat(positions, 1), references, shapes, padding, valid_ratios)

    def forward(self, images: Tensor, extra: ExtraTokens, padding_mask: Tensor | None = None,
                adapt: Callable | None = None) -> tuple[list[ExtraTokens], Tensor]:
        """
        Args:
            images: (B, 3, H, W). padding_mask: (B, H, W), True at padding, or None if there is none.
            extra: the tokens that enter at `config.entry_layer`.
            adapt: adapt(extra, image tokens, index) -> both, called before each layer that holds them, see
                `Detector.adapt`; None in pre-training.
        Returns:
            the extra tokens after each layer that holds them; the image tokens (B, N, D) that the last of
            these layers sampled.
        """
        image = self.embed(images, padding_mask)
        memory, states = image.content, []
        for layer in self.layers[:self.config.entry_layer - 1]:
            memory = self.call(layer, memory, image.positions, image.references, memory, image)
        for layer in self.layers[self.config.entry_layer - 1:]:
            if adapt is not None:
                extra, memory = adapt(extra, memory, len(states))
            references = extra.references[:, :, None, :2] * image.valid_ratios[:, None]  # (B, E, 4, 2)
            content, memory = self.call(self.with_extra_tokens, layer, extra.content, extra.positions,
                                        references, memory, image)
            extra = replace(extra, content=content)
            states.append(extra)
        return states, memory

    def with_extra_tokens(self, layer: EncoderLayer, extra: Tensor, positions: Tensor, references: Tensor,
                          memory: Tensor, image: ImageTokens) -> tuple[Tensor, Tensor]:
        """A layer that holds extra tokens: (B, E, D) and the image tokens (B, N, D) -> both, updated."""
        if isinstance(layer, DecoderLayer) or layer is self.layers[-1]:
            # The last layer updates the extra tokens alone, too: nobody would read its image tokens.
            return layer(extra, positions, references, memory, image), memory
        # Order of Eq. 1 and 4, extra tokens first (the released code puts them last; no effect).
        tokens = layer(torch.cat([extra, memory], 1), torch.cat([positions, image.positions], 1),
                       torch.cat([references, image.references], 1), memory, image)  # (B, E + N, D)
        return tokens[:, :extra.shape[1]], tokens[:, extra.shape[1]:]

    def call(self, function: Callable, *inputs) -> Tensor | tuple[Tensor, Tensor]:
        """function(*inputs), of which training keeps the inputs only, if it is to save memory."""
        if self.checkpointing and self.training:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


# ------------------------------------------------------------------------------------------------ the models

class Classifier(nn.Module):
    """Pre-training (3.2): the class token of the last layer, through a linear layer. If there are several,
    "pooled into a single class token" (A.2): by their mean, since the paper does not say how."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.encoder = Encoder(config)
        self.class_token = ExtraTokenEmbedding(config.class_tokens, config.dim)
        self.class_head = nn.Linear(config.dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised, at least 64 pixels a side -> logits (B, num_classes)."""
        states, _ = self.encoder(images, self.class_token(len(images)))
        return self.class_head(states[-1].content.mean(1))


def pad_to_multiple(images: Tensor, padding_mask: Tensor | None,
                    multiple: int) -> tuple[Tensor, Tensor | None]:
    """Pads (B, 3, H, W) images with zeros and their (B, H, W) mask with True, at the right and bottom."""
    h, w = images.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    if not (bottom or right):
        return images, padding_mask
    if padding_mask is None:
        padding_mask = torch.zeros(len(images), h, w, dtype=torch.bool, device=images.device)
    return F.pad(images, (0, right, 0, bottom)), F.pad(padding_mask, (0, right, 0, bottom), value=True)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Of numbers in [0, 1]; those nearer to 0 or 1 than `eps` are taken to be there (Deformable DETR)."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class Detector(nn.Module):
    """Fine-tuning (3.3): the class token replaced by object queries, a task adaptor among them, two heads
    shared by the supervised layers (deep supervision on all that hold queries, the last six in 4.1)."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.encoder = Encoder(config)
        self.queries = ExtraTokenEmbedding(config.queries, config.dim)
        self.adaptor = build_adaptor(config)
        self.class_head = nn.Linear(config.dim, num_classes)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at 1 %, as RetinaNet
        self.box_head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.ReLU(),
                                      nn.Linear(config.dim, config.dim), nn.ReLU(), nn.Linear(config.dim, 4))
        nn.init.zeros_(self.box_head[-1].weight)  # so boxes start at their reference point, 12 % wide
        with torch.no_grad():
            self.box_head[-1].bias.copy_(torch.tensor([0.0, 0.0, -2.0, -2.0]))

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> dict:
        """
        Args:
            images: (B, 3, H, W), normalised, any size. padding_mask: (B, H, W), True at padding, or None.
        Returns:
            {"pred_logits": (B, Q, K), "pred_boxes": (B, Q, 4), "aux_outputs": [the same two keys] per
            earlier layer}; boxes are float32 (cx, cy, w, h) in [0, 1] of the unpadded image; logits are for
            a sigmoid per class.
        """
        images, padding_mask = pad_to_multiple(images, padding_mask, self.encoder.tokenizer.multiple)
        states, _ = self.encoder(images, self.queries(len(images)), padding_mask, self.adapt)
        outputs = [{"pred_logits": at_least_float32(self.class_head(queries.content)),
                    "pred_boxes": self.boxes(queries)} for queries in states]
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def adapt(self, queries: ExtraTokens, memory: Tensor, index: int) -> tuple[ExtraTokens, Tensor]:
        """Eq. 5. memory: the image tokens (B, N, D); index: how many layers with queries have passed ->
        both, as the next layer is to take them."""
        if self.adaptor is None:
            return queries, memory
        content, memory = self.adaptor(queries.content, queries.positions, memory, index)
        return replace(queries, content=content), memory

    def boxes(self, queries: ExtraTokens) -> Tensor:
        """(B, Q, 4) float32 cxcywh in [0, 1], predicted relative to the reference points: their centres, or
        centres and sizes if these are given, too."""
        with torch.autocast(queries.content.device.type, enabled=False):
            start = inverse_sigmoid(queries.references)
            start = F.pad(start, (0, 4 - start.shape[-1]))  # nothing added to width and height
            return (self.box_head(at_least_float32(queries.content)) + start).sigmoid()
