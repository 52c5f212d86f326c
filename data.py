"""Data: where images, boxes and labels come from, the transforms of detection, and batches.

Detection: four sources give the same thing, a `DetectionSet`: `shapes` (or `shapes-hard`), generated; `coco`
and `cityscapes`, as they unpack; and any folder in COCO format. Transforms are Deformable DETR's (the paper,
4.1, follows it). Classification: a `ClassificationSet` of `shapes`, ImageNet or any folder with a folder per
class; its augmentations are in augment.py. Boxes are absolute (x0, y0, x1, y1) in pixels inside this file
and normalised (cx, cy, w, h) when they leave it.
"""
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from augment import ClassificationTransform
from cityscapes import cached_coco, cityscapes_to_coco  # noqa: F401 (public here)
from coco import check_annotations, load_annotations
from images import FORMATS, read_image, to_tensor
from model import InputError
from shapes import COLOURS, SHAPES, shape_scene

# ---------------------------------------------------------------------------- transforms (Deformable DETR's)
# Each takes and returns (PIL image, boxes (n, 4) xyxy in pixels, labels (n,)).

Sample = tuple[Image.Image, np.ndarray, np.ndarray]


def flip(image: Image.Image, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    w = image.width
    return ImageOps.mirror(image), np.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]],
                                            1), labels


def resize(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, short: int, long: int) -> Sample:
    """Keeps the aspect ratio: the short side becomes `short`, or less where the long side would exceed
    `long`."""
    w, h = image.size
    scale = min(short / min(w, h), long / max(w, h))
    new_w, new_h = max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))
    if (new_w, new_h) != (w, h):
        image = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    return image, boxes * np.array([new_w / w, new_h / h] * 2), labels


def crop(image: Image.Image, boxes: np.ndarray, labels: np.ndarray, x: int, y: int, w: int,
         h: int) -> Sample:
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
        self.corruption = None  # of an image before the transform: (picture, image id) -> picture (COCO-C)
        categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        self.category_ids = [c["id"] for c in categories]  # label -> category id, which may have gaps

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int):
        record = self.records[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        image = record.image() if self.corruption is None else self.corruption(record.image(), record.id)
        image, boxes, labels = self.transform(image, record.boxes, record.labels, rng)
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
        check_all(check, [r for r in records if isinstance(r.source, Path)], self.name)


def check_all(check: Callable[[object], str | None], files: list, name: str) -> None:
    """Calls check(file) -> None or what is wrong, for each file; raises InputError with the first
    complaint."""
    if not files:  # generated
        return
    with ThreadPoolExecutor() as pool:  # pillow decodes outside the interpreter's lock
        bar = tqdm(total=len(files), desc=f"checking {name}", leave=False, unit="image")
        for start in range(0, len(files), 1000):  # ImageNet-21k has 11 million
            for error in pool.map(check, files[start:start + 1000]):
                bar.update()
                if error:
                    pool.shutdown(cancel_futures=True)
                    raise InputError(error)
        bar.close()


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

def coco_format(image_folder: Path, annotations: Path | dict, limit: int | None = None,
                **options) -> DetectionSet:
    """Any detection set in COCO format: an annotation file, or its content as a dict, and the folder of the
    images; the options are those of `DetectionSet`. Images without objects stay; crowd regions are left out
    of the training targets (they remain in `ground_truth`); boxes are clipped to their image, empty ones
    dropped. No file name may lead out of the image folder, but symbolic links in it may: some are made of
    links. `limit`: the first N images."""
    where = "given as a dict" if isinstance(annotations, dict) else annotations
    content = (check_annotations(annotations, where) if isinstance(annotations, dict)
               else load_annotations(annotations))
    content["images"] = content["images"][:limit]
    boxes_of = {image["id"]: [] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in boxes_of]
    label_of = {c: i for i, c in enumerate(sorted(c["id"] for c in content["categories"]))}
    for a in content["annotations"]:
        if not a["iscrowd"]:
            boxes_of[a["image_id"]].append((*a["bbox"], label_of[a["category_id"]]))
    records, inside = [], os.path.join(os.path.abspath(image_folder), "")
    for image in content["images"]:
        name, size = image["file_name"], (image["width"], image["height"])
        source = Path(os.path.normpath(image_folder / str(name)))
        is_name = isinstance(name, str) and name.isprintable() and len(name) < 1000
        if not is_name or not os.path.abspath(source).startswith(inside):
            raise InputError(f"annotations {where}: the file name {name!r:.80} leaves "
                             f"{image_folder} or is none")
        rows = np.array(boxes_of[image["id"]], dtype=np.float64).reshape(-1, 5)
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
        boxes = boxes.clip(0, np.array([*size, *size]))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        records.append(Record(image["id"], source, size, boxes[keep], rows[keep, 4].astype(np.int64)))
    if not records:
        raise InputError(f"annotations {where} list no image")
    return DetectionSet(records, content, **options)


COCO_HELP = ("download train2017.zip, val2017.zip and annotations_trainval2017.zip (COCO 2017, "
             "cocodataset.org), unpack them there, or name another folder with --data-root")
FOLDER_HELP = "needed are train/, val/ and annotations/instances_{train,val}.json in it"


def detection_set(data: str, split: str, root: str | None = None, limit: int | None = None,
                  image_size: int = 800, augment: str = "none", seed: int = 0,
                  cache: str | Path = "runs") -> DetectionSet:
    """The set that `--data` names: "shapes", "shapes-hard", "coco", "cityscapes", or a folder with train/,
    val/ and annotations/instances_*.json.

    Args:
        split: "train" or "val". root: the folder of `coco` or `cityscapes`, data/NAME by default. limit: the
            first N images only. cache: the folder for Cityscapes' annotations in COCO format, made once.
    Raises:
        InputError: if it is missing (says what to download and where it goes) or malformed.
    """
    options = dict(name=f"{data} {split}", transform=Transform(image_size, augment), seed=seed)
    if data in COLOURS:
        return shapes_detection(split, limit, COLOURS[data], **options)
    if data == "cityscapes":
        folder = Path(root or "data/cityscapes")
        if folder.is_dir() and not (folder / "leftImg8bit").is_dir():
            raise InputError(f"{folder / 'leftImg8bit'} is missing: unpack leftImg8bit_trainvaltest.zip in "
                             f"{folder}")
        return coco_format(folder, cached_coco(folder, split, cache, os.cpu_count() or 1), limit, **options)
    folder, suffix = (Path(root or "data/coco"), "2017") if data == "coco" else (Path(data), "")
    images = folder / (split + suffix)
    annotations = folder / "annotations" / f"instances_{split}{suffix}.json"
    mend = COCO_HELP if data == "coco" else FOLDER_HELP
    for path in (folder, images, annotations):
        if not path.exists():
            raise InputError(f"{path} is missing: {mend}")
    return coco_format(images, annotations, limit, **options)


def shapes_detection(split: str, limit: int | None = None, colours: int = 4, seed: int = 0,
                     **options) -> DetectionSet:
    """The embedded detection set: 2,000 training and 300 validation pictures of 64 x 64 pixels, no file read
    or written. Every picture has a generator of its own, seeded by its split and number, so the splits share
    none."""
    records, annotations = [], []
    for i in range({"train": 2000, "val": 300}[split])[:limit]:
        rng = np.random.default_rng((20220425, split == "val", i))
        image, boxes, labels = shape_scene(rng, colours=colours)
        records.append(Record(i + 1, image, image.size, boxes, labels))
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1,
                                "iscrowd": 0,
                                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    truth = {"images": [{"id": r.id, "width": r.size[0], "height": r.size[1], "file_name": f"{r.id}.png"}
                        for r in records],
             "annotations": annotations,
             "categories": [{"id": i, "name": n} for i, n in enumerate(SHAPES, 1)]}
    return DetectionSet(records, truth, seed=seed, **options)


# -------------------------------------------------------------------------------------------- classification

class ClassificationSet(Dataset):
    """Items: (image (3, size, size) float32, label). An index beyond the length is the same picture once
    more, with other augmentations (repeated augmentation); they depend on (seed, epoch, index) only."""

    def __init__(self, items: list[tuple[Path | Image.Image, int]], classes: list[str], name: str,
                 transform: ClassificationTransform, seed: int = 0):
        self.items, self.classes, self.name = items, classes, name
        self.transform, self.seed, self.epoch = transform, seed, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.items[index % len(self.items)]
        image = read_image(source) if isinstance(source, Path) else source
        return self.transform(image, np.random.default_rng((self.seed, self.epoch, index))), label

    def check_images(self, indices: range | None = None) -> None:
        """Reads the head of every image file (or those of some indices), so that a file that is no image
        stops a run before its first step; to decode them all, as for detection, would take ImageNet an hour.
        Raises InputError naming the first."""
        def check(path: Path) -> str | None:
            try:
                Image.open(path, formats=FORMATS).close()
            # pillow's readers raise a dozen kinds of error on files that are not theirs
            except Exception as e:
                return f"{path} is no image ({' '.join(str(e).split())[:100]}): remove or replace it"
        items = self.items if indices is None else [self.items[i] for i in indices]
        check_all(check, [source for source, _ in items if isinstance(source, Path)], self.name)


def image_folder(folder: Path, limit: int | None = None, **options) -> ClassificationSet:
    """A folder with a folder per class, as ImageNet unpacks. `limit`: N images, taken in turn from the
    classes. Raises InputError if there is none, or a class without images."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: needed is a folder with one folder of images per class")
    names = sorted(p.name for p in os.scandir(folder) if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise InputError(f"{folder} holds {len(names)} class folders: needed are two or more, each "
                         f"with images")
    items = []
    for label, name in enumerate(names):
        files = sorted(p.path for p in os.scandir(folder / name) if p.is_file() and
                       not p.name.startswith("."))
        if not files:
            raise InputError(f"class folder {folder / name} is empty: add images or remove it")
        items.append([(Path(f), label) for f in files])
    turns = [x for turn in itertools.zip_longest(*items) for x in turn if x] if limit else list(
        itertools.chain.from_iterable(items))
    return ClassificationSet(turns[:limit], names, **options)


def shapes_classification(split: str, limit: int | None = None, colours: int = 4,
                          **options) -> ClassificationSet:
    """The embedded classification set: 8,000 training and 400 validation pictures of 64 x 64 pixels with one
    shape in each."""
    items = []
    for i in range({"train": 8000, "val": 400}[split])[:limit]:
        rng = np.random.default_rng((20220426, split == "val", i))
        image, _, labels = shape_scene(rng, objects=1, colours=colours)
        items.append((image, int(labels[0])))
    return ClassificationSet(items, list(SHAPES), **options)


IMAGENET_FOLDERS = {"imagenet": ("train", "val"), "imagenet21k": ("imagenet21k_train", "imagenet21k_val")}


def classification_set(data: str, split: str, transform: ClassificationTransform, root: str | None = None,
                       limit: int | None = None, seed: int = 0) -> ClassificationSet:
    """The set that `--data` names: "shapes", "shapes-hard", "imagenet", "imagenet21k" (ImageNet-21K-P as its
    authors pack it), or a folder with train/ and val/, each with a folder per class. root: of the two
    ImageNets, data/NAME by default."""
    options = dict(name=f"{data} {split}", transform=transform, seed=seed)
    if data in COLOURS:
        return shapes_classification(split, limit, COLOURS[data], **options)
    folder = Path(root or f"data/{data}") if data in IMAGENET_FOLDERS else Path(data)
    return image_folder(folder / IMAGENET_FOLDERS.get(data, ("train", "val"))[split == "val"], limit,
                        **options)
