"""FP-DETR: a deformable transformer encoder, and a few extra tokens that ask it a question (Wang et
al., ICLR 2022, Sections 3 and 4.1). Also its variants: the task adaptors of Table 3 and the
encoder-decoder of Table 7.

With one extra token, the class token, the answer is an image class (`Classifier`, pre-training, 3.2).
With 300 of them, the object queries, it is a set of boxes (`Detector`, fine-tuning, 3.3). Both use the
same code, and the encoder's state dict passes from one to the other with strict=True.

We follow the paper. Where it is silent, we mostly follow the authors' released code. A comment stands
wherever ours differs from either; docs/differences.md lists the differences. extras/released.py turns a
model of this file into the released layout.

Shapes: B images, N image tokens, E extra tokens (Q for queries, the paper's N_q), D channels, K
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


@dataclass(frozen=True)
class Config:
    """The size of a model (Table 1). `dataclasses.replace` makes a changed copy. An impossible size
    raises ValueError. FP-EncDec (Table 7) has structure="encoder-decoder" and adaptor="none"."""
    dim: int = 256            # D, channels of every token
    mlp_dim: int = 1024       # hidden channels of a layer's MLP
    heads: int = 8            # M, attention heads
    tokenizer_dim: int = 192  # D0, channels inside the tokenizer (A.1)
    layers: int = 12          # T in the paper
    entry_layer: int = 7      # first layer with the extra tokens, counted from 1 (4.1, after CaiT)
    points: int = 4           # P, sampling points per head and level (4.1); there are always four levels
    queries: int = 300        # N_q, object queries of a detector (4.1)
    dropout: float = 0.0      # 0.1 in the released fine-tuning; not in the paper
    drop_path: float = 0.0    # stochastic depth of the last layer, in pre-training
    adaptor: str = "self-attention"  # of a detector (Eq. 5); or "bilstm" or "none" (Table 3)
    adaptor_per_layer: bool = False  # one adaptor per layer with queries, not one for all (Table 3)
    structure: str = "encoder-only"  # or "encoder-decoder": decoder layers from entry_layer on (A.2)
    class_tokens: int = 1     # of a classifier; 300 in the better FP-EncDec (A.2)

    def __post_init__(self):
        decoder = self.structure == "encoder-decoder"
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be divisible by 4 (positions) and {self.heads} heads")
        if not decoder and self.structure != "encoder-only":
            raise ValueError(f"unknown structure {self.structure!r}: choose encoder-only or "
                             f"encoder-decoder")
        if not 1 + decoder <= self.entry_layer <= self.layers:
            raise ValueError(f"entry layer {self.entry_layer} is impossible in an {self.structure}: "
                             f"choose one of {1 + decoder} to {self.layers}")
        if self.queries < 1:
            raise ValueError(f"{self.queries} queries cannot detect anything: choose 1 or more")
        if self.class_tokens < 1:
            raise ValueError(f"{self.class_tokens} class tokens cannot classify: choose 1 or more")
        if self.adaptor not in ("self-attention", "bilstm", "none"):
            raise ValueError(f"unknown adaptor {self.adaptor!r}: choose self-attention, bilstm or none")
        if decoder and self.adaptor != "none":
            raise ValueError(f"adaptor {self.adaptor} in an encoder-decoder (A.2 has none): choose none")
        if self.adaptor_per_layer and self.adaptor == "none":
            raise ValueError("adaptor none cannot be one per layer: choose self-attention or bilstm")

    @property
    def extra_layers(self) -> int:
        """Number of layers with extra tokens: six in the paper (4.1)."""
        return self.layers - self.entry_layer + 1


VARIANTS: dict[str, Config] = {
    # Ours, for CPUs and teaching. tiny has half of Lite's layers. mini is for extras/claims.py: as many
    # layers with queries, queries per object and channels per head as Lite.
    "tiny": Config(dim=64, mlp_dim=256, heads=4, tokenizer_dim=64, layers=6, entry_layer=4, queries=12),
    "mini": Config(dim=64, mlp_dim=256, heads=2, tokenizer_dim=64, layers=9, entry_layer=4, queries=75),
    "mini-wide": Config(dim=96, mlp_dim=384, heads=3, tokenizer_dim=96, layers=9, entry_layer=4,
                        queries=75),
    "lite": Config(),
    "small": Config(dim=384, mlp_dim=1536, heads=8, tokenizer_dim=384),
    "base": Config(dim=480, mlp_dim=1920, heads=10, tokenizer_dim=384),
}


# ------------------------------------------------------------------------------ image tokens (3.1, A.1)

class Tokenizer(nn.Module):
    """Four non-overlapping convolutions in a chain, each followed by a LayerNorm (Table 6). Strides are
    8, 16, 32, 64. A linear layer per level projects to D (A.1). extras/released.py has the tokenizer of
    the released code."""
    strides = (8, 16, 32, 64)
    multiple = 64  # a detector pads its images to a multiple of this, so that all patches are whole

    def __init__(self, config: Config):
        super().__init__()
        d0 = config.tokenizer_dim
        self.convs = nn.ModuleList([
            nn.Conv2d(3, d0, kernel_size=8, stride=8),
            nn.Conv2d(d0, d0, kernel_size=2, stride=2),
            nn.Conv2d(d0, d0, kernel_size=2, stride=2),
            nn.Conv2d(d0, d0, kernel_size=2, stride=2)])
        self.norms = nn.ModuleList(nn.LayerNorm(d0, eps=1e-6) for _ in self.convs)  # eps as released
        self.projections = nn.ModuleList(nn.Linear(d0, config.dim) for _ in self.convs)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W), sides of 64 or more -> four levels, each
        (B, ceil(H / stride), ceil(W / stride), D)."""
        if min(images.shape[-2:]) < self.strides[-1]:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels: each side needs at least 64")
        levels = []
        x = images
        for conv, norm, projection, step in zip(self.convs, self.norms, self.projections, (8, 2, 2, 2)):
            # Zeros complete the last patches. Paper (Table 6): no padding, so level 4 at 224 pixels has
            # 3 x 3 tokens, which see 192 pixels of a side. Ours and the released code: 4 x 4.
            x, _ = pad_to_multiple(x, None, step)
            x = norm(conv(x).permute(0, 2, 3, 1))  # (B, h, w, D0)
            levels.append(projection(x))
            x = x.permute(0, 3, 1, 2)
        return levels


def sine_positions(valid: Tensor, counts: Tensor, dim: int) -> Tensor:
    """Sine embedding of each token's centre: its row and column, counted over valid tokens and scaled to
    [0, 2 pi] (as in Deformable DETR).

    Args:
        valid: (B, h, w) bool, False at padding. counts: (B, 2), the number of valid columns and rows, a
            fraction if the last patch is not whole.
    Returns:
        (B, h, w, dim) in the dtype of `counts`: channels of y, then of x. The k-th valid row of n, from
        1 on, has the angle 2 pi (k - 0.5) / n. Channels 2i and 2i + 1 of each half are the sine and
        cosine of its angle divided by 10000^(4i / dim). Values at padding do not matter.
    """
    dtype, places = counts.dtype, []
    for axis in (1, 2):
        place = valid.cumsum(axis, dtype=dtype)  # 1, 2, 3, ... along the axis
        count = place.narrow(axis, -1, 1).minimum(counts[:, 2 - axis, None, None])  # 0 at padding
        places.append((place - 0.5) / (count + 1e-6) * 2 * math.pi)
    k = torch.arange(dim // 2, device=valid.device)
    wavelength = 10000 ** (2 * k.div(2, rounding_mode="floor").to(dtype) / (dim // 2))
    angles = torch.stack(places, -1)[..., None] / wavelength  # (B, h, w, 2, dim / 2)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-3)


@dataclass
class ImageTokens:
    """A batch of images as tokens (3.1). N is the number of tokens on all levels, finest level first."""
    content: Tensor                # (B, N, D)
    positions: Tensor              # (B, N, D), sine position + level embedding
    references: Tensor             # (B, N, 4, 2), each token's centre, (x, y) in [0, 1] of each map
    shapes: list[tuple[int, int]]  # (h_l, w_l)
    padding: Tensor | None         # (B, N), True at padding; None if no image is padded
    valid_ratios: Tensor           # (B, 4, 2), valid part of each level's (width, height)


# --------------------------------------------------------------------------- extra tokens (Eq. 1 and 4)

@dataclass
class ExtraTokens:
    """The class tokens or the object queries of a batch, E of them."""
    content: Tensor     # (B, E, D)
    positions: Tensor   # (B, E, D), the visual prompts
    references: Tensor  # (B, E, 2) as (x, y) in [0, 1] of the image without padding.
    #                     A fork that refines boxes may give (B, E, 4) as (x, y, w, h).


class ExtraTokenEmbedding(nn.Module):
    """Learned content and position of the extra tokens. Pre-training has one of them (x_cls, Eq. 1; or
    300, A.2), detection has N_q (x_obj and p, Eq. 4). The position is a *visual prompt* (3.3): a linear
    layer maps it to the reference point, so it says where to look."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.content = nn.Parameter(torch.randn(count, dim))
        self.position = nn.Parameter(torch.randn(count, dim))
        self.reference_points = nn.Linear(dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, batch_size: int) -> ExtraTokens:
        """The same tokens for each image of a batch. Their references are in (0, 1)."""
        with torch.autocast(self.position.device.type, enabled=False):  # geometry in float32
            references = self.reference_points(self.position).sigmoid()
        parts = (self.content, self.position, references)
        return ExtraTokens(*(x.expand(batch_size, -1, -1) for x in parts))


class TaskAdaptor(nn.Module):
    """The task adaptor of Eq. 5, called before each layer with queries: self-attention among the
    queries, shared by these layers. Table 3 compares it with a Bi-LSTM along the queries. It brings in
    the relations between objects, which a single class token cannot learn in pre-training.

    Paper: before every layer (Eq. 5). Ours and the released code: before layers 7 to 12, as there are
    no queries earlier. It updates the content; positions stay. Paper: no norm is mentioned. Released
    code: one LayerNorm per layer, which runs over the image tokens too (extras/released.py). Ours: one
    LayerNorm on the queries, shared like the attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        if config.adaptor == "bilstm":
            # Neither paper nor code gives its size. With D / 4 channels per direction, both added, the
            # parameters of Lite in the released layout round to those of Table 3 (docs/results.md).
            self.lstm = nn.LSTM(config.dim, config.dim // 4, batch_first=True, bidirectional=True)
            self.projection = nn.Linear(config.dim // 4, config.dim)
            for parameter in self.parameters():
                if parameter.dim() == 2:  # every matrix, as in the released code
                    nn.init.xavier_uniform_(parameter)
        else:
            self.attention = nn.MultiheadAttention(config.dim, config.heads, dropout=config.dropout,
                                                   batch_first=True)
            nn.init.xavier_uniform_(self.attention.out_proj.weight)  # in_proj is so by default
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor,
                index: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            extra, positions: (B, E, D). memory: the image tokens (B, N, D).
            index: 0 before the first layer with queries, then 1, 2, ...
        Returns:
            the new extra tokens (B, E, D) and the image tokens, unchanged here. (The released layout
            has a norm for each index, and it normalises the image tokens too.)
        """
        return self.norm(self.mix_queries(extra, positions)), memory

    def mix_queries(self, extra: Tensor, positions: Tensor) -> Tensor:
        """Adds to each query a message from the others: extra, positions (B, E, D) -> (B, E, D), without
        the norm. Positions are added to the attention's queries and keys, not to its values; or to the
        LSTM's inputs. The two directions of the LSTM are added. Dropout acts on the message."""
        prompted = extra + positions
        if hasattr(self, "lstm"):
            both, _ = self.lstm(prompted)  # (B, E, D / 2)
            left_to_right, right_to_left = both.chunk(2, dim=-1)
            message = self.projection(left_to_right + right_to_left)
        else:
            message, _ = self.attention(prompted, prompted, extra, need_weights=False)
        return extra + self.dropout(message)


class AdaptorPerLayer(nn.ModuleList):
    """One adaptor for each layer with queries (Table 3, not shared)."""

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor,
                index: int) -> tuple[Tensor, Tensor]:
        """As TaskAdaptor.forward."""
        return self[index](extra, positions, memory, 0)  # each is called before one layer only


def build_adaptor(config: Config, adaptor: type[TaskAdaptor] = TaskAdaptor) -> nn.Module | None:
    """A row of Table 3: no adaptor, one for each layer, or one for all."""
    if config.adaptor == "none":
        return None
    if config.adaptor_per_layer:
        return AdaptorPerLayer(adaptor(config) for _ in range(config.extra_layers))
    return adaptor(config)


# ------------------------------------------------------------------------------ encoder (3.2, 4.1, A.2)

class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016), one of the DeiT strategies (4.1). In
    training it drops a residual branch for a random part `rate` of the images and
    scales the others up, so that the mean stays."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate  # (B, 1, 1)
        return branch * keep / (1 - self.rate)


class EncoderLayer(nn.Module):
    """z' = LN(MSDSA(z) + z), then z = LN(MLP(z') + z'): Eq. 2 and 3, post-norm. `depth`: 0 in the first
    layer, 1 in the last; stochastic depth grows with it."""

    def __init__(self, config: Config, depth: float):
        super().__init__()
        self.attention = MSDeformAttn(config.dim, config.heads, levels=4, points=config.points)
        self.norm1 = nn.LayerNorm(config.dim)
        # Dropout before ReLU equals dropout after it, and saves a tensor for the backward pass.
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
            tokens, positions: (B, n, D), the tokens to be updated.
            references: (B, n, 4, 2), their reference points on each level's map, padding included.
            memory: (B, N, D), the image tokens to sample from. image: their shapes and padding.
        Returns:
            (B, n, D)
        """
        # Paper (3.2): the extra tokens are a fifth level, masked so that no token attends to them.
        # A masked softmax gives that level weight 0. We leave the level out: exactly the same
        # result, for a fifth less sampling. So only image tokens are sampled, and they cannot
        # depend on the extra tokens. Paper (Eq. 4): positions are added to the content once, at
        # the input. Released code, Deformable DETR and ours: added to the query side of every
        # layer, so that each layer can read the prompt.
        attended = self.attention(tokens + positions, references, memory, image.shapes, image.padding)
        tokens = self.norm1(tokens + self.drop_path(self.dropout(attended)))
        return self.norm2(tokens + self.drop_path(self.dropout(self.mlp(tokens))))


class DecoderLayer(EncoderLayer):
    """A layer of FP-EncDec (A.2), post-norm as in Deformable DETR. The extra tokens first attend to
    each other, then they alone pass an encoder layer, in which MSDSA is cross-attention to the image
    tokens. The image tokens stay as the last encoder layer left them."""

    def __init__(self, config: Config, depth: float):
        super().__init__(config, depth)
        self.self_attention = nn.MultiheadAttention(config.dim, config.heads, dropout=config.dropout,
                                                    batch_first=True)
        nn.init.xavier_uniform_(self.self_attention.out_proj.weight)
        self.norm0 = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor, positions: Tensor, references: Tensor, memory: Tensor,
                image: ImageTokens) -> Tensor:
        """As EncoderLayer.forward; `tokens` are the extra tokens."""
        prompted = tokens + positions
        attended, _ = self.self_attention(prompted, prompted, tokens, need_weights=False)
        tokens = self.norm0(tokens + self.drop_path(self.dropout(attended)))
        return super().forward(tokens, positions, references, memory, image)


class Encoder(nn.Module):
    """The part that pre-training passes on to fine-tuning: tokenizer, level embedding and all layers."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.level_embed = nn.Parameter(torch.randn(4, config.dim))
        self.layers = nn.ModuleList()
        for i in range(config.layers):
            decoder = config.structure == "encoder-decoder" and i + 1 >= config.entry_layer
            layer = DecoderLayer if decoder else EncoderLayer
            self.layers.append(layer(config, depth=i / max(1, config.layers - 1)))
        self.checkpointing = False  # True: training keeps only the layers' inputs for the backward pass

    def embed(self, images: Tensor, padding_mask: Tensor | None) -> ImageTokens:
        """The token sequence of 3.1. images: (B, 3, H, W). padding_mask: (B,
        H, W), True at padding, or None."""
        levels = self.tokenizer(images)
        valid = [torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) for x in levels]
        if padding_mask is not None:
            # A token is valid if its top left pixel is ("nearest", as in Deformable DETR).
            pixels = padding_mask[:, None].float()  # (B, 1, H, W)
            valid = [~F.interpolate(pixels, v.shape[1:])[:, 0].bool() for v in valid]
        dtype = self.level_embed.dtype
        shapes = [tuple(v.shape[1:]) for v in valid]
        # Valid columns and rows per level, (B, 2) each. A patch that the tokenizer completes with zeros
        # counts in part: 224 pixels are 3.5 tokens of level 4. The released code counts 4, and its
        # tokenizer has no `strides`. A detector pads its images to whole patches before, and a patch
        # with padding in it counts as a whole one, as in the released code.
        height, width = images.shape[-2:]
        counts = [torch.stack([v[:, 0].sum(1).clamp(max=width / stride),
                               v[:, :, 0].sum(1).clamp(max=height / stride)], -1).to(dtype)
                  for v, stride in zip(valid, getattr(self.tokenizer, "strides", (1, 1, 1, 1)))]
        valid_ratios = torch.stack([torch.stack([n[:, 0] / w, n[:, 1] / h], -1)
                                    for n, (h, w) in zip(counts, shapes)], 1)  # (B, 4, 2)
        positions, centres = [], []
        for v, n, embed in zip(valid, counts, self.level_embed):
            positions.append((sine_positions(v, n, self.config.dim) + embed).flatten(1, 2))
            rows, columns = (torch.arange(s, device=v.device, dtype=dtype) + 0.5 for s in v.shape[1:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([x, y], -1).flatten(0, 1) / n[:, None])  # (B, h w, 2)
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
            adapt: adapt(extra, image tokens, index) -> both, called before each layer with extra tokens;
                `Detector.adapt`, or None in pre-training.
        Returns:
            the extra tokens after each layer that has them; the image tokens (B, N, D)
            that the last of these layers sampled.
        """
        image = self.embed(images, padding_mask)
        memory = image.content  # (B, N, D)
        first = self.config.entry_layer - 1
        for layer in self.layers[:first]:
            memory = self.call(layer, memory, image.positions, image.references, memory, image)
        states = []
        for layer in self.layers[first:]:
            if adapt is not None:
                extra, memory = adapt(extra, memory, len(states))
            references = extra.references[:, :, None, :2] * image.valid_ratios[:, None]  # (B, E, 4, 2)
            content, memory = self.call(self.with_extra_tokens, layer, extra.content, extra.positions,
                                        references, memory, image)
            extra = replace(extra, content=content)
            states.append(extra)
        return states, memory

    def with_extra_tokens(self, layer: EncoderLayer, extra: Tensor, positions: Tensor,
                          references: Tensor, memory: Tensor,
                          image: ImageTokens) -> tuple[Tensor, Tensor]:
        """One layer with extra tokens: updates them (B, E, D) and the image tokens (B, N, D)."""
        if isinstance(layer, DecoderLayer) or layer is self.layers[-1]:
            # The last layer updates the extra tokens only: nothing reads its image tokens.
            return layer(extra, positions, references, memory, image), memory
        # Extra tokens first, as in Eq. 1 and 4. (The released code puts
        # them last; the order has no effect.)
        tokens = layer(torch.cat([extra, memory], 1), torch.cat([positions, image.positions], 1),
                       torch.cat([references, image.references], 1), memory, image)  # (B, E + N, D)
        return tokens[:, :extra.shape[1]], tokens[:, extra.shape[1]:]

    def call(self, function: Callable, *inputs) -> Tensor | tuple[Tensor, Tensor]:
        """function(*inputs), with activation checkpointing if it is on."""
        if self.checkpointing and self.training:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


# ------------------------------------------------------------------------------------------- the models

class Classifier(nn.Module):
    """Pre-training (3.2): a linear layer on the class token of the last layer. Several class tokens are
    "pooled into a single class token" (A.2). We take their mean; the paper does not say how."""

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
    """Pads (B, 3, H, W) images with zeros and their (B, H, W) mask
    with True, at the right and bottom."""
    h, w = images.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    if not (bottom or right):
        return images, padding_mask
    if padding_mask is None:
        padding_mask = torch.zeros(len(images), h, w, dtype=torch.bool, device=images.device)
    return F.pad(images, (0, right, 0, bottom)), F.pad(padding_mask, (0, right, 0, bottom), value=True)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of numbers in [0, 1], with x and 1 - x at least `eps` (Deformable DETR)."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class Detector(nn.Module):
    """Fine-tuning (3.3): object queries in place of the class token, a task adaptor, a class and a box
    head. All layers with queries share the heads, and all of them are supervised: the last six (4.1)."""

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.encoder = Encoder(config)
        self.queries = ExtraTokenEmbedding(config.queries, config.dim)
        self.adaptor = build_adaptor(config)
        self.class_head = nn.Linear(config.dim, num_classes)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at 1 %, as RetinaNet
        self.box_head = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.ReLU(),
            nn.Linear(config.dim, config.dim), nn.ReLU(),
            nn.Linear(config.dim, 4))
        # Boxes start at their reference point, 12 % of the image wide (Deformable DETR).
        nn.init.zeros_(self.box_head[-1].weight)
        with torch.no_grad():
            self.box_head[-1].bias.copy_(torch.tensor([0.0, 0.0, -2.0, -2.0]))

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> dict:
        """
        Args:
            images: (B, 3, H, W), normalised, any size.
            padding_mask: (B, H, W), True at padding, or None.
        Returns:
            {"pred_logits": (B, Q, K), "pred_boxes": (B, Q, 4), "aux_outputs": [the same two keys] per
            earlier layer}; boxes are float32 (cx, cy, w, h) in [0, 1] of the unpadded image; logits are
            for a sigmoid per class.
        """
        images, padding_mask = pad_to_multiple(images, padding_mask, self.encoder.tokenizer.multiple)
        states, _ = self.encoder(images, self.queries(len(images)), padding_mask, self.adapt)
        outputs = [{"pred_logits": at_least_float32(self.class_head(queries.content)),
                    "pred_boxes": self.boxes(queries)} for queries in states]
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def adapt(self, queries: ExtraTokens, memory: Tensor, index: int) -> tuple[ExtraTokens, Tensor]:
        """Eq. 5: the queries and image tokens (B, N, D) that the next layer takes. index: number of
        layers with queries so far. A fork can override it."""
        if self.adaptor is None:
            return queries, memory
        content, memory = self.adaptor(queries.content, queries.positions, memory, index)
        return replace(queries, content=content), memory

    def boxes(self, queries: ExtraTokens) -> Tensor:
        """(B, Q, 4) cxcywh in [0, 1] in float32 or wider, also of 16-bit content. The box head predicts
        them relative to the reference points, before a sigmoid (Deformable DETR): to their centres, and
        to their sizes if a fork gives them."""
        with torch.autocast(queries.content.device.type, enabled=False):
            start = inverse_sigmoid(queries.references)
            start = F.pad(start, (0, 4 - start.shape[-1]))  # adds 0 to width and height
            return (self.box_head(at_least_float32(queries.content)) + start).sigmoid()
