"""Cityscapes: what a painter leaves visible, against a slow painter; the cache; broken data."""
import json
import os
import shutil

import numpy as np
import pytest

from cityscapes import CLASSES, cached_coco, cityscapes_to_coco
from data import coco_format, detection_set
from model import InputError

W, H = 64, 32
NAME = "aachen_000000_000019"


def rect(x0, y0, x1, y1):
    """Corners are pixels, and belong to it."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def entry(label, polygon, **more):
    return {"label": label, "polygon": polygon, **more}


@pytest.fixture
def write(tmp_path):
    """write(objects, ...) makes an image and its annotation file as Cityscapes unpacks; returns the root."""
    def write(objects, city="aachen", name=NAME, split="train", text=None):
        annotations = tmp_path / "gtFine" / split / city / f"{name}_gtFine_polygons.json"
        image = tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
        for path in (annotations, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
        content = {"imgHeight": H, "imgWidth": W, "objects": objects}
        annotations.write_text(json.dumps(content) if text is None else text)
        return tmp_path
    return write


def seen(root):
    """(class, box, area, crowd) of every annotation."""
    return [(CLASSES[a["category_id"] - 1], a["bbox"], a["area"], a["iscrowd"])
            for a in cityscapes_to_coco(root, "train")["annotations"]]


# ------------------------------------------------------------------------------------------ computed by hand

def test_the_eight_classes_in_their_order(write):
    content = cityscapes_to_coco(write([]), "train")
    assert content["categories"] == [
        {"id": 1, "name": "person"}, {"id": 2, "name": "rider"}, {"id": 3, "name": "car"},
        {"id": 4, "name": "truck"}, {"id": 5, "name": "bus"}, {"id": 6, "name": "train"},
        {"id": 7, "name": "motorcycle"}, {"id": 8, "name": "bicycle"}]
    assert content["annotations"] == [] and len(content["images"]) == 1  # an image without objects stays


def test_a_lone_object_has_the_box_of_its_pixels(write):
    assert seen(write([entry("road", rect(0, 0, 63, 31)), entry("car", rect(2, 3, 10, 8))])) == [
        ("car", [2, 3, 9, 6], 54, 0)]
    # a diamond: all pixels at a distance |dx| + |dy| of 4 or less, 1 + 4 (1 + 2 + 3 + 4) of them
    assert seen(write([entry("bus", [[8, 4], [12, 8], [8, 12], [4, 8]])])) == [("bus", [4, 4, 9, 9], 41, 0)]


@pytest.mark.parametrize("label", ["pole", "static", "ego vehicle", "out of roi", "truck", "cargroup",
                                   "caravan", "rectification border"])
def test_whatever_is_painted_later_hides(write, label):
    car = entry("car", rect(10, 10, 29, 19))
    assert seen(write([car, entry(label, rect(20, 0, 40, 31))]))[0] == ("car", [10, 10, 10, 10], 100, 0)
    # a gap in the middle splits the car, which keeps one box
    assert seen(write([car, entry(label, rect(15, 0, 16, 31))]))[0] == ("car", [10, 10, 20, 10], 180, 0)
    assert ("car", [10, 10, 20, 10], 200, 0) in seen(write([entry(label, rect(20, 0, 40, 31)), car]))
    # nothing is left of the car
    boxes = seen(write([car, entry(label, rect(5, 5, 35, 25))]))
    assert [b[0] for b in boxes if b[0] == "car" and not b[3]] == []


@pytest.mark.parametrize("cover", [entry("pole", rect(20, 0, 40, 31), deleted=1),
                                   entry("car", rect(20, 0, 40, 31), deleted=True),
                                   entry("license plate", rect(20, 0, 40, 31)),
                                   entry("pole", [[20, 15], [40, 15]]), entry("bus", [])])
def test_deleted_objects_plates_and_lines_hide_nothing_and_are_no_objects(write, cover):
    assert seen(write([entry("car", rect(10, 10, 29, 19)), cover])) == [("car", [10, 10, 20, 10], 200, 0)]


def test_an_object_that_was_not_deleted_says_so_with_0(write):
    assert len(seen(write([entry("car", rect(10, 10, 29, 19), deleted=0)]))) == 1


def test_groups_are_crowds_and_no_other_label_is_an_object(write):
    groups = [entry(f"{name}group", rect(8 * i, 0, 8 * i + 3, 3)) for i, name in enumerate(CLASSES)]
    others = [entry(name, rect(8 * i, 8, 8 * i + 3, 11)) for i, name in enumerate(
        ("caravan", "trailergroup", "group", "Car", "carpet", "sky"))]
    assert seen(write(groups + others)) == [
        (name, [8 * i, 0, 4, 4], 16, 1) for i, name in enumerate(CLASSES)]


def test_two_groups_of_one_class_are_two_crowds(write):
    assert seen(write([entry("cargroup", rect(0, 0, 9, 9)), entry("cargroup", rect(5, 5, 19, 19))])) == [
        ("car", [0, 0, 10, 10], 75, 1), ("car", [5, 5, 15, 15], 225, 1)]


def test_an_image_may_hold_more_objects_than_a_byte_can_count(write):
    corners = [(2 * (i % 32), 2 * (i // 32)) for i in range(400)]
    assert seen(write([entry("person", rect(x, y, x + 1, y + 1)) for x, y in corners])) == [
        ("person", [x, y, 2, 2], 4, 0) for x, y in corners]


def test_what_lies_outside_of_the_image_is_clipped(write):
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


# --------------------------------------------------------------------------- against a painter without tools

def covers(polygon, x, y):
    """Whether a polygon of horizontal and vertical edges between whole pixels covers one, its outline
    included."""
    crossings = 0
    for (xa, ya), (xb, yb) in zip(polygon, polygon[1:] + polygon[:1]):
        if min(xa, xb) <= x <= max(xa, xb) and min(ya, yb) <= y <= max(ya, yb):
            return True
        # even-odd, for a point that has moved by 1/4 off the lines of the grid; it has crossed no edge
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
    result = []
    for i in sorted(pixels_of):
        label, (xs, ys) = objects[i]["label"], zip(*pixels_of[i])
        name = label[:-5] if label.endswith("group") else label
        if name in ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"):
            box = [min(xs), min(ys), max(xs) + 1 - min(xs), max(ys) + 1 - min(ys)]
            result.append((name, box, len(xs), int(label.endswith("group"))))
    return result


def test_random_scenes_are_what_a_slow_painter_sees(write):
    labels = [*CLASSES, "cargroup", "persongroup", "pole", "static", "ego vehicle", "caravan",
              "license plate"]
    hidden = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        objects = [entry(str(rng.choice(labels)), random_polygon(rng), deleted=int(rng.random() < 0.15))
                   for _ in range(25)]
        truth = painted_slowly(objects)
        assert seen(write(objects)) == truth
        hidden += sum(o["label"].removesuffix("group") in CLASSES for o in objects) - len(truth)
    assert hidden > 12  # so that there was something to drop


def test_processes_change_nothing(write):
    rng = np.random.default_rng(0)
    for i in range(20):
        root = write([entry("car", random_polygon(rng)) for _ in range(8)], name=f"aachen_{i:02}")
    content = cityscapes_to_coco(root, "train")
    assert len(content["images"]) == 20 and len(content["annotations"]) > 60
    assert cityscapes_to_coco(root, "train", workers=2) == content


# ------------------------------------------------------------------------------------------------- the cache

def test_the_cached_file_is_read_by_the_coco_reader(write, tmp_path):
    root = write([entry("rider", rect(1, 2, 9, 8)), entry("cargroup", rect(20, 2, 29, 8))])
    path = cached_coco(root, "train", tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a" / "cityscapes_train.json"
    dataset = coco_format(root, path, name="cityscapes")
    assert dataset.classes == list(CLASSES)
    assert dataset.records[0].source == root / "leftImg8bit/train/aachen" / f"{NAME}_leftImg8bit.png"
    assert dataset.records[0].boxes.tolist() == [[1, 2, 10, 9]]
    assert dataset.records[0].labels.tolist() == [1]
    assert [a["iscrowd"] for a in dataset.ground_truth["annotations"]] == [0, 1]


def test_the_cache_is_used_until_an_annotation_file_changes(write, tmp_path):
    root, folder = write([entry("car", rect(1, 2, 9, 8))]), tmp_path / "run"
    path = cached_coco(root, "train", folder)
    boxes = [a["bbox"] for a in json.loads(path.read_text())["annotations"]]
    assert boxes == [[1, 2, 9, 7]]
    path.write_text(path.read_text().replace("[1, 2, 9, 7]", "[5, 5, 5, 5]"))  # a mark, not the truth
    marked = path.read_text()
    assert "[5, 5, 5, 5]" in cached_coco(root, "train", folder).read_text()

    def is_made_anew():
        anew = cached_coco(root, "train", folder).read_text()
        path.write_text(marked)
        return "[5, 5, 5, 5]" not in anew
    annotations = next((root / "gtFine").glob("*/*/*.json"))
    stat = annotations.stat()
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert is_made_anew()  # edited to the same length
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not is_made_anew()
    write([entry("car", rect(1, 2, 9, 28))])
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert is_made_anew()  # another length
    write([entry("car", rect(1, 2, 9, 8))])
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not is_made_anew()
    write([], name="aachen_2")
    second = next((root / "gtFine").glob("*/*/aachen_2*"))
    os.utime(second, ns=(0, 0))
    assert is_made_anew()  # a file more
    second.write_text("")
    os.utime(second, ns=(0, 0))
    with pytest.raises(InputError, match="aachen_2"):  # an empty one more
        cached_coco(root, "train", folder)
    assert sorted(os.listdir(folder)) == ["cityscapes_train.json"]  # nothing temporary stays
    assert {p.suffix for p in root.glob("gtFine/**/*.*")} == {".json"}


def test_a_cache_of_another_format_is_made_anew(write, tmp_path, monkeypatch):
    root = write([entry("car", rect(1, 2, 9, 8))])
    path = cached_coco(root, "train", tmp_path)
    path.write_text(path.read_text().replace("[1, 2, 9, 7]", "[5, 5, 5, 5]"))
    monkeypatch.setattr("cityscapes.FORMAT", 0)
    assert "[1, 2, 9, 7]" in cached_coco(root, "train", tmp_path).read_text()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"fingerprint": 1}', "[" * 100_000, "null"])
def test_a_damaged_cache_is_made_anew(write, tmp_path, damage):
    root = write([entry("car", rect(1, 2, 9, 8))])
    (tmp_path / "cityscapes_train.json").write_text(damage)
    content = json.loads(cached_coco(root, "train", tmp_path).read_text())
    assert content["annotations"] == cityscapes_to_coco(root, "train")["annotations"]
    assert content["annotations"][0]["bbox"] == [1, 2, 9, 7]


def test_a_cache_that_cannot_be_written_is_refused(write, tmp_path):
    root = write([])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cityscapes_train.json"):
        cached_coco(root, "train", tmp_path / "file")
    (tmp_path / "run" / "cityscapes_train.json").mkdir(parents=True)
    with pytest.raises(InputError, match="cityscapes_train.json"):
        cached_coco(root, "train", tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["cityscapes_train.json"]


# ----------------------------------------------------------------------------------------------- broken data

def refused(message, root, split="train", workers=0):
    with pytest.raises(InputError, match=message) as e:
        cityscapes_to_coco(root, split, workers)
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
        cityscapes_to_coco(root, "test")
    with pytest.raises(InputError, match="dummies"):
        cached_coco(root, "test", root)


def test_missing_images_are_named_before_training(write, tmp_path):
    root = write([entry("car", rect(1, 2, 9, 8))])
    dataset = detection_set("cityscapes", "train", root=root, cache=tmp_path / "run")
    assert dataset.classes == list(CLASSES) and len(dataset) == 1
    next(root.glob("leftImg8bit/*/*/*.png")).unlink()
    with pytest.raises(InputError, match=f"leftImg8bit/train/aachen/{NAME}_leftImg8bit.png is missing"):
        dataset.check_images()
    shutil.rmtree(root / "leftImg8bit")
    with pytest.raises(InputError, match="leftImg8bit is missing: unpack leftImg8bit_trainvaltest.zip"):
        detection_set("cityscapes", "train", root=root, cache=tmp_path / "run")


def scene(**changes):
    """An annotation file's text, with changes of its only object (lower case) or of its head."""
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


BROKEN = {
    "": "not JSON", "{": "not JSON", "[" * 100_000: "not JSON", "\x00": "not JSON",
    "1" * 5000: "JSON|lack", "[]": "'objects'", "{}": "'objects'", "null": "'objects'",
    scene(objects={}): "'objects'", scene(objects=None): "'objects'", without("objects"): "'objects'",
    without("imgWidth"): "imgWidth", without("imgHeight"): "imgHeight", scene(imgWidth="64"): "imgWidth",
    scene(imgWidth=64.0): "imgWidth", scene(imgWidth=True): "imgWidth", scene(imgHeight=0): "imgHeight",
    scene(imgHeight=-32): "imgHeight", scene(imgHeight=10 ** 400): "imgHeight",
    scene(imgHeight=10 ** 7): "imgHeight", scene(imgWidth=float("nan")): "imgWidth",
    scene(objects=[7]): r"objects\[0\] is no object", scene(objects=[rect(1, 2, 3, 4)]): r"objects\[0\]",
    without("label"): r"objects\[0\] lacks the key 'label'", scene(label=None): "'label'",
    scene(label=["car"]): "'label'", without("polygon"): "'polygon'", scene(polygon="all"): "'polygon'",
    scene(polygon={}): "'polygon'", scene(polygon=[1, 2, 3, 4, 5, 6]): "point 0",
    scene(deleted="no"): "'deleted'", scene(deleted=2): "'deleted'", scene(deleted=[]): "'deleted'",
    point("[9]"): "point 2", point("[9, 8, 7]"): "point 2", point("[9, null]"): "point 2",
    point('["9", "8"]'): "point 2", point("[9, true]"): "point 2", point("[9, NaN]"): "point 2",
    point("[9, Infinity]"): "point 2", point("[-1e999, 8]"): "point 2", point("[9, 1e9]"): "point 2",
    point("[9, -1" + "0" * 400 + "]"): "point 2", point("[9, [8]]"): "point 2",
    point("[" * 500 + "]" * 500): "point 2",
}


@pytest.mark.parametrize("text", BROKEN, ids=[t[:40] for t in BROKEN])
def test_malformed_annotations_are_refused_with_their_file(write, text):
    root = write([], text=text)
    assert f"{NAME}_gtFine_polygons.json" in refused(BROKEN[text], root)


def test_annotations_that_are_no_text_or_no_file_are_refused(write):
    root = write([])
    path = next(root.glob("gtFine/*/*/*.json"))
    path.write_bytes(b'{"imgHeight": "\xff"}')
    refused("not JSON", root)
    path.unlink()
    path.mkdir()
    refused("cannot be read", root)
    path.rmdir()
    path.symlink_to(root / "gone")  # half of a copied folder
    refused("cannot be read", root)
    with pytest.raises(InputError, match="cannot be read"):
        cached_coco(root, "train", root)


def test_errors_come_out_of_processes_too(write):
    for i in range(20):
        root = write([], name=f"aachen_{i:02}")
    write([], name="aachen_11", text="{")
    assert "aachen_11_gtFine_polygons.json" in refused("not JSON", root, workers=2)
