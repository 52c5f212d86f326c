"""The paper's tables: their own means check every digit, and rows of our runs are computed by hand."""
import json
import math
import os

import pytest

from engine import InputError
from extras.corruptions import NAMES
from extras.tables import (HEADERS, METRICS, PAPER, TABLE_2, TABLE_3, TABLE_4, TABLE_7, corruption_row,
                           markdown, mean_and_deviation, paper_table)


@pytest.mark.parametrize("method", TABLE_4)
def test_rows_of_table_4_have_the_mean_that_they_print(method):
    mean, *each = TABLE_4[method]
    known = [v for v in each if not math.isnan(v)]
    if len(known) == 15:
        assert mean == pytest.approx(sum(known) / 15, abs=0.1)  # of figures that are rounded too
    else:  # DETR: one figure cannot be read, and the mean tells its size
        assert 25 < 15 * mean - sum(known) < 40


def test_the_same_model_has_the_same_figures_in_every_table():
    lite = TABLE_2["FP-DETR-Lite"][1:7]
    assert lite == TABLE_3["self-attention"][1:7] == TABLE_7["FP-DETR-Lite"][2:8]
    assert HEADERS[4][1:] == NAMES  # the order of the paper's columns and of the corruptions
    for number, table in PAPER.items():
        assert all(len(row) == len(HEADERS[number]) for row in table.values())


def test_the_papers_figures_are_those_of_its_text(shared):
    """Of all rows but four, in which the text recognition of the PDF misread a figure."""
    text = " ".join(shared("paper.txt").read_text().translate(str.maketrans("∙oιi", ".011")).split())
    unread = []
    for number, table in PAPER.items():
        cut = {4: 8, 7: 1}.get(number)  # these rows are in two parts
        for name, row in table.items():
            figures = [v if isinstance(v, str) else f"{v:.1f}" for v in row if "." in str(v) or v != v]
            parts = " ".join(figures[:cut]), " ".join(figures[cut or 0:])
            unread += [name] * any(part not in text for part in parts)
    assert unread == ["none", "Bi-LSTM, per layer", "DETR", "FP-DETR-Lite"]


def test_markdown():
    text = markdown("Table", ("x", "y"), [("a", (1.25, -100)), ("bcd", (float("nan"), "1.0±0.5"))])
    assert text.splitlines() == ["| Table |   x |       y |", "| ----- | --: | ------: |",
                                 "| a     | 1.2 |    -100 |", "| bcd   |   - | 1.0±0.5 |"]
    # The metric gives -1 if there is nothing to measure.
    assert markdown("", ("AP",), [("a", (-100.0,))]).splitlines()[2] == "| a |  - |"


def test_means_by_hand():
    # The mean is 0.3, the squares of the differences are 0.04 + 0.01 + 0.01 + 0.04, over n - 1 = 3.
    assert mean_and_deviation([0.1, 0.2, 0.4, 0.5]) == "30.0±18.3"
    assert mean_and_deviation([0.25]) == "25.0" and mean_and_deviation([0.2, -1.0]) == "-"
    row = corruption_row({"corruptions": {"fog": {"1": {"AP": 0.4}, "5": {"AP": 0.2}},
                                          "snow": {"3": {"AP": 0.1}}}})
    assert row[0] == pytest.approx(20) and row[1 + NAMES.index("fog")] == pytest.approx(30)
    assert row[1 + NAMES.index("snow")] == pytest.approx(10) and math.isnan(row[1])
    # -1 means that there is no object. It is no figure, neither here nor in the mean.
    row = corruption_row({"corruptions": {"fog": {"1": {"AP": 0.4}}, "snow": {"3": {"AP": -1.0}}}})
    assert math.isnan(row[0]) and math.isnan(row[1 + NAMES.index("snow")])


# ------------------------------------------------------------------------------------------- our runs

RUN = {"stage": "finetune", "seed": 0, "epochs": 14, "step": 70, "data": "coco val", "images": 5000,
       "image_size": 800, "parameters": 1_160_000, "adaptor": "bilstm", "adaptor_per_layer": True,
       "pretrained": None, **{m: (i + 1) / 10 for i, m in enumerate(METRICS)}}
PRETRAINING = dict(stage="pretrain", data="imagenet val", images=50_000, image_size=224, top1=0.764)
CITY = dict(data="cityscapes val", images=500)
AP = ["10.0", "20.0", "30.0", "40.0", "50.0", "60.0"]
PASSES = {n: {s: {"AP": 0.25} for s in "12345"} for n in NAMES}


@pytest.fixture
def run(tmp_path):
    """run("name", evaluation, key=value, ...) -> the folder of a finished run with these figures.
    evaluation: the content of evaluation/metrics.json or, if it has "corruptions", corruptions.json."""
    def write(name, evaluation=None, **changes):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({**RUN, **changes}), encoding="utf-8")
        for checkpoint in ("last.pt", "best.pt"):
            (folder / checkpoint).touch()
            os.utime(folder / checkpoint, (1000, 1000))
        if evaluation:
            file = "corruptions.json" if "corruptions" in evaluation else "metrics.json"
            (folder / "evaluation" / file).write_text(json.dumps(evaluation), encoding="utf-8")
        return folder
    return write


def evaluation(**changes):
    """evaluation/metrics.json of last.pt."""
    return {"checkpoint": "last.pt", "changed": 1000.0, "step": 70, "data": "coco val", "images": 5000,
            "image_size": 800, **dict.fromkeys(METRICS, 0.5), **changes}


def corrupted(passes=PASSES, **changes):
    """corruptions.json of last.pt."""
    return {"of": {"model": "/runs/a/last.pt", "checkpoint": "last.pt", "changed": 1000.0, "images": 5000,
                   "data": "coco val", "image_size": 800, "frost_dir": "photos", **changes},
            "clean": {"AP": 0.5}, "corruptions": passes}


def last_row(number, *folders):
    row = paper_table(number, [str(f) for f in folders]).splitlines()[-1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_run_stands_below_the_papers_rows(run):
    assert paper_table(2, []).splitlines()[2].split()[1:7] == ["DETR", "R50", "|", "500", "|", "42.0"]
    folder = run("a")
    assert last_row(2, folder) == last_row(8, folder) == [f"ours: {folder}", "14", *AP, "1.2"]
    assert last_row(3, folder)[1:] == ["no", *AP, "1.2"]
    assert last_row(3, run("a", adaptor_per_layer=False))[1] == "yes"
    assert last_row(3, run("a", adaptor="none", adaptor_per_layer=False))[1] == "-"
    assert last_row(1, run("a", **PRETRAINING)) == [f"ours: {folder}", "14", "76.4", "1.2"]
    assert last_row(2, run("a", APs=-1.0))[5] == "-"  # no small objects


def test_scores_of_evaluate_replace_those_of_training(run):
    folder = run("a", evaluation())
    assert last_row(2, folder) == [f"ours: {folder}", "14", *["50.0"] * 6, "1.2"]
    run("a", corrupted())
    assert last_row(4, folder) == [f"ours: {folder}", *["25.0"] * 16]
    old = run("b", dict.fromkeys(METRICS, 0.5))  # files of older versions say less
    figures = {k: RUN[k] for k in ("epochs", "parameters", *METRICS)}
    (old / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
    assert last_row(2, old) == [f"ours: {old}", "14", *["50.0"] * 6, "1.2"]


@pytest.mark.parametrize("number, file, changes, note", [
    (2, None, dict(images=9), "coco val, 9 images"),
    (2, None, dict(data="shapes val", images=300, image_size=64),
     "shapes val, 300 images, image size 64"),
    (2, None, CITY, "cityscapes val, 500 images"),
    (1, None, {**PRETRAINING, "image_size": 64, "limit_train": 7}, "trained on 7 images, image size 64"),
    (2, evaluation(data="coco train", images=118287), {}, "coco train, 118287 images"),
    (3, evaluation(image_size=400), {}, "image size 400"),
    (8, evaluation(checkpoint="best.pt", step=60), {}, "best.pt of step 60"),
    (8, evaluation(checkpoint="fp-detr-base.pth", step=None), {}, "fp-detr-base.pth"),
    (4, corrupted(frost_dir="generated"), {}, "frost drawn"),
    (4, corrupted({"fog": PASSES["fog"], "snow": {"1": {"AP": 0.2}}}, frost_dir="generated"), {},
     "6 of the 75 corruptions and severities"),
    (4, corrupted(images=50), {}, "coco val, 50 images"),
    (7, None, {"pretrained": "PRE/last.pt"}, "pre-training (imagenet val, 50 images)")])
def test_scores_in_another_setting_are_marked(number, file, changes, note, run):
    if changes.get("pretrained"):
        changes = {"pretrained": str(run("pre", **{**PRETRAINING, "images": 50}) / "last.pt")}
    folder = run("a", file, **changes)
    assert last_row(number, folder)[0] == f"ours: {folder} ({note})"


@pytest.mark.parametrize("number, file, changes, says", [
    (1, None, {"top1": 0.5}, "is a run of finetune.py: Table 1 takes runs of pretrain.py"),
    (2, None, PRETRAINING, "is a run of pretrain.py: Table 2 takes runs of finetune.py"),
    (2, evaluation(changed=999.0), {}, "evaluate.py .*a/last.pt"),  # trained further
    (2, evaluation(checkpoint="best.pt", changed=999.0), {}, "evaluate.py .*a/best.pt"),
    (2, evaluation(step=35), {}, "end the training"),
    (2, evaluation(checkpoint=None, model="x/results.json"), {}, "was not measured on"),
    (4, corrupted(changed=999.0), {}, "corruptions.json .*last.pt --corruptions all"),
    (4, corrupted(step=35), {}, "end the training"),
    (4, corrupted(model="hf:facebook/detr", checkpoint=None, changed=None), {}, "was not measured on")])
def test_files_that_do_not_belong_together_are_refused(number, file, changes, says, run):
    folder = run("a", file, **changes)
    with pytest.raises(InputError, match=f"{folder}.*{says}") as error:
        paper_table(number, [folder])
    assert "\n" not in str(error.value)


def test_table_4_takes_detectors_without_a_run(run):
    folder = run("detr", corrupted(model="hf:facebook/detr", checkpoint=None, changed=None))
    (folder / "metrics.json").unlink()
    assert last_row(4, folder) == [f"ours: {folder}", *["25.0"] * 16]


def test_table_5_has_one_row_for_all_seeds(run):
    folders = run("city-seed0", AP=0.1, **CITY), run("city-seed1", AP=0.3, seed=1, **CITY)
    row = last_row(5, *folders)
    assert row[:4] == [f"ours: {folders[0]} to city-seed1, 2 seeds", "14", "20.0±14.1", "20.0±0.0"]
    assert row[-1] == "1.2"
    assert len(paper_table(5, folders).splitlines()) == len(paper_table(5, []).splitlines()) + 1
    for evaluated, changes, says in (
            (None, dict(seed=2, lr=1e-3, epochs=9), "differ in epochs, lr:"),
            (None, dict(seed=1), "have the same seed"),
            (evaluation(**CITY, image_size=400), dict(seed=2), "differ in checkpoint, image_size:")):
        third = run("third", evaluated, **{**CITY, "lr": 1e-4, **changes})
        run("city-seed0", lr=1e-4, **CITY)
        with pytest.raises(InputError, match=f"third {says}"):
            paper_table(5, [*folders, third])


def test_table_7_has_class_tokens_and_top_1_of_the_pre_training(run):
    start = run("pre", class_tokens=300, **PRETRAINING)
    assert last_row(7, run("a", pretrained=str(start / "last.pt")))[1:] == ["300", "76.4", *AP, "1.2"]
    # From scratch, from a checkpoint of another step, and from a fine-tuning run that has a top-1.
    other = run("other", class_tokens=300, top1=0.5) / "last.pt"
    for pretrained in (None, str(start / "best.pt"), str(other)):
        assert last_row(7, run("a", pretrained=pretrained))[1:] == ["-", "-", *AP, "1.2"]


@pytest.mark.parametrize("number, says", [(2, "a training run"), (4, "--corruptions all"),
                                          (5, "a training run"), (7, "a training run")])
def test_runs_that_lack_the_figures_of_a_table_are_refused(number, says, tmp_path):
    with pytest.raises(InputError, match=f"missing: it comes from .*{says}"):
        paper_table(number, [tmp_path])
    (tmp_path / "metrics.json").write_text(json.dumps({"AP": "high"}), encoding="utf-8")
    with pytest.raises(InputError, match=str(tmp_path)):
        paper_table(number, [tmp_path])
