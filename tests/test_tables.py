"""The paper's tables: their own means as a check of every digit, and rows of ours computed by hand."""
import json
import math

import pytest

from corruptions import NAMES
from inference import METRICS
from model import InputError
from tables import (HEADERS, PAPER, TABLE_2, TABLE_3, TABLE_4, TABLE_7, corruption_row, markdown,
                    mean_and_deviation, paper_table)


@pytest.mark.parametrize("method", TABLE_4)
def test_rows_of_table_4_have_the_mean_that_they_print(method):
    mean, *each = TABLE_4[method]
    known = [v for v in each if not math.isnan(v)]
    if len(known) == 15:
        assert mean == pytest.approx(sum(known) / 15, abs=0.1)  # of figures that were rounded themselves
    else:  # DETR: what its unreadable figure must be for its mean
        missing = 15 * mean - sum(known)
        assert 25 < missing < 40


def test_the_same_model_has_the_same_figures_in_every_table():
    assert TABLE_2["FP-DETR-Lite"][1:7] == TABLE_3["self-attention"][1:7] == TABLE_7["FP-DETR-Lite"][2:8]
    for number, table in PAPER.items():
        assert all(len(row) == len(HEADERS[number]) for row in table.values())


def test_markdown():
    text = markdown("Table", ("x", "y"), [("a", (1.25, -100)), ("bcd", (float("nan"), "1.0±0.5"))])
    assert text.splitlines() == ["| Table |   x |       y |", "| ----- | --: | ------: |",
                                 "| a     | 1.2 |    -100 |", "| bcd   |   - | 1.0±0.5 |"]
    # -1 of the metric: there was nothing to measure
    assert markdown("", ("AP",), [("a", (-100.0,))]).splitlines()[2] == "| a |  - |"


def test_mean_and_deviation_by_hand():
    # mean 0.3, squares of differences 0.04 + 0.01 + 0.01 + 0.04, over n - 1 = 3: 0.18257
    assert mean_and_deviation([0.1, 0.2, 0.4, 0.5]) == "30.0±18.3"
    assert mean_and_deviation([0.25]) == "25.0±0.0" and mean_and_deviation([0.2, -1.0]) == "-"


def test_mean_under_corruption_by_hand():
    row = corruption_row({"corruptions": {"fog": {"1": {"AP": 0.4}, "5": {"AP": 0.2}},
                                          "snow": {"3": {"AP": 0.1}}}})
    assert row[0] == pytest.approx(20) and row[1 + NAMES.index("fog")] == pytest.approx(30)
    assert row[1 + NAMES.index("snow")] == pytest.approx(10) and math.isnan(row[1])


RUN = {"epochs": 14, "parameters": 1_234_567, "adaptor": "bilstm", "adaptor_per_layer": True,
       "class_tokens": 300, "top1": 0.764, **{m: (i + 1) / 10 for i, m in enumerate(METRICS)}}


def cells(text: str, row: int = -1) -> list[str]:
    return [c.strip() for c in text.splitlines()[row].strip("|").split("|")]


def test_finished_runs_stand_below_the_papers_rows(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(RUN))
    metrics = ["10.0", "20.0", "30.0", "40.0", "50.0", "60.0"]
    assert cells(paper_table(2, [tmp_path])) == [f"ours: {tmp_path}", "14", *metrics, "1.2"]
    assert cells(paper_table(3, [tmp_path]))[1:] == ["no", *metrics, "1.2"]
    assert cells(paper_table(7, [tmp_path]))[1:] == ["300", "76.4", *metrics, "1.2"]
    assert cells(paper_table(8, [tmp_path]))[1:] == ["14", *metrics, "1.2"]
    assert cells(paper_table(1, [tmp_path]))[1:] == ["14", "76.4", "1.2"]
    for data, images, shown in (("coco val", 5000, ""), ("coco val", 9, " (coco val, 9 images)"),
                                ("shapes val", 300, " (shapes val, 300 images)")):
        (tmp_path / "metrics.json").write_text(json.dumps({**RUN, "data": data, "images": images}))
        assert cells(paper_table(2, [tmp_path]))[0] == f"ours: {tmp_path}{shown}"
    assert cells(paper_table(2, []), 2)[:3] == ["DETR R50", "500", "42.0"]
    (tmp_path / "evaluation").mkdir()  # what evaluate.py measured counts, where it is there
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(dict.fromkeys(METRICS, 0.5)))
    assert cells(paper_table(2, [tmp_path]))[2:8] == ["50.0"] * 6
    for seed, ap in enumerate((0.1, 0.3)):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "metrics.json").write_text(json.dumps({**RUN, "AP": ap}))
    assert cells(paper_table(5, [tmp_path]))[1:4] == ["14", "20.0±14.1", "20.0±0.0"]
    state = {"clean": {"AP": 0.5}, "corruptions": {n: {"1": {"AP": 0.25}} for n in NAMES}}
    (tmp_path / "evaluation" / "corruptions.json").write_text(json.dumps(state))
    assert cells(paper_table(4, [tmp_path]))[1:] == ["25.0"] * 16


@pytest.mark.parametrize("number, says", [(2, "finetune.py"), (4, "--corruptions all"), (5, "--seeds 5")])
def test_runs_that_lack_what_a_table_shows_are_refused(number, says, tmp_path):
    with pytest.raises(InputError, match=says) as refused:
        paper_table(number, [tmp_path])
    assert "InputError" not in str(refused.value)
    (tmp_path / "metrics.json").write_text(json.dumps({"AP": "high"}))
    with pytest.raises(InputError):
        paper_table(number, [tmp_path])
