"""Runs that are killed or stopped or that go wrong: which files they leave and how they go on."""
import copy
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, call, refused

import data
import engine
from extras import pictures

STAGES = {
    "finetune": "--epochs 6 --eval-every 3 --limit-train 10 --limit-val 2 --batch-size 4 "
                "--micro-batch 2 --queries 5 --dropout 0.1",
    "pretrain": "--epochs 6 --eval-every 3 --limit-train 80 --limit-val 8 --batch-size 24 "
                "--micro-batch 12 --repeats 3 --mixup 0.8 --cutmix 1.0 --drop-path 0.1 --augment deit"}
# Its processes start with everything imported, because the imports take longer than such a short run.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["finetune", "pretrain", "torch._dynamo", "matplotlib.figure"])


def train(stage: str, out, flags: tuple[str, ...], save_every: float, prepare=None) -> None:
    """Runs a stage as from the command line. prepare: a function to call first."""
    torch.set_num_threads(1)
    engine.Run.save_every = save_every
    sys.argv = [stage, *STAGES[stage].split(), "--device", "cpu", "--out", str(out), *flags]
    sys.stdout = sys.stderr = open(f"{out}.txt", "w", buffering=1)
    if prepare:
        prepare()
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # for data loading, the default of Linux
    engine.run_script(__import__(stage).main)


def start(stage: str, out, *flags: str, save_every: float = 0, prepare=None) -> forkserver.Process:
    """save_every: seconds between checkpoints. With 0, each step saves one."""
    os.environ["PYTHONPATH"] = str(ROOT)
    process = forkserver.Process(target=train, args=(stage, out, flags, save_every, prepare))
    process.start()
    return process


def end_of(process: forkserver.Process, seconds: float = 60) -> int | None:
    """Waits for a process. Returns its exit code, or None if it had to be killed."""
    process.join(seconds)
    code = process.exitcode
    process.kill()
    return code


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def saved(folder) -> int:
    """The time of the last checkpoint in ns, or 0 if there is none."""
    return (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(stage, tmp_path):
    whole, killed, first = (tmp_path / name for name in ("whole", "killed", "first"))
    assert end_of(start(stage, first, "--epochs", "1", save_every=1e9)) == 0
    begin = "--pretrained" if stage == "finetune" else "--init", str(first / "last.pt")
    process = start(stage, whole, "--workers", "0", *begin)
    moments = random.Random(stage)
    reached = []  # the step from which each start goes on
    for kill in range(10):
        victim = start(stage, killed, "--workers", str(kill % 2), "--resume", *begin)
        before = saved(killed)
        if kill % 3:  # after the first step, perhaps while the next checkpoint is written
            wait_for(lambda: saved(killed) > before)
            time.sleep(moments.uniform(0, 0.05))
        else:  # at any moment, perhaps before the first step
            time.sleep(moments.uniform(0, 1))
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        reached += [weights(killed)["step"]] if saved(killed) else []
    last = start(stage, killed, "--workers", "0", "--resume", *begin)
    assert end_of(last) == end_of(process) == 0
    assert reached == sorted(reached) and len(set(reached)) > 4 and reached[-1] < 18
    a, b = weights(whole), weights(killed)
    assert (a["step"], a["scores"]) == (b["step"], b["scores"]) and a["step"] == 18
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())
    log = engine.read_log(killed / "log.jsonl")
    assert [e["epoch"] for e in log if "loss" not in e] == [3, 6]  # each evaluation once
    steps = [e["step"] for e in log if "loss" in e]
    assert steps == sorted(set(steps)) and steps[-1] == 18
    seconds = [e["seconds"] for e in log]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("stage, sent, code", [
    ("finetune", signal.SIGTERM, 0), ("pretrain", signal.SIGTERM, 0), ("finetune", signal.SIGINT, 130)])
def test_a_signal_to_all_processes_saves(stage, sent, code, tmp_path):
    out = tmp_path / "run"
    long = ["--epochs", "1000", "--eval-every", "1000"]
    process = start(stage, out, "--workers", "1", *long, save_every=1e9)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text())
    assert not (out / "last.pt").exists()
    asked = time.time()
    os.killpg(process.pid, sent)  # also to the data loading process
    assert end_of(process, 10) == code and time.time() - asked < 10
    said = (tmp_path / "run.txt").read_text()
    step = weights(out)["step"]
    assert step >= json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] > 0
    assert (f"stopped by {sent.name} after step {step}; the same command with --resume goes on from "
            f"{out / 'last.pt'}") in said
    assert ("a second Ctrl-C stops at once" in said) == (sent == signal.SIGINT)


def endless(stage: str, split: str) -> None:
    """Reading an image of a split takes 100 s, as from a file server that does not answer."""
    kind = data.DetectionSet if stage == "finetune" else data.ClassificationSet
    plain = kind.__getitem__

    def getitem(dataset, index):
        if dataset.name.endswith(split):
            time.sleep(100)
        return plain(dataset, index)
    kind.__getitem__ = getitem
    pictures.training_sheet = lambda *_: None


@pytest.mark.parametrize("stage, split, workers", [
    ("finetune", "train", "0"), ("finetune", "val", "2"), ("pretrain", "train", "2"),
    ("pretrain", "val", "0")])
def test_sigterm_acts_while_the_run_waits_for_images(stage, split, workers, tmp_path):
    """In training and in an evaluation. --resume goes on."""
    out, flags = tmp_path / "run", ("--workers", workers, "--epochs", "1", "--eval-every", "1")
    process = start(stage, out, *flags, save_every=1e9, prepare=partial(endless, stage, split))
    wait_for(lambda: (out / ("args.json" if split == "train" else "last.pt")).exists())
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    assert end_of(process, 10) == 0
    said = (tmp_path / "run.txt").read_text()
    assert "Traceback" not in said and "stopped by SIGTERM after step" in said
    assert weights(out)["step"] == (0 if split == "train" else 3)
    assert end_of(start(stage, out, *flags, "--resume")) == 0
    assert weights(out)["step"] == 3 and (out / "metrics.json").exists()


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_of_two_runs_in_one_folder_the_second_is_refused(flags, tmp_path):
    """Started at once, and while the other is running. The other one is not disturbed."""
    out, both = tmp_path / "run", []
    for _ in range(2):
        both.append(start("finetune", out, "--workers", "1", *flags))
    assert sorted(end_of(process) for process in both) == [0, 2]
    assert weights(out)["step"] == 18
    if not flags:
        return  # the rest is the same
    longer = start("finetune", out, "--epochs", "1000", "--resume")
    wait_for(lambda: weights(out)["step"] > 20)
    for more in ("--resume", "--overwrite"):
        assert end_of(start("finetune", out, "--epochs", "1000", more)) == 2
        assert "another process is at work in" in (tmp_path / "run.txt").read_text()
    reached = weights(out)["step"]
    wait_for(lambda: weights(out)["step"] > reached)
    longer.kill()
    longer.join()


def small_files() -> None:
    """Writing a file of more than 100 kB fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    out = tmp_path / "run"
    assert end_of(start("finetune", out, "--epochs", "1")) == 0
    before = (out / "last.pt").read_bytes()
    assert end_of(start("finetune", out, "--resume", "--epochs", "2", prepare=small_files)) == 2
    said = (tmp_path / "run.txt").read_text()
    assert "Traceback" not in said
    assert f"error: cannot write {out / 'last.pt'}" in said
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def poison(stage: str) -> None:
    """The gradient of the third step becomes infinite. The loss stays finite, and no weight changes."""
    module, steps = __import__(stage), [0]
    plain = module.train_step

    def train_step(model, *args, **kwargs):
        steps[0] += 1
        if steps[0] < 3:
            return plain(model, *args, **kwargs)
        model.encoder.layers[1].norm1.weight.register_hook(lambda grad: grad * float("inf"))
        before = copy.deepcopy(model.state_dict())
        try:
            return plain(model, *args, **kwargs)
        finally:
            assert all(torch.equal(weight, before[k]) for k, weight in model.state_dict().items())
    module.train_step = train_step


def order_of_images(stage: str) -> torch.Tensor:
    """The shuffled indices of the first epoch."""
    return torch.randperm(10 if stage == "finetune" else 80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_names_step_and_images(stage, tmp_path):
    out = tmp_path / "run"
    assert end_of(start(stage, out, prepare=partial(poison, stage))) == 2
    said = (tmp_path / "run.txt").read_text()
    assert "Traceback" not in said
    last = next(line for line in said.splitlines() if "error: " in line)
    assert "error: the gradient of step 3 is not finite, at the images " in last
    state = weights(out)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())
    numbers = [int(n) for n in last.split("images ")[1].split(" and ")[0].split(";")[0].split(", ")]
    # The third batch. Detection images count from 1. Pre-training shows each image three times.
    order = order_of_images(stage)
    assert numbers == (order[8:10] + 1 if stage == "finetune" else order[16:24]).tolist()


def break_image(stage: str, split: str, broken: int) -> None:
    """The image at the index `broken` of a split cannot be read."""
    gc.disable()  # the run must end without its help, too
    kind = data.DetectionSet if stage == "finetune" else data.ClassificationSet
    plain = kind.__getitem__

    def getitem(dataset, index):
        if index % len(dataset) == broken and dataset.name.endswith(split):
            raise engine.InputError("image x.png cannot be read")
        return plain(dataset, index)
    kind.__getitem__ = getitem


@pytest.mark.parametrize("stage, workers, split", [
    ("finetune", "2", "train"), ("finetune", "2", "val"), ("pretrain", "2", "train"),
    ("pretrain", "0", "val")])
def test_a_broken_image_stops_the_run_after_a_checkpoint(stage, workers, split, tmp_path):
    """It is in the third batch, so two steps are saved. Or it is found by the evaluation at the end, so all
    three are. When it is replaced, --resume goes on."""
    out, flags = tmp_path / "run", ("--epochs", "1", "--workers", workers, "--resume")
    index = order_of_images(stage)[9 if stage == "finetune" else 17].item() if split == "train" else 1
    process = start(stage, out, *flags, save_every=1e9, prepare=partial(break_image, stage, split, index))
    assert end_of(process) == 2
    said = (tmp_path / "run.txt").read_text()
    assert "Traceback" not in said
    assert "error: image x.png cannot be read\n" in said
    assert weights(out)["step"] == (2 if split == "train" else 3)
    assert end_of(start(stage, out, *flags)) == 0
    assert weights(out)["step"] == 3 and (out / "metrics.json").exists()


def test_a_folder_is_resumed_or_replaced_only_if_asked(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["finetune.py", *STAGES["finetune"].split(), *"--epochs 1 --device cpu --out run".split()]
    call(tmp_path, *flags, "--resume")  # nothing to resume yet: it starts
    (out / "evaluation").mkdir()
    (out / "evaluation" / "metrics.json").write_text("{}")
    refused(tmp_path, *flags, says="already holds a run")
    refused(tmp_path, *flags, "--resume", "--lr", 0.5, says="--lr 0.001 (now 0.5)")
    refused(tmp_path, *flags, "--resume", "--limit-train", 8, says="images 10 (now 8)")
    assert weights(out)["step"] == 3
    # --pretrained may lie in the folder that is replaced.
    call(tmp_path, *flags, "--overwrite", "--pretrained", "run/last.pt")
    assert "encoder, queries" in capsys.readouterr().out and not (out / "evaluation").exists()
    (tmp_path / "link").symlink_to(out)
    call(tmp_path, *flags, "--overwrite", "--out", "link")
    assert (tmp_path / "link").is_symlink()
    (out / "last.pt").unlink()
    refused(tmp_path, *flags, "--resume", says="last.pt is missing from a run that has results")
    assert (out / "best.pt").exists()
