"""The metric against published numbers; boxes against hand-made cases; COCO-C against itself interrupted."""
import json
import sys

import numpy as np
import pytest
import torch

from inference import METRICS, best_boxes, coco_metrics, metric_library
from model import InputError


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
    truth, found = folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"
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
