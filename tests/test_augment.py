"""Each strategy against its definition."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import augment

RAMP = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")  # every grey once
rng = np.random.default_rng


def grey(image):
    return np.asarray(image)[..., 0].astype(int)


def picture(w=40, h=30, seed=0):
    return Image.fromarray(rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


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


@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_blend_with_their_degenerate_picture(sign):
    x = np.asarray(picture()).astype(float)
    factor = 1 + sign * 0.09 * 5
    bright = np.asarray(augment.OPERATIONS["Brightness"](picture(), 5, sign))
    assert np.abs(bright - (x * factor).clip(0, 255)).max() <= 1
    luma = np.asarray(picture().convert("L")).astype(float)[..., None]
    colour = np.asarray(augment.OPERATIONS["Color"](picture(), 5, sign))
    assert np.abs(colour - (luma + factor * (x - luma)).clip(0, 255)).max() <= 1
    contrast = np.asarray(augment.OPERATIONS["Contrast"](picture(), 5, sign))
    mean = int(luma.mean() + 0.5)
    assert np.abs(contrast - (mean + factor * (x - mean)).clip(0, 255)).max() <= 1
    # the factor never falls below 0.1
    dark = np.asarray(augment.OPERATIONS["Brightness"](picture(), 10, -1))
    assert np.abs(dark - x * 0.1).max() <= 1


def test_geometry_moves_by_the_stated_amounts():
    image = Image.new("RGB", (200, 200))
    image.paste((255, 255, 255), (98, 98, 103, 103))  # a spot that survives interpolation

    def centroid(name, level, sign):
        pixels = np.asarray(augment.OPERATIONS[name](image, level, sign)).astype(float)
        bright = pixels.min(-1) > 180
        y, x = np.nonzero(bright)
        return x.mean() - 100, y.mean() - 100

    assert centroid("TranslateX", 4, 1) == pytest.approx((-0.045 * 4 * 200, 0), abs=0.6)
    assert centroid("TranslateY", 4, -1) == pytest.approx((0, 0.045 * 4 * 200), abs=0.6)
    assert centroid("ShearX", 10, 1) == pytest.approx((-0.3 * 100, 0), abs=1)
    assert centroid("ShearY", 10, -1) == pytest.approx((0, 0.3 * 100), abs=1)
    image.paste((0, 0, 0), (0, 0, 200, 200)), image.paste((255, 255, 255), (158, 98, 163, 103))
    angle = math.radians(3 * 6)  # counter-clockwise, y points down
    assert centroid("Rotate", 6, 1) == pytest.approx((60.5 * math.cos(angle), -60.5 * math.sin(angle)),
                                                     abs=0.8)


def test_identity_at_level_zero():
    for name in ("Rotate", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness",
                 "ShearX",
                 "ShearY", "TranslateX", "TranslateY"):
        assert np.array_equal(augment.OPERATIONS[name](picture(), 0, 1), picture()), name


def test_rand_augment_draws_two_of_fifteen_and_skips_half(monkeypatch):
    calls = []
    monkeypatch.setattr(augment, "OPERATIONS", {
        k: (lambda image, v, sign, k=k: calls.append((k, v, sign)) or image) for k in augment.OPERATIONS})
    generator, n = rng(0), 4000
    for _ in range(n):
        augment.rand_augment(RAMP, generator)
    assert len(augment.OPERATIONS) == 15
    assert len(calls) / n == pytest.approx(1, abs=0.05)  # two draws, each kept with probability 1/2
    counts = np.unique([c[0] for c in calls], return_counts=True)[1]
    assert len(counts) == 15 and counts.min() > 0.75 * counts.mean()
    levels = np.array([c[1] for c in calls])
    assert levels.mean() == pytest.approx(9, abs=0.05) and levels.std() == pytest.approx(0.5, abs=0.05)
    assert levels.max() <= 10 and np.mean([c[2] for c in calls]) == pytest.approx(0, abs=0.06)


def test_random_resized_crop_has_the_stated_area_and_aspect(monkeypatch):
    boxes = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, resample, box: boxes.append(box) or self)
    generator, image = rng(0), Image.new("RGB", (400, 300))
    for _ in range(2000):
        augment.random_resized_crop(image, 224, generator)
    x0, y0, x1, y1 = np.array(boxes).T
    area, aspect = (x1 - x0) * (y1 - y0) / 120000, (x1 - x0) / (y1 - y0)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 400 and y1.max() <= 300
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9 and 0.745 < aspect.min() and aspect.max() < 1.345
    monkeypatch.undo()
    # no part of a long strip is of a permitted shape: the middle of the largest one
    strip = Image.fromarray(np.arange(400, dtype=np.uint8)[None].repeat(6, 0)).convert("RGB")
    assert grey(augment.random_resized_crop(strip, 8, rng(0))).mean() == pytest.approx(199.5, abs=1)


def test_centre_crop_takes_224_of_256():
    image = Image.new("RGB", (512, 1024), (255, 0, 0))
    image.paste((0, 255, 0), (32, 288, 480, 736))  # what is left at 1/2: the middle 224 of 256 x 512
    assert np.array_equal(np.asarray(augment.centre_crop(image, 224))[8:-8, 8:-8],
                          np.full((208, 208, 3), (0, 255, 0)))
    assert np.asarray(augment.centre_crop(image.crop((31, 287, 481, 737)).resize((256, 256)),
                                          224)).shape == (
        224, 224, 3)


def test_random_erasing_replaces_one_rectangle_by_noise():
    areas, erased = [], 0
    for seed in range(400):
        pixels = augment.random_erasing(torch.full((3, 60, 80), 7.0), rng(seed))
        hole = (pixels != 7).any(0)
        if hole.any():
            erased += 1
            y, x = np.nonzero(hole.numpy())
            h, w = y.max() - y.min() + 1, x.max() - x.min() + 1
            assert hole.sum() == h * w  # a whole rectangle
            areas.append(h * w / 4800)
            assert 0.28 < h / w < 3.6
            noise = pixels[:, y.min():y.max() + 1, x.min():x.max() + 1]
            assert abs(noise.mean()) < 6 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 0.3
    assert erased / 400 == pytest.approx(0.25, abs=0.06) and min(areas) > 0.015 and max(areas) < 0.36


def test_cutout_paints_half_the_side():
    holes = []
    for seed in range(50):
        image = Image.new("RGB", (64, 64), (1, 2, 3))
        changed = (np.asarray(augment.cutout(image, rng(seed))) != (1, 2, 3)).any(-1)
        holes.append(changed.sum())
        assert len(np.unique(np.asarray(augment.cutout(image, rng(seed)))[changed], axis=0)) == 1
        assert np.array_equal(image, Image.new("RGB", (64, 64), (1, 2, 3)))  # the original stays
    assert max(holes) == 32 * 32 and min(holes) >= 16 * 16


def test_smoothing_by_hand():
    got = augment.smooth_targets(torch.tensor([2]), 4, 0.1)
    torch.testing.assert_close(got, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))


def test_mixup_blends_with_the_reversed_batch():
    images, targets = torch.randn(4, 3, 5, 6), torch.eye(4)
    ratio = rng(3).beta(0.8, 0.8)
    got, soft = augment.mix(images.clone(), targets, rng(3), mixup=0.8, cutmix=0)
    torch.testing.assert_close(got, ratio * images + (1 - ratio) * images.flip(0))
    torch.testing.assert_close(soft, ratio * torch.eye(4) + (1 - ratio) * torch.eye(4).flip(0))


def test_cutmix_pastes_a_box_and_counts_its_area():
    for seed in range(20):
        images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 48).clone()
        got, soft = augment.mix(images, torch.eye(4), rng(seed), mixup=0, cutmix=1)
        kept = (got[0] == 0).float().mean().item()
        assert soft[0].tolist() == pytest.approx([kept, 0, 0, 1 - kept], abs=1e-6)
        y, x = np.nonzero((got[0, 0] == 3).numpy())
        assert len(y) == 0 or len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)


class Fixed:
    """A generator whose draws are known."""

    def random(self):
        return 0.4

    def beta(self, a, b):
        return 0.75

    def integers(self, high):
        return high // 2


def test_cutmix_box_has_side_sqrt_of_one_minus_lambda():
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 40, 80).clone()
    got, soft = augment.mix(images, torch.eye(2), Fixed())
    expected = torch.zeros(40, 80)
    expected[10:30, 20:60] = 1  # half of each side, in the middle
    assert torch.equal(got[0, 1], expected) and soft[0].tolist() == [0.75, 0.25]


def test_equalize_and_sharpness_and_fill():
    flat = Image.fromarray(np.repeat([[10, 20]], 510, 0).astype(np.uint8)).convert("RGB")
    assert set(np.unique(grey(augment.OPERATIONS["Equalize"](flat, 5, 1)))) == {0, 255}  # two equal halves
    edge = Image.fromarray(np.repeat([[100] * 4 + [150] * 4], 8, 0).astype(np.uint8)).convert("RGB")
    steps = [np.ptp(grey(augment.OPERATIONS["Sharpness"](edge, 9, sign))) for sign in (-1, 1)]
    assert steps[0] <= 50 < steps[1]
    moved = np.asarray(augment.OPERATIONS["TranslateX"](picture(), 10, 1))
    assert (moved[:, -15:] == augment.FILL).all()


def test_mixup_and_cutmix_take_turns_at_the_stated_ratios():
    pasted, blended = [], []
    for seed in range(1500):
        got, soft = augment.mix(torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 16, 16).clone(),
                                torch.eye(2), rng(seed))
        (blended if 0 < got[0, 0, 0, 0] < 1 else pasted).append(soft[0, 0].item())
    assert len(pasted) / 1500 == pytest.approx(0.5, abs=0.05)
    # Beta(a, a) has variance 1 / (4 (2 a + 1))
    assert np.var(blended) == pytest.approx(1 / (4 * 2.6), rel=0.15)


def test_nothing_is_mixed_when_both_are_off():
    images = torch.randn(3, 3, 4, 4)
    assert augment.mix(images, torch.eye(3), rng(0), 0, 0)[0] is images
