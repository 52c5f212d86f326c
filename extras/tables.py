"""The paper's tables: its numbers, and finished runs of ours below them, as Markdown.

    python evaluate.py --table 2 runs/finetune-lite-coco runs/finetune-small-coco

Figures are in percent, as in the paper. "-" stands where there is none or the print cannot be read.
The rows of our runs are read from their files: metrics.json, evaluation/metrics.json,
evaluation/corruptions.json.
"""
import json
import statistics
from itertools import combinations
from pathlib import Path

from engine import InputError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CORRUPTIONS = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur",
               "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast",
               "elastic_transform", "pixelate", "jpeg_compression")  # the columns of Table 4
NONE = float("nan")  # no figure

# ---------------------------------------------------------------------------------- the paper's numbers

TABLE_1 = {  # pre-training on ImageNet-1k: epochs, top-1, millions of parameters
    "FP-DETR-Lite": (300, 77.3, 11),
    "FP-DETR-Small": (300, 80.8, 23),
    "FP-DETR-Base": (300, 82.0, 35),
}
TABLE_2 = {  # COCO 2017 val: epochs, the six METRICS, millions of parameters
    "DETR R50": (500, 42.0, 62.4, 44.2, 20.5, 45.8, 61.1, 41),
    "UP-DETR R50": (300, 42.8, 63.0, 45.3, 20.8, 47.1, 61.7, 41),
    "Conditional DETR R50": (50, 40.9, 61.8, 43.3, 20.8, 44.6, 59.2, 44),
    "Deformable DETR R18": (50, 40.1, 58.4, 43.7, 22.0, 43.4, 53.0, 23),
    "Deformable DETR R34": (50, 42.3, 60.7, 46.0, 24.2, 45.8, 56.1, 33),
    "Deformable DETR R50": (50, 43.8, 62.6, 47.7, 26.4, 47.1, 58.0, 40),
    "YOLOS-S": (150, 36.1, 56.5, 37.1, 15.3, 38.5, 56.2, 31),
    "YOLOS-B": (150, 42.0, 62.2, 44.5, 19.5, 45.3, 62.1, 127),
    "FP-DETR-Lite": (50, 37.2, 56.5, 40.4, 21.7, 40.0, 48.6, 11),
    "FP-DETR-Small": (50, 42.5, 62.6, 45.9, 25.3, 45.5, 56.9, 24),
    "FP-DETR-Base": (50, 43.3, 63.9, 47.7, 27.5, 46.1, 57.0, 36),
    "FP-DETR-Base, ImageNet-21k": (50, 43.7, 64.1, 47.8, 26.5, 46.7, 58.2, 36),  # of Table 8
}
TABLE_3 = {  # task adaptor of FP-DETR-Lite: shared by all layers?, METRICS, parameters
    "none": ("-", 32.8, 50.9, 35.2, 18.2, 35.8, 43.6, 11),
    "Bi-LSTM, per layer": ("no", 34.6, 52.9, 37.3, 19.1, 38.1, NONE, 11),
    "Bi-LSTM": ("yes", 34.9, 53.0, 37.5, 20.2, 38.0, 46.9, 11),
    "self-attention, per layer": ("no", 36.8, 56.0, 39.5, 20.9, 39.8, 49.1, 12),
    "self-attention": ("yes", 37.2, 56.5, 40.4, 21.7, 40.0, 48.6, 11),
}
TABLE_4 = {  # COCO-C: the mean over 15 corruptions (mPC), then each of them, averaged over five severities
    "DETR":
        (19.1, 16.8, 16.5, 12.7, 20.0, 13.8, 17.7, 6.5, 16.4, 21.4, 29.0, NONE, 18.8, 23.2, 18.3, 19.8),
    "UP-DETR":
        (21.6, 22.1, 22.2, 18.7, 20.1, 13.4, 18.3, 6.9, 19.3, 24.2, 31.6, 36.9, 21.4, 23.0, 20.7, 24.6),
    "Conditional DETR":
        (20.3, 18.6, 18.6, 16.0, 20.5, 14.8, 18.4, 7.1, 18.2, 22.9, 30.0, 34.7, 20.6, 24.0, 19.4, 20.5),
    "Deformable DETR":
        (20.7, 19.8, 19.6, 16.4, 20.1, 13.8, 17.9, 6.6, 18.3, 23.6, 31.7, 37.0, 21.2, 24.0, 19.3, 21.0),
    "YOLOS-S":
        (18.9, 15.3, 15.1, 14.0, 19.4, 15.7, 20.2, 7.1, 17.7, 21.2, 26.5, 29.5, 19.7, 22.8, 17.1, 21.8),
    "FP-DETR-Lite":
        (18.9, 17.0, 17.0, 15.2, 18.6, 15.1, 17.5, 6.5, 18.2, 22.7, 28.4, 32.5, 20.5, 21.3, 14.8, 18.2),
    "FP-DETR-Small":
        (22.8, 20.3, 20.3, 18.1, 22.3, 18.3, 21.2, 8.0, 22.9, 27.1, 33.1, 37.3, 25.0, 25.5, 20.2, 23.1),
    "FP-DETR-Base":
        (23.7, 22.5, 22.7, 20.4, 22.9, 18.9, 21.7, 8.0, 22.4, 27.1, 33.4, 38.0, 25.3, 26.1, 20.0, 25.6),
}
TABLE_5 = {  # Cityscapes: epochs, METRICS as mean and deviation of five seeds, parameters
    "DETR": (300, "15.9±0.9", "34.8±1.6", "12.7±1.0", "2.9±0.1", "13.5±0.7", "33.8±2.1", 41),
    "UP-DETR": (300, "23.8±1.3", "45.7±2.2", "20.8±1.2", "4.0±0.5", "20.3±1.9", "46.6±1.9", 41),
    "Conditional DETR": (150, "21.1±0.7", "42.7±1.3", "18.8±1.6", "3.6±0.3", "19.8±0.3", "41.1±1.0", 44),
    "Deformable DETR": (50, "27.3±0.6", "49.2±0.6", "26.3±0.8", "8.7±0.2", "28.2±0.8", "45.7±0.7", 40),
    "YOLOS-S": (150, "9.8±0.1", "25.3±0.4", "6.1±0.4", "1.9±0.2", "8.1±0.4", "20.7±0.4", 31),
    "FP-DETR-Lite": (50, "26.7±0.6", "49.1±0.8", "25.7±0.7", "9.7±0.7", "28.6±0.6", "42.8±0.7", 11),
    "FP-DETR-Small": (50, "28.6±0.2", "52.0±0.6", "26.9±0.8", "10.1±0.6", "30.2±0.6", "46.3±0.7", 24),
    "FP-DETR-Base": (50, "29.6±0.5", "53.6±0.9", "28.4±0.4", "11.2±0.7", "30.9±0.8", "47.4±1.2", 36),
}
TABLE_7 = {  # encoder-decoder (A.2): class tokens, ImageNet-1k top-1, METRICS, parameters
    "FP-EncDec, 1 class token": (1, 72.0, 33.1, 51.8, 35.7, 17.9, 35.9, 43.4, 12),
    "FP-EncDec, 300 class tokens": (300, 76.4, 35.2, 54.0, 37.9, 20.9, 38.1, 47.0, 12),
    "FP-DETR-Lite": (1, 77.3, 37.2, 56.5, 40.4, 21.7, 40.0, 48.6, 11),
}
TABLE_8 = {  # pre-training on ImageNet-1k and, "21k", on ImageNet-21k-P: epochs, METRICS, parameters
    "Deformable DETR R50": TABLE_2["Deformable DETR R50"],
    "Deformable DETR R50, 21k": (50, 42.9, 62.1, 46.6, 25.1, 46.3, 57.7, 40),
    "FP-DETR-Base": TABLE_2["FP-DETR-Base"],
    "FP-DETR-Base, 21k": TABLE_2["FP-DETR-Base, ImageNet-21k"],
}
HEADERS = {1: ("epochs", "top-1", "params (M)"), 2: ("epochs", *METRICS, "params (M)"),
           3: ("shared", *METRICS, "params (M)"), 4: ("mean", *CORRUPTIONS),
           5: ("epochs", *METRICS, "params (M)"), 7: ("tokens", "top-1", *METRICS, "params (M)"),
           8: ("epochs", *METRICS, "params (M)")}
PAPER = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5, 7: TABLE_7, 8: TABLE_8}
WHOLE = {1: ("imagenet val", 50_000), 5: ("cityscapes val", 500)}  # data and images of Tables 1 and 5
COCO = ("coco val", 5000)  # of all others


# --------------------------------------------------------------------------------------------- Markdown

def cell(value: object) -> str:
    """A figure as the paper prints it."""
    if isinstance(value, float):
        return "-" if value != value or value < 0 else f"{value:.1f}"
    return str(value)


def mean_and_deviation(values: list[float]) -> str:
    """Values in [0, 1] -> "mean±deviation" in percent (Table 5), with the sample's deviation (n - 1)."""
    if min(values) < 0:
        return "-"  # the metric gives -1 for a size that no object has
    values = [100 * v for v in values]
    deviation = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def markdown(first: str, header: tuple[str, ...], rows: list[tuple[str, tuple]]) -> str:
    """A Markdown table with aligned columns, so that it reads in a terminal too."""
    lines = [[first, *header]] + [[name, *map(cell, values)] for name, values in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[1:] = [max(w, 2) for w in widths[1:]]  # the rule has two characters
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    text = [[v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))]
            for line in (lines[0], rule, *lines[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


# ------------------------------------------------------------------------------------- rows of our runs

def read_json(path: Path, command: str) -> dict:
    """A JSON object that a run left. If it is absent or damaged,
    InputError names `command`, which makes it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it comes from {command}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} cannot be read ({e}): make it again by {command}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no run's figures: make it again by {command}")
    return content


def corruption_row(state: dict) -> tuple[float, ...]:
    """The content of corruptions.json -> a row of Table 4 in percent: the mean of the corruptions (mPC
    of Michaelis et al. 2019), then AP under each, averaged over its severities. NONE without objects."""
    each = {}
    for name, by_severity in state["corruptions"].items():
        values = [metrics["AP"] for metrics in by_severity.values()]
        each[name] = 100 * statistics.mean(values) if min(values) >= 0 else NONE
    return statistics.mean(each.values()), *(each.get(name, NONE) for name in CORRUPTIONS)


def paper_table(number: int, folders: list[str]) -> str:
    """Table 1, 2, 3, 4, 5, 7 or 8 of the paper, and below its rows one for each run folder of ours.
    Table 5 has one row for all folders: the mean and deviation of their seeds. Brackets after a name
    say how the scores differ from the paper's setting.

    Raises:
        InputError: a folder lacks what this table shows, or its files do not belong together.
    """
    folders = [Path(f) for f in folders]
    groups = [folders] if number == 5 and folders else [[f] for f in folders]
    rows = []
    for group in groups:
        try:
            runs = [read_run(number, folder) for folder in group]
            row = row_of_seeds(group, runs) if number == 5 else row_of_run(number, *runs)
            note = notes(number, runs[0])
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise InputError(f"{group[0]} holds no whole figures for Table {number} ({e!r}): evaluate "
                             f"it again") from None
        more = f" to {group[-1].name}, {len(group)} seeds" if len(group) > 1 else ""
        rows.append((f"ours: {group[0]}{more}{note}", row))
    return markdown(f"Table {number}", HEADERS[number], [*PAPER[number].items(), *rows])


def read_run(number: int, folder: Path) -> dict:
    """A run folder's figures for a table. Those of evaluate.py replace those at the end of training,
    which stay under "run". InputError if the run is of the wrong stage, or if evaluate.py measured
    another checkpoint."""
    stage = "pretrain" if number == 1 else "finetune"
    run, path = {}, folder / "metrics.json"
    if number != 4 or path.exists():  # Table 4 also takes other detectors, which have no run
        run = read_json(path, "a training run that reached its end")
    if run.get("stage", stage) != stage:
        raise InputError(f"{folder} is a run of {run['stage']}.py: Table {number} takes runs of "
                         f"{stage}.py")
    path = folder / "evaluation" / ("corruptions.json" if number == 4 else "metrics.json")
    if number == 1 or number != 4 and not path.exists():
        return {**run, "run": run}
    command = "evaluate.py {}" + (" --corruptions all" if number == 4 else "")
    measured = read_json(path, command.format(folder / "last.pt"))
    measured = {**measured.get("of", {}), **measured}
    changed, step = measured.get("changed"), measured.get("step")
    name = measured.get("checkpoint") or ""
    file = folder / (name or "last.pt")
    wrong = run and not name and "checkpoint" in measured  # another detector's scores
    wrong = wrong or changed and file.is_file() and file.stat().st_mtime != changed
    if wrong or name == "last.pt" and None not in (step, run.get("step")) and step != run["step"]:
        raise InputError(f"{path} was not measured on {file} of the finished run: end the training, "
                         f"then run {command.format(file)}")
    return {**run, **measured, "checkpoint": name, "run": run}


def notes(number: int, scores: dict) -> str:
    """How scores differ from the paper's setting, in brackets; "" if they do not."""
    found, size = [], 224 if number == 1 else 800
    data = scores.get("data"), scores.get("images")
    if data not in ((None, None), WHOLE.get(number, COCO)):
        found.append("{}, {} images".format(*data))
    if scores.get("limit_train"):
        found.append(f"trained on {scores['limit_train']} images")
    if scores.get("image_size", size) != size:
        found.append(f"image size {scores['image_size']}")
    if scores.get("checkpoint", "") not in ("", "last.pt"):
        step = f" of step {scores['step']}" if scores.get("step") else ""
        found.append(scores["checkpoint"] + step)
    if number == 7 and (before := notes(1, pretraining_of(scores))):
        found.append(f"pre-training{before}")
    if number == 4:
        passes, all_passes = sum(map(len, scores["corruptions"].values())), 5 * len(CORRUPTIONS)
        if passes < all_passes:
            found.append(f"{passes} of the {all_passes} corruptions and severities")
        if scores.get("frost_dir") == "generated" and "frost" in scores["corruptions"]:
            found.append("frost drawn")
    return f" ({', '.join(found)})" if found else ""


def pretraining_of(scores: dict) -> dict:
    """metrics.json of the pre-training run that a run started from, or {} if there is none."""
    start = Path(scores["pretrained"] or "")
    path = start.parent / "metrics.json"  # it has the scores of last.pt
    found = read_json(path, "pretrain.py") if start.name == "last.pt" and path.exists() else {}
    return found if found.get("stage", "pretrain") == "pretrain" else {}


def row_of_seeds(folders: list[Path], seeds: list[dict]) -> tuple:
    """Table 5: mean and deviation of runs that differ in their seed only."""
    measured = ("data", "images", "image_size", "checkpoint")
    recipes = [{**s["run"], **dict.fromkeys((*METRICS, "step")), **{k: s.get(k) for k in measured}}
               for s in seeds]
    for (a, one), (b, two) in combinations(zip(folders, recipes), 2):
        differ = sorted(k for k in one.keys() & two.keys() - {"seed"} if one[k] != two[k])
        if differ or one.get("seed", a) == two.get("seed", b):
            what = f"differ in {', '.join(differ)}" if differ else "have the same seed"
            raise InputError(f"{a} and {b} {what}: give runs that differ in their seed only")
    return (seeds[0]["epochs"], *(mean_and_deviation([s[m] for s in seeds]) for m in METRICS),
            seeds[0]["parameters"] / 1e6)


def row_of_run(number: int, scores: dict) -> tuple:
    """A run's row of any other table; figures in percent, parameters in millions."""
    if number == 4:
        return corruption_row(scores)
    parameters = scores["parameters"] / 1e6
    if number == 1:
        return scores["epochs"], 100 * scores["top1"], parameters
    metrics = [100 * scores[m] for m in METRICS]
    if number == 3:
        shared = "-" if scores["adaptor"] == "none" else "no" if scores["adaptor_per_layer"] else "yes"
        return shared, *metrics, parameters
    if number == 7:
        before = pretraining_of(scores)
        return before.get("class_tokens", "-"), 100 * before.get("top1", NONE), *metrics, parameters
    return scores["epochs"], *metrics, parameters
