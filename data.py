"""Detection data: where images and boxes come from, the training transforms, and batches.

Three sources give the same thing, a `DetectionSet`: `shapes`, generated from a seed; `coco`, as COCO 2017
unpacks; and any folder in COCO format. Transforms are Deformable DETR's (the paper, 4.1, follows its
implementation). Boxes are absolute (x0, y0, x1, y1) in pixels inside this file and normalised (cx, cy, w, h)
when they leave it.
"""
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model import InputError

# a picture of 90 megapixels or more is refused
warnings.simplefilter("error", Image.DecompressionBombWarning)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, on 0..255 RGB


# ---------------------------------------------------------------------------------------------------- images

def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from any file that pillow reads: grey, palette, RGBA (alpha dropped), CMYK, 16 bit,
    EXIF-rotated.

    Args:
        size: (width, height) that an annotation file states. Where only the unrotated picture has it, the
            annotator's program ignored the EXIF rotation, and so do we.
    Raises:
        InputError: naming the file, if it is absent, truncated, no picture or too large to be one.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if size is not None and upright.size != size and image.size == size:
                upright = image.copy()
        if upright.mode.startswith("I"):  # 16-bit grey; pillow's own conversion would clip it to 8 bits
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8))
        return upright.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} is missing") from None
    except Exception as e:  # pillow's decoders raise a dozen kinds of error on damaged files
        raise InputError(f"image {path} cannot be read ({' '.join(str(e).split())}): replace or "
                         f"remove it") from None


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, normalised with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# ---------------------------------------------------------------------------- transforms (Deformable DETR's)
# Each takes and returns (PIL image, boxes (n, 4) xyxy in pixels, labels (n,)).

def flip(image, boxes, labels):
    w = image.width
    return ImageOps.mirror(image), np.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]],
                                            1), labels


def resize(image, boxes, labels, short: int, long: int):
    """Keeps the aspect ratio: the short side becomes `short`, or less where the long side would exceed
    `long`."""
    w, h = image.size
    scale = min(short / min(w, h), long / max(w, h))
    new_w, new_h = max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))
    if (new_w, new_h) != (w, h):
        image = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    return image, boxes * np.array([new_w / w, new_h / h] * 2), labels


def crop(image, boxes, labels, x: int, y: int, w: int, h: int):
    """Boxes are clipped to the crop; those with nothing left are dropped, so that there may be none."""
    boxes = np.clip(boxes - np.array([x, y, x, y]), 0, np.array([w, h, w, h]))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image.crop((x, y, x + w, y + h)), boxes[keep], labels[keep]


@dataclass
class Transform:
    """`augment`: "paper" (flip, then either a random size or a random crop at a random size), "flip" or
    "none".

    `image_size` is the short side at test time. All other sizes of the recipe (training sides 480..800,
    crops 384..600, long side 1333) scale with it, so that the same recipe serves 800-pixel COCO and
    256-pixel experiments.
    """
    image_size: int = 800
    augment: str = "none"

    def scaled(self, side: int) -> int:
        return max(1, round(side * self.image_size / 800))

    def __call__(self, image, boxes, labels, rng: np.random.Generator):
        sample = (image, boxes, labels)
        if self.augment != "none" and rng.random() < 0.5:
            sample = flip(*sample)
        short = 800
        if self.augment == "paper":
            if rng.random() < 0.5:
                sample = resize(*sample, self.scaled(int(rng.choice([400, 500, 600]))), self.scaled(4200))
                w, h = (int(rng.integers(min(s, self.scaled(384)), min(s, self.scaled(600)), endpoint=True))
                        for s in sample[0].size)
                x, y = (int(rng.integers(0, s - c, endpoint=True)) for s, c in zip(sample[0].size, (w, h)))
                sample = crop(*sample, x, y, w, h)
            short = int(rng.choice(range(480, 801, 32)))
        return resize(*sample, self.scaled(short), self.scaled(1333))


# -------------------------------------------------------------------------------------------- detection sets

@dataclass
class Record:
    """One image and its objects: boxes (n, 4) float64 xyxy in pixels, labels (n,) int64 counted from 0."""
    id: int
    source: Path | Image.Image
    size: tuple[int, int]  # (width, height)
    boxes: np.ndarray
    labels: np.ndarray

    def image(self) -> Image.Image:
        return read_image(self.source, self.size) if isinstance(self.source, Path) else self.source


class DetectionSet(Dataset):
    """Items: (image (3, H, W) float32, target), target = {"labels": (n,) int64, "boxes": (n, 4) float32
    cxcywh in [0, 1], "image_id": int, "size": (width, height) of the original}. Augmentation depends on
    (seed, epoch, index) only, whatever the number of workers. `ground_truth` is the COCO-format dict that
    the metric reads, crowd and all."""

    def __init__(self, records: list[Record], ground_truth: dict, name: str, transform: Transform
                 | None = None,
                 seed: int = 0):
        self.records, self.ground_truth, self.name = records, ground_truth, name
        self.transform, self.seed, self.epoch = transform or Transform(), seed, 0
        categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        self.category_ids = [c["id"] for c in categories]  # label -> category id, which may have gaps

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int):
        record = self.records[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        image, boxes, labels = self.transform(record.image(), record.boxes, record.labels, rng)
        w, h = image.size
        x0, y0, x1, y1 = boxes.T
        boxes = np.stack([(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], 1)
        target = {"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes).float(),
                  "image_id": record.id,
                  "size": record.size}
        return to_tensor(image), target

    def check_images(self, indices: range | None = None) -> None:
        """Decodes every image file (or those of some indices) once, so that a broken one stops a run before
        its first step and not in epoch 3. Raises InputError naming the first that is missing, broken or not
        of the annotated size."""
        def check(record: Record) -> str | None:
            try:
                image = record.image()
            except InputError as e:
                return str(e)
            if image.size != record.size:
                return (f"image {record.source} is {image.width} x {image.height}, but the annotations say "
                        f"{record.size[0]} x {record.size[1]}: its boxes cannot be trusted")
        records = self.records if indices is None else [self.records[i] for i in indices]
        files = [r for r in records if isinstance(r.source, Path)]
        with ThreadPoolExecutor() as pool:  # pillow decodes outside the interpreter's lock
            for error in tqdm(pool.map(check, files), f"checking {self.name}", len(files), leave=False,
                              unit="image"):
                if error:
                    pool.shutdown(cancel_futures=True)
                    raise InputError(error)


def pad_batch(samples: list) -> tuple[Tensor, Tensor | None, list[dict]]:
    """Items of different size -> images (B, 3, H, W), zeros at the right and bottom; mask (B, H, W), True
    there, or None if nothing is padded; targets."""
    images, targets = zip(*samples)
    h, w = (max(x.shape[d] for x in images) for d in (1, 2))
    batch, mask = images[0].new_zeros(len(images), 3, h, w), torch.ones(len(images), h, w, dtype=torch.bool)
    for x, padded, m in zip(images, batch, mask):
        padded[:, :x.shape[1], :x.shape[2]] = x
        m[:x.shape[1], :x.shape[2]] = False
    return batch, mask if mask.any() else None, list(targets)


def micro_batches(samples: list, size: int) -> list:
    """A batch's items -> padded batches of at most `size` images."""
    return [pad_batch(samples[i:i + size]) for i in range(0, len(samples), size)]


# ----------------------------------------------------------------------------------------------- COCO format

def load_annotations(path: Path) -> dict:
    """A COCO-format annotation file, checked: {"images", "annotations", "categories"} with what detection
    needs. Missing areas and crowd flags are filled in, masks left out. Raises InputError, naming the entry,
    at the first thing wrong."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        raise InputError(f"annotations {path} are missing") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"annotations {path} are not JSON ({e})") from None
    except OSError as e:
        raise InputError(f"annotations {path} cannot be read ({e.strerror})") from None
    if not isinstance(content, dict):
        raise InputError(f"annotations {path} are not in COCO format: a {type(content).__name__}, not an "
                         f"object with images")
    for key, needed in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name")),
                        ("annotations", ("image_id", "category_id", "bbox"))):
        if not isinstance(content.get(key), list):
            raise InputError(f"annotations {path} lack the list {key!r}")
        for i, entry in enumerate(content[key]):
            for k in needed:
                if not isinstance(entry, dict) or k not in entry:
                    raise InputError(f"annotations {path}: {key}[{i}] lacks the key {k!r}")
    sizes = {}
    for image in content["images"]:
        if not all(type(image[k]) is int and 0 < image[k] < 1e6 for k in ("width", "height")):
            raise InputError(f"annotations {path}: image {image['id']} has no positive integer width "
                             f"and height")
        if type(image["id"]) is not int or image["id"] in sizes:
            raise InputError(f"annotations {path}: image id {image['id']!r} is not an integer of its own")
        sizes[image["id"]] = (image["width"], image["height"])
    category_ids = [c["id"] for c in content["categories"]]
    if not category_ids or any(type(c) is not int
                               for c in category_ids) or len(set(category_ids)) < len(category_ids):
        raise InputError(f"annotations {path}: category ids must be integers, each its own, and at "
                         f"least one")
    annotations = [check_annotation(a, i, sizes, set(category_ids), path) for i,
                   a in enumerate(content["annotations"], 1)]
    categories = [{**c, "name": str(c["name"])} for c in content["categories"]]
    return {"images": content["images"], "annotations": annotations, "categories": categories}


def is_number(value) -> bool:
    """Whether a JSON value is a number that a picture's geometry may hold; NaN and infinity are not, nor is
    true."""
    return type(value) in (int, float) and abs(value) < 1e9


def check_annotation(entry: dict, number: int, sizes: dict, category_ids: set, path: Path) -> dict:
    where, box = f"annotations {path}: annotation {entry.get('id', number)}", entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        raise InputError(f"{where} has the box {str(box)[:60]}: needed are four finite numbers x, y, "
                         f"width, height")
    if box[2] < 0 or box[3] < 0:
        raise InputError(f"{where} has a box of negative size, {box}: needed are x, y, width, height")
    for key, known in (("image_id", sizes), ("category_id", category_ids)):
        if type(entry[key]) is not int or entry[key] not in known:
            raise InputError(f"{where} has the {key} {str(entry[key])[:60]}, which does not exist")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise InputError(f"{where} has iscrowd {str(entry['iscrowd'])[:60]}: needed is 0 or 1")
    area = entry.get("area")
    # Numbered anew from 1: the ids in the file may repeat or be missing, and pycocotools takes id 0 for "no
    # match".
    return {"id": number, "image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box,
            "area": area if is_number(area) else box[2] * box[3], "iscrowd": int(entry.get("iscrowd", 0))}


def coco_format(image_folder: Path, annotation_file: Path, limit: int | None = None,
                **options) -> DetectionSet:
    """Any detection set in COCO format. Images without objects stay; crowd regions are left out of the
    training targets (they remain in `ground_truth`); boxes are clipped to their image, empty ones dropped.
    `limit`: the first N images."""
    content = load_annotations(annotation_file)
    content["images"] = content["images"][:limit]
    boxes_of = {image["id"]: [] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in boxes_of]
    label_of = {c: i for i, c in enumerate(sorted(c["id"] for c in content["categories"]))}
    for a in content["annotations"]:
        if not a["iscrowd"]:
            boxes_of[a["image_id"]].append((*a["bbox"], label_of[a["category_id"]]))
    records = []
    for image in content["images"]:
        name, size = str(image["file_name"]), (image["width"], image["height"])
        source = Path(os.path.normpath(image_folder / name))
        inside = source.is_relative_to(os.path.normpath(image_folder))
        if not inside or not name.isprintable():
            raise InputError(f"annotations {annotation_file}: the file name {name[:80]!r} leaves "
                             f"{image_folder} or is none")
        rows = np.array(boxes_of[image["id"]], dtype=np.float64).reshape(-1, 5)
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
        boxes = boxes.clip(0, np.array([*size, *size]))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        records.append(Record(image["id"], source, size, boxes[keep], rows[keep, 4].astype(np.int64)))
    if not records:
        raise InputError(f"annotations {annotation_file} list no image")
    return DetectionSet(records, content, **options)


COCO_HELP = ("download train2017.zip, val2017.zip and annotations_trainval2017.zip (COCO 2017, "
             "cocodataset.org), unpack "
             "them there, or name another folder with --data-root")
FOLDER_HELP = "needed are train/, val/ and annotations/instances_{train,val}.json in it"


def detection_set(data: str, split: str, root: str | None = None, limit: int | None = None,
                  image_size: int = 800,
                  augment: str = "none", seed: int = 0) -> DetectionSet:
    """The set that `--data` names: "shapes", "coco", or a folder with train/, val/ and
    annotations/instances_*.json.

    Args:
        split: "train" or "val". root: the folder of `coco`, data/coco by default. limit: the first N images
            only.
    Raises:
        InputError: if it is missing (says what to download and where it goes) or malformed.
    """
    options = dict(name=f"{data} {split}", transform=Transform(image_size, augment), seed=seed)
    if data == "shapes":
        return shapes(split, limit, **options)
    folder, suffix = (Path(root or "data/coco"), "2017") if data == "coco" else (Path(data), "")
    images = folder / (split + suffix)
    annotations = folder / "annotations" / f"instances_{split}{suffix}.json"
    mend = COCO_HELP if data == "coco" else FOLDER_HELP
    for path in (folder, images, annotations):
        if not path.exists():
            raise InputError(f"{path} is missing: {mend}")
    return coco_format(images, annotations, limit, **options)


# ----------------------------------------------------------------------------- shapes: generated from a seed

def polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon in the unit circle, or a star if every second corner is at radius `inner`; (n,
    2)."""
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


def shape_mask(name: str, centre, radius: float, angle: float, stretch: float, pixels: int) -> np.ndarray:
    """Coverage in [0, 1] of a shape, (pixels, pixels), anti-aliased. `stretch` widens it by that factor
    before turning."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    mask = Image.new("L", (pixels * SUPERSAMPLE,) * 2)
    for i, outline in enumerate(SHAPES[name]):
        corners = (outline * (stretch, 1 / stretch) @ turn * radius + centre) * SUPERSAMPLE
        ImageDraw.Draw(mask).polygon([tuple(c) for c in corners], fill=0 if i else 255)
    return np.asarray(mask.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def background(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """A mottled, dull ground with clutter of lines and blotches, (pixels, pixels, 3) in 0..255."""
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


def shape_scene(rng: np.random.Generator, pixels: int = SHAPE_PIXELS):
    """One picture with up to four objects that may hide each other -> (RGB image, boxes xyxy (n, 4), labels
    (n,)). A box is tight around what is visible; an object of which less than half is visible is not
    annotated."""
    canvas, owner, names = background(rng, pixels), np.full((pixels, pixels), -1), list(SHAPES)
    count, labels, sizes = int(rng.choice(5, p=[0.04, 0.3, 0.28, 0.22, 0.16])), [], []
    for i in range(count):
        label, radius = int(rng.integers(len(names))), pixels * np.exp(rng.uniform(*np.log([0.16, 0.36])))
        centre = rng.uniform(radius * 0.7, pixels - radius * 0.7, 2)
        mask = shape_mask(names[label], centre, radius, rng.uniform(-0.4, 0.4),
                          np.exp(rng.uniform(-0.15, 0.15)), pixels)
        hue = (label / len(names) + rng.normal(0, 0.02)) if rng.random() < 0.97 else rng.random()
        colour = 255 * hsv(hue, rng.uniform(0.7, 1), rng.uniform(0.7, 1))
        canvas = canvas + mask[..., None] * (colour + rng.normal(0, 9, canvas.shape) - canvas)
        owner[mask > 0.5] = i
        labels.append(label)
        sizes.append((mask > 0.5).sum())
    boxes = []
    for i in range(count):
        y, x = np.nonzero(owner == i)
        visible = len(x) > 0 and len(x) >= sizes[i] / 2
        boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1) if visible else None)
    image = Image.fromarray((canvas + rng.normal(0, 4, canvas.shape)).clip(0, 255).astype(np.uint8))
    return (image, np.array([b for b in boxes if b], dtype=np.float64).reshape(-1, 4),
            np.array([k for k, b in zip(labels, boxes) if b], dtype=np.int64))


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue on a circle of circumference 1 -> (3,) RGB in [0, 1]."""
    k = (np.array([5, 3, 1]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)


def shapes(split: str, limit: int | None = None, seed: int = 0, **options) -> DetectionSet:
    """The embedded detection set: 2,000 training and 300 validation pictures of 64 x 64 pixels, no file read
    or written. Every picture has a generator of its own, seeded by its split and number, so the splits share
    none."""
    records, annotations = [], []
    for i in range({"train": 2000, "val": 300}[split])[:limit]:
        image, boxes, labels = shape_scene(np.random.default_rng((20220425, split == "val", i)))
        records.append(Record(i + 1, image, image.size, boxes, labels))
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1,
                                "iscrowd": 0,
                                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    truth = {"images": [{"id": r.id, "width": r.size[0], "height": r.size[1], "file_name": f"{r.id}.png"}
                        for r in records],
             "annotations": annotations, "categories": [{"id": i, "name": n} for i,
                                                        n in enumerate(SHAPES, 1)]}
    return DetectionSet(records, truth, seed=seed, **options)
