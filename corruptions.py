"""COCO-C: 15 corruptions at five severities (Michaelis et al. 2019), under which Table 4 compares detectors.

    python corruptions.py --benchmark [--goldens FILE.npz]    times, and differences to reference images
    python corruptions.py --picture sheet.png [photo.jpg]     all 15 at severities 1, 3 and 5

Each is a function (image (H, W, 3) uint8, rng, *parameters) -> levels (H, W, 3); CORRUPTIONS at the end has
the parameters, in pixels whatever the image's size. AP under corruption compares only on the same pixels, so
where orders of additions and widths of floats show, they are those of the authors' package imagecorruptions.
Only frost differs: its photographs are not free to ship, so it is drawn, unless `frost_dir` has them.
"""
import argparse
import io
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scipy import fft, ndimage

import engine
from images import read_image
from model import InputError
from pictures import grid
from shapes import shape_scene

STRIP = 16  # rows worked on at once where there are many passes over them, so that they stay in the cache
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # a sixth is never used


# ------------------------------------------------------------------------------------------ noise and blurs

def gaussian_noise(image, rng, deviation):
    return (image / 255 + rng.normal(size=image.shape, scale=deviation)) * 255


def shot_noise(image, rng, photons):
    return rng.poisson(image / 255 * photons) / photons * 255


def impulse_noise(image, rng, share):
    hit, white = rng.random(image.shape) <= share, rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(white, np.uint8(255), np.uint8(0)), image)


def defocus_blur(image, rng, radius, deviation):
    """The kernel is a disk, whose edge is softened by a Gaussian."""
    side, reach = (8, 1) if radius <= 8 else (radius, 2)
    x = np.arange(-side, side + 1)
    disk = (x ** 2 + x[:, None] ** 2 <= radius ** 2).astype(np.float32)
    disk /= disk.sum()
    edge = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * deviation ** 2))
    for axis in (0, 1):  # mirrored: disks of 8 and 10, which touch the border, gain 1 % and so brighten
        disk = ndimage.correlate1d(disk, edge / edge.sum(), axis, mode="mirror")
    planes = np.pad(image.transpose(2, 0, 1), ((0, 0), (side, side), (side, side)), "reflect")
    size = [fft.next_fast_len(n, real=True) for n in planes.shape[1:]]
    blurred = fft.irfft2(fft.rfft2(planes.astype(float), size) * fft.rfft2(disk.astype(float), size), size)
    return blurred[:, 2 * side:planes.shape[1], 2 * side:planes.shape[2]].transpose(1, 2, 0)


def glass_blur(image, rng, deviation, reach, rounds):
    """Between two blurs: from the bottom right on, each pixel takes the value that one within `reach` has at
    that moment. If that one was passed before, this is what it took itself; else its own."""
    def blurred(x):
        return ndimage.gaussian_filter(x / 255, (deviation, deviation, 0), mode="nearest") * 255
    h, w = image.shape[:2]
    taking = np.zeros((h, w), dtype=bool)  # all but a border
    taking[reach + 1:h - reach + 1, reach + 1:w - reach + 1] = True
    here, source = np.flatnonzero(taking)[::-1], np.arange(h * w)
    for _ in range(rounds):
        dx, dy = rng.randint(-reach, reach, size=(len(here), 2)).T  # never +reach
        there = here + dy * w + dx
        passed = taking.flat[there] & (there > here)
        taken, via = np.arange(h * w), np.arange(h * w)
        taken[here], via[here[passed]] = there, there[passed]
        while (via != (further := via[via])).any():  # to the ends of the chains, in doubling steps
            via = further
        source = source[taken[via]]
    return blurred(blurred(image).astype(np.uint8).reshape(-1, 3)[source].reshape(image.shape))


def motion_blur(image, rng, radius, deviation, start=-45):
    """The sum of copies moved by 0 to 2 radius pixels in a direction of `start` to start + 90 degrees, with
    the weights of half a Gaussian; borders are repeated. Takes (H, W), too."""
    h, w, channels = *image.shape[:2], image[0, 0].size
    length, angle = 2 * radius + 1, np.deg2rad(rng.uniform(start, start + 90))
    weights = np.exp(-np.arange(length) ** 2 / (2 * deviation ** 2)) / (math.sqrt(2 * math.pi) * deviation)
    weights /= weights.sum()
    x, y = length * np.cos(angle), length * np.sin(angle)
    moves = [[-math.ceil(i * v / math.hypot(x, y) - 0.5) for v in (x, y)] for i in range(length)]
    padded = np.pad(image, ((length, length), (length, length), (0, 0))[:image.ndim], "edge")
    padded = padded.astype(float).reshape(h + 2 * length, -1)
    total = np.zeros((h, w * channels))
    for top in range(0, h, STRIP):
        strip = total[top:top + STRIP]
        for weight, (dx, dy) in zip(weights, moves):
            if abs(dx) >= w or abs(dy) >= h:
                break  # without the rest of the weights: a tiny image darkens, as theirs does
            row, column = top + length - dy, (length - dx) * channels
            strip += weight * padded[row:row + len(strip), column:column + w * channels]
    return total.reshape(image.shape)


def zoom_blur(image, rng, end, step):
    """The mean of the image and its enlargements by 1, 1 + step, ... In float32 after each."""
    h, w = image.shape[:2]
    x = (image / 255).astype(np.float32).reshape(h, w * 3)
    wide, total = x.astype(float), np.zeros_like(x)
    plans = [(*linear_taps(h, factor, 1), *linear_taps(w, factor, 3))
             for factor in np.arange(1, end, step)]  # rounding decides whether the end is among them
    for top in range(0, h, STRIP):
        part = slice(top, top + STRIP)
        for row, a, b, column, c, d in plans:
            rows = wide[row[part]] * a[part, None] + wide[row[part] + 1] * b[part, None]
            total[part] += (rows[:, column] * c + rows[:, column + 3] * d).astype(np.float32)
    return ((x + total) / (len(plans) + 1)).reshape(image.shape) * 255


def linear_taps(side: int, factor: float, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scipy.ndimage.zoom(order=1) of the middle of one axis, cut to `side`: for every value its source, its
    weight, and the weight of the next pixel. A position that rounding puts outside weighs nothing there."""
    number = math.ceil(side / factor)  # of pixels that become the whole side
    position = np.arange(side) * ((number - 1) / (round(number * factor) - 1))
    pixel = np.minimum(position.astype(int), number - 2)
    inside, part = position <= number - 1, position - pixel
    source = (pixel + (side - number) // 2)[:, None] * channels + np.arange(channels)
    return source.ravel(), ((1 - part) * inside).repeat(channels), (part * inside).repeat(channels)


# ---------------------------------------------------------------------------------------------- the weather

def snow(image, rng, mean, deviation, zoom, threshold, radius, motion_deviation, mix):
    h, w = image.shape[:2]
    rows, columns = math.ceil(h / zoom), math.ceil(w / zoom)  # in the middle, which are enlarged
    top, left = (h - rows) // 2, (w - columns) // 2
    flakes = rng.normal(mean, deviation, (h, w))[top:top + rows, left:left + columns]
    flakes = ndimage.zoom(flakes, zoom, order=1)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = motion_blur(flakes, rng, radius, motion_deviation, -135)[:h, :w, None]
    flakes = np.round(flakes * 255) / 255
    x, grey = image.astype(np.float32) / 255, 0
    for channel, weight in enumerate(np.float32((0.299, 0.587, 0.114))):  # rounded once a step: OpenCV's FMA
        grey = (x[..., channel, None] * np.float64(weight) + grey).astype(np.float32)
    x = mix * x + (1 - mix) * np.maximum(x, grey * 1.5 + 0.5)
    return (x + flakes + flakes[::-1, ::-1]) * 255


def frost(image, rng, a, b, frost_dir=None):
    size = image.shape[:2]
    ice = frost_texture(*size, rng) if frost_dir is None else frost_photo(*size, rng, Path(frost_dir))
    return a * image + b * ice


def frost_texture(h: int, w: int, rng: np.random.RandomState) -> np.ndarray:
    """Feathers of ice on a cloudy pane, (h, w, 3) levels. The five photographs' mean greys are 120 to 205,
    with deviations of 18 to 43, mostly bluish; so are these, and, like them, larger for larger images."""
    def clouds(cell):  # smooth noise
        noise = rng.normal(size=(int(h / cell / scale) + 2, int(w / cell / scale) + 2)).astype(np.float32)
        return np.asarray(Image.fromarray(noise).resize((w, h)))
    scale, pane = 1.1 * max(1, h / 400, w / 600), Image.new("L", (w, h))
    kinds, growth = [feather(rng) for _ in range(6)], clouds(120)
    for x, y, angle in rng.uniform(0, (w, h, 360), (8 + int(h * w / scale ** 2 / 700), 3)):
        length = int(scale * rng.uniform(25, 80) * math.exp(0.25 * growth[int(y), int(x)]))
        leaf = kinds[rng.randint(6)].resize((length, length * 3 // 5))
        leaf = leaf.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        left, top = int(x) - leaf.width // 2, int(y) - leaf.height // 2
        box = (left, top, left + leaf.width, top + leaf.height)
        pane.paste(ImageChops.lighter(pane.crop(box), leaf), box)
    ice = np.asarray(pane) / 50 + 0.7 * growth + 0.4 * clouds(30) + 0.4 * clouds(1.5)
    grey = rng.uniform(120, 205) + rng.uniform(18, 43) * (ice - ice.mean()) / ice.std()
    return (grey[..., None] + (-14, 2, 14)).clip(0, 255)


def feather(rng: np.random.RandomState) -> Image.Image:
    """A spine with slanting barbs, from the left to its point at the right."""
    along, across = np.linspace(0, 1, 90), np.abs(np.linspace(-0.3, 0.3, 54))[:, None]
    outline = np.maximum(0.28 * (1 - along) * np.minimum(along / 0.2, 1), 1e-6)
    barbs = np.cos(np.pi * rng.uniform(8, 16) * (along - rng.uniform(0.7, 1.6) * across)) ** 2
    blade = (1 - across / outline).clip(0, 1) ** 0.5 * (0.3 + 0.7 * barbs)
    spine = np.exp(-(across / 0.012) ** 2) * (along > 0.02)
    return Image.fromarray((255 * rng.uniform(0.5, 1) * (blade + 0.5 * spine).clip(0, 1)).astype(np.uint8))


def frost_photo(h: int, w: int, rng: np.random.RandomState, folder: Path) -> np.ndarray:
    """A random part of a random photograph, enlarged to 1.1 times what covers the image, (h, w, 3)."""
    if missing := [name for name in FROST_FILES if not (folder / name).is_file()]:
        raise InputError(f"frost folder {folder} lacks {', '.join(missing)}: copy these of imagecorruptions")
    photo = np.asarray(read_image(folder / FROST_FILES[rng.randint(5)]))
    scale = 1.1 * max(1, h / photo.shape[0], w / photo.shape[1])
    height, width = (math.ceil(n * scale) for n in photo.shape[:2])
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    rows = cubic(photo, height, top, h).swapaxes(0, 1)  # (photo's width, h, 3)
    return np.rint(cubic(rows, width, left, w).swapaxes(0, 1)).clip(0, 255)


def cubic(layer: np.ndarray, size: int, first: int, number: int) -> np.ndarray:
    """`number` rows from `first` on of (N, W, 3) resized to (size, W, 3) by cubic convolution as OpenCV has
    it: a = -0.75, no antialiasing, borders repeated."""
    position, a = (first + np.arange(number) + 0.5) * len(layer) / size - 0.5, -0.75
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
    """The diamond-square algorithm on a torus: (size, size) float32 from 0 to 1, size a power of two."""
    def rough(total):
        return total / 4 + rise * rng.uniform(-rise, rise, total.shape)
    field, step, rise = np.zeros((size, size), dtype=np.float32), size, 100
    while step >= 2:
        half = step // 2
        corners, centres = field[::step, ::step], field[half::step, half::step]  # views; no centres as yet
        below, right = (corners + np.roll(corners, -1, axis) for axis in (0, 1))
        centres[:] = rough(below + np.roll(below, -1, 1))
        field[::step, half::step] = rough(centres + np.roll(centres, 1, 0) + right)
        field[half::step, ::step] = rough(centres + np.roll(centres, 1, 1) + below)
        step, rise = half, rise / decay
    field -= field.min()
    return field / field.max()


def brightness(image, rng, added):
    """RGB -> HSV, more V, -> RGB."""
    r, g, b = image.transpose(2, 0, 1) / 255
    v = np.maximum(np.maximum(r, g), b)
    delta = v - np.minimum(np.minimum(r, g), b)
    safe = np.where(delta == 0, 1, delta)
    hue = np.where(g == v, 2 + (b - r) / safe, (g - b) / safe)
    hue = np.where(b == v, 4 + (r - g) / safe, hue) / 6 % 1 * 6  # 0 to 6
    saturation = delta / np.where(v == 0, 1, v)  # without any, the hue does not matter
    sextant = hue.astype(np.uint8)
    part = hue - sextant
    v = np.minimum(v + added, 1)
    middle = v * (1 - np.where(sextant % 2 == 0, 1 - part, part) * saturation)
    levels = (np.stack([v, middle, v * (1 - saturation)]) * 255).astype(np.uint8)
    places = np.array(((0, 1, 2, 2, 1, 0), (1, 0, 0, 1, 2, 2), (2, 2, 1, 0, 0, 1)))  # R, G, B x sextant
    return np.stack([np.choose(place[sextant % 6], levels) for place in places], -1)


# -------------------------------------------------------------------------------------------------- digital

def contrast(image, rng, factor):
    mean = (image / 255).mean((0, 1))
    levels = ((np.arange(256)[:, None] / 255 - mean) * factor + mean) * 255  # (256, 3)
    return np.stack([levels[:, c].take(image[..., c]) for c in range(3)], -1)


def elastic_transform(image, rng, strength):
    def shifts():  # of x by the height, too
        noise = rng.uniform(-0.005 * h, 0.005 * h, (h, w))
        smooth = ndimage.gaussian_filter(noise, (0.01 * h, 0.01 * w), truncate=3)
        return (smooth * strength).astype(np.float32)
    h, w = image.shape[:2]
    dx, dy = shifts(), shifts()
    at, x = (np.arange(h)[:, None] + dy, np.arange(w) + dx), image.astype(np.float32) / 255
    planes = [ndimage.map_coordinates(x[..., c], at, order=1, mode="reflect") for c in range(3)]
    return np.stack(planes, -1) * 255


def pixelate(image, rng, factor):
    h, w = image.shape[:2]
    small = Image.fromarray(image).resize((int(w * factor), int(h * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.NEAREST))


def jpeg_compression(image, rng, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# ---------------------------------------------------------------------------------------------- all of them

CORRUPTIONS = {  # in the order of Table 4: the function, its parameters at severities 1 to 5
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
    """One corruption of one image -> (H, W, 3) uint8, truncated, not rounded, as the benchmark's authors do.

    Args:
        image: (H, W, 3) uint8, RGB; grey, (H, W) or (H, W, 1), is stacked to three channels. H, W >= 32.
        name, severity: one of NAMES, 1 to 5. frost_dir: a folder with FROST_FILES.
        rng: RandomState(s) gives theirs after np.random.seed(s), but for frost and, in flat areas, a level
            of defocus blur; default_rng(s) their impulse noise. Glass blur and frost need a RandomState.
    Raises InputError if the image, the name, the severity or the folder is not that.
    """
    image = np.asarray(image)
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise InputError(f"an image of shape {image.shape} and type {image.dtype} cannot be corrupted: give "
                         "(height, width, 3) or (height, width), of 32 pixels or more, in uint8")
    if name not in NAMES or severity not in (1, 2, 3, 4, 5):
        raise InputError(f"there is no corruption {name!r} of severity {severity!r}: choose one of "
                         f"{', '.join(NAMES)} and 1 to 5")
    function, *parameters = CORRUPTIONS[name]
    options = {"frost_dir": frost_dir} if name == "frost" else {}
    return function(image, rng, *parameters[int(severity) - 1], **options).clip(0, 255).astype(np.uint8)


def corrupt_seeded(picture: Image.Image, image_id: int, name: str, severity: int, seed: int = 0,
                   frost_dir: str | Path | None = None) -> Image.Image:
    """`corrupt` of a picture, by a generator seeded with the bytes of "seed id name severity" alone: in
    whatever order and by however many workers images are read, each has the same pixels."""
    rng = np.random.RandomState(list(f"{seed} {image_id} {name} {severity}".encode()))
    return Image.fromarray(corrupt(np.asarray(picture.convert("RGB")), name, severity, rng, frost_dir))


# --------------------------------------------------------------------------------------------- command line

def benchmark(path: Path | None) -> None:
    """Per corruption the median time over the severities, that of imagecorruptions, and, where the npz file
    at `path` has images (input, fog_1, ...), the worst difference in levels and the share that differs."""
    theirs = (20, 50, 12, 17, 200, 40, 430, 40, 12, 17, 96, 12, 95, 2, 2)  # ms; glass blur without numba
    try:
        goldens = dict(np.load(path)) if path else {}
        goldens = {key: np.broadcast_to(x, goldens["input"].shape) for key, x in goldens.items()}
    except Exception as e:  # damaged files raise a dozen kinds of error
        raise InputError(f"{path} is no npz file of images of one size named input, fog_1, ...: "
                         f"{' '.join(str(e).split())}") from None
    image = np.asarray(shape_scene(np.random.default_rng(0), 640)[0])[:480]
    print(f"{'640 x 480':18} {'ms':>6} {'theirs':>7} {'worst':>7} {'differing':>10}")
    for i, name in enumerate(NAMES):
        times, errors = [], []
        seeded = np.random.default_rng if name == "impulse_noise" else np.random.RandomState
        for severity in range(1, 6):
            clock = time.perf_counter()
            corrupt(image, name, severity, seeded(0))
            times.append(1e3 * (time.perf_counter() - clock))
            if (golden := goldens.get(f"{name}_{severity}")) is not None:
                got = corrupt(goldens["input"], name, severity, seeded(100 * (i + 1) + severity))
                errors.append(np.abs(got.astype(int) - golden))
        error = f"{np.max(errors):7} {np.count_nonzero(errors) / np.size(errors):10.4%}" if errors else ""
        print(f"{name:18} {np.median(times):6.1f} {theirs[i]:7} {error}", flush=True)


def sheet(picture: Image.Image) -> Image.Image:
    """All corruptions of a picture at severities 1, 3 and 5, three of them in a row."""
    cells = []
    for name in NAMES:
        for severity in (1, 3, 5):
            cells.append(corrupt_seeded(picture, 0, name, severity))
            ImageDraw.Draw(cells[-1]).text((4, 2), f"{name} {severity}", font_size=18, stroke_width=2,
                                           stroke_fill="black")
    return grid(cells, columns=9, cell=max(picture.size) + 8)


def main() -> None:
    parser = argparse.ArgumentParser(description="The 15 corruptions of COCO-C.", usage=argparse.SUPPRESS)
    parser.add_argument("--benchmark", action="store_true", help="time each of them")
    parser.add_argument("--goldens", type=Path, help="npz of images that --benchmark compares with")
    parser.add_argument("--picture", nargs="+", type=Path, metavar=("OUT.png", "IMAGE"),
                        help="draw a sheet of all of them, of an image or of generated shapes")
    args = parser.parse_args()
    if not (args.benchmark or args.picture) or len(args.picture or ()) > 2:
        parser.error("give --benchmark [--goldens FILE.npz] or --picture OUT.png [IMAGE]")
    if args.benchmark:
        benchmark(args.goldens)
    if args.picture:
        out, *source = args.picture
        picture = read_image(*source) if source else shape_scene(np.random.default_rng(3), 280, 4)[0]
        picture.thumbnail((280, 280))
        try:
            sheet(picture).save(out, "PNG")
        except OSError as e:
            raise InputError(f"cannot write {out} ({e.strerror}): give another name") from None


if __name__ == "__main__":
    engine.run_script(main)
