"""Two processes, started by torchrun, train and evaluate as one. If a process dies, the run ends."""
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter

import pytest
import torch
from conftest import ROOT

from data import detection_set
from engine import BatchSampler
from evaluate import coco_metrics


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


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


def write_classes(folder) -> None:
    """7 pictures, each of a class of its own, for training and for validation, so that each counts."""
    for i, record in enumerate(detection_set("shapes", "train", limit=7).records):
        (folder / "train" / f"class{i}").mkdir(parents=True)
        record.source.save(folder / "train" / f"class{i}" / "a.png")
    (folder / "val").symlink_to("train")


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
    write_classes(folder / "classes")
    same = ["--device", request.param, "--amp", "off", "--workers", "0"]
    # One image at a time: the numbers that are then added up are the same to the last bit.
    train = [*same, "--micro-batch", "1", "--epochs", "10", "--eval-every", "10"]
    finetuning = [*train, *"--data data --image-size 64 --augment flip --dropout 0 --batch-size 4".split()]
    pretraining = [*train, *"--data classes --image-size 64 --augment flip --repeats 1".split(),
                   *"--schedule one-cycle --lr 2e-4 --batch-size 3 --drop-path 0".split(),
                   *"--mixup 0.8 --cutmix 1".split()]

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
        # AdamW divides small gradients by their own size, so rounding grows over the 20 steps.
        assert process["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-3)
        assert all(torch.equal(w, two[0]["weights"][k]) for k, w in process["weights"].items())
    for a, b in zip(*(read_log(runs.folder / f"{name}-{stage}") for name in ("one", "two")), strict=True):
        assert b == pytest.approx(a, rel=0, abs=1e-3)


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
