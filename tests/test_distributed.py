"""The total batch decides, not how it is split: into micro-batches, and over processes, which torchrun
starts here. And what becomes of a run when one of its processes dies."""
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.data import default_collate

import finetune
import pretrain
from augment import ClassificationTransform, mix, smooth_targets
from data import classification_set, detection_set, micro_batches, pad_batch
from engine import BatchSampler
from inference import coco_metrics
from model import VARIANTS, Classifier, Detector
from semantic import load_tree, semantic_softmax_loss

# So few ReLUs that none is within rounding of zero, where its derivative would depend on the batch's size.
SMALL = replace(VARIANTS["tiny"], dim=16, mlp_dim=16, tokenizer_dim=16, layers=2, entry_layer=2, queries=10)


# ------------------------------------------------------------------------------------------- micro-batches

def gradients(model) -> dict:
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_micro_batches_fine_tune_as_one_pass_over_the_batch():
    """Four pictures of two sizes, so that each split pads them differently; one is without objects."""
    torch.manual_seed(0)
    model, dataset = Detector(SMALL, 8).train(), detection_set("shapes", "train", limit=4, image_size=64)
    for record in dataset.records[1:3]:
        record.source, record.size = record.source.resize((64, 96)), (64, 96)
        record.boxes = record.boxes * (1, 1.5, 1, 1.5)
    dataset.records[3].boxes, dataset.records[3].labels = np.zeros((0, 4)), np.zeros(0, int)
    samples = [dataset[i] for i in range(4)]
    images, mask, targets = pad_batch(samples)
    sum(finetune.detection_loss(model(images, mask), targets).values()).backward()
    whole, optimizer = gradients(model), torch.optim.SGD(model.parameters(), lr=0)
    for size in (1, 2, 4):
        finetune.train_step(model, optimizer, micro_batches(samples, size),
                            Namespace(clip=1e9, amp="off", micro_batch=size), torch.device("cpu"))
        assert_close(gradients(model), whole)


@pytest.mark.parametrize("with_tree", [False, True])
def test_micro_batches_pretrain_as_one_pass_over_the_batch(with_tree, tmp_path):
    torch.manual_seed(0)
    model = Classifier(replace(SMALL, adaptor="none"), 8).train()
    dataset = classification_set("shapes", "train", ClassificationTransform(64), limit=4)
    images, labels = default_collate([dataset[i] for i in range(4)])
    tree, args = None, Namespace(smoothing=0.1, mixup=0.8, cutmix=1.0, amp="off")
    if with_tree:  # of one root and seven classes below it
        (tmp_path / "t").write_text(json.dumps({"class_tree_list": [[0], *([i, 0] for i in range(1, 8))]}))
        tree = load_tree(tmp_path / "t")
        loss = semantic_softmax_loss(model(images), labels, tree, 0.1)
    else:
        mixed = mix(images.clone(), smooth_targets(labels, 8, 0.1), np.random.default_rng(5), 0.8, 1.0)
        loss = torch.nn.functional.cross_entropy(model(mixed[0]), mixed[1])
    loss.backward()
    whole, optimizer = gradients(model), torch.optim.SGD(model.parameters(), lr=0)
    for args.micro_batch in (1, 2, 4):
        rng = np.random.default_rng(5)
        pretrain.train_step(model, optimizer, images.clone(), labels, 8, rng, tree, args)
        assert_close(gradients(model), whole)


# --------------------------------------------------------------------------------------------- processes

def launch(folder, processes: int, jobs: list) -> tuple[str, int]:
    """-> stderr and exit code. Fails after 5 minutes; `terminate` lets torchrun end its processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []),
               str(ROOT / "tests" / "distributed_worker.py"), json.dumps(jobs)]
    running = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        return running.communicate(timeout=300)[1], running.returncode
    except subprocess.TimeoutExpired:
        running.terminate()
        pytest.fail(f"still running after 5 minutes: {running.communicate()[1]}")


def write_data(folder) -> None:
    """5 pictures for training, 7 for validation. Of the first total batch of 4, those that the second of two
    processes gets are without objects."""
    bare = BatchSampler(5, 4, seed=0).order()[1:4:2] + 1
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", 5), ("val", 7)):
        (folder / split).mkdir()
        dataset = detection_set("shapes", split, limit=count)
        for record in dataset.records:
            record.source.save(folder / split / f"{record.id}.png")
        objects = [a for a in dataset.ground_truth["annotations"] if a["image_id"] not in bare]
        content = {**dataset.ground_truth, "annotations": objects}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_found_data(folder, results: list[dict]) -> None:
    """The same pictures for validation, but the second and the tenth detection in each are its objects: a
    model that has hardly trained finds no others, and AP would be 0 whatever is counted."""
    truth, objects = detection_set(folder.parent / "data", "val").ground_truth, []
    for image in truth["images"]:
        found = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])
        objects += [{k: found[i][k] for k in ("image_id", "category_id", "bbox")} for i in (1, 9)]
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").symlink_to("../data/val")
    (folder / "annotations/instances_val.json").write_text(json.dumps({**truth, "annotations": objects}))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def runs(request, tmp_path_factory):
    """folder: where two trainings and an evaluation ran on one process and on two, by gloo on CPUs, by NCCL
    on GPUs. stderr: of the two, one of which was then killed in another training."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    same = ["--device", request.param, "--amp", "off", "--workers", "0"]
    # One image at a time: the numbers that are then added up are the same to the last bit.
    train = [*same, "--micro-batch", "1", "--epochs", "10", "--eval-every", "10"]
    finetuning = [*train, *"--data data --image-size 64 --augment flip --dropout 0 --batch-size 4".split()]
    # Evaluated where it is trained, so that every image counts: its class is among the best five.
    pretraining = [*train, *"--limit-train 7 --limit-val 7 --split train --batch-size 3".split(),
                   "--mixup", "0.8", "--cutmix", "1"]

    def jobs(name: str, data: str) -> list:
        return [("finetune", [*finetuning, "--out", f"{name}-finetune"], {"notes": f"{name}-finetune"}),
                ("pretrain", [*pretraining, "--out", f"{name}-pretrain"], {"notes": f"{name}-pretrain"}),
                ("evaluate", [*same, "one-finetune/last.pt", "--data", data, "--batch-size", "1", "--out",
                              f"{name}-evaluate"], {})]
    stderr, code = launch(folder, 1, jobs("one", "data"))
    assert code == 0, stderr
    write_found_data(folder / "found", read_results(folder, "one"))
    killed = ("finetune", [*finetuning, "--out", "killed"], {"victim": 1})
    stderr, code = launch(folder, 2, [*jobs("two", "found"), killed])
    assert code != 0 and (folder / "killed" / "args.json").exists(), stderr
    seconds = time.time() - (folder / "killed" / "args.json").stat().st_mtime  # since its first step
    return Namespace(folder=folder, stderr=stderr, seconds=seconds, device=request.param)


def read_results(folder, name: str) -> list[dict]:
    return json.loads((folder / f"{name}-evaluate" / "results.json").read_text())


def read_log(folder) -> list[dict]:
    return [{**json.loads(line), "seconds": 0} for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage, shares", [("finetune", [[2, 1], [2, 0]]), ("pretrain", [[2, 2], [1, 1]])])
def test_two_processes_train_as_one(runs, stage, shares):
    """Fine-tuning: 5 images in batches of 4, of whose last one the second process gets nothing.
    Pre-training: batches of 3, of which two images are mixed with each other."""
    one, *two = (torch.load(runs.folder / f"{name}.pt", map_location="cpu")
                 for name in (f"one-{stage}-0", f"two-{stage}-0", f"two-{stage}-1"))
    assert [process["shares"][:2] for process in two] == shares
    assert len(one["losses"]) == 20
    for process in two:
        assert_close(process["gradient"], one["gradient"])
        assert process["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-4)
        assert all(torch.equal(w, two[0]["weights"][k]) for k, w in process["weights"].items())
    for a, b in zip(*(read_log(runs.folder / f"{name}-{stage}") for name in ("one", "two")), strict=True):
        assert b == pytest.approx(a, rel=0, abs=1e-4)


def test_two_processes_evaluate_every_image_once(runs):
    one, two = (read_results(runs.folder, name) for name in ("one", "two"))
    assert Counter(r["image_id"] for r in two) == dict.fromkeys(range(1, 8), 100)
    assert sorted(two, key=json.dumps) == sorted(one, key=json.dumps)
    expected = coco_metrics(detection_set(runs.folder / "found", "val").ground_truth, one)
    measured = json.loads((runs.folder / "two-evaluate/metrics.json").read_text())
    assert 0.01 < expected["AP"] < 0.99 and expected.items() <= measured.items()


def test_a_process_that_dies_ends_the_run(runs):
    """Soon; torchrun says which process it was, and the other one that it is not the culprit."""
    assert runs.seconds < 60 and re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", runs.stderr)
    assert "[rank0]: Traceback" not in runs.stderr
    if runs.device == "cpu":  # on a GPU it may be inside of a kernel until torchrun ends it
        assert len(re.findall("error: process 0 lost .*--resume", runs.stderr)) == 1
