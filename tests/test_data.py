"""Reading pictures and annotations, the transforms, batches, and the generated set."""
import colorsys
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from augment import ClassificationTransform
from data import Transform, classification_set, crop, detection_set, flip, micro_batches, pad_batch, resize
from images import MEAN, STD, read_image, to_tensor
from model import InputError

RED, GREEN = (250, 10, 10), (10, 250, 10)


def two_coloured(size=(64, 48)):
    """Left half red, right half green."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0] // 2], pixels[:, size[0] // 2:] = RED, GREEN
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode, name", [("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"),
                                        ("CMYK", "a.jpg"),
                                        ("RGB", "a.jpg"), ("CMYK", "a.tif")])
def test_any_mode_reads_as_the_same_colours(tmp_path, mode, name):
    image = two_coloured().quantize(4) if mode == "P" else two_coloured().convert(mode)
    image.save(tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name)).astype(int)
    assert pixels.shape == (48, 64, 3)
    assert abs(pixels[24, 8] - RED).max() < 12 and abs(pixels[24, 56] - GREEN).max() < 12


def test_grey_pictures_of_8_and_16_bits(tmp_path):
    Image.fromarray(np.full((4, 5), 77, np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.full((4, 5), 77 * 256 + 3, np.uint16)).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.full((4, 5, 3), 77))


@pytest.mark.parametrize("orientation, place_of_red", [(1, (32, 5)), (3, (32, 58)), (6, (5, 24)),
                                                       (8, (58, 24))])
def test_exif_rotation_is_applied(tmp_path, orientation, place_of_red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_coloured().save(tmp_path / "a.jpg", exif=exif, quality=95)
    y, x = place_of_red if orientation in (6, 8) else (24, place_of_red[1])
    image = read_image(tmp_path / "a.jpg")
    assert image.size == ((48, 64) if orientation in (6, 8) else (64, 48))
    assert abs(np.asarray(image)[y, x].astype(int) - RED).max() < 30
    # boxes that were drawn on the unrotated picture
    assert read_image(tmp_path / "a.jpg", size=(64, 48)).size == (64, 48)


@pytest.mark.parametrize("name, content", [("gone.jpg", None), ("text.jpg", b"hello"), ("empty.png", b"")])
def test_broken_images_are_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_images_are_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (80, 80, 3), np.uint8))
    noise.save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match=f"a.{suffix}"):
        read_image(tmp_path / f"a.{suffix}")


# ------------------------------------------------------------------------------------------------ transforms

def boxes_of_marks(image):
    """The tight box of everything reddish, an independent reading of where a box should be."""
    pixels = np.asarray(image).astype(int)
    y, x = np.nonzero((pixels[..., 0] > 128) & (pixels[..., 1] < 128))
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


@pytest.fixture
def marked():
    pixels = np.full((120, 200, 3), 255, np.uint8)
    pixels[30:90, 20:100] = RED
    return Image.fromarray(pixels), np.array([[20.0, 30, 100, 90]]), np.array([3])


def test_boxes_follow_the_picture_through_every_transform(marked):
    for sample in (flip(*marked), resize(*marked, 60, 1000), resize(*marked, 300, 1000),
                   crop(*marked, 50, 10, 100, 60)):
        assert np.abs(sample[1][0] - boxes_of_marks(sample[0])).max() <= 1
    for seed in range(40):
        for augment in ("paper", "flip", "none"):
            image, boxes, labels = Transform(100, augment)(*marked, np.random.default_rng(seed))
            assert len(labels) == len(boxes)
            if len(boxes) and (boxes[0, 2:] - boxes[0, :2]).min() > 3:
                assert np.abs(boxes[0] - boxes_of_marks(image)).max() <= 2


@pytest.mark.parametrize("size, expected", [((640, 480), (1067, 800)), ((480, 640), (800, 1067)),
                                            ((2000, 500), (1333, 333)),
                                            ((500, 500), (800, 800))])
def test_test_size_is_800_by_at_most_1333(size, expected):
    image, boxes, _ = Transform(800)(Image.new("RGB", size), np.array([[0.0, 0, *size]]), np.array([0]),
                                     np.random.default_rng(0))
    assert image.size == expected
    assert np.allclose(boxes, [[0, 0, *expected]])


def test_training_sizes_are_deformable_detrs():
    shorts, crops = set(), 0
    image = Image.new("RGB", (640, 480))
    for seed in range(160):
        w, h = Transform(800, "paper")(image, np.zeros((0, 4)), np.zeros(0, int),
                                       np.random.default_rng(seed))[0].size
        assert max(w, h) <= 1333
        if abs(w / h - 4 / 3) < 0.01:
            shorts.add(h)
        crops += abs(w / h - 4 / 3) >= 0.01
    assert shorts == set(range(480, 801, 32))
    assert 45 < crops < 100  # about half of the images


def test_crop_drops_what_it_leaves_outside():
    image = Image.new("RGB", (100, 100))
    boxes = np.array([[0.0, 0, 10, 10], [40, 40, 60, 60]])
    _, kept, labels = crop(image, boxes, np.array([1, 2]), 50, 50, 30, 30)
    assert kept.tolist() == [[0, 0, 10, 10]] and labels.tolist() == [2]


def test_batches_are_padded_at_the_right_and_bottom():
    samples = [(torch.ones(3, 4, 6), {}), (torch.ones(3, 5, 3), {})]
    images, mask, _ = pad_batch(samples)
    assert images.shape == (2, 3, 5, 6)
    for x, m, (h, w) in zip(images, mask, ((4, 6), (5, 3))):
        assert not m[:h, :w].any() and m[h:].all() and m[:, w:].all()
        assert x[:, :h, :w].eq(1).all() and x.sum() == 3 * h * w
    assert pad_batch(samples[:1])[1] is None
    assert [len(b[2]) for b in micro_batches(samples * 2 + samples[:1], 2)] == [2, 2, 1]


def test_pixels_are_normalised():
    pixels = to_tensor(Image.new("RGB", (2, 2), (124, 0, 255)))[:, 0, 0].numpy()
    assert np.allclose(pixels, [(v - m) / s for v, m, s in zip((124, 0, 255), MEAN, STD)], atol=1e-6)


# ----------------------------------------------------------------------------------------------- COCO format

@pytest.fixture
def folder(tmp_path):
    """A two-image set in COCO format, with gapped category ids; returns write(changes) -> the loaded set."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("a.jpg", "b.jpg"):
            two_coloured().save(tmp_path / split / name)
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": i, "file_name": n, "width": 64, "height": 48} for i,
                          n in ((7, "a.jpg"), (9, "b.jpg"))],
               "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}],
               "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [60, 40, 20, 20]},
                               {"id": 2, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4],
                                "iscrowd": 1},
                               {"id": 3, "image_id": 7, "category_id": 3, "bbox": [5, 6, 0, 4]}]}

    def write(edit=lambda c: None, text=None):
        edit(content)
        for split in ("train", "val"):
            (tmp_path / "annotations" / f"instances_{split}.json").write_text(text or json.dumps(content))
        return tmp_path
    return write


def test_coco_format_is_read_as_coco_means_it(folder):
    dataset = detection_set(str(folder()), "val", image_size=48)
    assert dataset.classes == ["car", "kite"] and dataset.category_ids == [3, 90]
    first, second = dataset.records
    assert first.boxes.tolist() == [[60, 40, 64, 48]]  # clipped; the crowd and the empty box are dropped
    assert first.labels.tolist() == [1] and len(second.boxes) == 0  # an image without boxes stays
    # the metric still sees the crowd
    assert [a["iscrowd"] for a in dataset.ground_truth["annotations"]] == [0, 1, 0]
    image, target = dataset[0]
    assert image.shape == (3, 48, 64) and target["image_id"] == 7
    assert torch.allclose(target["boxes"], torch.tensor([[62 / 64, 44 / 48, 4 / 64, 8 / 48]]))


@pytest.mark.parametrize("edit, message", [
    (lambda c: c.pop("images"), "images"),
    (lambda c: c["annotations"][0].pop("bbox"), "bbox"),
    (lambda c: c["images"][0].pop("file_name"), "file_name"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "negative"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "finite"),
    (lambda c: c["annotations"][0].update(bbox="box"), "four"),
    (lambda c: c["annotations"][0].update(category_id=4), "category_id 4"),
    (lambda c: c["annotations"][0].update(image_id=8), "image_id 8"),
    (lambda c: c["images"][0].update(file_name="../../secret.jpg"), "leaves"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, True, 4]), "finite"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 10 ** 400, 4]), "finite"),
    (lambda c: c["annotations"][0].update(category_id=[90]), "category_id"),
    (lambda c: c["annotations"][0].update(iscrowd="no"), "iscrowd"),
    (lambda c: c["images"][0].update(file_name="a\0.jpg"), "file name"),
    (lambda c: c["images"][0].update(width="wide"), "width"),
    (lambda c: c["images"][1].update(id=7), "id 7"),
    (lambda c: c.update(categories=[]), "category"),
    (lambda c: c.update(images=[], annotations=[]), "no image"),
])
def test_malformed_annotations_are_refused_with_their_place(folder, edit, message):
    with pytest.raises(InputError, match=message) as e:
        detection_set(str(folder(edit)), "val")
    assert "instances_val.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00\xff"])
def test_annotations_that_are_no_json_object_are_refused(folder, text):
    with pytest.raises(InputError, match="instances_val.json"):
        detection_set(str(folder(text=text)), "val")


def test_images_are_checked_before_training(folder):
    root = folder()
    detection_set(str(root), "train").check_images()
    whole = (root / "train" / "b.jpg").read_bytes()
    (root / "train" / "b.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="b.jpg"):
        detection_set(str(root), "train").check_images()
    two_coloured((32, 32)).save(root / "train" / "b.jpg")
    with pytest.raises(InputError, match="b.jpg is 32 x 32"):
        detection_set(str(root), "train").check_images()


@pytest.mark.parametrize("data, message", [("coco", "download"), ("no/such/folder", "annotations")])
def test_missing_data_say_what_goes_where(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        detection_set(data, "train")


def test_real_coco_images_and_their_official_annotations(shared):
    dataset = detection_set(str(shared("data/coco_mini")), "val", image_size=256)
    assert len(dataset) == 177 and len(dataset.classes) == 80 and max(dataset.category_ids) == 90
    crowd = sum(a["iscrowd"] for a in dataset.ground_truth["annotations"])
    assert (len(dataset.ground_truth["annotations"]), crowd) == (1284, 10)
    assert sum(len(r.boxes) for r in dataset.records) == 1274
    dataset.check_images()


# ---------------------------------------------------------------------------------------------------- shapes

def test_shapes_are_seeded_and_the_splits_share_no_image():
    def prints(split):
        return [hashlib.sha256(np.asarray(r.image()).tobytes()).hexdigest()
                for r in detection_set("shapes", split, limit=200).records]
    train, val = prints("train"), prints("val")
    assert train == prints("train") and len(set(train)) == 200 and not set(train) & set(val)


def test_shapes_boxes_are_tight_and_all_classes_occur():
    dataset = detection_set("shapes", "train", limit=300)
    labels = np.concatenate([r.labels for r in dataset.records])
    assert len(dataset.classes) == 8 and set(labels) == set(range(8))
    counts = {len(r.labels) for r in dataset.records}
    assert counts == {0, 1, 2, 3}
    # An object alone in its picture is saturated on a dull ground: its colours show where it is. (Not in
    # every picture: a neighbour of which less than half is visible is not annotated.)
    errors = []
    for r in [r for r in dataset.records if len(r.labels) == 1]:
        pixels = np.asarray(r.image()).astype(int)
        y, x = np.nonzero(pixels.max(-1) - pixels.min(-1) > 100)
        if len(x) > 60:
            low, high = (np.percentile((x, y), q, axis=1) for q in (0.5, 99.5))  # some noise is saturated
            tight = [*low, *(high + 1)]
            errors.append(np.abs(r.boxes[0] - tight).max())
    assert len(errors) > 40 and np.mean(np.array(errors) < 3) > 0.8


@pytest.mark.parametrize("data, hue_of", [("shapes", [0, 0, 90, 90, 180, 180, 270, 270]),
                                          ("shapes-hard", [0, 0, 0, 0, 180, 180, 180, 180])])
def test_kinds_share_their_colours(data, hue_of):
    """The hue of the saturated pixels, in degrees, by colorsys; 3 % of the objects have any."""
    right, dataset = 0, classification_set(data, "val", ClassificationTransform(64), limit=80)
    for image, label in dataset.items:
        pixels = np.asarray(image).reshape(-1, 3) / 255
        colour = np.median(pixels[np.ptp(pixels, 1) > 0.4], 0)
        turn = (360 * colorsys.rgb_to_hsv(*colour)[0] - hue_of[label] + 180) % 360 - 180
        right += abs(turn) < 30
    assert right >= 72


def test_augmentation_depends_on_seed_epoch_and_index_only():
    dataset = detection_set("shapes", "train", limit=20, image_size=64, augment="paper")
    first = [dataset[i][0] for i in range(20)]
    assert all(torch.equal(a, dataset[i][0]) for i, a in enumerate(first))
    dataset.epoch = 1
    assert not all(a.shape == dataset[i][0].shape and torch.equal(a, dataset[i][0]) for i,
                   a in enumerate(first))
