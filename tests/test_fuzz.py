"""200 malformed annotation files and 200 malformed pictures, made by a seeded fuzzer: each is refused in one
line that names it, or is whole and usable. Nothing crashes, hangs, warns or is half read."""
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_commands import run

from data import coco_format, detection_set, image_folder
from images import read_image, to_tensor
from inference import coco_metrics
from model import InputError

PIXELS = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
PICTURE = Image.fromarray(PIXELS)  # 64 x 48
TEXT = json.dumps({
    "images": [dict(id=i, file_name=f, width=64, height=48) for i, f in ((7, "a.png"), (9, "b.png"))],
    "categories": [{"id": 90, "name": "kite"}, {"id": 3, "name": "car"}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 30, 40], "area": 9},
                    {"id": 2, "image_id": 9, "category_id": 3, "bbox": [9, 9, 20, 9], "iscrowd": 0}]})


def outcome(use, *args) -> str | None:
    """The message with which `use` refuses its input, or None; any other exception comes through."""
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
    """`outcome` in another process, in which warnings are filtered for a user and not by pytest."""
    def checked(use, path, *args):
        message = pool.submit(outcome, use, path, *args).result()
        assert message is None or str(path) in message and message.isprintable() and len(message) < 2500
        return message
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield checked


@pytest.fixture
def folder(tmp_path):  # a small set in COCO format, with nothing wrong
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / "folder").mkdir(parents=True)
        for name in ("a.png", "b.png", "../a.png"):
            PICTURE.save(tmp_path / split / name)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(TEXT)
    return tmp_path


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    bits[rng.integers(bits.size, size=rng.integers(1, 9))] ^= 1  # up to eight
    return np.packbits(bits).tobytes()


NAMES = ["", ".", "folder", "pipe", "gone.png", "../a.png", "folder/../../a.png", "/etc/passwd", "a\0.png",
         "a\n.png", "\ud800.png", "x" * 300, "x" * 5000, "a.png/", "./a.png", "folder/../b.png"]
ODD = ["1e400", "-1e400", "NaN", "-Infinity", "1e308", "5e-324", "1.5", "-1", "0", "2", "true", "null",
       str(2 ** 63 + 1), "{}", "1" + "0" * 30, "1" + "0" * 5000, '"7"', '"a\\nb"', '"\\u0000"', '"\\ud800"',
       '""', "[]", "[1,2,NaN,4]", "[1,2,1e400,4]", "[-9,-9,1e8,1e8]", "[1,2,-3,4]", '{"a":[null]}',
       '"' + "x" * 100_000 + '"', "[" * 600 + "]" * 600, "[" * 100_000 + "]" * 100_000]


def malformed_annotations(rng: np.random.Generator, number: int) -> bytes:
    data, (turn, kind) = TEXT.encode(), divmod(number, 10)
    odd, u = ODD[turn % 30 if kind in (0, 4) else rng.integers(30)], "_" * (turn % 2)
    place = (r"(?<=\[)\d+|(?<=, )\d+", r'(?<=: )["\w.]+', r"\[[\d, ]*\]|9(?=})")[kind % 3]  # 0: in a box
    part = rng.choice(list(re.finditer(place, TEXT)))
    key, entry = rng.choice(re.findall(r'"\w*":', TEXT)), rng.choice(re.findall(r"{[^{}]*}", TEXT))
    texts = [*[TEXT[:part.start()] + odd + TEXT[part.end():]] * 3, TEXT.replace(key, '"x":', 1),
             TEXT.replace(f'{u}id": 7', f'{u}id": {odd}'), TEXT.replace('"id"', f'"more": {odd}, "id"'),
             TEXT.replace(entry, f"{entry}, {entry}"), TEXT.replace('"a.png"', json.dumps(NAMES[turn % 16]))]
    files = [b"\xef\xbb\xbf" + data, b"", b"null", TEXT.encode("utf-16"), 2 * data, b"[" * 100_000,
             data.replace(b"ki", b"\xff"), data.replace(b"ki", b"\\ud800"), data.replace(b"}", b',"id":3}')]
    last = data[:rng.integers(len(data))] if turn % 2 else files[turn // 2 % len(files)]
    return [*(t.encode() for t in texts), flipped(rng, data), last][kind]


def use_set(root: Path) -> None:
    """All that the programs do with a set: check, augment, hand to a process, evaluate."""
    dataset = detection_set(str(root), "val", image_size=40, augment="paper")
    dataset.check_images()
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
    os.mkfifo(folder / "val" / "pipe")  # who opens it waits for ever
    messages = [child(use_set, folder)]
    for number in range(200):
        data = malformed_annotations(np.random.default_rng(number), number)
        (folder / "annotations" / "instances_val.json").write_bytes(data)
        messages.append(child(use_set, folder))
    assert messages[0] is None and 20 < messages.count(None) < 100  # both ends are reached


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "folder/../../a.png", "..", "."])
def test_file_names_stay_in_the_image_folder_but_links_may_lead_out(folder, name, monkeypatch):
    file, link = folder / "annotations" / "instances_val.json", folder / "val" / "a.png"
    link.unlink()
    link.symlink_to(folder / "a.png")
    detection_set(str(folder), "val").check_images()
    file.write_text(TEXT.replace("b.png", name))
    monkeypatch.chdir(folder / "val")
    for images in (folder / "val", Path(".")):
        with pytest.raises(InputError, match="leaves"):
            coco_format(images, file, name="x")


def encode(kind: str, image: Image.Image = PICTURE, **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def hostile() -> dict[bytes, str]:
    """Pictures with what is said of them: bombs, a program, half a file that can be decoded."""
    chunk = lambda k, data: struct.pack(">I", len(data)) + k + data + struct.pack(">I", zlib.crc32(k + data))
    png, half = encode("PNG"), encode("JPEG2000")
    return {png[:8] + chunk(b"IHDR", struct.pack(">2I", 10 ** 5, 10 ** 5) + png[24:29]) + png[33:]: "bomb",
            encode("PNG", Image.new("1", (9500, 9500))): "bomb",
            png[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000))) + png[33:]: "too large",
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
              encode("JPEG", PICTURE.convert("CMYK"), progressive=True), encode("PNG", PICTURE.quantize(9)),
              encode("GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
              encode("PNG", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256)),
              encode("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02"), encode("TIFF", compression="tiff_lzw")]
    others = [*bad, b"", b"text", bytes(999), encode("PNG", PICTURE.resize((1, 1))), None]
    whole, messages = tmp_path / "whole", []
    for number in range(200):
        rng, (turn, which) = np.random.default_rng(number), divmod(number, len(entire))
        whole.write_bytes(data := entire[which])
        data = [data[:rng.integers(len(data))], flipped(rng, data), others[which % len(others)]][turn % 3]
        path = tmp_path / f"{number}.{rng.choice(['jpg', 'png', 'gif', 'tif', 'txt'])}"
        path.mkdir() if data is None else path.write_bytes(data)
        messages.append(child(use_picture, path, None if turn % 3 else whole))
    assert 20 < messages.count(None) < 100


def test_a_truncated_picture_is_never_trained_on(folder):
    (folder / "val" / "b.png").write_bytes(encode("JPEG")[:-200])
    objects, classes = detection_set(str(folder), "val"), image_folder(folder, name="x", transform=None)
    for read in (objects.check_images, lambda: objects[1], lambda: classes[len(classes) - 1]):
        with pytest.raises(InputError, match="val/b.png.*truncated"):
            read()


@pytest.mark.parametrize("file", ["annotations/instances_train.json", "train/b.png"])
def test_the_program_ends_with_one_line(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-200])
    before = sorted(folder.rglob("*"))
    done = run(folder, "finetune.py", "--data", folder, code=2)
    assert re.fullmatch(f"error: .*{file}.*", done.stderr.splitlines()[-1]), done.stderr
    assert done.stderr.count("error") == 1 and sorted(folder.rglob("*")) == before
