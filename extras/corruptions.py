"""COCO-C (4.4, Table 4): 15 corruptions of images at five severities (Michaelis et al. 2019).

    python -m extras.corruptions OUT.png [PHOTO.jpg]    draws all 15 at severities 1, 3 and 5

A corruption is a function (image (H, W, 3) uint8, rng, *parameters) -> levels (H, W, 3). `corrupt`
clips and truncates the levels. CORRUPTIONS, near the end, holds the parameters. Lengths are in pixels,
whatever the image's size.

AP under corruption can be compared only if the pixels are the same. The pixels here are those of the
authors' package imagecorruptions. The order of additions and the width of floats follow the package
where they show in the pixels. Frost differs: its photographs are not free to ship, so frost is drawn.
With `frost_dir` the photographs are used.
"""
import argparse
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps
from scipy import fft, ndimage

from engine import Help, InputError, one_line, run_script
from extras.pictures import sheet_of
from extras.shapes import shape_scene

STRIP = 16  # rows at a time, where there are many passes over them, so that they stay in the cache
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


# ------------------------------------------------------------------------------------- noise and blurs

def gaussian_noise(image, rng, deviation):
    return (image / 255 + rng.normal(size=image.shape, scale=deviation)) * 255


def shot_noise(image, rng, photons):
    return rng.poisson(image / 255 * photons) / photons * 255


def impulse_noise(image, rng, share):
    """Turns a share of the values, each channel on its own, into 0 or 255."""
    hit = rng.random(image.shape) <= share
    white = rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(white, np.uint8(255), np.uint8(0)), image)


def defocus_blur(image, rng, radius, deviation):
    """Averages over a disk. A Gaussian softens the edge of the disk."""
    side, reach = (8, 1) if radius <= 8 else (radius, 2)
    x = np.arange(-side, side + 1)
    disk = (x ** 2 + x[:, None] ** 2 <= radius ** 2).astype(np.float32)
    disk /= disk.sum()
    edge = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * deviation ** 2))
    # Disks of radius 8 and 10 touch the border. Mirroring adds 1 % to their sum: they brighten.
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, edge / edge.sum(), axis, mode="mirror")
    planes = np.pad(image.transpose(2, 0, 1), ((0, 0), (side, side), (side, side)), "reflect")
    size = [fft.next_fast_len(n, real=True) for n in planes.shape[1:]]
    product = fft.rfft2(planes.astype(float), size) * fft.rfft2(disk.astype(float), size)
    blurred = fft.irfft2(product, size)
    return blurred[:, 2 * side:planes.shape[1], 2 * side:planes.shape[2]].transpose(1, 2, 0)


def glass_blur(image, rng, deviation, reach, rounds):
    """Blurs, lets pixels copy their neighbours, and blurs again.

    In every round the authors visit the pixels from the bottom right to the top left. Each pixel copies
    the present value of a random neighbour, which is itself a copy if the neighbour was visited before.
    So the copies form chains. Following all chains at once is faster than a loop over the pixels.
    """
    def blurred(x):
        return ndimage.gaussian_filter(x / 255, (deviation, deviation, 0), mode="nearest") * 255
    h, w = image.shape[:2]
    copies = np.zeros((h, w), dtype=bool)  # the pixels that copy: all except a border
    copies[reach + 1:h - reach + 1, reach + 1:w - reach + 1] = True
    here = np.flatnonzero(copies)[::-1]  # in the order of the visits
    source = np.arange(h * w)  # source[i]: the pixel of the blurred image that pixel i shows
    for _ in range(rounds):
        dx, dy = rng.randint(-reach, reach, size=(len(here), 2)).T  # never +reach
        neighbour = here + dy * w + dx
        visited = copies.flat[neighbour] & (neighbour > here)
        copied_from = np.arange(h * w)
        copied_from[here] = neighbour
        chain = np.arange(h * w)
        chain[here[visited]] = neighbour[visited]
        while (chain != (further := chain[chain])).any():  # to the end of each, in doubling steps
            chain = further
        source = source[copied_from[chain]]
    once = blurred(image).astype(np.uint8)
    return blurred(once.reshape(-1, 3)[source].reshape(image.shape))


def motion_blur(image, rng, radius, deviation, start=-45):
    """Adds up shifted copies of an image (H, W, 3) or (H, W).

    The shifts go from 0 to 2 * radius pixels, in a random direction of `start` to start + 90 degrees.
    The weights are half a Gaussian. Borders are repeated.
    """
    h, w = image.shape[:2]
    channels = image[0, 0].size
    length = 2 * radius + 1
    angle = np.deg2rad(rng.uniform(start, start + 90))
    weights = np.exp(-np.arange(length) ** 2 / (2 * deviation ** 2))
    weights /= math.sqrt(2 * math.pi) * deviation
    weights /= weights.sum()
    x, y = length * np.cos(angle), length * np.sin(angle)
    shifts = [[-math.ceil(i * v / math.hypot(x, y) - 0.5) for v in (x, y)] for i in range(length)]
    padded = np.pad(image, ((length, length), (length, length), (0, 0))[:image.ndim], "edge")
    padded = padded.astype(float).reshape(h + 2 * length, -1)
    total = np.zeros((h, w * channels))
    for top in range(0, h, STRIP):
        strip = total[top:top + STRIP]
        for weight, (dx, dy) in zip(weights, shifts):
            if abs(dx) >= w or abs(dy) >= h:
                break  # the other weights are lost: a tiny image darkens, as theirs does
            row, column = top + length - dy, (length - dx) * channels
            strip += weight * padded[row:row + len(strip), column:column + w * channels]
    return total.reshape(image.shape)


def zoom_blur(image, rng, end, step):
    """The mean of the image and its enlargements by 1, 1 + step, ... up to `end`."""
    h, w = image.shape[:2]
    x = (image / 255).astype(np.float32).reshape(h, w * 3)
    wide = x.astype(float)
    total = np.zeros_like(x)
    factors = np.arange(1, end, step)  # rounding decides whether `end` is one of them
    plans = [(*linear_taps(h, factor, 1), *linear_taps(w, factor, 3)) for factor in factors]
    for top in range(0, h, STRIP):
        part = slice(top, top + STRIP)
        for row, a, b, column, c, d in plans:
            rows = wide[row[part]] * a[part, None] + wide[row[part] + 1] * b[part, None]
            total[part] += (rows[:, column] * c + rows[:, column + 3] * d).astype(np.float32)
    return ((x + total) / (len(plans) + 1)).reshape(image.shape) * 255


def linear_taps(side: int, factor: float, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scipy.ndimage.zoom(order=1) of the middle of one axis, cut to `side`, as three arrays with
    an entry per value: the index of its source, the weight of the source, the weight of the next pixel.
    As in scipy, both weights are 0 at a position that rounding puts outside of the image."""
    number = math.ceil(side / factor)  # pixels in the middle, which are enlarged to the whole side
    position = np.arange(side) * ((number - 1) / (round(number * factor) - 1))
    pixel = np.minimum(position.astype(int), number - 2)
    part = position - pixel
    inside = position <= number - 1
    source = (pixel + (side - number) // 2)[:, None] * channels + np.arange(channels)
    return source.ravel(), ((1 - part) * inside).repeat(channels), (part * inside).repeat(channels)


# ----------------------------------------------------------------------------------------- the weather

def snow(image, rng, mean, deviation, zoom, threshold, radius, motion_deviation, mix):
    """Brightens the image and adds blurred flakes: enlarged noise above a threshold."""
    h, w = image.shape[:2]
    rows, columns = math.ceil(h / zoom), math.ceil(w / zoom)  # of the middle, which is enlarged
    top, left = (h - rows) // 2, (w - columns) // 2
    flakes = rng.normal(mean, deviation, (h, w))[top:top + rows, left:left + columns]
    flakes = ndimage.zoom(flakes, zoom, order=1)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = motion_blur(flakes, rng, radius, motion_deviation, -135)[:h, :w, None]
    flakes = np.round(flakes * 255) / 255
    x, grey = image.astype(np.float32) / 255, 0
    for channel, weight in enumerate(np.float32((0.299, 0.587, 0.114))):
        # float64, rounded to float32 after each addition, like the fused multiply-add in OpenCV
        grey = (x[..., channel, None] * np.float64(weight) + grey).astype(np.float32)
    x = mix * x + (1 - mix) * np.maximum(x, grey * 1.5 + 0.5)
    return (x + flakes + flakes[::-1, ::-1]) * 255


def frost(image, rng, a, b, frost_dir=None):
    h, w = image.shape[:2]
    ice = frost_texture(h, w, rng) if frost_dir is None else frost_photo(h, w, rng, Path(frost_dir))
    return a * image + b * ice


def frost_texture(h: int, w: int, rng: np.random.RandomState) -> np.ndarray:
    """Draws feathers of ice on a cloudy pane, as (h, w, 3) levels.

    The five photographs have mean greys of 120 to 205 and deviations of 18 to 43. Most are bluish. The
    drawn panes are like that. Like the photographs, they are enlarged for larger images.
    """
    scale = 1.1 * max(1, h / 400, w / 600)

    def clouds(cell):  # smooth noise
        rows, columns = int(h / cell / scale) + 2, int(w / cell / scale) + 2
        noise = rng.normal(size=(rows, columns)).astype(np.float32)
        return np.asarray(Image.fromarray(noise).resize((w, h)))
    pane = Image.new("L", (w, h))
    feathers = [feather(rng) for _ in range(6)]
    growth = clouds(120)
    number = 8 + int(h * w / scale ** 2 / 700)
    for x, y, angle in rng.uniform(0, (w, h, 360), (number, 3)):
        length = int(scale * rng.uniform(25, 80) * math.exp(0.25 * growth[int(y), int(x)]))
        leaf = feathers[rng.randint(6)].resize((length, length * 3 // 5))
        leaf = leaf.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        left, top = int(x) - leaf.width // 2, int(y) - leaf.height // 2
        box = (left, top, left + leaf.width, top + leaf.height)
        pane.paste(ImageChops.lighter(pane.crop(box), leaf), box)
    ice = np.asarray(pane) / 50 + 0.7 * growth + 0.4 * clouds(30) + 0.4 * clouds(1.5)
    grey = rng.uniform(120, 205) + rng.uniform(18, 43) * (ice - ice.mean()) / ice.std()
    return (grey[..., None] + (-14, 2, 14)).clip(0, 255)


def feather(rng: np.random.RandomState) -> Image.Image:
    """A horizontal spine with slanting barbs. Its point is on the right."""
    along = np.linspace(0, 1, 90)
    across = np.abs(np.linspace(-0.3, 0.3, 54))[:, None]
    outline = np.maximum(0.28 * (1 - along) * np.minimum(along / 0.2, 1), 1e-6)
    barbs = np.cos(np.pi * rng.uniform(8, 16) * (along - rng.uniform(0.7, 1.6) * across)) ** 2
    blade = (1 - across / outline).clip(0, 1) ** 0.5 * (0.3 + 0.7 * barbs)
    spine = np.exp(-(across / 0.012) ** 2) * (along > 0.02)
    grey = 255 * rng.uniform(0.5, 1) * (blade + 0.5 * spine).clip(0, 1)
    return Image.fromarray(grey.astype(np.uint8))


def frost_photo(h: int, w: int, rng: np.random.RandomState, folder: Path) -> np.ndarray:
    """Enlarges a random photograph to 1.1 times the size that covers the
    image, and crops a random part (h, w, 3)."""
    missing = [name for name in FROST_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"frost folder {folder} lacks {', '.join(missing)}: copy these files from the "
                         "package imagecorruptions")
    photo = np.asarray(open_photo(folder / FROST_FILES[rng.randint(5)]))
    scale = 1.1 * max(1, h / photo.shape[0], w / photo.shape[1])
    height, width = (math.ceil(n * scale) for n in photo.shape[:2])
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    rows = cubic(photo, height, top, h).swapaxes(0, 1)  # (photo's width, h, 3)
    return np.rint(cubic(rows, width, left, w).swapaxes(0, 1)).clip(0, 255)


def open_photo(path: Path) -> Image.Image:
    """An upright RGB picture from a file. InputError, naming the file, if that fails."""
    try:
        with Image.open(path) as photo:
            return ImageOps.exif_transpose(photo).convert("RGB")
    except Exception as e:  # pillow's decoders raise a dozen kinds of error on damaged files
        raise InputError(f"image {path} cannot be read ({one_line(e)})") from None


def cubic(layer: np.ndarray, size: int, first: int, number: int) -> np.ndarray:
    """Resizes (N, W, 3) to (size, W, 3) and returns `number` of its rows, beginning with `first`. The
    cubic convolution is OpenCV's: a = -0.75, no antialiasing, borders repeated."""
    a = -0.75
    position = (first + np.arange(number) + 0.5) * len(layer) / size - 0.5
    rows = np.floor(position).astype(int) + np.arange(-1, 3)[:, None]  # (4, number)
    d = np.abs(position - rows)
    weights = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4))
    return sum(v[:, None, None] * layer[row] for row, v in zip(rows.clip(0, len(layer) - 1), weights))


def fog(image, rng, density, decay):
    h, w = image.shape[:2]
    x = image / 255
    peak = x.max()
    x += density * plasma(2 ** (max(h, w) - 1).bit_length(), decay, rng)[:h, :w, None]
    return x * peak / (peak + density) * 255


def plasma(size: int, decay: float, rng: np.random.RandomState) -> np.ndarray:
    """The diamond-square algorithm on a torus -> (size, size) float32 from 0 to 1. size: 2 ** n."""
    field = np.zeros((size, size), dtype=np.float32)
    step, rise = size, 100

    def rough(total):  # the mean of four neighbours, with noise
        return total / 4 + rise * rng.uniform(-rise, rise, total.shape)
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]  # a view, as is the next
        centres = field[half::step, half::step]
        below = corners + np.roll(corners, -1, 0)
        right = corners + np.roll(corners, -1, 1)
        centres[:] = rough(below + np.roll(below, -1, 1))
        field[::step, half::step] = rough(centres + np.roll(centres, 1, 0) + right)
        field[half::step, ::step] = rough(centres + np.roll(centres, 1, 1) + below)
        step, rise = half, rise / decay
    field -= field.min()
    return field / field.max()


def brightness(image, rng, added):
    """Converts to HSV, adds to V, and converts back to RGB."""
    r, g, b = image.transpose(2, 0, 1) / 255
    v = np.maximum(np.maximum(r, g), b)
    delta = v - np.minimum(np.minimum(r, g), b)
    safe = np.where(delta == 0, 1, delta)
    hue = np.where(g == v, 2 + (b - r) / safe, (g - b) / safe)
    hue = np.where(b == v, 4 + (r - g) / safe, hue) / 6 % 1 * 6  # 0 to 6; of greys any
    saturation = delta / np.where(v == 0, 1, v)
    sextant = hue.astype(np.uint8)
    part = hue - sextant
    v = np.minimum(v + added, 1)
    middle = v * (1 - np.where(sextant % 2 == 0, 1 - part, part) * saturation)
    levels = (np.stack([v, middle, v * (1 - saturation)]) * 255).astype(np.uint8)  # largest to smallest
    order = np.array(((0, 1, 2, 2, 1, 0), (1, 0, 0, 1, 2, 2), (2, 2, 1, 0, 0, 1)))  # (R, G, B; sextant)
    return np.stack([np.choose(channel[sextant % 6], levels) for channel in order], -1)


# --------------------------------------------------------------------------------------------- digital

def contrast(image, rng, factor):
    """Moves every channel towards its mean over the image, by a table of its 256 levels."""
    mean = (image / 255).mean((0, 1))
    levels = ((np.arange(256)[:, None] / 255 - mean) * factor + mean) * 255  # (256, 3)
    return np.stack([levels[:, c].take(image[..., c]) for c in range(3)], -1)


def elastic_transform(image, rng, strength):
    h, w = image.shape[:2]

    def shifts():  # theirs scale with the height along both axes
        noise = rng.uniform(-0.005 * h, 0.005 * h, (h, w))
        smooth = ndimage.gaussian_filter(noise, (0.01 * h, 0.01 * w), truncate=3)
        return (smooth * strength).astype(np.float32)
    dx = shifts()
    dy = shifts()
    places = (np.arange(h)[:, None] + dy, np.arange(w) + dx)
    x = image.astype(np.float32) / 255
    planes = [ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)]
    return np.stack(planes, -1) * 255


def pixelate(image, rng, factor):
    h, w = image.shape[:2]
    small = Image.fromarray(image).resize((int(w * factor), int(h * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.NEAREST))


def jpeg_compression(image, rng, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# ----------------------------------------------------------------------------------------- all of them

CORRUPTIONS = {  # in the order of Table 4: the function, then its parameters at severities 1 to 5
    "gaussian_noise": (gaussian_noise, (0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": (shot_noise, (60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": (impulse_noise, (0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": (defocus_blur, (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": (glass_blur, (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": (motion_blur, (10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": (zoom_blur, (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (snow, (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
             (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
             (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    "frost": (frost, (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": (fog, (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (brightness, (0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": (contrast, (0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (elastic_transform, (12.5,), (16.25,), (21.25,), (25,), (30,)),
    "pixelate": (pixelate, (0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": (jpeg_compression, (25,), (18,), (15,), (10,), (7,)),
}
NAMES = tuple(CORRUPTIONS)


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.RandomState,
            frost_dir: str | Path | None = None) -> np.ndarray:
    """Corrupts an image -> (H, W, 3) uint8. Levels are truncated, not rounded, as in the package.

    Args:
        image: (H, W, 3) uint8, RGB; H, W >= 32. Grey, (H, W) or (H, W, 1), gets three equal channels.
        name, severity: one of NAMES, 1 to 5.
        rng: RandomState(s) gives the same pixels as the package after np.random.seed(s). Exceptions are
            drawn frost, and defocus blur, which can differ by a level in flat areas. For impulse noise
            default_rng(s) gives theirs. Glass blur and frost need a RandomState.
        frost_dir: a folder with FROST_FILES.
    Raises:
        InputError: the image, the name, the severity or the folder cannot be used.
    """
    image = np.asarray(image)
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise InputError(f"an image of shape {image.shape} and type {image.dtype} cannot be corrupted: "
                         "give (height, width, 3) or (height, width), of 32 pixels or more, in uint8")
    if name not in NAMES or severity not in (1, 2, 3, 4, 5):
        raise InputError(f"there is no corruption {name!r} of severity {severity!r}: choose one of "
                         f"{', '.join(NAMES)} and 1 to 5")
    function, *parameters = CORRUPTIONS[name]
    options = {"frost_dir": frost_dir} if name == "frost" else {}
    levels = function(image, rng, *parameters[int(severity) - 1], **options)
    return levels.clip(0, 255).astype(np.uint8)


def corrupt_seeded(picture: Image.Image, image_id: int, name: str, severity: int, seed: int = 0,
                   frost_dir: str | Path | None = None) -> Image.Image:
    """`corrupt` of a picture. Its generator is seeded with the bytes of "seed id name severity", so an
    image has the same pixels in any order of reading and with any number of workers."""
    rng = np.random.RandomState(list(f"{seed} {image_id} {name} {severity}".encode()))
    return Image.fromarray(corrupt(np.asarray(picture.convert("RGB")), name, severity, rng, frost_dir))


# ----------------------------------------------------------------------------------------- the command

def corruption_sheet(picture: Image.Image) -> Image.Image:
    """All corruptions of a picture at severities 1, 3 and 5: three corruptions to a row."""
    cells = []
    for name in NAMES:
        for severity in (1, 3, 5):
            cell = corrupt_seeded(picture, 0, name, severity)
            ImageDraw.Draw(cell).text((4, 2), f"{name} {severity}", font_size=18, stroke_width=2,
                                      stroke_fill="black")
            cells.append(cell)
    return sheet_of(cells, columns=9, cell=max(picture.size) + 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the picture to write")
    parser.add_argument("photo", type=Path, nargs="?", metavar="PHOTO.jpg",
                        help="the picture to corrupt (default: generated shapes)")
    args = parser.parse_args()
    if args.photo:
        picture = open_photo(args.photo)
    else:
        picture = shape_scene(np.random.default_rng(3), 280, 4)[0]
    picture.thumbnail((280, 280))
    sheet = corruption_sheet(picture)
    try:
        sheet.save(args.out, "PNG")
    except OSError as e:
        raise InputError(f"cannot write {args.out} ({e.strerror}): give another name") from None


if __name__ == "__main__":
    run_script(main)
