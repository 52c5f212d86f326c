"""The claims in miniature: order, resuming and failing of the runs with stand-ins for the scripts, and the
verdict against a t-test done by hand."""
from argparse import Namespace

import pytest

import reproduce
from model import InputError

# A stand-in: notes that it was called, and leaves what the report reads. AP is known from the name.
SCRIPT = '''
import json, os, sys
from pathlib import Path
flags = sys.argv[1:]
out = Path(flags[flags.index("--out") + 1])
with open("calls.txt", "a") as f:
    f.write(out.name + (" resumed" if "--resume" in flags else "") + "\\n")
if "--pretrained" in flags:
    assert Path(flags[flags.index("--pretrained") + 1]).exists(), "started before what it starts from"
out.mkdir(exist_ok=True)
(out / "last.pt").write_text("")
if os.environ.get("FAIL") == out.name:
    sys.exit("out of luck")
seed = int(flags[flags.index("--seed") + 1])
ap = 0.3 + 0.01 * seed + (0.05 if "--pretrained" in flags else 0) * (seed + 1) / 2
(out / "metrics.json").write_text(json.dumps({"AP": ap}))
(out / "log.jsonl").write_text("".join(json.dumps({"step": s, "AP": ap * s / 2}) + "\\n" for s in (1, 2)))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("pretrain.py", "finetune.py"):
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["reproduce.py", *flags])
    reproduce.main()


def test_a_claim_is_run_once_and_reported(folder, monkeypatch, capsys):
    run(monkeypatch, "--claims", "C1", "--jobs", "2")
    calls = (folder / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 15  # of three seeds: pre-training and four fine-tunings
    page = (folder / "runs" / "reproduce" / "report.md").read_text()
    # from scratch 30, 31, 32; the pre-trained gain 2.5, 5 and 7.5: t = 5 / (2.5 / sqrt 3) = 3.46, df 2
    assert "31.0±1.0" in page and "36.0±3.5" in page
    assert "+5.0 ± 2.5 (p = 0.037): reproduced" in page
    assert (folder / "runs" / "reproduce" / "C1.png").exists()
    run(monkeypatch, "--claims", "C1")
    assert (folder / "calls.txt").read_text().split() == calls  # nothing was run again


def test_a_failed_run_is_named_and_resumed(folder, monkeypatch):
    monkeypatch.setenv("FAIL", "small-pre-1")
    with pytest.raises(InputError, match="small-pre-1 failed: see .*small-pre-1-finetune.txt"):
        run(monkeypatch, "--claims", "C1", "--jobs", "1")
    assert "out of luck" in (folder / "runs/reproduce/logs/small-pre-1-finetune.txt").read_text()
    monkeypatch.setenv("FAIL", "")
    run(monkeypatch, "--claims", "C1", "--jobs", "1")
    assert "small-pre-1 resumed" in (folder / "calls.txt").read_text().splitlines()


def test_every_claim_can_be_built_and_shares_its_runs():
    args = Namespace(quick=False, seeds=3)
    all_claims = reproduce.claims(args)
    jobs = reproduce.in_order(all_claims)
    assert len(jobs) == len({(j.name, j.script) for j in jobs})
    place = {j: i for i, j in enumerate(jobs)}
    assert all(place[j.after] < place[j] for j in jobs if j.after)
    for claim in all_claims.values():
        assert all(len(row) == 3 for row in claim.rows.values())
        assert {r for pair in claim.better for r in pair} <= set(claim.rows)


@pytest.mark.parametrize("better, worse, says", [
    ([0.31, 0.32, 0.33], [0.30, 0.30, 0.30], "+2.0 ± 1.0 (p = 0.037): reproduced"),
    ([0.30, 0.30, 0.30], [0.31, 0.32, 0.33], "-2.0 ± 1.0 (p = 0.963): **not** reproduced"),
    ([0.30, 0.34, 0.29], [0.30, 0.30, 0.30], "+1.0 ± 2.6 (p = 0.290): not distinguishable"),
    ([0.3], [0.2], "+10.0 ± 0.0: not distinguishable")])
def test_verdicts_by_hand(better, worse, says):
    """t = mean / (deviation / sqrt 3) with two degrees of freedom: P(t > 3.464) = 0.0371, > 0.655: 0.290."""
    assert says in reproduce.verdict(better, worse)
