"""Data: reading images, transforms, detection and classification sets, and batches.

Detection: `shapes` and `shapes-hard` (generated), `coco`, `cityscapes`, or any folder in
COCO format become a `DetectionSet`. The transforms are Deformable DETR's, which the
paper follows (4.1). Classification: `shapes`, ImageNet, or any folder with a folder of
images per class become a `ClassificationSet`. DeiT's augmentations are in
extras/augment.py, the generated pictures in extras/shapes.py.

Boxes are absolute (x0, y0, x1, y1) in pixels on this page. They leave it as (cx, cy, w, h) in [0, 1].
"""
import itertools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from engine import InputError
from extras import augment, cityscapes, shapes
from extras.cityscapes import cityscapes_to_coco  # noqa: F401 (public here)

# ------------------------------------------------------------------------------------- images and boxes

warnings.filterwarnings("ignore", module="PIL")  # damaged metadata, as in ImageNet, do no harm
warnings.simplefilter("error", Image.DecompressionBombWarning)  # refuses more than 90 megapixels
# Pillow reads more formats, but EPS files are programs, and half a JPEG
# 2000 file can pass for a whole one.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of RGB in 0..255


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from a file in one of FORMATS: grey, palette, RGBA
    (alpha dropped), CMYK, 16 bit, EXIF-rotated.

    Args:
        size: (width, height) in the annotation file. If only the unrotated picture has this size, the
            annotator's program ignored the EXIF rotation, and so do we.
    Raises:
        InputError: names the file if it is absent, broken, no picture, too large, or not of this size.
    """
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise InputError(f"image {path} is missing or no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if size is not None and upright.size != size and image.size == size:
                upright = image.copy()
        if upright.mode.startswith("I"):  # 16-bit grey; pillow's own conversion would clip it to 8 bits
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8))
        upright = upright.convert("RGB")
    except Exception as e:  # pillow's decoders raise a dozen kinds of error on damaged files
        raise InputError(f"image {path} cannot be read ({' '.join(str(e).split())}): replace or "
                         f"remove it") from None
    if size is not None and upright.size != size:
        raise InputError(f"image {path} is {upright.width} x {upright.height}, but the annotations say "
                         f"{size[0]} x {size[1]}: its boxes cannot be trusted")
    return upright


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
    """Clips the boxes to the crop and drops those outside. None may be left."""
    boxes = np.clip(boxes - np.array([x, y, x, y]), 0, np.array([w, h, w, h]))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image.crop((x, y, x + w, y + h)), boxes[keep], labels[keep]


@dataclass
class Transform:
    """The detection transform. `augment`: "paper" (flip, then a random size, or a random crop at a
    random size), "flip" or "none".

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


class DetectionSet(Dataset):
    """Items: (image (3, H, W) float32, target), target = {"labels": (n,) int64, "boxes": (n, 4) float32
    cxcywh in [0, 1], "image_id": int, "size": (width, height) of the original}. Augmentation depends on
    (seed, epoch, index) only, not on the number of workers. `ground_truth` is the COCO-format dict that
    the metric reads, with crowd regions."""

    def __init__(self, records: list[Record], ground_truth: dict, name: str,
                 transform: Transform | None = None, seed: int = 0):
        self.records, self.ground_truth, self.name = records, ground_truth, name
        self.transform, self.seed, self.epoch = transform or Transform(), seed, 0
        self.corruption = None  # COCO-C: (picture, image id) -> picture, before the transform
        categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        self.category_ids = [c["id"] for c in categories]  # label -> category id; ids may have gaps

    def __len__(self) -> int:
        return len(self.records)

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

def read_annotations(source: Path | dict) -> dict:
    """A COCO-format file or dict, checked: {"images", "annotations", "categories"} with the keys that
    detection needs. Missing areas and crowd flags are filled in. Raises InputError in one line, naming
    the entry, at the first thing wrong."""
    file = "given as a dict" if isinstance(source, dict) else source
    place = "the file"
    try:
        content = source if isinstance(source, dict) else json.loads(source.read_text(encoding="utf-8"))
        images, categories, annotations, sizes = [], [], [], {}
        for i, entry in enumerate(content["images"]):
            place = f"images[{i}]"
            image = {k: entry[k] for k in ("id", "file_name", "width", "height")}
            require(is_id(image["id"]) and image["id"] not in sizes,
                    "its id is not an integer, or another entry has it too")
            require(all(type(image[k]) is int and 0 < image[k] < 1e6 for k in ("width", "height")),
                    "its width and height are not positive integers")
            images.append(image)
            sizes[image["id"]] = image["width"], image["height"]
        known = set()
        for i, entry in enumerate(content["categories"]):
            place = f"categories[{i}]"
            category = {"id": entry["id"], "name": str(entry["name"])}
            require(is_id(category["id"]) and category["id"] not in known,
                    "its id is not an integer, or another entry has it too")
            require(category["name"].isprintable(), "its name cannot be printed")
            categories.append(category)
            known.add(category["id"])
        place = "the file"
        require(bool(images), "it lists no image")
        require(bool(categories), "it lists no category")
        for i, entry in enumerate(content["annotations"]):
            place = f"annotations[{i}]"
            box, area, crowd = entry["bbox"], entry.get("area"), entry.get("iscrowd", 0)
            require(type(box) is list and len(box) == 4 and all(map(is_number, box)),
                    "its bbox is not four finite numbers x, y, width, height")
            require(box[2] >= 0 and box[3] >= 0, "its bbox has a negative size")
            require(type(entry["image_id"]) is int and entry["image_id"] in sizes,
                    f"its image_id {entry['image_id']!r:.60} does not exist")
            require(type(entry["category_id"]) is int and entry["category_id"] in known,
                    f"its category_id {entry['category_id']!r:.60} does not exist")
            require(crowd in (0, 1), "its iscrowd is not 0 or 1")
            # Numbered anew from 1: ids may repeat, and pycocotools reads the id 0 as "no match".
            annotations.append({"id": i + 1, "image_id": entry["image_id"], "bbox": box,
                                "category_id": entry["category_id"], "iscrowd": int(crowd),
                                "area": area if is_number(area) and area >= 0 else box[2] * box[3]})
    except OSError as e:
        raise InputError(f"annotations {file} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"the key {e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        raise InputError(f"annotations {file}: {place} is not in COCO format: {reason}") from None
    return {"images": images, "annotations": annotations, "categories": categories}


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def is_id(value: object) -> bool:
    """An integer that pycocotools, which holds some ids as float64, tells from others."""
    return type(value) is int and abs(value) < 2 ** 53


def is_number(value: object) -> bool:
    """A JSON number that can be a coordinate: not NaN, not infinity, not true."""
    return type(value) in (int, float) and abs(value) < 1e9


def coco_format(image_folder: Path, annotations: Path | dict, limit: int | None = None,
                **options) -> DetectionSet:
    """A detection set in COCO format.

    Images without objects stay. Crowd regions are no training targets, but they stay in `ground_truth`.
    Boxes are clipped to their image; empty ones are dropped. File names must stay inside the image
    folder. Symbolic links are allowed.

    Args:
        annotations: a file, or its content as a dict.
        limit: the first N images. options: of DetectionSet.
    Raises:
        InputError: the annotations are malformed, or an image is missing from the folder.
    """
    content = read_annotations(annotations)
    where = "given as a dict" if isinstance(annotations, dict) else annotations
    content["images"] = content["images"][:limit]
    boxes_of = {image["id"]: [] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in boxes_of]
    label_of = {c: i for i, c in enumerate(sorted(c["id"] for c in content["categories"]))}
    for a in content["annotations"]:
        if not a["iscrowd"]:
            boxes_of[a["image_id"]].append((*a["bbox"], label_of[a["category_id"]]))
    records = []
    files = FileFinder(image_folder)
    for image in content["images"]:
        name, size = image["file_name"], (image["width"], image["height"])
        source = files.find(name, where)
        rows = np.array(boxes_of[image["id"]], dtype=np.float64).reshape(-1, 5)
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
        boxes = boxes.clip(0, np.array([*size, *size]))
        # Deformable DETR's rule. The released code also drops boxes less than a pixel wide or high.
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        records.append(Record(image["id"], source, size, boxes[keep], rows[keep, 4].astype(np.int64)))
    return DetectionSet(records, content, **options)


class FileFinder:
    """Finds missing images before the first step. It lists each folder once, which takes a second for
    COCO; decoding all images would take minutes."""

    def __init__(self, folder: Path):
        self.folder, self.inside = folder, os.path.join(os.path.abspath(folder), "")
        self.names = {}  # folder -> names in it

    def find(self, name: object, where: Path | str) -> Path:
        """The path of a file name of the annotations `where`."""
        is_name = isinstance(name, str) and name.isprintable() and len(name) < 1000
        path = Path(os.path.normpath(self.folder / str(name)))
        if not is_name or not os.path.abspath(path).startswith(self.inside):
            raise InputError(f"annotations {where}: {name!r:.80} is not the name of a file inside "
                             f"{self.folder}")
        if path.parent not in self.names:
            try:
                self.names[path.parent] = set(os.listdir(path.parent))
            except OSError as e:
                raise InputError(f"folder {path.parent} of an image cannot be listed ({e.strerror}); "
                                 f"{where} names it") from None
        if path.name not in self.names[path.parent]:
            raise InputError(f"image {path} is missing; {where} lists it")
        return path


DETECTION_DATA = ("shapes or shapes-hard (generated, no download), coco, cityscapes, or any folder in "
                  "COCO format with train/, val/ and annotations/instances_{train,val}.json")
COCO_HELP = ("download train2017.zip, val2017.zip and annotations_trainval2017.zip (COCO 2017, "
             "cocodataset.org), unpack them there, or name another folder with --data-root")
FOLDER_HELP = "needed are train/, val/ and annotations/instances_{train,val}.json in it"


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
    if data in shapes.EMBEDDED_SETS:
        pictures, truth = shapes.detection_pictures(data, split, limit)
        records = [Record(id, image, image.size, boxes, labels) for id, image, boxes, labels in pictures]
        return DetectionSet(records, truth, **options)
    if data == "cityscapes":
        folder = Path(root or "data/cityscapes")
        return coco_format(folder, cityscapes.annotation_file(folder, split), limit, **options)
    folder, suffix = (Path(root or "data/coco"), "2017") if data == "coco" else (Path(data), "")
    images = folder / (split + suffix)
    annotations = folder / "annotations" / f"instances_{split}{suffix}.json"
    for path in (folder, images, annotations):
        if not path.exists():
            raise InputError(f"{path} is missing: {COCO_HELP if data == 'coco' else FOLDER_HELP}")
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
    Augmentation depends on (seed, epoch, index) only."""

    def __init__(self, items: list[tuple[Path | Image.Image, int]], classes: list[str], name: str,
                 image_size: int = 224, augment: str = "none", seed: int = 0):
        self.items, self.classes, self.name = items, classes, name
        self.image_size, self.augment, self.seed, self.epoch = image_size, augment, seed, 0

    def __len__(self) -> int:
        return len(self.items)

    def name_of(self, index: int) -> str:
        """An image's file, or its number if it was generated."""
        source, _ = self.items[index % len(self)]
        return str(source if isinstance(source, Path) else index % len(self))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.items[index % len(self)]
        image = read_image(source) if isinstance(source, Path) else source
        rng = np.random.default_rng((self.seed, self.epoch, index))
        return classification_transform(image, rng, self.image_size, self.augment), label


def image_folder(folder: Path, limit: int | None = None, **options) -> ClassificationSet:
    """A folder with a folder per class, as ImageNet unpacks. `limit`: N images, taken in turn from the
    classes. Raises InputError if the folder is missing or a class has no image."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: needed is a folder with one folder of images per class")
    names = sorted(p.name for p in os.scandir(folder) if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise InputError(f"{folder} holds {len(names)} class folders: needed are two or more, each with "
                         f"images")
    by_class = []
    for label, name in enumerate(names):
        files = sorted(p.path for p in os.scandir(folder / name)
                       if p.is_file() and not p.name.startswith("."))
        if not files:
            raise InputError(f"class folder {folder / name} is empty: add images or remove it")
        by_class.append([(Path(f), label) for f in files])
    if limit:
        turns = itertools.zip_longest(*by_class)
        items = [item for turn in turns for item in turn if item is not None][:limit]
    else:
        items = list(itertools.chain.from_iterable(by_class))
    return ClassificationSet(items, names, **options)


CLASSIFICATION_DATA = ("shapes or shapes-hard (generated, no download), imagenet, imagenet21k, or any "
                       "folder with train/ and val/, each with a folder of images per class")
# ImageNet-21k-P has the folder names of its authors' archive.
IMAGENET_FOLDERS = {"imagenet": ("train", "val"),
                    "imagenet21k": ("imagenet21k_train", "imagenet21k_val")}


def classification_set(data: str, split: str, root: str | None = None, limit: int | None = None,
                       image_size: int = 224, augment: str = "none", seed: int = 0) -> ClassificationSet:
    """The set that `--data` names, see CLASSIFICATION_DATA. split: "train" or "val". root: the folder of
    `imagenet` or `imagenet21k`, data/NAME by default. augment: of `classification_transform`."""
    options = dict(name=f"{data} {split}", image_size=image_size, augment=augment, seed=seed)
    if data in shapes.EMBEDDED_SETS:
        items = shapes.classification_pictures(data, split, limit)
        return ClassificationSet(items, list(shapes.SHAPES), **options)
    folder = Path(root or f"data/{data}") if data in IMAGENET_FOLDERS else Path(data)
    train, val = IMAGENET_FOLDERS.get(data, ("train", "val"))
    return image_folder(folder / (train if split == "train" else val), limit, **options)
