"""Each corruption against images of the authors' package and against its definition; the command."""
import colorsys
import math

import numpy as np
import pytest
from conftest import call, refused
from PIL import Image
from scipy import ndimage

from engine import InputError
from extras import corruptions
from extras.corruptions import CORRUPTIONS, FROST_FILES, NAMES, corrupt, corrupt_seeded

Seeded = np.random.RandomState
SEVERITIES = range(1, 6)


def parameters(name, severity):
    return CORRUPTIONS[name][severity]


def picture(h=33, w=47, seed=0):
    """Smooth colours with noise, a white and a black patch and sharp edges."""
    rng = np.random.default_rng(seed)
    image = ndimage.zoom(rng.uniform(0, 255, (4, 5, 3)), (h / 4, w / 5, 1), order=1)[:h, :w]
    image = np.pad(image, ((0, h - image.shape[0]), (0, w - image.shape[1]), (0, 0)), "edge")
    image += rng.normal(0, 12, image.shape)
    image[2:9, 3:14], image[12:20, 20:30] = 255, 0
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "frost"])
def test_images_of_the_authors_package(name, shared):
    """The references were made with the seed 100 (i + 1) + severity for the i-th corruption."""
    goldens = np.load(shared("goldens/corruptions.npz"))
    for severity in SEVERITIES:
        seed = 100 * (NAMES.index(name) + 1) + severity
        rng = np.random.default_rng(seed) if name == "impulse_noise" else Seeded(seed)
        got = corrupt(goldens["input"], name, severity, rng)
        error = np.abs(got.astype(int) - goldens[f"{name}_{severity}"])
        if name == "defocus_blur":  # where a sum is a whole level, rounding decides how it is truncated
            assert error.max() <= 1 and (error > 0).mean() < 1e-3
        else:
            assert error.max() == 0, severity


# ---------------------------------------------------------------------------------- against definitions

@pytest.mark.parametrize("severity, photons", list(zip(SEVERITIES, (60, 25, 12, 5, 3))))
def test_shot_noise_has_the_variance_of_so_many_photons(severity, photons):
    """At brightness b in [0, 1]: mean b, variance b / photons (numbers: Hendrycks, Dietterich 2019)."""
    grey = np.full((400, 400, 3), 102, np.uint8)
    noisy = corruptions.shot_noise(grey, Seeded(0), *parameters("shot_noise", severity)) / 255
    assert noisy.mean() == pytest.approx(0.4, rel=0.01)
    assert noisy.var() == pytest.approx(0.4 / photons, rel=0.015)  # 5 standard errors: 0.0110


@pytest.mark.parametrize("severity, factor", list(zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05))))
def test_contrast_shrinks_each_channel_towards_its_own_mean(severity, factor):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = 100, 200, 40  # means 50, 100, 20
    got = corrupt(image, "contrast", severity, Seeded(0))
    for c, mean in enumerate((50, 100, 20)):
        levels = got[0, 0, c].astype(int), got[-1, 0, c].astype(int)
        assert levels == pytest.approx((mean + factor * mean, mean - factor * mean), abs=1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_swaps_one_way_pixel_after_pixel(severity):
    image, (deviation, reach, rounds) = picture(), parameters("glass_blur", severity)
    h, w = image.shape[:2]

    def blur(x):
        planes = [ndimage.gaussian_filter(x[..., c] / 255, deviation, mode="nearest") for c in range(3)]
        return (np.stack(planes, -1).clip(0, 1) * 255).astype(np.uint8)
    x, rng = blur(image), Seeded(severity)
    for _ in range(rounds):
        for i in range(h - reach, reach, -1):
            for j in range(w - reach, reach, -1):
                dx, dy = rng.randint(-reach, reach, size=2)
                x[i, j] = x[i + dy, j + dx]
    assert np.array_equal(corrupt(image, "glass_blur", severity, Seeded(severity)), blur(x))


@pytest.mark.parametrize("h, w, severity", [(33, 47, 1), (47, 33, 3), (37, 33, 5)])
def test_motion_blur_adds_moved_copies(h, w, severity):
    """In the last case the copies leave the image; there the sum ends."""
    image, (radius, deviation) = picture(h, w), parameters("motion_blur", severity)
    angle = math.radians(Seeded(0).uniform(-45, 45))
    weights = [math.exp(-i * i / (2 * deviation ** 2)) for i in range(2 * radius + 1)]
    expected = np.zeros(image.shape)
    for i, weight in enumerate(weights):
        dx, dy = -math.ceil(i * math.cos(angle) - 0.5), -math.ceil(i * math.sin(angle) - 0.5)
        if abs(dx) >= w or abs(dy) >= h:
            break
        for y in range(h):
            for x in range(w):
                at = min(max(y - dy, 0), h - 1), min(max(x - dx, 0), w - 1)
                expected[y, x] += weight / sum(weights) * image[at]
    assert (i < 2 * radius) == (severity == 5)
    assert np.abs(corruptions.motion_blur(image, Seeded(0), radius, deviation) - expected).max() < 1e-9


@pytest.mark.parametrize("severity, layers", list(zip(SEVERITIES, (12, 16, 11, 13, 11))))
def test_zoom_blur_is_scipys_zoom(severity, layers):
    for h, w in ((32, 32), (33, 47), (64, 101)):
        image = picture(h, w)
        x = (image / 255).astype(np.float32)
        total, factors = np.zeros_like(x), np.arange(1, *parameters("zoom_blur", severity))
        assert len(factors) == layers
        for factor in factors:
            sizes = [math.ceil(side / factor) for side in (h, w)]
            top, left = (h - sizes[0]) // 2, (w - sizes[1]) // 2
            middle = x[top:top + sizes[0], left:left + sizes[1]]
            total += ndimage.zoom(middle, (factor, factor, 1), order=1)[:h, :w]
        expected = (((x + total) / (layers + 1)).clip(0, 1) * 255).astype(np.uint8)
        assert np.array_equal(corrupt(image, "zoom_blur", severity, None), expected)


@pytest.mark.parametrize("severity", [1, 4])
def test_fog_is_diamond_square_noise(severity):
    image, (density, decay) = picture(), parameters("fog", severity)
    rng, size, step, rise = Seeded(3), 64, 64, 100
    field = np.zeros((size, size))

    def fill(ys, xs, neighbours):
        noise = rise * rng.uniform(-rise, rise, (len(ys), len(xs)))
        for a, y in enumerate(ys):
            for b, x in enumerate(xs):
                around = [field[(y + dy) % size, (x + dx) % size] for dy, dx in neighbours]
                field[y, x] = sum(around) / 4 + noise[a, b]
    while step >= 2:
        half = step // 2
        whole, between = range(0, size, step), range(half, size, step)
        cross = [(-half, 0), (half, 0), (0, -half), (0, half)]
        fill(between, between, [(s * half, t * half) for s in (-1, 1) for t in (-1, 1)])
        fill(whole, between, cross)
        fill(between, whole, cross)
        step, rise = half, rise / decay
    field = (field - field.min()) / np.ptp(field)
    peak = image.max() / 255
    expected = (image + 255 * density * field[:33, :47, None]) * peak / (peak + density)
    assert np.abs(corruptions.fog(image, Seeded(3), density, decay) - expected).max() < 1e-3


@pytest.mark.parametrize("severity, mass", list(zip(SEVERITIES, (1, 1, 1, 1.0130, 1.0108))))
def test_defocus_blur_of_a_point_is_a_disk_of_known_mass(severity, mass):
    image = np.zeros((48, 51, 3), np.uint8)
    image[24, 25] = 200
    radius, deviation = parameters("defocus_blur", severity)
    got = corruptions.defocus_blur(image, None, radius, deviation)[..., 1] / 200
    assert got.sum() == pytest.approx(mass, abs=5e-5)
    y, x = np.nonzero(got > 1e-6)
    assert radius <= np.abs(y - 24).max() <= radius + 2 and np.abs(x - 25).max() == np.abs(y - 24).max()
    assert got[24, 25] * math.pi * radius ** 2 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_raises_v_of_hsv(severity):
    image, (added,) = picture(), parameters("brightness", severity)
    image[:8] = np.arange(8 * 47).reshape(8, 47, 1) % 256  # greys, which have no hue
    expected = np.zeros(image.shape)
    for y, x in np.ndindex(image.shape[:2]):
        hue, saturation, v = colorsys.rgb_to_hsv(*image[y, x] / 255)
        expected[y, x] = colorsys.hsv_to_rgb(hue, saturation, min(v + added, 1))
    error = 255 * expected - corrupt(image, "brightness", severity, None)
    assert error.min() > -1e-9 and error.max() < 1 + 1e-9  # truncated, not rounded
    assert 0.3 < error[8:].mean() < 0.7


def test_impulse_noise_hits_values_not_pixels():
    image = np.full((200, 300, 3), 128, np.uint8)
    for rng in (np.random.default_rng(0), Seeded(0)):
        got = corrupt(image, "impulse_noise", 5, rng)
        shares = [np.mean(got == v) for v in (0, 128, 255)]
        assert shares == pytest.approx([0.135, 0.73, 0.135], abs=0.005)
        assert np.mean((got != 128).all(-1)) == pytest.approx(0.27 ** 3, abs=0.003)


# ------------------------------------------------------------------------------------------------ frost

BLACK = np.zeros((120, 161, 3), np.uint8)


def test_drawn_frost_differs_and_has_the_statistics_of_the_photographs():
    panes = [corruptions.frost_texture(120, 161, Seeded(s)) for s in range(12)]
    greys = [p @ (0.299, 0.587, 0.114) for p in panes]
    assert all(p.shape == (120, 161, 3) and 0 <= p.min() < p.max() <= 255 for p in panes)
    assert all(100 < g.mean() < 215 and 10 < g.std() < 45 for g in greys)
    assert max(g.mean() for g in greys) - min(g.mean() for g in greys) > 30
    assert all((np.diff(p.mean((0, 1))) > 0).all() for p in panes)  # red < green < blue
    between = [np.corrcoef(greys[0].ravel(), g.ravel())[0, 1] for g in greys[1:]]
    assert max(map(abs, between)) < 0.5
    # neither noise alone, which blurring would remove, nor clouds alone, which it would leave
    left = [ndimage.gaussian_filter(g, 4).std() / g.std() for g in greys]
    assert 0.6 < min(left) and max(left) < 0.95
    assert np.array_equal(panes[3], corruptions.frost_texture(120, 161, Seeded(3)))


@pytest.mark.parametrize("severity, a, b", [(1, 1, 0.4), (2, 0.8, 0.6), (3, 0.7, 0.7), (4, 0.65, 0.7),
                                            (5, 0.6, 0.75)])
def test_frost_is_a_weighted_sum(severity, a, b):
    pane = corruptions.frost_texture(120, 161, Seeded(5))
    for level in (0, 30, 255):
        expected = (a * level + b * pane).clip(0, 255)
        got = corrupt(np.full_like(BLACK, level), "frost", severity, Seeded(5))
        assert 0 <= (expected - got).min() and (expected - got).max() < 1


@pytest.fixture
def photos(tmp_path):
    """Pictures with the names of the photographs; some must be enlarged to cover 33 x 47 pixels."""
    for i, name in enumerate(FROST_FILES):
        size = ((60, 41), (20, 17), (30, 50), (90, 20), (49, 36))[i]
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image = image.convert("RGB") if name.endswith("jpg") else image  # PNGs keep an alpha channel
        image.save(tmp_path / name)
    return tmp_path


def cubic_weight(d, a=-0.75):
    d = abs(d)
    if d <= 1:
        return (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
    return a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a if d < 2 else 0


def test_frost_photographs_are_enlarged_and_cropped(photos):
    used = set()
    for seed in range(30):
        rng = Seeded(seed)
        name = FROST_FILES[rng.randint(5)]
        photo = np.asarray(Image.open(photos / name).convert("RGB")).astype(float)
        rows, columns = photo.shape[:2]
        scale = 1.1 * max(1, 33 / rows, 47 / columns)
        height, width = math.ceil(rows * scale), math.ceil(columns * scale)
        top, left = rng.randint(0, height - 33), rng.randint(0, width - 47)
        if name in used:
            continue
        used.add(name)
        expected = np.zeros((33, 47, 3))
        for y in range(33):
            for x in range(47):
                v, u = (top + y + 0.5) * rows / height - 0.5, (left + x + 0.5) * columns / width - 0.5
                for i in range(math.floor(v) - 1, math.floor(v) + 3):
                    for j in range(math.floor(u) - 1, math.floor(u) + 3):
                        pixel = photo[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
                        expected[y, x] += cubic_weight(v - i) * cubic_weight(u - j) * pixel
        expected = expected.round().clip(0, 255)
        assert np.array_equal(corruptions.frost_photo(33, 47, Seeded(seed), photos), expected)
        blended = (0.7 * picture() + 0.7 * expected).clip(0, 255)
        got = corrupt(picture(), "frost", 3, Seeded(seed), str(photos))
        assert 0 <= (blended - got).min() and (blended - got).max() < 1
    assert len(used) == 5


def test_frost_says_which_photographs_are_missing(photos):
    (photos / "frost2.png").unlink(), (photos / "frost5.jpg").unlink()
    with pytest.raises(InputError, match="lacks frost2.png, frost5.jpg: ") as caught:
        corrupt(BLACK, "frost", 1, Seeded(0), photos)
    assert "\n" not in str(caught.value)
    for name in ("frost2.png", "frost5.jpg"):
        (photos / name).write_bytes(b"no picture")
    (photos / "frost1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="frost[125]"):
        for seed in range(20):
            corrupt(BLACK, "frost", 1, Seeded(seed), photos)


# -------------------------------------------------------------------------------------- all corruptions

@pytest.mark.parametrize("name", NAMES)
def test_small_and_odd_sizes(name):
    for h, w in ((32, 32), (33, 47), (61, 32)):
        image = picture(h, w)
        before = image.copy()
        for severity in (1, 5):
            got = corrupt(image, name, severity, Seeded(0))
            assert got.shape == (h, w, 3) and got.dtype == np.uint8 and not np.array_equal(got, image)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("name", NAMES)
def test_grey_is_stacked_to_three_channels(name):
    grey = picture()[..., 0]
    expected = corrupt(np.stack([grey] * 3, -1), name, 3, Seeded(1))
    assert np.array_equal(corrupt(grey, name, 3, Seeded(1)), expected)
    assert np.array_equal(corrupt(grey[..., None], name, 3, Seeded(1)), expected)


@pytest.mark.parametrize("image, name, severity, says", [
    (picture(31, 40), "fog", 1, "32 pixels"), (picture(40, 31), "fog", 1, "32 pixels"),
    (picture() / 255, "fog", 1, "uint8"), (picture()[None], "fog", 1, "shape"),
    (np.zeros((40, 40, 4), np.uint8), "fog", 1, "shape"),
    (picture(), "rain", 1, "'rain'.*one of gaussian"), (picture(), "fog", 0, "severity 0"),
    (picture(), "fog", 6, "1 to 5"), (picture(), "fog", 2.5, "2.5")])
def test_what_cannot_be_corrupted(image, name, severity, says):
    with pytest.raises(InputError, match=says) as caught:
        corrupt(image, name, severity, Seeded(0))
    assert "\n" not in str(caught.value)


def test_seeded_pixels_depend_on_nothing_but_the_four_numbers():
    image = Image.fromarray(picture())
    asked = [(image_id, name, severity)
             for image_id in (-5, 0, 7, 2 ** 40) for name in NAMES for severity in (1, 4)]
    forwards = {key: np.asarray(corrupt_seeded(image, *key)) for key in asked}
    for key in reversed(asked):
        np.random.seed(key[2])
        assert np.array_equal(corrupt_seeded(image, *key), forwards[key]), key
    for name in set(NAMES) - {"defocus_blur", "zoom_blur", "brightness", "contrast", *NAMES[-2:]}:
        others = [forwards[7, name, 1], forwards[0, name, 1], forwards[-5, name, 1],
                  np.asarray(corrupt_seeded(image, 7, name, 1, seed=1))]
        assert len({o.tobytes() for o in others}) == 4, name
    with pytest.raises(InputError, match="hail"):
        corrupt_seeded(image, 0, "hail", 1)


def test_severity_and_corruption_change_the_draws():
    """Not the same noise, scaled."""
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = [np.asarray(corrupt_seeded(image, 1, "gaussian_noise", s), float).ravel() for s in (1, 2)]
    assert abs(np.corrcoef(noise)[0, 1]) < 0.05


# ------------------------------------------------------------------------------------------ the command

def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert corruptions.open_photo(tmp_path / "a.jpg").size == (40, 60)


def test_sheet_of_all_corruptions(tmp_path):
    Image.fromarray(picture(60, 64)).save(tmp_path / "in.png")
    call(tmp_path, "extras.corruptions", "out.png", "in.png")
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape == (5 * 68, 9 * 72, 3)  # three corruptions in a row at three severities
    for row, column, name, severity in ((0, 1, NAMES[0], 3), (2, 3, "snow", 1), (4, 8, NAMES[-1], 5)):
        expected = np.asarray(corrupt_seeded(Image.fromarray(picture(60, 64)), 0, name, severity))
        cell = sheet[row * 68 + 4:row * 68 + 64, column * 72 + 4:column * 72 + 68]
        assert np.array_equal(cell[40:], expected[40:])  # below its title


def test_sheet_of_generated_shapes(tmp_path):
    call(tmp_path, "extras.corruptions", "out.png")
    assert Image.open(tmp_path / "out.png").size == (9 * 288, 5 * 288)


@pytest.mark.parametrize("arguments, says", [
    (["no/out.png", "in.png"], "cannot write no/out.png"), (["out.png", "missing.png"], "missing.png"),
    (["out.png", "text.png"], "text.png"), (["out.png", "narrow.png"], "32 pixels")])
def test_bad_files_end_in_one_line(arguments, says, tmp_path):
    Image.fromarray(picture(40, 64)).save(tmp_path / "in.png")
    Image.new("RGB", (900, 40)).save(tmp_path / "narrow.png")
    (tmp_path / "text.png").write_text("no picture")
    refused(tmp_path, "extras.corruptions", *arguments, says=says)
