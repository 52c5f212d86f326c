"""Cityscapes as a detection set (4.5, Table 5): its polygons -> boxes in COCO format.

Cityscapes draws every image as a painter does: the far things first, the near ones over them. What is left
of an instance after all later objects are painted is what can be seen of it, and the tight box around that
is its box. Nothing is written beside the data.
"""
import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import InputError

# Category ids are 1..8 in this order. Cityscapes' own ids, which the released code's annotation files keep,
# are 24..28 and 31..33: the same order, so the labels that a model learns (0..7) are the same.
CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
FORMAT = 1  # of a cached file; counted up whenever the conversion changes
FAR = 1e5   # no coordinate is beyond; pillow's polygons lose whole pixels of precision from about 1e7 on
MOST_PIXELS = 90_000_000  # of an image, as everywhere in this project
HELP = ("download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com, after "
        "registration) and unpack both in")


def cityscapes_to_coco(root: str | Path, split: str, workers: int = 0) -> dict:
    """The objects of Cityscapes in COCO format, from gtFine/SPLIT/CITY/*_gtFine_polygons.json.

    Args:
        root: the folder with gtFine/. split: "train" (2,975 images) or "val" (500).
        workers: processes beside this one; 0 or 1: none.
    Returns:
        {"images", "annotations", "categories"}. Images are numbered from 1 by file name, which is relative
        to `root`; those without objects stay. bbox: [x, y, w, h] in pixels, ints, around what can be seen;
        area: visible pixels; iscrowd 1: a group that was not taken apart ("cargroup"). An object of which
        nothing can be seen has no annotation. There are no masks.
    Raises:
        InputError: if the data are missing (it says what to download) or malformed (it names the file).
    """
    root = Path(root)
    files = annotation_files(root, split)
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        scenes = pool.map(read_scene, files, chunksize=8) if pool else map(read_scene, files)
        scenes = list(tqdm(scenes, f"reading Cityscapes {split}", len(files), leave=False, unit="image"))
    images = [{"id": i, **image} for i, (image, _) in enumerate(scenes, 1)]
    objects = [(i, o) for i, (_, objects) in enumerate(scenes, 1) for o in objects]
    return {"images": images,
            "annotations": [{"id": n, "image_id": i, **o} for n, (i, o) in enumerate(objects, 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]}


def cached_coco(root: str | Path, split: str, folder: str | Path, workers: int = 0) -> Path:
    """`cityscapes_to_coco` as a COCO-format file, `folder`/cityscapes_SPLIT.json, whose path is returned. It
    is made anew only if it is absent or damaged, or if the annotation files are not those it was made from.

    Raises:
        InputError: as `cityscapes_to_coco`, or if `folder` cannot be written.
    """
    path = Path(folder) / f"cityscapes_{split}.json"
    fingerprint = fingerprint_of(annotation_files(Path(root), split))
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # absent or damaged
        if json.loads(path.read_text())["fingerprint"] == fingerprint:
            return path
    content = {"fingerprint": fingerprint, **cityscapes_to_coco(root, split, workers)}
    # a name of its own, as the processes of a run on several GPUs may come here at once
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path} ({e.strerror}): name a folder that can be written") from None
    return path


def fingerprint_of(files: list[Path]) -> dict:
    """What changes if any annotation file is edited, added or removed."""
    try:
        stats = [f.stat() for f in files]
    except OSError as e:
        raise InputError(f"annotations {e.filename} cannot be read ({e.strerror}): unpack "
                         f"gtFine_trainvaltest.zip again") from None
    return {"format": FORMAT, "files": len(files), "bytes": sum(s.st_size for s in stats),
            "newest": max(s.st_mtime_ns for s in stats)}


# ------------------------------------------------------------------------------------------------- the files

def annotation_files(root: Path, split: str) -> list[Path]:
    """A split's annotation files, sorted by city and name. InputError if there are none."""
    if split == "test":
        raise InputError("the annotations of Cityscapes' test split are dummies without objects (the true "
                         "ones are secret): use the split val")
    for folder in (root, root / "gtFine"):
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: {HELP} {root}, or name another folder with --data-root")
    files = (root / "gtFine" / split).glob("*/*_gtFine_polygons.json")
    files = sorted(files, key=Path.as_posix)
    if not files:
        raise InputError(f"{root / 'gtFine' / split} holds no */*_gtFine_polygons.json: {HELP} {root}")
    return files


def read_scene(path: Path) -> tuple[dict, list[dict]]:
    """One annotation file -> (COCO image, COCO annotations), both without ids. InputError, naming the file,
    if it is malformed."""
    city, name = path.parent, path.name.replace("_gtFine_polygons.json", "_leftImg8bit.png")
    file_name = f"leftImg8bit/{city.parent.name}/{city.name}/{name}"
    width, height, objects = read_polygons(path)
    return {"file_name": file_name, "width": width, "height": height}, visible(width, height, objects)


def read_polygons(path: Path) -> tuple[int, int, list]:
    """A checked annotation file: width, height, and (label, [x0, y0, x1, y1, ...]) of the objects that are
    painted, in painting order."""
    mend = "unpack gtFine_trainvaltest.zip again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"annotations {path} are not JSON ({e}): {mend}") from None
    except OSError as e:
        raise InputError(f"annotations {path} cannot be read ({e.strerror}): {mend}") from None
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise InputError(f"annotations {path} lack the list 'objects': {mend}")
    width, height = content.get("imgWidth"), content.get("imgHeight")
    if not all(type(side) is int and side > 0 for side in (width, height)) or width * height > MOST_PIXELS:
        raise InputError(f"annotations {path}: imgWidth and imgHeight are not the size of a picture, whole "
                         f"numbers of pixels: {mend}")
    painted = []
    for i, entry in enumerate(content["objects"]):
        wrong = complaint(entry)
        if wrong:
            raise InputError(f"annotations {path}: objects[{i}] {wrong}: {mend}")
        # As in the tools of Cityscapes, an object that its annotator deleted hides nothing, nor does a
        # license plate, which has no id there; every other label paints, that of stuff and "out of roi" too.
        # Our own rule: less than three points enclose nothing.
        if not entry.get("deleted") and entry["label"] != "license plate" and len(entry["polygon"]) > 2:
            painted.append((entry["label"], [v for point in entry["polygon"] for v in point]))
    return width, height, painted


def complaint(entry: object) -> str | None:
    """What is wrong with an entry of 'objects', if anything. Values are not quoted: they may be huge."""
    if not isinstance(entry, dict):
        return "is no object with a label and a polygon"
    for key, kind in (("label", str), ("polygon", list)):
        if not isinstance(entry.get(key), kind):
            return f"lacks the key {key!r} or has no {'text' if kind is str else 'list'} there"
    if entry.get("deleted", 0) not in (0, 1):
        return "has the key 'deleted' with neither 0 nor 1"
    for i, point in enumerate(entry["polygon"]):
        # NaN and infinity are not below FAR; true is an int to Python
        if not (isinstance(point, list) and len(point) == 2
                and all(type(v) in (int, float) and abs(v) < FAR for v in point)):
            return f"has a polygon whose point {i} is not two numbers x, y of pixels"


# ---------------------------------------------------------------------------------------------- the painting

def visible(width: int, height: int, objects: list) -> list[dict]:
    """What can be seen of the instances: {"category_id", "bbox", "area", "iscrowd"}, in painting order.

    Every object paints, with its number if it is an instance, and with 0 if not; pillow clips polygons at
    the image's edges and fills them with their outline, as the tools of Cityscapes do, so that the polygon
    (2, 3) (10, 3) (10, 8) (2, 8) is 9 pixels wide.
    """
    from scipy.ndimage import find_objects  # here, so that --help need not wait for it
    canvas, instances = Image.new("I", (width, height)), []  # 32 bits
    draw = ImageDraw.Draw(canvas)
    for label, polygon in objects:
        name = label.removesuffix("group")
        if name in CLASSES:
            # Each group is a crowd of its own. (Cityscapes' instance images, and with them the released
            # code, make one crowd of all groups of a class in an image.)
            instances.append((CLASSES.index(name) + 1, int(name != label)))
        draw.polygon(polygon, fill=len(instances) if name in CLASSES else 0)
    pixels = np.asarray(canvas)  # (height, width) int32
    areas = np.bincount(pixels.ravel(), minlength=len(instances) + 1)[1:]
    result = []
    for (category, crowd), area, box in zip(instances, areas.tolist(), find_objects(pixels, len(instances))):
        if area:
            y, x = box
            result.append({"category_id": category, "iscrowd": crowd, "area": area,
                           "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start]})
    return result
