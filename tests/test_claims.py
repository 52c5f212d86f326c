"""The claims in miniature: the order of runs, with stand-ins for the scripts, and verdicts by hand."""
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from conftest import ROOT, locked

from engine import InputError
from extras import claims
from extras.tables import TABLE_2, TABLE_3, TABLE_7

# A stand-in for the scripts. It notes the call and writes the files that the report reads.
SCRIPT = '''
import json, os, sys
from pathlib import Path
flags = sys.argv[1:]
assert os.environ["OMP_NUM_THREADS"] == "1"
out = Path(flags[flags.index("--out") + 1])
with open("calls.txt", "a") as f:
    f.write(out.name + "\\n")
for flag in flags:
    assert not flag.endswith("last.pt") or Path(flag).exists(), "started too early"
if os.environ.get("FAIL") == out.name:
    sys.exit("out of luck")
if os.environ.get("STOP") == out.name:
    sys.exit()
if "--corruptions" in flags:
    passes = {name: {s: {"AP": 0.2} for s in "12345"} for name in range(15)}
    scores = {"clean": {"AP": 0.4}, "corruptions": passes}
    (out / "corruptions.json").write_text(json.dumps(scores))
else:
    assert "--resume" in flags
    seed = int(flags[flags.index("--seed") + 1])
    ap = 0.3 + 0.01 * seed + (0.05 if "--pretrained" in flags else 0) * (seed + 1) / 2
    (out / "last.pt").write_text("")
    (out / "metrics.json").write_text(json.dumps({"AP": ap, "top1": 0.9, "seed": seed}))
    entry = {"epoch": 1, "step": 1, "AP": ap, "AP50": 0.9}
    log = [entry, {"resumed": True, "epoch": 0, "step": 0}, entry] if seed == 1 else [entry]
    (out / "log.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in log))
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
def project(tmp_path, monkeypatch):
    """A folder with the code that trains, and stand-ins for the scripts."""
    for name in claims.TRAINING_CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        stage = name in ("pretrain.py", "finetune.py", "evaluate.py")
        (tmp_path / name).write_text(SCRIPT if stage else "x = 1\n", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(claims, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(project, monkeypatch):
    """run(*flags): the command. Returns the page and the calls."""
    def main(*flags):
        monkeypatch.setattr("sys.argv", ["claims.py", *flags])
        claims.main()
        pages = sorted((project / "runs").glob("claims-*/report.md"), key=lambda path: path.stat().st_mtime)
        return pages[-1].read_text(encoding="utf-8"), (project / "calls.txt").read_text().splitlines()
    return main


def test_every_arm_is_run_once_and_reported(run, project, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # runs side by side have one each
    begin = time.time()
    page, calls = run("--seeds", "3")
    minutes = os.cpu_count() * (time.time() - begin) / 60
    assert len(calls) == len(set(calls)) == 3 * len(claims.ARMS) == 57
    lines = [json.loads(line) for line in (project / "docs" / "claims.jsonl").read_text().splitlines()]
    assert len(lines) == 57 and sum(e["minutes"] for e in lines) < 3 * minutes  # they are rounded
    one = next(e for e in lines if e["arm"] == "FP-DETR" and e["seed"] == 1)
    assert set(one) == {"claim", "arm", "seed", "flags", "commit", "code", "minutes", "scores"}
    assert one["claim"] == "C1 C2 C4 C5" and one["flags"] == claims.RECIPES["finetune.py"]
    assert one["scores"] == {"AP": pytest.approx(0.36), "top1": 0.9, "curve": [pytest.approx(0.36)]}
    # From scratch 30, 31, 32. The gains are 2.5, 5, 7.5: t = 5 / (2.5 / sqrt 3) = 3.46 with 2 degrees of
    # freedom, so p = 0.074. The 90 % interval is 5 +- 2.92 x 1.44.
    row = next(line for line in page.splitlines() if line.startswith("| C1 FP-DETR / from scratch"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "AP", "3", "36.0±3.5, 31.0±1.0", "-", "+5.0", "+0.8 to +9.2", "0.074", "undecided"]
    # AP 0.2 under corruption and 0.4 without: rPC is 50 % everywhere.
    row = next(line for line in page.splitlines() if line.startswith("| C3"))
    assert "rPC" in row and "50.0±0.0, 50.0±0.0" in row and "undecided" in row
    assert next((project / "runs").glob("claims-*/claims.png")).stat().st_size > 20_000
    assert run("--seeds", "3") == (page, calls) and run("--seeds", "0") == (page, calls)


@pytest.mark.parametrize("how", ["FAIL", "STOP"])  # with an error, or early without one (SIGTERM)
def test_a_failed_run_is_named_and_run_again(how, run, project, monkeypatch):
    monkeypatch.setenv(how, "Bi-LSTM-0")
    with pytest.raises(InputError, match="Bi-LSTM of seed 0 failed: see .*Bi-LSTM-0.txt"):
        run("--seeds", "1", "--jobs", "1")
    log = next((project / "runs").glob("claims-*/Bi-LSTM-0.txt"))
    assert log.read_text() == ("out of luck\n" if how == "FAIL" else "")
    monkeypatch.delenv(how)
    _, calls = run("--seeds", "1", "--jobs", "1")
    assert len(calls) == len(claims.ARMS) + 1 and calls.count("Bi-LSTM-0") == 2


def test_lines_of_other_code_or_flags_do_not_count(run, project, monkeypatch):
    run("--seeds", "1")
    with open(project / "model.py", "a", encoding="utf-8") as f:
        f.write("# a comment and a docstring\n\n'''quotes'''\n" + '"""text"""\n')
    code = claims.digest_of_code()
    (project / "model.py").write_text("x = 1\n'''quotes'''", encoding="utf-8")
    assert claims.digest_of_code() == code  # comments and docstrings do not count
    (project / "model.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setitem(claims.ARMS, "no adaptor", ("finetune.py", "stage 1", "--adaptor none --lr 1"))
    _, calls = run("--seeds", "1")
    assert calls[19:] == ["no adaptor-0"]  # its flags are others now
    code = claims.digest_of_code()
    (project / "model.py").write_text("x = 2\n", encoding="utf-8")
    assert len((project / "docs" / "claims.jsonl").read_text().splitlines()) == 20
    assert "C1" not in run("--seeds", "0")[0]  # nothing has been run with this code
    monkeypatch.setattr(claims, "SAME_CODE", {claims.digest_of_code(): {code}})
    assert "C1" in run("--seeds", "0")[0]  # unless it is known to train to the same weights


def test_on_another_machine_a_checkpoint_is_made_again_but_not_its_line(run, project):
    run("--seeds", "1")
    lines = (project / "docs" / "claims.jsonl").read_text().splitlines()
    for old in (project / "runs").glob("claims-*/*/metrics.json"):
        old.unlink()
    kept = [e for e in lines if json.loads(e)["arm"] != "augmented, corrupted"]
    (project / "docs" / "claims.jsonl").write_text("\n".join(kept) + "\n")
    _, calls = run("--seeds", "1")
    assert calls[19:] == ["stage 1, augmented-0", "augmented-0", "augmented, corrupted-0"]
    assert len((project / "docs" / "claims.jsonl").read_text().splitlines()) == 19


def test_a_claim_runs_its_arms_and_their_starts_alone(run):
    _, calls = run("--seeds", "1", "--claims", "C5", "--jobs", "1")
    assert calls == ["stage 1-0", "stage 1, wide-0", "FP-DETR-0", "wide-0"]


def test_of_two_commands_at_once_the_second_is_refused(run, project):
    run("--seeds", "1")
    folder = next((project / "runs").glob("claims-*"))
    with locked(folder / "lock"), pytest.raises(InputError, match="another process is at work in"):
        run("--seeds", "2")


def test_quick_runs_leave_the_lines_alone(run, project):
    page, calls = run("--seeds", "1", "--quick")
    assert "far too short" in page and len(calls) == len(set(calls)) == 19
    assert not (project / "docs" / "claims.jsonl").exists()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed parent cannot end its children")
def test_children_end_with_their_parent(how, project):
    (project / "pretrain.py").write_text(SLEEP, encoding="utf-8")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
            "from extras import claims; claims.PROJECT = Path(); "
            "sys.argv[1:] = ['--jobs', '2']; claims.main()")
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def wait_for(name):
        until = time.monotonic() + 60
        while len(list(project.glob(name))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return len(list(project.glob(name)))
    try:
        assert wait_for("*.started") == 2
        os.kill(parent.pid, getattr(signal, how))
        assert parent.wait(30) in (143, -signal.SIGKILL)
        assert wait_for("*.ended") == 2
    finally:
        parent.kill()


@pytest.mark.parametrize("better, worse, result", [
    # t = gain / (deviation / sqrt 3) with 2 degrees of freedom, where the 90 % point of |t| is 2.920.
    ([0.31, 0.32, 0.33], [0.30, 0.30, 0.30], ("+2.0", "+0.3 to +3.7", "0.074", "undecided")),
    ([0.33, 0.34, 0.33], [0.30, 0.30, 0.30], ("+3.3", "+2.4 to +4.3", "0.010", "as in the paper")),
    ([0.30, 0.30, 0.30], [0.33, 0.34, 0.33], ("-3.3", "-4.3 to -2.4", "0.010", "**against the paper**")),
    ([0.300, 0.305, 0.305], [0.30, 0.30, 0.31], ("+0.0", "-0.8 to +0.8", "1.000",
                                                 "no difference above 0.8")),
    ([0.300, 0.303, 0.303], [0.30, 0.30, 0.31], ("-0.1", "-1.0 to +0.7", "0.697",
                                                 "no difference above 1.0")),
    ([0.30, 0.34, 0.29], [0.30, 0.30, 0.30], ("+1.0", "-3.5 to +5.5", "0.580", "undecided")),
    ([0.3], [0.2], ("+10.0", "-", "-", "undecided"))])
def test_verdicts_by_hand(better, worse, result):
    assert claims.verdict(better, worse, tests=13) == result


def test_the_asterisk_is_bonferroni(tmp_path):
    """t = 6 / (1 / sqrt 3) = 10.39 with 2 degrees of freedom: p = 0.0091, below 0.05 / 5 alone."""
    better, worse = [0.35, 0.36, 0.37], [0.30, 0.30, 0.30]
    assert claims.verdict(better, worse, tests=5)[2] == "0.009*"
    assert claims.verdict(better, worse, tests=6)[2] == "0.009"
    lines = {(arm, seed): {"scores": {"AP": ap}} for arm, values in (("FP-DETR", better), ("Bi-LSTM", worse))
             for seed, ap in enumerate(values)}
    assert " 0.009 |" in claims.write_report(lines, Namespace(out=tmp_path, quick=False))  # 13 comparisons


def test_the_figure_has_a_dot_per_seed_and_the_mean_in_percent(tmp_path, monkeypatch):
    figures, aps = [], {("wide", 0): 0.2, ("wide", 1): 0.4, ("wide", 2): 0.9, ("FP-DETR", 0): 0.3}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    claims.draw({run: {"scores": {"AP": ap}} for run, ap in aps.items()}, tmp_path)
    panel = figures[0].axes[-1]  # of C5
    dots = [(*line.get_xdata(), *line.get_ydata()) for line in panel.lines]
    assert dots == [(*map(pytest.approx, (20, 40, 90)), 0, 0, 0), (pytest.approx(50), 0), (30, 1), (30, 1)]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["wide (AP)", "FP-DETR (AP)"]
    assert panel.yaxis_inverted()


def test_the_papers_numbers_are_those_of_its_tables():
    of_3 = {"FP-DETR": "self-attention", "no adaptor": "none",
            "self-attention, per layer": "self-attention, per layer"}
    of_7 = {"FP-DETR": "FP-DETR-Lite", "stage 1": "FP-DETR-Lite"}
    of_2 = {"wide": "FP-DETR-Small", "FP-DETR": "FP-DETR-Lite"}
    for claim, *arms, score, paper in claims.COMPARISONS:
        if claim in ("C1", "C3"):
            assert paper == ""
            continue
        table, names = {"C2": (TABLE_3, of_3), "C4": (TABLE_7, of_7), "C5": (TABLE_2, of_2)}[claim]
        rows = [arm.removeprefix("stage 1, ").replace("75", "300") for arm in arms]
        column = (2 if score == "AP" else 1) if claim == "C4" else 1
        assert paper == ", ".join(str(table[names.get(row, row)][column]) for row in rows)


def test_the_arms_of_a_claim_differ_in_what_it_compares():
    assert "--corruptions all" in claims.RECIPES["evaluate.py"]
    for claim, better, worse, _, _ in claims.COMPARISONS:
        a, b = claims.ARMS[better], claims.ARMS[worse]
        assert a[0] == b[0] and claim in claims.CLAIMS
        if claim in ("C2", "C4", "C5"):
            assert (a[1] is None) == (b[1] is None)
    flags = {arm: f"{script} {more}".strip() for arm, (script, _, more) in claims.ARMS.items()}
    starts = {arm: start for arm, (_, start, _) in claims.ARMS.items()}
    assert flags["FP-DETR"] == flags["from scratch"] == "finetune.py"
    assert flags["150 pictures"] == flags["150 pictures, from scratch"]
    assert starts["from scratch"] is starts["150 pictures, from scratch"] is None
    adaptors = {"no adaptor": "--adaptor none", "Bi-LSTM": "--adaptor bilstm",
                "Bi-LSTM, per layer": "--adaptor bilstm --adaptor-per-layer",
                "self-attention, per layer": "--adaptor-per-layer"}
    for arm, more in adaptors.items():
        assert flags[arm] == f"finetune.py {more}" and starts[arm] == starts["FP-DETR"] == "stage 1"
    for tokens in ("1 class token", "75 class tokens"):
        start = starts[f"FP-EncDec, {tokens}"]
        decoder = "--structure encoder-decoder"
        assert flags[start] == f"pretrain.py {decoder} --class-tokens {tokens.split()[0]}"
        assert flags[f"FP-EncDec, {tokens}"] == f"finetune.py {decoder}"
    assert starts["augmented, corrupted"] == "augmented" and flags["augmented"] == "finetune.py"
    assert flags[starts["augmented"]].startswith("pretrain.py --augment deit")
    assert flags["wide"] == "finetune.py --variant mini-wide --lr 5e-4"
    assert flags[starts["wide"]] == "pretrain.py --variant mini-wide --lr 5e-4"
