"""COCO-format annotation files: read, and checked entry by entry before anything is trained on them.

This file knows JSON only; data.py makes a data set of what it returns.
"""
import json
from pathlib import Path

from model import InputError


def load_annotations(path: Path) -> dict:
    """`check_annotations` of a file's content. Raises InputError, too, if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        raise InputError(f"annotations {path} are missing") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"annotations {path} are not JSON ({e})") from None
    except OSError as e:
        raise InputError(f"annotations {path} cannot be read ({e.strerror})") from None
    return check_annotations(content, path)


def check_annotations(content: dict, path: Path | str) -> dict:
    """A COCO-format dict, checked: {"images", "annotations", "categories"} with what detection needs and
    nothing else. Missing areas and crowd flags are filled in. `path`: what errors call it. Raises
    InputError, naming the entry, at the first thing wrong."""
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
            raise InputError(f"annotations {path}: image {image['id']!r:.60} has no positive integer "
                             f"width and height")
        if not is_id(image["id"]) or image["id"] in sizes:
            raise InputError(f"annotations {path}: image id {image['id']!r:.60} is no integer of its own")
        sizes[image["id"]] = (image["width"], image["height"])
    category_ids = [c["id"] for c in content["categories"]]
    if not category_ids or not all(map(is_id, category_ids)) or len(set(category_ids)) < len(category_ids):
        raise InputError(f"annotations {path}: category ids must be integers, each its own, and at "
                         f"least one")
    categories = [{"id": c["id"], "name": str(c["name"])} for c in content["categories"]]
    for c in categories:
        if not c["name"].isprintable():
            raise InputError(f"annotations {path}: category {c['id']} has the name {c['name']!r:.60}, which "
                             f"cannot be printed")
    annotations = [check_annotation(a, i, sizes, set(category_ids), path)
                   for i, a in enumerate(content["annotations"], 1)]
    images = [{k: i[k] for k in ("id", "file_name", "width", "height")} for i in content["images"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def is_id(value: object) -> bool:
    """Whether a JSON value is an integer that pycocotools, which holds some ids as float64, tells from
    others."""
    return type(value) is int and abs(value) < 2 ** 53


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a picture's geometry may hold; NaN and infinity are not, nor is
    true."""
    return type(value) in (int, float) and abs(value) < 1e9


def check_annotation(entry: dict, number: int, sizes: dict, category_ids: set,
                     path: Path | str) -> dict:
    where, box = f"annotations {path}: annotation {entry.get('id', number)!r:.60}", entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        raise InputError(f"{where} has the box {box!r:.60}: needed are four finite numbers x, y, "
                         f"width, height")
    if box[2] < 0 or box[3] < 0:
        raise InputError(f"{where} has a box of negative size, {box!r:.60}: needed are x, y, width, height")
    for key, known in (("image_id", sizes), ("category_id", category_ids)):
        if type(entry[key]) is not int or entry[key] not in known:
            raise InputError(f"{where} has the {key} {entry[key]!r:.60}, which does not exist")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise InputError(f"{where} has iscrowd {entry['iscrowd']!r:.60}: needed is 0 or 1")
    area = entry.get("area")
    # Numbered anew from 1: the ids in the file may repeat or be missing, and pycocotools takes id 0 for "no
    # match".
    return {"id": number, "image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box,
            "area": area if is_number(area) and area >= 0 else box[2] * box[3],
            "iscrowd": int(entry.get("iscrowd", 0))}
