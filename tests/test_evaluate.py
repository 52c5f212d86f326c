"""The metric against published numbers, boxes against cases made by hand, and whole evaluations: COCO-C
interrupted and resumed, Figure 3, pictures, other files than checkpoints."""
import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, refused, save_model, shaken
from PIL import Image

import evaluate
from data import detection_set
from engine import InputError
from evaluate import best_boxes, coco_metrics, detect, load_detector
from extras import pictures
from extras.corruptions import FROST_FILES, corrupt_seeded
from extras.released import released_layout
from extras.shapes import SHAPES
from extras.tables import METRICS
from model import VARIANTS, Classifier, Detector

# ------------------------------------------------------------------------------------------- the metric

@pytest.mark.parametrize("case, source", [("bbox", "published_by_faster_coco_eval_tests"),
                                          ("ignore_bbox", "published_by_faster_coco_eval_tests"),
                                          ("small_bbox", "pycocotools_2_0_11")])
def test_published_numbers(case, source, shared, tmp_path):
    """From files and from their contents."""
    folder = shared("data/coco_eval")
    expected = json.loads((folder / "expected.json").read_text())[case]
    truth = folder / expected["gt"]
    detections = json.loads((folder / expected["dt"]).read_text())
    detections = [d for d in detections if d["score"] >= expected.get("min_score", 0)]
    (tmp_path / "results.json").write_text(json.dumps(detections))
    for got in (coco_metrics(truth, tmp_path / "results.json"),
                coco_metrics(json.loads(truth.read_text()), detections)):
        assert got == pytest.approx(dict(zip(METRICS, expected[source])), abs=1e-9)


def test_one_box_by_hand():
    """The IoU is 0.78. That is right at the thresholds up to 0.75, 6 of 10. (TorchMetrics has the
    same example in its docstring.)"""
    truth = {"images": [{"id": 1, "width": 600, "height": 400}], "categories": [{"id": 5, "name": "x"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [214, 41, 348, 244],
                              "area": 348 * 244, "iscrowd": 0}]}
    found = {"image_id": 1, "category_id": 5, "bbox": [258, 41, 348, 244], "score": 0.536}
    expected = {"AP": 0.6, "AP50": 1, "AP75": 1, "APs": -1, "APm": -1, "APl": 0.6}
    assert coco_metrics(truth, [found]) == pytest.approx(expected, abs=1e-6)
    assert coco_metrics(truth, [])["AP"] == 0
    with pytest.raises(InputError, match="image id 2"):
        coco_metrics(truth, [{**found, "image_id": 2}])


# ------------------------------------------------------------------------------------------------ boxes

@pytest.mark.parametrize("broken", ["pred_logits", "pred_boxes"])
def test_a_model_that_has_diverged_is_not_evaluated(broken):
    outputs = {"pred_logits": torch.zeros(1, 2, 3), "pred_boxes": torch.full((1, 2, 4), 0.5)}
    outputs[broken][0, 1, 2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        best_boxes(outputs, [(64, 64)])


def test_best_boxes_are_the_best_of_query_times_class():
    logits = torch.full((1, 3, 4), -5.0)
    logits[0, 2, 1], logits[0, 2, 3], logits[0, 0, 0] = 2.0, 1.0, 3.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.4, 1.0]]])
    # The second image has the same answers, given by the queries in reverse.
    outputs = {"pred_logits": torch.cat([logits, logits.flip(1)]),
               "pred_boxes": torch.cat([boxes, boxes.flip(1)])}
    # The first image has 200 x 100 pixels. The box of query 2 is clipped at the right border.
    expected = torch.tensor([[80, 30, 120, 70], [140, 0, 200, 100], [140, 0, 200, 100]]).float()
    sizes, queries = [(200, 100), (20, 50)], ([0, 2, 2], [2, 0, 0])
    for found, (w, h), query in zip(best_boxes(outputs, sizes, top=3), sizes, queries):
        assert found["labels"].tolist() == [0, 1, 3] and found["queries"].tolist() == query
        assert found["scores"].tolist() == pytest.approx([1 / (1 + np.exp(-x)) for x in (3, 2, 1)])
        scale = torch.tensor([w / 200, h / 100, w / 200, h / 100])
        torch.testing.assert_close(found["boxes"], expected * scale)
    assert len(best_boxes(outputs, sizes)[0]["scores"]) == 3 * 4  # of the 100 asked for
    outputs = {k: v.repeat(1, 20, 1) for k, v in outputs.items()}
    assert len(best_boxes(outputs, sizes)[0]["scores"]) == 100  # of 60 x 4


def test_golden_detections(shared):
    """Scores, labels and boxes in pixels, as the authors' post-processing gives them."""
    z = np.load(shared("goldens/golden_detector_a.npz"))
    outputs = {"pred_logits": torch.from_numpy(z["out/cls_logits"][-1]),
               "pred_boxes": torch.from_numpy(z["out/boxes_cxcywh"][-1])}
    sizes = [(w, h) for h, w in z["img_hw"].tolist()]
    for i, found in enumerate(best_boxes(outputs, sizes, top=20)):
        expected = z[f"post/img{i}_boxes_xyxy_score_netsize"]
        assert np.array_equal(found["labels"].numpy(), z[f"post/img{i}_labels"])
        np.testing.assert_allclose(found["scores"].numpy(), expected[:, 4], atol=1e-9)
        np.testing.assert_allclose(found["boxes"].numpy(), expected[:, :4], atol=1e-6)


# ------------------------------------------------------------------------------------ whole evaluations

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained detector of the embedded data, as finetune.py would leave it."""
    torch.manual_seed(0)
    model = shaken(Detector(replace(VARIANTS["tiny"], queries=10), 8))
    path = tmp_path_factory.mktemp("run") / "last.pt"
    return save_model(path, model, SHAPES, data="shapes", image_size=64)


def run(folder, *command, **options):
    call(folder, "evaluate.py", *command, *"--workers 0 --device cpu".split(), **options)


def test_detection_switches_dropout_off_and_training_on_again():
    torch.manual_seed(0)
    model = Detector(replace(VARIANTS["tiny"], queries=5, dropout=0.5), 8).train()
    dataset, args = detection_set("shapes", "val", limit=2, image_size=64), Namespace(workers=0, amp="off")
    found = evaluate.detect(model, dataset, args, torch.device("cpu"))
    assert model.training
    expected = evaluate.detect_image(model.eval(), dataset.records[0].image(), image_size=64)
    first = [d["score"] for d in found if d["image_id"] == dataset.records[0].id]
    assert first == pytest.approx(expected["scores"].tolist(), abs=1e-5)


def mean_score(ground_truth, detections):
    """Takes the place of the metric, which is 0 for an untrained detector. Depends on all pixels."""
    return dict.fromkeys(METRICS, float(np.mean([d["score"] for d in detections])))


def test_interrupted_corruption_passes_go_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "coco_metrics", mean_score)
    command = [checkpoint, "--limit-val", 3, "--corruptions", "fog", "gaussian_noise",
               "--severities", 1, 5]
    run(tmp_path, *command, "--out", "whole")
    whole = json.loads((tmp_path / "whole" / "corruptions.json").read_text())

    passes, real = [], evaluate.detect

    def detect_three_times(model, dataset, *rest):
        if len(passes) == 3:
            raise KeyboardInterrupt
        options = dataset.corruption.keywords if dataset.corruption else {}
        passes.append((options.get("name", "clean"), options.get("severity", 0)))
        return real(model, dataset, *rest)
    monkeypatch.setattr(evaluate, "detect", detect_three_times)
    with pytest.raises(SystemExit):
        run(tmp_path, *command, "--out", "cut")
    assert passes == [("clean", 0), ("fog", 1), ("fog", 5)]
    passes.clear()
    run(tmp_path, *command, "--out", "cut")
    assert passes == [("gaussian_noise", 1), ("gaussian_noise", 5)]
    cut = json.loads((tmp_path / "cut" / "corruptions.json").read_text())
    assert cut["clean"] == whole["clean"] and cut["corruptions"] == whole["corruptions"]

    # One pass, with pictures that are corrupted beforehand.
    dataset = detection_set("shapes", "val", limit=3, image_size=64)
    dataset.records.sources = [corrupt_seeded(r.image(), r.id, "fog", 5) for r in dataset.records]
    model, _ = load_detector(checkpoint)
    found = detect(model, dataset, Namespace(workers=0, amp="off"), torch.device("cpu"))
    assert whole["corruptions"]["fog"]["5"] == mean_score(None, found) != whole["clean"]

    assert Image.open(tmp_path / "cut" / "corruptions.png").size[0] > 1000
    refused(tmp_path, "evaluate.py", *command, "--out", "cut", "--limit-val", 2,
            says="holds another evaluation")


def test_figure_has_a_row_per_image_and_a_column_per_corruption(checkpoint, tmp_path):
    model, _ = load_detector(checkpoint)
    for threshold in (2, 0.01):
        run(tmp_path, checkpoint, "--limit-val", 2, "--figure", 2, "--threshold", threshold,
            "--corruptions", "contrast", "snow", "--out", ".")
        sheet, cells = Image.open(tmp_path / "figure.png"), []
        for record in detection_set("shapes", "val", limit=2).records:
            for name in (None, "contrast", "snow"):
                image = corrupt_seeded(record.image(), record.id, name, 3) if name else record.image()
                found = evaluate.detect_image(model, image, image_size=64)
                cells.append(pictures.draw_detections(image, found, list(SHAPES), threshold, 16))
        expected = pictures.sheet_of(cells, 3, titles=["clean", "contrast 3", "snow 3"])
        assert np.array_equal(sheet, expected) and sheet.size == (3 * 400, 40 + 2 * 400)


# -------------------------------------------------------------------------------------------- bad input


def test_missing_frost_photographs_are_found_before_the_first_pass(checkpoint, tmp_path, monkeypatch):
    refused(tmp_path, "evaluate.py", checkpoint, "--limit-val", 2, "--corruptions", "frost",
            "--frost-dir", ".", "--out", "out", says="frost1.png")


    for name in FROST_FILES:
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    seen, command = [], [checkpoint, "--limit-val", 2, "--corruptions", "frost", "--severities", 2,
                         "--seed", 5, "--out", "out"]
    spy = lambda image, _, **options: seen.append(options) or image
    monkeypatch.setattr(evaluate, "corrupted_picture", spy)
    for flags in ([], ["--figure", 1]):
        run(tmp_path, *command, "--frost-dir", ".", *flags)
    expected = dict(name="frost", severity=2, seed=5, frost_dir=Path("."))
    assert [options for options in seen if "seed" in options] == 3 * [expected]  # 2 images, and the figure
    refused(tmp_path, "evaluate.py", *command, "--workers", 0, "--device", "cpu", says="(now generated)")


def test_other_checkpoints_than_detectors_are_refused(checkpoint, tmp_path):
    save_model(tmp_path / "classifier.pt", Classifier(VARIANTS["tiny"], 8), SHAPES, stage="pretrain")
    content = torch.load(checkpoint)
    torch.save({**content, "config": {**content["config"], "dim": 96}}, tmp_path / "wider.pt")
    torch.save({**content, "classes": None}, tmp_path / "nameless.pt")
    torch.save({**content, "model_class": "MyDetector"}, tmp_path / "fork.pt")
    for name, says in (("classifier.pt", "holds no detector"), ("wider.pt", "not a whole"),
                       ("nameless.pt", "not a whole"), ("fork.pt", "holds a MyDetector")):
        with pytest.raises(InputError, match=says) as refused:
            load_detector(tmp_path / name)
        assert name in str(refused.value) and "\n" not in str(refused.value)


def test_mpc_and_rpc_by_hand(tmp_path):
    """Fog: (40 + 20) / 2 = 30. mPC: (30 + 10) / 2 = 20. rPC: 20 / 50."""
    state = {"of": {"frost_dir": "generated"}, "clean": {"AP": 0.5},
             "corruptions": {"fog": {"1": {"AP": 0.4}, "5": {"AP": 0.2}}, "frost": {"3": {"AP": 0.1}}}}
    text = evaluate.report_corruptions(state, "FP-DETR-Lite", Namespace(out=tmp_path))
    assert text.endswith("clean AP 50.0, mean under corruption (mPC) 20.0, relative (rPC) 40.0 %")
    assert "this model (3 of the 75 corruptions and severities, frost drawn)" in text
    assert re.search(r"paper, FP-DETR-Lite +\| +18.9 \| +17.0 \| ", text)


@pytest.mark.parametrize("data, ap, row", [("coco val", "37.2 56.5 40.4 21.7 40.0 48.6", True),
                                           ("cityscapes val", "26.7±0.6 49.1±0.8 25.7±0.7", False)])
def test_the_papers_row_is_that_of_the_data(data, ap, row, checkpoint, tmp_path, monkeypatch, capsys):
    """Of a perfect result file, and of COCO-C, which the paper has for COCO alone."""
    dataset = detection_set("shapes", "val", limit=2, image_size=64)
    dataset.name = data
    found = [{**a, "score": 0.9} for a in dataset.ground_truth["annotations"]]
    evaluate.report(found, dataset, {}, "FP-DETR-Lite", Namespace(out=tmp_path))
    printed = capsys.readouterr().out
    ours, paper = (re.search(f"{name} +\\|(.*)", printed)[1].split()[::2] for name in (
        "this model", "paper, FP-DETR-Lite"))
    assert ours[0] == "100.0" and " ".join(paper).startswith(ap)
    assert re.search(r"circle +\| +1 \| 100.0 \|", printed)
    monkeypatch.setattr(evaluate, "paper_row", lambda *_: "FP-DETR-Lite")
    run(tmp_path, checkpoint, "--corruptions", "fog", "--severities", 1, "--out", ".",
        read_data=lambda **_: dataset)
    assert ("paper, FP-DETR-Lite" in capsys.readouterr().out) == row


def test_ap_of_each_class_with_its_number_of_objects():
    """A class with two objects, one of them found after ten mistakes: AP 0.5 / 11. One with a crowd region
    alone has no AP."""
    box = {"image_id": 1, "bbox": [0, 0, 50, 50], "area": 2500}
    objects = [dict(box, id=1, category_id=1, iscrowd=0), dict(box, id=2, category_id=2, iscrowd=1),
               dict(box, id=3, category_id=1, iscrowd=0, bbox=[100, 0, 50, 50]),
               dict(box, id=4, category_id=1, iscrowd=1, bbox=[0, 100, 50, 50])]
    truth = {"images": [{"id": 1, "width": 200, "height": 200}], "annotations": objects,
             "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    found = [dict(box, category_id=1, score=0.9)] + 10 * [
        dict(box, category_id=1, score=0.95, bbox=[150, 150, 9, 9])]
    metrics, classes = evaluate.coco_metrics_by_class(truth, found)
    assert [(c["name"], c["objects"]) for c in classes] == [("cat", 2), ("dog", 0)]
    # COCO samples precision at 101 recalls; 51 of them are at most 0.5.
    assert [c["AP"] for c in classes] == [pytest.approx(51 / 101 / 11), -1]
    assert metrics["AP"] == classes[0]["AP"]


def test_the_released_layout_sees_images_one_by_one():
    """Its GroupNorm sees the padding of a batch."""
    model, sizes = released_layout(Detector(replace(VARIANTS["tiny"], queries=5), 8)).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    dataset, args = detection_set("shapes", "val", limit=3, image_size=64), Namespace(workers=0, amp="off")
    detect(model, dataset, args, torch.device("cpu"), batch_size=2)
    assert sizes == [1, 1, 1]
