"""The four forks that the README names. They edit no file of the project."""
import runpy
import sys
from functools import partial

import pytest
import torch

from conftest import ROOT, call, refused
from data import detection_set
from extras.released import build_model
from forks.adaptor import MaxDetector
from forks.dataset import voc
from forks.refinement import RefiningDetector
from forks.tokenizer import convolutional
from model import VARIANTS, Classifier, Config

SHORT = ("--data shapes --limit-train 4 --limit-val 2 --epochs 1 --batch-size 2 "
         "--device cpu").split()


@pytest.fixture
def fork(monkeypatch):
    """fork(name, *arguments) runs `python tests/forks/NAME.py ARGUMENTS` in this process."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tests" / "forks" / f"{name}.py"), run_name="__main__")
    return run


@pytest.mark.parametrize("name, kind", [("adaptor", MaxDetector), ("refinement", RefiningDetector)])
def test_a_forks_detector_is_trained_evaluated_and_resumed(fork, name, kind, tmp_path, capfd):
    fork(name, *SHORT, "--out", tmp_path)
    read = []

    def read_data(data, split, **options):
        read.append((data, split))
        return detection_set(data, split, **options)
    call(tmp_path, "evaluate.py", "last.pt", "--limit-val", "2", detector=kind, read_data=read_data)
    assert "results and pictures" in capfd.readouterr().out and read == [("shapes", "val")]
    # Our own detector has weights of the same names and shapes as the one with refinement.
    refused(tmp_path, "evaluate.py", "last.pt", "--limit-val", "2", says=kind.__name__)
    refused(tmp_path, "finetune.py", *SHORT, "--out", ".", "--resume", says=kind.__name__)
    fork(name, *SHORT, "--out", tmp_path, "--resume", "--epochs", 2)
    assert "epoch 2" in "".join(capfd.readouterr())


def test_the_released_layout_of_a_fork_is_noted(capsys):
    model = build_model(partial(convolutional, Classifier), VARIANTS["tiny"], 2, "released")
    assert type(model.encoder.tokenizer).__name__ == "ReleasedTokenizer"
    assert "note: --layout released replaces" in capsys.readouterr().out
    assert build_model(MaxDetector, VARIANTS["tiny"], 2, "paper").made_by == "MaxDetector"
    assert capsys.readouterr().out == ""


def test_a_forks_tokenizer_passes_through_both_stages(fork, tmp_path, capfd):
    sizes = [x.shape[1:3] for x in convolutional(Classifier, VARIANTS["tiny"], 2).encoder.tokenizer(
        torch.zeros(1, 3, 128, 64))]
    assert sizes == [(16, 8), (8, 4), (4, 2), (2, 1)]
    first, second = tmp_path / "first", tmp_path / "second"
    fork("tokenizer", "pretrain", *SHORT, "--out", first)
    fork("tokenizer", "finetune", *SHORT, "--pretrained", first / "last.pt", "--out", second)
    assert "last.pt: encoder; starting fresh" in capfd.readouterr().out
    # A function makes the model, and its class is ours. So its name is kept.
    refused(second, "evaluate.py", "last.pt", says="holds a convolutional, not a Detector")
    refused(second, "finetune.py", *SHORT, "--out", ".", "--resume", says="convolutional")


@torch.no_grad()
def test_refinement_adds_up_over_the_layers():
    """If the box head always answers d, the boxes of layer t are sigmoid(logit(reference) + t d)."""
    model = RefiningDetector(Config(dim=16, mlp_dim=16, heads=2, tokenizer_dim=8, queries=3), 2).eval()
    model.box_head[-1].weight.zero_()
    d = torch.tensor([0.1, -0.2, 0.3, -0.4])
    model.box_head[-1].bias.copy_(d)
    centre = model.queries(1).references
    start = torch.cat([torch.log(centre / (1 - centre)), torch.zeros_like(centre)], -1)
    out = model(torch.randn(1, 3, 64, 64))
    for t, layer in enumerate([*out["aux_outputs"], out], 1):
        torch.testing.assert_close(layer["pred_boxes"], (start + t * d).sigmoid())


@pytest.mark.parametrize("name, flags, says", [
    ("dataset", ["--data", "nowhere"], "nowhere/ImageSets/Main/train.txt is missing"),
    ("tokenizer", [], "give pretrain or finetune first"),
    ("tokenizer", ["--help"], "give pretrain or finetune first")])
def test_bad_input_of_a_fork_is_one_line(fork, name, flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        fork(name, *flags)
    said = f"{stop.value.code}{capsys.readouterr().err}".splitlines()
    assert says in said[-1] and "Traceback" not in str(said)


def test_voc_gives_the_same_boxes_as_coco_format(fork, tmp_path):
    shapes = detection_set("shapes", "val", limit=3)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for record in shapes.records:
        record.source.save(tmp_path / f"JPEGImages/{record.id}.jpg")
        objects = [f"<object><name>{shapes.classes[label]}</name><bndbox><xmin>{x0 + 1}</xmin>"
                   f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
                   for (x0, y0, x1, y1), label in zip(record.boxes.round().astype(int), record.labels)]
        (tmp_path / f"Annotations/{record.id}.xml").write_text(
            f"<annotation><size><width>64</width><height>64</height></size>{''.join(objects)}</annotation>")
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("1\n2\n3\n")
    ours = voc(str(tmp_path), "val")
    for mine, theirs in zip(ours.records, shapes.records):
        assert (mine.boxes == theirs.boxes.round()).all()
        assert [ours.classes[i] for i in mine.labels] == [shapes.classes[i] for i in theirs.labels]
    fork("dataset", *SHORT, "--data", tmp_path, "--image-size", 64, "--out", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()
