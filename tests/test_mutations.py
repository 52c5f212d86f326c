"""tests/mutations.py, which plants mistakes for the tests to catch, still fits the code. (To run it takes
six minutes, so it is a command, not a test.)"""
import pytest

from conftest import ROOT
from mutations import MUTATIONS, planted


@pytest.mark.parametrize("what, file, right, wrong, tests", MUTATIONS)
def test_each_mistake_finds_its_place(what, file, right, wrong, tests):
    mutant = planted(right, wrong, (ROOT / file).read_text())
    assert right != wrong
    if file.endswith(".py"):
        compile(mutant, file, "exec")
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in tests.split())


def test_there_are_enough_of_them_everywhere():
    assert len(MUTATIONS) >= 20
    assert {file for _, file, *_ in MUTATIONS} >= {"model.py", "finetune.py", "deform_attn.py", "engine.py",
                                                   "deform_attn_kernel.cu", "corruptions.py", "pretrain.py"}
