"""Two processes that torchrun starts train and evaluate like one. If a process dies, the run ends."""
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
from conftest import ROOT, coco_folder

from data import detection_set
from engine import BatchSampler
from evaluate import coco_metrics


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max()
        assert difference <= 1e-6, name


def launch(folder, processes: int, jobs: list) -> tuple[str, int]:
    """Runs distributed_worker.py. Returns stderr and exit code. Fails after 5 minutes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []),
               str(ROOT / "tests" / "distributed_worker.py"), json.dumps(jobs)]
    running = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        return running.communicate(timeout=300)[1], running.returncode
    except subprocess.TimeoutExpired:
        running.terminate()  # torchrun ends its processes
        pytest.fail(f"still running after 5 minutes: {running.communicate()[1]}")


def write_data(folder) -> None:
    """Writes 5 training and 7 validation pictures. In the first batch of 4, the pictures of the second
    process have no objects."""
    bare = BatchSampler(5, 4, seed=0).order()[1:4:2] + 1

    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in bare]
    coco_folder(folder, (5, 7), train=change)


def write_classes(folder) -> None:
    """Writes 7 pictures, each with a class of its own. Training and validation have the same ones."""
    for i, record in enumerate(detection_set("shapes", "train", limit=7).records):
        (folder / "train" / f"class{i}").mkdir(parents=True)
        record.source.save(folder / "train" / f"class{i}" / "a.png")
    (folder / "val").symlink_to("train")


def write_found_data(folder, results: list[dict]) -> None:
    """Writes the validation pictures again, with the second and the tenth detection in each as objects.
    The model has hardly trained, so with the true objects AP would always be 0."""
    truth, objects = detection_set(folder.parent / "data", "val").ground_truth, []
    for image in truth["images"]:
        found = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])
        objects += [{k: found[i][k] for k in ("image_id", "category_id", "bbox")} for i in (1, 9)]
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").symlink_to("../data/val")
    content = {**truth, "annotations": objects}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def runs(request, tmp_path_factory):
    """Two trainings and an evaluation in `folder`, in one process, then in two (gloo on CPUs, NCCL on
    GPUs). In one more training, the second process is killed. stderr: of the two processes.
    """
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder / "data")
    write_classes(folder / "classes")
    same = ["--device", request.param, "--amp", "off", "--workers", "0"]
    # One image at a time, so that each image has the same numbers to the last bit.
    train = [*same, "--micro-batch", "1", "--epochs", "10", "--eval-every", "10"]
    train += ["--image-size", "64", "--augment", "flip"]
    finetuning = [*train, *"--data data --dropout 0 --batch-size 4".split()]
    pretraining = [*train, *"--data classes --repeats 1 --schedule one-cycle --lr 2e-4 --batch-size 3 "
                            "--drop-path 0 --mixup 0.8 --cutmix 1".split()]
    evaluation = [*same, "one-finetune/last.pt", "--batch-size", "1"]

    def jobs(name: str, data: str) -> list:
        a, b, c = f"{name}-finetune", f"{name}-pretrain", f"{name}-evaluate"
        return [("finetune", [*finetuning, "--out", a], {"notes": a}),
                ("pretrain", [*pretraining, "--out", b], {"notes": b}),
                ("evaluate", [*evaluation, "--data", data, "--out", c], {})]
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
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


@pytest.mark.parametrize("stage, shares", [("finetune", [[2, 1], [2, 0]]),
                                           ("pretrain", [[2, 2], [1, 1]])])
def test_two_processes_train_as_one(runs, stage, shares):
    """Fine-tuning has 5 images in batches of 4, so the second process gets nothing of the last batch.
    Pre-training has batches of 3. A process gets the two images that are mixed with each other."""
    one, *two = (torch.load(runs.folder / f"{name}.pt", map_location="cpu")
                 for name in (f"one-{stage}-0", f"two-{stage}-0", f"two-{stage}-1"))
    assert [process["shares"][:2] for process in two] == shares
    assert len(one["losses"]) == 20
    for process in two:
        assert_close(process["gradient"], one["gradient"])
        # AdamW divides small gradients by their own size, so rounding grows over the 20 steps.
        assert process["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-3)
        assert all(torch.equal(w, two[0]["weights"][k]) for k, w in process["weights"].items())
    logs = [read_log(runs.folder / f"{name}-{stage}") for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert b == pytest.approx(a, rel=0, abs=1e-3)


def test_two_processes_evaluate_every_image_once(runs):
    one, two = (read_results(runs.folder, name) for name in ("one", "two"))
    assert Counter(r["image_id"] for r in two) == dict.fromkeys(range(1, 8), 12 * 8)
    assert sorted(two, key=json.dumps) == sorted(one, key=json.dumps)
    expected = coco_metrics(detection_set(runs.folder / "found", "val").ground_truth, one)
    measured = json.loads((runs.folder / "two-evaluate/metrics.json").read_text())
    assert 0.01 < expected["AP"] < 0.99 and expected.items() <= measured.items()


def test_a_process_that_dies_ends_the_run(runs):
    """torchrun soon says which process died. The other one prints one line and no traceback."""
    assert runs.seconds < 60 and re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", runs.stderr)
    assert "[rank0]: Traceback" not in runs.stderr
    if runs.device == "cpu":  # a process on a GPU may wait in a kernel until torchrun ends it
        assert len(re.findall("error: process 0 lost .*--resume", runs.stderr)) == 1
