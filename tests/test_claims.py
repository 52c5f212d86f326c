"""The claims in miniature: the order of runs, with stand-ins for the scripts, and verdicts by hand."""
from argparse import Namespace

import pytest

from engine import InputError
from extras import claims

# A stand-in for a script: notes the call and writes the files that the report reads, with an AP that
# depends on the flags.
SCRIPT = '''
import json, os, sys
from pathlib import Path
flags = sys.argv[1:]
out = Path(flags[flags.index("--out") + 1])
with open("calls.txt", "a") as f:
    f.write(out.name + "\\n")
assert "--resume" in flags
if "--pretrained" in flags:
    assert Path(flags[flags.index("--pretrained") + 1]).exists(), "started too early"
out.mkdir(exist_ok=True)
(out / "last.pt").write_text("")
if os.environ.get("FAIL") == out.name:
    sys.exit("out of luck")
if os.environ.get("STOP") == out.name:
    sys.exit()
seed = int(flags[flags.index("--seed") + 1])
ap = 0.3 + 0.01 * seed + (0.05 if "--pretrained" in flags else 0) * (seed + 1) / 2
(out / "metrics.json").write_text(json.dumps({"AP": ap}))
(out / "log.jsonl").write_text(json.dumps({"step": 1, "AP": ap}) + "\\n")
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): the command, in a folder with the stand-ins."""
    for name in ("pretrain.py", "finetune.py"):
        (tmp_path / name).write_text(SCRIPT)
    monkeypatch.setattr(claims, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["claims.py", *flags])
        claims.main()
    return main


def test_a_claim_is_run_once_and_reported(run, tmp_path):
    run("--claims", "C1", "--jobs", "2")
    calls = (tmp_path / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 15  # for three seeds: pre-training and four fine-tunings
    page = (tmp_path / "runs" / "claims" / "report.md").read_text()
    # From scratch 30, 31, 32. The gains are 2.5, 5, 7.5: t = 5 / (2.5 / sqrt 3) = 3.46 with 2 degrees.
    assert "31.0±1.0" in page and "36.0±3.5" in page
    assert "+5.0 ± 2.5 (p = 0.037): reproduced" in page
    assert (tmp_path / "runs" / "claims" / "C1.png").exists()
    run("--claims", "C1")
    assert (tmp_path / "calls.txt").read_text().split() == calls  # nothing is run again


@pytest.mark.parametrize("how", ["FAIL", "STOP"])  # with an error, or early without one (SIGTERM)
def test_a_failed_run_is_named_and_run_again(how, run, tmp_path, monkeypatch):
    monkeypatch.setenv(how, "small-pre-1")
    with pytest.raises(InputError, match="small-pre-1 failed: see .*small-pre-1-finetune.txt"):
        run("--claims", "C1", "--jobs", "1")
    log = (tmp_path / "runs/claims/logs/small-pre-1-finetune.txt").read_text()
    assert log == ("out of luck\n" if how == "FAIL" else "")
    monkeypatch.delenv(how)
    run("--claims", "C1", "--jobs", "1")
    assert (tmp_path / "calls.txt").read_text().split().count("small-pre-1") == 2


def test_every_claim_can_be_built_and_shares_its_runs():
    chosen = claims.all_claims(Namespace(quick=False, seeds=3))
    jobs = claims.jobs_in_order(chosen)
    assert len(jobs) == len({(job.name, job.script) for job in jobs})
    place = {job: i for i, job in enumerate(jobs)}
    assert all(place[job.after] < place[job] for job in jobs if job.after)
    for claim in chosen.values():
        assert all(len(row) == 3 for row in claim.rows.values())
        assert {row for pair in claim.better for row in pair} <= set(claim.rows)


@pytest.mark.parametrize("better, worse, says", [
    ([0.31, 0.32, 0.33], [0.30, 0.30, 0.30], "+2.0 ± 1.0 (p = 0.037): reproduced"),
    ([0.30, 0.30, 0.30], [0.31, 0.32, 0.33], "-2.0 ± 1.0 (p = 0.963): **not** reproduced"),
    ([0.30, 0.34, 0.29], [0.30, 0.30, 0.30], "+1.0 ± 2.6 (p = 0.290): not distinguishable"),
    ([0.3], [0.2], "+10.0 ± 0.0: not distinguishable")])
def test_verdicts_by_hand(better, worse, says):
    """t = mean / (deviation / sqrt 3) with 2 degrees of freedom. P(t > 3.464) = 0.037,
    P(t > 0.655) = 0.290."""
    assert says in claims.verdict(better, worse)
