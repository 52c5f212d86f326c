"""Cityscapes as a detection set (4.5, Table 5): polygons -> boxes in COCO format.

    python -m extras.cityscapes [ROOT]    writes ROOT/annotations/instances_{train,val}.json anew

Cityscapes lists the objects of an image from far to near. Painted in this order, near objects hide far
ones. The box of an object is tight around the pixels that stay visible.
"""
import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from engine import Help, InputError, note, one_line, run_script

# Category ids are 1 to 8 in this order. Cityscapes' own ids, which the released code's annotation files
# keep, are 24 to 28 and 31 to 33 in the same order. So a model learns the same labels, 0 to 7.
CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
FARTHEST = 1e5  # of coordinates. From about 1e7 on, polygons of pillow are whole pixels off.
HELP = ("download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com, "
        "after registration) and unpack both in")


# --------------------------------------------------------------------------------------- the COCO file

def path_of(root: str | Path, split: str) -> Path:
    return Path(root) / "annotations" / f"instances_{split}.json"


def annotation_file(root: str | Path, split: str) -> Path:
    """The path of a split's annotations in COCO format. The first call makes the file. InputError as of
    `convert`, or if the images are missing."""
    root, path = Path(root), path_of(root, split)
    if root.is_dir() and not (root / "leftImg8bit").is_dir():
        raise InputError(f"{root / 'leftImg8bit'} is missing: unpack leftImg8bit_trainvaltest.zip in "
                         f"{root}")
    if not path.is_file():
        convert(root, split)
    polygons = (root / "gtFine" / split).glob("*/*_gtFine_polygons.json")
    if any(file.stat().st_mtime > path.stat().st_mtime for file in polygons):
        note(f"{path} is older than some of its polygons: python -m extras.cityscapes {root} makes it "
             f"anew")
    return path


def convert(root: str | Path, split: str) -> dict:
    """Writes root/annotations/instances_{split}.json and returns its content. InputError as of
    `cityscapes_to_coco`, or if the file cannot be written."""
    content, path = cityscapes_to_coco(root, split), path_of(root, split)
    try:
        path.parent.mkdir(exist_ok=True)
        # All processes of a run on several GPUs may come here. Each writes and renames its own file.
        with TemporaryDirectory(dir=path.parent) as own:
            Path(own, path.name).write_text(json.dumps(content), encoding="utf-8")
            Path(own, path.name).replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path} ({e.strerror}): run `python -m extras.cityscapes ROOT` "
                         f"once where {root} can be written") from None
    return content


def cityscapes_to_coco(root: str | Path, split: str) -> dict:
    """The objects of Cityscapes in COCO format, from gtFine/SPLIT/CITY/*_gtFine_polygons.json.

    Args:
        root: the folder with gtFine/. split: "train" (2,975 images, two minutes) or "val" (500).
    Returns:
        {"images", "annotations", "categories"}. Images are numbered from 1 by file name, which is
        relative to `root`. Images without objects stay. An object without visible pixels has no
        annotation. There are no masks. bbox is the tight box of the visible pixels, [x, y, w, h] in
        ints; area is their number. iscrowd is 1 for objects that were not taken apart ("cargroup"): all
        groups of a class in an image are one annotation.
    Raises:
        InputError: the data are missing (it says what to download) or malformed (it names the file).
    """
    images, annotations = [], []
    files = polygon_files(Path(root), split)
    bar = tqdm(files, f"reading Cityscapes {split}", leave=False, unit="image")
    for image_id, (image, objects) in enumerate(map(read_scene, bar), 1):
        images.append({"id": image_id, **image})
        for o in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **o})
    return {"images": images, "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]}


# ----------------------------------------------------------------------------------- the polygon files

def polygon_files(root: Path, split: str) -> list[Path]:
    """A split's polygon files, sorted by city and name. InputError if there are none."""
    if split == "test":
        raise InputError("the annotations of Cityscapes' test split are dummies without objects (the "
                         "true ones are secret): use the split val")
    for folder in (root, root / "gtFine"):
        if not folder.is_dir():
            raise InputError(f"{folder} is missing: {HELP} {root}, or name another folder with "
                             "--data-root")
    files = sorted((root / "gtFine" / split).glob("*/*_gtFine_polygons.json"), key=Path.as_posix)
    if not files:
        raise InputError(f"{root / 'gtFine' / split} holds no */*_gtFine_polygons.json: {HELP} {root}")
    return files


def read_scene(path: Path) -> tuple[dict, list[dict]]:
    """One polygon file -> (COCO image, COCO annotations), both without ids."""
    width, height, objects = read_polygons(path)
    split, city = path.parent.parent.name, path.parent.name
    name = path.name.replace("_gtFine_polygons.json", "_leftImg8bit.png")
    image = {"file_name": f"leftImg8bit/{split}/{city}/{name}", "width": width, "height": height}
    return image, visible_objects(width, height, objects)


def read_polygons(path: Path) -> tuple[int, int, list]:
    """A polygon file -> width, height, and (label, [x0, y0, x1, y1, ...]) of the objects that are
    painted, in painting order. InputError, naming the file, if it is malformed."""
    place, painted = "the file", []
    try:
        content = json.loads(path.read_bytes())
        width, height, entries = content["imgWidth"], content["imgHeight"], content["objects"]
        sides_fit = all(type(side) is int and side > 0 for side in (width, height))
        if not sides_fit or width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError("imgWidth and imgHeight are not the size of a picture in pixels")
        if not isinstance(entries, list):
            raise ValueError("'objects' is no list")
        for i, entry in enumerate(entries):
            place = f"objects[{i}]"
            label, polygon, deleted = entry["label"], entry["polygon"], entry.get("deleted", 0)
            coordinates = [v for x, y in polygon for v in (x, y)]
            if not isinstance(label, str) or not isinstance(polygon, list) or deleted not in (0, 1):
                raise ValueError("'label' is no text, 'polygon' is no list, or 'deleted' is not 0 or 1")
            # NaN and infinity are not below FARTHEST. type() because true is an int to isinstance().
            if not all(type(v) in (int, float) and abs(v) < FARTHEST for v in coordinates):
                raise ValueError("'polygon' has a point that is not two numbers of pixels")
            # As in the tools of Cityscapes, deleted objects and license plates hide nothing. All other
            # labels do, also "sky" and "out of roi". Our own rule: a polygon needs three points.
            if not deleted and label != "license plate" and len(polygon) > 2:
                painted.append((label, coordinates))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"annotations {path}: {place} cannot be read ({one_line(e)}): unpack "
                         "gtFine_trainvaltest.zip again") from None
    return width, height, painted


# ---------------------------------------------------------------------------------------- the painting

def visible_objects(width: int, height: int, objects: list) -> list[dict]:
    """The visible instances: {"category_id", "iscrowd", "area", "bbox"}, in the order of first paint.

    Each instance paints its number, every other object paints 0. As in the tools of Cityscapes, all
    groups of a class share a number, and pillow fills polygons with their outline and clips them at the
    image's edges. So the polygon (2, 3) (10, 3) (10, 8) (2, 8) is 9 pixels wide.
    """
    from scipy.ndimage import find_objects  # imported here, because it is slow and --help does without
    canvas = Image.new("I", (width, height))  # 32 bits
    draw = ImageDraw.Draw(canvas)
    numbers = {}  # (category id, iscrowd, index of the object or None for a crowd) -> what it paints
    for i, (label, polygon) in enumerate(objects):
        number, name = 0, label.removesuffix("group")
        if name in CLASSES:
            crowd = name != label
            key = CLASSES.index(name) + 1, int(crowd), None if crowd else i
            number = numbers.setdefault(key, len(numbers) + 1)
        draw.polygon(polygon, fill=number)
    pixels = np.asarray(canvas)  # (height, width) int32
    visible = []
    for ((category, crowd, _), number), box in zip(numbers.items(), find_objects(pixels, len(numbers))):
        if box:
            y, x = box
            visible.append({"category_id": category, "iscrowd": crowd,
                            "area": int((pixels[box] == number).sum()),
                            "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start]})
    return visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("root", type=Path, nargs="?", default=Path("data/cityscapes"), metavar="ROOT",
                        help="the folder with gtFine/")
    root = parser.parse_args().root
    for split in ("train", "val"):
        content = convert(root, split)
        crowds = sum(a["iscrowd"] for a in content["annotations"])
        print(f"{path_of(root, split)}: {len(content['images'])} images, "
              f"{len(content['annotations']) - crowds} objects, {crowds} crowds")


if __name__ == "__main__":
    run_script(main)
