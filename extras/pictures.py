"""Pictures: training items, training curves, detections on images and sheets of them (Figure 3),
classified images, the places where the queries look, the bar chart of COCO-C, and the parts of a slide.

Nothing here detects. Detections come as {"scores" (n,), "labels" (n,), "boxes" (n, 4) xyxy in pixels}.
"""
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from deform_attn import MSDeformAttn, sampling_locations_and_weights
from engine import InputError
from extras import tables
from extras.shapes import hsv

STRIDE_COLOURS = ("#ffd22e", "#ff7f2a", "#e8384f", "#8a4fff")  # of the samples at strides 8, 16, 32, 64
RIGHT, WRONG = (255, 255, 255), (255, 99, 71)  # colours of answers
SHEET = 16  # lines of text as high as a picture of a sheet: 14-pixel text if it is shown 900 pixels wide


def new_figure(width: float, height: float, text: float = 13):
    """A figure of this size in inches; text: its size in points. matplotlib is imported at first use,
    because that takes half a second."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["font.size"] = text
    return Figure(figsize=(width, height), layout="constrained")


def colour_of(label: int) -> tuple[int, int, int]:
    """A bright RGB colour. Labels step around the colour circle by the golden ratio."""
    return tuple(int(v) for v in 255 * hsv(label * 0.618034, 0.85, 1.0))


@functools.cache
def characters_in(font: str) -> set[int]:
    """The characters that a font file has outlines of."""
    from matplotlib.ft2font import FT2Font
    try:
        face = FT2Font(font)
        return set(face.get_charmap()) if face.scalable else set()
    except (OSError, RuntimeError):  # a broken file
        return set()


@functools.cache
def system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts
    return sorted(f for f in findSystemFonts() if "LastResort" not in f)  # that one has boxes only


def with_font(text: str) -> tuple[str, str]:
    """The text and a font file that has its characters. Without a font they are escaped: \\u6b62."""
    import matplotlib
    usual, needed = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", set(map(ord, text))
    if needed <= characters_in(usual):
        return text, usual
    font = next((f for f in system_fonts() if needed <= characters_in(f)), None)
    return (text, font) if font else (text.encode("unicode_escape").decode(), usual)


def overlap(a: tuple, b: tuple) -> float:
    """The area that two boxes xyxy share."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(0, width) * max(0, height)


def draw_boxes(image: Image.Image, boxes: list[tuple], lines: int = 32) -> Image.Image:
    """A copy of the picture with labelled boxes. Labels avoid each other and the boxes.

    boxes: [(xyxy in pixels or None for the whole picture, label, RGB colour)], the last on top; an empty
    label gives a thin line. lines: so many lines of text are as long as the picture's longer side. Text
    is smaller if there are more than six labels.
    """
    scale = max(1, round(400 / max(image.size)))  # enlarges small pictures, so that the text can be read
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, side = ImageDraw.Draw(picture), max(picture.size)
    places = [(0, 0, *picture.size) if box is None else [float(v) * scale for v in box]
              for box, _, _ in boxes]
    for place, (_, label, colour) in zip(places, boxes):
        pen.rectangle(place, outline=colour, width=max(1, side // lines // (6 if label else 12)))
    named = [(place, label, colour) for place, (_, label, colour) in zip(places, boxes) if label]
    size = max(14, side / lines / max(1, len(named) / 6) ** 0.5)
    labels = []  # (place, text, font, colour)
    for (x0, y0, x1, y1), label, colour in named[::-1]:  # the last has the first choice
        text, file = with_font(label)
        width = ImageFont.truetype(file, size).getlength(text) + 6
        font = ImageFont.truetype(file, max(4, size * min(1, picture.width / width)))
        w, h = font.getlength(text) + 6, sum(font.getmetrics())
        xs = [max(0, min(x, picture.width - w)) for x in (x0, x1 - w)]
        ys = [max(0, min(y, picture.height - h)) for y in (y0 - h, y1, y0, y1 - h)]  # above, below, in
        spot = min(((x, y, x + w, y + h) for y in ys for x in xs),
                   key=lambda spot: 99 * sum(overlap(spot, used) for used, *_ in labels)
                   + sum(overlap(spot, place) for place in places))
        labels.append((spot, text, font, colour))
    for place, text, font, colour in labels[::-1]:  # no line crosses a label
        pen.rectangle(place, fill=colour)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 110
        pen.text((place[0] + 3, place[1]), text, "black" if bright else "white", font)
    return picture


def draw_detections(image: Image.Image, found: dict[str, Tensor], classes: list[str],
                    threshold: float = 0.3, lines: int = 32) -> Image.Image:
    """A copy of the picture with the boxes that score at least `threshold`, their classes and scores."""
    rows = zip(*(found[k].tolist() for k in ("boxes", "labels", "scores")))
    boxes = [(box, f"{classes[label]} {score:.2f}", colour_of(label))
             for box, label, score in rows if score >= threshold]
    return draw_boxes(image, boxes[::-1], lines)  # the best is drawn last, on top


def sheet_of(pictures: list[Image.Image], columns: int = 4, cell: int = 400,
             titles: list[str] | None = None) -> Image.Image:
    """One sheet of pictures, at most `cell` pixels a side, with titles above the columns."""
    pictures = [ImageOps.contain(p, (cell - 8, cell - 8)) for p in pictures]
    columns, height = min(columns, len(pictures)), max(p.height for p in pictures) + 8
    top = 40 if titles else 0
    sheet = Image.new("RGB", (columns * cell, top + -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, font) in enumerate(map(with_font, titles or [])):
        at = (i * cell + cell / 2, top / 2)
        pen.text(at, title, "black", ImageFont.truetype(font, 26), anchor="mm")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * cell + 4, top + i // columns * height + 4))
    return sheet


def results_sheet(dataset, results: list[dict], count: int = 8, threshold: float = 0.3) -> Image.Image:
    """The first images of a DetectionSet with true boxes and detections, given as COCO result dicts."""
    label_of = {c: i for i, c in enumerate(dataset.category_ids)}
    pictures = []
    for record in dataset.records[:count]:
        mine = [r for r in results if r["image_id"] == record.id and r["score"] >= threshold]
        boxes = []
        for r in sorted(mine, key=lambda r: r["score"]):
            (x, y, w, h), label = r["bbox"], label_of[r["category_id"]]
            boxes.append(((x, y, x + w, y + h), f"{dataset.classes[label]} {r['score']:.2f}",
                          colour_of(label)))
        boxes += [(box, "", "white") for box in record.boxes.tolist()]
        pictures.append(draw_boxes(record.image(), boxes, SHEET))
    return sheet_of(pictures, titles=["thin white line: truth"])


def training_sheet(dataset, indices: list[int], path: Path) -> None:
    """Writes a sheet of items of a set as the model sees them, with their boxes and classes."""
    pictures = []
    for index in indices:
        try:
            image, objects = dataset.item_to_draw(index)
        except InputError:  # a broken image: the run stops when it gets there
            continue
        boxes = [(box, dataset.classes[label], colour_of(label)) for box, label in objects]
        pictures.append(draw_boxes(image, boxes, SHEET))
    if pictures:
        sheet_of(pictures).save(path)


def predictions_sheet(pictures: list[Image.Image], probabilities: Tensor, labels: list[int],
                      classes: list[str]) -> Image.Image:
    """Pictures with their best class and its probability. A wrong one is red and names the right class.
    probabilities: (n, K)."""
    cells = []
    for picture, p, label in zip(pictures, probabilities, labels):
        best = p.argmax().item()
        text = f"{classes[best]} {p[best]:.2f}" + ("" if best == label else f", not {classes[label]}")
        cells.append(draw_boxes(picture, [(None, text, RIGHT if best == label else WRONG)], SHEET))
    return sheet_of(cells)


def draw_curves(log: list[dict], scores: tuple[str, ...], path: Path) -> None:
    """Draws a run's log: losses on the left, the named validation scores on the right."""
    from matplotlib.ticker import LogLocator
    losses = [e for e in log if "loss" in e]
    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    for key in losses[0] if losses else ():
        if key.startswith("loss"):
            left.plot([e["step"] for e in losses], [e[key] for e in losses], label=key,
                      lw=2 if key == "loss" else 1)
    for key in scores:
        measured = [e for e in log if e.get(key, -1) >= 0]  # AP is -1 on a set without objects
        right.plot([e["step"] for e in measured], [100 * e[key] for e in measured], "o-", label=key)
    left.set(xlabel="step", yscale="log", title="training loss")
    left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    right.set(xlabel="step", ylim=(0, 100), title="validation", ylabel="percent")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------- where the queries look (3.3)

class WatchSampling:
    """A context manager that records where the first `count` extra tokens sample while the model runs.

    `layers` gets one entry per layer with extra tokens: (reference points (E, 2), locations (E, M, L,
    P, 2), weights (E, M, L, P)) of the first image of a batch. Places are in [0, 1] of the padded
    image. The weights of a token and head sum to 1."""

    def __init__(self, model: torch.nn.Module, count: int):
        self.model, self.count, self.layers = model, count, []

    def __enter__(self):
        modules = [m for m in self.model.modules() if isinstance(m, MSDeformAttn)]
        holding = modules[self.model.encoder.config.entry_layer - 1:]  # extra tokens come first in them
        self.hooks = [m.register_forward_pre_hook(self.record) for m in holding]
        return self

    def record(self, module: MSDeformAttn, inputs: tuple) -> None:
        query, references, _, shapes = inputs[:4]
        query, references = query[:1, :self.count], references[:1, :self.count]
        locations, weights = sampling_locations_and_weights(shapes, references, *module.sampling(query))
        self.layers.append((references[0, :, 0].cpu(), locations[0].float().cpu(), weights[0].float().cpu()))

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


DOTS = dict(alpha=0.8, linewidths=0)


def draw_samples(axis, reference: Tensor, locations: Tensor, weights: Tensor, padded: tuple[float, float],
                 scale: float = 1) -> None:
    """Draws on a matplotlib axis where one token samples: its reference point (2,) as a +, its locations
    (M, L, P, 2) as dots. padded: as in `attention_picture`. scale: enlarges all areas."""
    for level, colour in enumerate(STRIDE_COLOURS):
        at = locations[:, level].flatten(0, 1) * torch.tensor(padded)  # (M P, 2)
        axis.scatter(*at.T - 0.5, s=300 * scale * weights[:, level].flatten(), c=colour, **DOTS)
    axis.scatter(*(reference * torch.tensor(padded) - 0.5)[:, None], marker="+", s=90 * scale, c="white",
                 linewidths=2 * scale ** 0.5, label="reference point")


def attention_picture(image: Image.Image, layers: list, padded: tuple[float, float],
                      found: dict[str, Tensor], classes: list[str], first_layer: int, path: Path) -> None:
    """A row per detection, below its class and score; a column per layer. Each cell shows the box,
    the query's reference point (+) and its sampling locations as dots. A dot's area is proportional
    to the attention weight, its colour gives the level.

    Args:
        layers: of a WatchSampling. padded: (width, height) of the padded input in pixels of `image`.
        found: the detections, with "queries" (n,), the query of each. path: the PNG to write.
    """
    rows, columns, (w, h) = len(found["queries"]), len(layers), image.size
    cell = min(2.6, 8.4 / columns)  # inches
    figure = new_figure(cell * columns + 2.3, max(3, rows * (cell * min(h / w, 4) + 0.3) + 0.3))
    axes = figure.subplots(rows, columns, squeeze=False)
    grey = np.asarray(ImageOps.grayscale(image)) * 0.75 + 40  # so that the dots stand out
    values = zip(*(found[k].tolist() for k in ("queries", "labels", "scores", "boxes")))
    for row, (query, label, score, (x0, y0, x1, y1)) in enumerate(values):
        for column, (references, locations, weights) in enumerate(layers):
            axis = axes[row, column]
            axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
            axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#3ddc97", lw=1.5, label="box")
            draw_samples(axis, references[query], locations[query], weights[query], padded)
            axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5), xticks=[], yticks=[],
                     xlabel=f"layer {first_layer + column}" if row == rows - 1 else "")
        text, font = with_font(f"{classes[label]} {score:.2f}")
        axes[row, 0].set_title(text, loc="left", font=Path(font), fontsize=13, parse_math=False)
    for level, colour in enumerate(STRIDE_COLOURS):
        axes[0, 0].scatter([], [], s=60, c=colour, label=f"stride {8 << level}", **DOTS)
    for weight in (0.02, 0.1, 0.3):
        axes[0, 0].scatter([], [], s=300 * weight, c="white", label=f"weight {weight}", **DOTS)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", facecolor="0.5")
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------------- COCO-C (Table 4)

def corruption_chart(names: tuple[str, ...], row: tuple[float, ...], clean: float,
                     paper: tuple[float, ...] | None, path: Path) -> None:
    """Bars of a row of Table 4 (the mean, then AP per corruption, in percent) and a line at the clean
    AP. The paper's row, if there is one, is drawn as marks."""
    labels = ["mean", *(n.replace("_", " ") for n in names)]
    figure = new_figure(11, 4.2)
    axis = figure.subplots()
    axis.bar(range(len(row)), row, color=["#264653"] + ["#2a9d8f"] * len(names), label="this model")
    axis.axhline(clean, color="black", ls="--", lw=1, label=f"clean images: {tables.cell(clean)}")
    if paper:
        axis.plot(range(len(paper)), paper, "D", color="#e76f51", ms=5, label="paper, Table 4")
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axis.set(ylabel="AP, mean of the severities", ylim=(0, max(1, axis.get_ylim()[1])))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------- parts of a slide (docs/walkthrough.py)

def new_slide(title: str, rows: int = 1, columns: int = 1):
    """A matplotlib figure of 16:9 with large letters, and its axes."""
    figure = new_figure(12.8, 7.2, text=20)
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.15)
    figure.suptitle(title, fontsize=28)
    return figure, figure.subplots(rows, columns)


def keep_slide(figure, path: Path) -> Image.Image:
    """Saves a slide. Returns it as a picture, which a notebook shows without a backend of matplotlib."""
    figure.savefig(path, dpi=150)
    print(f"slide: {path}\n")
    return Image.open(path)


def show(axis, image: Image.Image, title: str = "", pale: bool = False) -> None:
    """Draws a picture without ticks. pale: so that dots and lines stand out."""
    if pale:
        image = Image.blend(ImageOps.grayscale(image).convert("RGB"), image, 0.3)
        image = Image.blend(image, Image.new("RGB", image.size, "grey"), 0.3)
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title, autoscale_on=False)


def outline(axis, box: Tensor, colour: str, style: str = "-", text: str = "") -> None:
    """Draws a box (4,) xyxy in pixels, and a text in its middle."""
    x0, y0, x1, y1 = (box - 0.5).tolist()
    axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], style, color=colour, lw=5, clip_on=False)
    if text:
        label = axis.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center", parse_math=False)
        label.set_bbox({"facecolor": colour, "edgecolor": "none"})


def draw_table(axis, header: list[str], rows: list[list[str]], marked: tuple = (),
               colour: str = "white") -> None:
    """A table in large letters. marked: (row, column) of the cells in `colour`."""
    axis.axis("off")
    table = axis.table(rows, colLabels=header, cellLoc="center", bbox=(0, 0.05, 1, 0.9))
    table.auto_set_font_size(False)
    table.set_fontsize(20)
    for row, column in marked:
        table[row + 1, column].set_facecolor(colour)
