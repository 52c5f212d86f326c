"""The authors' released layout: their tokenizer, their extra norms, and their checkpoints.

Paper and released code differ in two modules (docs/differences.md lists the other differences).
`released_layout` exchanges these two in a model of model.py:

    tokenizer   three patch convolutions; the fourth level comes from the third by a 3x3 convolution. Two
                LayerNorms per level. Projections are convolutions without bias + GroupNorm. (Table 6
                has four convolutions and linear layers.)
    adaptor     the norm after it is one per layer, over *all* tokens, image tokens too. (Eq. 5 has no norm;
                ours is one, shared, over the queries.)

`read_checkpoint` reads any checkpoint: ours, or one of the authors' of either stage (mmdet files),
converted to our format. `load_released` makes a detector of one of theirs.
"""
import re
from collections.abc import Callable
from dataclasses import asdict
from os import PathLike

import torch
from torch import Tensor, nn

from engine import InputError, load_checkpoint, note, one_line
from model import Classifier, Config, Detector, TaskAdaptor, build_adaptor


class ReleasedTokenizer(nn.Module):
    """Strides 8, 16, 32 by patch convolutions, 64 by a 3x3 convolution: 28, 14, 7, 4 tokens a side for
    224 pixels, where Table 6 gives 28, 14, 7, 3. gn_groups: of the GroupNorms after the projections."""
    multiple = 32

    def __init__(self, config: Config, gn_groups: int = 32):
        super().__init__()
        d0, d = config.tokenizer_dim, config.dim
        self.convs = nn.ModuleList(nn.Conv2d(cin, d0, k, stride=k) for cin, k in ((3, 8), (d0, 2), (d0, 2)))
        # The first norm of a level is followed by the next convolution, the
        # second by the level's projection.
        self.norms = nn.ModuleList(nn.LayerNorm(d0, eps=1e-6) for _ in self.convs)
        self.out_norms = nn.ModuleList(nn.LayerNorm(d0, eps=1e-6) for _ in self.convs)
        self.projections = nn.ModuleList([*(nn.Conv2d(d0, d, 1, bias=False) for _ in self.convs),
                                          nn.Conv2d(d0, d, 3, stride=2, padding=1, bias=False)])
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.weight)
        # GroupNorm sees padded pixels too, so detections depend a little on the padding of the batch.
        self.group_norms = nn.ModuleList(nn.GroupNorm(gn_groups, d) for _ in self.projections)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W), H and W multiples of 32 -> four levels, each (B, h, w, D)."""
        features, x = [], images
        for conv, norm, out_norm in zip(self.convs, self.norms, self.out_norms):
            x = norm(conv(x).permute(0, 2, 3, 1))  # (B, h, w, D0)
            features.append(out_norm(x).permute(0, 3, 1, 2))
            x = x.permute(0, 3, 1, 2)
        features.append(features[-1])
        pairs = zip(features, self.projections, self.group_norms)
        return [norm(projection(x)).permute(0, 2, 3, 1) for x, projection, norm in pairs]


class ReleasedAdaptor(TaskAdaptor):
    """A task adaptor, shared or not, with one LayerNorm per layer, over all tokens."""

    def __init__(self, config: Config):
        super().__init__(config)
        del self.norm
        layers = 1 if config.adaptor_per_layer else config.extra_layers  # served by this adaptor
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(layers))

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """As TaskAdaptor.forward, except that the image tokens are normalised too."""
        return self.norms[index](self.mix_queries(extra, positions)), self.norms[index](memory)


def released_layout(model: nn.Module, gn_groups: int = 32) -> nn.Module:
    """Turns a fresh Classifier or Detector of the paper's layout into one of the released layout, in
    place, and returns it."""
    config = model.encoder.config
    model.encoder.tokenizer = ReleasedTokenizer(config, gn_groups)
    if isinstance(model, Detector):
        model.adaptor = build_adaptor(config, ReleasedAdaptor)
    return model


def build_model(kind: Callable[[Config, int], nn.Module], config: Config, num_classes: int,
                layout: str) -> nn.Module:
    """Builds a model in the layout "paper" or "released". `made_by` keeps the name of the class or function
    that made it: a fork's model may have the names and shapes of ours and still compute something else."""
    model = kind(config, num_classes)
    maker = getattr(kind, "func", kind)  # a partial has its function in `func`
    model.made_by = getattr(maker, "__name__", type(maker).__name__)
    if layout == "released":
        if kind not in (Classifier, Detector):
            note(f"--layout released replaces the tokenizer and the adaptor, also those that "
                 f"{model.made_by} may have")
        released_layout(model)
    return model


# ------------------------------------------------------------------------------------ their checkpoints

T = r"bbox_head\.transformer\."
LAYER = T + r"encoder[12]\.layers\.(\d)\."
# Their name (a pattern over the whole key) -> ours. {n} and {last} are the first and the last group of
# the pattern; {stage} counts the strides 8, 16, 32 from 0; {layer} is {n} in their encoder1, layers
# 1-6, and {n} + 6 in their encoder2, 7-12.
KEYS = [
    (r"backbone\.patch_embed(8|16|32)\.proj\.(weight|bias)", "encoder.tokenizer.convs.{stage}.{last}"),
    (r"backbone\.patch_embed(8|16|32)\.norm\.(weight|bias)", "encoder.tokenizer.norms.{stage}.{last}"),
    (r"backbone\.norm(\d)\.(weight|bias)", "encoder.tokenizer.out_norms.{n}.{last}"),
    (r"neck\.convs\.(\d)\.conv\.(weight)", "encoder.tokenizer.projections.{n}.{last}"),
    (r"neck\.convs\.(\d)\.gn\.(weight|bias)", "encoder.tokenizer.group_norms.{n}.{last}"),
    (r"neck\.extra_convs\.(0)\.conv\.(weight)", "encoder.tokenizer.projections.3.{last}"),
    (r"neck\.extra_convs\.(0)\.gn\.(weight|bias)", "encoder.tokenizer.group_norms.3.{last}"),
    (T + r"(level_embeds)", "encoder.level_embed"),
    (LAYER + r"attentions\.0\.(\w+\.(?:weight|bias))", "encoder.layers.{layer}.attention.{last}"),
    (LAYER + r"ffns\.0\.layers\.0\.0\.(weight|bias)", "encoder.layers.{layer}.mlp.0.{last}"),
    (LAYER + r"ffns\.0\.layers\.1\.(weight|bias)", "encoder.layers.{layer}.mlp.3.{last}"),
    (T + r"encoder1\.layers\.(\d)\.norms\.0\.(weight|bias)", "encoder.layers.{layer}.norm1.{last}"),
    (T + r"encoder1\.layers\.(\d)\.norms\.1\.(weight|bias)", "encoder.layers.{layer}.norm2.{last}"),
    (T + r"encoder2\.layers\.(\d)\.norms\.0\.(weight|bias)", "adaptor.norms.{n}.{last}"),
    (T + r"encoder2\.layers\.(\d)\.norms\.1\.(weight|bias)", "encoder.layers.{layer}.norm1.{last}"),
    (T + r"encoder2\.layers\.(\d)\.norms\.2\.(weight|bias)", "encoder.layers.{layer}.norm2.{last}"),
    (T + r"encoder2\.prompt_encoder_share\.attn\.(in_proj_weight|in_proj_bias|out_proj\.(?:weight|bias))",
     "adaptor.attention.{last}"),
    (T + r"reference_points\.(weight|bias)", "queries.reference_points.{last}"),
    # one tensor under six names
    (r"bbox_head\.cls_branches\.(\d)\.(weight|bias)", "class_head.{last}"),
    (r"bbox_head\.reg_branches\.\d\.(\d)\.(weight|bias)", "box_head.{n}.{last}"),  # likewise
]
QUERY_KEY = "bbox_head.query_embedding.weight"


def our_name(key: str) -> str | None:
    """Our name of one of their state dict's keys, or None if it is not a key of theirs."""
    for pattern, name in KEYS:
        if match := re.fullmatch(pattern, key):
            n = match[1] if match[1].isdigit() else ""
            return name.format(n=n, last=match[match.lastindex], stage={"8": 0, "16": 1, "32": 2}.get(n),
                               layer=int(n) + 6 * (".encoder2." in key) if n else None)
    return None


def convert_names(theirs: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Their state dict -> ours. InputError if a key is unknown, or if the heads that they tie differ."""
    ours = {}
    for key, tensor in theirs.items():
        if key == QUERY_KEY:  # (300, 2D), position first
            ours["queries.position"], ours["queries.content"] = tensor.chunk(2, dim=1)
            continue
        name = our_name(key)
        if name is None:
            raise InputError(f"not a released FP-DETR checkpoint: its key {key!r} is unknown")
        if ".encoder2." in key and ("sampling_offsets" in key or "attention_weights" in key):
            # (heads x levels x points, ...), offsets x 2. They mask the fifth level.
            tensor = tensor.unflatten(0, (num_heads, 5, -1))[:, :4].flatten(0, 2)
        if name in ours and not torch.equal(ours[name], tensor):
            raise InputError(f"{key} differs from the same head of another layer; FP-DETR shares its heads")
        ours[name] = tensor
    return ours


def norms_of_layer_7(checkpoint: dict) -> list[int]:
    """The numbers of the norms of layer 7 in a checkpoint of the authors, wrapped by mmdet or bare. A
    detector has [0, 1, 2], a pre-trained model [0, 1], or [1, 2] if their script postprocess_ckpt.py has
    moved them and dropped the parts that detection starts afresh. Any other file has []."""
    state = checkpoint.get("state_dict", checkpoint)
    key = "bbox_head.transformer.encoder2.layers.0.norms.{}.weight"
    return [i for i in range(3) if isinstance(state, dict) and key.format(i) in state]


def load_released_encoder(checkpoint: dict) -> tuple[Config, dict[str, Tensor]]:
    """(config, {"encoder...": tensor} in our names) of one of the authors' pre-training checkpoints.
    Class token, its reference point and heads are left out. InputError if it is not whole."""
    state = dict(checkpoint.get("state_dict", checkpoint))
    if norms_of_layer_7(checkpoint) == [0, 1]:  # as it was trained
        state = {re.sub(r"(encoder2\.layers\.\d+\.norms\.)(\d)", lambda m: m[1] + str(int(m[2]) + 1), k): v
                 for k, v in state.items()}
    dropped = ("bbox_head.cls_branches", "bbox_head.reg_branches", "bbox_head.query_embedding",
               "bbox_head.transformer.reference_points")
    state = {k: v for k, v in state.items() if not k.startswith(dropped)}
    config = read_config(state)
    return config, convert_names(state, config.heads)


def read_config(state: dict[str, Tensor], num_heads: int | None = None) -> Config:
    """The sizes of one of their models, from the shapes of its state dict."""
    layer = "bbox_head.transformer.encoder1.layers.0."
    try:
        heads = num_heads or state[layer + "attentions.0.attention_weights.bias"].shape[0] // 16  # 4 x 4
        return Config(dim=state["bbox_head.transformer.level_embeds"].shape[1], heads=heads,
                      mlp_dim=state[layer + "ffns.0.layers.0.0.bias"].shape[0],
                      queries=state[QUERY_KEY].shape[0] if QUERY_KEY in state else Config.queries,
                      tokenizer_dim=state["backbone.patch_embed8.proj.bias"].shape[0])
    except (KeyError, AttributeError, IndexError) as e:
        raise InputError(f"not a whole released FP-DETR checkpoint: {one_line(e)}") from None


def read_checkpoint(path: str | PathLike) -> dict:
    """A checkpoint of this project as it is, or one of the authors' in our format: {"stage", "layout",
    "classes", "config", "model"}. InputError if the file is no checkpoint or theirs is not whole."""
    content = load_checkpoint(path)
    try:
        norms = norms_of_layer_7(content)
        if norms == [0, 1, 2]:
            detector = load_released(content)
            num_classes = detector.class_head.out_features
            names = (content.get("meta") or {}).get("CLASSES") or [f"class {i}" for i in range(num_classes)]
            return {"stage": "finetune", "layout": "released", "classes": list(names),
                    "config": asdict(detector.encoder.config), "model": detector.state_dict()}
        if norms in ([0, 1], [1, 2]):
            config, weights = load_released_encoder(content)
            return {"stage": "pretrain", "layout": "released", "classes": [], "config": asdict(config),
                    "model": weights}
    except (RuntimeError, TypeError) as e:  # shapes that do not belong together
        raise InputError(f"{path} does not fit: {one_line(e)}") from None
    return content


def load_released(path_or_state_dict: str | PathLike | dict, num_heads: int | None = None,
                  gn_groups: int = 32) -> Detector:
    """A detector with the weights of one of the authors' checkpoints, in
    eval mode, in the dtype of the weights, at least float32.

    Args:
        path_or_state_dict: the file (only tensors and plain containers are read), or its content:
            {"meta", "state_dict", ...} as mmdet wraps it, or the state dict alone.
        num_heads: read off the shapes, which needs the usual 4 points, unless given.
        gn_groups: of the projections; cannot be read off the shapes.
    Raises:
        InputError: if it is not such a checkpoint.
    """
    state = path_or_state_dict
    if not isinstance(state, dict):
        state = load_checkpoint(path_or_state_dict)
    if norms_of_layer_7(state) != [0, 1, 2]:
        raise InputError("not a released FP-DETR detection checkpoint")
    state = state.get("state_dict", state)
    config = read_config(state, num_heads)
    try:
        num_classes = len(state["bbox_head.cls_branches.0.bias"])
        detector = released_layout(Detector(config, num_classes), gn_groups)
        detector = detector.to(torch.promote_types(state[QUERY_KEY].dtype, torch.float32))
        detector.load_state_dict(convert_names(state, config.heads))
    except (KeyError, RuntimeError) as e:
        raise InputError(f"not a whole released FP-DETR checkpoint: {one_line(e)}") from None
    return detector.eval()
