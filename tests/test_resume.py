"""Runs that are killed, stopped, or whose numbers go wrong: what they leave, and how they go on."""
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

STAGES = {"finetune": ["--limit-train", "10", "--limit-val", "2", "--batch-size", "4", "--micro-batch", "2",
                       "--epochs", "6", "--eval-every", "3", "--queries", "5", "--dropout", "0.1"],
          "pretrain": ["--limit-train", "80", "--limit-val", "8", "--batch-size", "24", "--micro-batch",
                       "12", "--epochs", "6", "--eval-every", "3", "--repeats", "3", "--mixup", "0.8",
                       "--cutmix", "1.0", "--drop-path", "0.1", "--augment", "deit"]}
# Processes that have imported everything already: a run of this size takes less time than its imports.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["finetune", "pretrain", "torch._dynamo", "matplotlib.pyplot"])


def train(stage: str, out, flags: tuple[str, ...], save_every: float, prepare=None) -> None:
    """A run as from the command line, in a fresh process."""
    import engine
    import run_folder
    torch.set_num_threads(1)
    run_folder.Run.save_every = save_every
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
        resume = ["--resume"] if (killed / "args.json").exists() else []  # else nothing has begun
        victim, before = start(stage, killed, "--workers", str(kill % 2), *resume), saved(killed)
        if kill % 3:  # after a step at least: then, or while the next checkpoint is written
            wait_for(lambda: saved(killed) > before)
            time.sleep(moments.uniform(0, 0.05))
        else:  # at any moment, be it before the first step
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
    scores = "metrics" if stage == "finetune" else "scores"
    assert (a["step"], a[scores]) == (b["step"], b[scores]) and a["step"] == 18
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())
    log = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log if "loss" not in e] == [3, 6]  # each evaluation once


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_to_all_processes_saves_and_exits_0(stage, tmp_path):
    out = tmp_path / "run"
    process = start(stage, out, "--workers", "1", "--epochs", "1000", "--eval-every", "1000", save_every=1e9)
    wait_for(lambda: (out / "log.jsonl").exists())
    assert not (out / "last.pt").exists()
    asked = time.time()
    os.killpg(process.pid, signal.SIGTERM)  # the data loading process, too
    process.join(10)
    assert process.exitcode == 0
    assert time.time() - asked < 10
    said = (tmp_path / "run.txt").read_text()
    assert f"stopped by SIGTERM; the same command with --resume goes on from {out / 'last.pt'} (" in said
    step = weights(out)["step"]
    assert step >= json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] > 0


class between_micro_batches:
    """SIGTERM arrives in the loss of a micro-batch that a step still has others after."""

    def __init__(self, stage: str, loss: str, calls: int):
        self.stage, self.loss, self.calls = stage, loss, calls

    def __call__(self):
        module, left = __import__(self.stage), [self.calls]
        right = getattr(module, self.loss)

        def wrong(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
            return right(*args)
        setattr(module, self.loss, wrong)


def test_sigterm_within_a_step_ends_it_as_if_it_had_not_begun(tmp_path):
    """Steps may take long on a CPU. An epoch has 2 + 2 + 1 micro-batches: the 6th is the second's first."""
    whole, ended, short = tmp_path / "whole", tmp_path / "ended", ("--epochs", "2")
    start("finetune", whole, *short, save_every=1e9).join()
    process = start("finetune", ended, *short, save_every=1e9,
                    prepare=between_micro_batches("finetune", "detection_loss", 6))
    process.join(60)
    assert process.exitcode == 0 and weights(ended)["step"] == 3
    process = start("finetune", ended, *short, "--resume", save_every=1e9)
    process.join()
    a, b = weights(whole), weights(ended)
    assert process.exitcode == 0 and a["step"] == b["step"] == 6
    assert all(torch.equal(w, b["model"][k]) for k, w in a["model"].items())


def test_sigterm_before_training_and_in_an_evaluation_ends_at_once(tmp_path):
    process = start("finetune", tmp_path / "early", prepare=stop_in("prepare", tmp_path))
    process.join(60)
    assert process.exitcode == 0 and "before the first checkpoint" in (tmp_path / "early.txt").read_text()
    process = start("finetune", tmp_path / "late", prepare=stop_in("detect", tmp_path), save_every=1e9)
    process.join(60)
    assert process.exitcode == 0 and "--resume goes on from" in (tmp_path / "late.txt").read_text()
    state = weights(tmp_path / "late")
    assert (state["step"], state["epoch"]) == (9, 2)  # after the steps of the third epoch, before its AP


class stop_in:
    """SIGTERM arrives while a function of finetune.py runs, which then takes an hour."""

    def __init__(self, function: str, folder):
        self.function = function

    def __call__(self):
        import finetune

        def endless(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3600)
        setattr(finetune, self.function, endless)


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
    """A weight of a module becomes infinite after some steps, as if training had diverged."""

    def __init__(self, stage: str):
        self.stage = stage

    def __call__(self):
        stage, step = __import__(self.stage), [0]
        plain = stage.train_step

        def train_step(model, *args, **kwargs):
            step[0] += 1
            if step[0] == 3:
                norm = model.encoder.layers[1].norm1
                norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
            return plain(model, *args, **kwargs)
        stage.train_step = train_step


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_names_step_module_and_images(stage, tmp_path):
    out = tmp_path / "run"
    process = start(stage, out, prepare=poison(stage))
    process.join()
    said = (tmp_path / "run.txt").read_text()
    assert process.exitcode == 2 and "Traceback" not in said
    last = next(line for line in said.splitlines() if "error: " in line)
    assert "error: the loss of step 3 is not finite: the first that is not is the output of " \
           "encoder.layers.1.norm1, at the images " in last
    state = weights(out)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())
    numbers = [int(n) for n in last.split("images ")[1].split(" and ")[0].split(";")[0].split(", ")]
    total = torch.randperm(10 if stage == "finetune" else 80, generator=torch.Generator().manual_seed(0))
    # the first micro-batch of the third batch; image ids count from 1; three copies of each image in a row
    assert numbers == ((total[8:10] + 1).tolist() if stage == "finetune" else
                       total[16:20].repeat_interleave(3)[:8].tolist())
