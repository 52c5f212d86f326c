"""What the experiments cost, by arithmetic, against a count by hand; what training keeps in memory; and the
operator's benchmark."""
import sys

import pytest
import torch

import benchmark
import deform_attn_benchmark
from benchmark import activation_bytes, cost_table, forward_flops
from conftest import deform_attn_inputs
from deform_attn import ms_deform_attn_reference
from model import Classifier, Detector


def test_flop_are_those_of_a_count_by_hand():
    """Lite at 224 pixels with a class token: two FLOP per multiplication, convolutions and linear layers."""
    D, D0, hidden, samples = 256, 192, 1024, 8 * 4 * 4
    sides = (28, 14, 7, 3)
    N = sum(s * s for s in sides)
    kernels = zip(sides, (8, 2, 2, 2), (3, D0, D0, D0))
    tokenizer = sum(s * s * (k * k * c * D0 + D0 * D) for s, k, c in kernels)
    per_query = D * (2 * samples + samples) + D * D + 2 * D * hidden  # offsets, weights, output; MLP
    queries = 6 * N + 5 * (N + 1) + 1  # the last layer updates the class token alone
    values, head, reference_point = 12 * N * D * D, D * 1000, D * 2
    count = tokenizer + queries * per_query + values + head + reference_point
    assert forward_flops(Classifier, "lite", (224, 224)) == 2 * count


def test_hours_follow_from_the_flop(monkeypatch):
    monkeypatch.setattr(benchmark, "EXPERIMENTS", {"COCO": benchmark.EXPERIMENTS["COCO"]})
    row = next(line for line in cost_table().splitlines() if line.startswith("| COCO, lite"))
    flop = forward_flops(Detector, "lite", (800, 1333))
    hours = 3 * flop * 118_287 * 50 / (0.25 * 312e12) / 3600
    assert [c.strip() for c in row.strip("|").split("|")][1:] == [
        "800 x 1333", f"{flop / 1e9:.0f}", "118,287", "50", f"{hours:.1f}"]


def test_checkpointing_keeps_little_more_than_the_layers_inputs():
    """Twelve inputs of N tokens of D channels in float32, and the queries' part, which is small."""
    H, W = 832, 1344  # padded to multiples of 64
    inputs = 12 * 4 * 256 * sum(H // s * (W // s) for s in (8, 16, 32, 64))
    assert inputs < activation_bytes("lite", True) < 1.5 * inputs < activation_bytes("lite", False) / 4


def test_the_formulation_that_is_compared_with_computes_the_same():
    shapes = [(5, 4), (3, 2), (1, 1)]
    value, *rest = deform_attn_inputs(shapes, 2, 7, 3, 4, 2, torch.float64)
    theirs = deform_attn_benchmark.stacked_formulation(value, shapes, *rest)
    torch.testing.assert_close(theirs, ms_deform_attn_reference(value, shapes, *rest), rtol=0, atol=1e-12)


def test_the_operators_benchmark_times_every_path(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deform_attn.py", "--benchmark", "--repeats", "1", "--device", "cpu"])
    deform_attn_benchmark.main()
    table = [line for line in capsys.readouterr().out.splitlines() if " us " in line]
    expected = {"kernel ": 4, " float32": 6, " bfloat16": 2, "reference": 2, "grid_sample": 2}
    for path, rows in expected.items():
        assert sum(path in line for line in table) == rows


def test_the_operators_benchmark_refuses_the_reference_alone(monkeypatch, capsys):
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "reference")
    monkeypatch.setattr(sys, "argv", ["deform_attn.py", "--benchmark"])
    with pytest.raises(SystemExit) as stop:
        deform_attn_benchmark.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: FPDETR_DEFORM_ATTN=reference")
