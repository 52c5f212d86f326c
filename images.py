"""Pictures: files to RGB images, images to tensors and back."""
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model import InputError

warnings.filterwarnings("ignore", module="PIL")  # damaged metadata, which some of ImageNet have, do no harm
# a picture of 90 megapixels or more is refused
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Not all that pillow reads: EPS files are programs, and half a JPEG 2000 file may pass for a whole one.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, on 0..255 RGB


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from a file in one of FORMATS: grey, palette, RGBA (alpha dropped), CMYK, 16 bit,
    EXIF-rotated.

    Args:
        size: (width, height) that an annotation file states. Where only the unrotated picture has it, the
            annotator's program ignored the EXIF rotation, and so do we.
    Raises:
        InputError: naming the file, if it is absent, truncated, no picture or too large to be one.
    """
    if not os.path.isfile(path):  # to open a named pipe would be to wait for ever
        raise InputError(f"image {path} is missing or no file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if size is not None and upright.size != size and image.size == size:
                upright = image.copy()
        if upright.mode.startswith("I"):  # 16-bit grey; pillow's own conversion would clip it to 8 bits
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8))
        return upright.convert("RGB")
    except Exception as e:  # pillow's decoders raise a dozen kinds of error on damaged files
        raise InputError(f"image {path} cannot be read ({' '.join(str(e).split())}): replace or "
                         f"remove it") from None


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, normalised with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_tensor`, to look at what a model sees."""
    pixels = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
