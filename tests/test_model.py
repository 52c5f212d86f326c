"""Parameter counts; what depends on what; what passes between the stages; the adaptors of Table 3 and
the layers against their definitions written out."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import shaken

from deform_attn import ms_deform_attn_reference
from extras.released import ReleasedAdaptor, released_layout
from model import (VARIANTS, Classifier, Config, DecoderLayer, Detector, DropPath, EncoderLayer,
                   ExtraTokenEmbedding, ExtraTokens, ImageTokens, TaskAdaptor, Tokenizer, sine_positions)

TINY = replace(VARIANTS["tiny"], layers=12, entry_layer=7, queries=50)  # as in the paper
ENCODER_DECODER = dict(structure="encoder-decoder", adaptor="none")
ROWS = {"none": dict(adaptor="none"),  # of Table 3
        "Bi-LSTM per layer": dict(adaptor="bilstm", adaptor_per_layer=True),
        "Bi-LSTM": dict(adaptor="bilstm"),
        "self-attention per layer": dict(adaptor_per_layer=True), "self-attention": {}}
LAYOUTS = {"paper": lambda model: model, "released": released_layout}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[{}, ENCODER_DECODER], ids=["encoder-only", "encoder-decoder"])
def detector(request):
    return shaken(Detector(replace(TINY, **request.param), 5))


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def size(kind: type, config: Config, classes: int, layout: str = "paper") -> int:
    with torch.device("meta"):  # shapes alone; no weights are drawn
        return count(LAYOUTS[layout](kind(config, classes)))


@pytest.mark.parametrize("h, w", [(224, 224), (64, 192), (100, 159)])
def test_tokens_see_every_pixel_and_lie_where_the_model_believes(h, w):
    encoder = shaken(Classifier(TINY, 2).double()).encoder
    pixels = torch.randn(1, 3, h, w, dtype=torch.float64, requires_grad=True)
    image, levels, centres = encoder.embed(pixels, None), encoder.tokenizer(pixels), []
    for stride, level in zip((8, 16, 32, 64), levels):
        gradient, = torch.autograd.grad(level[0, -1, -1].sum(), pixels, retain_graph=True)
        y, x = gradient[0].any(0).nonzero(as_tuple=True)  # the pixels that the last token sees
        rows, columns = y.min().item() // stride + 1, x.min().item() // stride + 1
        assert (y.max() + 1, x.max() + 1, *level.shape[1:3]) == (h, w, rows, columns)
        centres += [(stride * (c + 0.5), stride * (r + 0.5))
                    for r in range(rows) for c in range(columns)]
    centres = torch.tensor(centres, dtype=torch.float64)  # in pixels
    for i, stride in enumerate((8, 16, 32, 64)):
        size = stride * torch.tensor(levels[i].shape[2:0:-1])  # of a map, in pixels
        torch.testing.assert_close(image.references[0, :, i] * size, centres)
        torch.testing.assert_close(image.valid_ratios[0, i] * size, torch.tensor([w, h]).double())
    counts = torch.tensor([x.shape[1] * x.shape[2] for x in levels])
    embed = encoder.level_embed.repeat_interleave(counts, 0)
    sine = (image.positions[0] - embed)[:, [TINY.dim // 2, 0]]  # of x and y, in the shortest wavelength
    expected = torch.sin(2 * math.pi * centres / torch.tensor([w, h]))
    torch.testing.assert_close(sine, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant, classify, detect, released", [
    ("lite", 10_168_618, 10_484_118, 10_731_478), ("small", 22_568_490, 23_337_110, 23_929_622),
    ("base", 33_900_090, 35_137_574, 36_025_382)])
def test_parameter_counts_of_the_authors_modules(variant, classify, detect, released):
    """With Table 6's tokenizer or the authors' own. Their numbers include the masked fifth level, and in
    the detector six LayerNorms after the adaptor, where the paper layout has one."""
    config = VARIANTS[variant]
    # 6 layers x heads x 4 points x (2 offsets + 1 weight) x (D inputs + 1 bias)
    masked = 6 * config.heads * 4 * 3 * (config.dim + 1)
    assert size(Classifier, config, 1000) == classify - masked
    assert size(Detector, config, 80) == detect - masked - 5 * 2 * config.dim
    assert size(Detector, config, 80, "released") == released - masked


def test_parameter_counts_of_tables_3_and_7():
    """In the released layout and, rounded to millions, as printed. The paper prints 11M for "none"."""
    lite = {row: replace(VARIANTS["lite"], **changes) for row, changes in ROWS.items()}
    counts = {row: size(Detector, config, 80, "released") for row, config in lite.items()}
    assert counts["none"] == 10_465_238 - 148_032  # the masked fifth level
    assert counts["self-attention per layer"] == 12_047_318 - 148_032
    assert [round(n / 1e6) for n in counts.values()] == [10, 11, 11, 12, 11]
    # In each direction four gates of 64 channels from 256 + 64, with two biases; a projection; norms.
    lstm = 2 * 4 * 64 * (256 + 64 + 2) + 64 * 256 + 256
    for layout, norms in (("paper", 1), ("released", 6)):
        none, shared, own = (size(Detector, lite[row], 80, layout)
                             for row in ("none", "Bi-LSTM", "Bi-LSTM per layer"))
        assert shared - none == lstm + norms * 512 and own - none == 6 * (lstm + 512)
    assert size(Detector, replace(Config(), **ENCODER_DECODER), 80, "released") == 11_899_286
    for layout in LAYOUTS:
        for tokens in (1, 300):
            config = replace(Config(), **ENCODER_DECODER, class_tokens=tokens)
            assert round(size(Detector, config, 80, layout) / 1e6) == 12
            assert round(size(Classifier, config, 1000, layout) / 1e6) == 12


@pytest.mark.parametrize("change, says", [
    (dict(heads=7), "7 heads"), (dict(queries=0), "0 queries"), (dict(class_tokens=0), "0 class tokens"),
    (dict(entry_layer=13), "choose one of 1 to 12"), (dict(adaptor="lstm"), "'lstm': choose"),
    (dict(adaptor="none", adaptor_per_layer=True), "one per layer"),
    (dict(structure="decoder"), "'decoder': choose"),
    (dict(structure="encoder-decoder"), "self-attention in an encoder-decoder"),
    (dict(ENCODER_DECODER, entry_layer=1), "choose one of 2 to 12")])
def test_impossible_sizes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(TINY, **change)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, ENCODER_DECODER, dict(ENCODER_DECODER, class_tokens=9)])
def test_the_encoder_passes_from_classifier_to_detector(layout, changes):
    config = replace(TINY, **changes)
    classifier, detector = LAYOUTS[layout](Classifier(config, 7)), LAYOUTS[layout](Detector(config, 5))
    state = classifier.encoder.state_dict()
    detector.encoder.load_state_dict(state, strict=True)
    layers = {k.split(".")[1] for k in state if ".self_attention." in k}
    assert layers == ({"6", "7", "8", "9", "10", "11"} if changes else set())  # decoder layers go along
    assert classifier(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    out = detector(torch.randn(2, 3, 70, 130))
    for layer in (out, *out["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 50, 5) and layer["pred_boxes"].shape == (2, 50, 4)
        assert 0 <= layer["pred_boxes"].min() and layer["pred_boxes"].max() <= 1
    assert len(out["aux_outputs"]) == 5


@torch.no_grad()
def test_image_tokens_do_not_depend_on_queries(detector):
    images, layer6 = torch.randn(1, 3, 128, 64), []
    detector.encoder.layers[5].register_forward_hook(lambda m, inputs, output: layer6.append(output))
    _, before = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
    logits = detector(images)["pred_logits"]
    for p in detector.queries.parameters():
        p.normal_()
    _, after = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
    assert torch.equal(before, after)
    assert not torch.allclose(logits, detector(images)["pred_logits"])  # the answers do
    # Decoder layers leave the image tokens as layer 6 left them.
    assert torch.equal(after, layer6[0]) == (detector.encoder.config.structure == "encoder-decoder")


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(96, 128), (97, 70), (64, 200), (50, 40)])
def test_an_image_is_detected_alike_alone_and_padded(detector, h, w):
    image = torch.randn(1, 3, h, w)
    alone = detector(image)
    batch, mask = torch.randn(2, 3, 160, 210), torch.zeros(2, 160, 210, dtype=torch.bool)
    batch[0] = 0
    batch[0, :, :h, :w] = image[0]
    mask[0, h:], mask[0, :, w:] = True, True
    padded = detector(batch, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(padded[key][:1], alone[key], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [*ROWS.values(), ENCODER_DECODER])
def test_queries_see_each_other_only_through_adaptor_or_decoder(changes):
    detector, images = shaken(Detector(replace(TINY, **changes), 5)), torch.randn(1, 3, 64, 64)

    def change_of_query_0():
        before = detector(images)["pred_logits"][0, 0]
        detector.queries.content[1] += 1
        return (detector(images)["pred_logits"][0, 0] - before).abs().max()
    assert change_of_query_0() > 1e-5 or changes == ROWS["none"]
    detector.adaptor = None
    if changes == ENCODER_DECODER:
        for layer in detector.encoder.layers[6:]:
            layer.self_attention.out_proj.weight.zero_()
    assert change_of_query_0() == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self-attention", "bilstm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own", [False, True])
def test_a_shared_adaptor_serves_all_layers_and_a_layers_own_only_that_one(kind, layout, own):
    """Seen in the first layer with other queries than before when an adaptor changes."""
    config = replace(TINY, adaptor=kind, adaptor_per_layer=own)
    detector, images = shaken(LAYOUTS[layout](Detector(config, 3))), torch.randn(1, 3, 64, 64)

    def states():
        layers, _ = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
        return [extra.content for extra in layers]
    before = states()
    adaptors = list(detector.adaptor) if own else [detector.adaptor]
    assert len(adaptors) == (6 if own else 1)
    for i, adaptor in enumerate(adaptors):
        saved = {k: v.clone() for k, v in adaptor.state_dict().items()}
        shaken(adaptor)
        assert [torch.equal(a, b) for a, b in zip(before, states())] == [layer < i for layer in range(6)]
        adaptor.load_state_dict(saved)


@torch.no_grad()
def test_several_class_tokens_are_pooled_by_their_mean():
    """There is no self-attention among them, so each token answers as if it were alone."""
    classifier = shaken(Classifier(replace(TINY, class_tokens=3), 4).double())
    alone, images = Classifier(TINY, 4).double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    whole, answers = classifier.state_dict(), []
    for i in range(3):
        one = {k: whole[k][i:i + 1] for k in ("class_token.content", "class_token.position")}
        alone.load_state_dict({**whole, **one})
        answers.append(alone(images))
    torch.testing.assert_close(classifier(images), sum(answers) / 3, rtol=0, atol=1e-12)


def test_sine_positions_equal_a_loop_over_valid_tokens():
    """Of padded maps. The third column of the second one is half a token."""
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[0, :2], valid[1, :, :3] = True, True
    counts = torch.tensor([[4, 2], [2.5, 3]], dtype=torch.float64)
    got = sine_positions(valid, counts, 8)
    assert got.shape == (2, 3, 4, 8) and got.dtype == torch.float64
    for b, y, x in valid.nonzero().tolist():
        columns, rows = counts[b].tolist()
        angles = [2 * math.pi * place / wavelength
                  for place in ((y + 0.5) / rows, (x + 0.5) / columns) for wavelength in (1, 100)]
        expected = [value for angle in angles for value in (math.sin(angle), math.cos(angle))]
        assert got[b, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_boxes_start_at_the_reference_points():
    detector = Detector(TINY, 3)
    boxes = detector(torch.randn(1, 3, 64, 64))["pred_boxes"]
    torch.testing.assert_close(boxes[..., :2], detector.queries(1).references, rtol=0, atol=1e-4)
    assert boxes[..., 2:].flatten().tolist() == pytest.approx([0.1192029] * 100, abs=1e-6)  # sigmoid(-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, dict(adaptor="bilstm"), ENCODER_DECODER])
def test_weights_start_as_in_the_released_code(layout, changes):
    """Matrices: Xavier's uniform distribution, which ends at sqrt(6 / (inputs + outputs)), torch's own one
    in the heads, which ends at 1 / sqrt(inputs), or zeros. Each class starts at 1 %."""
    detector = LAYOUTS[layout](Detector(replace(TINY, **changes), 5))
    zero_biases = ("projections", "reference_points", "attention_weights", "value_proj", "output_proj",
                   "in_proj", "out_proj")
    for name, p in detector.named_parameters():
        if "bias" in name and any(part in name for part in zero_biases):
            assert not p.any(), name
        if "projections" in name and p.ndim == 4:  # of the released layout
            inputs, outputs = p[0].numel(), p[:, 0].numel()
            assert p.abs().max().item() == pytest.approx(math.sqrt(6 / (inputs + outputs)), rel=0.05), name
        if "weight" in name and p.ndim == 2:
            zero = any(part in name for part in ("sampling_offsets", "attention_weights", "box_head.4"))
            end = 0 if zero else 1 / 8 if "_head" in name else math.sqrt(6 / sum(p.shape))
            assert p.abs().max().item() == pytest.approx(end, rel=0.05), name
    assert detector.class_head.bias.sigmoid().tolist() == pytest.approx([0.01] * 5)
    for p in (detector.encoder.level_embed, *list(detector.queries.parameters())[:2]):
        assert p.std().item() == pytest.approx(1, abs=0.15)  # normal


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def norm(x, weights, name, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def self_attention(tokens, prompts, weights, name, M):
    """Queries and keys have the prompts, values have not."""
    prompted, D = tokens + prompts, tokens.shape[-1]
    q, k, v = ((x @ weight.T + bias).unflatten(-1, (M, -1)) for x, weight, bias in zip(
        (prompted, prompted, tokens), weights[f"{name}.in_proj_weight"].split(D),
        weights[f"{name}.in_proj_bias"].split(D)))  # (B, E, M, D / M) each
    similar = (torch.einsum("bimc,bjmc->bmij", q, k) / math.sqrt(D // M)).exp()
    related = torch.einsum("bmij,bjmc->bimc", similar / similar.sum(-1, keepdim=True), v)
    return linear(related.flatten(2), weights, f"{name}.out_proj")


@torch.no_grad()
def test_the_tokenizer_equals_a_loop_over_patches():
    tokenizer = shaken(Tokenizer(Config(dim=8, heads=2, tokenizer_dim=4)).double(), 0.3)
    images, w = torch.randn(2, 3, 72, 100, dtype=torch.float64), tokenizer.state_dict()
    x = images
    for i, (level, s) in enumerate(zip(tokenizer(images), (8, 2, 2, 2))):
        rows, columns = (math.ceil(side / s) for side in x.shape[2:])
        whole = torch.zeros(2, x.shape[1], s * rows, s * columns, dtype=torch.float64)
        whole[:, :, :x.shape[2], :x.shape[3]] = x
        x = torch.empty(2, 4, rows, columns, dtype=torch.float64)
        for r in range(rows):
            for c in range(columns):
                patch = whole[:, None, :, s * r:s * (r + 1), s * c:s * (c + 1)]
                token = (patch * w[f"convs.{i}.weight"]).sum((2, 3, 4)) + w[f"convs.{i}.bias"]
                x[:, :, r, c] = norm(token, w, f"norms.{i}", 1e-6)
        expected = linear(x.permute(0, 2, 3, 1), w, f"projections.{i}")
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_extra_tokens_look_where_their_positions_say():
    tokens = shaken(ExtraTokenEmbedding(3, 4).double(), 0.3)
    got, w = tokens(2), tokens.state_dict()
    for b in range(2):
        assert torch.equal(got.content[b], w["content"]) and torch.equal(got.positions[b], w["position"])
        expected = sigmoid(linear(w["position"], w, "reference_points"))
        torch.testing.assert_close(got.references[b], expected, rtol=0, atol=1e-12)
    plain = tokens.float()(1).references
    with torch.autocast("cpu", torch.bfloat16):  # the same in mixed precision
        assert torch.equal(tokens(1).references, plain)


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 4])
def test_boxes_equal_their_definition_written_out(size):
    """References with and without a width and height."""
    detector = shaken(Detector(TINY, 2).double(), 0.3)
    content, w = torch.randn(2, 5, 64, dtype=torch.float64), detector.box_head.state_dict()
    references = 0.1 + 0.8 * torch.rand(2, 5, size, dtype=torch.float64)
    references[0, 0] = 0  # the border counts as 1e-5, as in Deformable DETR
    x = linear(content, w, "0").clamp(min=0)
    x = linear(linear(x, w, "2").clamp(min=0), w, "4")
    x[..., :size] += torch.log(references.clamp(min=1e-5) / (1 - references))
    got = detector.boxes(ExtraTokens(content, None, references))
    torch.testing.assert_close(got, sigmoid(x), rtol=0, atol=1e-12)
    detector.float()
    plain = detector.boxes(ExtraTokens(content.bfloat16(), None, references.float()))
    with torch.autocast("cpu", torch.bfloat16):  # the same in mixed precision
        rounded = detector.boxes(ExtraTokens(content.bfloat16(), None, references.float()))
    assert rounded.dtype == torch.float32 and torch.equal(rounded, plain)
    torch.testing.assert_close(rounded.double(), got, rtol=0, atol=0.02)


@torch.no_grad()
def test_the_self_attention_adaptor_equals_its_definition_written_out():
    adaptor = shaken(TaskAdaptor(Config(dim=16, heads=2)).double(), 0.3)
    extra, positions, image = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    got_extra, got_image = adaptor(extra, positions, image, 1)
    w = adaptor.state_dict()
    expected = norm(extra + self_attention(extra, positions, w, "attention", 2), w, "norm")
    torch.testing.assert_close(got_extra, expected, rtol=0, atol=1e-12)
    assert torch.equal(got_image, image)
    adaptor.train().dropout.p = 1.0  # no message comes through
    assert torch.equal(adaptor.mix_queries(extra, positions), extra)


@torch.no_grad()
@pytest.mark.parametrize("layout, kind", [("paper", TaskAdaptor), ("released", ReleasedAdaptor)])
def test_the_bi_lstm_adaptor_equals_its_gates_written_out(layout, kind):
    config = Config(dim=16, heads=2, adaptor="bilstm", layers=3, entry_layer=2)
    adaptor = shaken(kind(config).double(), 0.3)
    extra, positions, image = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    w = adaptor.state_dict()
    sums = torch.zeros(2, 5, 4, dtype=torch.float64)
    for suffix, order in (("l0", range(5)), ("l0_reverse", reversed(range(5)))):
        h = c = torch.zeros(2, 4, dtype=torch.float64)
        for i in order:
            x = extra[:, i] + positions[:, i]
            gates = (x @ w[f"lstm.weight_ih_{suffix}"].T + w[f"lstm.bias_ih_{suffix}"]
                     + h @ w[f"lstm.weight_hh_{suffix}"].T + w[f"lstm.bias_hh_{suffix}"])
            enter, forget, new, out = gates.split(4, dim=1)
            c = sigmoid(forget) * c + sigmoid(enter) * torch.tanh(new)
            h = sigmoid(out) * torch.tanh(c)
            sums[:, i] += h
    expected = extra + sums @ w["projection.weight"].T + w["projection.bias"]
    for index in (0, 1):
        name = "norm" if layout == "paper" else f"norms.{index}"
        got_extra, got_image = adaptor(extra, positions, image, index)
        torch.testing.assert_close(got_extra, norm(expected, w, name), rtol=0, atol=1e-12)
        expected_image = image if layout == "paper" else norm(image, w, name)
        torch.testing.assert_close(got_image, expected_image, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_decoder_layer_equals_its_steps_written_out():
    """Self-attention, then the steps of an encoder layer (Eq. 2 and 3)."""
    B, E, D, M, P, shapes = 2, 3, 8, 2, 2, [(3, 4), (2, 3), (2, 2), (1, 1)]
    N = sum(h * w for h, w in shapes)
    config = Config(dim=D, mlp_dim=12, heads=M, points=P, **ENCODER_DECODER)
    layer = shaken(DecoderLayer(config, depth=1).double(), 0.3)
    tokens, prompts = torch.randn(2, B, E, D, dtype=torch.float64)
    memory, references = torch.randn(B, N, D).double(), torch.rand(B, E, 4, 2).double()
    padding = torch.rand(B, N) < 0.3
    image = ImageTokens(memory, None, None, shapes, padding, None)
    got = layer(tokens, prompts, references, memory, image)
    w = layer.state_dict()
    z = norm(tokens + self_attention(tokens, prompts, w, "self_attention", M), w, "norm0")
    value = linear(memory, w, "attention.value_proj")
    value[padding] = 0
    crossed = ms_deform_attn_reference(
        value.view(B, N, M, D // M), shapes, references,
        linear(z + prompts, w, "attention.sampling_offsets").view(B, E, M, 4, P, 2),
        linear(z + prompts, w, "attention.attention_weights").view(B, E, M, 4, P))
    z = norm(z + linear(crossed, w, "attention.output_proj"), w, "norm1")
    z = norm(z + linear(linear(z, w, "mlp.0").clamp(min=0), w, "mlp.3"), w, "norm2")
    torch.testing.assert_close(got, z, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind, branches", [(EncoderLayer, 2), (DecoderLayer, 3)])
def test_stochastic_depth_and_dropout_reach_every_branch(kind, branches):
    token = torch.randn(2, 8, dtype=torch.float64)  # an extra token and the only token of the image
    tokens, memory = token.expand(300, -1, -1).split(1, dim=1)
    shapes = [(1, 1), (0, 0), (0, 0), (0, 0)]
    rest = (torch.zeros_like(tokens), torch.full((300, 1, 4, 2), 0.5, dtype=torch.float64), memory,
            ImageTokens(memory, None, None, shapes, None, None))
    config = dict(dim=8, mlp_dim=12, heads=2, **ENCODER_DECODER)
    layer = shaken(kind(Config(**config, drop_path=0.5), depth=1).double(), 0.3).train()
    assert len(layer(tokens, *rest)[:, 0].round(decimals=9).unique(dim=0)) == 2 ** branches
    layer = shaken(kind(Config(**config, dropout=1), depth=1).double(), 0.3).train()
    expected = token[0]
    for i in range(3 - branches, 3):
        expected = norm(expected, layer.state_dict(), f"norm{i}")
    torch.testing.assert_close(layer(tokens, *rest)[0, 0], expected, rtol=0, atol=1e-12)
    assert torch.equal(layer.mlp(token[0]), layer.mlp[3].bias)  # inside of the MLP, too


def test_stochastic_depth_keeps_the_mean_and_grows_with_depth():
    path, x = DropPath(0.3), torch.ones(20_000, 1, 2)
    dropped = path(x)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.025)  # 5 standard errors: 0.023
    assert torch.equal(dropped[..., 0], dropped[..., 1])  # a whole branch of an image
    assert path.eval()(x) is x
    layers = Classifier(replace(TINY, drop_path=0.11), 2).encoder.layers
    assert [layer.drop_path.rate for layer in layers] == pytest.approx([0.01 * i for i in range(12)])
