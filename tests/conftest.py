"""What several test files need: the folder of reference data, which a user does not have, and small
helpers."""
import os
import sys
from pathlib import Path

import pytest

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
