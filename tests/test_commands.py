"""The programs as a user runs them: training on generated and on real pictures, the variants of Tables 3
and 7, evaluation, bad input, help, and the commands of README and docs."""
import importlib
import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, refused, run
from PIL import Image

import engine
import evaluate
import finetune
import pretrain
from data import detection_set
from model import VARIANTS, Detector

FAST = ["--epochs", "2", "--limit-train", "24", "--limit-val", "6", "--batch-size", "8", "--eval-every", "1"]


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
    model, _ = evaluate.load_detector(out / "last.pt")
    image, target = detection_set("shapes", "val", limit=6, image_size=64)[5]
    with torch.no_grad():
        output = model(image[None])
    scores = output["pred_logits"][0].sigmoid()
    query, label = divmod(scores.argmax().item(), 8)
    cx, cy, w, h = output["pred_boxes"][0, query].tolist()
    best = max((r for r in results if r["image_id"] == target["image_id"]), key=lambda r: r["score"])
    assert best["category_id"] == label + 1 and best["score"] == pytest.approx(scores.max().item(), abs=1e-4)
    x0, y0, x1, y1 = (min(max(64 * v, 0), 64) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
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
        "--limit-val", "2", "--batch-size", "4", "--micro-batch", "2", "--image-size", "128",
        "--workers", "2")
    assert (tmp_path / "runs" / "finetune-tiny-coco_mini" / "detections.png").exists()


# ----------------------------------------------------------------- adaptors and structures (Tables 3 and 7)

SHORT = ["--epochs", "1", "--limit-train", "8", "--limit-val", "2", "--device", "cpu"]


def call(program, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
    program.main()


@pytest.mark.parametrize("adaptor", [["--adaptor", "none"], ["--adaptor", "bilstm"],
                                     ["--adaptor", "bilstm", "--adaptor-per-layer"],
                                     ["--adaptor", "self-attention", "--adaptor-per-layer"]])
def test_rows_of_table_3_train_resume_evaluate_and_stand_in_it(adaptor, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    call(finetune, monkeypatch, *SHORT, *adaptor, "--out", out)
    call(finetune, monkeypatch, *SHORT, *adaptor, "--out", out, "--resume", "--epochs", "2")
    call(evaluate, monkeypatch, out / "last.pt", "--limit-val", "2", "--workers", "0", "--device", "cpu")
    capsys.readouterr()
    call(evaluate, monkeypatch, "--table", "3", out)
    row = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    shared = "-" if adaptor[1] == "none" else "no" if len(adaptor) > 2 else "yes"
    model, _ = evaluate.load_detector(out / "last.pt")
    parameters = sum(p.numel() for p in model.parameters())
    assert row[1] == shared and float(row[-1]) == pytest.approx(parameters / 1e6, abs=0.05)


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_encoder_decoder_is_pretrained_and_passed_on_whole(tokens, tmp_path, monkeypatch, capsys):
    """Table 7: fine-tuning starts bit for bit from the weights that pre-training left, decoder included."""
    structure = ["--structure", "encoder-decoder"]
    call(pretrain, monkeypatch, *SHORT, *structure, "--class-tokens", tokens, "--out", tmp_path / "pre")
    started, build = {}, finetune.build_optimizer

    def build_optimizer(model, args):
        started.update({k: v.clone() for k, v in model.encoder.state_dict().items()})
        return build(model, args)
    monkeypatch.setattr(finetune, "build_optimizer", build_optimizer)
    flags = [*SHORT, "--pretrained", tmp_path / "pre" / "last.pt", "--out", tmp_path / "fine"]
    call(finetune, monkeypatch, *flags, *structure)
    left = engine.load_checkpoint(tmp_path / "pre" / "last.pt")
    assert any("self_attention" in k for k in started)
    assert all(torch.equal(v, left["model"]["encoder." + k]) for k, v in started.items())
    capsys.readouterr()
    call(evaluate, monkeypatch, "--table", "7", tmp_path / "fine")
    row = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert row[1:3] == [str(tokens), f"{100 * left['scores']['top1']:.1f}"]
    no = [*SHORT, "--out", tmp_path / "no", "--adaptor"]
    for bad, says in (([*flags, "--overwrite"], "structure encoder-decoder"),  # for an encoder-only detector
                      ([*no, "bilstm", *structure], "adaptor bilstm"),
                      ([*no, "none", "--adaptor-per-layer"], "adaptor none")):
        with pytest.raises(engine.InputError, match=says):
            call(finetune, monkeypatch, *bad)
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------- pre-training

def test_pretraining_passes_its_encoder_to_finetuning(tmp_path):
    short = ["--epochs", "2", "--limit-train", "40", "--limit-val", "8", "--batch-size", "8",
             "--micro-batch", "4"]
    run(tmp_path, "pretrain.py", *short, "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1")
    out = tmp_path / "runs" / "pretrain-tiny-shapes"
    assert {p.name for p in out.iterdir()} == {"args.json", "log.jsonl", "curves.png", "last.pt", "best.pt",
                                               "metrics.json", "predictions.png"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log if "top1" in e] == [1, 2]
    done = run(tmp_path, "finetune.py", *FAST, "--epochs", "1", "--pretrained", out / "last.pt")
    assert "encoder; starting fresh: queries, adaptor, class_head, box_head" in done.stdout
    refused(tmp_path, "finetune.py", *FAST, "--out", "x", "--layout", "released", "--pretrained",
            out / "last.pt", says="layout paper")
    refused(tmp_path, "pretrain.py", *short, "--out", "x", "--variant", "lite", "--init", out / "last.pt",
            says="dim 64 (here 256)")
    refused(tmp_path, "evaluate.py", out / "last.pt", "--limit-val", "2", says="holds no detector")


def test_pretraining_on_a_folder_with_the_semantic_softmax(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("n1", "n2", "n3")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(4):
                Image.effect_noise((80, 70), 20 + 40 * i).save(tmp_path / "data" / split / name / f"{k}.jpg")
    (tmp_path / "is_a.txt").write_text("n1 n2\nroot n1\nroot n3\n")
    (tmp_path / "classes.txt").write_text("n1\nn2\nn3\n")
    build = [sys.executable, "-m", "extras.imagenet21k_tree", tmp_path / "tree.json", "--is-a",
             tmp_path / "is_a.txt", "--classes", tmp_path / "classes.txt"]
    subprocess.run(build, cwd=ROOT, check=True)
    again = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "cannot write" in again.stderr  # never over an older file
    flags = ["--data", "data", "--image-size", "64", "--mixup", "0", "--cutmix", "0", "--batch-size", "4",
             "--workers", "0", "--epochs", "2", "--warmup-epochs", "1"]
    done = run(tmp_path, "pretrain.py", *flags, "--tree", "tree.json", "--augment", "21k", "--out", "a")
    assert "semantic_top1" in done.stdout
    run(tmp_path, "pretrain.py", *flags, "--resume", "--out", "a", "--augment", "21k", "--tree", "tree.json",
        "--epochs", "3")

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
    refused(tmp_path, "pretrain.py", "--data", "imagenet", says="imagenet/train is missing")
    assert "needs --tree" in run(tmp_path, "pretrain.py", "--data", "imagenet21k", code=2).stderr


# ------------------------------------------------------------------------------------------------- bad input

def test_missing_data_and_impossible_flags(tmp_path, trained):
    refused(trained, "finetune.py", *FAST, says="already holds a run")
    refused(tmp_path, "finetune.py", "--variant", "lite", "--data", "coco", says="train2017.zip")
    refused(tmp_path, "finetune.py", "--data", "nowhere", says="nowhere is missing")
    assert "1 or more" in run(tmp_path, "finetune.py", *FAST, "--queries", "0", code=2).stderr
    assert "invalid choice" in run(tmp_path, "finetune.py", "--variant", "huge", code=2).stderr
    assert "1 or more" in run(tmp_path, "finetune.py", "--epochs", "0", code=2).stderr
    assert "0 or more" in run(tmp_path, "finetune.py", "--seed", "-1", "--lr", "nan", code=2).stderr


def test_checkpoints_that_do_not_fit(trained):
    last = trained / "runs" / "finetune-tiny-shapes" / "last.pt"
    refused(trained, "finetune.py", *FAST, "--out", "x", "--variant", "lite", "--pretrained", last,
            says="dim 64 (here 256)")
    model = Detector(VARIANTS["tiny"], 3)
    description = engine.describe_run(model, Namespace(layout="paper"), "finetune", list("abc"), images=1)
    engine.save_checkpoint(trained / "three.pt", {**description, "model": model.state_dict()})
    refused(trained, "evaluate.py", "three.pt", "--data", "shapes", "--limit-val", "2", says="3 classes")
    (trained / "pickle.pt").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")
    refused(trained, "evaluate.py", "pickle.pt", "--data", "shapes", "--limit-val", "2",
            says="not unpickled")
    refused(trained, "finetune.py", *FAST, "--out", "y", "--pretrained", "gone.pt",
            says="gone.pt is missing")


# ---------------------------------------------------------------------------------------- help and commands

@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "evaluate.py"])
def test_help_names_every_flag_of_the_parser(tmp_path, script):
    """And each has a text of its own."""
    shown = run(tmp_path, script, "--help").stdout
    flags = set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text().split("def parse")[1]))
    assert len(flags) > 10
    for flag in flags:
        assert re.search(rf"{flag}\b.*\s+[a-zA-Z]", shown), flag


def commands_of_the_texts() -> list[str]:
    """The command lines of README.md and docs/ that start a stage, with the shell's variables filled in."""
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
            importlib.import_module(script.removesuffix(".py")).parse()
        except SystemExit:
            pytest.fail(command)


def test_imports_stay_light():
    """The model needs torch alone. Flags and help of training import no package that takes long."""
    code = ("import sys, torch; before = set(sys.modules); import model; new = set(sys.modules) - before; "
            "assert not {'engine', 'data', 'PIL'} & new, new; import finetune, pretrain; "
            "slow = {'scipy', 'matplotlib', 'pycocotools'} & set(sys.modules); "
            "assert not slow, slow")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
