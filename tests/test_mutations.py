"""tests/mutations.py still fits the code. (It takes minutes to run, so it is a command and not a test.)"""
import pytest

from conftest import ROOT
from mutations import MUTATIONS, plant


@pytest.mark.parametrize("what, file, right, wrong, tests", MUTATIONS)
def test_each_mistake_can_be_planted(what, file, right, wrong, tests):
    planted = plant(right, wrong, (ROOT / file).read_text())
    assert right != wrong
    if file.endswith(".py"):
        compile(planted, file, "exec")
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in tests.split())
