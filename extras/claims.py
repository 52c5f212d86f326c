"""The paper's claims on small pictures: trains both sides of each comparison and prints a verdict.

    python -m extras.claims                makes the missing runs: a night on 2 cores for eight seeds
    python -m extras.claims --claims C1    only the runs of this claim
    python -m extras.claims --seeds 0      only the report of the finished runs
    python -m extras.claims --quick        much shorter training, to see that everything runs

The same command goes on where it stopped. It runs pretrain.py, finetune.py and evaluate.py, as many at
a time as there are cores. Every finished run adds a line to docs/claims.jsonl, and the report is made
from these lines alone. So the runs may be spread over days and machines. Lines of other training code
are left out. docs/results.md says why the settings are as they are.
"""
import argparse
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel
from tqdm import tqdm

from engine import Help, InputError, natural, open_locked, positive, read_log, run_script
from extras.pictures import new_figure
from extras.tables import corruption_row, markdown, mean_and_deviation, read_json

PROJECT = Path(__file__).parent.parent
COMMAND = "python -m extras.claims"
TRAINING_CODE = ("model.py", "deform_attn.py", "deform_attn_kernel.cu", "data.py", "engine.py",
                 "pretrain.py", "finetune.py", "evaluate.py", "extras/shapes.py", "extras/augment.py",
                 "extras/corruptions.py")
# digest of this code -> digests of older code that trains to the same weights, bit for bit. Their lines
# count, too. To check it, run --quick --seeds 1 in both checkouts, and compare the last.pt of all arms.
SAME_CODE = {"ed927a87da2a": {"f49a6ce59549", "81ca7f6ac783"}}

# -------------------------------------------------------------------------------------- the experiments

RECIPES = {  # flags of all runs of a script
    "pretrain.py": "--variant mini --data shapes-hard --epochs 4 --eval-every 4",
    "finetune.py": "--variant mini --data shapes-hard --limit-train 1000 --epochs 48 --eval-every 8",
    "evaluate.py": "--data shapes-hard --limit-val 500 --corruptions all --batch-size 25",
}
SHORT = {  # --quick
    "pretrain.py": "--limit-train 64 --limit-val 16 --epochs 1",
    "finetune.py": "--limit-train 32 --limit-val 16 --epochs 1",
    "evaluate.py": "--limit-val 4 --severities 3",
}
FEW = "--limit-train 150 --epochs 100 --eval-every 20"
BILSTM, DECODER = "--adaptor bilstm", "--structure encoder-decoder"
WIDE = "--variant mini-wide --lr 5e-4"
ARMS = {  # a run per seed -> script, the arm it starts from, flags beside the recipe's
    "stage 1": ("pretrain.py", None, ""),
    "stage 1, wide": ("pretrain.py", None, WIDE),
    "stage 1, augmented": ("pretrain.py", None, "--augment deit --epochs 16 --eval-every 16"),
    "stage 1, FP-EncDec, 1 class token": ("pretrain.py", None, f"{DECODER} --class-tokens 1"),
    "stage 1, FP-EncDec, 75 class tokens": ("pretrain.py", None, f"{DECODER} --class-tokens 75"),
    "FP-DETR": ("finetune.py", "stage 1", ""),
    "from scratch": ("finetune.py", None, ""),
    "150 pictures": ("finetune.py", "stage 1", FEW),
    "150 pictures, from scratch": ("finetune.py", None, FEW),
    "no adaptor": ("finetune.py", "stage 1", "--adaptor none"),
    "Bi-LSTM": ("finetune.py", "stage 1", BILSTM),
    "Bi-LSTM, per layer": ("finetune.py", "stage 1", f"{BILSTM} --adaptor-per-layer"),
    "self-attention, per layer": ("finetune.py", "stage 1", "--adaptor-per-layer"),
    "FP-EncDec, 1 class token": ("finetune.py", "stage 1, FP-EncDec, 1 class token", DECODER),
    "FP-EncDec, 75 class tokens": ("finetune.py", "stage 1, FP-EncDec, 75 class tokens", DECODER),
    "wide": ("finetune.py", "stage 1, wide", WIDE),
    "augmented": ("finetune.py", "stage 1, augmented", ""),
    "augmented, corrupted": ("evaluate.py", "augmented", ""),
    "from scratch, corrupted": ("evaluate.py", "from scratch", ""),
}
CLAIMS = {
    "C1": "pre-trained beats from scratch (Tables 2 and 5)",
    "C2": "self-attention beats Bi-LSTM beats none, and sharing an adaptor does no harm (Table 3)",
    "C3": "pre-training makes corruption cost less (Table 4)",
    "C4": "encoder-only beats encoder-decoder, and many class tokens beat one there (Table 7)",
    "C5": "a wider model beats a narrower one (Table 2, Small and Lite)",
}
COMPARISONS = [  # claim, the arm that the paper says is better, the other, score, the paper's numbers
    ("C1", "150 pictures", "150 pictures, from scratch", "AP", ""),
    ("C1", "FP-DETR", "from scratch", "AP", ""),
    ("C2", "FP-DETR", "no adaptor", "AP", "37.2, 32.8"),
    ("C2", "FP-DETR", "Bi-LSTM", "AP", "37.2, 34.9"),
    ("C2", "Bi-LSTM", "no adaptor", "AP", "34.9, 32.8"),
    ("C2", "FP-DETR", "self-attention, per layer", "AP", "37.2, 36.8"),
    ("C2", "Bi-LSTM", "Bi-LSTM, per layer", "AP", "34.9, 34.6"),
    ("C3", "augmented, corrupted", "from scratch, corrupted", "rPC", ""),
    ("C4", "FP-DETR", "FP-EncDec, 75 class tokens", "AP", "37.2, 35.2"),
    ("C4", "FP-EncDec, 75 class tokens", "FP-EncDec, 1 class token", "AP", "35.2, 33.1"),
    ("C4", "stage 1", "stage 1, FP-EncDec, 75 class tokens", "top1", "77.3, 76.4"),
    ("C4", "stage 1, FP-EncDec, 75 class tokens", "stage 1, FP-EncDec, 1 class token", "top1",
     "76.4, 72.0"),
    ("C5", "wide", "FP-DETR", "AP", "42.5, 37.2"),
]


# ----------------------------------------------------------------------------------------- running them

def digest_of_code() -> str:
    """A digest of the code that trains. Comments, docstrings and line breaks do not count."""
    skip = {".py": r'""".*?"""|#[^\n]*|\s+', ".cu": r"//[^\n]*|\s+"}
    texts = [re.sub(skip[name[-3:]], "", (PROJECT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
             for name in TRAINING_CODE]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def read_lines(args: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> its line, of the finished runs of this code and these flags."""
    lines = read_log(args.lines) if args.lines.exists() else []
    codes = {args.code, *SAME_CODE.get(args.code, ())}
    ours = [e for e in lines if e.get("code") in codes and e.get("flags") == args.flags.get(e["arm"])]
    if len(ours) < len(lines):
        tqdm.write(f"note: {len(lines) - len(ours)} lines of {args.lines} are of other code or flags")
    return {(e["arm"], e["seed"]): e for e in ours}


def missing(lines: dict, args: argparse.Namespace) -> list[tuple[str, int]]:
    """The runs to be made, each after the one it starts from. A finished run is made again if another
    one needs its checkpoint, which is on another machine."""
    arms = {arm for claim, *pair, _, _ in COMPARISONS if claim in args.claims for arm in pair}
    wanted = {(arm, seed) for arm in arms for seed in range(args.seeds)} - set(lines)
    for arm, seed in list(wanted):
        start = ARMS[arm][1]
        while start and not (args.out / f"{start}-{seed}" / "metrics.json").exists():
            wanted.add((start, seed))
            start = ARMS[start][1]
    return [(arm, seed) for seed in range(args.seeds) for arm in ARMS if (arm, seed) in wanted]


def run(arm: str, seed: int, args: argparse.Namespace, starts: dict[tuple, Future]) -> dict:
    """Makes a run and returns its line. InputError names the log if it fails."""
    script, start, _ = ARMS[arm]
    if (start, seed) in starts:
        starts[start, seed].result()
    folder, begin = args.out / f"{arm}-{seed}", time.time()
    checkpoint = [str(args.out / f"{start}-{seed}" / "last.pt")] if start else []
    command = [sys.executable, str(PROJECT / script), *args.flags[arm].split(), "--device", "cpu",
               "--workers", "0", "--out", str(folder)]
    if script == "evaluate.py":
        command += checkpoint
    else:
        command += ["--seed", str(seed), "--resume", *(["--pretrained", *checkpoint] if start else [])]
    folder.mkdir(parents=True, exist_ok=True)
    log = args.out / f"{arm}-{seed}.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=args.env,
                                   preexec_fn=args.end_with_parent)
    args.running.append(process)
    result = folder / ("corruptions.json" if script == "evaluate.py" else "metrics.json")
    if process.wait() or not result.exists():
        raise InputError(f"{arm} of seed {seed} failed: see {log}; run again to go on")
    scores = read_json(result, COMMAND)
    if script == "evaluate.py":
        mpc, clean = corruption_row(scores)[0] / 100, scores["clean"]["AP"]
        scores = {"AP": clean, "mPC": mpc, "rPC": mpc / clean if clean > 0 else 0.0}
    else:
        curve = [e["AP"] for e in read_log(folder / "log.jsonl") if "AP" in e]
        scores = {k: scores[k] for k in ("AP", "AP50", "AP75", "top1") if k in scores}
        scores |= {"curve": curve} if curve else {}
    claims = [c for c, *arms, _, _ in COMPARISONS if arm in arms]
    return {"claim": " ".join(dict.fromkeys(claims)), "arm": arm, "seed": seed, "flags": args.flags[arm],
            "commit": args.commit, "code": args.code, "minutes": round((time.time() - begin) / 60, 2),
            "scores": scores}


def run_all(todo: list[tuple[str, int]], lines: dict, args: argparse.Namespace) -> None:
    """Makes the runs, `--jobs` at a time, and adds a line for each to the file. If one fails, stops the
    others and raises its error."""
    bar = tqdm(total=len(todo), unit="run", desc="the paper's claims")

    def note_result(future: Future) -> None:
        if not future.cancelled() and not future.exception():
            line = future.result()
            if (line["arm"], line["seed"]) not in lines:
                with open(args.lines, "a", encoding="utf-8") as f:
                    f.write(json.dumps(line) + "\n")
            bar.update()

    pool, futures = ThreadPoolExecutor(args.jobs), {}
    try:
        for arm, seed in todo:  # a run waits for its start only, and that has come before it
            futures[arm, seed] = pool.submit(run, arm, seed, args, futures)
            futures[arm, seed].add_done_callback(note_result)
        for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in args.running:
            process.terminate()  # nothing happens to those that have ended
        pool.shutdown()
        bar.close()


# ------------------------------------------------------------------------------------------- the report

def verdict(better: list[float], worse: list[float], tests: int) -> tuple[str, str, str, str]:
    """Compares two arms seed by seed by a two-sided paired t-test -> gain, its 90 % confidence interval,
    p, and the verdict. An asterisk: p is below 5 % divided by the number of tests (Bonferroni)."""
    gains = 100 * (np.array(better) - np.array(worse))
    gain = f"{gains.mean():+.1f}"
    if len(gains) < 2 or gains.std() == 0:
        return gain, "-", "-", "undecided"
    test = ttest_rel(100 * np.array(better), 100 * np.array(worse))
    low, high = test.confidence_interval(0.9)
    text = "undecided"
    if test.pvalue < 0.05:
        text = "as in the paper" if gains.mean() > 0 else "**against the paper**"
    elif high - low < 3:
        text = f"no difference above {max(-low, high):.1f}"
    star = "*" if test.pvalue < 0.05 / tests else ""
    return gain, f"{low:+.1f} to {high:+.1f}", f"{test.pvalue:.3f}{star}", text


def write_report(lines: dict, args: argparse.Namespace) -> str:
    """Writes report.md and claims.png, and returns the text of the page."""
    rows = []
    for claim, a, b, score, paper in COMPARISONS:
        seeds = sorted(seed for arm, seed in lines if arm == a and (b, seed) in lines)
        values = [[lines[arm, seed]["scores"][score] for seed in seeds] for arm in (a, b)]
        if seeds:
            means = ", ".join(map(mean_and_deviation, values))
            rows.append((f"{claim} {a} / {b}", (score, str(len(seeds)), means, paper or "-",
                                                *verdict(*values, len(COMPARISONS)))))
    header = ("score", "seeds", "ours", "paper", "gain", "90 % interval", "p", "verdict")
    page = markdown("", header, rows) + "\n"
    if args.quick:
        page += "\n--quick: the training was far too short for verdicts.\n"
    (args.out / "report.md").write_text(page, encoding="utf-8")
    draw(lines, args.out / "claims.png")
    return page


def draw(lines: dict, path: Path) -> None:
    """Draws a panel per claim: a dot per seed and the mean, in percent."""
    figure = new_figure(11, 13)
    count = {claim: len({(arm, c[3]) for c in COMPARISONS if c[0] == claim for arm in c[1:3]})
             for claim in CLAIMS}
    panels = figure.subplots(len(CLAIMS), 1, height_ratios=[n + 1 for n in count.values()])
    for (claim, text), panel in zip(CLAIMS.items(), panels):
        shown = list(dict.fromkeys((arm, c[3]) for c in COMPARISONS if c[0] == claim for arm in c[1:3]))
        for y, (arm, score) in enumerate(shown):
            values = [100 * line["scores"][score] for (name, _), line in lines.items() if name == arm]
            panel.plot(values, [y] * len(values), "o", color="C0", alpha=0.4)
            if values:
                panel.plot(np.mean(values), y, "|", color="k", ms=22, mew=2)
        panel.set_yticks(range(len(shown)), [f"{arm} ({score})" for arm, score in shown])
        panel.set_title(f"{claim}: {text}", loc="right")
        panel.set(ylim=(len(shown) - 0.5, -0.5), xlabel="percent")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS),
                        help="train for these (default: all)")
    parser.add_argument("--seeds", type=natural, default=8, help="how many, from 0 on")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="scripts at a time")
    parser.add_argument("--quick", action="store_true", help="train far too short for verdicts")
    args = parser.parse_args()
    args.code, args.running = digest_of_code(), []
    args.out = Path("runs") / f"claims-{args.code}{'-quick' if args.quick else ''}"
    args.lines = args.out / "claims.jsonl" if args.quick else PROJECT / "docs" / "claims.jsonl"
    args.flags = {arm: " ".join([RECIPES[script], more, SHORT[script] if args.quick else ""]).strip()
                  for arm, (script, _, more) in ARMS.items()}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True)
    args.commit = git.stdout.decode().strip()
    args.env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many runs at a time as cores, a thread each
    args.end_with_parent = None
    if sys.platform == "linux":  # children get SIGTERM even if this process is killed
        args.end_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    args.out.mkdir(parents=True, exist_ok=True)
    locked = open_locked(args.out / "lock", "a")  # noqa: F841 (until this function ends)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_all then ends its children
    lines = read_lines(args)
    run_all(missing(lines, args), lines, args)
    print(f"{write_report(read_lines(args), args)}\nthis page: {args.out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
