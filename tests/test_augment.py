"""Each augmentation of image classification against its definition."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from extras import augment

RAMP = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")  # every grey once
rng = np.random.default_rng
PICTURE = Image.fromarray(rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., 0].astype(int)


@pytest.mark.parametrize("level", [0, 3.7, 9, 10])
@pytest.mark.parametrize("name, expected", [
    ("Invert", lambda x, v: 255 - x),
    ("Posterize", lambda x, v: x // 2 ** (4 + int(0.4 * v)) * 2 ** (4 + int(0.4 * v))),
    ("Solarize", lambda x, v: np.where(x < 256 - int(25.6 * v), x, 255 - x)),
    ("SolarizeAdd", lambda x, v: np.where(x < 128, np.minimum(x + int(11 * v), 255), x)),
    ("AutoContrast", lambda x, v: x),  # the ramp already uses the full range
])
def test_operations_on_every_grey_value(name, expected, level):
    got = grey(augment.OPERATIONS[name](RAMP, level, 1))
    assert np.array_equal(got, expected(np.arange(256), level).reshape(16, 16))


def test_equalize_makes_four_common_greys_even():
    four = Image.fromarray(np.array([[0, 10, 20, 255]], np.uint8).repeat(25500, 0)).convert("RGB")
    assert grey(augment.OPERATIONS["Equalize"](four, 9, 1))[0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_blend_with_their_degenerate_picture(sign):
    x = np.asarray(PICTURE).astype(float)
    luma = np.asarray(PICTURE.convert("L")).astype(float)[..., None]
    smooth = np.asarray(PICTURE.filter(ImageFilter.SMOOTH)).astype(float)
    for name, degenerate in (("Brightness", 0), ("Color", luma), ("Contrast", int(luma.mean() + 0.5)),
                             ("Sharpness", smooth)):
        for level, factor in ((5, 1 + sign * 0.45), (10, 1 + sign * 0.9)):
            got = np.asarray(augment.OPERATIONS[name](PICTURE, level, sign))
            expected = (degenerate + factor * (x - degenerate)).clip(0, 255)
            assert np.abs(got - expected).max() <= 1, (name, level)


def test_geometry_moves_by_the_stated_amounts():
    def centroid(name, level, sign, spot=(98, 98, 103, 103)):
        """Where a spot of the picture goes, counted from the middle."""
        image = Image.new("RGB", (200, 200))
        image.paste((255, 255, 255), spot)
        pixels = np.asarray(augment.OPERATIONS[name](image, level, sign)).astype(float)
        y, x = np.nonzero(pixels.min(-1) > 180)
        return x.mean() - 100, y.mean() - 100
    assert centroid("TranslateX", 4, 1) == pytest.approx((-0.045 * 4 * 200, 0), abs=0.6)
    assert centroid("TranslateY", 4, -1) == pytest.approx((0, 0.045 * 4 * 200), abs=0.6)
    assert centroid("ShearX", 10, 1) == pytest.approx((-0.3 * 100, 0), abs=1)
    assert centroid("ShearY", 10, -1) == pytest.approx((0, 0.3 * 100), abs=1)
    angle = math.radians(3 * 6)  # counter-clockwise; y points down
    turned = centroid("Rotate", 6, 1, spot=(158, 98, 163, 103))
    assert turned == pytest.approx((60.5 * math.cos(angle), -60.5 * math.sin(angle)), abs=0.8)
    moved = np.asarray(augment.OPERATIONS["TranslateX"](PICTURE, 10, 1))
    assert (moved[:, -15:] == (124, 116, 104)).all()  # ImageNet's mean colour
    moved = np.asarray(augment.OPERATIONS["TranslateY"](PICTURE, 10, 1))  # by 0.45 * 30 = 13.5 pixels
    assert (moved[-13:] == (124, 116, 104)).all() and not (moved[-15] == (124, 116, 104)).all()
    assert np.asarray(augment.OPERATIONS["Rotate"](PICTURE, 10, 1))[0, 0].tolist() == [124, 116, 104]
    step = Image.new("RGB", (64, 64), (100, 100, 100))
    step.paste((150, 150, 150), (32, 0, 64, 64))
    for name in ("Rotate", "ShearX"):  # only a bicubic filter goes beyond the values at an edge
        inside = grey(augment.OPERATIONS[name](step, 3.3, 1))[16:48, 16:48]
        assert inside.min() < 100 and inside.max() > 150


def test_rand_augment_draws_two_of_fifteen_and_skips_half(monkeypatch):
    calls = []
    spies = {name: lambda image, v, sign, name=name: calls.append((name, v, sign)) or image
             for name in augment.OPERATIONS}
    monkeypatch.setattr(augment, "OPERATIONS", spies)
    generator, n, alike, levels_of_two = rng(0), 4000, 0, []
    for _ in range(n):
        before = len(calls)
        augment.rand_augment(RAMP, generator)
        if len(calls) == before + 2:
            alike += calls[-1][0] == calls[-2][0]
            levels_of_two.append([v for _, v, _ in calls[-2:]])
    assert alike > 30 and abs(np.corrcoef(np.transpose(levels_of_two))[0, 1]) < 0.1  # of some 1000 pairs
    names, levels, signs = map(np.array, zip(*calls))
    assert len(calls) / n == pytest.approx(1, abs=0.05)  # two draws, each kept with probability 1/2
    counts = np.unique(names, return_counts=True)[1]
    assert len(counts) == 15 and counts.min() > 0.75 * counts.mean()
    assert levels.mean() == pytest.approx(9, abs=0.05) and levels.std() == pytest.approx(0.5, abs=0.05)
    assert levels.max() <= 10 and signs.mean() == pytest.approx(0, abs=0.06)


def test_random_resized_crop_has_the_stated_area_and_aspect(monkeypatch):
    boxes, filters = [], set()
    spy = lambda image, size, kind, box: boxes.append(box) or filters.add(kind) or image
    monkeypatch.setattr(Image.Image, "resize", spy)
    generator, image = rng(0), Image.new("RGB", (400, 300))
    for _ in range(2000):
        augment.random_resized_crop(image, 224, generator)
    x0, y0, x1, y1 = np.array(boxes).T
    area, aspect = (x1 - x0) * (y1 - y0) / 120000, (x1 - x0) / (y1 - y0)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 400 and y1.max() <= 300
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9
    assert 0.745 < aspect.min() and aspect.max() < 1.345 and filters == {Image.Resampling.BICUBIC}
    assert abs(np.log(aspect[area < 0.4]).mean()) < 0.015  # even in its logarithm; larger ones must fit
    for low, high, side in ((x0, x1, 400), (y0, y1, 300)):  # and anywhere
        room = side - (high - low)
        assert (low[room > 9] / room[room > 9]).mean() == pytest.approx(0.5, abs=0.03)
    monkeypatch.undo()
    # No part of a long strip has a permitted aspect ratio, so the middle of the largest one is taken.
    strip = Image.fromarray(np.arange(400, dtype=np.uint8)[None].repeat(6, 0)).convert("RGB")
    assert grey(augment.random_resized_crop(strip, 8, rng(0))).mean() == pytest.approx(199.5, abs=1)


@pytest.mark.parametrize("size", [64, 160, 224])
def test_centre_crop_rounds_as_torchvision(monkeypatch, size):
    """Its Resize and CenterCrop; the short side is DeiT's."""
    resized, cropped, resize, crop = [], [], Image.Image.resize, Image.Image.crop
    monkeypatch.setattr(Image.Image, "resize", lambda i, to, kind: resized.append(to) or resize(
        i, to, {Image.Resampling.BICUBIC: kind}[kind]))
    monkeypatch.setattr(Image.Image, "crop", lambda i, box: cropped.append(box) or crop(i, box))
    short = {64: 73, 160: 182, 224: 256}[size]
    for w, h in [(500, 375), (375, 500), (333, 500), (640, 427), (300, 300), (97, 61), (20, 999)]:
        augment.centre_crop(Image.new("RGB", (w, h)), size)
        long = int(short * max(w, h) / min(w, h))
        width, height = (short, long) if w <= h else (long, short)
        assert tuple(resized[-1]) == (width, height)
        left, top = int(round((width - size) / 2)), int(round((height - size) / 2))
        assert cropped[-1] == (left, top, left + size, top + size)


def test_random_erasing_replaces_one_rectangle_by_noise():
    areas, aspects, places = [], [], []
    for seed in range(400):
        pixels = augment.random_erasing(torch.full((3, 60, 80), 7.0), rng(seed))
        y, x = (pixels != 7).any(0).nonzero(as_tuple=True)
        if len(y):
            h, w = (int(side.max() - side.min() + 1) for side in (y, x))
            assert len(y) == h * w and 0.28 < h / w < 3.6  # a whole rectangle
            areas.append(h * w / 4800)
            aspects.append(h / w)
            places.append((int(y.min()) / (60 - h), int(x.min()) / (80 - w)))
            noise = pixels[:, y.min():y.max() + 1, x.min():x.max() + 1]
            assert abs(noise.mean()) < 6 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 0.3
    assert len(areas) / 400 == pytest.approx(0.25, abs=0.06) and max(areas) < 0.36
    assert 0.015 < min(areas) < 0.03 and max(areas) > 0.31
    assert min(aspects) < 0.4 and max(aspects) > 2.5 and abs(np.log(aspects).mean()) < 0.2
    assert np.mean(places, 0) == pytest.approx([0.5, 0.5], abs=0.1)  # anywhere


def test_cutout_paints_half_the_side_in_one_colour():
    holes, colours, plain = [], [], Image.new("RGB", (64, 64), (1, 2, 3))
    for seed in range(50):
        got = np.asarray(augment.cutout(plain, rng(seed)))
        painted = (got != (1, 2, 3)).any(-1)
        holes.append(painted.sum())
        colours.append(np.unique(got[painted], axis=0))
    assert np.shape(colours) == (50, 1, 3) and (np.diff(colours) != 0).mean() > 0.9  # one each, no greys
    assert max(holes) == 32 * 32 and 16 * 16 <= min(holes) < 20 * 20  # around any pixel
    wide = Image.new("RGB", (64, 32))  # half of each side
    sides = [(np.asarray(augment.cutout(wide, rng(seed))) != 0).any(-1) for seed in range(50)]
    assert max(s.any(0).sum() for s in sides) == 32 and max(s.any(1).sum() for s in sides) == 16
    assert (np.asarray(plain) == (1, 2, 3)).all()  # the original stays


def two_pictures(h: int, w: int) -> torch.Tensor:
    """(2, 3, h, w): zeros and ones."""
    return torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, h, w).clone()


def test_the_cutmix_box_has_side_sqrt_of_one_minus_lambda():
    class Fixed:  # a generator with known draws
        random = lambda self: 0.4
        beta = lambda self, a, b: {(0.9, 0.9): 0.75}[a, b]
        integers = lambda self, high: high // 2
    got, soft = augment.mix(two_pictures(40, 80), torch.eye(2), Fixed(), cutmix=0.9)
    expected = torch.zeros(40, 80)
    expected[10:30, 20:60] = 1  # half of each side, in the middle
    assert torch.equal(got[0, 1], expected) and soft[0].tolist() == [0.75, 0.25]


def test_mixup_and_cutmix_take_turns_at_the_stated_ratios():
    blended = []
    for seed in range(1500):
        got, soft = augment.mix(two_pictures(16, 24), torch.eye(2), rng(seed))
        kept = 1 - got[0].mean().item()  # of the first picture, which is 0
        assert soft[0].tolist() == pytest.approx([kept, 1 - kept], abs=1e-5)
        if 0 < got[0, 0, 0, 0] < 1:
            blended.append(soft[0, 0].item())
        else:  # a rectangle is pasted
            y, x = got[0, 0].nonzero(as_tuple=True)
            assert len(y) == 0 or len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
    assert len(blended) / 1500 == pytest.approx(0.5, abs=0.05)
    assert np.var(blended) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.15)  # of Beta(0.8, 0.8)
