"""Cityscapes: visible boxes by hand and against a slow painter, the converted file, broken data."""
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from conftest import call

from data import detection_set
from engine import InputError
from extras.cityscapes import CLASSES, annotation_file, cityscapes_to_coco, convert

W, H = 64, 32
NAME = "aachen_000000_000019"


def rect(x0, y0, x1, y1):
    """The corners are pixels of the rectangle."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def entry(label, polygon, **more):
    return {"label": label, "polygon": polygon, **more}


@pytest.fixture
def write(tmp_path):
    """write(objects, ...) makes an image and its polygon file, laid out as in Cityscapes -> root."""
    def write(objects, city="aachen", name=NAME, split="train", text=None):
        annotations = tmp_path / "gtFine" / split / city / f"{name}_gtFine_polygons.json"
        image = tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
        for path in (annotations, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
        content = {"imgHeight": H, "imgWidth": W, "objects": objects}
        annotations.write_text(json.dumps(content) if text is None else text, encoding="utf-8")
        return tmp_path
    return write


def seen(root):
    """(class, box, area, crowd) of every annotation."""
    return [(CLASSES[a["category_id"] - 1], a["bbox"], a["area"], a["iscrowd"])
            for a in cityscapes_to_coco(root, "train")["annotations"]]


# ------------------------------------------------------------------------------------ computed by hand

def test_the_eight_classes_in_their_order(write):
    content = cityscapes_to_coco(write([]), "train")
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (1, "person"), (2, "rider"), (3, "car"), (4, "truck"), (5, "bus"), (6, "train"),
        (7, "motorcycle"), (8, "bicycle")]
    assert content["annotations"] == []
    assert len(content["images"]) == 1  # an image without objects stays


def test_a_lone_object_has_the_box_of_its_pixels(write):
    car = entry("car", rect(2, 3, 10, 8))
    assert seen(write([entry("road", rect(0, 0, 63, 31)), car])) == [("car", [2, 3, 9, 6], 54, 0)]
    # a diamond: the pixels with |dx| + |dy| <= 4, which are 1 + 4 (1 + 2 + 3 + 4)
    diamond = entry("bus", [[8, 4], [12, 8], [8, 12], [4, 8]])
    assert seen(write([diamond])) == [("bus", [4, 4, 9, 9], 41, 0)]


@pytest.mark.parametrize("cover", [entry("pole", rect(20, 0, 40, 31), deleted=1),
                                   entry("car", rect(20, 0, 40, 31), deleted=True),
                                   entry("license plate", rect(20, 0, 40, 31)),
                                   entry("pole", [[20, 15], [40, 15]]), entry("bus", [])])
def test_deleted_objects_plates_and_lines_hide_nothing_and_are_no_objects(write, cover):
    car = entry("car", rect(10, 10, 29, 19))
    assert seen(write([car, cover])) == [("car", [10, 10, 20, 10], 200, 0)]


def test_an_image_may_hold_more_objects_than_a_byte_can_count(write):
    corners = [(2 * (i % 32), 2 * (i // 32)) for i in range(400)]
    assert seen(write([entry("person", rect(x, y, x + 1, y + 1)) for x, y in corners])) == [
        ("person", [x, y, 2, 2], 4, 0) for x, y in corners]


def test_objects_are_clipped_at_the_edges_of_the_image(write):
    assert seen(write([entry("car", rect(-9, -5, 3, 2)), entry("bus", rect(60, 30, 64, 32)),
                       entry("person", rect(64, 3, 70, 8)), entry("train", rect(-8, 3, -1, 8)),
                       entry("rider", [[20, -30], [25, -30], [25, 99999], [20, 99999.5]])])) == [
        ("car", [0, 0, 4, 3], 12, 0), ("bus", [60, 30, 4, 2], 8, 0), ("rider", [20, 0, 6, 32], 192, 0)]


def test_images_are_sorted_and_named_relative_to_the_root(write):
    for city, name in (("zurich", "zurich_1"), ("aachen", "aachen_2"), ("aachen", "aachen_1")):
        root = write([entry("car", rect(1, 1, 2, int(name[-1]) + 1))], city, name)
    write([entry("car", rect(1, 1, 2, 9))], "bonn", "bonn_1", "val")
    content = cityscapes_to_coco(str(root), "train")
    assert content["images"] == [
        {"id": i, "file_name": f"leftImg8bit/train/{name}_leftImg8bit.png", "width": 64, "height": 32}
        for i, name in enumerate(("aachen/aachen_1", "aachen/aachen_2", "zurich/zurich_1"), 1)]
    assert [(a["id"], a["image_id"], a["bbox"]) for a in content["annotations"]] == [
        (1, 1, [1, 1, 2, 2]), (2, 2, [1, 1, 2, 3]), (3, 3, [1, 1, 2, 2])]


# --------------------------------------------------------------------- against a painter without tools

def covers(polygon, x, y):
    """Whether a polygon or its outline covers a pixel. Edges are horizontal or vertical."""
    crossings = 0
    for (xa, ya), (xb, yb) in zip(polygon, polygon[1:] + polygon[:1]):
        if min(xa, xb) <= x <= max(xa, xb) and min(ya, yb) <= y <= max(ya, yb):
            return True
        # even-odd rule, for the point moved by 1/4 off the lines of the grid, which crosses no edge
        crossings += xa == xb and xa > x + 0.25 and (ya > y + 0.25) != (yb > y + 0.25)
    return crossings % 2 == 1


def random_polygon(rng):
    """A rectangle, an L or a U, of either orientation, anywhere in the image or around it."""
    x, y = rng.integers(-12, W + 4), rng.integers(-12, H + 4)
    (a, b, c), (p, q) = np.cumsum(rng.integers(2, 10, 3)), np.cumsum(rng.integers(2, 9, 2))
    corners = {0: [(0, 0), (a, 0), (a, p), (0, p)],
               1: [(0, 0), (b, 0), (b, p), (a, p), (a, q), (0, q)],
               2: [(0, 0), (a, 0), (a, p), (b, p), (b, 0), (c, 0), (c, q), (0, q)]}[rng.integers(3)]
    return [[int(x + u), int(y + v)] for u, v in corners[::rng.choice([-1, 1])]]


def painted_slowly(objects):
    """The last object that covers a pixel owns it."""
    pixels_of = {}
    for y in range(H):
        for x in range(W):
            owners = [i for i, o in enumerate(objects) if not o.get("deleted")
                      and o["label"] != "license plate" and covers(o["polygon"], x, y)]
            if owners:
                pixels_of.setdefault(owners[-1], []).append((x, y))
    merged = {}  # the pixels of all groups of a class together
    for i in pixels_of:
        label = objects[i]["label"]
        merged.setdefault(label if label.endswith("group") else i, []).extend(pixels_of[i])
    result = []
    for key, pixels in merged.items():
        label, (xs, ys) = key if isinstance(key, str) else objects[key]["label"], zip(*pixels)
        name = label[:-5] if label.endswith("group") else label
        if name in ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"):
            box = [min(xs), min(ys), max(xs) + 1 - min(xs), max(ys) + 1 - min(ys)]
            result.append((name, box, len(xs), int(label.endswith("group"))))
    return sorted(result)


def test_random_scenes_are_what_a_slow_painter_sees(write):
    labels = [*CLASSES, *(f"{name}group" for name in CLASSES), "pole", "static", "ego vehicle",
              "out of roi", "license plate", "caravan", "trailergroup", "group", "Car", "carpet"]
    hidden = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        objects = [entry(str(rng.choice(labels)), random_polygon(rng), deleted=int(rng.random() < 0.15))
                   for _ in range(25)]
        truth = painted_slowly(objects)
        assert sorted(seen(write(objects))) == truth
        hidden += sum(o["label"] in CLASSES for o in objects) - sum(crowd == 0 for *_, crowd in truth)
    assert hidden > 12  # there was something to drop


# ---------------------------------------------------------------------------------- the converted file

def test_a_split_is_converted_once_and_by_the_command_anew(write, capsys):
    write([entry("car", rect(1, 2, 9, 8)), entry("cargroup", rect(20, 2, 29, 8))])
    write([], name="aachen_2")
    root = write([entry("bus", rect(1, 2, 9, 8))], split="val")
    val = annotation_file(str(root), "val")
    assert val == root / "annotations" / "instances_val.json"
    assert val.stat().st_mode & 0o777 == 0o644  # others can read it, too
    assert json.loads(val.read_text()) == cityscapes_to_coco(root, "val")
    val.write_text("{}")
    assert annotation_file(root, "val") == val and val.read_text() == "{}"
    assert capsys.readouterr().out == ""
    os.utime(val, (1, 1))
    annotation_file(root, "val")
    assert "instances_val.json is older than some of its polygons" in capsys.readouterr().out
    call(root, "extras.cityscapes", root)
    assert capsys.readouterr().out.splitlines() == [
        f"{val.with_name('instances_train.json')}: 2 images, 1 objects, 1 crowds",
        f"{val}: 1 images, 1 objects, 0 crowds"]
    assert json.loads(val.read_text()) == cityscapes_to_coco(root, "val")


def test_a_converted_split_becomes_a_detection_set(write):
    root = write([entry("rider", rect(1, 2, 9, 8)), entry("cargroup", rect(20, 2, 29, 8))])
    dataset = detection_set("cityscapes", "train", root=root)
    image = root / "leftImg8bit/train/aachen" / f"{NAME}_leftImg8bit.png"
    assert dataset.classes == list(CLASSES)
    assert dataset.records[0].source == image
    assert dataset.records[0].boxes.tolist() == [[1, 2, 10, 9]]
    assert dataset.records[0].labels.tolist() == [1]
    assert [a["iscrowd"] for a in dataset.ground_truth["annotations"]] == [0, 1]
    image.unlink()
    with pytest.raises(InputError, match=f"{image} is missing"):
        detection_set("cityscapes", "train", root=root)
    shutil.rmtree(root / "leftImg8bit")
    with pytest.raises(InputError, match="leftImg8bit is missing: unpack leftImg8bit_trainvaltest.zip"):
        detection_set("cityscapes", "train", root=root)


def test_several_processes_at_once_leave_one_whole_file(write):
    root = write([entry("car", rect(1, 2, 9, 8))] * 3000)
    path = annotation_file(root, "train")
    with ProcessPoolExecutor(3) as pool:
        runs = [pool.submit(convert, root, "train") for _ in range(9)]
        while not all(run.done() for run in runs):
            json.loads(path.read_text())  # whole at any time
    assert all(run.result() == json.loads(path.read_text()) for run in runs)
    assert os.listdir(path.parent) == ["instances_train.json"]


def test_a_byte_order_mark_is_accepted(write):
    assert seen(write([], text="\ufeff" + scene())) == [("car", [1, 2, 9, 7], 63, 0)]


def test_a_file_that_cannot_be_written_is_refused(write):
    root = write([])
    advice = rf"cannot write {root}/annotations/.*`python -m extras.cityscapes ROOT`"
    (root / "annotations").touch()
    with pytest.raises(InputError, match=advice):
        annotation_file(root, "train")
    (root / "annotations").unlink()
    (root / "annotations" / "instances_train.json").mkdir(parents=True)
    with pytest.raises(InputError, match=advice) as e:
        annotation_file(root, "train")
    assert "\n" not in str(e.value)
    assert os.listdir(root / "annotations") == ["instances_train.json"]  # nothing temporary stays


# ----------------------------------------------------------------------------------------- broken data

def refused(message, root, split="train"):
    with pytest.raises(InputError, match=message) as e:
        cityscapes_to_coco(root, split)
    assert "\n" not in str(e.value) and str(root) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("present", [None, "", "leftImg8bit"])
def test_missing_folders_say_what_to_download_and_where_to(tmp_path, present):
    root = tmp_path / "data"
    if present is not None:
        (root / present).mkdir(parents=True)
    text = refused("leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip", root)
    assert text.startswith(f"{root if present is None else root / 'gtFine'} is missing")


def test_a_split_without_files_and_the_dummies_of_the_test_split(write):
    root = write([])
    refused("gtFine/val holds no", root, "val")
    write([], split="test")
    with pytest.raises(InputError, match="dummies"):
        annotation_file(root, "test")


def scene(**changes):
    """The text of a polygon file, with changes to its head or to its only object."""
    head = {"imgHeight": H, "imgWidth": W, "objects": [entry("car", rect(1, 2, 9, 8))]}
    for key, value in changes.items():
        (head if key in head else head["objects"][0])[key] = value
    return json.dumps(head)


def without(key):
    head = json.loads(scene())
    for content in (head, head["objects"][0]):
        content.pop(key, None)
    return json.dumps(head)


def point(text):
    return scene(polygon=[[1, 2], [9, 2], "HERE"]).replace('"HERE"', text)


BROKEN = {  # what the message says -> files
    "the file cannot be read": [
        "", "{", "[" * 100_000, "\x00", "1" * 5000, "[]", "{}", "null", "7", '"text"',
        without("objects"), scene(objects={}), scene(objects=None)],
    "imgWidth": [
        without("imgWidth"), scene(imgWidth="64"), scene(imgWidth=64.0), scene(imgWidth=True),
        scene(imgWidth=float("nan"))],
    "imgHeight": [
        without("imgHeight"), scene(imgHeight=0), scene(imgHeight=-32), scene(imgHeight=10 ** 7),
        scene(imgHeight=10 ** 400)],
    r"objects\[0\].*'label'": [without("label"), scene(label=None), scene(label=["car"])],
    r"objects\[0\].*'deleted'": [scene(deleted="no"), scene(deleted=2), scene(deleted=[])],
    r"objects\[0\]": [
        *(scene(objects=[x]) for x in (7, None, "car", rect(1, 2, 3, 4))), without("polygon"),
        *(scene(polygon=x) for x in ("all", {}, None, [1, 2, 3, 4, 5, 6], ["ab", "cd", "ef"])),
        *map(point, ("[9]", "[9, 8, 7]", "[9, null]", '["9", "8"]', "[9, true]", "[9, NaN]",
                     "[9, Infinity]", "[-1e999, 8]", "[9, 1e9]", "[9, -1" + "0" * 400 + "]", "[9, [8]]",
                     '{"x": 9, "y": 8}', "[" * 500 + "]" * 500))],
}
CASES = [(text, message) for message, texts in BROKEN.items() for text in texts]


@pytest.mark.parametrize("text, message", CASES, ids=[text[:40] for text, _ in CASES])
def test_malformed_annotations_are_refused_with_their_file(write, text, message):
    error = refused(message, write([], text=text))
    assert f"{NAME}_gtFine_polygons.json" in error and len(error) < 600


def test_annotations_that_are_no_text_or_no_file_are_refused(write):
    root = write([])
    path = next(root.glob("gtFine/*/*/*.json"))
    path.write_bytes(b'{"imgHeight": "\xff"}')
    refused("cannot be read", root)
    path.unlink()
    path.mkdir()
    refused("cannot be read", root)
    path.rmdir()
    path.symlink_to(root / "gone")  # as in a folder that was copied in part
    refused("cannot be read", root)
