"""Data: reading images, transforms, detection and classification sets, and batches.

Detection: `shapes` and `shapes-hard` (generated), `coco`, `cityscapes`, or any folder in COCO format
become a `DetectionSet`. The transforms are Deformable DETR's, as in the released code. Classification:
`shapes`, ImageNet, or any folder with a folder of images per class become a `ClassificationSet`. DeiT's
augmentations are in extras/augment.py, the generated pictures in extras/shapes.py.

Boxes are (x0, y0, x1, y1) in pixels in this file. Training targets have (cx, cy, w, h) in [0, 1].
"""
import hashlib
import json
import os
import unicodedata
import warnings
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from engine import InputError, note, one_line
from extras import augment, cityscapes, shapes
from extras.cityscapes import cityscapes_to_coco  # noqa: F401 (public here)
from extras.shapes import EMBEDDED_SETS

# ------------------------------------------------------------------------------------- images and boxes

warnings.filterwarnings("ignore", module="PIL")  # damaged metadata, as in ImageNet, do no harm
warnings.simplefilter("error", Image.DecompressionBombWarning)  # refuses more than 90 megapixels
# Pillow reads more formats, but EPS files are programs, and half a JPEG
# 2000 file can pass for a whole one.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
# The EXIF orientation and the operation that undoes it.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of RGB in 0..255


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from a file in one of FORMATS: grey, palette, RGBA
    (alpha dropped), CMYK, 16 bit, EXIF-rotated.

    Args:
        size: (width, height) as annotated. Some annotation programs ignore the EXIF rotation. If only
            the unrotated picture has this size, it stays unrotated.
    Raises:
        InputError: names the file if it is absent, broken, no picture, too large, or not of this size.
    """
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise InputError(f"image {path} is missing or no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            stored = [str(t[3] if isinstance(t[3], str) else t[3] and t[3][0]) for t in image.tile]
            wide = image.mode[0] in "RL" and any(s.endswith((";16B", ";16L", ";16N")) for s in stored)
            image.load()
            if wide and max(most for _, most in image.convert("RGB").getextrema()) < 16:
                raise ValueError("its 16-bit colours hold 8 or 12 bits: save it with 8 bits")
            turn = UPRIGHT.get(exif_orientation(image))
            upright = image.copy() if turn is None else image.transpose(turn)
            if size is not None and upright.size != size and image.size == size:
                upright = image.copy()
        upright = to_8_bits(upright).convert("RGB")
    except Exception as e:  # pillow's decoders raise a dozen kinds of error on damaged files
        raise InputError(f"image {path} cannot be read ({one_line(e)}): replace it (formats that are "
                         f"read: {', '.join(FORMATS)})") from None
    if size is not None and upright.size != size:
        raise InputError(f"image {path} is {upright.width} x {upright.height}, but the annotations say "
                         f"{size[0]} x {size[1]}: its boxes cannot be trusted")
    return upright


def exif_orientation(image: Image.Image) -> int:
    """1 to 8, or 1 if the picture has no EXIF data or damaged ones. Only this entry is read."""
    try:
        return image.getexif().get(274, 1)
    except Exception:  # pillow raises half a dozen kinds of error on damaged EXIF data
        return 1


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits -> 8 bits. Pillow's own conversion would clip them. Files of 16
    bits may hold values of 8 or 12 bits; the largest value decides. Raises ValueError for floats and for
    more than 16 bits."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, and their range is unknown: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16 bits")
    bits = 8 if pixels.max() < 256 else 12 if pixels.max() < 4096 else 16
    return Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, normalised with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_tensor`, to look at the model's input."""
    pixels = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy"""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


# ------------------------------------------------------------- detection transforms (Deformable DETR's)
# Each takes and returns (PIL image, boxes (n, 4) xyxy in pixels, labels (n,)).

Sample = tuple[Image.Image, np.ndarray, np.ndarray]


def flip(image: Image.Image, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    x0, y0, x1, y1 = boxes.T
    boxes = np.stack([image.width - x1, y0, image.width - x0, y1], 1)
    return ImageOps.mirror(image), boxes, labels


def resize(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, short: int, long: int) -> Sample:
    """Keeps the aspect ratio. Makes the short side `short`, or less so that the long side is `long`."""
    w, h = image.size
    scale = min(short / min(w, h), long / max(w, h))
    new_w, new_h = max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))
    if (new_w, new_h) != (w, h):
        image = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    return image, boxes * np.array([new_w / w, new_h / h] * 2), labels


def crop(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, x: int, y: int, w: int,
         h: int) -> Sample:
    """Clips the boxes to the crop and drops those outside, perhaps all."""
    boxes = np.clip(boxes - np.array([x, y, x, y]), 0, np.array([w, h, w, h]))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image.crop((x, y, x + w, y + h)), boxes[keep], labels[keep]


@dataclass
class Transform:
    """The detection transform. `augment`: "paper" (flips half of the images, crops half of them, and
    resizes all to a random size), "flip" or "none".

    `image_size` is the short side at test time. All other sizes of the recipe
    (training sides 480..800, crops 384..600, long side 1333) scale with it, so one
    recipe serves COCO at 800 pixels and small trials.
    """
    image_size: int = 800
    augment: str = "none"

    def scaled(self, side: int) -> int:
        return max(1, round(side * self.image_size / 800))

    def __call__(self, image: Image.Image, boxes: np.ndarray, labels: np.ndarray,
                 rng: np.random.Generator) -> Sample:
        sample = (image, boxes, labels)
        if self.augment != "none" and rng.random() < 0.5:
            sample = flip(*sample)
        short = 800
        if self.augment == "paper":
            if rng.random() < 0.5:
                sample = self.random_crop(*sample, rng)
            short = int(rng.choice(range(480, 801, 32)))
        return resize(*sample, self.scaled(short), self.scaled(1333))

    def random_crop(self, image: Image.Image, boxes: np.ndarray, labels: np.ndarray,
                    rng: np.random.Generator) -> Sample:
        """A crop of 384 to 600 pixels a side, from the image at a short side of 400, 500 or 600."""
        short = int(rng.choice([400, 500, 600]))
        image, boxes, labels = resize(image, boxes, labels, self.scaled(short), self.scaled(4200))
        least, most = self.scaled(384), self.scaled(600)
        w, h = (int(rng.integers(min(side, least), min(side, most), endpoint=True))
                for side in image.size)
        x = int(rng.integers(0, image.width - w, endpoint=True))
        y = int(rng.integers(0, image.height - h, endpoint=True))
        return crop(image, boxes, labels, x, y, w, h)


# --------------------------------------------------------------------------------------- detection sets

class Files(Sequence):
    """The paths of files in a folder, kept in two arrays. As Python objects, the paths of ImageNet-21k's
    11 million images would take gigabytes, in each data loading process again."""

    def __init__(self, folder: Path, names: Iterable[str]):
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self.folder, self.text, self.ends = folder, np.frombuffer(text, np.uint8), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        return os.fsdecode(self.text[self.ends[index]:self.ends[index + 1]].tobytes())

    def __getitem__(self, index: int) -> Path:
        index = range(len(self))[index]
        return Path(os.path.normpath(self.folder / self.name(index)))


@dataclass
class Record:
    """One image and its objects: boxes (n, 4) float64 xyxy in pixels, labels (n,) int64 from 0."""
    id: int
    source: Path | Image.Image  # a file, or a generated picture
    size: tuple[int, int]       # (width, height)
    boxes: np.ndarray
    labels: np.ndarray

    def image(self) -> Image.Image:
        return read_image(self.source, self.size) if isinstance(self.source, Path) else self.source


class Records(Sequence):
    """The records of a set, made of arrays when they are asked for."""

    def __init__(self, annotations: "Annotations", sources: Sequence[Path | Image.Image]):
        self.annotations, self.sources = annotations, sources

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        a = self.annotations
        mine = slice(a.first[index], a.first[index + 1])
        objects = ~a.crowd[mine]
        width, height = a.sizes[index].tolist()
        return Record(a.image_ids[index].item(), self.sources[index], (width, height),
                      a.boxes[mine][objects], a.labels[mine][objects])


class DetectionSet(Dataset):
    """Items: (image (3, H, W) float32, target), target = {"labels": (n,) int64, "boxes": (n, 4) float32
    cxcywh in [0, 1], "image_id": int, "size": (width, height) of the original}. Augmentation depends on
    (seed, epoch, index) only, not on the number of workers.

    Args:
        annotations: of all images. sources: a file or a generated picture for each of them.
    """

    def __init__(self, annotations: "Annotations", sources: Sequence[Path | Image.Image], name: str,
                 transform: Transform | None = None, seed: int = 0):
        self.annotations, self.records = annotations, Records(annotations, sources)
        self.name, self.transform = name, transform or Transform()
        self.seed, self.epoch = seed, 0
        self.corruption = None  # COCO-C: (picture, image id) -> picture, before the transform
        self.classes = [c["name"] for c in annotations.categories]
        # label -> category id; ids may have gaps
        self.category_ids = [c["id"] for c in annotations.categories]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def ground_truth(self) -> dict:
        """The COCO-format dict that the metric reads, with crowd regions."""
        a, sources = self.annotations, self.records.sources
        image_of = np.repeat(a.image_ids, np.diff(a.first)).tolist()
        category_of = [c["id"] for c in a.categories]
        xywh = np.concatenate([a.boxes[:, :2], a.boxes[:, 2:] - a.boxes[:, :2]], 1)
        rows = zip(image_of, *(x.tolist() for x in (xywh, a.labels, a.crowd, a.areas)))
        # Ids count from 1, because pycocotools reads the id 0 as "no match".
        annotations = [{"id": i, "image_id": image, "category_id": category_of[label], "bbox": box,
                        "iscrowd": int(crowd), "area": area}
                       for i, (image, box, label, crowd, area) in enumerate(rows, 1)]
        names = (sources.name(i) if isinstance(sources, Files) else f"{id}.png"
                 for i, id in enumerate(a.image_ids))
        images = [{"id": id, "file_name": name, "width": w, "height": h}
                  for id, name, (w, h) in zip(a.image_ids.tolist(), names, a.sizes.tolist())]
        return {"images": images, "annotations": annotations, "categories": a.categories}

    @property
    def digest(self) -> str:
        """A short text that changes when annotations or the names of images change."""
        names = getattr(self.records.sources, "text", None)
        return digest(names, *vars(self.annotations).values())

    @property
    def bytes(self) -> int:
        """The size of all image files. It changes when an image is replaced under its name."""
        sources = self.records.sources
        return sum(map(os.path.getsize, sources)) if isinstance(sources, Files) else 0

    def describe(self) -> str:
        """The number of images and objects, and of what was left out, for the first line of a run."""
        counts = self.annotations.count_objects()
        left_out = ", ".join(f"{n:,} {what}" for what, n in self.annotations.left_out.items() if n)
        without = (counts == 0).sum()
        return (f"{len(self):,} images, {counts.sum():,} objects"
                + (f", {without:,} images without objects" if without else "")
                + (f" (left out: {left_out})" if left_out else ""))

    def name_of(self, index: int) -> str:
        """An image's file, or its number if it was generated."""
        record = self.records[index]
        return str(record.source if isinstance(record.source, Path) else record.id)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        record = self.records[index]
        image = record.image()
        if self.corruption is not None:
            image = self.corruption(image, record.id)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        image, boxes, labels = self.transform(image, record.boxes, record.labels, rng)
        w, h = image.size
        x0, y0, x1, y1 = boxes.T
        boxes = np.stack([(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], 1)
        target = {"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes).float(),
                  "image_id": record.id, "size": record.size}
        return to_tensor(image), target

    def item_to_draw(self, index: int) -> tuple[Image.Image, list[tuple[list[float], int]]]:
        """An item as the model sees it -> picture, and (box xyxy in pixels, label) of its objects."""
        pixels, target = self[index]
        height, width = pixels.shape[1:]
        boxes = corners(target["boxes"]) * torch.tensor([width, height] * 2)
        return to_image(pixels), list(zip(boxes.tolist(), target["labels"].tolist()))


def digest(*parts: object) -> str:
    """16 hexadecimal digits that depend on arrays and plain containers."""
    value = hashlib.sha256()
    for part in parts:
        value.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return value.hexdigest()[:16]


def pad_batch(samples: list) -> tuple[Tensor, Tensor | None, list[dict]]:
    """Items of different size -> images (B, 3, H, W), zeros at the right and bottom; mask (B, H, W),
    True there, or None if nothing is padded; targets."""
    images, targets = zip(*samples)
    h, w = (max(x.shape[d] for x in images) for d in (1, 2))
    batch = images[0].new_zeros(len(images), 3, h, w)
    mask = torch.ones(len(images), h, w, dtype=torch.bool)
    for x, padded, m in zip(images, batch, mask):
        padded[:, :x.shape[1], :x.shape[2]] = x
        m[:x.shape[1], :x.shape[2]] = False
    return batch, mask if mask.any() else None, list(targets)


def micro_batches(samples: list, size: int) -> list:
    """A batch's items -> padded batches of at most `size` images."""
    return [pad_batch(samples[i:i + size]) for i in range(0, len(samples), size)]


# ------------------------------------------------------------------------------------------ COCO format

@dataclass
class Annotations:
    """The annotations of a set, in arrays: n images and m boxes, crowd regions included. The boxes of
    image i are those from first[i] to first[i + 1]. They are clipped to their image."""
    image_ids: np.ndarray      # (n,) int64
    sizes: np.ndarray          # (n, 2) int64: width and height
    first: np.ndarray          # (n + 1,) int64
    boxes: np.ndarray          # (m, 4) float64 xyxy in pixels
    labels: np.ndarray         # (m,) int64, from 0
    crowd: np.ndarray          # (m,) bool
    areas: np.ndarray          # (m,) float64: as annotated, or the box's
    categories: list[dict]     # "id" and "name", in the order of the labels
    left_out: dict[str, int]   # numbers of objects that are no training targets

    def count_objects(self) -> np.ndarray:
        """The number of objects in each image without crowd regions, (n,)."""
        image_of = np.repeat(np.arange(len(self.image_ids)), np.diff(self.first))
        return np.bincount(image_of[~self.crowd], minlength=len(self.image_ids))


def read_annotations(source: Path | dict, limit: int | None = None) -> tuple[Annotations, list[str]]:
    """Reads and checks a COCO-format file or dict.

    Boxes are clipped to their image, and dropped if nothing is left of them. Entries of the same file
    become one image. An area that is missing or below a pixel becomes that of the box. Crowd regions
    (iscrowd = 1) are boxes around groups. They are no training targets, and the metric ignores what is
    found in them.

    Args:
        limit: the first N images only.
    Returns:
        the annotations, and the file name of each image.
    Raises:
        InputError: one line, naming the entry, at the first thing wrong; or the boxes are corners or
            normalised.
    """
    file = "given as a dict" if isinstance(source, dict) else source
    place = "the file"
    names, image_ids, sizes, index_of, merged, seen = [], [], [], {}, set(), set()
    category_of = {}
    boxes, areas, image_of, labels, crowds = (array(kind) for kind in "ddqqb")
    try:
        # From bytes, because json then finds out the encoding and skips a byte order mark.
        content = source if isinstance(source, dict) else json.loads(source.read_bytes())
        index_of_name = {}
        for i, entry in enumerate(content["images"]):
            place = f"images[{i}]"
            id, name, size = whole(entry["id"]), entry["file_name"], (entry["width"], entry["height"])
            size = [whole(side) for side in size]
            require(is_id(id) and id not in index_of,
                    "its id is not an integer, or another entry has it too")
            require(is_text(name) and len(name) < 1000,
                    f"its file_name {name!r:.80} is not the name of a file inside the image folder")
            require(all(type(side) is int and 0 < side < 1e6 for side in size),
                    "its width and height are not positive integers")
            index = index_of[id] = index_of_name.setdefault(os.path.normpath(name), len(names))
            if index < len(names):
                require(sizes[index] == size, f"another entry of {name} has another size")
                merged.add(index)
                continue
            names.append(name)
            image_ids.append(id)
            sizes.append(size)
        place = "the file"
        for i, entry in enumerate(content["categories"]):
            place = f"categories[{i}]"
            id, name = whole(entry["id"]), str(entry["name"])
            require(is_id(id) and id not in category_of,
                    "its id is not an integer, or another entry has it too")
            require(is_text(name), "its name has control characters or line ends")
            category_of[id] = {"id": id, "name": name}
        place = "the file"
        require(bool(names), "it lists no image")
        require(bool(category_of), "it lists no category")
        label_of = {id: label for label, id in enumerate(sorted(category_of))}
        for i, entry in enumerate(content["annotations"]):
            place = f"annotations[{i}]"
            box, area, crowd = entry["bbox"], entry.get("area"), entry.get("iscrowd") or 0
            image, category = whole(entry["image_id"]), whole(entry["category_id"])
            require(type(box) is list and len(box) == 4 and all(map(is_number, box)),
                    "its bbox is not four finite numbers x, y, width, height")
            require(box[2] >= 0 and box[3] >= 0, "its bbox has a negative size")
            require(type(image) is int and image in index_of,
                    f"its image_id {image!r:.60} does not exist")
            require(type(category) is int and category in label_of,
                    f"its category_id {category!r:.60} does not exist")
            require(crowd in (0, 1), "its iscrowd is not 0 or 1")
            index = index_of[image]
            if index in merged:  # each of its entries may have all of its objects
                if (index, category, crowd, *box) in seen:
                    continue
                seen.add((index, category, crowd, *box))
            boxes.extend(box)
            areas.append(area if is_number(area) and area >= 1 else box[2] * box[3])
            image_of.append(index)
            labels.append(label_of[category])
            crowds.append(int(crowd))
    except OSError as e:
        raise InputError(f"annotations {file} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"annotations {file}: {place} is not in COCO format: {one_line(e)}") from None

    sizes, image_of = np.array(sizes), np.array(image_of)
    boxes, crowd = np.array(boxes).reshape(-1, 4), np.array(crowds, bool)
    check_convention(boxes[~crowd], sizes[image_of][~crowd], f"annotations {file}")
    known = image_of < (limit or len(names))
    boxes, areas, image_of, labels, crowd = (
        x[known] for x in (boxes, np.array(areas), image_of, np.array(labels), crowd))
    ends = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    clipped = ends.clip(0, np.tile(sizes[image_of], 2))
    # Deformable DETR's rule. The released code also drops boxes less than a pixel wide or high.
    extent = clipped[:, 2:] - clipped[:, :2]
    areas = np.where((clipped != ends).any(1), np.minimum(areas, extent.prod(1)), areas)
    kept, empty = (extent > 0).all(1), (boxes[:, 2:] == 0).any(1)
    left_out = {"crowd regions": crowd.sum(), "empty": (empty & ~crowd).sum(),
                "outside of their image": (~kept & ~empty & ~crowd).sum()}
    objects = np.column_stack([image_of, labels, clipped])[kept & ~crowd]
    doubled = len(objects) - len(np.unique(objects, axis=0))
    if doubled:
        note(f"annotations {file}: {doubled:,} of the objects are listed twice, and count twice")
    order = np.flatnonzero(kept)[np.argsort(image_of[kept], kind="stable")]
    names, image_ids, sizes = names[:limit], np.array(image_ids)[:limit], sizes[:limit]
    return Annotations(image_ids, sizes, np.searchsorted(image_of[order], np.arange(len(names) + 1)),
                       clipped[order], labels[order], crowd[order], areas[order],
                       [category_of[id] for id in sorted(category_of)],
                       {what: int(n) for what, n in left_out.items()}), names


def check_convention(boxes: np.ndarray, sizes: np.ndarray, where: str) -> None:
    """Raises InputError if boxes (m, 4) are not x, y, w, h in pixels, but look like corners, centres or
    shares of the image. sizes: (m, 2), of their images. where: what the message begins with."""
    # The limits below were chosen on 7,500 boxes of two real sets: none leaves its image by more than a
    # pixel, or has a side below one. Read as centres 29 % would leave it, as corners 75 %.
    has_area = (boxes[:, 2:] > 0).all(1)
    boxes, sizes = boxes[has_area], sizes[has_area]
    if not len(boxes):
        return
    leaves = (boxes[:, :2] + boxes[:, 2:] > sizes + 1).any(1)
    fits_as_corners = ((boxes[:, 2:] >= boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1)).all(1)
    tiny = (boxes[:, 2:] < 1).any(1)
    form = "COCO format has x, y, width, height in pixels, and x, y is the top left corner"
    share = f"{where}: {100 * leaves.mean():.0f} % of the boxes leave their image"
    if leaves.mean() > 0.1 and fits_as_corners.mean() > 0.95 and len(boxes) >= 4:
        raise InputError(f"{share}, but nearly all would fit as corners x0, y0, x1, y1: {form}")
    if leaves.mean() > 0.2 and leaves.sum() >= 20:
        raise InputError(f"{share}: {form}")
    if tiny.mean() > 0.5:
        raise InputError(f"{where}: {100 * tiny.mean():.0f} % of the boxes have a side below one pixel, "
                         f"as if they were normalised: {form}")
    if leaves.mean() > 0.05:
        note(f"{share} by more than a pixel and are clipped; {form}")


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def whole(value: object) -> object:
    """An integer that was written as a float, 224.0, as an integer. Any other value as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def is_text(value: object) -> bool:
    """A string without control characters, line ends and halves of surrogate pairs."""
    return type(value) is str and not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, value))


def is_id(value: object) -> bool:
    """An integer below 2**53. Pycocotools keeps some ids as float64."""
    return type(value) is int and abs(value) < 2 ** 53


def is_number(value: object) -> bool:
    """A JSON number that can be a coordinate: not NaN, not infinity, not true."""
    return type(value) in (int, float) and abs(value) < 1e9


def coco_format(image_folder: Path, annotations: Path | dict, limit: int | None = None,
                **options) -> DetectionSet:
    """A detection set in COCO format.

    Images without objects stay. Crowd regions are no training targets, but they stay in `ground_truth`.
    File names must stay inside the image folder. Symbolic links are allowed.

    Args:
        annotations: a file, or its content as a dict.
        limit: the first N images. options: of DetectionSet.
    Raises:
        InputError: as `read_annotations`, or an image is missing from the folder.
    """
    content, names = read_annotations(annotations, limit)
    check_files(image_folder, names, "given as a dict" if isinstance(annotations, dict) else annotations)
    return DetectionSet(content, Files(image_folder, names), **options)


def check_files(folder: Path, names: list[str], where: Path | str) -> None:
    """Raises InputError if a file that the annotations `where` name is not in the folder. Lists each
    folder once, which takes a second for COCO; decoding all images would take minutes."""
    inside = os.path.join(os.path.abspath(folder), "")
    present = {}  # folder -> names in it
    for name in names:
        path = Path(os.path.normpath(folder / name))
        if not os.path.abspath(path).startswith(inside):
            raise InputError(f"annotations {where}: {name!r:.80} is not the name of a file inside "
                             f"{folder}")
        if path.parent not in present:
            try:
                present[path.parent] = set(os.listdir(path.parent))
            except OSError as e:
                raise InputError(f"folder {path.parent} of an image cannot be listed ({e.strerror}); "
                                 f"{where} names it") from None
        if path.name not in present[path.parent]:
            raise InputError(f"image {path} is missing; {where} lists it")


COCO_FOLDER = ("train/, val/ and annotations/instances_{train,val}.json, or train/ and valid/ with an "
               "_annotations.coco.json in each")
DETECTION_DATA = ("shapes or shapes-hard (generated, no download), coco, cityscapes, or any folder in "
                  f"COCO format with {COCO_FOLDER}")
COCO_HELP = ("download train2017.zip, val2017.zip and annotations_trainval2017.zip (COCO 2017, "
             "cocodataset.org), unpack them there, or name another folder with --data-root")


def folder_of(data: str, root: str | None, names: tuple[str, ...]) -> Path:
    """The folder of a set: `root` or data/NAME if it is one of `names`, else `data` itself."""
    if data in names:
        return Path(root or f"data/{data}")
    if root:
        raise InputError(f"--data-root {root} is for --data {' or '.join(names)}: name your folder by "
                         f"--data alone")
    return Path(data)


def detection_set(data: str, split: str, root: str | None = None, limit: int | None = None,
                  image_size: int = 800, augment: str = "none", seed: int = 0) -> DetectionSet:
    """The set that `--data` names, see DETECTION_DATA.

    Args:
        split: "train" or "val". limit: the first N images only.
        root: the folder of `coco` or `cityscapes`, data/NAME by default.
    Raises:
        InputError: it is missing (the message says what to download and where it goes) or malformed.
    """
    options = dict(name=f"{data} {split}", transform=Transform(image_size, augment), seed=seed)
    if data in EMBEDDED_SETS:
        pictures, truth = shapes.detection_pictures(data, split, limit)
        return DetectionSet(read_annotations(truth)[0], pictures, **options)
    folder, suffix = folder_of(data, root, ("coco", "cityscapes")), "2017" if data == "coco" else ""
    if data == "cityscapes":
        return coco_format(folder, cityscapes.annotation_file(folder, split), limit, **options)
    images = folder / (split + suffix)
    annotations = folder / "annotations" / f"instances_{split}{suffix}.json"
    if (folder / "train" / "_annotations.coco.json").exists():  # as Roboflow exports
        if annotations.exists():
            raise InputError(f"{folder} has both annotations/ and train/_annotations.coco.json: remove "
                             f"one")
        images = folder / ("train" if split == "train" else "valid")
        annotations = images / "_annotations.coco.json"
    for path in (folder, images, annotations):
        if not path.exists():
            needed = COCO_HELP if data == "coco" else f"needed are {COCO_FOLDER}"
            raise InputError(f"{path} is missing: {needed}")
    return coco_format(images, annotations, limit, **options)


# --------------------------------------------------------------------------------------- classification

def classification_transform(image: Image.Image, rng: np.random.Generator, size: int,
                             recipe: str) -> Tensor:
    """Picture -> (3, size, size) float32, normalised. `recipe`: "deit" (random crop and flip,
    RandAugment, random erasing; 4.1), "21k" (squeezed to the size, Cutout, RandAugment; A.3), "flip"
    (flip only) or "none" (the middle, as for evaluation)."""
    if recipe == "deit":
        image = augment.random_resized_crop(image, size, rng)
    elif recipe == "21k":
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    elif image.size != (size, size):  # a picture that has the size already is taken as it is
        image = augment.centre_crop(image, size)
    if recipe in ("deit", "flip") and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if recipe == "21k":
        image = augment.cutout(image, rng)
    if recipe in ("deit", "21k"):
        image = augment.rand_augment(image, rng)
    pixels = to_tensor(image)
    return augment.random_erasing(pixels, rng) if recipe == "deit" else pixels


class ClassificationSet(Dataset):
    """Items: (image (3, size, size) float32, label). An index beyond the length
    gives the same picture with another augmentation (repeated augmentation).
    Augmentation depends on (seed, epoch, index) only.

    Args:
        sources: a file or a generated picture for each image. labels: (n,) integers from 0.
    """

    def __init__(self, sources: Sequence[Path | Image.Image], labels: np.ndarray, classes: list[str],
                 name: str, image_size: int = 224, augment: str = "none", seed: int = 0):
        self.sources, self.labels, self.classes, self.name = sources, labels, classes, name
        self.image_size, self.augment, self.seed, self.epoch = image_size, augment, seed, 0

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def digest(self) -> str:
        """A short text that changes when images are added, removed or moved to another class."""
        return digest(getattr(self.sources, "text", None), self.labels, self.classes)

    def describe(self) -> str:
        """The number of images, for the first line of a run."""
        return f"{len(self):,} images"

    def name_of(self, index: int) -> str:
        """An image's file, or its number if it was generated."""
        source = self.sources[index % len(self)]
        return str(source if isinstance(source, Path) else index % len(self))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.sources[index % len(self)], int(self.labels[index % len(self)])
        image = read_image(source) if isinstance(source, Path) else source
        rng = np.random.default_rng((self.seed, self.epoch, index))
        return classification_transform(image, rng, self.image_size, self.augment), label

    def item_to_draw(self, index: int) -> tuple[Image.Image, list[tuple[None, int]]]:
        """An item as the model sees it, before mixing -> picture, and its label without a box."""
        pixels, label = self[index]
        return to_image(pixels), [(None, label)]


def image_folder(folder: Path, limit: int | None = None, **options) -> ClassificationSet:
    """A folder with a folder per class, as ImageNet unpacks. Images may lie in folders below. `limit`: N
    images, taken in turn from the classes. Raises InputError if the folder is missing or a class has no
    image."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: needed is a folder with one folder of images per class")
    classes = sorted(p.name for p in os.scandir(folder) if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"{folder} holds {len(classes)} class folders: needed are two or more, each "
                         f"with images")
    beside = [p.name for p in os.scandir(folder) if p.is_file() and not p.name.startswith(".")]
    if beside:
        note(f"{folder}: {len(beside)} files beside the class folders are left out, for example "
             f"{min(beside)}")
    labels, turns = array("i"), array("i")  # a file is the turns[i]-th of its class

    def names() -> Iterable[str]:
        for label, name in enumerate(classes):
            files = files_below(folder / name)
            if not files:
                raise InputError(f"class folder {folder / name} is empty: add images or remove it")
            labels.extend([label] * len(files))
            turns.extend(range(len(files)))
            yield from (os.path.join(name, file) for file in files)
    files = Files(folder, names())
    labels = np.array(labels)
    if limit:
        chosen = np.lexsort((labels, turns))[:limit]
        files, labels = Files(folder, (files.name(i) for i in chosen)), labels[chosen]
    return ClassificationSet(files, labels, classes, **options)


def files_below(folder: Path) -> list[str]:
    """All files in a folder and in the folders below it, except hidden ones: sorted paths from there."""
    def refuse(e: OSError) -> None:
        raise InputError(f"folder {e.filename} cannot be listed ({e.strerror})")
    files, seen = [], set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(path) in seen:
            raise InputError(f"folder {path} is reached twice, by links: its images would count twice")
        seen.add(os.path.realpath(path))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.join(os.path.relpath(path, folder), "") if path != str(folder) else ""
        files += [below + name for name in names if not name.startswith(".")]
    return sorted(files)


CLASSIFICATION_DATA = ("shapes or shapes-hard (generated, no download), imagenet, imagenet21k, or any "
                       "folder with train/ and val/, each with a folder of images per class")


def classification_set(data: str, split: str, root: str | None = None, limit: int | None = None,
                       image_size: int = 224, augment: str = "none", seed: int = 0) -> ClassificationSet:
    """The set that `--data` names, see CLASSIFICATION_DATA. split: "train" or "val". root: the folder of
    `imagenet` or `imagenet21k`, data/NAME by default. augment: of `classification_transform`."""
    options = dict(name=f"{data} {split}", image_size=image_size, augment=augment, seed=seed)
    if data in EMBEDDED_SETS:
        pictures, labels = shapes.classification_pictures(data, split, limit)
        return ClassificationSet(pictures, labels, list(shapes.SHAPES), **options)
    folder = folder_of(data, root, ("imagenet", "imagenet21k"))
    prefix = "imagenet21k_" if data == "imagenet21k" else ""  # as in its authors' archive
    return image_folder(folder / (prefix + split), limit, **options)
