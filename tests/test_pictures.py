"""The pictures: boxes by their pixels, class names in any script, and where the queries look against the
operator's output."""
import math
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.ndimage import label

import evaluate
from deform_attn import MSDeformAttn
from engine import InputError
from extras import pictures
from model import VARIANTS, Detector


def differs(picture, colour):
    """(H, W): the distance of each pixel from a colour."""
    return np.abs(np.asarray(picture.convert("RGB")).astype(int) - colour).max(-1)


def test_pictures_show_boxes_above_the_threshold():
    found = {"scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([0, 1]),
             "boxes": torch.tensor([[100.0, 100, 300, 250], [400, 300, 500, 380]])}
    grey = (90, 90, 90)
    picture = pictures.draw_detections(Image.new("RGB", (640, 400), grey), found, ["cat", "dog"])
    changed = differs(picture, grey) > 0
    assert changed[100, 150:300].all() and changed[100:250, 300].all()  # the outline
    assert not changed[280:, 380:].any()  # the box with the low score
    found["scores"][1], found["boxes"][1] = 0.4, torch.tensor([100.0, 180, 300, 300])  # the best is on top
    boxes = [(box, text, pictures.colour_of(i)) for i, (box, text) in enumerate(
        zip(found["boxes"].tolist(), ("cat 0.90", "dog 0.40")))]
    expected = pictures.draw_boxes(picture, boxes[::-1])
    assert np.array_equal(pictures.draw_detections(picture, found, ["cat", "dog"]), expected)


def test_sheets_have_columns_with_titles():
    cells = [Image.new("RGB", (640, 400), "red")] * 5
    assert pictures.sheet_of(cells).size == (1600, 2 * (245 + 8))  # a picture shrinks to 392 x 245
    plain, titled = (pictures.sheet_of(cells, 2, titles=titles) for titles in (None, ["one", "two"]))
    assert titled.height == plain.height + 40
    assert (np.asarray(titled)[:40, :400] < 128).any() and (np.asarray(titled)[:40, 400:] < 128).any()


@pytest.mark.parametrize("side", [64, 800])
def test_training_sheet_has_boxes_with_readable_labels(side, tmp_path):
    grey, box = Image.new("RGB", (side, side), "grey"), np.array([0.3, 0.5, 0.8, 0.9]) * side

    class Items:
        classes = ["cat", "dog"]

        def item_to_draw(self, index):
            if index == 0:
                raise InputError("broken")
            return grey, [(box, 0) if index % 2 else (None, 1)]
    pictures.training_sheet(Items(), list(range(9)), tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (1600, 800)  # eight
    cell = sheet.crop((4, 4, 396, 396))
    y, x = np.nonzero(differs(cell, pictures.colour_of(0)) < 40)
    assert np.array([x.min(), x.max(), y.max()]) / 392 == pytest.approx([0.3, 0.8, 0.9], abs=0.01)
    # The label is above the box, and high enough if the sheet is shown 900 pixels wide.
    assert 900 / 1600 * (0.5 * 392 - y.min()) >= 14
    cell = differs(sheet.crop((404, 4, 796, 396)), pictures.colour_of(1)) < 40
    assert cell[4:14].sum() > 4 * cell[50:60].sum() > 0  # a label at the top, and a frame
    dog = pictures.sheet_of([pictures.draw_boxes(grey, [(None, "dog", pictures.colour_of(1))], 16)])
    assert np.array_equal(sheet.crop((400, 0, 800, 400)), dog)


def test_results_have_the_truth_as_white_lines():
    record = SimpleNamespace(id=7, image=lambda: Image.new("RGB", (392, 392), "grey"),
                             boxes=np.array([[100.0, 150, 300, 350]]))
    others = [SimpleNamespace(id=9, image=record.image, boxes=np.zeros((0, 4)))] * 8
    dataset = SimpleNamespace(records=[record, *others], category_ids=[5, 4, 3],
                              classes=["cat", "cow", "dog"])
    results = [{"image_id": 7, "category_id": 3, "bbox": [50, 60, 200, 120], "score": 0.9},
               {"image_id": 7, "category_id": 5, "bbox": [200, 200, 150, 150], "score": 0.2},
               {"image_id": 8, "category_id": 5, "bbox": [200, 200, 150, 150], "score": 0.9}]
    sheet = pictures.results_sheet(dataset, results)
    assert sheet.size == (1600, 840)  # the first eight
    cell = sheet.crop((4, 44, 396, 436))
    white = differs(cell, 255) == 0
    y, x = np.nonzero(white)
    assert (x.min(), y.min(), x.max(), y.max()) == (100, 150, 300, 350)
    assert white[150, 100:301].all() and white[150:351, 300].all() and not white[155:345, 105:295].any()
    y, x = np.nonzero(differs(cell, pictures.colour_of(2)) == 0)
    assert (x.min(), x.max(), y.max()) == (50, 250, 180)
    assert not (differs(cell, pictures.colour_of(0)) < 40).any()
    results[1].update(score=0.5, bbox=[100, 70, 150, 150])
    boxes = [((100, 70, 250, 220), "cat 0.50", pictures.colour_of(0)),  # the best is on top
             ((50, 60, 250, 180), "dog 0.90", pictures.colour_of(2)), (record.boxes[0], "", "white")]
    cell = pictures.results_sheet(dataset, results).crop((4, 44, 396, 436))
    assert np.array_equal(cell, pictures.draw_boxes(record.image(), boxes, 16))


def test_wrong_answers_are_red_and_name_the_right_class():
    grey, answers = Image.new("RGB", (400, 400), "grey"), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    expected = [pictures.draw_boxes(grey, [(None, text, colour)], 16) for text, colour in (
        ("cat 0.90", (255, 255, 255)), ("dog 0.80, not cat", (255, 99, 71)))]
    sheet = pictures.predictions_sheet([grey, grey], answers, [0, 0], ["cat", "dog"])
    assert np.array_equal(sheet, pictures.sheet_of(expected))


def test_labels_hide_neither_boxes_nor_labels():
    """The inside of the boxes stays, though one lies where the other's label would be. Boxes in the same
    place show all their labels."""
    grey, blue = Image.new("RGB", (400, 400), "grey"), (0, 0, 99)
    boxes = [(100, 100, 220, 180), (100, 60, 220, 100), (200, 180, 300, 300)]
    picture = pictures.draw_boxes(grey, [(box, "a name", blue) for box in boxes])
    for x0, y0, x1, y1 in boxes:
        assert (differs(picture.crop((x0 + 3, y0 + 3, x1 - 3, y1 - 3)), 128) == 0).all()
    one, four = (differs(pictures.draw_boxes(grey, [(boxes[0], "a name", blue)] * n), 255) < 50
                 for n in (1, 4))
    assert four.sum() == pytest.approx(4 * one.sum(), rel=0.1)


@pytest.mark.parametrize("colour, text", [((255, 230, 0), 0), ((60, 0, 160), 255)])
def test_text_is_black_on_bright_colours_and_white_on_dark_ones(colour, text):
    grey = Image.new("RGB", (400, 400), "grey")
    picture = pictures.draw_boxes(grey, [((9, 99, 300, 300), "MM", colour)])
    black, white = ((differs(picture, v) < 20).any() for v in (0, 255))
    assert (black, white) == (text == 0, text == 255)


def test_long_names_are_whole():
    """The second half of the text is in the picture, too."""
    picture = pictures.draw_boxes(Image.new("RGB", (400, 400), "grey"),
                                  [(None, "a very long name of a class " * 2, (0, 0, 99))], 16)
    white = differs(picture, 255) < 50
    assert white[:, :200].sum() == pytest.approx(white[:, 200:].sum(), rel=0.1)
    assert not white[:, 399].any()


@pytest.mark.parametrize("box", [(0, 0, 9, 9), (90, 0, 99, 9), (90, 90, 99, 99), (-5, -5, 105, 105)])
def test_labels_are_inside_the_picture(box):
    def white(box):  # the number of pixels in white, the colour of the text
        grey = Image.new("RGB", (100, 100), "grey")
        return (differs(pictures.draw_boxes(grey, [(box, "a name", (0, 0, 99))]), 255) < 50).sum()
    assert white(box) == white((20, 50, 90, 90)) > 0


# ------------------------------------------------------------------------------------------ class names

def draw_name(where, name, tmp_path):
    """The pixels of a picture with a class name or title in it."""
    grey = Image.new("RGB", (64, 48), "grey")
    found = {"queries": torch.tensor([0]), "labels": torch.tensor([0]), "scores": torch.tensor([0.5]),
             "boxes": torch.tensor([[8.0, 8, 56, 40]])}
    if where == "detections":
        return np.asarray(pictures.draw_detections(grey, found, [name]))
    if where == "title":
        return np.asarray(pictures.sheet_of([grey], titles=[name]))
    if where == "answer":
        return np.asarray(pictures.predictions_sheet([grey], torch.ones(1, 1), [0], [name]))
    layer = (torch.zeros(1, 2), torch.zeros(1, 1, 4, 1, 2), torch.zeros(1, 1, 4, 1))
    pictures.attention_picture(grey, [layer], (64, 48), found, [name], 7, tmp_path / "x.png")
    return np.asarray(Image.open(tmp_path / "x.png"))


PLACES = pytest.mark.parametrize("where", ["detections", "title", "answer", "attention"])


@PLACES
def test_letters_of_other_scripts_are_drawn(where, tmp_path):
    """The sign for a missing letter would be the same for all."""
    names = ("é", "à", "ж", "λ", "\U0010ffff")
    assert len({draw_name(where, name, tmp_path).tobytes() for name in names}) == 5


@PLACES
@pytest.mark.filterwarnings("error")  # as of a missing glyph
def test_names_without_a_font_are_escaped(where, monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "system_fonts", lambda: [], raising=False)
    chinese, escaped = (draw_name(where, name, tmp_path) for name in ("止血", r"\u6b62\u8840"))
    assert np.array_equal(chinese, escaped)


def test_system_fonts_are_searched(monkeypatch, tmp_path):
    import matplotlib
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    stix = f"{matplotlib.get_data_path()}/fonts/ttf/STIXNonUni.ttf"
    fonts = [stix, "LastResort.ttf", str(tmp_path / "absent.ttf"), str(tmp_path / "broken.ttf")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: fonts)
    pictures.system_fonts.cache_clear()
    usual = pictures.with_font("a")[1]
    private = chr(min(pictures.characters_in(stix) - pictures.characters_in(usual)))
    assert pictures.with_font(private) == (private, stix)
    assert pictures.with_font(private + "止")[0].isascii()
    pictures.system_fonts.cache_clear()


def test_dollars_are_no_formulas(tmp_path):
    draw_name("attention", r"$\frac{$", tmp_path)  # as a formula, it has an error


# ------------------------------------------------------------------------------------ curves and charts

@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **options: figures.append(figure)
                        or save(figure, *to, **options))
    return figures


def heights(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def texts(labels):
    return [label.get_text() for label in labels]


def test_curves_are_the_losses_and_the_scores_in_percent(drawn, tmp_path):
    """A score of -1 means that there is nothing to find. It is left out."""
    log = [dict(step=5, AP=0.25, loss=3.0, loss_class=2.0), dict(step=7, AP=0.5, loss=0.5, loss_class=0.25),
           dict(step=9, AP=-1.0)]
    for entries in (log, log[2:], []):
        pictures.draw_curves(entries, ("AP",), tmp_path / "a.png")
    left, right = drawn[0].axes
    assert heights(left) == {"loss": [3, 0.5], "loss_class": [2, 0.25]}
    assert heights(right) == {"AP": [25, 50]} and left.get_yscale() == "log"
    assert all(list(line.get_xdata()) == [5, 7] for line in (*left.lines, *right.lines))
    assert right.get_ylim() == (0, 100) and right.get_ylabel() == "percent"


@pytest.mark.parametrize("value", [math.nan, -100.0])
def test_chart_without_numbers(value, drawn, tmp_path):
    for row in ((value,) * 4, (20.0, value, 30.0, 0.0)):
        pictures.corruption_chart(tuple("abc"), row, value, row, tmp_path / "x.png")
    for axis in (figure.axes[0] for figure in drawn):
        assert "clean images: -" in axis.get_legend_handles_labels()[1] and axis.get_ylim()[0] == 0


def test_chart_has_a_bar_as_high_as_each_number(drawn, tmp_path):
    paper = (1.0, 2.0, 3.0, 4.0)
    pictures.corruption_chart(tuple("abc"), (20.0, 10.0, 30.0, 0.0), 40.0, paper, tmp_path / "x.png")
    assert [bar.get_height() for bar in drawn[0].axes[0].patches] == [20, 10, 30, 0]
    assert heights(drawn[0].axes[0]) == {"clean images: 40.0": [40, 40], "paper, Table 4": [1, 2, 3, 4]}
    assert texts(drawn[0].axes[0].get_xticklabels()) == ["mean", "a", "b", "c"]


# ------------------------------------------------------------------------------ where the queries look

@pytest.fixture
def model():
    torch.manual_seed(0)
    return shaken(Detector(replace(VARIANTS["tiny"], queries=50), 3))


@torch.no_grad()
def test_the_recorded_samples_give_the_output_of_the_layer(model):
    """Values sampled by grid_sample at the recorded places, with the recorded weights."""
    calls = []

    def keep(module, inputs, output):
        calls.append((output, module, *inputs))
    for module in [m for m in model.modules() if isinstance(m, MSDeformAttn)][3:]:
        module.register_forward_hook(keep)
    with pictures.WatchSampling(model, 50) as watch:
        model(torch.randn(2, 3, 128, 64))  # the first image is recorded
    assert len(watch.layers) == len(calls) == 3  # 4 to 6
    for (_, locations, weights), (output, m, _, _, memory, shapes, *_) in zip(watch.layers, calls):
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


def test_reference_points_are_drawn_in_pixels_of_the_image(model, monkeypatch, tmp_path):
    """Also if the image is enlarged and then padded: to 120 x 80, and to 128 x 128."""
    drawn = {}

    def keep(image, layers, padded, found, *_):
        drawn.update(layers=layers, padded=torch.tensor(padded), found=found)
    monkeypatch.setattr(pictures, "attention_picture", keep)
    with torch.no_grad():
        model.class_head.weight[1] = model.class_head.weight[0]  # the best queries are found twice
        model.class_head.bias[1] = model.class_head.bias[0]
        for parameter in (model.queries.content, model.queries.position):  # and each has a twin
            parameter[25:] = parameter[:25]
    args = Namespace(image_size=80, attention=3, amp="off")
    image = Image.new("RGB", (60, 40), "teal")
    evaluate.draw_attention(model, image, list("abc"), args, tmp_path / "x.png")
    expected = model.queries(1).references[0].detach() * torch.tensor([60.0, 40.0])
    for references, _, _ in drawn["layers"]:
        torch.testing.assert_close(references * drawn["padded"], expected, atol=1e-4, rtol=0)
    queries = drawn["found"]["queries"].tolist()
    assert len({q % 25 for q in queries}) == 3 and (drawn["found"]["scores"].diff() <= 0).all()
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5.1], [0, 0, 10, 4.9]])  # an IoU of 0.51 and 0.49
    found = {"boxes": boxes, **{k: torch.arange(3) for k in ("queries", "labels", "scores")}}
    monkeypatch.setattr(evaluate, "detect_image", lambda *_: (model(torch.zeros(1, 3, 64, 64)), found)[1])
    evaluate.draw_attention(model, image, list("abc"), args, tmp_path / "x.png")
    assert drawn["found"]["queries"].tolist() == [0, 2]


def test_attention_picture_has_the_dots_in_their_places(tmp_path):
    """One query, and one sample with all the weight, on level 0."""
    locations, weights = torch.tensor([0.75, 0.125]).expand(1, 1, 4, 1, 2), torch.zeros(1, 1, 4, 1)
    weights[0, 0, 0, 0] = 1
    layer = (torch.tensor([[0.5, 0.1875]]), locations, weights)
    found = {"queries": torch.tensor([0]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5]),
             "boxes": torch.tensor([[8.0, 8, 56, 40]])}
    image = Image.new("RGB", (64, 48), "black")
    path = tmp_path / "x.png"
    pictures.attention_picture(image, [layer, layer], (64, 128), found, ["a", "b"], 7, path)
    picture = Image.open(path)
    picture = picture.crop((0, 0, int(2.6 * 130), picture.height))  # the first layer
    y, x = np.nonzero(differs(picture, (61, 220, 151)) < 12)  # the box
    inside = picture.crop((x.min(), y.min(), x.max(), y.max()))
    dot = 0.8 * np.array([255, 210, 46]) + 0.2 * 40  # alpha 0.8 on the grey of black pictures
    for colour, place in (((255, 255, 255), (32, 24)), (dot, (48, 16))):  # the cross and the sample
        y, x = np.nonzero(differs(inside, colour) < 12)
        centre = np.array([x.mean() / inside.width * 48 + 8, y.mean() / inside.height * 32 + 8])
        assert centre == pytest.approx(place, abs=1)


def test_attention_picture_has_a_row_per_detection_and_a_column_per_layer(drawn, tmp_path):
    layers = [(torch.rand(3, 2), torch.rand(3, 2, 4, 1, 2), torch.rand(3, 2, 4, 1)) for _ in range(2)]
    found = {"queries": torch.tensor([2, 1]), "labels": torch.tensor([1, 0]),
             "scores": torch.tensor([0.5, 0.4]), "boxes": torch.rand(2, 4)}
    pictures.attention_picture(Image.new("RGB", (64, 48)), layers, (64, 128), found, ["a", "b"], 7, tmp_path)
    axes = np.array(drawn[0].axes).reshape(2, 2)
    assert [axis.get_title("left") for axis in axes[:, 0]] == ["b 0.50", "a 0.40"]
    assert [axis.get_xlabel() for axis in axes[1]] == ["layer 7", "layer 8"]
    for row, query in enumerate((2, 1)):
        for column, (_, locations, weights) in enumerate(layers):
            for level, dots in enumerate(axes[row, column].collections[:4]):
                places = locations[query, :, level, 0] * torch.tensor([64, 128]) - 0.5
                assert np.allclose(dots.get_offsets(), places)
                assert np.allclose(dots.get_sizes(), 300 * weights[query, :, level, 0])
                assert np.allclose(dots.get_facecolor()[0, :3], to_rgb(pictures.STRIDE_COLOURS[level]))
    names = texts(drawn[0].legends[0].get_texts())
    assert names[2:6] == [f"stride {stride}" for stride in (8, 16, 32, 64)]


def test_dots_are_as_large_as_those_of_the_legend(tmp_path):
    """The areas of connected parts, in pixels, of samples with the weights of the legend."""
    weights, locations = torch.zeros(1, 1, 4, 3), torch.full((1, 1, 4, 3, 2), 0.5)
    weights[0, 0, 0] = torch.tensor([0.02, 0.1, 0.3])
    locations[0, 0, 0, :, 0] = torch.tensor([0.2, 0.5, 0.8])
    found = {"queries": torch.tensor([0]), "labels": torch.tensor([0]), "scores": torch.tensor([0.5]),
             "boxes": torch.tensor([[0.0, 0, 64, 64]])}
    pictures.attention_picture(Image.new("RGB", (64, 64)), [(torch.zeros(1, 2), locations, weights)],
                               (64, 64), found, ["a"], 7, tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png")
    yellow = 0.8 * np.array([255, 210, 46]) + 0.2 * 40  # alpha 0.8 on the grey of black pictures
    areas = []
    for part, colour in (((0, 0, 350, picture.height), yellow),
                         ((350, 0, *picture.size), 0.8 * 255 + 0.2 * 153)):  # on the grey of the legend
        area = np.bincount(label(differs(picture.crop(part), colour) < 15)[0].ravel())[1:]
        areas.append(np.sort(area[area > 8]))
    assert areas[0] == pytest.approx(areas[1], rel=0.15, abs=2) and len(areas[0]) == 3
    assert areas[1][2] / areas[1][1] == pytest.approx(3, rel=0.15)
