"""The paper's tables: their own means check every digit, and rows of our runs are computed by hand."""
import json
import math

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


def test_markdown():
    text = markdown("Table", ("x", "y"), [("a", (1.25, -100)), ("bcd", (float("nan"), "1.0±0.5"))])
    assert text.splitlines() == ["| Table |   x |       y |", "| ----- | --: | ------: |",
                                 "| a     | 1.2 |    -100 |", "| bcd   |   - | 1.0±0.5 |"]
    # The metric gives -1 if there is nothing to measure.
    assert markdown("", ("AP",), [("a", (-100.0,))]).splitlines()[2] == "| a |  - |"


def test_means_by_hand():
    # The mean is 0.3, the squares of the differences are 0.04 + 0.01 + 0.01 + 0.04, over n - 1 = 3.
    assert mean_and_deviation([0.1, 0.2, 0.4, 0.5]) == "30.0±18.3"
    assert mean_and_deviation([0.25]) == "25.0±0.0" and mean_and_deviation([0.2, -1.0]) == "-"
    row = corruption_row({"corruptions": {"fog": {"1": {"AP": 0.4}, "5": {"AP": 0.2}},
                                          "snow": {"3": {"AP": 0.1}}}})
    assert row[0] == pytest.approx(20) and row[1 + NAMES.index("fog")] == pytest.approx(30)
    assert row[1 + NAMES.index("snow")] == pytest.approx(10) and math.isnan(row[1])


# ------------------------------------------------------------------------------------------- our runs

RUN = {"epochs": 14, "parameters": 1_234_567, "adaptor": "bilstm", "adaptor_per_layer": True,
       "pretrained": None, "top1": 0.764, **{m: (i + 1) / 10 for i, m in enumerate(METRICS)}}
AP = ["10.0", "20.0", "30.0", "40.0", "50.0", "60.0"]


@pytest.fixture
def run(tmp_path):
    """run("name", key=value, ...) -> the folder of a finished run with these figures."""
    def write(name, **changes):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({**RUN, **changes}))
        return tmp_path / name
    return write


def last_row(number, *folders):
    row = paper_table(number, [str(f) for f in folders]).splitlines()[-1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_run_stands_below_the_papers_rows(run):
    folder = run("a")
    assert paper_table(2, []).splitlines()[2].split()[1:7] == ["DETR", "R50", "|", "500", "|", "42.0"]
    assert last_row(1, folder) == [f"ours: {folder}", "14", "76.4", "1.2"]
    assert last_row(2, folder) == last_row(8, folder) == [f"ours: {folder}", "14", *AP, "1.2"]
    assert last_row(3, folder)[1:] == ["no", *AP, "1.2"]
    assert last_row(3, run("a", adaptor_per_layer=False))[1] == "yes"
    assert last_row(3, run("a", adaptor="none", adaptor_per_layer=False))[1] == "-"
    # Other data than the paper's are named.
    for data, images, note in (("coco val", 5000, ""), ("coco val", 9, " (coco val, 9 images)"),
                               ("shapes val", 300, " (shapes val, 300 images)")):
        folder = run("a", data=data, images=images)
        assert last_row(2, folder)[0] == f"ours: {folder}{note}"


def test_scores_of_evaluate_replace_those_of_training(run):
    folder = run("a")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(dict.fromkeys(METRICS, 0.5)))
    assert last_row(2, folder)[2:] == ["50.0"] * 6 + ["1.2"]
    state = {"clean": {"AP": 0.5}, "corruptions": {n: {"1": {"AP": 0.25}} for n in NAMES}}
    (folder / "evaluation" / "corruptions.json").write_text(json.dumps(state))
    assert last_row(4, folder)[1:] == ["25.0"] * 16


def test_table_5_has_one_row_for_all_seeds(run):
    folders = run("city-seed0", AP=0.1), run("city-seed1", AP=0.3)
    row = last_row(5, *folders)
    assert row[:4] == [f"ours: {folders[0]} to city-seed1, 2 seeds", "14", "20.0±14.1", "20.0±0.0"]
    assert len(paper_table(5, folders).splitlines()) == len(paper_table(5, []).splitlines()) + 1


def test_table_7_has_class_tokens_and_top_1_of_the_pre_training(run):
    start = run("pre", class_tokens=300, top1=0.5) / "last.pt"
    assert last_row(7, run("a", pretrained=str(start)))[1:] == ["300", "50.0", *AP, "1.2"]
    assert last_row(7, run("a"))[1:] == ["-", "-", *AP, "1.2"]  # from scratch


@pytest.mark.parametrize("number, says", [(2, "a training run"), (4, "--corruptions all"),
                                          (5, "a training run"), (7, "a training run")])
def test_runs_that_lack_the_figures_of_a_table_are_refused(number, says, tmp_path):
    with pytest.raises(InputError, match=f"missing: it comes from .*{says}"):
        paper_table(number, [tmp_path])
    (tmp_path / "metrics.json").write_text(json.dumps({"AP": "high"}))
    with pytest.raises(InputError, match=str(tmp_path)):
        paper_table(number, [tmp_path])
