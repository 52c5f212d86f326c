"""The programs as a user runs them: training on generated and on real pictures, resuming, evaluating, bad
input."""
import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import checkpoints
from data import detection_set
from model import VARIANTS, Detector

# These tests are of the programs, whose results on a GPU differ in the last bits; test_deform_attn.py is for
# GPUs.
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
FAST = ["--epochs", "2", "--limit-train", "24", "--limit-val", "6", "--batch-size", "8", "--eval-every", "1"]


def run(folder, *command, code=0, env=None):
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=folder,
                          text=True,
                          capture_output=True, env={**CPU, **(env or {})}, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(folder, *command, says):
    """Exit code 2 and one line that holds `says`; nothing is written."""
    before = sorted(folder.rglob("*"))
    done = run(folder, *command, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0], done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `python finetune.py` has been run, shortened."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "finetune.py", *FAST)
    return folder


def test_a_run_leaves_its_folder(trained):
    out = trained / "runs" / "finetune-tiny-shapes"
    assert {p.name for p in out.iterdir()} == {"args.json", "log.jsonl", "curves.png", "last.pt", "best.pt",
                                               "metrics.json", "detections.png"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log if "AP" in e] == [1, 2]
    assert all(e["loss"] == pytest.approx(e["loss_class"] + e["loss_bbox"] + e["loss_giou"], abs=1e-3)
               for e in log if "loss" in e)
    assert json.loads((out / "args.json").read_text())["variant"] == "tiny"
    for picture in ("curves.png", "detections.png"):
        assert Image.open(out / picture).size[0] > 500


def test_evaluation_writes_the_models_best_boxes_and_their_ap(trained):
    out = trained / "runs" / "finetune-tiny-shapes"
    done = run(trained, "evaluate.py", out / "last.pt", "--limit-val", "6", "--batch-size", "4")
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert len(results) == 600 and "AP50" in done.stdout
    model, _ = checkpoints.load_detector(out / "last.pt")
    image, target = detection_set("shapes", "val", limit=6, image_size=64)[5]
    with torch.no_grad():
        output = model(image[None])
    scores = output["pred_logits"][0].sigmoid()
    query, label = divmod(scores.argmax().item(), 8)
    cx, cy, w, h = output["pred_boxes"][0, query].tolist()
    best = max((r for r in results if r["image_id"] == target["image_id"]), key=lambda r: r["score"])
    assert best["category_id"] == label + 1 and best["score"] == pytest.approx(scores.max().item(), abs=1e-4)
    x0, y0, x1, y1 = (min(max(v, 0), 64) for v in (64 * (cx - w / 2), 64 * (cy - h / 2), 64 * (cx + w / 2),
                                                   64 * (cy + h / 2)))
    assert best["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.02)

    truth = detection_set("shapes", "val", limit=6).ground_truth
    perfect = [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
               for a in truth["annotations"]]
    (trained / "perfect.json").write_text(json.dumps(perfect[:-1]))
    run(trained, "evaluate.py", "--predictions", "perfect.json", "--data", "shapes", "--limit-val", "6")
    assert 0.5 < json.loads((trained / "evaluation" / "metrics.json").read_text())["AP"] < 1
    for bad in ([{"image_id": 1}], {}, [{**perfect[0], "category_id": 99}],
                [{**perfect[0], "bbox": [1, 2, -3, 4]}]):
        (trained / "bad.json").write_text(json.dumps(bad))
        refused(trained, "evaluate.py", "--predictions", "bad.json", "--data", "shapes", "--limit-val", "2",
                "--out", "bad", says="bad.json: entry 0")


def test_pictures_of_any_file(trained):
    Image.new("RGBA", (90, 70), (200, 30, 30, 255)).save(trained / "a.png")
    Image.new("L", (300, 64), 99).save(trained / "b.jpg")
    last = trained / "runs" / "finetune-tiny-shapes" / "last.pt"
    run(trained, "evaluate.py", last, "--images", "a.png", "b.jpg", "--out", "pictures", "--threshold", "0")
    assert Image.open(trained / "pictures" / "a-detections.png").size[0] >= 90
    assert (trained / "pictures" / "b-detections.png").exists()
    refused(trained, "evaluate.py", last, "--images", "a.png", "c.jpg", "--out", "none",
            says="c.jpg is missing")


def test_real_pictures_with_gapped_categories(shared, tmp_path):
    run(tmp_path, "finetune.py", "--data", shared("data/coco_mini"), "--epochs", "1", "--limit-train", "4",
        "--limit-val",
        "2", "--batch-size", "4", "--micro-batch", "2", "--image-size", "128", "--workers", "2")
    assert (tmp_path / "runs" / "finetune-tiny-coco_mini" / "detections.png").exists()


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
def test_benchmark_measures_and_writes_nothing(tmp_path, script):
    done = run(tmp_path, script, "--benchmark", "1", *FAST[2:8])
    result = json.loads(done.stdout.splitlines()[-1])
    parts = result["seconds_per_step"]
    assert {"waiting for data", "backward", "optimiser"} < parts.keys() and min(parts.values()) >= 0
    # the same steps of 8 images, measured twice, while the machine may do other work
    assert 1 / 4 < sum(parts.values()) * result["training_images_per_second"] / 8 < 4
    images = {"finetune.py": 24 * 14, "pretrain.py": 24 * 4}[script]
    assert result["hours"] == pytest.approx(images / result["training_images_per_second"] / 3600)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- bad input

def test_a_finished_run_is_not_overwritten(trained):
    refused(trained, "finetune.py", *FAST, says="already holds a run")
    refused(trained, "finetune.py", "--resume", "--out", "nowhere", says="nothing to resume")
    refused(trained, "finetune.py", *FAST, "--resume", "--lr", "0.5", says="--lr 0.001 (now 0.5)")


def test_missing_data_and_impossible_flags(tmp_path):
    refused(tmp_path, "finetune.py", "--variant", "lite", "--data", "coco", says="train2017.zip")
    refused(tmp_path, "finetune.py", "--data", "nowhere", says="nowhere is missing")
    refused(tmp_path, "finetune.py", *FAST, "--queries", "0", says="0 queries")
    assert "invalid choice" in run(tmp_path, "finetune.py", "--variant", "huge", code=2).stderr
    assert "1 or more" in run(tmp_path, "finetune.py", "--epochs", "0", code=2).stderr
    assert "0 or more" in run(tmp_path, "finetune.py", "--seed", "-1", "--lr", "nan", code=2).stderr


def test_a_broken_image_stops_a_run_before_its_first_step(tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        Image.effect_noise((64, 64), 50).save(data / split / "a.jpg")
    (data / "annotations").mkdir()
    content = {"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}], "annotations": [],
               "categories": [{"id": 1, "name": "x"}]}
    for split in ("train", "val"):
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    whole = (data / "train" / "a.jpg").read_bytes()
    (data / "train" / "a.jpg").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path, "finetune.py", "--data", data, says="a.jpg cannot be read")
    (data / "train" / "a.jpg").write_bytes(whole)
    (data / "annotations" / "instances_train.json").write_text("{")
    refused(tmp_path, "finetune.py", "--data", data, says="not JSON")


def test_checkpoints_that_do_not_fit(trained):
    last = trained / "runs" / "finetune-tiny-shapes" / "last.pt"
    refused(trained, "finetune.py", *FAST, "--out", "x", "--variant", "lite", "--pretrained", last,
            says="variant tiny")
    checkpoints.save_checkpoint(trained / "three.pt", checkpoints.describe(
        Detector(VARIANTS["tiny"], 3), Namespace(layout="paper"), list("abc"), "finetune"))
    refused(trained, "evaluate.py", "three.pt", "--data", "shapes", "--limit-val", "2", says="3 classes")
    (trained / "pickle.pt").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")
    refused(trained, "evaluate.py", "pickle.pt", "--data", "shapes", "--limit-val", "2",
            says="not unpickled")
    refused(trained, "finetune.py", *FAST, "--out", "y", "--pretrained", "gone.pt",
            says="gone.pt is missing")


# ---------------------------------------------------------------------------------------------- pre-training

SHORT = ["--epochs", "2", "--limit-train", "40", "--limit-val", "8", "--batch-size", "8", "--micro-batch",
         "4"]


def test_pretraining_hands_its_encoder_to_finetuning(tmp_path):
    run(tmp_path, "pretrain.py", *SHORT, "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1")
    out = tmp_path / "runs" / "pretrain-tiny-shapes"
    assert {p.name for p in out.iterdir()} == {"args.json", "log.jsonl", "curves.png", "last.pt", "best.pt",
                                               "metrics.json", "predictions.png"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log if "top1" in e] == [1, 2]
    done = run(tmp_path, "finetune.py", *FAST, "--epochs", "1", "--pretrained", out / "last.pt")
    assert "encoder; starting fresh: queries, adaptor, class_head, box_head" in done.stdout
    refused(tmp_path, "finetune.py", *FAST, "--out", "x", "--layout", "released", "--pretrained",
            out / "last.pt", says="paper layout")
    refused(tmp_path, "pretrain.py", *SHORT, "--out", "x", "--variant", "lite", "--init", out / "last.pt",
            says="variant tiny")
    refused(tmp_path, "evaluate.py", out / "last.pt", "--limit-val", "2", says="holds no detector")


def test_pretraining_on_a_folder_with_the_semantic_softmax(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("n1", "n2", "n3")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(4):
                Image.effect_noise((80, 70), 20 + 40 * i).save(tmp_path / "data" / split / name / f"{k}.jpg")
    (tmp_path / "is_a.txt").write_text("n1 n2\nroot n1\nroot n3\n")
    (tmp_path / "classes.txt").write_text("n1\nn2\nn3\n")
    run(tmp_path, "pretrain.py", "--build-tree", "tree.json", "--is-a", "is_a.txt", "--classes",
        "classes.txt")
    flags = ["--data", "data", "--image-size", "64", "--mixup", "0", "--cutmix", "0", "--batch-size", "4",
             "--workers", "0", "--epochs", "2", "--warmup-epochs", "1"]
    done = run(tmp_path, "pretrain.py", *flags, "--tree", "tree.json", "--augment", "21k", "--out", "a")
    assert "semantic_top1" in done.stdout

    # ------------------------------------------------------------------------------ bad input of this kind
    (tmp_path / "four.json").write_text(json.dumps({"class_tree_list": [[0], [1, 0], [2], [3]]}))
    refused(tmp_path, "pretrain.py", *flags, "--tree", "four.json", says="has 4 classes")
    (tmp_path / "other.json").write_text(json.dumps({"class_tree_list": [[0], [1, 0], [2]],
                                                     "class_list": ["n1", "n2", "n9"]}))
    refused(tmp_path, "pretrain.py", *flags, "--tree", "other.json", says="n3, n9")
    refused(tmp_path, "pretrain.py", "--build-tree", "tree.json", "--is-a", "is_a.txt", "--classes",
            "classes.txt", says="cannot write tree.json")
    flags += ["--resume", "--out", "a", "--augment", "21k"]  # the run above, one epoch more
    run(tmp_path, "pretrain.py", *flags, "--tree", "tree.json", "--epochs", "3")
    flags = flags[:-5]
    val = tmp_path / "data" / "val"
    (val / "n3" / "0.jpg").write_text("no picture")
    refused(tmp_path, "pretrain.py", *flags, says="0.jpg is no image")
    (val / "n3").rename(val / "n4")
    refused(tmp_path, "pretrain.py", *flags, says="different class folders: n3, n4")
    (val / "n3").mkdir()
    refused(tmp_path, "pretrain.py", *flags, says="n3 is empty")
    refused(tmp_path, "pretrain.py", "--data", "imagenet", says="imagenet/train is missing")
    assert "needs --tree" in run(tmp_path, "pretrain.py", "--data", "imagenet21k", code=2).stderr


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "evaluate.py"])
def test_help_is_documentation(tmp_path, script):
    assert len(run(tmp_path, script, "--help").stdout.splitlines()) > 40


def readme_commands() -> list[str]:
    """The command lines of README.md that start a stage, without what shells do for them."""
    lines = [line.split("#")[0].split("&&")[-1].strip()
             for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    commands = [re.sub(r"^torchrun \S+ ", "python ", line) for line in lines]
    variables = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    for name, value in {**variables, "tokens": "300"}.items():
        commands = [c.replace(f"${name}", value.strip('"')) for c in commands]
    return [c for c in commands if re.match(r"python (finetune|pretrain|evaluate)\.py", c)]


def test_every_command_of_the_readme_is_understood(monkeypatch):
    commands = readme_commands()
    assert len(commands) > 45
    for command in commands:
        script, *flags = command.split()[1:]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        try:
            importlib.import_module(script.removesuffix(".py")).parse()
        except SystemExit:
            pytest.fail(command)


def test_imports_stay_light():
    """The model needs torch alone; flags and help of training need none of the packages that take long."""
    code = ("import sys, torch; before = set(sys.modules); import model; new = set(sys.modules) - before; "
            "assert new == {'model', 'deform_attn', 'deform_attn_jit'}, new; import finetune, pretrain; "
            "slow = {'scipy', 'matplotlib', 'pycocotools'} & set(sys.modules); assert not slow, slow")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
