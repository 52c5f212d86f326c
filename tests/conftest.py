"""Helpers of several test files: programs run as a user runs them, checkpoints and data, and the
reference data, which a user does not have."""
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import deform_attn
import engine
from data import detection_set

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FPDETR_REFERENCE_DATA", ROOT.parent / "shared"))


def python(*arguments, folder=ROOT, code=0, **variables):
    """Runs Python in a process of its own, with these environment variables. Demands an exit code."""
    # Results on a GPU differ in the last bits. Two threads on a busy machine are many times slower.
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=variables, timeout=300,
                          text=True, capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run(folder, program, *flags):
    """Runs a program in a process of its own: run(tmp_path, "finetune.py", "--epochs", 1)."""
    return python(ROOT / program, *flags, folder=folder)


def call(folder, program, *flags, **options):
    """The same in this process, which saves the imports. options: what a fork passes to main()."""
    main = importlib.import_module(program.removesuffix(".py")).main
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [program, *map(str, flags)])
        engine.run_script(main, **options)


def refused(folder, program, *flags, says):
    """The program prints one line that contains `says`, exits with code 2 and writes nothing."""
    before, printed = sorted(folder.rglob("*")), io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as stop:
        call(folder, program, *flags)
    errors = [line for line in printed.getvalue().splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and says in errors[0], printed.getvalue()
    assert sorted(folder.rglob("*")) == before


@contextlib.contextmanager
def locked(path):
    """Another process holds the lock on a file."""
    code = f"import engine; f = engine.open_locked(engine.Path({str(path)!r}), 'a'); print(); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.kill()


def shaken(model, noise=0.05):
    """Moves the weights away from their initialisation, in which zeros could hide a mistake."""
    for p in model.parameters():
        p.data += noise * torch.randn_like(p)
    return model.eval()


def save_model(path, model, classes, stage="finetune", layout="paper", **flags):
    """A checkpoint as a run with these flags would leave it."""
    args = Namespace(layout=layout, **flags)
    description = engine.describe_run(model, args, stage, list(classes), images=9)
    engine.save_checkpoint(path, {**description, "model": model.state_dict()})
    return path


def coco_folder(folder, counts=(16, 6), **changes):
    """Some embedded pictures for training and validation as a folder in COCO format.
    changes: split=function(content)."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in zip(("train", "val"), counts):
        dataset = detection_set("shapes", split, limit=count)
        content = dataset.ground_truth
        (folder / split).mkdir()
        for entry, record in zip(content["images"], dataset.records):
            record.image().save(folder / split / entry["file_name"])
        if changes.get(split):
            changes[split](content)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def default_sigterm():
    """Restores the handlers of signals, which the main() of a stage replaces."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def shared():
    """shared("goldens/x.npz") -> its path; skips the test where the reference data are absent."""
    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"reference data {name} are not here (they are not part of the project)")
        return SHARED / name
    return path


@pytest.fixture
def fresh_kernels(monkeypatch, tmp_path):
    """Nothing is built, loaded or warned of yet, and the temporary folder is empty. -> this folder"""
    def clear():
        for cached in (deform_attn.load_kernel, deform_attn.loading_error, deform_attn.cuda_driver):
            cached.cache_clear()
    clear()
    monkeypatch.setattr(deform_attn, "warned", set())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    clear()


def deform_attn_inputs(shapes, B, Q, M, C, P, dtype, seed=0):
    """Random (value, reference points, offsets, logits) of `ms_deform_attn`. Reference points are in
    float32 or wider. Some lie outside the map."""
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value, offsets, logits = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in (
        (B, S, M, C), (B, Q, M, L, P, 2), (B, Q, M, L, P)))
    references = torch.rand(B, Q, L, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    references = references.to(torch.promote_types(dtype, torch.float32))
    return value.to(dtype), references, (2 * offsets).to(dtype), logits.to(dtype)
