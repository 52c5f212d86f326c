"""The model's structure: what depends on what, what passes between the stages, how many parameters there
are."""
import pytest
import torch
from dataclasses import replace

from model import VARIANTS, Classifier, Config, Detector, InputError, Tokenizer, sine_positions
from released import released_layout

TINY = VARIANTS["tiny"]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def detector():
    torch.manual_seed(0)
    model = Detector(TINY, 5).eval()
    for p in model.parameters():  # away from the symmetric initialisation, lest zeros hide a mistake
        p.data += 0.05 * torch.randn_like(p)
    return model


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
    assert parameters(Classifier(config, 1000)) == classify
    assert parameters(Detector(config, 80)) == detect


@pytest.mark.parametrize("variant, official, masked", [("lite", 10_731_478, 148_032),
                                                       ("small", 23_929_622, 221_760),
                                                       ("base", 36_025_382, None)])
def test_parameter_counts_of_the_released_layout(variant, official, masked):
    config = VARIANTS[variant]
    if masked is None:  # 6 layers x heads x 4 points x (2 offsets + 1 weight) x (D inputs + 1 bias)
        masked = 6 * config.heads * 4 * 3 * (config.dim + 1)
    assert parameters(released_layout(Detector(config, 80))) == official - masked


@pytest.mark.parametrize("layout", ["paper", "released"])
def test_encoder_passes_from_classifier_to_detector(layout):
    classifier, detector = Classifier(TINY, 7), Detector(TINY, 5)
    if layout == "released":
        released_layout(classifier), released_layout(detector)
    detector.encoder.load_state_dict(classifier.encoder.state_dict(), strict=True)
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
    _, before = detector.encoder(images, detector.queries(1), adaptor=detector.adaptor)
    logits = detector(images)["pred_logits"]
    for p in detector.queries.parameters():
        p.normal_()
    _, after = detector.encoder(images, detector.queries(1), adaptor=detector.adaptor)
    assert torch.equal(before, after)
    assert not torch.allclose(logits, detector(images)["pred_logits"])  # while the answer does


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
def test_queries_see_each_other_only_through_the_adaptor(detector):
    images = torch.randn(1, 3, 64, 64)

    def change_of_query_0():
        before = detector(images)["pred_logits"][0, 0]
        detector.queries.content[1] += 1
        return (detector(images)["pred_logits"][0, 0] - before).abs().max()
    assert change_of_query_0() > 1e-4
    detector.adaptor = None
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


@pytest.mark.parametrize("change", [dict(heads=7), dict(entry_layer=0), dict(entry_layer=13),
                                    dict(queries=0),
                                    dict(adaptor="lstm")])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(InputError):
        replace(TINY, **change)


def test_variants_are_those_of_table_1():
    rows = {n: (c.layers, c.dim, c.mlp_dim, c.heads, c.tokenizer_dim, c.queries) for n,
            c in VARIANTS.items()}
    assert rows["lite"] == (12, 256, 1024, 8, 192, 300)
    assert rows["small"] == (12, 384, 1536, 8, 384, 300)
    assert rows["base"] == (12, 480, 1920, 10, 384, 300)
    assert Config() == VARIANTS["lite"]
