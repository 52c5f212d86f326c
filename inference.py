"""Inference: from a detector and a data set to COCO's numbers.

What fine-tuning does after an epoch, and evaluate.py with a finished checkpoint: run the model over a set,
turn its outputs into boxes in pixels (as Deformable DETR, 4.1), compute COCO AP (4.2).
"""
import argparse
import contextlib
import io
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import engine
from data import DetectionSet, Transform, pad_batch
from images import to_tensor
from model import InputError
from released import ReleasedTokenizer

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# ------------------------------------------------------------------------------------------------ the metric

def metric_library() -> tuple[type, type]:
    """(COCO, COCOeval) of faster-coco-eval where it is installed (several times faster, the same numbers),
    else of pycocotools."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
        return COCO, COCOeval_faster
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        return COCO, COCOeval


def coco_metrics(ground_truth_json: str | Path | dict,
                 detections: list[dict] | str | Path) -> dict[str, float]:
    """COCO's box AP, by pycocotools or faster-coco-eval.

    Args:
        ground_truth_json: an annotation file in COCO format, or its content.
        detections: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}], or a file that holds such a
            list.
    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl"} in [0, 1]; -1 where there is no object of that size.
    """
    COCO, COCOeval = metric_library()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO() if isinstance(ground_truth_json, dict) else COCO(str(ground_truth_json))
        if isinstance(ground_truth_json, dict):
            truth.dataset = ground_truth_json
            truth.createIndex()
        if not isinstance(detections, list):
            detections = json.loads(Path(detections).read_text())
        unknown = {d["image_id"] for d in detections} - set(truth.getImgIds())
        if unknown:
            raise InputError(f"detections are for another data set: image id {min(unknown)} is not in its "
                             f"annotations")
        results = COCO()
        if detections:
            results = truth.loadRes([dict(d) for d in detections])
        else:
            results.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"],
                               "annotations": []}
            results.createIndex()
        scores = COCOeval(truth, results, "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return dict(zip(METRICS, (float(v) for v in scores.stats[:6])))


class Scorer:
    """`coco_metrics` on one ground truth, in a process of its own where `workers` > 0: while it computes,
    the next pass detects, so that 75 passes do not wait for the metric."""

    def __init__(self, ground_truth: dict, workers: int):
        self.ground_truth = ground_truth
        self.pool = None
        if workers:
            self.pool = ProcessPoolExecutor(1, get_context("spawn"), keep_truth, (ground_truth,))

    def submit(self, results: list[dict]) -> Future:
        if self.pool:
            return self.pool.submit(score, results)
        done = Future()
        done.set_result(coco_metrics(self.ground_truth, results))
        return done


def keep_truth(ground_truth: dict) -> None:
    score.ground_truth = ground_truth


def score(results: list[dict]) -> dict[str, float]:
    return coco_metrics(score.ground_truth, results)


# ------------------------------------------------------------------------------------------------- detection

def corners(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> xyxy"""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def best_boxes(outputs: dict, sizes: list[tuple[int, int]], top: int = 100) -> list[dict[str, Tensor]]:
    """A detector's outputs -> per image the `top` best of query x class scores (no suppression of
    neighbours).

    Args:
        outputs: "pred_logits" (B, Q, K), "pred_boxes" (B, Q, 4). sizes: (width, height) of each original
            image.
    Returns:
        {"scores": (n,) falling, "labels": (n,) int64, "boxes": (n, 4) xyxy in pixels, clipped to the image,
        "queries": (n,) int64, which query each came from} per image.
    """
    K = outputs["pred_logits"].shape[-1]
    scores = outputs["pred_logits"].sigmoid().flatten(1)  # (B, Q K)
    scores, index = scores.topk(min(top, scores.shape[1]))
    detections = []
    for s, i, boxes, (w, h) in zip(scores.cpu(), index.cpu(), outputs["pred_boxes"].cpu(), sizes):
        xyxy = corners(boxes[i // K]).clamp(0, 1) * torch.tensor([w, h, w, h])
        detections.append({"scores": s, "labels": i % K, "boxes": xyxy, "queries": i // K})
    return detections


@torch.no_grad()
def detect(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace, device: torch.device,
           batch_size: int = 1, bar: tqdm | None = None, seconds: dict | None = None) -> list[dict]:
    """Detections on a whole set as COCO result dicts, the work split over the processes and gathered in all
    of them. `bar`: a progress bar over images to advance instead of one of its own. `seconds`: adds up the
    time spent in "model" and in waiting for "data"."""
    was_training = model.training
    model.eval()
    # In the released layout, GroupNorm sees the padding of a batch, so its authors test images one by one.
    if any(isinstance(module, ReleasedTokenizer) for module in model.modules()):
        batch_size = 1
    mine = Subset(dataset, range(engine.rank(), len(dataset), engine.world_size()))  # no image twice
    loader = DataLoader(mine, batch_size, num_workers=args.workers, collate_fn=pad_batch)
    own = tqdm(total=len(dataset), desc=f"detecting on {dataset.name}", leave=False, unit="img",
               disable=engine.rank() > 0 or bar is not None)
    results, seconds, clock = [], {} if seconds is None else seconds, time.perf_counter()
    for images, mask, targets in loader:
        seconds["data"] = seconds.get("data", 0) + time.perf_counter() - clock
        clock = time.perf_counter()
        with engine.autocast(args, device):
            outputs = model(images.to(device), None if mask is None else mask.to(device))
        found = best_boxes(outputs, [t["size"] for t in targets])  # waits for the GPU
        seconds["model"] = seconds.get("model", 0) + time.perf_counter() - clock
        clock = time.perf_counter()
        for target, f in zip(targets, found):
            results += result_dicts(f, target["image_id"], dataset.category_ids)
        (own if bar is None else bar).update(len(targets) * engine.world_size())
    own.close()
    model.train(was_training)
    return engine.gather(results)


def result_dicts(found: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[dict]:
    """An image's detections as COCO result dicts, rounded as COCO's own result files are: a full evaluation
    of COCO is a file of 500,000 entries."""
    xywh = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), xywh.tolist())
    return [{"image_id": image_id, "category_id": category_ids[label], "bbox": [round(v, 2) for v in box],
             "score": round(score, 6)} for score, label, box in rows]


@torch.no_grad()
def detect_image(model: torch.nn.Module, image: Image.Image, args: argparse.Namespace,
                 device: torch.device) -> dict[str, Tensor]:
    """Detections on one picture, as `best_boxes` returns them."""
    resized = resize_to_test(image, args)
    with engine.autocast(args, device):
        outputs = model(to_tensor(resized)[None].to(device))
    return best_boxes(outputs, [image.size])[0]


def resize_to_test(image: Image.Image, args: argparse.Namespace) -> Image.Image:
    no_boxes = np.zeros((0, 4)), np.zeros(0, int)
    return Transform(args.image_size)(image, *no_boxes, np.random.default_rng(0))[0]
