"""What several test files need: the folder of reference data, which a user does not have, and small
helpers."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("FPDETR_REFERENCE_DATA", ROOT.parent / "shared"))


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
