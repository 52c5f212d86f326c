"""Every flag of the three commands changes what it should, and nothing else. The tables below say what."""
import argparse
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call, refused, save_model, shaken
from small import record, run

import engine
import evaluate
import finetune
import pretrain
from data import detection_set
from extras.shapes import SHAPES
from model import VARIANTS, Detector

TESTS = Path(__file__).parent


def digest(values) -> str:
    """Of tensors, rounded so that the order of additions does not matter."""
    total = hashlib.sha256()
    for value in values:
        total.update((value.double() * 1e7).round().long().numpy().tobytes())
    return total.hexdigest()[:8]


# ------------------------------------------------------------------------------------------ training

FINETUNE = ("--data shapes --epochs 2 --batch-size 3 --micro-batch 2 --lr 0.01 --schedule step --lr-drop 1 "
            "--backbone-lr 0.5 --sampling-lr 0.25 --weight-decay 0.3 --clip 0.1 --dropout 0 --augment flip "
            "--image-size 64 --queries 4 --eval-every 1 --seed 7 --workers 0 --amp off")
PRETRAIN = ("--data shapes --epochs 2 --batch-size 4 --micro-batch 2 --lr 0.01 --schedule cosine "
            "--warmup-epochs 1 --weight-decay 0.3 --augment flip --repeats 1 --mixup 0 --cutmix 0 "
            "--smoothing 0.1 --drop-path 0 --image-size 64 --eval-every 1 --seed 7 --workers 0 --amp off")
TREE = {"class_tree_list": [[i] if i < 2 else [i, i % 2] for i in range(8)]}


def outcome(stage, folder, monkeypatch, flags) -> dict:
    """Everything that can be seen of a run, and each entry of its model's Config."""
    mixing, mix = [], pretrain.mix

    def spy(images, targets, rng, *alphas):
        mixing.append(rng.bit_generator.state)
        return mix(images, targets, rng, *alphas)
    monkeypatch.setattr(pretrain, "mix", spy)
    started, last, _ = run(stage, folder, monkeypatch, flags)
    items = [r for r in record if r[0] == "train"]
    models = [r for r in record if r[0] == "model"]
    log = engine.read_log(folder / "run" / "log.jsonl")
    evaluations = [e for e in log if "loss" not in e]
    return {"order": [r[2] for r in items], "epochs": [r[1] for r in items], "mixing": [*mixing],
            "pixels": digest(r[3][0] for r in sorted(items, key=lambda r: r[1:3])),
            "micro-batches": [len(r[1]) for r in models if r[2]],
            "inputs": digest(torch.cat([r[1].flatten() for r in models if r[2]])[None]),
            "random": [r[3] for r in models if r[2]],
            "val": digest(torch.cat([r[1].flatten() for r in models if not r[2]])[None]),
            "precision": {r[4] for r in models}, "checkpointing": {r[5] for r in models},
            "compiled": ("compiled",) in record, "start": digest(started.state_dict().values()),
            "weights": digest(last["model"].values()), "scores": sorted(last["scores"]),
            "rates": [e["lr"] for e in log if "loss" in e], "steps": last["step"], "logged": {*log[0]},
            "evaluated": [e["epoch"] for e in evaluations], **last["config"]}


SEEN = {"pixels", "inputs", "weights"}
LONGER = {"order", "epochs", "micro-batches", "random", "val", "rates", "steps", "evaluated", *SEEN}
WIDE = {"dim", "mlp_dim", "heads", "tokenizer_dim", "layers"}
TABLE = {  # flags: what differs from the plain run. The small models have no dropout and no adaptor.
    finetune: {
        "--data shapes-hard": {"val", *SEEN}, "--epochs 3": LONGER, "--lr 0.02": {"rates", "weights"},
        "--batch-size 5": {"micro-batches", "random", "steps", "weights"},
        "--micro-batch 3": {"micro-batches", "random"}, "--schedule one-cycle": {"rates", "weights"},
        "--lr-drop 2": {"rates", "weights"}, "--backbone-lr 1": {"weights"}, "--sampling-lr 1": {"weights"},
        "--weight-decay 0": {"weights"}, "--clip 0": {"weights"}, "--dropout 0.5": {"dropout"},
        "--augment none": SEEN, "--augment paper": SEEN, "--image-size 80": {"val", *SEEN},
        "--queries 5": {"queries", "start", "weights"}, "--adaptor none": {"adaptor"},
        "--adaptor-per-layer": {"adaptor_per_layer"},
        "--variant mini-wide": WIDE,
        "--structure encoder-decoder": {"structure", "adaptor"},
        "--seed 8": {"order", "random", "start", *SEEN}, "--limit-val 3": {"val"},
        "--limit-train 4": {"order", "epochs", "micro-batches", *SEEN}, "--amp bf16": {"precision"},
        "--activation-checkpointing": {"checkpointing"}, "--eval-every 3": {"val", "evaluated"},
        "--workers 1": {"order", "epochs", "pixels"},  # they are read elsewhere
        "--pretrained {checkpoint}": {"weights"}},
    pretrain: {
        "--data shapes-hard": {"val"},  # the five training pictures have the same colours in both
        "--epochs 3": {"mixing", *LONGER}, "--lr 0.02": {"rates", "weights"},
        "--schedule one-cycle": {"rates", "weights"},
        "--warmup-epochs 0": {"rates", "weights"},
        "--batch-size 3": {"order", "epochs", "micro-batches", *SEEN},
        "--micro-batch 4": {"micro-batches", "random"}, "--weight-decay 0": {"weights"},
        "--augment none": SEEN, "--augment deit": SEEN, "--augment 21k": SEEN,
        "--image-size 80": {"val", *SEEN}, "--repeats 3": {"order", *SEEN},
        "--mixup 0.8": {"inputs", "weights", "logged"},  # no training accuracy
        "--cutmix 1": {"inputs", "weights", "logged"},
        "--smoothing 0": {"weights"}, "--drop-path 0.5": {"drop_path"}, "--class-tokens 2": {"class_tokens"},
        "--variant mini-wide": {"queries", *WIDE}, "--structure encoder-decoder": {"structure"},
        "--seed 8": {"order", "mixing", "random", "start", *SEEN}, "--limit-val 3": {"val"},
        "--limit-train 4": {"order", *SEEN}, "--amp bf16": {"precision"}, "--compile": {"compiled"},
        "--activation-checkpointing": {"checkpointing"}, "--eval-every 3": {"val", "evaluated"},
        "--workers 1": {"order", "epochs", "pixels"},
        "--init {checkpoint}": {"weights"}, "--tree {tree}": {"mixing", "weights", "scores"}}}
ELSEWHERE = {  # flag: the test that tries it
    "--layout": "test_pretraining_passes_its_encoder_to_finetuning",
    "--resume": "test_a_folder_is_resumed_or_replaced_only_if_asked", "--overwrite": "the same",
    "--out": "the same", "--data-root": "test_flags_that_name_places", "--device": "the same"}


@pytest.mark.parametrize("stage", TABLE, ids=lambda stage: stage.__name__)
def test_each_flag_of_training_changes_what_it_should(stage, tmp_path, monkeypatch):
    base = FINETUNE if stage is finetune else PRETRAIN
    plain = outcome(stage, tmp_path / "plain", monkeypatch, base)
    paths = {"checkpoint": tmp_path / "plain" / "run" / "last.pt", "tree": tmp_path / "tree.json"}
    paths["tree"].write_text(json.dumps(TREE))
    assert plain == outcome(stage, tmp_path / "again", monkeypatch, base)
    for i, (flags, expected) in enumerate(TABLE[stage].items()):
        other = outcome(stage, tmp_path / str(i), monkeypatch, f"{base} {flags.format(**paths)}")
        assert {k for k in plain if plain[k] != other[k]} == expected, flags


def test_flags_that_name_places(tmp_path, monkeypatch):
    for program in ("finetune.py", "pretrain.py", "evaluate.py"):
        data = ["--data", "coco" if program != "pretrain.py" else "imagenet", "--data-root", "elsewhere"]
        target = ["--predictions", "x.json"] if program == "evaluate.py" else []
        refused(tmp_path, program, *target, *data, says="elsewhere")
        data[1] = "mine"
        refused(tmp_path, program, *target, *data, says="--data-root elsewhere is for --data ")
        if not torch.cuda.is_available():
            refused(tmp_path, program, *target, "--device", "cuda", says="torch sees no GPU")


def flags_of(module, monkeypatch) -> set[str]:
    """The flags that the parser of a command knows. --help explains each."""
    found = set()

    def parse_args(parser, *_):
        assert all(action.help for action in parser._actions) and parser.format_help()
        found.update(a.option_strings[-1] for a in parser._actions if a.option_strings)
        raise KeyboardInterrupt
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(KeyboardInterrupt):
        module.parse()
    return found - {"--help"}


@pytest.mark.parametrize("module", [finetune, pretrain, evaluate], ids=lambda module: module.__name__)
def test_no_flag_is_missing_from_the_tables(module, monkeypatch):
    tried = {flags.split()[0] for flags in {**TABLE, evaluate: EVALUATE}[module]}
    elsewhere = {*ELSEWHERE, *ELSEWHERE_EVALUATE} if module is evaluate else {*ELSEWHERE}
    assert tried <= flags_of(module, monkeypatch) <= tried | elsewhere
    text = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    for test in {*ELSEWHERE.values(), *ELSEWHERE_EVALUATE.values()} - {"the same"}:
        assert re.search(rf"def {test}\(", text), test


# ---------------------------------------------------------------------------------------- evaluate.py

SCORED, IMAGES, FOG = {"metrics", "results"}, "--images {image}", "--corruptions fog --severities 3"
MANY = f"--threshold 0.01 {IMAGES}"
EVALUATE = {  # flags: (other flags, the files that differ)
    "--data shapes-hard": ("", {*SCORED, "detections"}), "--split train": ("", {*SCORED, "detections"}),
    "--limit-val 2": ("", {*SCORED, "detections"}), "--image-size 96": ("", SCORED),
    "--amp bf16": ("", SCORED), "--batch-size 2": ("", set()), "--workers 1": ("", set()),
    "--figure 1": ("", {"figure"}), "--seed 1 --figure 1": ("--figure 1", {"figure"}),
    FOG: ("", {"corruptions"}),
    "--severities 5 --corruptions fog": (FOG, {"corruptions"}), f"--seed 1 {FOG}": (FOG, {"corruptions"}),
    IMAGES: ("", {"a-detections"}), MANY: (IMAGES, {"a-detections"}),
    f"--amp bf16 {MANY}": (MANY, {"a-detections"}), f"--image-size 96 {MANY}": (MANY, {"a-detections"}),
    f"--attention 1 {MANY}": (MANY, {"a-attention"}),
    f"--amp bf16 --attention 1 {MANY}": (f"--attention 1 {MANY}", {"a-detections", "a-attention"})}
ELSEWHERE_EVALUATE = {
    "--predictions": "test_boxes_of_a_file_are_evaluated",
    "--table": "test_rows_of_table_3_train_resume_and_evaluate",
    "--model": "test_the_command_evaluates_it_like_any_detector",
    "--frost-dir": "test_missing_frost_photographs_are_found_before_the_first_pass"}


def files_of(folder: Path) -> dict[str, list[bytes]]:
    """Stem -> content of the files that evaluate.py left."""
    stems = {path.stem for path in folder.iterdir()}
    return {stem: [path.read_bytes() for path in sorted(folder.glob(f"{stem}.*"))] for stem in stems}


def test_each_flag_of_evaluate_changes_what_it_should(tmp_path):
    torch.manual_seed(0)
    model = shaken(Detector(replace(VARIANTS["tiny"], queries=10), 8))
    save_model(tmp_path / "last.pt", model, SHAPES, data="shapes", image_size=64)
    detection_set("shapes", "val", limit=1).records[0].image().save(tmp_path / "a.png")
    seen = {}

    def files(flags):
        if flags not in seen:
            out = tmp_path / str(len(seen))
            usual = f"last.pt --limit-val 3 --workers 0 --device cpu --out {out} "
            call(tmp_path, "evaluate.py", *(usual + flags.format(image="a.png")).split())
            seen[flags] = files_of(out)
        return seen[flags]
    for flags, (others, expected) in EVALUATE.items():
        with_it, without = files(flags), files(others)
        # A file that is missing has not changed: --images and the like write others than an evaluation.
        assert {k for k in with_it if with_it[k] != without.get(k)} == expected, flags
