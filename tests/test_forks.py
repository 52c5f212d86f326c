"""The four forks of the README, which edit no file of the project. Each trains, leaves a checkpoint that can
be resumed, and changes the part that it names."""
import runpy
import sys
from xml.etree import ElementTree

import pytest
import torch

import engine
import evaluate
import finetune
from conftest import ROOT
from data import detection_set
from forks.adaptor import MaxDetector
from forks.dataset import voc
from forks.refinement import RefiningDetector
from forks.tokenizer import convolutional
from model import VARIANTS, Classifier, Config

SHORT = ["--data", "shapes", "--limit-train", "4", "--limit-val", "2", "--epochs", "1", "--batch-size", "2",
         "--device", "cpu"]


@pytest.fixture
def fork(monkeypatch):
    """fork(name, arguments ...) does `python tests/forks/NAME.py arguments ...` in this process."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tests" / "forks" / f"{name}.py"), run_name="__main__")
    return run


def test_each_is_shorter_than_30_lines():
    for path in ROOT.glob("tests/forks/*.py"):
        assert len(path.read_text().splitlines()) < 30


@pytest.mark.parametrize("name, kind", [("adaptor", MaxDetector), ("refinement", RefiningDetector)])
def test_a_detector_of_ones_own_trains_and_is_loaded_again(fork, name, kind, tmp_path, capfd):
    fork(name, *SHORT, "--out", tmp_path)
    model, _ = evaluate.load_detector(tmp_path / "last.pt", kind)
    assert type(model) is kind
    fork(name, *SHORT, "--out", tmp_path, "--resume", "--epochs", 2)
    assert "epoch 2" in "".join(capfd.readouterr())


def test_a_tokenizer_of_ones_own_passes_through_both_stages(fork, tmp_path, capfd):
    sizes = [x.shape[1:3] for x in convolutional(Classifier, VARIANTS["tiny"], 2).encoder.tokenizer(
        torch.zeros(1, 3, 128, 64))]
    assert sizes == [(16, 8), (8, 4), (4, 2), (2, 1)]
    fork("tokenizer", "pretrain", *SHORT, "--out", tmp_path / "a")
    fork("tokenizer", "finetune", *SHORT, "--pretrained", tmp_path / "a/last.pt", "--out", tmp_path / "b")
    assert "last.pt: encoder; starting fresh" in capfd.readouterr().out


@torch.no_grad()
def test_refinement_adds_up_over_the_layers():
    """Where the box head answers d always, layer t has boxes sigmoid(logit(reference) + t d)."""
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
    ("tokenizer", [], "give pretrain or finetune first"), ("tokenizer", ["--help"], "give pretrain or")])
def test_bad_input_of_a_fork_is_one_line(fork, name, flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        fork(name, *flags)
    said = f"{stop.value.code}{capsys.readouterr().err}".splitlines()
    assert says in said[-1] and "Traceback" not in str(said)


def test_voc_is_read_as_the_same_pictures_in_coco_format(fork, tmp_path):
    shapes = detection_set("shapes", "val", limit=3)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for record in shapes.records:
        record.source.save(tmp_path / f"JPEGImages/{record.id}.jpg")
        tree = ElementTree.Element("annotation")
        size = ElementTree.SubElement(tree, "size")
        ElementTree.SubElement(size, "width").text, ElementTree.SubElement(size, "height").text = "64", "64"
        for box, label in zip(record.boxes.round(), record.labels):
            thing = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(thing, "name").text = shapes.classes[label]
            corners = ElementTree.SubElement(thing, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box + [1, 1, 0, 0]):
                ElementTree.SubElement(corners, key).text = str(int(value))
        ElementTree.ElementTree(tree).write(tmp_path / f"Annotations/{record.id}.xml")
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("1\n2\n3\n")
    ours = voc(str(tmp_path), "val")
    for mine, theirs in zip(ours.records, shapes.records):
        assert (mine.boxes == theirs.boxes.round()).all()
        assert [ours.classes[i] for i in mine.labels] == [shapes.classes[i] for i in theirs.labels]
    fork("dataset", *SHORT, "--data", tmp_path, "--image-size", 64, "--out", tmp_path / "run")
    assert (tmp_path / "run/metrics.json").exists()


def test_a_fork_evaluates_by_handing_its_detector_and_data_over(fork, tmp_path, capfd, monkeypatch):
    fork("refinement", *SHORT, "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "last.pt"), "--limit-val", "2"])
    read = []

    def read_data(data, split, **options):
        read.append((data, split))
        return detection_set(data, split, **options)
    engine.run_script(evaluate.main, detector=RefiningDetector, read_data=read_data)
    assert "results and pictures" in capfd.readouterr().out and read == [("shapes", "val")]


def test_a_forks_checkpoint_is_not_taken_for_ours(fork, tmp_path, capfd, monkeypatch):
    """The weights of RefiningDetector have the names and shapes of Detector's."""
    fork("refinement", *SHORT, "--out", tmp_path)
    for script, flags in ((evaluate, [str(tmp_path / "last.pt"), "--limit-val", "2"]),
                          (finetune, [*SHORT, "--out", str(tmp_path), "--resume"])):
        monkeypatch.setattr(sys, "argv", ["script", *flags])
        with pytest.raises(SystemExit) as stop:
            engine.run_script(script.main)
        assert stop.value.code == 2 and "RefiningDetector" in capfd.readouterr().err
