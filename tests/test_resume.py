"""Runs that are killed, stopped, or go wrong: what they leave, and how they go on."""
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image

STAGES = {"finetune": ["--limit-train", "10", "--limit-val", "2", "--batch-size", "4", "--micro-batch", "2",
                       "--epochs", "6", "--eval-every", "3", "--queries", "5", "--dropout", "0.1"],
          "pretrain": ["--limit-train", "80", "--limit-val", "8", "--batch-size", "24", "--micro-batch",
                       "12", "--epochs", "6", "--eval-every", "3", "--repeats", "3", "--mixup", "0.8",
                       "--cutmix", "1.0", "--drop-path", "0.1", "--augment", "deit"]}
# Processes that have imported everything already: a run of this size takes less time than its imports.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["finetune", "pretrain", "torch._dynamo", "matplotlib.figure"])


def train(stage: str, out, flags: tuple[str, ...], save_every: float, prepare=None) -> None:
    """A run as from the command line, in a fresh process."""
    import engine
    torch.set_num_threads(1)
    engine.Run.save_every = save_every
    sys.argv = [stage, *STAGES[stage], "--device", "cpu", "--out", str(out), *flags]
    sys.stdout = sys.stderr = open(f"{out}.txt", "w", buffering=1)
    if prepare:
        prepare()
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as in any run
    engine.run_script(__import__(stage).main)


def start(stage: str, out, *flags: str, save_every: float = 0, prepare=None) -> forkserver.Process:
    """`save_every`: seconds between checkpoints, 0 for one after every step."""
    os.environ["PYTHONPATH"] = str(ROOT)
    process = forkserver.Process(target=train, args=(stage, out, flags, save_every, prepare))
    process.start()
    return process


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def saved(folder) -> int:
    """When the folder's last checkpoint was written, in ns."""
    return (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(stage, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(stage, whole, "--workers", "0")
    moments, reached = random.Random(stage), []  # reached: the step from which each start goes on
    for kill in range(10):
        victim, before = start(stage, killed, "--workers", str(kill % 2), "--resume"), saved(killed)
        if kill % 3:  # after a step at least: then, or while the next checkpoint is written
            wait_for(lambda: saved(killed) > before)
            time.sleep(moments.uniform(0, 0.05))
        else:  # at any moment, perhaps before the first step
            time.sleep(moments.uniform(0, 1))
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        reached += [weights(killed)["step"]] if saved(killed) else []
    last = start(stage, killed, "--workers", "0", "--resume")
    last.join()
    process.join()
    assert process.exitcode == last.exitcode == 0
    assert reached == sorted(reached) and len(set(reached)) > 4 and reached[-1] < 18
    a, b = weights(whole), weights(killed)
    assert (a["step"], a["scores"]) == (b["step"], b["scores"]) and a["step"] == 18
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())
    log = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log if "loss" not in e] == [3, 6]  # each evaluation once


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_to_all_processes_saves_and_exits_0(stage, tmp_path):
    out = tmp_path / "run"
    process = start(stage, out, "--workers", "1", "--epochs", "1000", "--eval-every", "1000", save_every=1e9)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text())
    assert not (out / "last.pt").exists()
    asked = time.time()
    os.killpg(process.pid, signal.SIGTERM)  # the data loading process, too
    process.join(10)
    assert process.exitcode == 0
    assert time.time() - asked < 10
    said = (tmp_path / "run.txt").read_text()
    step = weights(out)["step"]
    assert step >= json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] > 0
    assert (f"stopped by SIGTERM after step {step}; the same command with --resume goes on from "
            f"{out / 'last.pt'}") in said


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # like a full disk: larger files fail


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    out = tmp_path / "run"
    start("finetune", out, "--epochs", "1").join()
    before = (out / "last.pt").read_bytes()
    process = start("finetune", out, "--resume", "--epochs", "2", prepare=small_files)
    process.join()
    said = (tmp_path / "run.txt").read_text()
    assert process.exitcode == 2 and "Traceback" not in said
    assert f"error: cannot write {out / 'last.pt'}" in said
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))


class poison:
    """A gradient becomes infinite in the third step, as if training had diverged. The loss is finite."""

    def __init__(self, stage: str):
        self.stage = stage

    def __call__(self):
        stage, step = __import__(self.stage), [0]
        plain = stage.train_step

        def train_step(model, *args, **kwargs):
            step[0] += 1
            if step[0] == 3:
                model.encoder.layers[1].norm1.weight.register_hook(lambda grad: grad * float("inf"))
            return plain(model, *args, **kwargs)
        stage.train_step = train_step


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_names_step_and_images(stage, tmp_path):
    out = tmp_path / "run"
    process = start(stage, out, prepare=poison(stage))
    process.join()
    said = (tmp_path / "run.txt").read_text()
    assert process.exitcode == 2 and "Traceback" not in said
    last = next(line for line in said.splitlines() if "error: " in line)
    assert "error: the gradient of step 3 is not finite, at the images " in last
    state = weights(out)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())
    numbers = [int(n) for n in last.split("images ")[1].split(" and ")[0].split(";")[0].split(", ")]
    total = torch.randperm(10 if stage == "finetune" else 80, generator=torch.Generator().manual_seed(0))
    # The third total batch: ids of detection images count from 1; pre-training has three copies in a row.
    assert numbers == (total[8:10] + 1 if stage == "finetune" else total[16:24]).tolist()


def test_a_broken_image_stops_the_run_after_a_checkpoint_and_resume_goes_on(tmp_path):
    """Two data loading processes or none: the step before the broken image is saved."""
    data, out = tmp_path / "data", tmp_path / "run"
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(1, 7)]
    content = {"images": images,
               "annotations": [{"image_id": 1, "category_id": 1, "bbox": [9, 9, 20, 20]}],
               "categories": [{"id": 1, "name": "x"}]}
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (data / split).mkdir()
        for i in range(1, 7):
            Image.effect_noise((64, 64), 50).convert("RGB").save(data / split / f"{i}.png")
        (data / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)) + 1
    broken = data / "train" / f"{order[4]}.png"  # in the third batch of two
    whole = broken.read_bytes()
    flags = ["--data", str(data), "--image-size", "64", "--batch-size", "2", "--epochs", "1",
             "--limit-train", "6"]
    for size, damage in ((whole[:len(whole) // 2], "cannot be read"), (None, "is 32 x 32, but")):
        if size is None:
            Image.new("RGB", (32, 32)).save(broken)
        else:
            broken.write_bytes(size)
        process = start("finetune", out, *flags, "--resume", "--workers", "0" if size else "2",
                        save_every=1e9)
        process.join(60)
        said = (tmp_path / "run.txt").read_text()
        assert process.exitcode == 2 and "Traceback" not in said, said
        assert f"error: image {broken} {damage}" in said
        assert weights(out)["step"] == 2
    broken.write_bytes(whole)
    process = start("finetune", out, *flags, "--resume")
    process.join(60)
    assert process.exitcode == 0 and weights(out)["step"] == 3 and (out / "metrics.json").exists()


def test_a_folder_is_resumed_or_replaced_whole_and_never_silently(tmp_path):
    out, short = tmp_path / "run", ("--epochs", "1", "--eval-every", "1")

    def run(*flags):
        process = start("finetune", out, *short, *flags)
        process.join(60)
        return process.exitcode, (tmp_path / "run.txt").read_text()
    assert run("--resume")[0] == 0  # nothing to resume yet: it starts
    (out / "evaluation").mkdir()
    (out / "evaluation" / "metrics.json").write_text("{}")
    code, said = run()
    assert code == 2 and "already holds a run" in said
    code, said = run("--resume", "--lr", "0.5")
    assert code == 2 and "--lr 0.001 (now 0.5)" in said
    code, said = run("--resume", "--limit-train", "8")
    assert code == 2 and "images 10 (now 8)" in said
    assert weights(out)["step"] == 3
    # A checkpoint to start from may be in the folder that is replaced: it is read before.
    assert run("--overwrite", "--pretrained", str(out / "last.pt"))[0] == 0
    assert not (out / "evaluation").exists() and "encoder, queries" in (tmp_path / "run.txt").read_text()
    (out / "last.pt").unlink()
    code, said = run("--resume")
    assert code == 2 and "last.pt is missing from a run that has results" in said
    assert (out / "best.pt").exists()
