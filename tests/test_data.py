"""Pictures, annotations, transforms, batches and sets. At the end a seeded fuzzer makes 200 malformed
annotation files and 200 malformed pictures. Each is refused in one line that names it, or wholly usable.
"""
import colorsys
import gc
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo, putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data import (Transform, check_convention, classification_set, classification_transform,
                  coco_format, crop, detection_set, flip, micro_batches, pad_batch, read_annotations,
                  read_image, resize, to_image, to_tensor)
from engine import InputError
from evaluate import coco_metrics
from extras import augment, shapes

RED, GREEN = (250, 10, 10), (10, 250, 10)


def two_coloured(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Left half red, right half green."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0] // 2] = RED
    pixels[:, size[0] // 2:] = GREEN
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------ pictures

@pytest.mark.parametrize("mode, name", [("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"),
                                        ("RGB", "a.jpg"), ("CMYK", "a.jpg"), ("CMYK", "a.tif")])
def test_any_mode_reads_as_the_same_colours(tmp_path, mode, name):
    image = two_coloured().quantize(4) if mode == "P" else two_coloured().convert(mode)
    image.save(tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name)).astype(int)
    assert pixels.shape == (48, 64, 3)
    assert abs(pixels[24, 8] - RED).max() < 12 and abs(pixels[24, 56] - GREEN).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    PICTURE.save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert np.array_equal(image, ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    # Boxes may have been drawn on the unrotated picture.
    assert read_image(tmp_path / "a.jpg", size=(64, 48)).size == (64, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_do_no_harm(tmp_path):
    """Only the orientation matters. Here the resolution is a text, or the block is cut off."""
    entries = ImageFileDirectory_v2()
    entries.tagtype.update({282: 2, 296: 2})  # text
    entries.update({274: 6, 282: "72", 296: "2"})
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries.tobytes(8)
    for block, size in ((exif, (48, 64)), (exif[:15], (64, 48))):
        two_coloured().save(tmp_path / "a.jpg", exif=block)
        assert read_image(tmp_path / "a.jpg").size == size


@pytest.mark.parametrize("value, kind, says", [
    (0.5, np.float32, "floats"), (9e4, np.float32, "floats"), (70_000, np.int32, "more than 16 bits"),
    (-1, np.int32, "more than 16 bits")])
def test_pixels_of_unknown_range_are_refused(tmp_path, value, kind, says):
    Image.fromarray(np.full((4, 5), value, kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif .*{says}"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("top, expected", [(255, 255), (200, 200), (4095, 255), (2048, 128), (65535, 255),
                                           (77 * 256 + 3, 77)])
def test_grey_of_16_bits_may_use_8_or_12_of_them(tmp_path, top, expected):
    Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, expected]


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_colours_of_16_bits_must_use_all_of_them(tmp_path, top):
    """Pillow keeps the upper 8 bits alone, so others would be black."""
    with open(tmp_path / "a.png", "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n")
        putchunk(f, b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
        putchunk(f, b"IDAT", zlib.compress(b"\0" + np.array([top, 0, top // 2], ">u2").tobytes()))
        putchunk(f, b"IEND")
    if top == 65535:
        assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[255, 0, 127]]]
    else:
        with pytest.raises(InputError, match="its 16-bit colours hold 8 or 12 bits"):
            read_image(tmp_path / "a.png")


def test_the_error_names_the_formats_that_are_read(tmp_path):
    (tmp_path / "a.avif").write_bytes(b"\0\0\0 ftypavif")
    with pytest.raises(InputError, match="a.avif cannot be read .*formats that are read: JPEG, PNG, WEBP"):
        read_image(tmp_path / "a.avif")


def test_pixels_are_normalised_and_come_back():
    image = Image.new("RGB", (2, 2), (124, 0, 255))
    pixels = to_tensor(image)
    expected = [(124 - 123.675) / 58.395, (0 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(to_image(pixels), image)


# ----------------------------------------------------------------------------- detection transforms

def box_of_red(image: Image.Image) -> np.ndarray:
    """The tight box around the reddish pixels."""
    pixels = np.asarray(image).astype(int)
    y, x = np.nonzero((pixels[..., 0] > 128) & (pixels[..., 1] < 128))
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_boxes_follow_the_picture_through_every_transform():
    pixels = np.full((120, 200, 3), 255, np.uint8)
    pixels[30:90, 20:100] = RED
    marked = Image.fromarray(pixels), np.array([[20.0, 30, 100, 90]]), np.array([3])
    for image, boxes, _ in (flip(*marked), resize(*marked, 60, 1000), resize(*marked, 300, 1000),
                            crop(*marked, 50, 10, 100, 60)):
        assert np.abs(boxes[0] - box_of_red(image)).max() <= 1
    assert [len(x) for x in crop(*marked, 100, 0, 50, 100)[1:]] == [0, 0]  # the box is outside
    step = Image.fromarray(np.full((8, 8), 100, np.uint8))
    step.paste(150, (4, 0, 8, 8))
    levels = np.unique(resize(step, *marked[1:], 64, 99)[0])
    assert (levels.min(), levels.max()) == (100, 150) and len(levels) > 4  # bilinear, as in DETR
    mirrored = {"paper": 0, "flip": 0, "none": 0}
    for seed in range(40):
        for kind in mirrored:
            image, boxes, labels = Transform(100, kind)(*marked, np.random.default_rng(seed))
            assert len(labels) == len(boxes)
            if len(boxes) and (boxes[0, 2:] - boxes[0, :2]).min() > 3:
                assert np.abs(boxes[0] - box_of_red(image)).max() <= 2
                mirrored[kind] += boxes[0, 0] > image.width / 3
    assert mirrored["none"] == 0 and 10 < mirrored["flip"] < 30 and mirrored["paper"] > 5


@pytest.mark.parametrize("size, expected", [((640, 480), (1067, 800)), ((480, 640), (800, 1067)),
                                            ((2000, 500), (1333, 333)), ((500, 500), (800, 800))])
def test_the_test_size_is_800_by_at_most_1333(size, expected):
    image, boxes, _ = Transform(800)(Image.new("RGB", size), np.array([[0.0, 0, *size]]), np.array([0]),
                                     np.random.default_rng(0))
    assert image.size == expected
    assert np.allclose(boxes, [[0, 0, *expected]])
    half, _, _ = Transform(400)(Image.new("RGB", size), boxes, np.array([0]), np.random.default_rng(0))
    assert half.size == pytest.approx([side / 2 for side in expected], abs=1)


def test_training_sizes_are_deformable_detrs():
    rng, sample = np.random.default_rng(0), (Image.new("RGB", (640, 480)), np.zeros((0, 4)), np.zeros(0))
    sizes = [Transform(800, "paper")(*sample, rng)[0].size for _ in range(160)]
    whole = [h for w, h in sizes if abs(w / h - 4 / 3) < 0.01]
    assert set(whole) == set(range(480, 801, 32)) and max(max(size) for size in sizes) <= 1333
    assert 60 < len(whole) < 115  # the others, about half, are crops
    crops = np.array([Transform(800).random_crop(*sample, rng)[0].size for _ in range(300)])
    assert 384 <= crops.min() < 390 and 590 < crops.max() <= 600
    # Of a short side of 400, 500 or 600: all of the crops are as low as 400 pixels, 17 of 117 or 17 of 217.
    assert np.mean(crops[:, 1] <= 400) == pytest.approx((1 + 17 / 117 + 17 / 217) / 3, abs=0.08)
    wide = Image.new("RGB", (1200, 300)), *sample[1:]  # before a crop, no limit to the long side
    assert min(min(Transform(800).random_crop(*wide, rng)[0].size) for _ in range(40)) >= 384


def test_batches_are_padded_at_the_right_and_bottom():
    samples = [(torch.ones(3, 4, 6), {}), (torch.ones(3, 5, 3), {})]
    images, mask, _ = pad_batch(samples)
    assert images.shape == (2, 3, 5, 6)
    for x, m, (h, w) in zip(images, mask, ((4, 6), (5, 3))):
        assert not m[:h, :w].any() and m[h:].all() and m[:, w:].all()
        assert x[:, :h, :w].eq(1).all() and x.sum() == 3 * h * w
    assert pad_batch(samples[:1])[1] is None
    assert [len(targets) for _, _, targets in micro_batches(samples * 2 + samples[:1], 2)] == [2, 2, 1]


# ---------------------------------------------------------------------------------------- COCO format

NOISE = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
PICTURE = Image.fromarray(NOISE)  # 64 x 48
TEXT = json.dumps({
    "images": [dict(id=i, file_name=f, width=64, height=48) for i, f in ((7, "a.png"), (9, "b.png"))],
    "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 30, 40], "area": 9},
                    {"id": 2, "image_id": 9, "category_id": 3, "bbox": [9, 9, 20, 9], "iscrowd": 0}]})


@pytest.fixture
def folder(tmp_path):
    """A small set in COCO format, with nothing wrong."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / "folder").mkdir(parents=True)
        for name in ("a.png", "b.png", "../a.png"):
            PICTURE.save(tmp_path / split / name)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(TEXT)
    return tmp_path


def test_coco_format_is_read_as_coco_means_it(folder):
    content = json.loads(TEXT)
    content["annotations"] = [
        {"id": 0, "image_id": 7, "category_id": 90, "bbox": [60, 40, 20, 20]},
        {"id": 0, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1, "area": 5},
        {"id": 0, "image_id": 7, "category_id": 3, "bbox": [5, 6, 0, 4]}]
    dataset = coco_format(folder / "val", content, name="x", transform=Transform(48))
    assert dataset.classes == ["car", "kite"] and dataset.category_ids == [3, 90]
    first, second = dataset.records
    assert first.boxes.tolist() == [[60, 40, 64, 48]]  # clipped; the crowd and the empty box are dropped
    assert first.labels.tolist() == [1] and len(second.boxes) == 0  # an image without boxes stays
    # The metric still sees the crowd. Its boxes are clipped, too: a perfect model must reach AP 1.
    # pycocotools takes the id 0 for "no match".
    rows = [[a[k] for k in ("id", "iscrowd", "area", "bbox")] for a in dataset.ground_truth["annotations"]]
    assert rows == [[1, 0, 32, [60, 40, 4, 8]], [2, 1, 5, [1, 2, 3, 4]]]
    assert dataset.describe() == ("2 images, 1 objects, 1 images without objects "
                                  "(left out: 1 crowd regions, 1 empty)")
    image, target = dataset[0]
    assert image.shape == (3, 48, 64) and target["image_id"] == 7 and target["size"] == (64, 48)
    assert torch.allclose(target["boxes"], torch.tensor([[62 / 64, 44 / 48, 4 / 64, 8 / 48]]))
    dataset.transform, seen = Transform(24), []
    dataset.corruption = lambda picture, id: seen.append((picture.size, id)) or picture
    picture, [(box, label)] = dataset.item_to_draw(0)
    assert picture.size == (32, 24) and (box, label) == (pytest.approx([30, 20, 32, 24]), 1)
    assert seen == [((64, 48), 7)]  # corruptions come before the resize


@pytest.mark.parametrize("part, key, value, says", [
    ("images", "width", "wide", "images.0.*width and height are not positive"),
    ("images", "id", 9, "images.1.*id is not an integer, or another entry"),
    ("categories", "id", 3, "categories.1.*id is not an integer, or another entry"),
    ("annotations", "bbox", [1, 2, -3, 4], "annotations.0.*negative"),
    ("annotations", "bbox", [1, 2, float("nan"), 4], "annotations.0.*not four finite"),
    ("annotations", "bbox", [1, 2, True, 4], "annotations.0.*not four finite"),
    ("annotations", "bbox", "box", "annotations.0.*not four finite"),
    ("annotations", "category_id", 4, "annotations.0.*category_id 4 does not exist"),
    ("annotations", "image_id", 8, "annotations.0.*image_id 8 does not exist"),
    ("annotations", "iscrowd", "no", "annotations.0.*iscrowd"),
    ("images", None, [], "lists no image"), ("categories", None, [], "lists no category")])
def test_malformed_annotations_are_refused_with_their_place(tmp_path, part, key, value, says):
    content = json.loads(TEXT)
    if key is None:
        content[part] = value
    else:
        content[part][0][key] = value
    (tmp_path / "x.json").write_text(json.dumps(content))
    for source, name in ((tmp_path / "x.json", "x.json"), (content, "given as a dict")):
        with pytest.raises(InputError, match=f"^annotations .*{name}.*{says}"):
            read_annotations(source)


def ten_boxes(form: str) -> dict:
    """Ten boxes in images of 640 x 480 pixels, in a convention that is not COCO's."""
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.random((2, 40, 2)), 0)
    size = np.array([640, 480])
    boxes = {"coco": np.concatenate([low * size, (high - low) * size], 1),
             "corners": np.concatenate([low * size, high * size], 1),
             "centres": np.concatenate([(low + high) / 2 * size, (high - low) * size], 1),
             "normalised": np.concatenate([low, high - low], 1),
             "per mille": np.concatenate([low, high - low], 1) * 1000}[form]
    return {"images": [dict(id=1, file_name="a.png", width=640, height=480)],
            "categories": [{"id": 1, "name": "x"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes.tolist()]}


@pytest.mark.parametrize("form, says", [
    ("corners", "would fit as corners"), ("centres", "top left corner"), ("normalised", "normalised"),
    ("per mille", "leave their image")])
def test_boxes_in_another_convention_are_refused(form, says):
    with pytest.raises(InputError, match=says):
        read_annotations(ten_boxes(form))
    content = ten_boxes("coco")
    annotations, _ = read_annotations(content)
    assert len(annotations.boxes) == 40
    content["annotations"][0]["bbox"][2] = 900.0  # one box that sticks out is clipped
    assert read_annotations(content)[0].boxes[0, 2] == 640


GOOD, SMALL = [10, 10, 20, 20], [10, 10, 0.5, 5]  # in an image of 100 x 100 pixels
AS_CORNERS, OUT = [50, 50, 60, 60], [90, 50, 20, 10]  # they leave it; the first would fit as corners


@pytest.mark.parametrize("boxes, says", [
    (11 * [AS_CORNERS] + 89 * [GOOD], "as corners"), (10 * [AS_CORNERS] + 90 * [GOOD], "note: 10 %"),
    (6 * [AS_CORNERS] + 94 * [GOOD], "note: 6 %"), (5 * [AS_CORNERS] + 95 * [GOOD], ""),
    (4 * [AS_CORNERS], "as corners"), (3 * [AS_CORNERS], "note: 100 %"),
    (21 * [OUT] + 79 * [GOOD], "21 %"), (20 * [OUT] + 80 * [GOOD], "note: 20 %"),
    (20 * [OUT], "100 %"), (19 * [OUT], "note: 100 %"), (9 * [[50, 50, 51, 50]], ""),
    (51 * [SMALL] + 49 * [GOOD], "51 % .*normalised"), (50 * [SMALL] + 50 * [GOOD], "")])
def test_how_many_boxes_show_another_convention(boxes, says, capsys):
    check = partial(check_convention, np.array(boxes), np.full((len(boxes), 2), 100), "x")
    if says and not says.startswith("note"):
        with pytest.raises(InputError, match=f"^x: .*{says}"):
            check()
    else:
        check()
        said = capsys.readouterr().out
        assert said.startswith(says.replace("note: ", "note: x: ")) and bool(said) == bool(says)


@pytest.mark.parametrize("data", [
    TEXT.encode("utf-8-sig"), TEXT.encode("utf-16"), TEXT.replace("64", "64.0").encode(),
    TEXT.replace('"id": 7', '"id": 7.0').replace("90", "90.0").encode(),
    TEXT.replace('"iscrowd": 0', '"iscrowd": null').encode(),
    TEXT.replace("kite", "\u0645\u06cc\u200c\u0631\u0648\u062f \u202f\u3000").encode()])
def test_harmless_oddities_of_exports_change_nothing(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    (tmp_path / "plain.json").write_text(TEXT)
    odd, plain = (vars(read_annotations(tmp_path / name)[0]) for name in ("x.json", "plain.json"))
    assert [c["name"] for c in odd["categories"]][0] == "car"
    for key in ("image_ids", "sizes", "boxes", "labels", "crowd", "areas"):
        assert np.array_equal(odd[key], plain[key])


@pytest.mark.parametrize("name, taken", [
    ("Screenshot at 4.42.48\u202fPM.png", True), ("a\u200db.png", True), ("link.png", True),
    ("a\nb.png", False), ("a\u2028b.png", False), ("a\x7fb.png", False), ("a\ud800b.png", False),
    ("a\0.png", False), (".", False), ("../a.png", False), ("/etc/passwd", False),
    ("folder/../../a.png", False)])
def test_names_have_any_space_but_no_line_end_and_stay_in_the_folder(folder, name, taken, monkeypatch):
    """A link may lead out of it."""
    (folder / "val" / "link.png").symlink_to(folder / "a.png")
    monkeypatch.chdir(folder / "val")
    content = json.loads(TEXT)
    content["images"][0]["file_name"] = name
    for images in (folder / "val", Path(".")):
        if taken:
            PICTURE.save(images / name)
            assert coco_format(images, content, name="x")[0][0].shape[0] == 3
        else:
            with pytest.raises(InputError, match="not the name of a file inside"):
                coco_format(images, content, name="x")


def test_entries_of_one_file_are_one_image(folder, capsys):
    content = json.loads(TEXT)
    content["images"].append(dict(id=11, file_name="./a.png", width=64, height=48))
    content["annotations"].append({"image_id": 11, "category_id": 3, "bbox": [2, 3, 4, 5]})
    content["annotations"].append({**content["annotations"][0], "image_id": 11})  # counts once
    dataset = coco_format(folder / "val", content, name="x")
    assert capsys.readouterr().out == ""
    read_annotations({**json.loads(TEXT), "annotations": 2 * content["annotations"][:1]})
    assert "1 of the objects are listed twice" in capsys.readouterr().out
    assert [r.id for r in dataset.records] == [7, 9]
    assert dataset.records[0].boxes.tolist() == [[1, 2, 31, 42], [2, 3, 6, 8]]
    content["images"][2]["width"] = 65
    with pytest.raises(InputError, match="images.2.*another entry of ./a.png has another size"):
        coco_format(folder / "val", content, name="x")


def test_the_layout_of_roboflow(folder):
    for split, name in (("train", "train"), ("valid", "val")):
        if split == "valid":
            (folder / "val").rename(folder / "valid")
        (folder / "annotations" / f"instances_{name}.json").rename(folder / split / "_annotations.coco.json")
    for split in ("train", "val"):
        assert len(detection_set(str(folder), split)[1][1]["labels"]) == 1
    (folder / "annotations" / "instances_val.json").write_text(TEXT)
    with pytest.raises(InputError, match="has both annotations/ and train/_annotations.coco.json"):
        detection_set(str(folder), "val")
    shutil.rmtree(folder / "annotations")
    shutil.rmtree(folder / "valid")
    with pytest.raises(InputError, match="valid is missing: needed are .*_annotations.coco.json"):
        detection_set(str(folder), "val")


def test_a_perfect_model_reaches_ap_1_although_boxes_stick_out(folder):
    content = json.loads(TEXT)
    content["annotations"][0]["bbox"] = [-20, -10, 60, 40]
    content["annotations"].append({"image_id": 7, "category_id": 3, "bbox": [70, 9, 5, 5]})  # outside
    dataset = coco_format(folder / "val", content, name="x")
    found = [{"image_id": r.id, "category_id": dataset.category_ids[k], "score": 0.9,
              "bbox": [x0, y0, x1 - x0, y1 - y0]}
             for r in dataset.records for (x0, y0, x1, y1), k in zip(r.boxes.tolist(), r.labels)]
    assert coco_metrics(dataset.ground_truth, found)["AP"] == pytest.approx(1)
    assert dataset.ground_truth["annotations"][0]["area"] == 9  # as annotated, if it is smaller than the box
    for area in (0, 0.4):  # of a box of 30 x 40 pixels, as some programs write it
        content["annotations"][0].update(bbox=[1, 2, 30, 40], area=area)
        assert coco_format(folder / "val", content, name="x").ground_truth["annotations"][0]["area"] == 1200
    for box, area in (([-50, 0, 60, 48], 480), ([40, 0, 60, 48], 1152), ([0, -8, 9, 9], 9),
                      ([0, 40, 9, 9], 72)):
        content["annotations"][0] = {"image_id": 7, "category_id": 3, "bbox": box}
        truth = coco_format(folder / "val", content, name="x").ground_truth
        assert truth["annotations"][0]["area"] == area


def test_the_digest_depends_on_all_that_is_learnt(folder, tmp_path):
    changes = [(), ("annotations", "bbox", [1, 2, 30, 41]), ("annotations", "category_id", 3),
               ("annotations", "iscrowd", 1), ("images", "file_name", "folder/../b.png"),
               ("categories", "name", "plane"), ("images", "width", 63)]
    digests = set()
    for change in changes:
        content = json.loads(TEXT)
        if change:
            content[change[0]][0][change[1]] = change[2]
        digests.add(coco_format(folder / "val", content, name="x").digest)
    digests.add(coco_format(folder / "val", json.loads(TEXT), limit=1, name="x").digest)
    assert len(digests) == len(changes) + 1
    assert coco_format(folder / "val", json.loads(TEXT), name="y").digest in digests


def test_large_sets_take_few_bytes_per_item(tmp_path):
    """As objects, an image of ImageNet took 547 bytes in each process, an annotation of COCO some 500."""
    images = [dict(id=i, file_name=f"{i:012}.jpg", width=640, height=480) for i in range(2000)]
    objects = [{"image_id": i % 2000, "category_id": 1, "bbox": [1, 2, 30.5, 40]} for i in range(20_000)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "x"}]}
    for name in (f"{i:012}.jpg" for i in range(2000)):
        (tmp_path / "train" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "cat" / name).touch()
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "train" / "cat")
    tracemalloc.start()
    for make, most in ((lambda: coco_format(tmp_path / "train" / "cat", content, name="x"), 2000 * 700),
                       (lambda: classification_set(str(tmp_path), "train"), 4000 * 60)):
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        dataset = make()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < most and len(dataset) >= 2000
    tracemalloc.stop()


def test_a_missing_image_is_found_before_any_is_opened(folder):
    (folder / "val" / "a.png").write_bytes(b"no picture")
    (folder / "val" / "b.png").unlink()
    with pytest.raises(InputError, match="val/b.png is missing; .*instances_val.json lists it"):
        detection_set(str(folder), "val")
    assert len(detection_set(str(folder), "val", limit=1)) == 1  # b.png is not needed


def encode(kind: str, image: Image.Image = PICTURE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_broken_or_wrongly_sized_image_is_refused_when_it_is_read(folder):
    for content, says in ((encode("JPEG")[:-200], "truncated"), (b"", "identify"),
                          (encode("PNG", PICTURE.resize((32, 32))), "is 32 x 32, but .* say 64 x 48")):
        (folder / "val" / "b.png").write_bytes(content)
        dataset = detection_set(str(folder), "val", image_size=48)
        assert dataset[0][0].shape == (3, 48, 64)
        with pytest.raises(InputError, match=f"val/b.png .*{says}"):
            dataset[1]


def test_real_coco_images_and_their_official_annotations(shared):
    dataset = detection_set(str(shared("data/coco_mini")), "val", image_size=256)
    assert len(dataset) == 177 and len(dataset.classes) == 80 and max(dataset.category_ids) == 90
    crowd = sum(a["iscrowd"] for a in dataset.ground_truth["annotations"])
    assert (len(dataset.ground_truth["annotations"]), crowd) == (1284, 10)
    assert sum(len(r.boxes) for r in dataset.records) == 1274
    for record in dataset.records:
        record.image()  # refuses another size than that of the annotations


# -------------------------------------------------------------------------------- generated pictures

def test_shapes_are_seeded_and_the_splits_share_no_image():
    for make in (lambda split: detection_set("shapes", split, limit=100).records.sources,
                 lambda split: classification_set("shapes", split, limit=100).sources):
        train, again, val = ([p.tobytes() for p in make(split)] for split in ("train", "train", "val"))
        assert train == again and len({*train, *val}) == 200


def test_numbers_of_generated_pictures(monkeypatch):
    nothing = Image.new("RGB", (1, 1)), np.zeros((0, 4)), np.zeros(1)
    monkeypatch.setattr(shapes, "shape_scene", lambda *_, **__: nothing)
    assert [len(make("shapes", split, None)[0]) for split in ("train", "val") for make in (
        shapes.detection_pictures, shapes.classification_pictures)] == [8000, 8000, 1000, 400]


def test_shapes_boxes_are_tight_and_all_classes_occur():
    dataset = detection_set("shapes", "train", limit=300)
    assert len(dataset.classes) == 8 and {k for r in dataset.records for k in r.labels} == set(range(8))
    assert {len(r.labels) for r in dataset.records} == {0, 1, 2, 3}
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in dataset.ground_truth["annotations"])
    # An object alone in its picture is saturated on a dull ground, so its colours show where it is.
    errors = []
    for r in [r for r in dataset.records if len(r.labels) == 1]:
        pixels = np.asarray(r.image()).astype(int)
        y, x = np.nonzero(pixels.max(-1) - pixels.min(-1) > 100)
        if len(x) > 60:
            # Some noise is saturated, too.
            low, high = (np.percentile((x, y), q, axis=1) for q in (0.5, 99.5))
            errors.append(np.abs(r.boxes[0] - [*low, *(high + 1)]).max())
    assert len(errors) > 40 and np.mean(np.array(errors) < 3) > 0.8
    # Pictures of classification have one object, and it is larger.
    single = [shapes.shape_scene(np.random.default_rng(i), objects=1)[1] for i in range(40)]
    assert np.shape(single) == (40, 1, 4) and min(np.ptp(b.reshape(2, 2), 0).max() for b in single) > 27
    counts = np.bincount([len(r.labels) for r in dataset.records]) / 300
    assert counts[:2] == pytest.approx([0.04, 0.4], abs=0.06) and counts[2] > counts[3]


def test_shapes_hide_little_of_each_other():
    """Boxes of pairs overlap by more than half of the smaller one in 10 % of all pairs. Without the rule
    about hidden objects it is 30 %."""
    shares = []
    for record in detection_set("shapes", "train", limit=400).records:
        for a, b in itertools.combinations(record.boxes, 2):
            overlap = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
            shares.append(overlap / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))
    assert len(shares) > 300 and np.mean(np.array(shares) > 0.5) < 0.15


@pytest.mark.parametrize("data, hue_of", [("shapes", [0, 0, 90, 90, 180, 180, 270, 270]),
                                          ("shapes-hard", [0, 0, 0, 0, 180, 180, 180, 180])])
def test_kinds_share_their_colours(data, hue_of):
    """The hue of the saturated pixels, in degrees. 3 % of the objects have any hue."""
    right = 0
    dataset = classification_set(data, "val", limit=80)
    for image, label in zip(dataset.sources, dataset.labels):
        pixels = np.asarray(image).reshape(-1, 3) / 255
        hue = 360 * colorsys.rgb_to_hsv(*np.median(pixels[np.ptp(pixels, 1) > 0.4], 0))[0]
        right += abs((hue - hue_of[label] + 180) % 360 - 180) < 30
    assert right >= 72


@pytest.mark.parametrize("make, kind", [(detection_set, "paper"), (classification_set, "deit")])
def test_augmentation_depends_on_seed_epoch_and_index_only(make, kind):
    def items(seed=0, epoch=0, first=0):
        dataset = make("shapes", "train", limit=10, image_size=64, augment=kind, seed=seed)
        dataset.epoch = epoch
        return [dataset[i][0].tolist() for i in range(first, first + 10)]
    assert items() == items() and items() != items(seed=1) and items() != items(epoch=1)
    assert make is detection_set or items() != items(first=10)  # the next copies of the same pictures


# ------------------------------------------------------------------------------------ classification

def test_any_folder_of_class_folders(tmp_path):
    for name, grey in (("cat", 0), ("dog", 200), (".hidden", 9)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (90, 70), grey).save(tmp_path / "train" / name / f"{i}.jpg")
    dataset = classification_set(str(tmp_path), "train", image_size=64)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    image, label = dataset[4]
    assert image.shape == (3, 64, 64) and label == 1
    assert [Path(dataset.name_of(i)).name for i in range(6)] == ["0.jpg", "1.jpg", "2.jpg"] * 2
    assert dataset.name_of(4).endswith("train/dog/1.jpg")
    assert (np.asarray(to_image(image)) == 200).all()
    dataset = classification_set(str(tmp_path), "train", limit=4)
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    deep = tmp_path / "train" / "cat" / "2026" / "may"
    deep.mkdir(parents=True)
    Image.new("L", (90, 70), 99).save(deep / "9.jpg")
    dataset = classification_set(str(tmp_path), "train", image_size=64)
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert 99 in {np.asarray(to_image(dataset[i][0])).max() for i in range(4)}
    (deep / "9.jpg").rename(deep / "8.jpg")
    assert classification_set(str(tmp_path), "train").digest != dataset.digest
    (deep / "round").symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(InputError, match="round is reached twice"):
        classification_set(str(tmp_path), "train")
    (deep / "round").unlink()
    (tmp_path / "train" / "eel").mkdir()
    for data, split, says in ((tmp_path, "train", "class folder .*train/eel is empty"),
                              (tmp_path, "val", "val is missing"),
                              ("imagenet21k", "train", "/imagenet21k_train is missing"),
                              ("imagenet21k", "val", "/imagenet21k_val is missing")):
        with pytest.raises(InputError, match=says):
            classification_set(str(data), split, str(tmp_path) if data == "imagenet21k" else None)


@pytest.mark.parametrize("kind, steps", [
    ("deit", ["random_resized_crop", "rand_augment", "random_erasing"]),
    ("21k", ["cutout", "rand_augment"]), ("flip", ["centre_crop"]), ("none", ["centre_crop"])])
def test_each_kind_of_classification_transform_has_its_steps(monkeypatch, kind, steps):
    calls, mirrored = [], []
    for name in ("random_resized_crop", "centre_crop", "cutout", "rand_augment", "random_erasing"):
        step = getattr(augment, name)
        if name in ("cutout", "rand_augment", "random_erasing"):
            step = lambda image, rng: image  # so that the picture can be recognised
        spy = lambda *x, name=name, step=step: calls.append(name) or step(*x)
        monkeypatch.setattr(augment, name, spy)
    for seed in range(100):
        calls.clear()
        pixels = classification_transform(two_coloured((100, 80)), np.random.default_rng(seed), 64, kind)
        assert pixels.shape == (3, 64, 64) and calls == steps
        assert kind != "21k" or len(pixels[0].unique()) > 2  # the filter does not take the nearest pixel
        green = pixels[1].mean(0)  # (64,)
        mirrored.append(bool(green[0] > green[-1] + 1))
    assert 10 < sum(mirrored) < 60 if kind in ("deit", "flip") else sum(mirrored) == 0
    square = two_coloured((64, 64))  # has the size of the evaluation already
    assert torch.equal(classification_transform(square, None, 64, "none"), to_tensor(square))
    assert classification_transform(square, None, 80, "none").shape == (3, 80, 80)


# ----------------------------------------------------------------------------------------- the fuzzer

def outcome(use, *args) -> str | None:
    """The message of the InputError of use(*args), or None. Any other exception comes through."""
    import resource  # not on Windows
    memory, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    signal.alarm(10)  # ends the process
    with warnings.catch_warnings(record=True) as shown:
        try:
            use(*args)
        except InputError as e:
            message = str(e)
    signal.alarm(0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert not shown and memory < 100 * 1024, (shown, memory)  # KiB
    return message


@pytest.fixture(scope="module")
def child():
    """`outcome` in another process, in which warnings are filtered as for a user and not by pytest."""
    def checked(use, path, *args):
        message = pool.submit(outcome, use, path, *args).result()
        assert message is None or str(path) in message and message.isprintable() and len(message) < 2500
        return message
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield checked


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """The data with one to eight bits flipped."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    bits[rng.integers(bits.size, size=rng.integers(1, 9))] ^= 1
    return np.packbits(bits).tobytes()


NAMES = ["", ".", "folder", "pipe", "gone.png", "../a.png", "folder/../../a.png", "/etc/passwd",
         "a\0.png", "a\n.png", "\ud800.png", "x" * 300, "x" * 5000, "a.png/", "./a.png",
         "folder/../b.png"]
ODD = ["1e400", "-1e400", "NaN", "-Infinity", "1e308", "5e-324", "1.5", "-1", "0", "2", "true", "null",
       str(2 ** 63 + 1), "{}", "1" + "0" * 30, "1" + "0" * 5000, '"7"', '"a\\nb"', '"\\u0000"',
       '"\\ud800"', '""', "[]", "[1,2,NaN,4]", "[1,2,1e400,4]", "[-9,-9,1e8,1e8]", "[1,2,-3,4]",
       '{"a":[null]}', '"' + "x" * 100_000 + '"', "[" * 600 + "]" * 600, "[" * 100_000 + "]" * 100_000]
DATA = TEXT.encode()
FILES = [b"\xef\xbb\xbf" + DATA, b"", b"null", TEXT.encode("utf-16"), 2 * DATA, b"[" * 100_000,
         DATA.replace(b"ki", b"\xff"), DATA.replace(b"ki", b"\\ud800"), DATA.replace(b"}", b',"id":3}')]


def malformed_annotations(rng: np.random.Generator, number: int) -> bytes:
    """TEXT with a mistake of one of ten kinds."""
    turn, kind = divmod(number, 10)
    odd = ODD[turn % 30 if kind in (0, 4) else rng.integers(30)]
    place = (r"(?<=\[)\d+|(?<=, )\d+", r'(?<=: )["\w.]+', r"\[[\d, ]*\]|9(?=})")[kind % 3]  # 0: in a box
    part = rng.choice(list(re.finditer(place, TEXT)))
    key, entry = rng.choice(re.findall(r'"\w*":', TEXT)), rng.choice(re.findall(r"{[^{}]*}", TEXT))
    an_id = '_id": ' if turn % 2 else 'id": '
    texts = [*[TEXT[:part.start()] + odd + TEXT[part.end():]] * 3, TEXT.replace(key, '"x":', 1),
             TEXT.replace(an_id + "7", an_id + odd), TEXT.replace('"id"', f'"more": {odd}, "id"'),
             TEXT.replace(entry, f"{entry}, {entry}"),
             TEXT.replace('"a.png"', json.dumps(NAMES[turn % 16]))]
    last = DATA[:rng.integers(len(DATA))] if turn % 2 else FILES[turn // 2 % 9]
    return [*(t.encode() for t in texts), flipped(rng, DATA), last][kind]


def use_set(root: Path) -> None:
    """Everything that the programs do with a set: read, augment, hand to a process, evaluate."""
    dataset = detection_set(str(root), "val", image_size=40, augment="paper")
    dataset = pickle.loads(pickle.dumps(dataset))
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert image.isfinite().all() and all(0 <= k < len(dataset.classes) for k in target["labels"])
        centre, half = target["boxes"][:, :2], target["boxes"][:, 2:] / 2
        assert len(half) == len(target["labels"]) and (half > 0).all()
        assert (centre - half > -1e-6).all() and (centre + half < 1 + 1e-6).all()
    " ".join(dataset.classes).encode()  # can be printed
    found = [{**a, "score": 0.9} for a in dataset.ground_truth["annotations"] if not a["iscrowd"]]
    all_found, one_missed = (coco_metrics(dataset.ground_truth, f)["AP"] for f in (found, found[1:]))
    areas = [a["bbox"][2] * a["bbox"][3] for a in found] or [0]
    assert all_found > 0.999 > one_missed or min(areas) < 1e-9 or max(areas) > 1e10  # which do not count


def test_malformed_annotation_files(folder, child):
    os.mkfifo(folder / "val" / "pipe")  # opening it would wait for ever
    messages = [child(use_set, folder)]
    for number in range(200):
        data = malformed_annotations(np.random.default_rng(number), number)
        (folder / "annotations" / "instances_val.json").write_bytes(data)
        messages.append(child(use_set, folder))
    assert messages[0] is None and 20 < messages.count(None) < 100  # both ends are reached


def hostile() -> dict[bytes, str]:
    """Pictures and a word of their messages: bombs, a program, half a file that can be decoded."""
    bmp, half, text = encode("BMP"), encode("JPEG2000"), PngInfo()
    text.add_text("k", "\0" * 50_000_000, zip=True)
    return {bmp[:18] + struct.pack("<2i", 10 ** 5, 10 ** 5) + bmp[26:]: "bomb",
            encode("PNG", Image.new("1", (9500, 9500))): "bomb", encode("PNG", pnginfo=text): "too large",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n": "identify",
            half[:half.index(b"\xff\x93") + 2]: "identify"}


def use_picture(path: Path, whole: Path | None) -> None:
    image = read_image(path)
    assert image.mode == "RGB" and to_tensor(image).isfinite().all()
    assert whole is None or np.array_equal(image, read_image(whole)), "a part was taken for the whole"


def test_malformed_pictures(tmp_path, child):
    bad = hostile()
    for data, words in bad.items():
        (tmp_path / "bad").write_bytes(data)
        assert words in child(read_image, tmp_path / "bad")
    entire = [*map(encode, ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM")),
              encode("JPEG", PICTURE.convert("CMYK"), progressive=True),
              encode("PNG", PICTURE.quantize(9)), encode("TIFF", compression="tiff_lzw"),
              encode("GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
              encode("PNG", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256)),
              encode("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02")]
    one_pixel, a_folder = encode("PNG", PICTURE.resize((1, 1))), None
    others = [*bad, b"", b"text", bytes(999), one_pixel, a_folder]
    whole, messages = tmp_path / "whole", []
    for number in range(200):
        rng, (turn, which) = np.random.default_rng(number), divmod(number, len(entire))
        whole.write_bytes(entire[which])
        cut = entire[which][:rng.integers(len(entire[which]))]
        data = [cut, flipped(rng, entire[which]), others[which % len(others)]][turn % 3]
        path = tmp_path / f"{number}.{rng.choice(['jpg', 'png', 'gif', 'tif', 'txt'])}"
        path.mkdir() if data is None else path.write_bytes(data)
        messages.append(child(use_picture, path, None if turn % 3 else whole))
    assert 20 < messages.count(None) < 100
