"""The claims in miniature: the order of runs, with stand-ins for the scripts, and verdicts by hand."""
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
from conftest import ROOT

from engine import InputError
from extras import claims

# Stand-ins for the scripts. They note the call and write the files that the report reads, with an AP
# that depends on the flags.
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
(out / "args.json").write_text("{}")
if os.environ.get("FAIL") == out.name:
    sys.exit("out of luck")
if os.environ.get("STOP") == out.name:
    sys.exit()
seed = int(flags[flags.index("--seed") + 1])
ap = 0.3 + 0.01 * seed + (0.05 if "--pretrained" in flags else 0) * (seed + 1) / 2
(out / "metrics.json").write_text(json.dumps({"AP": ap}))
entry = {"epoch": 1, "step": 1, "AP": ap}
log = [entry, {"resumed": True, "epoch": 0, "step": 0}, entry] if seed == 1 else [entry]
(out / "log.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in log))
'''
EVALUATE = '''
import json, sys
from pathlib import Path
out = next(Path(flag).parent for flag in sys.argv if flag.endswith("last.pt"))
with open("calls.txt", "a") as f:
    f.write(f"evaluate {out.name}\\n")
(out / "evaluation").mkdir(exist_ok=True)
passes = {name: {s: {"AP": 0.2} for s in "12345"} for name in range(15)}
content = {"clean": {"AP": 0.4}, "corruptions": passes}
(out / "evaluation" / "corruptions.json").write_text(json.dumps(content))
(out / "evaluation" / "corruptions.png").write_text("")
'''
# A script that ends by SIGTERM only, and says so.
SLEEP = '''
import os, signal, sys, time
def end(*_):
    open(f"{os.getpid()}.ended", "w")
    sys.exit()
signal.signal(signal.SIGTERM, end)
open(f"{os.getpid()}.started", "w")
time.sleep(60)
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): the command, in a folder with the stand-ins."""
    for name in ("pretrain.py", "finetune.py"):
        (tmp_path / name).write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "evaluate.py").write_text(EVALUATE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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
    page = (tmp_path / "runs" / "claims" / "report.md").read_text(encoding="utf-8")
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


def other_code(tmp_path):
    with open(tmp_path / "pretrain.py", "a", encoding="utf-8") as f:
        f.write("# new")


def no_marker(tmp_path):
    (tmp_path / "out" / "pre-0" / "job-pretrain.json").unlink()


@pytest.mark.parametrize("first, change", [(["--quick"], None), ([], other_code), ([], no_marker)])
def test_a_folder_of_another_origin_is_refused(first, change, run, tmp_path):
    flags = ["--claims", "C1", "--seeds", "1", "--out", "out"]
    run(*flags, *first)
    calls = (tmp_path / "calls.txt").read_text()
    if change:
        change(tmp_path)
    with pytest.raises(InputError, match="out/pre-0 was made by other .* remove it, or .*--out"):
        run(*flags, "--jobs", "1")
    assert (tmp_path / "calls.txt").read_text() == calls  # nothing was started


def test_the_flags_of_the_jobs_before_count():
    job = claims.Job("a", "finetune.py", ("--epochs", "7"), 1, claims.Job("b", "pretrain.py", (), 1))
    longer = replace(job, after=replace(job.after, flags=("--epochs", "9")))
    assert job.origin("x") == {"flags": ["finetune.py", "--epochs", "7", "pretrain.py"], "code": "x"}
    assert longer.origin("x") != job.origin("x") != job.origin("y")


def test_an_evaluation_must_have_all_passes(run, tmp_path):
    flags = ["--claims", "C3", "--seeds", "1", "--jobs", "2"]
    run(*flags)
    out = tmp_path / "runs" / "claims"
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "AP under corruption (frost drawn) / clean AP" in page and "50.0" in page  # 0.2 / 0.4
    one = {"clean": {"AP": 0.4}, "corruptions": {"fog": {"1": {"AP": 0.4}}}}
    (out / "full-0" / "evaluation" / "corruptions.json").write_text(json.dumps(one), encoding="utf-8")
    run(*flags)
    assert (tmp_path / "calls.txt").read_text().count("evaluate full-0") == 2
    assert (out / "report.md").read_text(encoding="utf-8") == page
    (out / "full-0" / "job-evaluate.json").unlink()
    with pytest.raises(InputError, match="full-0 was made by other"):  # evaluated by hand
        run(*flags)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed parent cannot end its children")
def test_children_end_with_their_parent(how, run, tmp_path):
    (tmp_path / "finetune.py").write_text(SLEEP, encoding="utf-8")
    code = ("import sys; from pathlib import Path; from extras import claims; claims.PROJECT = Path(); "
            "sys.argv[1:] = ['--claims', 'C1', '--jobs', '2']; claims.main()")
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def wait_for(name):
        until = time.monotonic() + 60
        while len(list(tmp_path.glob(name))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return len(list(tmp_path.glob(name)))
    try:
        assert wait_for("*.started") == 2
        os.kill(parent.pid, getattr(signal, how))
        assert parent.wait(30) in (143, -signal.SIGKILL)
        assert wait_for("*.ended") == 2
    finally:
        parent.kill()


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


def test_the_runs_of_a_claim_differ_in_what_it_compares():
    rows = claims.all_claims(Namespace(quick=False, seeds=1))
    flags = {f"{c}: {row}": " ".join(jobs[0].flags) for c in rows for row, jobs in rows[c].rows.items()}
    starts = {f"{c}: {row}": jobs[0].after and jobs[0].after.name for c in rows
              for row, jobs in rows[c].rows.items()}
    adaptors = {"none": "--adaptor none", "Bi-LSTM": "--adaptor bilstm", "self-attention": "",
                "Bi-LSTM, per layer": "--adaptor bilstm --adaptor-per-layer",
                "self-attention, per layer": "--adaptor-per-layer"}
    plain = flags["C2: self-attention"]
    for row, more in adaptors.items():
        assert flags[f"C2: {row}"] == f"{plain} {more}".strip() and starts[f"C2: {row}"] == "pre-0"
    assert {row: start for row, start in starts.items() if row.startswith("C1")} == {
        "C1: 2,000 images, pre-trained": "pre-0", "C1: 2,000 images, from scratch": None,
        "C1: 150 images, pre-trained": "pre-0", "C1: 150 images, from scratch": None}
    assert flags["C1: 150 images, pre-trained"] == flags["C1: 150 images, from scratch"] != plain
    assert flags["C1: 2,000 images, from scratch"] == plain
    for row, wanted in (("C4: FP-EncDec, 1 class token", "--structure encoder-decoder"),
                        ("C5: tiny-wide (D 96)", "--variant tiny-wide")):
        assert flags[row] == f"{plain} {wanted}" and starts[row] not in ("pre-0", None)
