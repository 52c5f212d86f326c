"""The metric against published numbers; boxes against hand-made cases; COCO-C against itself interrupted."""
import json
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import evaluate
from data import detection_set
from inference import METRICS, Scorer, best_boxes, coco_metrics, metric_library
from model import VARIANTS, Detector, InputError
from shapes import SHAPES


@pytest.mark.parametrize("case, source", [("bbox", "published_by_faster_coco_eval_tests"),
                                          ("ignore_bbox", "published_by_faster_coco_eval_tests"),
                                          ("small_bbox", "pycocotools_2_0_11")])
def test_published_numbers(shared, case, source):
    folder = shared("data/coco_eval")
    expected = json.loads((folder / "expected.json").read_text())[case]
    detections = json.loads((folder / expected["dt"]).read_text())
    detections = [d for d in detections if d["score"] >= expected.get("min_score", 0)]
    got = coco_metrics(folder / expected["gt"], detections)
    assert list(got) == list(METRICS)
    for value, published in zip(got.values(), expected[source]):
        assert value == pytest.approx(published, abs=1e-9)


def test_files_and_contents_are_the_same_to_the_metric(shared):
    folder = shared("data/coco_eval")
    truth = folder / "instances_val2014_100.json"
    found = folder / "instances_val2014_fakebbox100_results.json"
    assert coco_metrics(truth, found) == coco_metrics(json.loads(truth.read_text()),
                                                      json.loads(found.read_text()))


TRUTH = {"images": [{"id": 1, "width": 600, "height": 400}], "categories": [{"id": 5, "name": "x"}],
         "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [214, 41, 348, 244], "area": 348
                          * 244,
                          "iscrowd": 0}]}


def test_faster_coco_eval_gives_the_same_twelve_numbers(shared, monkeypatch):
    """Where it is installed it is used; pycocotools must then give the same. (On these data eleven are equal
    to the last bit; a precision differs in it, and so does AP50, by 2e-16.)"""
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is optional and not installed")
    folder = shared("data/coco_eval")
    truth = folder / "instances_val2014_100.json"
    found = folder / "instances_val2014_fakebbox100_results.json"
    assert metric_library()[1].__module__.startswith("faster_coco_eval")
    fast = all_twelve(truth, found)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert metric_library()[1].__module__.startswith("pycocotools")
    assert fast == pytest.approx(all_twelve(truth, found), abs=1e-15)


def all_twelve(truth, found):
    COCO, COCOeval = metric_library()
    truth = COCO(str(truth))
    scores = COCOeval(truth, truth.loadRes(str(found)), "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return [float(v) for v in scores.stats[:12]]


def test_one_box_computed_by_hand():
    """IoU 0.78: right up to the threshold 0.75, so 6 of 10 (TorchMetrics' docstring has the same
    example)."""
    got = coco_metrics(TRUTH, [{"image_id": 1, "category_id": 5, "bbox": [258, 41, 348, 244],
                                "score": 0.536}])
    assert {k: round(v, 6) for k, v in got.items()} == {"AP": 0.6, "AP50": 1, "AP75": 1, "APs": -1, "APm":
                                                        -1, "APl": 0.6}


def test_nothing_detected_scores_zero_and_foreign_images_are_refused():
    assert coco_metrics(TRUTH, [])["AP"] == 0
    with pytest.raises(InputError, match="image id 2"):
        coco_metrics(TRUTH, [{"image_id": 2, "category_id": 5, "bbox": [0, 0, 1, 1], "score": 1}])


def test_best_boxes_are_the_best_of_query_times_class():
    logits = torch.full((1, 3, 4), -5.0)
    logits[0, 2, 1], logits[0, 2, 3], logits[0, 0, 0] = 2.0, 1.0, 3.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.4, 1.0]]])
    found = best_boxes({"pred_logits": logits, "pred_boxes": boxes}, [(200, 100)], top=3)[0]
    assert found["labels"].tolist() == [0, 1, 3]
    assert found["scores"].tolist() == pytest.approx([1 / (1 + np.exp(-x)) for x in (3, 2, 1)])
    # cxcywh in parts of 200 x 100 pixels -> corners; the second reaches beyond the right border and is
    # clipped
    expected = [[80, 30, 120, 70], [140, 0, 200, 100], [140, 0, 200, 100]]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected, dtype=torch.float32))


def test_golden_detections(shared):
    """Through the whole way to pixels, against the authors' post-processing (scores, labels, rescaled
    boxes)."""
    z = np.load(shared("goldens/golden_detector_a.npz"))
    outputs = {"pred_logits": torch.from_numpy(z["out/cls_logits"][-1]),
               "pred_boxes": torch.from_numpy(z["out/boxes_cxcywh"][-1])}
    sizes = [(w, h) for h, w in z["img_hw"].tolist()]
    for i, found in enumerate(best_boxes(outputs, sizes, top=20)):
        expected = z[f"post/img{i}_boxes_xyxy_score_netsize"]
        assert np.array_equal(found["labels"].numpy(), z[f"post/img{i}_labels"])
        np.testing.assert_allclose(found["scores"].numpy(), expected[:, 4], atol=1e-9)
        np.testing.assert_allclose(found["boxes"].numpy(), expected[:, :4], atol=1e-6)


# ---------------------------------------------------------------------------------------- whole evaluations

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained detector of the embedded data, as finetune.py would have left it."""
    torch.manual_seed(0)
    model = Detector(replace(VARIANTS["tiny"], queries=10), 8)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("run") / "last.pt"
    args = Namespace(layout="paper", data="shapes", image_size=64)
    torch.save(checkpoints.describe(model, args, list(SHAPES), "finetune"), path)
    return path


def run_evaluate(monkeypatch, *command):
    command = [*map(str, command), "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *command])
    evaluate.main()


def test_interrupted_corruption_passes_go_on_and_give_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    command = [checkpoint, "--limit-val", 3, "--corruptions", "fog", "gaussian_noise", "--severities", 1, 5]
    run_evaluate(monkeypatch, *command, "--out", tmp_path / "whole")
    printed = capsys.readouterr().out
    whole = json.loads((tmp_path / "whole" / "corruptions.json").read_text())
    assert whole["corruptions"].keys() == {"fog", "gaussian_noise"} and len(whole["memory"]) == 5

    passes, real = [], evaluate.detect

    def detect(model, dataset, *rest):
        if len(passes) == 3:
            raise KeyboardInterrupt
        passes.append(dataset.corruption and (dataset.corruption.keywords["name"],
                                              dataset.corruption.keywords["severity"]))
        return real(model, dataset, *rest)
    monkeypatch.setattr(evaluate, "detect", detect)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(monkeypatch, *command, "--out", tmp_path / "cut")
    kept = json.loads((tmp_path / "cut" / "corruptions.json").read_text())
    assert kept["clean"] and kept["corruptions"].keys() == {"fog"}
    done, passes[:] = passes[:], []
    run_evaluate(monkeypatch, *command, "--out", tmp_path / "cut")
    assert passes[-1] == ("gaussian_noise", 5) and len(set(done) | set(passes)) == 5 and len(passes) <= 3
    cut = json.loads((tmp_path / "cut" / "corruptions.json").read_text())
    assert cut["clean"] == whole["clean"] and cut["corruptions"] == whole["corruptions"]

    # the row that is printed, computed from the file
    mean = 50 * sum(whole["corruptions"][n][s]["AP"] for n in ("fog", "gaussian_noise") for s in "15") / 2
    assert f"(mPC) {mean:.1f}," in printed and "of the 75 corruptions and severities only" in printed
    assert Image.open(tmp_path / "cut" / "corruptions.png").size[0] > 1000
    with pytest.raises(InputError, match="holds another evaluation"):
        run_evaluate(monkeypatch, *command, "--out", tmp_path / "cut", "--limit-val", 2)


def test_a_corrupted_pass_sees_corrupted_pictures(checkpoint, tmp_path, monkeypatch):
    """With the corruption that paints everything black, AP must be that of black pictures."""
    monkeypatch.setattr(evaluate, "corrupt_seeded",
                        lambda image, image_id, **_: Image.new("RGB", image.size))
    run_evaluate(monkeypatch, checkpoint, "--limit-val", 3, "--corruptions", "fog", "--severities", 2,
                 "--out", tmp_path)
    black = detection_set("shapes", "val", limit=3, image_size=64)
    for record in black.records:
        record.source = Image.new("RGB", record.size)
    model, _ = checkpoints.load_detector(checkpoint)
    expected = coco_metrics(black.ground_truth, evaluate.detect(
        model, black, Namespace(workers=0, amp="off"), torch.device("cpu")))
    assert json.loads((tmp_path / "corruptions.json").read_text())["corruptions"]["fog"]["2"] == expected


def test_the_metric_in_a_process_of_its_own_gives_the_same():
    found = [{"image_id": 1, "category_id": 5, "bbox": [258, 41, 348, 244], "score": 0.536}]
    assert Scorer(TRUTH, workers=1).submit(found).result() == coco_metrics(TRUTH, found)


def test_figure_has_a_row_per_image_and_a_column_per_corruption(checkpoint, tmp_path, monkeypatch):
    run_evaluate(monkeypatch, checkpoint, "--limit-val", 2, "--figure", 2, "--threshold", 2,
                 "--corruptions", "contrast", "snow", "--out", tmp_path)
    sheet = Image.open(tmp_path / "figure.png")
    assert sheet.size == (3 * 400, 36 + 2 * 400)
    clean, dull = (np.asarray(sheet.crop((x, 40, x + 390, 430))).std((0, 1)) for x in (4, 404))
    assert dull / clean == pytest.approx([0.2] * 3, abs=0.02)  # contrast at severity 3


def test_attention_of_picture_files(checkpoint, tmp_path, monkeypatch):
    Image.new("RGB", (90, 70), (200, 30, 30)).save(tmp_path / "a.png")
    command = ["--images", tmp_path / "a.png", "--attention", 2, "--out", tmp_path]
    run_evaluate(monkeypatch, checkpoint, *command)
    assert Image.open(tmp_path / "a-attention.png").size[0] > 1000  # a column for each of three layers
    assert (tmp_path / "a-detections.png").exists()


@pytest.mark.parametrize("command, says", [
    ([], "give one checkpoint"), (["a.pt", "b.pt"], "only one of"),
    (["--model", "detr"], "must begin with hf:"),
    (["--predictions", "x.json", "--images", "a.png"], "need a detector"),
    (["a.pt", "--attention", "2"], "needs a checkpoint of FP-DETR and --images"),
    (["a.pt", "--corruptions", "rain"], "invalid choice"), (["--table", "6"], "invalid choice")])
def test_contradictory_commands_are_refused(command, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_evaluate(monkeypatch, *command)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_missing_frost_photographs_are_found_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="frost1.png"):
        run_evaluate(monkeypatch, checkpoint, "--limit-val", 2, "--corruptions", "frost", "--frost-dir",
                     tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
