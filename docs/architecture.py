"""Draws docs/architecture.png, the first picture of the README: python docs/architecture.py"""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PASSED, EXTRA, FRESH, INK, BLUE = "#cfe3f5", "#f6b26b", "#fde3c8", "#22313f", "#2a6fb0"
STRIDES = ("#ffd22e", "#ff7f2a", "#e8384f", "#8a4fff")  # the colours of extras/pictures.py
WIDTH, HEIGHT = 9.0, 6.2  # inches; a text of size 10 is 14 pixels high if the picture is 900 pixels wide


def write(axis, x, y, text, size=10, **options):
    axis.text(x, y, text, size=size, linespacing=1.3, **{"va": "center", "color": INK, **options})


def box(axis, x, y, w, h, text, colour):
    axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.07", fc=colour,
                                  ec=INK, lw=1))
    write(axis, x + w / 2, y + h / 2, text, ha="center")


def arrow(axis, start, end, scale=11, **options):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=scale, shrinkA=0,
                                   shrinkB=0, **{"color": INK, "lw": 1.3, **options}))


def squares(axis, x, y, count, colour, side=0.14):
    for i in range(count):
        axis.add_patch(Rectangle((x + 1.25 * side * i, y), side, side, fc=colour, ec=INK, lw=0.7))


def stage(axis, x, title, question, extra, count, shape, after, heads):
    """One stage from the images (below) to the answer (above), in x .. x + 3.8. Image tokens go up on
    the left, extra tokens on the right. Queries (count > 1) pass the adaptor, a class token does not."""
    left, right, detection = x + 0.7, x + 3.0, count > 1
    write(axis, x, HEIGHT - 0.25, title, 14, weight="bold")
    write(axis, x, HEIGHT - 0.55, question, 11)

    box(axis, x, 0.45, 2, 0.35, "images", "white")
    box(axis, x, 1.15, 2, 0.6, "tokenizer (Table 6):\nstrides 8, 16, 32, 64", PASSED)
    for i, colour in enumerate(STRIDES):
        squares(axis, x + (0.15, 0.93, 1.36, 1.62)[i], 2.0, (4, 2, 1, 1)[i], colour)
    write(axis, x + 2.1, 2.07, "image tokens (3.1)")
    write(axis, left + 0.12, 3.8, "(B, N, D)")
    box(axis, x, 2.4, 2, 0.6, "layers 1 to 6: deformable\nself-attention (Eq. 2, 3)", PASSED)
    box(axis, x, 3.95, 3.8, 0.6, "layers 7 to 12: all tokens sample the\n"
        "image tokens, none the extra tokens (3.2)", PASSED)
    for start, end, text in ((0.8, 1.15, "(B, 3, H, W)"), (1.75, 1.97, ""), (2.17, 2.4, ""),
                             (3.0, 3.95, "")):
        arrow(axis, (left, start), (left, end))
        write(axis, left + 0.12, (start + end) / 2, text)

    write(axis, right, 2.46, extra, ha="center")
    squares(axis, right - (1.25 * count - 0.25) * 0.14 / 2, 2.7, count, EXTRA)
    arrow(axis, (right, 2.87), (right, 3.15 if detection else 3.95))
    if detection:
        box(axis, x + 2.1, 3.15, 1.7, 0.5, "task adaptor (Eq. 5)\nbefore each of 7 to 12", FRESH)
        arrow(axis, (right, 3.65), (right, 3.95))
    write(axis, right + 0.12, 3.8, shape)
    arrow(axis, (right, 4.55), (right, 4.95))
    write(axis, right - 0.12, 4.75, after, ha="right")
    box(axis, x + 1.9, 4.95, 1.9, 0.5, heads, FRESH)


def main() -> None:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    stage(axis, 0.1, "1. Pre-training", "What is in this image?",
          "class token: content\n+ position (Eq. 1)", 1, "(B, 1, D)",
          "after layer 12: (B, 1, D)", "class head (3.2)\n(B, K)")
    stage(axis, 5.1, "2. Fine-tuning", "What is at each of these places?",
          "300 queries: content\n+ visual prompt (Eq. 4)", 7, "(B, Q, D)",
          "after each layer: (B, Q, D)", "class, box heads (3.3)\n(B, Q, K), (B, Q, 4)")
    arrow(axis, (4.0, 4.25), (5.0, 4.25), 20, color=BLUE, lw=3)
    write(axis, 4.5, 4.65, "blue weights,\nstrict=True", ha="center", color=BLUE)
    write(axis, 0.1, 0.17, "B images, N image tokens, Q queries, D channels, K classes. "
          "Orange: new weights in each stage.", 9.5)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
