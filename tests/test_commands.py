"""The programs as a user runs them: training, the variants of Tables 3 and 7, evaluation, bad input, and
the commands of README and docs."""
import importlib
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, call, coco_folder, locked, python, refused, run, save_model
from PIL import Image

import engine
import finetune
from data import detection_set
from evaluate import detect_image, load_detector
from extras.corruptions import NAMES
from extras.pictures import draw_detections
from extras.shapes import SHAPES
from model import VARIANTS, Detector

FAST = "--epochs 2 --limit-train 24 --limit-val 6 --batch-size 8 --eval-every 1".split()
SHORT = "--epochs 1 --limit-train 8 --limit-val 2 --device cpu".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `python finetune.py` has been run, shortened."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "finetune.py", *FAST)
    return folder


def check_run_folder(out, picture, score):
    """Each file is there, and the log has two evaluations."""
    files = {"args.json", "log.jsonl", "training.png", "curves.png", "last.pt", "best.pt", "metrics.json",
             picture}
    assert {p.name for p in out.iterdir()} == files
    assert json.loads((out / "args.json").read_text())["variant"] == "tiny"
    assert min(Image.open(out / name).size[0] for name in ("training.png", "curves.png", picture)) > 500
    assert not engine.MACHINE_FLAGS & set(json.loads((out / "metrics.json").read_text()))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log if score in entry] == [1, 2]
    return [entry for entry in log if "loss" in entry]


def test_a_run_leaves_its_folder(trained):
    for entry in check_run_folder(trained / "runs" / "finetune-tiny-shapes", "detections.png", "AP"):
        parts = entry["loss_class"] + entry["loss_bbox"] + entry["loss_giou"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-3)


def test_an_evaluation_writes_the_models_best_boxes(trained):
    out = trained / "runs" / "finetune-tiny-shapes"
    done = run(trained, "evaluate.py", out / "last.pt", "--limit-val", "6", "--batch-size", "4")
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert len(results) == 6 * 12 * 8 and "AP50" in done.stdout
    model, _ = load_detector(out / "last.pt")
    image, target = detection_set("shapes", "val", limit=6, image_size=64)[5]
    with torch.no_grad():
        output = model(image[None])
    scores = output["pred_logits"][0].sigmoid()
    query, label = divmod(scores.argmax().item(), 8)
    cx, cy, w, h = output["pred_boxes"][0, query].tolist()
    best = max((r for r in results if r["image_id"] == target["image_id"]), key=lambda r: r["score"])
    assert best["category_id"] == label + 1
    assert best["score"] == pytest.approx(scores.max().item(), abs=1e-4)
    x0, y0, x1, y1 = (min(max(64 * v, 0), 64) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    assert best["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)


def test_boxes_of_a_file_are_evaluated(tmp_path, capsys):
    data = ["--data", "shapes", "--limit-val", "6"]
    truth = detection_set("shapes", "val", limit=6).ground_truth
    perfect = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9, "caption": ""}
               for a in truth["annotations"]]  # a caption would lead pycocotools to another metric
    for boxes, least, most in ((perfect, 1, 1), (perfect[:-1], 0.5, 0.999)):
        (tmp_path / "boxes.json").write_text(json.dumps(boxes))
        call(tmp_path, "evaluate.py", "--predictions", "boxes.json", *data)
        scores = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
        assert least <= round(scores["AP"], 6) <= most
    capsys.readouterr()
    perfect = [box for box in perfect if box["image_id"] != 1]
    for box in perfect:
        x, y, w, h = box["bbox"]
        box.update(image_id=float(box["image_id"]), bbox=[x, y, x + w, y + h])  # ids as pandas writes them
    (tmp_path / "boxes.json").write_text(json.dumps(perfect))
    call(tmp_path, "evaluate.py", "--predictions", "boxes.json", *data)
    said = capsys.readouterr().out
    assert "nearly all would fit as corners" in said and "1 of 6 images have no detection" in said
    for bad in ([{"image_id": 1}], {}, [{**perfect[0], "category_id": 99}],
                [{**perfect[0], "bbox": [1, 2, -3, 4]}], [{**perfect[0], "score": float("nan")}]):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        refused(tmp_path, "evaluate.py", "--predictions", "bad.json", *data, says="bad.json: entry 0")


def test_real_pictures_with_gapped_categories(shared, tmp_path):
    short = [*SHORT, *"--batch-size 4 --micro-batch 2 --workers 2 --image-size 96".split()]
    run(tmp_path, "finetune.py", "--data", shared("data/coco_mini"), *short)
    assert (tmp_path / "runs" / "finetune-tiny-coco_mini" / "detections.png").exists()


def rename(content):
    content["categories"][0]["name"] = "disk"


OWN = "--data data --image-size 64 --batch-size 8 --workers 0 --epochs 1 --out run".split()


def test_the_first_line_says_what_is_trained_on_what(tmp_path, capsys):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = 0
        content["annotations"][2]["bbox"][:2] = [900, 900]
    coco_folder(tmp_path / "data", train=change)
    truth = detection_set("shapes", "train", limit=16).ground_truth["annotations"]
    counts = [sum(a["image_id"] == i for a in truth[3:]) for i in range(1, 17)]
    call(tmp_path, "finetune.py", *OWN, "--queries", 5, "--lr-drop", 1)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("tiny: "))
    for part in ("0.4M parameters", "8 classes", "2 steps per epoch",
                 f"16 images, {sum(counts)} objects, {counts.count(0)} images without objects",
                 "left out: 1 crowd regions, 1 empty, 1 outside of their image", "2 in all",
                 "cpu, float32, attention by "):
        assert part in line
    assert "fewer than 3,000 steps" in printed and "learning rate never drops" in printed
    # A start from a detector keeps its queries.
    call(tmp_path, "finetune.py", *OWN, "--overwrite", "--pretrained", "run/best.pt")
    assert "queries, adaptor, class_head, box_head; starting fresh: nothing" in capsys.readouterr().out
    assert engine.load_checkpoint(tmp_path / "run" / "last.pt")["config"]["queries"] == 5
    call(tmp_path, "finetune.py", *OWN, "--data", "data/", "--resume", "--pretrained", "run/best.pt")
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
    refused(tmp_path, "finetune.py", *OWN, "--resume", "--pretrained", "run/best.pt", says="is no last.pt")
    refused(tmp_path, "evaluate.py", "run", says="run is a folder: name the last.pt")
    capsys.readouterr()
    call(tmp_path, "finetune.py", *OWN, "--queries", 1, "--overwrite", "--schedule", "one-cycle")
    printed = capsys.readouterr().out
    assert f"note: {sum(n > 1 for n in counts)} training images have more than --queries 1" in printed
    assert "fewer than 3,000 steps" in printed and "more --epochs may help" in printed
    call(tmp_path, "finetune.py", *OWN, "--overwrite", "--pretrained", "run/best.pt")
    # Other objects in as many images are another training set.
    coco_folder(tmp_path / "other", train=lambda content: content["annotations"].pop())
    shutil.copytree(tmp_path / "other", tmp_path / "data", dirs_exist_ok=True)
    refused(tmp_path, "finetune.py", *OWN, "--resume", "--pretrained", "run/best.pt", says="training_set ")
    # A folder without args.json holds a run, too. --overwrite does not remove a run below.
    (tmp_path / "run" / "args.json").rename(tmp_path / "run" / "a.json")
    refused(tmp_path, "finetune.py", *OWN, says="already holds a run")
    (tmp_path / "run" / "child").mkdir()
    (tmp_path / "run" / "child" / "args.json").touch()
    refused(tmp_path, "finetune.py", *OWN, "--overwrite", says="and in it the run run/child")
    shutil.rmtree(tmp_path / "run" / "child")
    # --overwrite does not remove the data of the run.
    shutil.copytree(tmp_path / "other", tmp_path / "run" / "data")
    own = [*OWN, "--data", "run/data", "--overwrite"]
    refused(tmp_path, "finetune.py", *own, says="would remove run and in it run/data, which this run needs")
    own = [*OWN, "--data", "../data", "--out", ".", "--overwrite"]
    refused(tmp_path / "run", "finetune.py", *own, says="would remove . and in it ., which this run needs")


def test_the_paper_stands_below_an_evaluation_of_a_model_of_its_size_on_its_data(tmp_path, capsys):
    model, folder = Detector(VARIANTS["lite"], 8), coco_folder(tmp_path / "elsewhere")
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        old = folder / "annotations" / f"instances_{split}.json"
        old.rename(old.with_name(f"instances_{split}2017.json"))
    save_model(tmp_path / "lite.pt", model, SHAPES, data="coco", data_root="elsewhere", image_size=64)
    for flags, rows in (([], 1), (["--limit-val", 2], 0), (["--split", "train"], 0)):
        call(tmp_path, "evaluate.py", "lite.pt", *flags, "--workers", 0, "--device", "cpu")
        paper = re.findall("paper, FP-DETR-Lite(.*)", capsys.readouterr().out)
        assert [row.split()[1::2] for row in paper] == rows * ["37.2 56.5 40.4 21.7 40.0 48.6".split()]
    # --overwrite does not remove a folder that holds --data-root.
    (folder / "args.json").touch()
    own = ["--data", "coco", "--data-root", "elsewhere", "--out", "elsewhere", "--overwrite"]
    refused(tmp_path, "finetune.py", *own, says="would remove elsewhere and in it elsewhere,")


def test_sets_without_objects_or_with_other_classes(tmp_path, capsys):
    coco_folder(tmp_path / "other" / "data", val=rename)
    refused(tmp_path / "other", "finetune.py", *OWN, says="different classes: circle, disk")

    def no_objects(content):
        content["annotations"] = []

    def crowds(content):
        content["annotations"] = [{**a, "iscrowd": 1} for a in content["annotations"]]
    for name, change in (("bare", no_objects), ("crowd", crowds)):
        coco_folder(tmp_path / name / "data", train=change)
        refused(tmp_path / name, "finetune.py", *OWN, says="nothing to learn: 16 images, 0 objects")
    coco_folder(tmp_path / "data", val=no_objects)
    call(tmp_path, "finetune.py", *OWN, "--epochs", 2)
    assert engine.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2  # the last: none is better
    call(tmp_path, "evaluate.py", "run/best.pt", "--corruptions", "fog", "--severities", 1, "--workers", 0)
    printed = capsys.readouterr().out
    assert printed.count("has no objects, so AP is not defined") == 2 and "epoch 1: AP -, " in printed
    assert "clean AP -, mean under corruption (mPC) -, relative (rPC) - %" in printed


def test_classes_are_matched_by_name(trained, tmp_path, capsys):
    """The classes of the set stand in reverse order. The scores stay."""
    last, scores = trained / "runs" / "finetune-tiny-shapes" / "last.pt", []
    names = [c["name"] for c in detection_set("shapes", "val", limit=1).ground_truth["categories"]]

    def reverse(content):
        for c in content["categories"]:
            c["name"] = names[8 - c["id"]]
        for a in content["annotations"]:
            a["category_id"] = 9 - a["category_id"]
    flags = [last, "--out", "out", "--workers", 0, "--data"]
    for name, change in (("plain", None), ("reversed", reverse)):
        data = coco_folder(tmp_path / name, val=change)
        call(tmp_path, "evaluate.py", *flags, data)
        measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
        scores.append([measured[m] for m in ("AP", "AP50", "AP75")])
        by_class = {c["name"]: (c["objects"], c["AP"]) for c in measured["classes"]}
        scores[-1].append(sorted(by_class.items()))
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        content = json.loads((data / "annotations" / "instances_val.json").read_text())
        name_of = {c["id"]: c["name"] for c in content["categories"]}
        scores[-1].append([(r["image_id"], name_of[r["category_id"]], r["score"]) for r in results])
        found = [ap for _, ap in by_class.values() if ap >= 0]
        assert sum(found) / len(found) == pytest.approx(measured["AP"])
    assert scores[0] == scores[1] and "matched by name" in capsys.readouterr().out
    renamed = coco_folder(tmp_path / "renamed", val=rename)
    refused(tmp_path, "evaluate.py", *flags, renamed, says="other names (circle, disk): rename them, or")
    truth = detection_set("shapes", "val", limit=6).ground_truth
    for i, name in enumerate(names, 1):
        assert dict(scores[0][3])[name][0] == sum(a["category_id"] == i for a in truth["annotations"])


def test_scores_say_what_they_are_of_and_detections_are_printed(trained, tmp_path, capsys):
    last = trained / "runs" / "finetune-tiny-shapes" / "last.pt"
    call(tmp_path, "evaluate.py", last, "--limit-val", 3, "--image-size", 48, "--split", "train",
         "--out", "out", "--workers", 0)
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = {"data": "shapes train", "split": "train", "images": 3, "image_size": 48, "amp": "off",
                "checkpoint": "last.pt", "step": 6, "changed": last.stat().st_mtime}
    assert expected.items() <= measured.items()
    detection_set("shapes", "val", limit=1).records[0].image().save(tmp_path / "a.png")
    capsys.readouterr()
    call(tmp_path, "evaluate.py", last, "--images", "a.png", "--threshold", 0.02, "--out", "out")
    objects = json.loads((tmp_path / "out" / "a-detections.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    model, checkpoint = load_detector(last)
    found = detect_image(model, Image.open(tmp_path / "a.png"), image_size=64)
    count = int((found["scores"] >= 0.02).sum())
    assert len(objects) == count == len(printed) - 1 > 0
    best = {"class": checkpoint["classes"][found["labels"][0]], "score": found["scores"][0].item(),
            "box": found["boxes"][0].tolist()}
    assert objects[0]["class"] == best["class"] and best["class"] in printed[1]
    assert objects[0]["score"] == pytest.approx(best["score"], abs=1e-4)
    assert objects[0]["box"] == pytest.approx(best["box"], abs=0.06)
    drawn = draw_detections(Image.open(tmp_path / "a.png"), found, checkpoint["classes"], 0.02)
    assert drawn.tobytes() == Image.open(tmp_path / "out" / "a-detections.png").tobytes()


def test_detection_from_python_as_the_readme_shows_it(trained, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text().split("From Python:\n\n")[1].split("\n\n")[0]
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    assert len(lines) <= 8
    Image.new("RGB", (70, 50)).save(trained / "photo.jpg")
    monkeypatch.chdir(trained)
    exec("\n".join(lines), {})
    assert len(capsys.readouterr().out.splitlines()) == 12 * 8


def test_coco_c_is_made_anew_for_corrected_annotations_or_images_only(trained, tmp_path, capsys):
    last = trained / "runs" / "finetune-tiny-shapes" / "last.pt"
    data, out = coco_folder(tmp_path / "data"), tmp_path / "out" / "corruptions.json"
    flags = [last, "--data", data, "--corruptions", "fog", "--severities", 1, "--out", out.parent,
             "--workers", 0, "--device", "cpu"]
    call(tmp_path, "evaluate.py", *flags)
    before, file = json.loads(out.read_text()), data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    del content["annotations"][0]
    file.write_text(json.dumps(content))
    refused(tmp_path, "evaluate.py", *flags, "--amp", "bf16", says="amp off (now bf16)")
    with locked(out.with_suffix(".lock")):
        refused(tmp_path, "evaluate.py", *flags, says="another process is at work in")
    call(tmp_path, "evaluate.py", *flags)
    after = json.loads(out.read_text())
    assert "made anew" in capsys.readouterr().out and before["of"] != after["of"]
    call(tmp_path, "evaluate.py", *flags)
    assert json.loads(out.read_text()) == after
    image = data / "val" / content["images"][0]["file_name"]
    Image.new("RGB", Image.open(image).size, "grey").save(image)
    call(tmp_path, "evaluate.py", *flags)
    assert json.loads(out.read_text())["of"] != after["of"]
    content["images"][3].update(width=30)
    file.write_text(json.dumps(content))
    for more in ((), ("--figure", 4)):
        refused(tmp_path, "evaluate.py", *flags, *more, says="4.png is too small for the corruptions")


# ------------------------------------------------------------ adaptors and structures (Tables 3 and 7)

def table_row(number, out, capsys):
    """The cells of the row that evaluate.py --table prints for the run in `out`."""
    capsys.readouterr()
    call(out.parent, "evaluate.py", "--table", number, out)
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]


@pytest.mark.parametrize("shared, adaptor", [
    ("-", ["none"]), ("yes", ["bilstm"]), ("no", ["bilstm", "--adaptor-per-layer"]),
    ("no", ["self-attention", "--adaptor-per-layer"])])
def test_rows_of_table_3_train_resume_and_evaluate(shared, adaptor, tmp_path, capsys):
    out, flags = tmp_path / "run", [*SHORT, "--adaptor", *adaptor, "--out", tmp_path / "run"]
    call(tmp_path, "finetune.py", *flags)
    call(tmp_path, "finetune.py", *flags, "--resume", "--epochs", "2")
    refused(tmp_path, "finetune.py", *flags, "--resume", says="in epoch 2 of 2: give --epochs 2 or more")
    call(tmp_path, "evaluate.py", out / "last.pt", *"--limit-val 2 --workers 0 --device cpu".split())
    row = table_row(3, out, capsys)
    parameters = sum(p.numel() for p in load_detector(out / "last.pt")[0].parameters())
    assert row[1] == shared and float(row[-1]) == pytest.approx(parameters / 1e6, abs=0.05)


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_encoder_decoder_is_pretrained_and_passed_on_whole(tokens, tmp_path, monkeypatch, capsys):
    """Table 7: fine-tuning starts with the exact weights of pre-training, also those of the decoder."""
    structure = ["--structure", "encoder-decoder"]
    call(tmp_path, "pretrain.py", *SHORT, *structure, "--class-tokens", tokens, "--out", "pre")
    started, build = {}, finetune.build_optimizer

    def build_optimizer(model, args):
        started.update({k: v.clone() for k, v in model.encoder.state_dict().items()})
        return build(model, args)
    monkeypatch.setattr(finetune, "build_optimizer", build_optimizer)
    flags = [*SHORT, "--pretrained", "pre/last.pt", "--out", "fine"]
    call(tmp_path, "finetune.py", *flags, *structure)
    left = engine.load_checkpoint(tmp_path / "pre" / "last.pt")
    assert any("self_attention" in k for k in started)
    assert all(torch.equal(v, left["model"]["encoder." + k]) for k, v in started.items())
    top1 = f"{100 * left['scores']['top1']:.1f}"
    assert table_row(7, tmp_path / "fine", capsys)[1:3] == [str(tokens), top1]
    refused(tmp_path, "finetune.py", *flags, "--overwrite", says="structure encoder-decoder")
    new = [*SHORT, "--out", "new", "--adaptor"]
    refused(tmp_path, "finetune.py", *new, "bilstm", *structure, says="adaptor bilstm")
    refused(tmp_path, "finetune.py", *new, "none", "--adaptor-per-layer", says="adaptor none")


# ----------------------------------------------------------------------------------------- pre-training

def test_pretraining_passes_its_encoder_to_finetuning(tmp_path, capsys):
    mixing = "--micro-batch 4 --drop-path 0.1 --mixup 0.8 --cutmix 1".split()
    run(tmp_path, "pretrain.py", *FAST, *mixing)
    assert check_run_folder(tmp_path / "runs" / "pretrain-tiny-shapes", "predictions.png", "top1")
    start = ["--pretrained", "runs/pretrain-tiny-shapes/last.pt"]
    call(tmp_path, "finetune.py", *SHORT, *start)
    assert "encoder; starting fresh: queries, adaptor, class_head, box_head" in capsys.readouterr().out
    for more, says in ((["--layout", "released"], "another encoder: layout paper (here released)"),
                       (["--variant", "mini-wide"], "another encoder: dim 64 (here 96)")):
        refused(tmp_path, "finetune.py", *SHORT, *start, "--out", "x", *more, says=says)


def test_pretraining_on_a_folder_with_the_semantic_softmax(tmp_path, capsys):
    for split in ("train", "val"):
        for i, name in enumerate(("n1", "n2", "n3")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for k in range(4):
                Image.effect_noise((80, 70), 20 + 40 * i).save(folder / f"{k}.jpg")
    (tmp_path / "data" / "train" / "readme.txt").write_text("")
    (tmp_path / "is_a.txt").write_text("\ufeffn1 n2\nroot n1\nroot n3\n", encoding="utf-8")
    (tmp_path / "classes.txt").write_text("n1\nn2\nn3\n")
    build = "extras.imagenet21k_tree", "tree.json", "--is-a", "is_a.txt", "--classes", "classes.txt"
    call(tmp_path, *build)
    refused(tmp_path, *build, says="cannot write")  # never over an older file
    flags = ("--data data --image-size 64 --mixup 0 --cutmix 0 --batch-size 4 --workers 0 --epochs 2 "
             "--warmup-epochs 1 --device cpu --out run").split()
    tree = ["--tree", "tree.json", "--augment", "21k"]
    call(tmp_path, "pretrain.py", *flags, *tree)
    said = capsys.readouterr().out
    assert "fewer than 3,000 steps" in said and "semantic_top1" in said
    assert "1 files beside the class folders are left out, for example readme.txt" in said
    call(tmp_path, "pretrain.py", *flags, *tree, "--resume", "--epochs", "3")
    refused(tmp_path, "pretrain.py", *flags, *tree, "--resume", says="in epoch 3 of 3: give --epochs 3")

    whole = (tmp_path / "tree.json").read_text()
    assert json.loads(whole)["class_tree_list"] == [[0], [1, 0], [2]]
    (tmp_path / "tree.json").write_text(whole + " ")
    refused(tmp_path, "pretrain.py", *flags, *tree, "--resume", "--epochs", "4", says="tree ")
    flags += ["--out", "new"]
    (tmp_path / "four.json").write_text(json.dumps({"class_tree_list": [[0], [1, 0], [2], [3]]}))
    refused(tmp_path, "pretrain.py", *flags, "--tree", "four.json", says="has 4 classes")
    (tmp_path / "other.json").write_text(json.dumps({"class_tree_list": [[0], [1, 0], [2]],
                                                     "class_list": ["n1", "n2", "n9"]}))
    refused(tmp_path, "pretrain.py", *flags, "--tree", "other.json", says="n3, n9")
    val = tmp_path / "data" / "val"
    (val / "n3").rename(val / "n4")
    refused(tmp_path, "pretrain.py", *flags, says="different classes: n3, n4")
    (val / "n3").mkdir()
    refused(tmp_path, "pretrain.py", *flags, says="n3 is empty")


# -------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("command, says", [
    ("finetune.py --variant lite --data coco", "train2017.zip"),
    ("finetune.py --data nowhere", "nowhere is missing"),
    ("finetune.py --limit-train 8 --limit-val 2 --pretrained gone.pt", "gone.pt is missing"),
    ("finetune.py --queries 0", "0 is not 1 or more"),
    ("finetune.py --variant huge", "invalid choice"),
    ("finetune.py --lr nan", "nan is not 0 or more"),
    ("finetune.py --eval 0", "unrecognized arguments: --eval"),  # flags are not abbreviated
    ("pretrain.py --aug x", "unrecognized arguments: --aug"),
    ("pretrain.py --data imagenet", "imagenet/train is missing"),
    ("pretrain.py --data imagenet21k", "needs --tree"),
    ("pretrain.py --tree x.json --mixup 1", "one label per image"),
    ("pretrain.py --tree x.json --cutmix 1", "one label per image"),
    ("evaluate.py", "give one checkpoint"),
    ("evaluate.py a.pt b.pt", "only one of"),
    ("evaluate.py gone.pt --data shapes", "gone.pt is missing"),
    ("evaluate.py a.pt --thr x", "unrecognized arguments: --thr"),
    ("evaluate.py a.pt --attention 2", "needs a checkpoint of FP-DETR and --images"),
    ("evaluate.py a.pt --corruptions rain", "invalid choice"),
    ("evaluate.py --model detr", "must begin with hf:"),
    ("evaluate.py --predictions x.json --images a.png", "need a detector"),
    ("evaluate.py --table 6", "invalid choice")])
def test_missing_files_and_impossible_flags(command, says, tmp_path):
    refused(tmp_path, *command.split(), says=says)


def test_what_does_not_fit_a_trained_detector(trained):
    last = "runs/finetune-tiny-shapes/last.pt"
    refused(trained, "evaluate.py", last, "--images", "c.jpg", "--out", "none", says="c.jpg is missing")
    refused(trained, "evaluate.py", last, "--out", "runs/finetune-tiny-shapes", says="a training run")
    twice = ["--images", *2 * ["runs/finetune-tiny-shapes/curves.png"], "--out", "none"]
    refused(trained, "evaluate.py", last, *twice, says="have the same name")
    save_model(trained / "three.pt", Detector(VARIANTS["tiny"], 3), "abc")
    refused(trained, "evaluate.py", "three.pt", "--data", "shapes", says="3 classes")


# --------------------------------------------------------------- commands of the texts, and the imports

def commands_of_the_texts() -> list[str]:
    """The lines of README.md and docs/ that start a program, with the shell's variables filled in."""
    text = "\n".join(p.read_text() for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line.split(" #")[0].split("&&")[-1].strip() for line in text.splitlines()
             if line.startswith("    ")]
    commands = [re.sub(r"^torchrun \S+ ", "python ", line) for line in lines]
    variables = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    for name, value in {**variables, "tokens": "300", "variant": "small", "seed": "3"}.items():
        commands = [c.replace(f"${name}", value.strip('"')) for c in commands]
    return [c for c in commands if re.match(r"python (finetune|pretrain|evaluate)\.py", c)]


def test_every_command_of_the_texts_is_understood(monkeypatch):
    commands = commands_of_the_texts()
    assert len(commands) > 40
    for command in commands:
        script, *flags = command.split()[1:]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        try:
            args = importlib.import_module(script.removesuffix(".py")).parse()
            assert "--corruptions all" not in command or args.corruptions == list(NAMES)
        except SystemExit:
            pytest.fail(command)


def test_imports_stay_light():
    """The model needs torch alone. Flags and help of training import no package that takes long."""
    code = ("import sys, torch, model\n"
            "assert not {'engine', 'data', 'PIL'} & set(sys.modules)\n"
            "import finetune, pretrain\n"
            "assert not {'scipy', 'matplotlib', 'pycocotools'} & set(sys.modules)")
    python("-c", code)
