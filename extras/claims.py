"""The paper's claims on small pictures: trains what each claim compares, and says what came out.

    python -m extras.claims                 all claims with three seeds: hours on 2 cores
    python -m extras.claims --quick         much shorter training, to see that everything runs
    python -m extras.claims --claims C1     only this claim

The same command goes on where it stopped. It refuses folders that other flags or other code made. It
runs pretrain.py, finetune.py and evaluate.py on the embedded data, as many at a time as there are
cores. Each run has a folder of its own below --out. The result is report.md there: a table, a picture
and a verdict per claim. The settings were chosen on C1 alone; the other claims use them unchanged.
"""
import argparse
import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel
from tqdm import tqdm

from engine import Help, InputError, positive, read_log, run_script, write_json
from extras.tables import (CORRUPTIONS, TABLE_3, corruption_row, markdown, mean_and_deviation,
                           read_json)

PROJECT = Path(__file__).parent.parent
COMMAND = "python -m extras.claims"
DATA = ("--data", "shapes-hard")
SMALL_SET = 150  # number of training images


# -------------------------------------------------------------------------------------- the experiments

@dataclass(frozen=True)
class Job:
    """One call of a script."""
    name: str                  # of the run's folder
    script: str
    flags: tuple[str, ...]
    images: int                # number of images it processes, for the progress bar
    after: "Job | None" = None  # the job that must be done first; this one starts from its checkpoint

    def marker(self, out: Path) -> Path:
        """A file that says what made the run. It is written before the script starts."""
        return out / self.name / f"job-{self.script.removesuffix('.py')}.json"

    def origin(self, code: str) -> dict:
        """The marker's content: the flags, with those of the jobs before, and the digest of the code."""
        before = self.after.origin(code)["flags"] if self.after else []
        return {"flags": [self.script, *self.flags, *before], "code": code}

    def done(self, args: argparse.Namespace) -> bool:
        """Whether the script has reached its end. InputError if the folder has another origin."""
        folder, marker = args.out / self.name, self.marker(args.out)
        passes = folder / "evaluation" / "corruptions.json"
        first = passes if self.script == "evaluate.py" else folder / "args.json"
        made = read_json(marker, f"{COMMAND} after you remove {folder}") if marker.exists() else None
        if made != self.origin(args.code) and (made or first.exists()):
            raise InputError(f"{folder} was made by other flags or other code: remove it, or name "
                             f"another --out")
        if self.script != "evaluate.py":
            return made is not None and (folder / "metrics.json").exists()
        if not passes.with_suffix(".png").exists():
            return False
        count = sum(map(len, read_json(passes, COMMAND)["corruptions"].values()))
        return count == len(CORRUPTIONS) * (1 if "--severities" in self.flags else 5)

    def log(self, out: Path) -> Path:
        return out / "logs" / f"{self.name}-{self.script.removesuffix('.py')}.txt"


def digest_of_code() -> str:
    """A digest of the project's programs."""
    files = [f for folder in (PROJECT, PROJECT / "extras") for f in sorted(folder.glob("*"))
             if f.suffix in (".py", ".cu")]
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()[:16]


def full_set(args: argparse.Namespace) -> int:
    """Number of training images."""
    return 200 if args.quick else 2000


def recipe(seed: int, images: int, epochs: int) -> tuple[str, ...]:
    """The flags that all training runs have."""
    return *DATA, "--seed", str(seed), "--limit-train", str(images), "--epochs", str(epochs)


def pretrain_jobs(args: argparse.Namespace, name: str, *flags: str) -> list[Job]:
    """A pre-training run per seed."""
    epochs, images = (1, 2000) if args.quick else (4, 8000)
    return [Job(f"{name}-{seed}", "pretrain.py", recipe(seed, images, epochs) + flags, images * epochs)
            for seed in range(args.seeds)]


def finetune_jobs(args: argparse.Namespace, name: str, starts: list[Job] | None, *flags: str,
                  small: bool = False) -> list[Job]:
    """A fine-tuning run per seed, from `starts` or from scratch."""
    images = SMALL_SET if small else full_set(args)
    epochs = 80 if small and not args.quick else 7  # 800 steps, or 875 on the full set
    flags = ("--eval-every", str(epochs if args.quick else epochs // 7), *flags)
    return [Job(f"{name}-{seed}", "finetune.py", recipe(seed, images, epochs) + flags, images * epochs,
                after=starts[seed] if starts else None) for seed in range(args.seeds)]


def corruption_jobs(args: argparse.Namespace, trained: list[Job]) -> list[Job]:
    """An evaluation under corruption per fine-tuning run."""
    limits = ("--severities", "3", "--limit-val", "50") if args.quick else ()
    images = 1000 if args.quick else 16000
    return [Job(job.name, "evaluate.py", ("--corruptions", "all", *limits), images, after=job)
            for job in trained]


@dataclass(frozen=True)
class Claim:
    """What the paper says, and the runs that test it."""
    text: str
    rows: dict[str, list[Job]]           # row of the table -> a job per seed
    better: tuple[tuple[str, str], ...]  # pairs of rows; the paper says that the first is better
    paper: dict[str, str]                # row -> the paper's number
    measure: str = "AP"


def all_claims(args: argparse.Namespace) -> dict[str, Claim]:
    """C1 to C5. They share runs."""
    many, few = (f"{images:,} images, pre-trained" for images in (full_set(args), SMALL_SET))
    many_scratch, few_scratch = (name.replace("pre-trained", "from scratch") for name in (many, few))
    pre = pretrain_jobs(args, "pre")
    full, scratch = finetune_jobs(args, "full-pre", pre), finetune_jobs(args, "full", None)
    c1 = Claim(
        "pre-trained beats from scratch, most on small data (Tables 2, 5)",
        {many: full, many_scratch: scratch,
         few: finetune_jobs(args, "small-pre", pre, small=True),
         few_scratch: finetune_jobs(args, "small", None, small=True)},
        ((few, few_scratch), (many, many_scratch)), {})
    c2 = Claim(
        "self-attention beats Bi-LSTM beats none; shared is not worse than per layer (Table 3)",
        {"none": finetune_jobs(args, "none", pre, "--adaptor", "none"),
         "Bi-LSTM, per layer": finetune_jobs(args, "bilstm-each", pre, "--adaptor", "bilstm",
                                             "--adaptor-per-layer"),
         "Bi-LSTM": finetune_jobs(args, "bilstm", pre, "--adaptor", "bilstm"),
         "self-attention, per layer": finetune_jobs(args, "attention-each", pre, "--adaptor-per-layer"),
         "self-attention": full},
        (("self-attention", "Bi-LSTM"), ("Bi-LSTM", "none"), ("self-attention", "none"),
         ("self-attention", "self-attention, per layer"), ("Bi-LSTM", "Bi-LSTM, per layer")),
        {name: f"{row[1]:.1f}" for name, row in TABLE_3.items()})
    c3 = Claim(
        "pre-training makes corruption cost less (Table 4)",
        {"pre-trained": corruption_jobs(args, full), "from scratch": corruption_jobs(args, scratch)},
        (("pre-trained", "from scratch"),), {}, measure="AP under corruption (frost drawn) / clean AP")

    decoder = ("--structure", "encoder-decoder")
    one, many = "FP-EncDec, 1 class token", "FP-EncDec, 25 class tokens"
    pre_1 = pretrain_jobs(args, "encdec1-pre", *decoder, "--class-tokens", "1")
    pre_25 = pretrain_jobs(args, "encdec25-pre", *decoder, "--class-tokens", "25")
    c4 = Claim(
        "encoder-only beats encoder-decoder; many class tokens beat one there (Table 7)",
        {one: finetune_jobs(args, "encdec1", pre_1, *decoder),
         many: finetune_jobs(args, "encdec25", pre_25, *decoder), "FP-DETR": full},
        (("FP-DETR", many), (many, one)), {one: "33.1", many: "35.2 (300)", "FP-DETR": "37.2"})

    wide = ("--variant", "tiny-wide")
    c5 = Claim(
        "a wider model beats a narrower one (Table 2, Small and Lite)",
        {"tiny-wide (D 96)": finetune_jobs(args, "wide", pretrain_jobs(args, "wide-pre", *wide), *wide),
         "tiny (D 64)": full}, (("tiny-wide (D 96)", "tiny (D 64)"),),
        {"tiny-wide (D 96)": "42.5 (Small)", "tiny (D 64)": "37.2 (Lite)"})
    return {"C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5}


# ------------------------------------------------------------------------------------- running the jobs

def jobs_in_order(chosen: dict[str, Claim]) -> list[Job]:
    """Every job that the claims need, once, after the job it starts from."""
    jobs = {}  # a dict keeps the order

    def add(job: Job) -> None:
        if job.after:
            add(job.after)
        jobs[job] = None
    for claim in chosen.values():
        for jobs_of_a_seed in zip(*claim.rows.values()):
            for job in jobs_of_a_seed:
                add(job)
    return list(jobs)


def command_of(job: Job, out: Path) -> list[str]:
    command = [sys.executable, str(PROJECT / job.script), *job.flags, "--device", "cpu"]
    folder = out / job.name
    if job.script == "evaluate.py":
        return [*command, str(folder / "last.pt"), "--batch-size", "25", "--workers", "0"]
    if job.after:
        command += ["--pretrained", str(out / job.after.name / "last.pt")]
    return [*command, "--out", str(folder), "--resume"]


def run_jobs(jobs: list[Job], args: argparse.Namespace) -> None:
    """Runs the jobs that are not done, `--jobs` at a time. If one fails, stops the others and raises
    InputError, which names the log with the script's output."""
    todo = [job for job in jobs if not job.done(args)]
    bar = tqdm(total=sum(job.images for job in jobs), unit="img", desc="the paper's claims",
               initial=sum(job.images for job in jobs if job not in todo))
    end_with_parent = None
    if sys.platform == "linux":  # children get SIGTERM even if this process is killed
        end_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    running = {}  # job -> process
    try:
        while todo or running:
            for job in list(todo):
                if len(running) < args.jobs and (job.after is None or job.after.done(args)):
                    command = command_of(job, args.out)
                    job.marker(args.out).parent.mkdir(exist_ok=True)
                    write_json(job.marker(args.out), job.origin(args.code))
                    with open(job.log(args.out), "wb") as log:
                        running[job] = subprocess.Popen(command, stdout=log, stderr=log, env=env,
                                                        preexec_fn=end_with_parent)
                    todo.remove(job)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                if process.returncode or not job.done(args):
                    raise InputError(f"{job.name} failed: see {job.log(args.out)}; run again to go on")
                del running[job]
                bar.update(job.images)
            bar.set_postfix_str(", ".join(job.name for job in running))
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()


# ------------------------------------------------------------------------------------------- the report

def read_score(job: Job, out: Path) -> float:
    """A run's score in [0, 1]: its AP, or the ratio of AP under corruption to clean AP."""
    if job.script == "evaluate.py":
        passes = read_json(out / job.name / "evaluation" / "corruptions.json", COMMAND)
        return corruption_row(passes)[0] / 100 / max(passes["clean"]["AP"], 1e-9)
    return read_json(out / job.name / "metrics.json", COMMAND)["AP"]


def verdict(better: list[float], worse: list[float]) -> str:
    """Compares two rows by a paired one-sided t-test at 5 %. Runs with the same seed are a pair."""
    gain = 100 * (np.array(better) - np.array(worse))
    text = f"{gain.mean():+.1f} ± {gain.std(ddof=1) if len(gain) > 1 else 0.0:.1f}"
    if len(gain) < 2 or gain.std() == 0:
        return f"{text}: not distinguishable (one seed, or equal)"
    p = ttest_rel(better, worse, alternative="greater").pvalue
    result = "reproduced" if p < 0.05 else "**not** reproduced" if p > 0.95 else "not distinguishable"
    return f"{text} (p = {p:.3f}): {result}"


def write_page(chosen: dict[str, Claim], args: argparse.Namespace) -> str:
    """Writes report.md, with a table, a verdict and a picture per claim, and returns its text."""
    lines = ["# The claims in miniature", "",
             f"Embedded data (shapes-hard), {args.seeds} seeds, mean ± deviation, AP in percent on "
             f"300 validation pictures. The paper's numbers are of COCO. Rule: a paired one-sided "
             f"t-test over the seeds at 5 %."]
    if args.quick:
        lines += ["", "**--quick: the training was far too short for verdicts.**"]
    for name, claim in chosen.items():
        scores = {row: [read_score(job, args.out) for job in jobs] for row, jobs in claim.rows.items()}
        rows = [(row, (mean_and_deviation(v), claim.paper.get(row, "-"))) for row, v in scores.items()]
        lines += ["", f"## {name}: {claim.text}", "", markdown("", (claim.measure, "paper"), rows), ""]
        lines += [f"- {a} against {b}: {verdict(scores[a], scores[b])}" for a, b in claim.better]
        draw_claim(claim, scores, args.out, name)
        lines += ["", f"![{name}]({name}.png)"]
    page = "\n".join(lines) + "\n"
    (args.out / "report.md").write_text(page, encoding="utf-8")
    return page


def draw_claim(claim: Claim, scores: dict[str, list[float]], out: Path, name: str) -> None:
    """Draws AP over the steps (thin lines: seeds, thick lines: means) and the final scores."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (row, jobs) in enumerate(claim.rows.items()):
        curves = []
        for job in jobs:
            log = read_log(out / job.name / "log.jsonl")
            curves.append([(e["step"], 100 * e["AP"]) for e in log if "AP" in e])
            left.plot(*zip(*curves[-1]), color=f"C{i}", lw=0.7, alpha=0.5)
        left.plot(*np.mean(curves, 0).T, "o-", ms=3, color=f"C{i}", label=row)
        right.barh(i, 100 * np.mean(scores[row]), color=f"C{i}", alpha=0.7)
        right.plot([100 * score for score in scores[row]], [i] * len(jobs), "k|", ms=12)
    left.set(xlabel="step of fine-tuning", title="AP on clean validation pictures")
    left.legend()
    right.set(title=claim.measure + ", percent; a mark per seed")
    right.set_yticks(range(len(claim.rows)), list(claim.rows))
    right.invert_yaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out / f"{name}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--claims", nargs="+", choices=("C1", "C2", "C3", "C4", "C5"),
                        help="only these")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from 0 on")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="scripts at a time")
    parser.add_argument("--quick", action="store_true", help="train far too short for verdicts")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report (default: "
                                                 "runs/claims, or runs/claims-quick)")
    args = parser.parse_args()
    args.out = args.out or Path("runs/claims-quick" if args.quick else "runs/claims")
    chosen = {name: claim for name, claim in all_claims(args).items()
              if not args.claims or name in args.claims}
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write into {args.out} ({e.strerror}): choose another --out") from None
    args.code = digest_of_code()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_jobs then ends its children
    run_jobs(jobs_in_order(chosen), args)
    print(f"{write_page(chosen, args)}\nthis page: {args.out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
