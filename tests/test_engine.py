"""Checkpoints, weights that pass between the stages, batches over processes, flags, one-line errors."""
import argparse
import json
import os
import pickle
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, python, refused, save_model

import engine
from engine import InputError
from evaluate import load_detector
from extras.released import read_checkpoint
from model import VARIANTS, Detector

TINY = VARIANTS["tiny"]


def start_from(model, path, classes="ab"):
    args = Namespace(layout="paper")
    description = engine.describe_run(model, args, "finetune", list(classes), images=9)
    return engine.copy_weights(model, read_checkpoint(path), description, path)


# ------------------------------------------------------------------------------------------ checkpoints

def test_a_saved_detector_loads_with_the_same_outputs(tmp_path):
    model, images = Detector(TINY, 2).eval(), torch.randn(1, 3, 64, 64)
    loaded, checkpoint = load_detector(save_model(tmp_path / "a.pt", model, "ab"))
    assert torch.equal(loaded(images)["pred_logits"], model(images)["pred_logits"])
    assert checkpoint["classes"] == ["a", "b"] and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


def test_a_detector_of_other_classes_gives_all_but_its_class_head(tmp_path):
    old, new = Detector(TINY, 7), Detector(TINY, 2)
    message = start_from(new, save_model(tmp_path / "d.pt", old, "abcdefg"))
    assert torch.equal(new.queries.content, old.queries.content)
    assert torch.equal(new.box_head[0].weight, old.box_head[0].weight)
    assert message.endswith("starting fresh: class_head")
    save_model(tmp_path / "d.pt", Detector(TINY, 2), "ab")
    assert start_from(new, tmp_path / "d.pt", classes="ba").endswith("starting fresh: class_head")
    assert start_from(new, tmp_path / "d.pt").endswith("starting fresh: nothing")
    save_model(tmp_path / "d.pt", Detector(TINY, 2), ("class 0", "class 1"))  # as some files name them
    assert start_from(new, tmp_path / "d.pt").endswith("starting fresh: nothing")


class Evil:
    def __reduce__(self):
        return print, ("unpickled!",)


def test_pickles_are_refused_and_never_run(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="not unpickled"):
            engine.load_checkpoint(tmp_path / name)
    assert "unpickled!" not in capsys.readouterr().out


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("hello")
    whole = save_model(tmp_path / "whole.pt", Detector(TINY, 2), "ab").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("tensor.pt", "text.pt", "half.pt", "gone.pt", "empty.pt"):
        with pytest.raises(InputError, match=name) as e:
            engine.load_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)
    torch.save({"weights": 3}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt is neither"):
        start_from(Detector(TINY, 2), tmp_path / "other.pt")


def test_only_the_same_run_can_be_resumed(tmp_path):
    """Each part of the recipe differs once and is refused. Machine flags and more epochs are not."""
    def description(config=TINY, classes=("a", "b"), images=9, model=Detector, **flags):
        args = dict(layout="paper", lr=0.1, epochs=5, workers=2, pretrained=None)
        model = model(config, len(classes))
        return engine.describe_run(model, Namespace(**{**args, **flags}), "finetune", classes, images)
    saved = {**description(), "optimizer": {}, "epoch": 3}
    machine = dict(workers=0, data_root="x", device="cuda", micro_batch=1, activation_checkpointing=True,
                   compile=True, eval_every=3, out="x", resume=True, overwrite=True)
    assert engine.MACHINE_FLAGS == set(machine)
    for same in (description(), description(**machine, epochs=9), description(epochs=3)):
        engine.check_resumed(saved, same, tmp_path)
    for other, says in ((description(lr=0.2), r"--lr 0.1 \(now 0.2\)"),
                        (description(images=8), "images 9"),
                        (description(pretrained="x.pt"), "--pretrained None"),
                        (description(replace(TINY, dropout=0.3)), "dropout"),
                        (description(classes=("a", "c")), "classes"),
                        ({**description(), "content": {"training_set": "1a"}}, "training_set None .now 1a"),
                        ({**description(), "stage": "pretrain"}, "stage finetune"),
                        (description(model=type("Mine", (Detector,), {})), "model_class Detector")):
        with pytest.raises(InputError, match=says):
            engine.check_resumed(saved, other, tmp_path)
    del saved["optimizer"]
    with pytest.raises(InputError, match="cannot be resumed"):
        engine.check_resumed(saved, description(), tmp_path)


def test_epochs_of_a_resumed_run_may_grow_but_not_fall_below_the_steps_taken(capsys):
    saved = {"step": 13, "args": {"epochs": 4}}
    for epochs, schedule, jumps in ((4, "one-cycle", 0), (5, "step", 0), (5, "one-cycle", 1)):
        engine.check_epochs(Namespace(epochs=epochs, schedule=schedule), saved, steps=4)
        assert ("rate jumps" in capsys.readouterr().out) == jumps
    for epochs, planned, says in ((3, 4, "4 of 4: give --epochs 4"), (4, 9, "4 of 9: give --epochs 5")):
        with pytest.raises(InputError, match=says):
            saved["args"]["epochs"] = planned
            engine.check_epochs(Namespace(epochs=epochs, schedule="step"), saved, steps=4)


def test_a_checkpoint_is_saved_every_ten_minutes_if_all_weights_are_finite(tmp_path, capsys):
    model, flags = torch.nn.Linear(1, 1), dict(out=str(tmp_path), overwrite=False, data="x")
    optimizer, run = torch.optim.SGD(model.parameters()), engine.Run(Namespace(resume=False, **flags), "x")
    run.saved_at -= 590
    assert not run.must_save()
    run.saved_at -= 20
    assert run.must_save()
    run.save({}, model, optimizer, step=1)
    assert not run.must_save()
    run.started -= 90
    run.finish(model, Namespace(), type("Set", (list,), {"name": "x val"})(), {"AP": 0.25}, step=1)
    assert "x val, 0 images, after 1.5 minutes: AP 25.0" in capsys.readouterr().out
    resumed = engine.Run(Namespace(resume=True, **flags), "x")
    os.utime(run.last, (1, 1))
    with pytest.raises(InputError, match="another process has just written"):
        resumed.open(Namespace(resume=True, **flags))
    model.bias.data.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite after step 2"):
        run.save({}, model, optimizer, step=2)
    assert engine.load_checkpoint(run.last)["step"] == 1


# ---------------------------------------------------------------------------------- batches and flags

def test_batches_cover_an_epoch_once_whatever_the_number_of_processes(monkeypatch):
    def epoch(processes, seed=0, number=0, skip=0):
        batches = []
        for r in range(processes):
            monkeypatch.setattr(engine, "rank", lambda r=r: r)
            monkeypatch.setattr(engine, "world_size", lambda: processes)
            sampler = engine.BatchSampler(10, 4, seed)
            sampler.epoch, sampler.skip = number, skip
            batches.append(list(sampler))
        return [sorted(i for part in step for i in part) for step in zip(*batches)]
    assert sorted(i for batch in epoch(1) for i in batch) == list(range(10))
    assert [len(b) for b in epoch(1)] == [4, 4, 2]
    assert epoch(1) == epoch(2) == epoch(3)  # with three, one process has nothing in the last batch
    assert epoch(1) != epoch(1, number=1) != epoch(1, seed=1) != epoch(1)
    assert epoch(1, skip=2) == epoch(1)[2:]
    sampler = engine.BatchSampler(10, 4, 0)
    assert [sampler.images_after(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]
    draws = set()
    for r in range(3):  # each process has dropout of its own
        monkeypatch.setattr(engine, "rank", lambda r=r: r)
        engine.seed_step(0, 5)
        draws.add(torch.rand(1).item())
    assert len(draws) == 3


def test_numbers_of_flags_have_bounds():
    assert (engine.positive("1"), engine.natural("0"), engine.rate("0")) == (1, 0, 0)
    assert engine.fraction("0.9") == 0.9
    for kind, text in ((engine.positive, "0"), (engine.natural, "-1"), (engine.fraction, "1"),
                       (engine.rate, "nan"), (engine.rate, "inf"), (engine.rate, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kind(text)


def test_means_over_steps():
    steps = [{"a": torch.tensor(a), "b": torch.tensor(b)} for a, b in ((1, 10), (2, 20), (6, 60))]
    assert engine.mean_over_steps(steps) == {"a": 3, "b": 30}


# -------------------------------------------------------------------------------------- one-line errors

class BrokenSet(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise InputError("image x.jpg cannot be read: replace it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_data_loading_process_is_one_line_too(workers, tmp_path, capsys):
    def main():
        args = Namespace(workers=workers, out=tmp_path / "run", resume=False, overwrite=False, data="x")
        loader = engine.make_loader(BrokenSet(), list, args, torch.device("cpu"), batch_size=2)
        list(engine.read_batches(loader, engine.Run(args, "finetune")))
    with pytest.raises(SystemExit) as stop:
        engine.run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image x.jpg cannot be read: replace it\n"


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def main(error):
        raise error
    for error in (ValueError("x"), RuntimeError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            engine.run_script(main, error=error)
    for error in (ValueError("FPDETR_DEFORM_ATTN=cpu: no compiler"), MemoryError(),
                  torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(SystemExit):
            engine.run_script(main, error=error)


# ------------------------------------------------------------------------------------ the surroundings

def tiny_run(folder, *flags, shell="bash", before=""):
    """A short fine-tuning in a process of its own, in a shell after the command `before`."""
    command = [sys.executable, str(ROOT / "finetune.py"), *map(str, flags), "--out", str(folder / "run"),
               *"--limit-val 2 --epochs 1 --queries 5 --device cpu".split()]
    return subprocess.run([*shell.split(), "-c", f"{before}\n{shlex.join(command)}"], cwd=folder, text=True,
                          capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_batch_needs_no_open_file_per_tensor(tmp_path):
    done = tiny_run(tmp_path, *"--limit-train 30 --batch-size 30 --micro-batch 1 --workers 1".split(),
                    before="ulimit -n 90")
    assert done.returncode == 0, done.stderr


def test_full_shared_memory_is_one_line(tmp_path):
    """Docker gives 64 MB. Before, the run waited for ever."""
    shell = "unshare --mount --propagation private bash"
    if subprocess.run([*shell.split(), "-c", "true"], capture_output=True).returncode:
        pytest.skip("a small /dev/shm needs the right to mount one")
    done = tiny_run(tmp_path, *"--limit-train 64 --image-size 512 --batch-size 32 --micro-batch 1 "
                    "--workers 1".split(), shell=shell,
                    before="set -e; mount -t tmpfs -o size=16m tmpfs /dev/shm")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert "--shm-size" in done.stderr and "--workers" in done.stderr and "Traceback" not in done.stderr


def test_a_run_in_a_notebook_of_windows(tmp_path):
    """Without the modules that exist only on Unix, and with variables that other programs set."""
    code = ("import sys\n"
            "for name in ('fcntl', 'resource', 'grp', 'termios'): sys.modules[name] = None\n"
            "import engine, evaluate, finetune, pretrain, extras.benchmark, extras.claims\n"
            "sys.argv[1:] = '--limit-train 8 --limit-val 2 --epochs 1 --device cpu --out run'.split()\n"
            "engine.run_script(finetune.main)")
    python("-c", code, folder=tmp_path, PYTHONPATH=str(ROOT), WORLD_SIZE="1",
           MPLBACKEND="module://matplotlib_inline.backend_inline")


def test_world_size_without_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path, "finetune.py", says="start with torchrun, or unset WORLD_SIZE")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "abc")):
        monkeypatch.setenv(name, value)
    refused(tmp_path, "finetune.py", says="the variables of torchrun are wrong")


def test_closed_output_and_an_ascii_terminal(tmp_path):
    script = ROOT / "evaluate.py", "--table", "5"
    for closed in (">&-", "2>&-"):
        command = f"{shlex.join(map(str, (sys.executable, *script)))} {closed}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 and done.stderr == b""
    assert r"28.6\xb10.2" in python(*script, PYTHONIOENCODING="ascii").stdout


def test_output_to_a_reader_that_has_gone_ends_quietly():
    """Exit code 141, as a shell reports it."""
    code = "import engine; engine.run_script(lambda: [print('x' * 100) for _ in range(10_000)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_bf16_is_the_default_only_where_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "off")):
        emulated = lambda including_emulation=True, has=has: has or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
        args = Namespace(device="cuda", amp=None, seed=0)
        engine.setup(args)
        assert args.amp == expected


def test_a_log_is_only_added_to_and_resumed_entries_replace_older_ones(tmp_path):
    lines = [{"epoch": 1, "step": 10, "loss": 1}, {"epoch": 1, "step": 10, "AP": 0.1},
             {"epoch": 2, "step": 20, "loss": 2}, {"resumed": True, "epoch": 1, "step": 15},
             {"epoch": 2, "step": 20, "loss": 3}, {"epoch": 2, "step": 20, "AP": 0.2},
             {"resumed": True, "epoch": 1, "step": 20}, {"epoch": 2, "step": 20, "AP": 0.3}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"epoch": 3, "st'
    (tmp_path / "log.jsonl").write_bytes(b"\xff\0\n" + text.encode())  # and a damaged line
    assert engine.read_log(tmp_path / "log.jsonl") == [lines[i] for i in (0, 1, 4, 7)]
