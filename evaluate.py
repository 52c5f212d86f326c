"""Evaluation: COCO AP of a checkpoint, or of any COCO result file, and pictures of what a detector finds.

    python evaluate.py runs/NAME/last.pt --data coco            one table, the paper's row beside ours;
    results.json
    python evaluate.py runs/NAME/last.pt --images a.jpg b.png   boxes with class names and scores, drawn on
    any pictures
    python evaluate.py fp-detr-lite.pth --data coco             a released checkpoint is recognised
"""
import argparse
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import engine
from data import DetectionSet, Transform, detection_set, is_number, pad_batch, read_image, to_tensor
from model import InputError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PAPER = {  # COCO 2017 val, Table 2
    "lite": (37.2, 56.5, 40.4, 21.7, 40.0, 48.6),
    "small": (42.5, 62.6, 45.9, 25.3, 45.5, 56.9),
    "base": (43.3, 63.9, 47.7, 27.5, 46.1, 57.0),
}


def coco_metrics(ground_truth_json: str | Path | dict,
                 detections: list[dict] | str | Path) -> dict[str, float]:
    """COCO's box AP, by pycocotools.

    Args:
        ground_truth_json: an annotation file in COCO format, or its content.
        detections: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}], or a file that holds such a
            list.
    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl"} in [0, 1]; -1 where there is no object of that size.
    """
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


def best_boxes(outputs: dict, sizes: list[tuple[int, int]], top: int = 100) -> list[dict[str, Tensor]]:
    """A detector's outputs -> per image the `top` best of query x class scores (no suppression of
    neighbours).

    Args:
        outputs: "pred_logits" (B, Q, K), "pred_boxes" (B, Q, 4). sizes: (width, height) of each original
            image.
    Returns:
        {"scores": (n,) falling, "labels": (n,) int64, "boxes": (n, 4) xyxy in pixels, clipped to the image}
        per image.
    """
    K = outputs["pred_logits"].shape[-1]
    scores = outputs["pred_logits"].sigmoid().flatten(1)  # (B, Q K)
    scores, index = scores.topk(min(top, scores.shape[1]))
    detections = []
    for s, i, boxes, (w, h) in zip(scores.cpu(), index.cpu(), outputs["pred_boxes"].cpu(), sizes):
        centre, half = boxes[i // K].split(2, -1)[0], boxes[i // K].split(2, -1)[1] / 2
        corners = torch.cat([centre - half, centre + half], -1).clamp(0, 1) * torch.tensor([w, h, w, h])
        detections.append({"scores": s, "labels": i % K, "boxes": corners})
    return detections


@torch.no_grad()
def detect(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace, device: torch.device,
           batch_size: int = 1) -> list[dict]:
    """Detections on a whole set as COCO result dicts, the work split over the processes and gathered in all
    of them."""
    was_training = model.training
    model.eval()
    mine = Subset(dataset, range(engine.rank(), len(dataset), engine.world_size()))  # no image twice
    loader = DataLoader(mine, batch_size, num_workers=args.workers, collate_fn=pad_batch)
    results = []
    for images, mask, targets in tqdm(loader, f"detecting on {dataset.name}", leave=False, unit="batch",
                                      disable=engine.rank() > 0):
        with engine.autocast(args, device):
            outputs = model(images.to(device), None if mask is None else mask.to(device))
        for target, found in zip(targets, best_boxes(outputs, [t["size"] for t in targets])):
            xywh = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
            for score, label, box in zip(found["scores"].tolist(), found["labels"].tolist(), xywh.tolist()):
                # Rounded as COCO's own result files are; a full evaluation of COCO is a file of 500,000
                # entries.
                results.append({"image_id": target["image_id"], "category_id": dataset.category_ids[label],
                                "bbox": [round(v, 2) for v in box], "score": round(score, 6)})
    model.train(was_training)
    return engine.gather(results)


def table(rows: dict[str, tuple | list]) -> str:
    """Rows of METRICS in percent, under one header."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{m:>8}" for m in METRICS)]
    for name, values in rows.items():
        lines.append(f"{name:<{width}}" + "".join("       -" if v < 0 else f"{v:8.1f}" for v in values))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- pictures

def colour_of(label: int) -> tuple[int, int, int]:
    """Distinct bright colours for neighbouring labels, by steps of the golden ratio around the colour
    circle."""
    k = (np.array([5, 3, 1]) + label * 0.618034 * 6) % 6
    return tuple(int(v) for v in 255 * (1 - 0.85 * np.clip(np.minimum(k, 4 - k), 0, 1)))


def draw(image: Image.Image, found: dict[str, Tensor], classes: list[str],
         threshold: float = 0.3) -> Image.Image:
    """A copy of a picture with the boxes that score at least `threshold`, their class names and scores."""
    scale = max(1, round(400 / max(image.size)))  # small pictures are enlarged, so that the text can be read
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, line = ImageDraw.Draw(picture), max(2, max(picture.size) // 300)
    font = ImageFont.load_default(max(11, max(picture.size) // 30))
    rows = zip(*(found[k].tolist() for k in ("scores", "labels", "boxes")))
    for score, label, box in reversed(list(rows)):  # the best is drawn last, on top
        if score < threshold:
            continue
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle((x0, y0, x1, y1), outline=colour_of(label), width=line)
        text = f"{classes[label]} {score:.2f}"
        left, top, right, bottom = pen.textbbox((x0 + line, y0 + line), text, font=font)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=(0, 0, 0))
        pen.text((x0 + line, y0 + line), text, font=font, fill=colour_of(label))
    return picture


def grid(pictures: list[Image.Image], columns: int = 4, cell: int = 400) -> Image.Image:
    """One sheet of pictures, each shrunk to at most `cell` pixels a side."""
    pictures = [ImageOps.contain(p, (cell - 8, cell - 8)) for p in pictures]
    columns, height = min(columns, len(pictures)), max(p.height for p in pictures) + 8
    sheet = Image.new("RGB", (columns * cell, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * cell + 4, i // columns * height + 4))
    return sheet


def picture_results(dataset: DetectionSet, results: list[dict], count: int = 8) -> Image.Image:
    """The first `count` images of a set with the detections that COCO result dicts hold for them."""
    label_of = {c: i for i, c in enumerate(dataset.category_ids)}
    pictures = []
    for record in dataset.records[:count]:
        mine = sorted((r for r in results if r["image_id"] == record.id), key=lambda r: -r["score"])
        boxes = torch.tensor([r["bbox"] for r in mine]).reshape(-1, 4)
        found = {"scores": torch.tensor([r["score"] for r in mine]),
                 "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
                 "labels": torch.tensor([label_of[r["category_id"]] for r in mine], dtype=torch.int64)}
        pictures.append(draw(record.image(), found, dataset.classes))
    return grid(pictures)


@torch.no_grad()
def draw_files(model: torch.nn.Module, classes: list[str], args: argparse.Namespace,
               device: torch.device) -> None:
    """--images: detects on picture files and writes each, with its boxes, into the output folder."""
    # all read before any is written
    pictures = {f"{Path(p).stem}-detections.png": read_image(p) for p in args.images}
    if len(pictures) < len(args.images):
        raise InputError("two of the --images have the same name, and so would their pictures: draw them "
                         "one by one")
    make_folder(args.out)
    for name, image in pictures.items():
        no_boxes = np.zeros((0, 4)), np.zeros(0, int)
        resized = Transform(args.image_size)(image, *no_boxes, np.random.default_rng(0))[0]
        with engine.autocast(args, device):
            outputs = model(to_tensor(resized)[None].to(device))
        found = best_boxes(outputs, [image.size])[0]
        draw(image, found, classes, args.threshold).save(args.out / name)
        print(f"{args.out / name}: {int((found['scores'] >= args.threshold).sum())} objects")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write into {path} ({e.strerror}): choose another --out") from None


# --------------------------------------------------------------------------------------------------- command

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint",
                        help="a checkpoint of finetune.py or of the authors, or a COCO result file (.json)")
    engine.add_data_flags(parser)
    parser.set_defaults(data=None, image_size=None)
    parser.add_argument("--images", nargs="+", metavar="FILE",
                        help="draw detections on these pictures; no evaluation")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score of a box that is drawn")
    parser.add_argument("--out", type=Path,
                        help="folder for results.json and pictures (default: evaluation/ beside the "
                             "checkpoint)")
    parser.add_argument("--batch-size", type=engine.positive, default=1, help="images per forward pass")
    return parser.parse_args()


def check_classes(dataset: DetectionSet, classes: list[str], checkpoint: str) -> None:
    if len(dataset.classes) != len(classes):
        raise InputError(f"{checkpoint} was trained on {len(classes)} classes, {dataset.name} has "
                         f"{len(dataset.classes)}: evaluate it on the data it was trained for")
    if dataset.classes != classes:
        print(f"note: class names differ: {checkpoint} has {', '.join(classes[:5])} ..., {dataset.name} has "
              f"{', '.join(dataset.classes[:5])} ...")


def read_results(path: str, dataset: DetectionSet) -> list[dict]:
    """A COCO result file, checked. Raises InputError at its first bad entry."""
    try:
        results = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"results {path} cannot be read ({e})") from None
    images, categories = {r.id for r in dataset.records}, set(dataset.category_ids)
    for i, entry in enumerate(results if isinstance(results, list) else [None]):
        if not (isinstance(entry, dict) and type(entry.get("image_id")) is int
                and entry["image_id"] in images
                and type(entry.get("category_id")) is int and entry["category_id"] in categories
                and is_number(entry.get("score")) and isinstance(entry.get("bbox"), list)
                and len(entry["bbox"]) == 4
                and all(map(is_number, entry["bbox"])) and min(entry["bbox"][2:]) >= 0):
            raise InputError(f"results {path}: entry {i} is no detection on {dataset.name}, which needs an "
                             f"image_id and a category_id of it, a bbox [x, y, w, h] and a score")
    return results


def main() -> None:
    args = parse()
    device = engine.setup(args)
    args.out = args.out or Path(args.checkpoint).parent / "evaluation"
    info, model = {}, None
    if not args.checkpoint.endswith(".json"):
        model, info = engine.load_detector(args.checkpoint)
        model.to(device)
    trained = info.get("args", {})
    args.image_size = args.image_size or trained.get("image_size", 800)
    if args.images:
        if model is None:
            raise InputError(f"{args.checkpoint} holds results; --images needs a checkpoint")
        return draw_files(model, info["classes"], args, device)
    dataset = detection_set(args.data or trained.get("data", "coco"), args.split,
                            args.data_root or trained.get("data_root"), args.limit_val, args.image_size)
    if model is not None:
        check_classes(dataset, info["classes"], args.checkpoint)
        engine.check_images(dataset)
    results = read_results(args.checkpoint, dataset) if model is None else []
    make_folder(args.out)
    if model is not None:
        results = detect(model, dataset, args, device, args.batch_size)
    if engine.rank():
        return
    metrics = coco_metrics(dataset.ground_truth, results)
    (args.out / "results.json").write_text(json.dumps(results))
    (args.out / "metrics.json").write_text(json.dumps({"data": dataset.name, "images": len(dataset),
                                                       **metrics}, indent=1))
    picture_results(dataset, results).save(args.out / "detections.png")
    rows = {"this model": [100 * v for v in metrics.values()]}
    variant = engine.variant_of(info["config"]) if info else None
    if dataset.name == "coco val" and args.limit_val is None and variant in PAPER:
        rows[f"paper, FP-DETR-{variant.capitalize()}"] = PAPER[variant]
    print(f"{dataset.name}, {len(dataset)} images, AP in percent\n{table(rows)}\nresults and pictures: "
          f"{args.out}")


if __name__ == "__main__":
    engine.run_script(main)
