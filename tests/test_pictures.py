"""What is drawn, where: boxes by their pixels, and where queries look against the operator's own output."""
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from deform_attn import MSDeformAttn
from model import VARIANTS, Detector
from pictures import Watch, corruption_chart, draw, grid


def test_pictures_show_boxes_above_the_threshold():
    found = {"scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([0, 1]),
             "boxes": torch.tensor([[100.0, 100, 300, 250], [400, 300, 500, 380]])}
    before = Image.new("RGB", (640, 400), (90, 90, 90))
    changed = np.any(np.asarray(draw(before, found, ["cat", "dog"])) != np.asarray(before), -1)
    assert changed[100, 150:300].all() and changed[100:250, 300].all()  # the outline
    assert not changed[280:, 380:].any()  # nothing where the score is low
    assert grid([before.copy()] * 5).size == (1600, 2 * (245 + 8))  # 640 x 400 shrinks to 392 x 245


def tiny_detector():
    torch.manual_seed(0)
    model = Detector(VARIANTS["tiny"], 3).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from the symmetric start
            p += 0.05 * torch.randn_like(p)
    return model


def test_what_is_watched_is_what_the_operator_samples():
    """Values sampled by grid_sample at the recorded places, weighted as recorded, are the layer's output."""
    model, calls = tiny_detector(), []

    def keep(module, inputs, output):
        calls.append((output, module, *inputs))
    for module in [m for m in model.modules() if isinstance(m, MSDeformAttn)][9:]:
        module.register_forward_hook(keep)
    with torch.no_grad(), Watch(model, 50) as watch:
        model(torch.randn(1, 3, 128, 64))
        assert len(watch.layers) == 3  # 10 to 12
        for (_, locations, weights), (output, m, _, _, memory, shapes, _) in zip(watch.layers, calls):
            torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(50, 4))
            maps = m.value_proj(memory)[0].split([h * w for h, w in shapes])
            expected = 0
            for level, (values, (h, w)) in enumerate(zip(maps, shapes)):
                values = values.view(h, w, 4, 16).permute(2, 3, 0, 1)  # (M, C, h, w)
                places = 2 * locations[:, :, level].transpose(0, 1) - 1  # (M, Q, P, 2)
                samples = F.grid_sample(values, places, align_corners=False)  # (M, C, Q, P)
                expected += (samples * weights[:, :, level].transpose(0, 1)[:, None]).sum(-1)
            expected = m.output_proj(expected.permute(2, 0, 1).flatten(1))
            torch.testing.assert_close(output[0, :50], expected, atol=1e-5, rtol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_reference_points_are_drawn_where_the_queries_ask(monkeypatch, tmp_path):
    """On an image that is enlarged and then padded: the queries' own references, times its size."""
    model, drawn = tiny_detector(), {}
    monkeypatch.setattr(evaluate, "attention_picture",
                        lambda image, layers, padded, found, *_: drawn.update(layers=layers, padded=padded,
                                                                              found=found))
    args = Namespace(image_size=80, attention=3, amp="off")
    image = Image.new("RGB", (60, 40), "teal")  # becomes 120 x 80, padded to 128 x 128
    evaluate.draw_attention(model, image, ["a", "b", "c"], args, torch.device("cpu"), tmp_path / "x.png")
    expected = model.queries(1).references[0].detach() * torch.tensor([60.0, 40.0])
    for references, _, _ in drawn["layers"]:
        torch.testing.assert_close(references * torch.tensor(drawn["padded"]), expected, atol=1e-4, rtol=0)
    queries = drawn["found"]["queries"].tolist()
    assert len(set(queries)) == 3 and (drawn["found"]["scores"].diff() <= 0).all()


def test_attention_picture_shows_the_reference_point(tmp_path):
    model, path = tiny_detector(), tmp_path / "x.png"
    evaluate.draw_attention(model, Image.new("RGB", (64, 64), "black"), ["a", "b", "c"],
                            Namespace(image_size=64, attention=2, amp="off"), torch.device("cpu"), path)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert abs(picture.shape[1] - 3 * 2.6 * 130) < 1  # a column per layer that holds queries
    for colour in ((61, 220, 151), (255, 255, 255)):  # box and cross
        assert (np.abs(picture - colour).max(-1) < 12).any()


def test_chart_has_a_bar_as_high_as_each_number(tmp_path):
    names, row = tuple("abc"), (20.0, 10.0, 30.0, 0.0)
    corruption_chart(names, row, 40.0, None, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    bars = (np.abs(picture - (42, 157, 143)).max(-1) < 12)
    heights = [h for h in bars.sum(0) if h > 20]
    assert abs(max(heights) / min(heights) - 3) < 0.1  # 30 against 10; the bar of 0 is not there


def test_titles_stand_above_their_columns():
    cells = [Image.new("RGB", (50, 50), "red")] * 4
    plain, titled = grid(cells, columns=2), grid(cells, columns=2, titles=["one", "two"])
    assert titled.height == plain.height + 36
    assert (np.asarray(titled)[:36, :400] < 128).any() and (np.asarray(titled)[:36, 400:] < 128).any()
