"""Evaluation: COCO AP of a checkpoint, a result file or another detector; COCO-C; pictures; the paper's
tables.

    python evaluate.py runs/NAME/last.pt --data coco                    AP, the paper's row beside ours
    python evaluate.py runs/NAME/last.pt --data coco --corruptions all  COCO-C (Table 4): 1 + 75 passes
    python evaluate.py runs/NAME/last.pt --images a.jpg b.png           boxes drawn on any pictures
    python evaluate.py runs/NAME/last.pt --images a.jpg --attention 3   where three detections looked
    python evaluate.py runs/NAME/last.pt --data coco --figure 6         as Figure 3: clean and corrupted
    python evaluate.py fp-detr-lite.pth --data coco                     a released checkpoint is recognised
    python evaluate.py --predictions results.json --data coco           any detector's COCO result file
    python evaluate.py --model hf:facebook/detr-resnet-50 --data coco   a detector of transformers
    python evaluate.py --table 2 runs/A runs/B                          finished runs as the paper's Table 2
"""
import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
import engine
from coco import is_number
from corruptions import NAMES, corrupt_seeded
from data import DetectionSet, detection_set
from hf import load_hugging_face
from images import read_image, to_tensor
from inference import METRICS, Scorer, best_boxes, coco_metrics, detect, detect_image, resize_to_test
from model import Config, Detector, InputError, pad_to_multiple
from pictures import Watch, attention_picture, corruption_chart, draw, grid, picture_results
from report import markdown, read_json, write_json
from tables import HEADERS, PAPER, corruption_row, paper_table

FIGURE_CORRUPTIONS = ("gaussian_noise", "motion_blur", "snow", "contrast", "jpeg_compression")


# ------------------------------------------------------------------------------------------ COCO-C (Table 4)

def evaluate_corruptions(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace,
                         device: torch.device) -> dict:
    """The clean pass and one per corruption and severity; what is measured is kept in corruptions.json after
    each, so that an interrupted evaluation goes on where it was.

    Returns:
        {"of": what was evaluated, "clean": metrics, "corruptions": {name: {severity: metrics}}, "seconds":
        {"model", "data", "metric"}: waited for each, "memory": peak MiB after each pass}
    """
    path, state = args.out / "corruptions.json", start_corruptions(args, dataset)
    passes = [("clean", 0)] + [(n, s) for n in args.corruptions for s in args.severities]
    todo = [(n, s) for n, s in passes if not (state["clean"] if n == "clean" else
                                              str(s) in state["corruptions"].get(n, {}))]
    bar = tqdm(total=len(passes) * len(dataset), initial=(len(passes) - len(todo)) * len(dataset),
               unit="img", desc="clean and corrupted", disable=engine.rank() > 0, smoothing=0.05)
    scorer, waiting = Scorer(dataset.ground_truth, args.workers), []

    def keep(count: int) -> None:
        """Waits for the metric until at most `count` passes are left without."""
        clock = time.perf_counter()
        while len(waiting) > count:
            name, severity, future = waiting.pop(0)
            if name == "clean":
                state["clean"] = future.result()
            else:
                state["corruptions"].setdefault(name, {})[str(severity)] = future.result()
            state["memory"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            write_json(path, state)
        state["seconds"]["metric"] += time.perf_counter() - clock

    for name, severity in todo:
        bar.set_postfix_str(f"{name} {severity or ''}")
        corrupted = copy.copy(dataset)
        if severity:
            corrupted.corruption = partial(corrupt_seeded, name=name, severity=severity, seed=args.seed,
                                           frost_dir=args.frost_dir)
        results = detect(model, corrupted, args, device, args.batch_size, bar, state["seconds"])
        if not engine.rank():
            clock = time.perf_counter()
            waiting.append((name, severity, scorer.submit(results)))
            state["seconds"]["metric"] += time.perf_counter() - clock
            keep(count=1)
    keep(count=0)
    bar.close()
    return state


def start_corruptions(args: argparse.Namespace, dataset: DetectionSet) -> dict:
    """The content of corruptions.json if it is of the same evaluation, else a fresh one."""
    path, of = args.out / "corruptions.json", {
        "model": args.model or args.checkpoint, "data": dataset.name, "images": len(dataset),
        "image_size": args.image_size, "seed": args.seed, "frost_dir": str(args.frost_dir or "generated")}
    if args.checkpoint:  # a checkpoint that was trained further is another one
        of["changed"] = Path(args.checkpoint).stat().st_mtime
    if path.exists():
        state = read_json(path, "evaluate.py --corruptions")
        if state.get("of") != of:
            raise InputError(f"{path} holds another evaluation, of {state.get('of')}: remove it, or name "
                             f"another folder by --out")
        return state
    return {"of": of, "clean": None, "corruptions": {}, "memory": [],
            "seconds": {"model": 0.0, "data": 0.0, "metric": 0.0}}


def report_corruptions(state: dict, paper: str | None, args: argparse.Namespace) -> str:
    """Draws the bar chart and returns what to print: the row of Table 4, and how far AP fell."""
    row, clean = corruption_row(state), 100 * state["clean"]["AP"]
    rows = {"this model": row, **({f"paper, {paper}": PAPER[4][paper]} if paper else {})}
    corruption_chart(NAMES, row, clean, PAPER[4][paper] if paper else None, args.out / "corruptions.png")
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in state["seconds"].items())
    passes = sum(map(len, state["corruptions"].values()))
    partial_mean = "" if passes == 5 * len(NAMES) else (
        f", of {passes} of the {5 * len(NAMES)} corruptions and severities only")
    return (f"{markdown('Table 4', HEADERS[4], list(rows.items()))}\n"
            f"clean AP {clean:.1f}, mean under corruption (mPC) {row[0]:.1f}, "
            f"relative (rPC) {100 * row[0] / clean if clean else 0:.1f} %{partial_mean}\n"
            f"waited for: {seconds}; peak memory {state['memory'][0]} MiB after the first pass, "
            f"{state['memory'][-1]} MiB after the last")


# -------------------------------------------------------------------------------------------------- pictures

def draw_files(model: torch.nn.Module, classes: list[str], args: argparse.Namespace,
               device: torch.device) -> None:
    """--images: detects on picture files and writes each, with its boxes, into the output folder; with
    --attention also where its best detections looked."""
    # all read before any is written
    pictures = {Path(p).stem: read_image(p) for p in args.images}
    if len(pictures) < len(args.images):
        raise InputError("two of the --images have the same name, and so would their pictures: draw them "
                         "one by one")
    make_folder(args.out)
    for name, image in pictures.items():
        found = detect_image(model, image, args, device)
        draw(image, found, classes, args.threshold).save(args.out / f"{name}-detections.png")
        print(f"{args.out / name}-detections.png: {int((found['scores'] >= args.threshold).sum())} objects")
        if args.attention:
            draw_attention(model, image, classes, args, device, args.out / f"{name}-attention.png")


@torch.no_grad()
def draw_attention(model: torch.nn.Module, image: Image.Image, classes: list[str], args: argparse.Namespace,
                   device: torch.device, path: Path) -> None:
    """Where the `--attention` best detections on a picture looked, layer by layer (3.3: positions as visual
    prompts)."""
    config, pixels = model.encoder.config, to_tensor(resize_to_test(image, args))[None].to(device)
    with Watch(model, config.queries) as watch, engine.autocast(args, device):
        found = best_boxes(model(pixels), [image.size])[0]
    once = sorted({q: i for i, q in reversed(list(enumerate(found["queries"].tolist())))}.values())
    found = {k: v[once[:args.attention]] for k, v in found.items()}  # a query may be there with two classes
    h, w = pixels.shape[-2:]
    padded_h, padded_w = pad_to_multiple(pixels, None, model.encoder.tokenizer.multiple)[0].shape[-2:]
    padded = (image.width * padded_w / w, image.height * padded_h / h)
    attention_picture(image, watch.layers, padded, found, classes, config.entry_layer, path)
    print(f"{path}: where the {len(found['queries'])} best detections looked")


def draw_figure(model: torch.nn.Module, dataset: DetectionSet, args: argparse.Namespace,
                device: torch.device) -> None:
    """--figure N, like Figure 3: a row for each of the first N images, clean and corrupted, with what is
    detected."""
    names, severity = args.corruptions or FIGURE_CORRUPTIONS, args.severities[len(args.severities) // 2]
    cells = []
    for record in dataset.records[:args.figure]:
        image = record.image()
        for name in (None, *names):
            seen = image if name is None else corrupt_seeded(
                image, record.id, name=name, severity=severity, seed=args.seed, frost_dir=args.frost_dir)
            found = detect_image(model, seen, args, device)
            cells.append(draw(seen, found, dataset.classes, args.threshold))
    titles = ["clean", *(f"{n.replace('_', ' ')} {severity}" for n in names)]
    grid(cells, columns=len(titles), titles=titles).save(args.out / "figure.png")
    print(f"{args.out / 'figure.png'}: {len(cells)} pictures")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write into {path} ({e.strerror}): choose another --out") from None


# --------------------------------------------------------------------------------------------------- command

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=engine.Help)
    parser.add_argument("checkpoint", nargs="*", help="a checkpoint of finetune.py or of the authors; with "
                                                      "--table: run folders")
    parser.add_argument("--predictions", metavar="FILE", help="score this COCO result file instead")
    parser.add_argument("--model", metavar="hf:NAME", help="a detector of the transformers package instead")
    engine.add_data_flags(parser, f"{engine.DETECTION_DATA} (default: what the checkpoint was trained on)")
    parser.set_defaults(data=None, image_size=None)
    parser.add_argument("--batch-size", type=engine.positive, default=1, help="images per forward pass")
    parser.add_argument("--out", type=Path, help="folder for results and pictures (default: evaluation/ "
                                                 "beside the checkpoint or result file)")
    parser.add_argument("--corruptions", nargs="+", choices=("all", *NAMES), metavar="NAME",
                        help="COCO-C (Table 4): evaluate under these corruptions, or all, as well; goes on "
                             "where it was interrupted. Names: " + ", ".join(NAMES))
    parser.add_argument("--severities", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5],
                        metavar="1-5", help="of the corruptions (default: all five)")
    parser.add_argument("--frost-dir", type=Path,
                        help="folder with frost1.png ... frost5.jpg of the package imagecorruptions "
                             "(default: generated frost)")
    parser.add_argument("--images", nargs="+", metavar="FILE",
                        help="draw detections on these pictures; no evaluation")
    parser.add_argument("--attention", type=engine.positive, metavar="N",
                        help="with --images: draw where the N best detections looked, layer by layer")
    parser.add_argument("--figure", type=engine.positive, metavar="N",
                        help="draw the first N images, clean and corrupted, with detections (Figure 3)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score of a box that is drawn")
    parser.add_argument("--table", type=int, choices=sorted(PAPER),
                        help="print this table of the paper with finished runs below its rows")
    args = parser.parse_args()
    sources = [*args.checkpoint, *filter(None, (args.predictions, args.model))]
    if not args.table and len(sources) != 1:
        parser.error("give one checkpoint, or --predictions, or --model" if not sources else
                     f"only one of {', '.join(sources)} can be evaluated at a time")
    if args.model and not args.model.startswith("hf:"):
        parser.error(f"--model {args.model}: the name must begin with hf:, as hf:facebook/detr-resnet-50")
    if args.predictions and (args.images or args.figure or args.corruptions):
        parser.error("--images, --figure and --corruptions need a detector, not --predictions")
    if args.attention and (args.model or not args.images):
        parser.error("--attention needs a checkpoint of FP-DETR and --images")
    if args.corruptions and "all" in args.corruptions:
        args.corruptions = list(NAMES)
    if not args.table:
        args.checkpoint = args.checkpoint[0] if args.checkpoint else None
        named = f"runs/{args.model[3:].strip('/.').replace('/', '-')}/-" if args.model else None
        beside = args.checkpoint or args.predictions or named
        args.out = args.out or Path(beside).parent / "evaluation"
    return args


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


def main(detector: Callable[[Config, int], Detector] = Detector,
         read_data: Callable[..., DetectionSet] = detection_set) -> None:
    """The command. A fork gives what makes its own detectors, or what reads its own data, as in
    finetune.py."""
    args = parse()
    if args.table:
        print(paper_table(args.table, args.checkpoint))
        return
    device = engine.setup(args)
    model, info = checkpoints.load_detector(args.checkpoint, detector) if args.checkpoint else (None, {})
    trained = info.get("args", {})
    args.image_size = args.image_size or trained.get("image_size", 800)
    if args.images:
        model = model or load_hugging_face(args.model[3:])
        return draw_files(model.to(device), info.get("classes") or model.classes, args, device)
    dataset = read_data(data=args.data or trained.get("data", "coco"), split=args.split,
                        root=args.data_root or trained.get("data_root"), limit=args.limit_val,
                        image_size=args.image_size, cache=args.out)
    if args.predictions:
        results = read_results(args.predictions, dataset)
    elif args.model:
        model = load_hugging_face(args.model[3:], dataset.classes)
    else:
        check_classes(dataset, info["classes"], args.checkpoint)
    if model is not None:
        model.to(device)
        engine.check_images(dataset)
    if args.frost_dir:  # missing photographs show now
        corrupt_seeded(Image.new("RGB", (32, 32)), 0, "frost", 1, frost_dir=args.frost_dir)
    make_folder(args.out)
    if args.figure:
        return draw_figure(model, dataset, args, device)
    variant = checkpoints.variant_of(info["config"]) if info else ""
    paper = f"FP-DETR-{variant.capitalize()}"
    if dataset.name not in ("coco val", "cityscapes val") or args.limit_val or paper not in PAPER[2]:
        paper = None
    if args.corruptions:
        state = evaluate_corruptions(model, dataset, args, device)
        if not engine.rank():
            print(report_corruptions(state, paper if dataset.name == "coco val" else None, args))
        return
    if model is not None:
        results = detect(model, dataset, args, device, args.batch_size)
    if not engine.rank():
        report(results, dataset, paper, args)


def report(results: list[dict], dataset: DetectionSet, paper: str | None, args: argparse.Namespace) -> None:
    """Writes results.json, metrics.json and detections.png and prints the table."""
    metrics = coco_metrics(dataset.ground_truth, results)
    (args.out / "results.json").write_text(json.dumps(results))
    write_json(args.out / "metrics.json", {"data": dataset.name, "images": len(dataset), **metrics})
    picture_results(dataset, results).save(args.out / "detections.png")
    number = 5 if dataset.name.startswith("cityscapes") else 2
    rows = {"this model": tuple(100 * v for v in metrics.values())}
    if paper:
        first = HEADERS[number].index("AP")
        rows[f"paper, {paper}"] = PAPER[number][paper][first:first + len(METRICS)]
    print(f"{dataset.name}, {len(dataset)} images, AP in percent\n"
          f"{markdown('', METRICS, list(rows.items()))}\nresults and pictures: {args.out}")


if __name__ == "__main__":
    engine.run_script(main)
