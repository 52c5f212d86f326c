"""Draws docs/architecture.png, the first picture of the README: python docs/architecture.py"""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

SHARED, EXTRA, FRESH, INK = "#cfe3f5", "#f6b26b", "#fde3c8", "#22313f"
STRIDES = ("#ffd22e", "#ff7f2a", "#e8384f", "#8a4fff")  # the colours of extras/pictures.py


def box(axis, x, y, w, h, text, colour, size=9.5):
    axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", fc=colour,
                                  ec=INK, lw=1))
    axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=size, color=INK,
              linespacing=1.35)


def arrow(axis, *points, colour=INK):
    for a, b in zip(points, points[1:]):
        style = "-|>" if b == points[-1] else "-"
        axis.add_patch(FancyArrowPatch(a, b, arrowstyle=style, mutation_scale=11, color=colour, lw=1.3,
                                       shrinkA=0, shrinkB=0))


def squares(axis, x, y, count, colour, side=0.17):
    for i in range(count):
        axis.add_patch(Rectangle((x + 1.25 * side * i, y), side, side, fc=colour, ec=INK, lw=0.7))


def stage(axis, x, title, extra_name, count, heads, adaptor):
    """One stage from the picture (below) to the answer (above), its encoder at x .. x + 3.4."""
    axis.text(x + 2.6, 7.5 if adaptor else 6.85, title, ha="center", size=12, weight="bold", color=INK)
    box(axis, x, 0.05, 3.4, 0.5, "image", "white")
    box(axis, x, 1.0, 3.4, 0.85, "tokenizer: patch convolutions of\nstrides 8, 16, 32, 64 (Table 6)",
        SHARED)
    for i, colour in enumerate(STRIDES):
        squares(axis, x + (0.1, 1.35, 2.15, 2.85)[i], 2.2, (5, 3, 2, 1)[i], colour)
    axis.text(x + 3.5, 2.28, "image tokens (3.1)", size=8.5, va="center", color=INK)
    box(axis, x, 2.75, 3.4, 0.85, "layers 1 to 6: deformable\nattention among them (Eq. 2, 3)", SHARED)
    box(axis, x, 4.5, 5.2, 0.85, "layers 7 to 12: all tokens sample the image tokens,\n"
        "none samples the extra tokens (3.2)", SHARED)
    squares(axis, x + 3.75, 3.85, count, EXTRA)
    axis.text(x + 3.72, 3.45, extra_name, size=8.5, va="center", color=INK, linespacing=1.35)
    if adaptor:
        box(axis, x + 3.6, 5.6, 1.6, 0.6, "task adaptor\n(Eq. 5)", FRESH, 8.5)
        arrow(axis, (x + 4.1, 5.35), (x + 4.1, 5.6))
        arrow(axis, (x + 4.7, 5.6), (x + 4.7, 5.35))
        axis.text(x + 5.3, 5.9, "shared,\nbefore\neach layer", size=7.5, va="center", color=INK)
    head_x = x + (0.4 if adaptor else 3.6)
    box(axis, head_x, 6.6 if adaptor else 5.95, 2.6 if adaptor else 1.6, 0.6, heads, FRESH, 8.5)
    if adaptor:
        arrow(axis, (x + 1.7, 5.35), (x + 1.7, 6.6))
        axis.text(x + 1.8, 5.95, "queries after\neach of the six", size=7.5, va="center", color=INK)
    else:
        arrow(axis, (x + 4.4, 5.35), (x + 4.4, 5.95))
    for a, b in ((0.55, 1.0), (1.85, 2.15), (2.42, 2.75), (3.6, 4.5)):
        arrow(axis, (x + 1.7, a), (x + 1.7, b))
    middle = x + 3.75 + (1.25 * (count - 1) + 1) * 0.17 / 2
    arrow(axis, (middle, 4.07), (middle, 4.5))


def main() -> None:
    figure = Figure(figsize=(11.6, 6.6), layout="constrained")
    axis = figure.subplots()
    stage(axis, 0, "Pre-training: what is in this image?", "one class token:\ncontent + position (Eq. 1)",
          1, "class (3.2)", False)
    stage(axis, 7.2, "Fine-tuning: what is at each of these places?", "300 object queries: content +\n"
          "position, a visual prompt (Eq. 4)", 7, "classes and boxes (3.3)", True)
    axis.add_patch(FancyArrowPatch((5.35, 4.9), (7.1, 4.9), arrowstyle="-|>", mutation_scale=18,
                                   color="#2a6fb0", lw=3))
    axis.text(6.22, 5.2, "all blue weights,\nstrictly", ha="center", va="bottom", size=9,
              color="#2a6fb0", weight="bold")
    axis.set(xlim=(-0.1, 13.3), ylim=(-0.05, 7.8), aspect="equal")
    axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
