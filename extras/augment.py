"""The augmentations of image classification: the strategies of DeiT (Touvron et al. 2021; the paper,
4.1) and Cutout (ImageNet-21k-P, A.3).

Functions of one picture take a PIL image or its tensor and a numpy generator, which is seeded by the
picture's number. Mixup and CutMix take a batch. data.classification_transform puts the functions of one
picture in order. Numbers follow the public recipe rand-m9-mstd0.5-inc1, mixup 0.8, CutMix 1.0, random
erasing 0.25 (pixel), label smoothing 0.1.
"""
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

FILL = (124, 116, 104)  # ImageNet's mean colour, fills where a picture was moved away
BICUBIC = Image.Resampling.BICUBIC


# ------------------------------------------------------------------------------------------------ crops

def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator,
                        area: tuple[float, float] = (0.08, 1.0)) -> Image.Image:
    """Resizes a random part of the picture to size x size. The part has a random share of the area, in
    `area`, and an aspect ratio of 3/4 to 4/3, uniform in its logarithm. After ten parts that do not fit
    it is the largest centred one with a permitted aspect ratio."""
    w, h = image.size
    for _ in range(10):
        pixels, aspect = w * h * rng.uniform(*area), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        cw, ch = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < cw <= w and 0 < ch <= h:
            x, y = int(rng.integers(w - cw, endpoint=True)), int(rng.integers(h - ch, endpoint=True))
            break
    else:
        cw, ch = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))
        x, y = (w - cw) // 2, (h - ch) // 2
    return image.resize((size, size), BICUBIC, box=(x, y, x + cw, y + ch))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """For evaluation: resizes the short side to size * 256 / 224 and takes the middle, size x size.
    Rounds as torchvision does."""
    short = int(size * 256 / 224)
    image = image.resize([int(short * s / min(image.size)) for s in image.size], BICUBIC)
    x, y = (round((s - size) / 2) for s in image.size)
    return image.crop((x, y, x + size, y + size))


# ------------------------------------------------------------------------------------------ RandAugment
# Each operation: (picture, level v in [0, 10], random sign) -> picture. A higher level always changes
# more (the "increasing" version).

def transform(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)


def enhance(operation: type) -> Callable:
    return lambda image, v, sign: operation(image).enhance(max(0.1, 1 + sign * 0.09 * v))


OPERATIONS = {
    "AutoContrast": lambda image, v, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, v, sign: ImageOps.equalize(image),
    "Invert": lambda image, v, sign: ImageOps.invert(image),
    "Rotate": lambda image, v, sign: image.rotate(sign * 3 * v, resample=BICUBIC, fillcolor=FILL),
    # keeps the highest 4 - int(0.4 v) bits
    "Posterize": lambda image, v, sign: image.point([(x >> (4 + int(0.4 * v))) << (4 + int(0.4 * v))
                                                     for x in range(256)] * 3),
    "Solarize": lambda image, v, sign: ImageOps.solarize(image, 256 - int(25.6 * v)),
    "SolarizeAdd": lambda image, v, sign: image.point([min(255, x + int(11 * v)) if x < 128 else x
                                                       for x in range(256)] * 3),
    "Color": enhance(ImageEnhance.Color),
    "Contrast": enhance(ImageEnhance.Contrast),
    "Brightness": enhance(ImageEnhance.Brightness),
    "Sharpness": enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, v, sign: transform(image, (1, sign * 0.03 * v, 0, 0, 1, 0)),
    "ShearY": lambda image, v, sign: transform(image, (1, 0, 0, sign * 0.03 * v, 1, 0)),
    "TranslateX": lambda image, v, sign: transform(image, (1, 0, sign * 0.045 * v * image.width, 0, 1, 0)),
    "TranslateY": lambda image, v, sign: transform(image, (1, 0, 0, 0, 1, sign * 0.045 * v * image.height)),
}


def rand_augment(image: Image.Image, rng: np.random.Generator, magnitude: float = 9, deviation: float = 0.5,
                 count: int = 2) -> Image.Image:
    """Draws `count` operations with replacement and applies each with probability 1/2, at its own level
    from N(magnitude, deviation), clipped to [0, 10] (Cubuk et al. 2020, in the version of DeiT)."""
    for name in rng.choice(list(OPERATIONS), count):
        if rng.random() < 0.5:
            level = float(np.clip(rng.normal(magnitude, deviation), 0, 10))
            image = OPERATIONS[name](image, level, 1 if rng.random() < 0.5 else -1)
    return image


# ------------------------------------------------------------------------------------ holes in pictures

def random_erasing(pixels: Tensor, rng: np.random.Generator, probability: float = 0.25) -> Tensor:
    """With `probability`, fills one rectangle of the normalised picture (3, H, W) with N(0, 1) noise,
    in place. Its area is 0.02 to 1/3 of the picture, its aspect ratio 0.3 to 1/0.3."""
    h, w = pixels.shape[1:]
    if rng.random() >= probability:
        return pixels
    for _ in range(10):
        area, aspect = h * w * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        eh, ew = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if eh < h and ew < w:
            y, x = int(rng.integers(h - eh, endpoint=True)), int(rng.integers(w - ew, endpoint=True))
            noise = rng.standard_normal((3, eh, ew), dtype=np.float32)
            pixels[:, y:y + eh, x:x + ew] = torch.from_numpy(noise)
            break
    return pixels


def cutout(image: Image.Image, rng: np.random.Generator, side: float = 0.5) -> Image.Image:
    """Paints a square of `side` times the picture's side around a random pixel, clipped at the edges,
    in one random colour (DeVries and Taylor 2017, in the version of ImageNet-21k-P)."""
    w, h = image.size
    x, y = int(rng.integers(w)), int(rng.integers(h))
    half_w, half_h = int(side * w / 2), int(side * h / 2)
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x - half_w, y - half_h, x + half_w - 1, y + half_h - 1),
                                    fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


# ------------------------------------------------------------------------------ mixing and soft targets

def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """labels (B,) -> (B, K): smoothing / K everywhere, and 1 - smoothing more at the label."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images: Tensor, targets: Tensor, rng: np.random.Generator, mixup: float = 0.8,
        cutmix: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mixes picture i with picture B - 1 - i, by mixup or CutMix with equal probability, at one ratio
    for the batch: lambda ~ Beta(alpha, alpha). Changes `images` in place.

    Mixup blends: lambda x + (1 - lambda) partner (Zhang et al. 2018). CutMix pastes a box of the
    partner. The box has the relative side sqrt(1 - lambda) around a uniform centre and is clipped;
    lambda becomes the share of the picture that is left (Yun et al. 2019). DeiT draws once per process.
    pretrain.py draws once per total batch, so that the number of processes does not matter.

    Args:
        images: (B, 3, H, W). targets: (B, K) soft. mixup, cutmix: alpha, 0 for never.
    """
    if not (mixup or cutmix):
        return images, targets
    paste = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    ratio = float(rng.beta(*[cutmix if paste else mixup] * 2))
    if paste:
        h, w = images.shape[2:]
        cy, cx, side = int(rng.integers(h)), int(rng.integers(w)), math.sqrt(1 - ratio)
        y0, y1 = (min(max(cy + s * (int(h * side) // 2), 0), h) for s in (-1, 1))
        x0, x1 = (min(max(cx + s * (int(w * side) // 2), 0), w) for s in (-1, 1))
        images[:, :, y0:y1, x0:x1] = images.flip(0)[:, :, y0:y1, x0:x1]
        ratio = 1 - (y1 - y0) * (x1 - x0) / (h * w)
    else:
        images = images.lerp_(images.flip(0), 1 - ratio)
    return images, targets.lerp(targets.flip(0), 1 - ratio)
