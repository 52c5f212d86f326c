"""python corruptions.py: its benchmark, its picture, and what it says to bad arguments."""
import sys

import numpy as np
import pytest
from PIL import Image

import corruptions
import engine
from corruptions import NAMES, corrupt_seeded
from test_corruptions import SEVERITIES, Seeded, picture


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["corruptions.py", *map(str, arguments)])
    engine.run_script(corruptions.main)


def test_benchmark_counts_differences(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corruptions, "NAMES", ("gaussian_noise", "contrast"))
    image = picture(40, 50)
    noisy = {}
    for severity, deviation in zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38)):
        x = image / 255 + Seeded(100 + severity).normal(0, deviation, image.shape)
        noisy[f"gaussian_noise_{severity}"] = (255 * x.clip(0, 1)).astype(np.uint8)
    noisy["gaussian_noise_2"][20, 10, 1] ^= 2  # the only difference, of 2 levels
    np.savez(tmp_path / "goldens.npz", input=image, **noisy)
    run(monkeypatch, "--benchmark", "--goldens", tmp_path / "goldens.npz")
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["640", "x", "480", "ms", "theirs", "worst", "differing"]
    name, ours, theirs, worst, share = first.split()
    assert (name, theirs, worst) == ("gaussian_noise", "20", "2") and float(ours) > 0
    assert float(share.rstrip("%")) == pytest.approx(100 / (5 * 40 * 50 * 3), abs=1e-4)
    assert second.split()[0] == "contrast" and len(second.split()) == 3


def test_picture_of_all_corruptions(tmp_path, monkeypatch):
    Image.fromarray(picture(60, 64)).save(tmp_path / "in.png")
    run(monkeypatch, "--picture", tmp_path / "out.png", tmp_path / "in.png")
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape == (5 * 68, 9 * 72, 3)  # three corruptions in a row at three severities
    for row, column, name, severity in ((0, 1, NAMES[0], 3), (2, 3, "snow", 1), (4, 8, NAMES[-1], 5)):
        expected = np.asarray(corrupt_seeded(Image.fromarray(picture(60, 64)), 0, name, severity))
        cell = sheet[row * 68 + 4:row * 68 + 64, column * 72 + 4:column * 72 + 68]
        assert np.array_equal(cell[40:], expected[40:])  # below its title


@pytest.mark.parametrize("arguments, says", [
    ([], "--picture"), (["--goldens", "a.npz"], "--benchmark"), (["--picture", "a", "b", "c"], "IMAGE"),
    (["--rain"], "unrecognized"), (["--benchmark", "--goldens", "missing.npz"], "missing.npz"),
    (["--benchmark", "--goldens", "in.png"], "in.png"), (["--picture", "no/o.png", "in.png"], "no/o.png"),
    (["--picture", "out.png", "no.png"], "no.png"), (["--picture", "out.png", "narrow.png"], "32 pixels")])
def test_bad_arguments_end_in_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(40, 64)).save("in.png")
    Image.new("RGB", (900, 40)).save("narrow.png")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and says in error and error.count("\n") == 1
