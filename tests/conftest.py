"""Helpers of several test files: the folder of reference data, which a user does not have, and programs run
as a user runs them."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("FPDETR_REFERENCE_DATA", ROOT.parent / "shared"))


# Results on a GPU differ in the last bits, so programs are tested on the CPU.
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(folder, *command, code=0):
    """Runs a program of the project in a folder: run(tmp_path, "finetune.py", "--epochs", 1)."""
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])], cwd=folder,
                          text=True, capture_output=True, env=CPU, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(folder, *command, says):
    """Exit code 2 and one line that holds `says`. Nothing is written."""
    before = sorted(folder.rglob("*"))
    done = run(folder, *command, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0], done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(autouse=True)
def default_sigterm():
    """A run's main(), called inside a test, takes SIGTERM over."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def shared():
    """shared("goldens/x.npz") -> its path; skips the test where the reference data are absent."""
    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"reference data {name} are not here (they are not part of the project)")
        return SHARED / name
    return path


def deform_attn_inputs(shapes, B, Q, M, C, P, dtype, seed=0):
    """Random (value, reference points, offsets, logits) of `ms_deform_attn`. References are in float32 or
    wider, and some lie outside of the map."""
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value, offsets, logits = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in (
        (B, S, M, C), (B, Q, M, L, P, 2), (B, Q, M, L, P)))
    references = torch.rand(B, Q, L, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    references = references.to(torch.promote_types(dtype, torch.float32))
    return value.to(dtype), references, (2 * offsets).to(dtype), logits.to(dtype)
