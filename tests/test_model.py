"""The model's structure: what depends on what, what passes between the stages, how many parameters; the
adaptors of Table 3 and the decoder layer of Table 7 against their definitions, written out."""
import math
from dataclasses import replace

import pytest
import torch

from model import (VARIANTS, Classifier, Config, DecoderLayer, Detector, DropPath, EncoderLayer, ImageTokens,
                   InputError, TaskAdaptor, Tokenizer, sine_positions)
from released import ReleasedAdaptor, released_layout

TINY = replace(VARIANTS["tiny"], entry_layer=7)  # where the paper has it
ENCODER_DECODER = dict(structure="encoder-decoder", adaptor="none")
ROWS = {"none": dict(adaptor="none"),  # of Table 3, and what they change of the default
        "Bi-LSTM per layer": dict(adaptor="bilstm", adaptor_per_layer=True),
        "Bi-LSTM": dict(adaptor="bilstm"),
        "self-attention per layer": dict(adaptor_per_layer=True), "self-attention": {}}
LAYOUTS = {"paper": lambda model: model, "released": released_layout}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def count(kind, config, classes, layout="paper"):
    with torch.device("meta"):  # shapes alone, so that no weights have to be drawn
        return parameters(LAYOUTS[layout](kind(config, classes)))


def shaken(model, noise=0.05):
    """Away from the symmetric initialisation, lest zeros hide a mistake."""
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model.eval()


@pytest.fixture(params=[{}, ENCODER_DECODER], ids=["encoder-only", "encoder-decoder"])
def detector(request):
    torch.manual_seed(0)
    return shaken(Detector(replace(TINY, **request.param), 5))


def test_table_6_tokenizer_sizes_and_parameters():
    levels = Tokenizer(VARIANTS["lite"])(torch.zeros(1, 3, 224, 224))
    assert [tuple(x.shape) for x in levels] == [(1, s, s, 256) for s in (28, 14, 7, 3)]
    # Counted by hand from Table 6: convolutions 480,000, norms 1,536, projections 197,632.
    assert parameters(Tokenizer(VARIANTS["lite"])) == 679_168


@pytest.mark.parametrize("variant, classify, detect", [
    ("lite", 10_168_618 - 148_032, 10_484_118 - 148_032 - 5 * 2 * 256),
    ("small", 22_568_490 - 221_760, 23_337_110 - 221_760 - 5 * 2 * 384),
    ("base", 33_900_090 - 346_320, 35_137_574 - 346_320 - 5 * 2 * 480)])
def test_parameter_counts_of_the_paper_layout(variant, classify, detect):
    """The authors' modules with Table 6's tokenizer, less the masked fifth level and, in the detector, less
    five of the six LayerNorms after the adaptor."""
    config = VARIANTS[variant]
    assert count(Classifier, config, 1000) == classify
    assert count(Detector, config, 80) == detect


@pytest.mark.parametrize("variant, official, masked", [("lite", 10_731_478, 148_032),
                                                       ("small", 23_929_622, 221_760),
                                                       ("base", 36_025_382, None)])
def test_parameter_counts_of_the_released_layout(variant, official, masked):
    config = VARIANTS[variant]
    if masked is None:  # 6 layers x heads x 4 points x (2 offsets + 1 weight) x (D inputs + 1 bias)
        masked = 6 * config.heads * 4 * 3 * (config.dim + 1)
    assert count(Detector, config, 80, "released") == official - masked


def test_parameter_counts_of_tables_3_and_7_with_the_authors_modules():
    """Less the masked fifth level, which decoders do not have. FP-EncDec was derived from their modules."""
    lite = VARIANTS["lite"]
    for row, official in (("none", 10_465_238), ("self-attention per layer", 12_047_318)):
        assert count(Detector, replace(lite, **ROWS[row]), 80, "released") == official - 148_032
    assert count(Detector, replace(lite, **ENCODER_DECODER), 80, "released") == 11_899_286


def test_parameter_counts_of_the_bi_lstm():
    """By hand: in either direction four gates of 64 channels from 256 + 64 and two biases; a projection."""
    one = 2 * 4 * 64 * (256 + 64 + 2) + 64 * 256 + 256
    for layout, row, lstms, norms in (
            ("paper", "Bi-LSTM", 1, 1), ("paper", "Bi-LSTM per layer", 6, 6),
            ("released", "Bi-LSTM", 1, 6), ("released", "Bi-LSTM per layer", 6, 6)):
        none, config = (replace(VARIANTS["lite"], **ROWS[r]) for r in ("none", row))
        more = count(Detector, config, 80, layout) - count(Detector, none, 80, layout)
        assert more == lstms * one + norms * 512


def test_lite_rounds_as_tables_3_and_7():
    """Table 3 in the released layout, but for its first row (11M in the paper); Table 7 in both."""
    lite, table_3 = VARIANTS["lite"], {"none": 10, "Bi-LSTM per layer": 11, "Bi-LSTM": 11,
                                       "self-attention per layer": 12, "self-attention": 11}
    for row, millions in table_3.items():
        assert round(count(Detector, replace(lite, **ROWS[row]), 80, "released") / 1e6) == millions
    for layout, tokens in ((layout, tokens) for layout in LAYOUTS for tokens in (1, 300)):
        config = replace(lite, **ENCODER_DECODER, class_tokens=tokens)
        assert round(count(Detector, config, 80, layout) / 1e6) == 12
        assert round(count(Classifier, config, 1000, layout) / 1e6) == 12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, ENCODER_DECODER, dict(ENCODER_DECODER, class_tokens=9)])
def test_encoder_passes_from_classifier_to_detector(layout, changes):
    config = replace(TINY, **changes)
    classifier, detector = LAYOUTS[layout](Classifier(config, 7)), LAYOUTS[layout](Detector(config, 5))
    detector.encoder.load_state_dict(classifier.encoder.state_dict(), strict=True)
    layers = {k.split(".")[1] for k in classifier.encoder.state_dict() if ".self_attention." in k}
    assert layers == ({"6", "7", "8", "9", "10", "11"} if changes else set())  # the decoder layers go along
    for a, b in zip(classifier.encoder.parameters(), detector.encoder.parameters()):
        assert torch.equal(a, b)
    assert classifier(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_outputs_have_the_documented_shapes(detector):
    out = detector(torch.randn(2, 3, 70, 130))
    assert out["pred_logits"].shape == (2, 50, 5) and out["pred_boxes"].shape == (2, 50, 4)
    assert len(out["aux_outputs"]) == 5 and all(o.keys() == {"pred_logits", "pred_boxes"}
                                                for o in out["aux_outputs"])
    assert 0 <= out["pred_boxes"].min() and out["pred_boxes"].max() <= 1


@torch.no_grad()
def test_image_tokens_do_not_depend_on_queries(detector):
    images = torch.randn(1, 3, 128, 64)
    _, before = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
    logits = detector(images)["pred_logits"]
    for p in detector.queries.parameters():
        p.normal_()
    _, after = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
    assert torch.equal(before, after)
    assert not torch.allclose(logits, detector(images)["pred_logits"])  # while the answer does


@torch.no_grad()
def test_decoder_layers_leave_the_image_tokens_alone(detector):
    seen = []
    detector.encoder.layers[5].register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, image = detector.encoder(torch.randn(1, 3, 64, 64), detector.queries(1), adapt=detector.adapt)
    assert torch.equal(image, seen[0]) == (detector.encoder.config.structure == "encoder-decoder")


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(96, 128), (97, 70), (64, 200), (50, 40)])
def test_an_image_is_detected_alike_alone_and_padded(detector, h, w):
    image = torch.randn(1, 3, h, w)
    alone = detector(image)
    batch, mask = torch.zeros(2, 3, 160, 210), torch.ones(2, 160, 210, dtype=torch.bool)
    batch[0, :, :h, :w], mask[0, :h, :w] = image[0], False
    batch[1], mask[1] = torch.randn(3, 160, 210), False
    padded = detector(batch, mask)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(padded[key][:1], alone[key], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [*ROWS.values(), ENCODER_DECODER])
def test_queries_see_each_other_only_through_adaptor_or_decoder(changes):
    torch.manual_seed(0)
    detector = shaken(Detector(replace(TINY, **changes), 5))
    images = torch.randn(1, 3, 64, 64)

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


def test_sine_positions_of_a_hand_computed_case():
    valid = torch.tensor([[[True, True, False]]])  # one row, two valid columns of three
    got = sine_positions(valid, 4, torch.float64)[0, 0]  # (3, 4): sin y, cos y, sin x, cos x
    two_pi = 6.283185307179586
    for x, place in ((0, 0.25), (1, 0.75)):  # centres of two columns, in parts of the image's width
        angle = torch.tensor(place * two_pi, dtype=torch.float64)
        torch.testing.assert_close(got[x, 2:], torch.stack([angle.sin(), angle.cos()]), rtol=0, atol=1e-5)
        torch.testing.assert_close(got[x, 1], torch.tensor(-1.0, dtype=torch.float64), rtol=0, atol=1e-5)


def test_boxes_start_at_the_reference_points():
    detector = Detector(TINY, 3)
    boxes = detector(torch.randn(1, 3, 64, 64))["pred_boxes"]
    torch.testing.assert_close(boxes[..., :2], detector.queries(1).references, rtol=0, atol=1e-4)
    torch.testing.assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.1192029), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_table_3_train_and_pass_on_their_state(row, layout):
    torch.manual_seed(0)
    config, images = replace(TINY, **ROWS[row]), torch.randn(1, 3, 96, 64)
    detector, other = (LAYOUTS[layout](Detector(config, 3)) for _ in range(2))
    shaken(detector)(images)["pred_logits"].square().sum().backward()
    adaptors = detector.adaptor if config.adaptor_per_layer else [] if row == "none" else [detector.adaptor]
    weights = [p for adaptor in adaptors for p in adaptor.parameters()]
    assert len({p.data_ptr() for p in weights}) == len(weights) and bool(weights) == (row != "none")
    assert all(p.grad.abs().max() > 0 for p in weights)
    other.load_state_dict(detector.state_dict(), strict=True)
    assert torch.equal(other.eval()(images)["pred_boxes"], detector(images)["pred_boxes"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self-attention", "bilstm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_shared_adaptor_serves_all_layers_and_a_layers_own_only_that_one(kind, layout):
    """Seen in the first layer whose queries change with an adaptor."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    for own in (False, True):
        config = replace(TINY, adaptor=kind, adaptor_per_layer=own)
        detector = shaken(LAYOUTS[layout](Detector(config, 3)))

        def states():
            layers, _ = detector.encoder(images, detector.queries(1), adapt=detector.adapt)
            return [extra.content for extra in layers]
        before = states()
        for step, adaptor in enumerate(detector.adaptor if own else [detector.adaptor]):
            saved = {k: v.clone() for k, v in adaptor.state_dict().items()}
            shaken(adaptor)
            assert [torch.equal(a, b) for a, b in zip(before, states())] == [i < step for i in range(6)]
            adaptor.load_state_dict(saved)
        assert step == (5 if own else 0)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


@torch.no_grad()
@pytest.mark.parametrize("layout, kind", [("paper", TaskAdaptor), ("released", ReleasedAdaptor)])
def test_bi_lstm_adaptor_equals_its_gates_written_out(layout, kind):
    torch.manual_seed(0)
    adaptor = shaken(kind(Config(dim=16, heads=2, adaptor="bilstm", layers=3, entry_layer=2)).double(), 0.3)
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
    for step in (0, 1):
        name = "norm" if layout == "paper" else f"norms.{step}"
        got_extra, got_image = adaptor(extra, positions, image, step)
        torch.testing.assert_close(got_extra, norm(expected, w, name), rtol=0, atol=1e-12)
        expected_image = image if layout == "paper" else norm(image, w, name)
        torch.testing.assert_close(got_image, expected_image, rtol=0, atol=1e-12)


def sampled(value, shapes, references, offsets, logits):
    """Deformable DETR's Eq. 3 of one image, pixel by pixel. value: (N, M, C), references: (E, L, 2),
    offsets: (E, M, L, P, 2), logits: (E, M, L, P) -> (E, M * C)."""
    output = torch.zeros(len(references), *value.shape[1:], dtype=value.dtype)
    for q, m in ((q, m) for q in range(len(references)) for m in range(value.shape[1])):
        weights, start = logits[q, m].exp() / logits[q, m].exp().sum(), 0
        for l, (h, w) in enumerate(shapes):
            for offset, weight in zip(offsets[q, m, l].tolist(), weights[l]):
                x = references[q, l, 0].item() * w + offset[0] - 0.5
                y = references[q, l, 1].item() * h + offset[1] - 0.5
                for i in range(h * w):
                    near = max(0, 1 - abs(x - i % w)) * max(0, 1 - abs(y - i // w))
                    output[q, m] += weight * near * value[start + i, m]
            start += h * w
    return output.flatten(1)


@torch.no_grad()
def test_decoder_layer_equals_its_steps_written_out():
    torch.manual_seed(0)
    B, E, D, M, P, shapes = 2, 3, 8, 2, 2, [(3, 4), (2, 3), (2, 2), (1, 1)]
    N = sum(h * w for h, w in shapes)
    config = Config(dim=D, mlp_dim=12, heads=M, points=P, **ENCODER_DECODER)
    layer = shaken(DecoderLayer(config, depth=1).double(), 0.3)
    tokens, positions = torch.randn(2, B, E + N, D, dtype=torch.float64)
    references = torch.rand(B, E + N, 4, 2, dtype=torch.float64)
    padding = torch.rand(B, N) < 0.3
    image = ImageTokens(tokens[:, E:], None, None, shapes, padding, None)
    got = layer(tokens[:, :E], positions[:, :E], references[:, :E], tokens[:, E:], image)
    w = layer.state_dict()

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]
    for b in range(B):
        z, prompts = tokens[b, :E], positions[b, :E]
        q, k, v = ((x @ weight.T + bias).unflatten(-1, (M, -1)) for x, weight, bias in zip(
            (z + prompts, z + prompts, z), w["self_attention.in_proj_weight"].split(D),
            w["self_attention.in_proj_bias"].split(D)))  # (E, M, D / M) each
        related = torch.empty(E, M, D // M, dtype=torch.float64)
        for i, m in ((i, m) for i in range(E) for m in range(M)):
            weights = torch.stack([(q[i, m] @ k[j, m] / math.sqrt(D // M)).exp() for j in range(E)])
            related[i, m] = sum(weights[j] / weights.sum() * v[j, m] for j in range(E))
        z = norm(z + linear(related.flatten(1), "self_attention.out_proj"), w, "norm0")
        value = linear(tokens[b, E:], "attention.value_proj")
        value[padding[b]] = 0
        crossed = sampled(value.view(N, M, D // M), shapes, references[b, :E],
                          linear(z + prompts, "attention.sampling_offsets").view(E, M, 4, P, 2),
                          linear(z + prompts, "attention.attention_weights").view(E, M, 4, P))
        z = norm(z + linear(crossed, "attention.output_proj"), w, "norm1")
        z = norm(z + linear(linear(z, "mlp.0").clamp(min=0), "mlp.3"), w, "norm2")
        torch.testing.assert_close(got[b], z, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind, branches", [(EncoderLayer, 2), (DecoderLayer, 3)])
def test_stochastic_depth_and_dropout_reach_every_branch(kind, branches):
    torch.manual_seed(0)
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


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    left = DropPath(0.4)(torch.ones(20_000, 1, 1))
    assert sorted(left.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    assert left.mean().item() == pytest.approx(1, abs=0.03)  # 5 standard errors: 0.029


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, ENCODER_DECODER])
def test_class_tokens_are_pooled_before_the_head(changes):
    torch.manual_seed(0)
    classifier = shaken(Classifier(replace(TINY, class_tokens=3, **changes), 4).double())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    states, _ = classifier.encoder(images, classifier.class_token(2))
    a, b, c = states[-1].content.unbind(1)
    logits = (a + b + c) / 3 @ classifier.class_head.weight.T + classifier.class_head.bias
    torch.testing.assert_close(classifier(images), logits, rtol=0, atol=1e-12)
    if not changes:  # without self-attention among them, each token answers as if it were alone
        alone, whole = Classifier(TINY, 4).double().eval(), classifier.state_dict()
        answers = []
        for i in range(3):
            one = {k: whole[k][i:i + 1] for k in ("class_token.content", "class_token.position")}
            alone.load_state_dict({**whole, **one})
            answers.append(alone(images))
        torch.testing.assert_close(classifier(images), sum(answers) / 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("change, words", [
    (dict(heads=7), "7 heads"), (dict(queries=0), "0 queries"), (dict(class_tokens=0), "0 class tokens"),
    (dict(entry_layer=0), "choose one of 1 to 12"), (dict(entry_layer=13), "choose one of 1 to 12"),
    (dict(adaptor="lstm"), "'lstm': choose self-attention, bilstm or none"),
    (dict(adaptor="none", adaptor_per_layer=True), "one per layer"),
    (dict(structure="decoder"), "'decoder': choose encoder-only or encoder-decoder"),
    (dict(structure="encoder-decoder"), "self-attention in an encoder-decoder"),
    (dict(structure="encoder-decoder", adaptor="bilstm"), "bilstm in an encoder-decoder"),
    (dict(ENCODER_DECODER, entry_layer=1), "choose one of 2 to 12"),
    (dict(ENCODER_DECODER, adaptor_per_layer=True), "one per layer")])
def test_impossible_sizes_are_refused(change, words):
    with pytest.raises(InputError, match=words) as refused:
        replace(TINY, **change)
    assert "\n" not in str(refused.value)


def test_configs_of_older_checkpoints_still_say_what_they_said():
    old = dict(dim=256, mlp_dim=1024, heads=8, tokenizer_dim=192, layers=12, entry_layer=7, points=4,
               queries=300, dropout=0.0, drop_path=0.0, adaptor="self-attention")
    assert Config(**old) == VARIANTS["lite"]
    names = Detector(Config(**old), 2).state_dict().keys()
    parts = ("attention.in_proj_", "attention.out_proj.", "norm.")
    assert {k for k in names if k.startswith("adaptor.")} == {
        f"adaptor.{part}{kind}" for part in parts for kind in ("weight", "bias")}


def test_variants_are_those_of_table_1():
    sizes = ("layers", "dim", "mlp_dim", "heads", "tokenizer_dim", "queries")
    rows = {n: tuple(getattr(c, size) for size in sizes) for n, c in VARIANTS.items()}
    assert rows["lite"] == (12, 256, 1024, 8, 192, 300)
    assert rows["small"] == (12, 384, 1536, 8, 384, 300)
    assert rows["base"] == (12, 480, 1920, 10, 384, 300)
    assert Config() == VARIANTS["lite"]
