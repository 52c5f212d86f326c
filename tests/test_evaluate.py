"""The metric against published numbers; boxes, pictures and tables against hand-made cases."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import METRICS, best_boxes, coco_metrics, draw, grid, table
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


def test_pictures_show_boxes_above_the_threshold():
    found = {"scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([0, 1]),
             "boxes": torch.tensor([[100.0, 100, 300, 250], [400, 300, 500, 380]])}
    before = Image.new("RGB", (640, 400), (90, 90, 90))
    changed = np.any(np.asarray(draw(before, found, ["cat", "dog"])) != np.asarray(before), -1)
    assert changed[100, 150:300].all() and changed[100:250, 300].all()  # the outline
    assert not changed[280:, 380:].any()  # nothing where the score is low
    assert grid([before.copy()] * 5).size == (1600, 2 * (245 + 8))  # 640 x 400 shrinks to 392 x 245


def test_table_is_in_percent_with_a_dash_for_what_does_not_occur():
    lines = table({
        "ours": [12.34, 50, 0, -100, 1, 2], "paper": (37.2, 56.5, 40.4, 21.7, 40.0, 48.6)}).splitlines()
    assert lines[0].split() == list(METRICS)
    assert lines[1].split() == ["ours", "12.3", "50.0", "0.0", "-", "1.0", "2.0"]
    assert lines[2].split() == ["paper", "37.2", "56.5", "40.4", "21.7", "40.0", "48.6"]
