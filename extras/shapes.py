"""The generated data: pictures of eight kinds of shapes on a mottled ground, generated from a seed.

Detection has up to three objects in a picture, classification one large object. Both use the same
shapes, so that pre-training can help detection, in minutes and without a download. In `shapes` the
eight kinds share four colours, in `shapes-hard` two: colour finds an object, but only its shape gives
the class. With fewer colours recognition is harder and pre-training helps more.
"""
import numpy as np
from PIL import Image, ImageDraw


def polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """(n, 2): a regular polygon in the unit circle, or a star if every
    second corner is at radius `inner`."""
    n = corners if inner == 1 else 2 * corners
    angle = 2 * np.pi * np.arange(n) / n - np.pi / 2
    radius = np.where(np.arange(n) % 2 == 1, inner, 1.0)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


CIRCLE, ARM = polygon(40), 0.34
SHAPES: dict[str, list[np.ndarray]] = {  # outline, then holes
    "circle": [CIRCLE],
    "ring": [CIRCLE, CIRCLE * 0.55],
    "triangle": [polygon(3)],
    "square": [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85],
    "hexagon": [polygon(6)],
    "star": [polygon(5, 0.42)],
    "cross": [np.array([[-ARM, -1], [ARM, -1], [ARM, -ARM], [1, -ARM], [1, ARM], [ARM, ARM],
                        [ARM, 1], [-ARM, 1], [-ARM, ARM], [-1, ARM], [-1, -ARM], [-ARM, -ARM]])],
    "arrow": [np.array([[0, -1], [0.9, 0], [0.35, 0], [0.35, 1], [-0.35, 1], [-0.35, 0], [-0.9, 0]])],
}
SHAPE_PIXELS, SUPERSAMPLE = 64, 4
EMBEDDED_SETS = {"shapes": 4, "shapes-hard": 2}  # name of the data -> number of colours that the kinds share


def shape_mask(name: str, centre: np.ndarray, radius: float, angle: float, stretch: float,
               pixels: int) -> np.ndarray:
    """(pixels, pixels): coverage in [0, 1] of a shape, anti-aliased. `stretch` is its width over its
    height before turning, as a square root."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (pixels * SUPERSAMPLE,) * 2)
    for i, outline in enumerate(SHAPES[name]):
        corners = (outline * (stretch, 1 / stretch) @ turn * radius + centre) * SUPERSAMPLE
        ImageDraw.Draw(mask).polygon([tuple(c) for c in corners], fill=0 if i else 255)
    return np.asarray(mask.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def background(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """(pixels, pixels, 3) in 0..255: a mottled, dull ground with lines and blotches."""
    ground = np.full((pixels, pixels, 3), rng.uniform(60, 190), np.float32)
    for cells in (2, 4, 8, 16):
        noise = rng.normal(0, 14, (cells, cells, 1)) + rng.normal(0, 5, (cells, cells, 3))  # mostly grey
        channels = [Image.fromarray(np.ascontiguousarray(noise[..., c], dtype=np.float32))
                    .resize((pixels, pixels), Image.Resampling.BICUBIC) for c in range(3)]
        noise = np.stack([np.asarray(c) for c in channels], -1)
        ground += noise
    clutter = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(clutter)
    for _ in range(rng.integers(2, 7)):
        grey = rng.uniform(30, 220) + rng.normal(0, 8, 3)
        x, y, dx, dy = rng.uniform((0, 0, -20, -20), (pixels, pixels, 20, 20))
        draw.line((x, y, x + dx, y + dy), fill=tuple(int(v) for v in grey.clip(0, 255)),
                  width=int(rng.integers(1, 4)))
    return np.asarray(clutter, dtype=np.float32)


def shape_scene(rng: np.random.Generator, pixels: int = SHAPE_PIXELS, objects: int | None = None,
                colours: int = 4) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """One picture -> (RGB image, boxes xyxy (n, 4), labels (n,)).

    There are `objects` objects, by default up to three. objects=1 gives a larger one, as in ImageNet's
    pictures. The kinds share `colours` colours. An object may hide a fifth of another one. A box is
    tight around the visible part.
    """
    canvas, owner, names = background(rng, pixels), np.full((pixels, pixels), -1), list(SHAPES)
    count, labels, sizes = objects or int(rng.choice(4, p=[0.04, 0.4, 0.34, 0.22])), [], []
    radii = np.log((0.3, 0.48) if objects == 1 else (0.2, 0.42))  # of the picture
    for i in range(count):
        label = int(rng.integers(len(names)))
        for _ in range(20):
            radius = pixels * np.exp(rng.uniform(*radii))
            centre = rng.uniform(radius * 0.7, pixels - radius * 0.7, 2)
            mask = shape_mask(names[label], centre, radius, rng.uniform(-0.4, 0.4),
                              np.exp(rng.uniform(-0.15, 0.15)), pixels)
            covered = np.where(mask > 0.5, i, owner)
            if all((covered == k).sum() >= 0.8 * size for k, size in enumerate(sizes)):
                break
        else:
            break  # there is no room: the picture has fewer objects
        hue = label * colours // len(names) / colours + rng.normal(0, 0.02)
        hue = hue if rng.random() < 0.97 else rng.random()
        colour = 255 * hsv(hue, rng.uniform(0.7, 1), rng.uniform(0.7, 1))
        canvas = canvas + mask[..., None] * (colour + rng.normal(0, 9, canvas.shape) - canvas)
        owner = covered
        labels.append(label)
        sizes.append((mask > 0.5).sum())
    boxes = []
    for i in range(len(labels)):
        y, x = np.nonzero(owner == i)
        boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
    image = Image.fromarray((canvas + rng.normal(0, 4, canvas.shape)).clip(0, 255).astype(np.uint8))
    return image, np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue on a circle of circumference 1 -> (3,) RGB in [0, 1]."""
    k = (np.array([5, 3, 1]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


# ---------------------------------------------------------------------- the sets, as data.py reads them

def detection_pictures(data: str, split: str, limit: int | None) -> tuple[list[Image.Image], dict]:
    """The generated detection set: 8,000 training and 1,000 validation pictures of 64 x 64 pixels. A
    picture's generator is seeded by its split and number, so the splits share no picture.

    Returns:
        the pictures, and their annotations in COCO format.
    """
    pictures, annotations = [], []
    for i in range({"train": 8000, "val": 1000}[split])[:limit]:
        rng = np.random.default_rng((20220425, split == "val", i))
        image, boxes, labels = shape_scene(rng, colours=EMBEDDED_SETS[data])
        pictures.append(image)
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1,
                                "iscrowd": 0, "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "area": (x1 - x0) * (y1 - y0)})
    truth = {"images": [{"id": i, "width": image.width, "height": image.height, "file_name": f"{i}.png"}
                        for i, image in enumerate(pictures, 1)],
             "annotations": annotations,
             "categories": [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]}
    return pictures, truth


def classification_pictures(data: str, split: str,
                            limit: int | None) -> tuple[list[Image.Image], np.ndarray]:
    """The generated classification set: 8,000 training and 400 validation pictures of 64 x 64 pixels
    with one shape in each, and the labels (n,) int64."""
    pictures, all_labels = [], []
    for i in range({"train": 8000, "val": 400}[split])[:limit]:
        rng = np.random.default_rng((20220426, split == "val", i))
        image, _, labels = shape_scene(rng, objects=1, colours=EMBEDDED_SETS[data])
        pictures.append(image)
        all_labels.append(labels[0])
    return pictures, np.array(all_labels)
