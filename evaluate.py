"""Evaluation: COCO AP of a checkpoint, a result file or another detector;
COCO-C; pictures; the paper's tables.

    python evaluate.py runs/NAME/last.pt --data coco                    AP, with the paper's row
    python evaluate.py runs/NAME/last.pt --data coco --corruptions all  COCO-C (Table 4): 1 + 75 passes
    python evaluate.py runs/NAME/last.pt --images a.jpg b.png           boxes drawn on any pictures
    python evaluate.py runs/NAME/last.pt --images a.jpg --attention 3   where three detections looked
    python evaluate.py runs/NAME/last.pt --data coco --figure 6         as Figure 3: clean and corrupted
    python evaluate.py fp-detr-lite.pth --data coco                     an authors' checkpoint
    python evaluate.py --predictions results.json --data coco           any detector's COCO result file
    python evaluate.py --model hf:facebook/detr-resnet-50 --data coco   a detector of transformers
    python evaluate.py --table 2 runs/A runs/B                          runs in the paper's Table 2
"""
import argparse
import contextlib
import copy
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

import engine
from data import (DETECTION_DATA, DetectionSet, Transform, check_convention, corners, detection_set,
                  is_number, pad_batch, read_image, to_tensor, whole)
from engine import InputError, one_line
from extras import pictures, released, tables
from extras.hf import load_hugging_face
from extras.tables import CORRUPTIONS, METRICS
from model import VARIANTS, Config, Detector

# ------------------------------------------------------------------------------------- the metric (4.2)

def coco_metrics(ground_truth_json: str | Path | dict,
                 detections: list[dict] | str | Path) -> dict[str, float]:
    """COCO's box AP.

    Args:
        ground_truth_json: an annotation file in COCO format, or its content.
        detections: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}], or a file with such a
            list.
    Returns:
        {"AP", "AP50", "AP75", "APs", "APm", "APl"} in [0, 1]; -1 where no object has that size.
    """
    return coco_metrics_by_class(ground_truth_json, detections)[0]


def coco_metrics_by_class(ground_truth_json: str | Path | dict,
                          detections: list[dict] | str | Path) -> tuple[dict[str, float], list[dict]]:
    """`coco_metrics`, and for each class {"name", "objects", "AP"}: the number of its objects without
    crowd regions, and its AP, -1 if it has none."""
    from pycocotools.coco import COCO  # imported here, so that --help is fast
    from pycocotools.cocoeval import COCOeval
    if not isinstance(detections, list):
        detections = json.loads(Path(detections).read_bytes())
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO() if isinstance(ground_truth_json, dict) else COCO(str(ground_truth_json))
        if isinstance(ground_truth_json, dict):
            truth.dataset = ground_truth_json
            truth.createIndex()
        unknown = {d["image_id"] for d in detections} - set(truth.getImgIds())
        if unknown:
            raise InputError(f"detections are for another data set: image id {min(unknown)} is not in "
                             f"its annotations")
        if detections:
            results = truth.loadRes([dict(d) for d in detections])
        else:
            results = COCO()
            results.dataset = {**truth.dataset, "annotations": []}
            results.createIndex()
        scores = COCOeval(truth, results, "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    # (IoU thresholds, recalls, classes); all sizes and the most detections per image. -1: no object.
    precision = scores.eval["precision"][:, :, :, 0, -1]
    objects = [a["category_id"] for a in truth.dataset["annotations"] if not a.get("iscrowd")]
    classes = [{"name": truth.cats[id]["name"], "objects": objects.count(id),
                "AP": float(p[p > -1].mean()) if (p > -1).any() else -1.0}
               for id, p in zip(scores.params.catIds, np.moveaxis(precision, 2, 0))]
    return dict(zip(METRICS, (float(v) for v in scores.stats[:6]))), classes


# -------------------------------------------------------------------------------------------- detection

def best_boxes(outputs: dict, sizes: list[tuple[int, int]], top: int = 100) -> list[dict[str, Tensor]]:
    """The `top` best of query x class scores per image, without
    non-maximum suppression (as Deformable DETR).

    Args:
        outputs: "pred_logits" (B, Q, K), "pred_boxes" (B, Q, 4).
        sizes: (width, height) of each original image.
    Returns:
        {"scores": (n,) falling, "labels": (n,) int64, "boxes": (n, 4) xyxy in pixels, clipped to the
        image, "queries": (n,) int64, the query of each} per image.
    Raises:
        InputError: an output is not finite. (The metric would take such boxes for right ones.)
    """
    if not all(outputs[k].isfinite().all() for k in ("pred_logits", "pred_boxes")):
        raise InputError("the outputs of the model are not finite, so it has diverged: train it again "
                         "with a lower --lr")
    K = outputs["pred_logits"].shape[-1]
    scores = outputs["pred_logits"].sigmoid().flatten(1)  # (B, Q K)
    scores, index = scores.topk(min(top, scores.shape[1]))
    detections = []
    for s, i, boxes, (w, h) in zip(scores.cpu(), index.cpu(), outputs["pred_boxes"].cpu(), sizes):
        query, label = i // K, i % K
        xyxy = corners(boxes[query]).clamp(0, 1) * torch.tensor([w, h, w, h])
        detections.append({"scores": s, "labels": label, "boxes": xyxy, "queries": query})
    return detections


@torch.no_grad()
def detect(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace, device: torch.device,
           batch_size: int = 1) -> list[dict]:
    """Detections on a whole set as COCO result dicts. The processes share the work, and each gets the
    whole list."""
    was_training = model.training
    model.eval()
    # GroupNorm in the released layout sees the padding of a batch, so
    # its authors test images one by one.
    if any(isinstance(module, released.ReleasedTokenizer) for module in model.modules()):
        batch_size = 1
    mine = Subset(dataset, range(engine.rank(), len(dataset), engine.world_size()))  # no image twice
    loader = engine.make_loader(mine, pad_batch, args, device, batch_size=batch_size)
    bar = tqdm(total=len(dataset), desc=f"detecting on {dataset.name}", leave=False, unit="img",
               disable=engine.rank() > 0)
    results = []
    for images, mask, targets in loader:
        with engine.autocast(args, device):
            outputs = model(images.to(device), None if mask is None else mask.to(device))
        found = best_boxes(outputs, [t["size"] for t in targets])
        for target, f in zip(targets, found):
            results += result_dicts(f, target["image_id"], dataset.category_ids)
        bar.update(len(targets) * engine.world_size())
    bar.close()
    model.train(was_training)
    return engine.gather(results)


def result_dicts(found: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[dict]:
    """An image's detections as COCO result dicts, rounded like COCO's own result files: a file of all of
    COCO has 500,000 entries."""
    xywh = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), xywh.tolist())
    return [{"image_id": image_id, "category_id": category_ids[label],
             "bbox": [round(v, 2) for v in box], "score": round(score, 6)} for score, label, box in rows]


@torch.no_grad()
def detect_image(model: torch.nn.Module, image: Image.Image, image_size: int = 800,
                 amp: str = "off") -> dict[str, Tensor]:
    """Detections on one RGB picture, as `best_boxes` returns them. image_size: the short side to test
    at, usually that of the training. amp: "bf16" or "off"."""
    device = next(model.parameters()).device
    pixels = to_tensor(resize_to_test(image, image_size))[None].to(device)  # (1, 3, H, W)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        outputs = model(pixels)
    return best_boxes(outputs, [image.size])[0]


def resize_to_test(image: Image.Image, image_size: int) -> Image.Image:
    """The picture at the size of the evaluation."""
    no_boxes, no_labels = np.zeros((0, 4)), np.zeros(0, int)
    return Transform(image_size)(image, no_boxes, no_labels, np.random.default_rng(0))[0]


# ------------------------------------------------------------------------------------- COCO-C (Table 4)

def evaluate_corruptions(model: torch.nn.Module, dataset: DetectionSet, evaluation: dict,
                         args: argparse.Namespace, device: torch.device) -> dict:
    """Evaluates clean images, and the chosen corruptions at the chosen severities. Results are written
    to corruptions.json after each pass, so the same command goes on where it was interrupted.

    Args:
        evaluation: of `describe_evaluation`.
    Returns:
        {"of": evaluation, "clean": metrics, "corruptions": {name: {severity: metrics}}}
    """
    path = args.out / "corruptions.json"
    if engine.rank() == 0:
        locked = engine.open_locked(path.with_suffix(".lock"), "a")  # noqa: F841 (until the end)
    state = start_corruptions(path, {**evaluation, "seed": args.seed,
                                     "frost_dir": str(args.frost_dir or "generated")})
    passes = [("clean", 0)] + [(n, s) for n in args.corruptions for s in args.severities]
    todo = [(n, s) for n, s in passes
            if not (state["clean"] if n == "clean" else str(s) in state["corruptions"].get(n, {}))]
    bar = tqdm(todo, "clean and corrupted", len(passes), initial=len(passes) - len(todo), unit="pass",
               disable=engine.rank() > 0)
    for name, severity in bar:
        bar.set_postfix_str(f"{name} {severity or ''}")
        corrupted = copy.copy(dataset)
        if severity:
            corrupted.corruption = partial(corrupted_picture, name=name, severity=severity,
                                           seed=args.seed, frost_dir=args.frost_dir)
        results = detect(model, corrupted, args, device, args.batch_size)
        if engine.rank() == 0:
            metrics = coco_metrics(dataset.ground_truth, results)
            if severity:
                state["corruptions"].setdefault(name, {})[str(severity)] = metrics
            else:
                state["clean"] = metrics
            engine.write_json(path, state)
    return state


def check_corruptible(dataset: DetectionSet, args: argparse.Namespace) -> None:
    """Finds images that are too small, and missing photographs of frost, before the first pass."""
    small = np.flatnonzero(dataset.annotations.sizes[:args.figure].min(1) < 32)
    if len(small):
        raise InputError(f"image {dataset.name_of(small[0])} is too small for the corruptions, which "
                         f"need 32 pixels a side: take it out of the annotations")
    if args.frost_dir:
        corrupted_picture(Image.new("RGB", (32, 32)), 0, name="frost", severity=1,
                          frost_dir=args.frost_dir)


def corrupted_picture(image: Image.Image, image_id: int, **options) -> Image.Image:
    """One of the corruptions on one picture. Imported at first use, because scipy takes a while."""
    from extras.corruptions import corrupt_seeded
    return corrupt_seeded(image, image_id, **options)


def start_corruptions(path: Path, evaluation: dict) -> dict:
    """The content of corruptions.json if it belongs to this evaluation, else a fresh one. Corrected
    annotations and replaced images start it anew. InputError if anything else differs."""
    fresh = {"of": evaluation, "clean": None, "corruptions": {}}
    if not path.exists():
        return fresh
    state = tables.read_json(path, "evaluate.py --corruptions")
    before = state.get("of", {})
    differ = [k for k in {**before, **evaluation} if before.get(k) != evaluation.get(k)]
    if set(differ) - {"annotations", "images", "bytes"}:
        changes = ", ".join(f"{k} {before.get(k)} (now {evaluation.get(k)})" for k in differ)
        raise InputError(f"{path} holds another evaluation, with {changes}: remove it, or name another "
                         f"folder by --out")
    if differ:
        engine.note(f"annotations or images have changed: {path} is made anew")
    return fresh if differ else state


def report_corruptions(state: dict, paper: str | None, args: argparse.Namespace) -> str:
    """Draws the bar chart and returns the row of Table 4, with mPC and rPC of Michaelis et al. 2019."""
    row, clean = tables.corruption_row(state), 100 * state["clean"]["AP"]
    paper_row = tables.PAPER[4][paper] if paper else None
    pictures.corruption_chart(CORRUPTIONS, row, clean, paper_row, args.out / "corruptions.png")
    rows = [("this model" + tables.notes(4, {**state["of"], **state}), row)]
    rows += [(f"paper, {paper}", paper_row)] if paper else []
    return (f"{tables.markdown('Table 4', tables.HEADERS[4], rows)}\n"
            f"clean AP {tables.cell(clean)}, mean under corruption (mPC) {tables.cell(row[0])}, "
            f"relative (rPC) {tables.cell(100 * row[0] / clean if clean > 0 else tables.NONE)} %")


# --------------------------------------------------------------------------------------------- pictures

def draw_files(model: torch.nn.Module, classes: list[str], args: argparse.Namespace) -> None:
    """--images: prints the detections on each picture and writes them as a picture and as JSON; with
    --attention draws where the best ones looked, too."""
    if len({Path(p).stem for p in args.images}) < len(args.images):
        raise InputError("two of the --images have the same name, and so would their pictures: draw "
                         "them one by one")
    for p in args.images:
        read_image(p)  # finds a broken one before anything is written
    make_folder(args.out)
    for p in args.images:
        name, image = Path(p).stem, read_image(p)
        found = detect_image(model, image, args.image_size, args.amp)
        path = args.out / f"{name}-detections.png"
        pictures.draw_detections(image, found, classes, args.threshold).save(path)
        rows = zip(*(found[k].tolist() for k in ("labels", "scores", "boxes")))
        objects = [{"class": classes[label], "score": round(score, 4), "box": [round(v, 1) for v in box]}
                   for label, score, box in rows if score >= args.threshold]
        engine.write_json(path.with_suffix(".json"), objects)
        print(f"{path} and .json: {len(objects)} objects scoring {args.threshold} or more")
        for o in objects:
            print(f"  {o['score']:.2f} {o['class']}, corners {', '.join(map(str, o['box']))}")
        if args.attention:
            draw_attention(model, image, classes, args, args.out / f"{name}-attention.png")


def draw_attention(model: torch.nn.Module, image: Image.Image, classes: list[str],
                   args: argparse.Namespace, path: Path) -> None:
    """Draws where the `--attention` best detections of different objects looked, layer by layer (3.3:
    positions as visual prompts)."""
    config = model.encoder.config
    with pictures.WatchSampling(model, config.queries) as watch:
        found = detect_image(model, image, args.image_size, args.amp)
    if not watch.layers:
        raise InputError("--attention shows multi-scale deformable attention, and this model has none")
    boxes, shown, shared = found["boxes"].tolist(), [], pictures.overlap
    for i, a in enumerate(boxes):  # the best first; two with an IoU of 0.5 are of the same object
        if all(3 * shared(a, b) < shared(a, a) + shared(b, b) for b in (boxes[j] for j in shown)):
            shown.append(i)
    shown = shown[:args.attention]
    found = {k: v[shown] for k, v in found.items()}
    multiple, size = model.encoder.tokenizer.multiple, resize_to_test(image, args.image_size).size
    padded = tuple(side * (n + -n % multiple) / n for side, n in zip(image.size, size))
    pictures.attention_picture(image, watch.layers, padded, found, classes, config.entry_layer, path)
    print(f"{path}: where the {len(shown)} best detections looked")


FIGURE_CORRUPTIONS = ("gaussian_noise", "motion_blur", "snow")  # with more columns, labels get small


def draw_figure(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace) -> None:
    """--figure N, like Figure 3: a row for each of the first N images, clean
    and corrupted, with their detections."""
    names = args.corruptions or FIGURE_CORRUPTIONS
    severity = args.severities[len(args.severities) // 2]
    cells = []
    for record in dataset.records[:args.figure]:
        for name in (None, *names):
            image = record.image()
            if name is not None:
                image = corrupted_picture(image, record.id, name=name, severity=severity,
                                          seed=args.seed, frost_dir=args.frost_dir)
            found = detect_image(model, image, args.image_size, args.amp)
            cells.append(pictures.draw_detections(image, found, dataset.classes, args.threshold,
                                                  pictures.SHEET))
    titles = ["clean", *(f"{n.replace('_', ' ')} {severity}" for n in names)]
    pictures.sheet_of(cells, columns=len(titles), titles=titles).save(args.out / "figure.png")
    print(f"{args.out / 'figure.png'}: {len(cells)} pictures")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write into {path} ({e.strerror}): choose another --out") from None


# ------------------------------------------------------------------------------------------ the command

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=engine.Help,
                                     allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="*",
                        help="a checkpoint of finetune.py or of the authors; with --table: run folders")
    parser.add_argument("--predictions", metavar="FILE", help="score this COCO result file instead")
    parser.add_argument("--model", metavar="hf:NAME",
                        help="a detector of the transformers package instead")
    parser.add_argument("--data", help=f"{DETECTION_DATA} (default: the checkpoint's)")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="images to evaluate on")
    parser.add_argument("--limit-val", type=engine.positive, help="evaluate on the first N images only")
    parser.add_argument("--image-size", type=engine.positive,
                        help="short side (default: the checkpoint's, else 800)")
    parser.add_argument("--batch-size", type=engine.positive, default=1, help="images per forward pass")
    parser.add_argument("--out", type=Path, help="folder for results and pictures (default: evaluation/ "
                                                 "beside the checkpoint or result file)")
    parser.add_argument("--corruptions", nargs="+", choices=("all", *CORRUPTIONS), metavar="NAME",
                        help="COCO-C (Table 4): evaluate under these corruptions too, or under all; "
                             "goes on where it was interrupted. Names: " + ", ".join(CORRUPTIONS))
    parser.add_argument("--severities", nargs="+", type=int, choices=range(1, 6), metavar="1-5",
                        default=[1, 2, 3, 4, 5], help="of the corruptions (default: all five)")
    parser.add_argument("--frost-dir", type=Path,
                        help="folder with frost1.png ... frost5.jpg of the package imagecorruptions "
                             "(default: generated frost)")
    parser.add_argument("--seed", type=engine.seed_number, default=0, help="of the corruptions")
    parser.add_argument("--images", nargs="+", metavar="FILE",
                        help="draw detections on these pictures; no evaluation")
    parser.add_argument("--attention", type=engine.positive, metavar="N",
                        help="with --images: draw where the N best detections looked, layer by layer")
    parser.add_argument("--figure", type=engine.positive, metavar="N",
                        help="draw the first N images, clean and corrupted, with detections (Figure 3)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score of a drawn box")
    parser.add_argument("--table", type=int, choices=sorted(tables.PAPER),
                        help="print this table of the paper with finished runs below its rows")
    engine.add_device_flags(parser, parser)
    args = parser.parse_args()
    sources = [*args.checkpoint, *filter(None, (args.predictions, args.model))]
    if not args.table and len(sources) != 1:
        parser.error("give one checkpoint, or --predictions, or --model" if not sources else
                     f"only one of {', '.join(sources)} can be evaluated at a time")
    if args.model and not args.model.startswith("hf:"):
        parser.error(f"--model {args.model}: the name must begin with hf:, as in "
                     f"hf:facebook/detr-resnet-50")
    if args.predictions and (args.images or args.figure or args.corruptions):
        parser.error("--images, --figure and --corruptions need a detector, not --predictions")
    if args.images and (args.figure or args.corruptions):
        parser.error("--images evaluates nothing: leave out --figure and --corruptions")
    if args.attention and (args.model or not args.images):
        parser.error("--attention needs a checkpoint of FP-DETR and --images")
    if args.corruptions:
        everything = "all" in args.corruptions
        args.corruptions = list(CORRUPTIONS if everything else dict.fromkeys(args.corruptions))
    args.severities = list(dict.fromkeys(args.severities))
    if not args.table:
        args.checkpoint = args.checkpoint[0] if args.checkpoint else None
        file = args.checkpoint or args.predictions
        name = (args.model or "")[3:].strip("/.").replace("/", "-")
        args.out = args.out or (Path(file).parent if file else Path("runs") / name) / "evaluation"
    return args


def load_detector(path: str | Path,
                  detector: Callable[[Config, int], Detector] = Detector) -> tuple[Detector, dict]:
    """A detector in eval mode from a checkpoint, and the checkpoint. It is ours, made by `detector`, or
    one of the authors'. InputError if it is neither."""
    checkpoint = released.read_checkpoint(path)
    if checkpoint.get("stage") != "finetune":
        raise InputError(f"{path} holds no detector: give a checkpoint of finetune.py or a released one")
    try:
        config = Config(**checkpoint["config"])
        model = released.build_model(detector, config, len(checkpoint["classes"]), checkpoint["layout"])
        made_by = checkpoint.get("model_class", model.made_by)
        if made_by != model.made_by:  # a fork's weights can have our names and shapes
            raise InputError(f"{path} holds a {made_by}, not a {model.made_by}: use the fork that made "
                             f"it, or evaluate.main(detector={made_by})")
        dtype = checkpoint["model"]["encoder.level_embed"].dtype
        model.to(torch.promote_types(dtype, torch.float32)).load_state_dict(checkpoint["model"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path} is not a whole checkpoint of finetune.py: {one_line(e)}") from None
    return model.eval(), checkpoint


def match_classes(dataset: DetectionSet, classes: list[str], checkpoint: str) -> None:
    """Puts the classes of a set into the model's order, by name. InputError if the names differ."""
    unnamed = classes == [f"class {i}" for i in range(len(dataset.classes))]  # in some authors' files
    if dataset.classes == classes or unnamed:
        return
    if sorted(dataset.classes) != sorted(classes) or len(set(classes)) < len(classes):
        differ = ", ".join(sorted(set(dataset.classes) ^ set(classes)))[:200]
        raise InputError(f"{checkpoint} was trained on {len(classes)} classes, {dataset.name} has "
                         f"{len(dataset.classes)}, with other names ({differ}): rename them, or write "
                         f"detections with this set's category ids into a COCO result file and score it "
                         f"by --predictions")
    id_of = dict(zip(dataset.classes, dataset.category_ids))
    dataset.classes, dataset.category_ids = classes, [id_of[name] for name in classes]
    engine.note(f"{dataset.name} has the classes in another order than {checkpoint}: matched by name")


def read_results(path: str, dataset: DetectionSet) -> list[dict]:
    """A COCO result file, checked. Raises InputError at its first bad entry."""
    try:
        results = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"results {path} cannot be read ({e})") from None
    sizes = dict(zip(dataset.annotations.image_ids.tolist(), dataset.annotations.sizes))
    categories = set(dataset.category_ids)
    for i, entry in enumerate(results if isinstance(results, list) else [None]):
        try:
            for key in ("image_id", "category_id"):
                entry[key] = whole(entry[key])
            good = (type(entry["image_id"]) is int and entry["image_id"] in sizes
                    and type(entry["category_id"]) is int and entry["category_id"] in categories
                    and type(entry["bbox"]) is list and len(entry["bbox"]) == 4
                    and all(map(is_number, [*entry["bbox"], entry["score"]]))
                    and min(entry["bbox"][2:]) >= 0)
        except (KeyError, TypeError):
            good = False
        if not good:
            raise InputError(f"results {path}: entry {i} is no detection on {dataset.name}, which needs "
                             f"an image_id and a category_id of it, a bbox [x, y, w, h] and a score")
    # A caption or keypoints would make pycocotools compute something else.
    results = [{k: entry[k] for k in ("image_id", "category_id", "bbox", "score")} for entry in results]
    without = len(set(sizes) - {entry["image_id"] for entry in results})
    if without:
        engine.note(f"results {path}: {without:,} of {len(sizes):,} images have no detection")
    if results:
        boxes = np.array([entry["bbox"] for entry in results])
        try:
            check_convention(boxes, np.array([sizes[entry["image_id"]] for entry in results]),
                             f"results {path}")
        except InputError as e:  # perhaps the detector is just bad
            engine.note(str(e))
    return results


def paper_row(checkpoint: dict, dataset: DetectionSet, limit: int | None) -> str | None:
    """The name of the paper's row for this model and data, or None: the encoder must have the size of a
    variant, and the validation set must be whole."""
    sizes = {k: checkpoint.get("config", {}).get(k) for k in engine.ENCODER_SIZES}
    for name, config in VARIANTS.items():
        row = f"FP-DETR-{name.capitalize()}"
        if sizes == {k: asdict(config)[k] for k in sizes} and row in tables.PAPER[2] and limit is None:
            return row if dataset.name in ("coco val", "cityscapes val") else None
    return None


def describe_evaluation(args: argparse.Namespace, checkpoint: dict, dataset: DetectionSet) -> dict:
    """Which model, data and settings the scores are of. It is written beside them."""
    file = args.checkpoint or args.predictions
    return {"model": args.model or str(Path(file).resolve()),
            "checkpoint": Path(args.checkpoint).name if args.checkpoint else None,
            "step": checkpoint.get("step"), "changed": Path(file).stat().st_mtime if file else None,
            "data": dataset.name, "root": args.data_root, "split": args.split, "limit": args.limit_val,
            "images": len(dataset), "annotations": dataset.digest, "bytes": dataset.bytes,
            "image_size": args.image_size, "amp": args.amp}


def report(results: list[dict], dataset: DetectionSet, evaluation: dict, paper: str | None,
           args: argparse.Namespace) -> None:
    """Writes results.json, metrics.json and detections.png and prints the scores."""
    metrics, classes = coco_metrics_by_class(dataset.ground_truth, results)
    (args.out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    engine.write_json(args.out / "metrics.json", {**evaluation, **metrics, "classes": classes})
    rows = [("this model", tuple(100 * v for v in metrics.values()))]
    if paper:
        number = 5 if dataset.name.startswith("cityscapes") else 2
        first = tables.HEADERS[number].index("AP")
        rows.append((f"paper, {paper}", tables.PAPER[number][paper][first:first + len(METRICS)]))
    by_class = [(c["name"], (c["objects"], 100 * c["AP"])) for c in classes]
    print(f"{tables.markdown('class', ('objects', 'AP'), by_class)}\n\n"
          f"{dataset.name}, {len(dataset)} images, AP in percent\n"
          f"{tables.markdown('', METRICS, rows)}\nresults and pictures: {args.out}")
    pictures.results_sheet(dataset, results).save(args.out / "detections.png")


def main(detector: Callable[[Config, int], Detector] = Detector,
         read_data: Callable[..., DetectionSet] = detection_set) -> None:
    """The command. A fork passes its own detector or data, as in finetune.py."""
    args = parse()
    if args.table:
        print(tables.paper_table(args.table, args.checkpoint))
        return
    if (args.out / "args.json").exists():
        raise InputError(f"{args.out} holds a training run: name another --out")
    device = engine.setup(args)
    model, checkpoint = load_detector(args.checkpoint, detector) if args.checkpoint else (None, {})
    trained = checkpoint.get("args") or {}
    args.image_size = args.image_size or trained.get("image_size", 800)
    if args.images:
        model = model or load_hugging_face(args.model[3:])
        draw_files(model.to(device), checkpoint.get("classes") or model.classes, args)
        return
    if args.data in (None, trained.get("data")):
        args.data_root = args.data_root or trained.get("data_root")
    dataset = read_data(data=args.data or trained.get("data", "coco"), split=args.split,
                        root=args.data_root, limit=args.limit_val, image_size=args.image_size)
    if dataset.annotations.crowd.all():
        engine.note(f"{dataset.name} has no objects, so AP is not defined: {dataset.describe()}")
    if args.predictions:
        results = read_results(args.predictions, dataset)
    elif args.model:
        model = load_hugging_face(args.model[3:], dataset.classes).to(device)
    else:
        match_classes(dataset, checkpoint["classes"], args.checkpoint)
        model.to(device)
    evaluation = describe_evaluation(args, checkpoint, dataset)
    if args.corruptions or args.figure:
        check_corruptible(dataset, args)
    make_folder(args.out)
    paper = paper_row(checkpoint, dataset, args.limit_val)
    if args.figure:
        draw_figure(model, dataset, args)
    elif args.corruptions:
        state = evaluate_corruptions(model, dataset, evaluation, args, device)
        if engine.rank() == 0:
            print(report_corruptions(state, paper if dataset.name == "coco val" else None, args))
    else:
        if model is not None:
            results = detect(model, dataset, args, device, args.batch_size)
        if engine.rank() == 0:
            report(results, dataset, evaluation, paper, args)


if __name__ == "__main__":
    engine.run_script(main)
