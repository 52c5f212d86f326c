"""The paper's claims in miniature: trains what each of them compares on the embedded data, on a laptop, and
says what came out.

    python reproduce.py                 all claims, three seeds, hours on 2 cores; goes on where it stopped
    python reproduce.py --quick         the same with much shorter training: a look at the machinery
    python reproduce.py --claims C1

It calls pretrain.py, finetune.py and evaluate.py, each run in a folder of its own below --out, as many at a
time as there are cores, and writes report.md with a table, a picture and a verdict per claim. The settings
were chosen on C1 alone; the other claims were run with them as they are.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel
from tqdm import tqdm

from engine import Help, positive, run_script
from model import InputError
from report import markdown, mean_and_deviation, read_json
from tables import TABLE_3, corruption_row

HERE, DATA = Path(__file__).parent, ("--data", "shapes-hard")


# ---------------------------------------------------------------------------------------------- experiments

@dataclass(frozen=True)
class Job:
    """One call of a script. `images`: how many it trains on, about its cost."""
    name: str
    script: str
    flags: tuple[str, ...]
    images: int
    after: "Job | None" = None  # what must have been run before, whose checkpoint it takes

    def done(self, out: Path) -> bool:
        """Whether the last file that the script writes is there."""
        last = "evaluation/corruptions.png" if self.script == "evaluate.py" else "metrics.json"
        return (out / self.name / last).exists()


SMALL_SET = 150


def full_set(args: argparse.Namespace) -> int:
    return 200 if args.quick else 2000


def pretrain(seed: int, args: argparse.Namespace, name: str = "pre", *flags: str) -> Job:
    epochs, images = (1, 2000) if args.quick else (4, 8000)
    sizes = ("--epochs", str(epochs), "--limit-train", str(images))
    flags = (*DATA, "--seed", str(seed), *sizes, *flags)
    return Job(f"{name}-{seed}", "pretrain.py", flags, epochs * images)


def finetune(seed: int, args: argparse.Namespace, name: str, start: Job | None, *flags: str,
             small: bool = False) -> Job:
    images = SMALL_SET if small else full_set(args)
    epochs = 7 if args.quick or not small else 80  # 875 and 800 steps
    every = epochs if args.quick else max(1, epochs // 7)
    sizes = ("--limit-train", str(images), "--epochs", str(epochs), "--eval-every", str(every))
    flags = (*DATA, "--seed", str(seed), *sizes, *flags)
    return Job(f"{name}-{seed}", "finetune.py", flags, images * epochs, start)


def corrupted(job: Job, args: argparse.Namespace) -> Job:
    flags = ("--corruptions", "all", *(("--severities", "3", "--limit-val", "50") if args.quick else ()))
    return Job(job.name, "evaluate.py", flags, 1000 if args.quick else 16000, job)


@dataclass(frozen=True)
class Claim:
    """What the paper says, and the runs that show it: {row: a job per seed}. `better`: pairs of rows of
    which the first is claimed to be better. `paper`: {row: the paper's number}."""
    text: str
    rows: dict[str, list[Job]]
    better: tuple[tuple[str, str], ...]
    paper: dict[str, str]
    measure: str = "AP"


def claims(args: argparse.Namespace) -> dict[str, Claim]:
    """All five (C1 to C5), built from shared runs."""
    seeds = range(args.seeds)
    pre = [pretrain(s, args) for s in seeds]
    full = [finetune(s, args, "full-pre", pre[s]) for s in seeds]
    full_scratch = [finetune(s, args, "full", None) for s in seeds]
    many, few = f"{full_set(args):,} images", f"{SMALL_SET} images"
    c1 = Claim("pre-trained beats from scratch, most on small data (Tables 2, 5)", {
        f"{many}, pre-trained": full, f"{many}, from scratch": full_scratch,
        f"{few}, pre-trained": [finetune(s, args, "small-pre", pre[s], small=True) for s in seeds],
        f"{few}, from scratch": [finetune(s, args, "small", None, small=True) for s in seeds]},
        ((f"{few}, pre-trained", f"{few}, from scratch"), (f"{many}, pre-trained", f"{many}, from scratch")),
        {})

    def adaptor(name: str, *flags: str) -> list[Job]:
        return [finetune(s, args, name, pre[s], *flags) for s in seeds]
    table_3 = {name: f"{row[1]:.1f}" for name, row in TABLE_3.items()}
    c2 = Claim("self-attention beats Bi-LSTM beats none; shared is not worse than per layer (Table 3)", {
        "none": adaptor("none", "--adaptor", "none"),
        "Bi-LSTM, per layer": adaptor("bilstm-each", "--adaptor", "bilstm", "--adaptor-per-layer"),
        "Bi-LSTM": adaptor("bilstm", "--adaptor", "bilstm"),
        "self-attention, per layer": adaptor("attention-each", "--adaptor-per-layer"),
        "self-attention": full},
        (("self-attention", "Bi-LSTM"), ("Bi-LSTM", "none"), ("self-attention", "none"),
         ("self-attention", "self-attention, per layer"), ("Bi-LSTM", "Bi-LSTM, per layer")), table_3)
    c3 = Claim("pre-training makes corruption cost less (Table 4)", {
        "pre-trained": [corrupted(j, args) for j in full],
        "from scratch": [corrupted(j, args) for j in full_scratch]},
        (("pre-trained", "from scratch"),), {}, measure="AP under corruption / clean AP")

    def encoder_decoder(tokens: str) -> list[Job]:
        flags, name = ("--structure", "encoder-decoder"), f"encdec{tokens}"
        starts = [pretrain(s, args, f"{name}-pre", *flags, "--class-tokens", tokens) for s in seeds]
        return [finetune(s, args, name, starts[s], *flags) for s in seeds]
    one, many = "FP-EncDec, 1 class token", "FP-EncDec, 25 class tokens"
    c4 = Claim("encoder-only beats encoder-decoder; many class tokens beat one there (Table 7)", {
        one: encoder_decoder("1"), many: encoder_decoder("25"), "FP-DETR": full},
        (("FP-DETR", many), (many, one)), {one: "33.1", many: "35.2 (300)", "FP-DETR": "37.2"})
    wide = [pretrain(s, args, "wide-pre", "--variant", "tiny-wide") for s in seeds]
    c5 = Claim("a wider model beats a narrower one (Table 2, Small and Lite)", {
        "tiny-wide (D 96)": [finetune(s, args, "wide", wide[s], "--variant", "tiny-wide") for s in seeds],
        "tiny (D 64)": full}, (("tiny-wide (D 96)", "tiny (D 64)"),),
        {"tiny-wide (D 96)": "42.5 (Small)", "tiny (D 64)": "37.2 (Lite)"})
    return {"C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5}


# -------------------------------------------------------------------------------------------------- running

def in_order(chosen: dict[str, Claim]) -> list[Job]:
    """Every job that the claims need, once, after what it starts from."""
    jobs = {}
    for claim in chosen.values():
        for row in zip(*claim.rows.values()):  # seed by seed
            for job in row:
                chain = [job]
                while chain[0].after:
                    chain.insert(0, chain[0].after)
                jobs.update({(j.name, j.script): j for j in chain})
    return list(jobs.values())


def command_of(job: Job, out: Path) -> list[str]:
    command = [sys.executable, str(HERE / job.script), *job.flags, "--device", "cpu"]
    folder = out / job.name
    if job.script == "evaluate.py":
        return [*command, str(folder / "last.pt"), "--batch-size", "25", "--workers", "0"]
    if job.after:
        command += ["--pretrained", str(out / job.after.name / "last.pt")]
    return [*command, "--out", str(folder), "--resume" if (folder / "last.pt").exists() else "--overwrite"]


def run_all(jobs: list[Job], args: argparse.Namespace) -> None:
    """Runs what has not been run, `--jobs` at a time. A script that fails stops everything; what it wrote is
    in the log that the error names."""
    todo = [j for j in jobs if not j.done(args.out)]
    bar = tqdm(total=sum(j.images for j in jobs), initial=sum(j.images for j in jobs if j not in todo),
               unit="img", desc="claims in miniature")
    running = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    try:
        while todo or running:
            for job in list(todo):
                ready = job.after is None or job.after.done(args.out)
                if ready and len(running) < args.jobs:
                    log = args.out / "logs" / f"{job.name}-{job.script.removesuffix('.py')}.txt"
                    with open(log, "w") as f:
                        running[job] = (subprocess.Popen(command_of(job, args.out), stdout=f, stderr=f,
                                                         env=environment), log)
                    todo.remove(job)
            for job, (process, log) in list(running.items()):
                if process.poll() is not None:
                    if process.returncode:
                        raise InputError(f"{job.name} failed: see {log}; start again to go on")
                    del running[job]
                    bar.update(job.images)
            bar.set_postfix_str(", ".join(j.name for j in running))
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
        bar.close()


# ------------------------------------------------------------------------------------------------ reporting

def value_of(job: Job, out: Path) -> float:
    """What a run is judged by, in [0, 1]: AP, or the part of it that is left under corruption."""
    if job.script == "evaluate.py":
        passes = read_json(out / job.name / "evaluation" / "corruptions.json", "reproduce.py")
        return corruption_row(passes)[0] / 100 / max(passes["clean"]["AP"], 1e-9)
    return read_json(out / job.name / "metrics.json", "reproduce.py")["AP"]


def verdict(better: list[float], worse: list[float]) -> str:
    """A paired one-sided t-test over the seeds at 5 %: each pair shares its seed."""
    gain = 100 * (np.array(better) - np.array(worse))
    said = f"{gain.mean():+.1f} ± {gain.std(ddof=1) if len(gain) > 1 else 0.0:.1f}"
    if len(gain) < 2 or gain.std() == 0:
        return f"{said}: not distinguishable (one seed, or equal)"
    p = ttest_rel(better, worse, alternative="greater").pvalue
    result = "reproduced" if p < 0.05 else "**not** reproduced" if p > 0.95 else "not distinguishable"
    return f"{said} (p = {p:.3f}): {result}"


def report(chosen: dict[str, Claim], args: argparse.Namespace) -> str:
    """The page: a table and a verdict per claim, with the picture that `draw` makes."""
    lines = ["# The claims in miniature", "",
             f"Embedded data (shapes-hard), {args.seeds} seeds, mean ± deviation, AP in percent on 300 "
             f"validation pictures. The paper's numbers are of COCO. Rule: a paired one-sided t-test over "
             f"the seeds at 5 %."]
    if args.quick:
        lines += ["", "**--quick: training was far too short for verdicts; this only shows the machinery.**"]
    for name, claim in chosen.items():
        values = {row: [value_of(j, args.out) for j in jobs] for row, jobs in claim.rows.items()}
        rows = [(row, (mean_and_deviation(v), claim.paper.get(row, "-"))) for row, v in values.items()]
        lines += ["", f"## {name}: {claim.text}", "", markdown("", (claim.measure, "paper"), rows), ""]
        lines += [f"- {a} against {b}: {verdict(values[a], values[b])}" for a, b in claim.better]
        draw(name, claim, values, args.out)
        lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def draw(name: str, claim: Claim, values: dict[str, list[float]], out: Path) -> None:
    """Left the validation AP over the steps, a thin line per seed and their mean; right the final values."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (row, jobs) in enumerate(claim.rows.items()):
        curves = []
        for job in jobs:
            log = [json.loads(line) for line in (out / job.name / "log.jsonl").read_text().splitlines()]
            curves.append([(e["step"], 100 * e["AP"]) for e in log if "AP" in e])
            left.plot(*zip(*curves[-1]), color=f"C{number}", lw=0.7, alpha=0.5)
        left.plot(*np.mean(curves, 0).T, "o-", ms=3, color=f"C{number}", label=row)
        right.barh(number, 100 * np.mean(values[row]), color=f"C{number}", alpha=0.7)
        right.plot([100 * v for v in values[row]], [number] * len(jobs), "k|", ms=12)
    left.set(xlabel="step of fine-tuning", title="AP on clean validation pictures")
    left.legend()
    right.set(title=claim.measure + ", percent; a mark per seed")
    right.set_yticks(range(len(claim.rows)), list(claim.rows))
    right.invert_yaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out / f"{name}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("--claims", nargs="+", choices=("C1", "C2", "C3", "C4", "C5"), help="only these")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from 0 on")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="scripts run at a time")
    parser.add_argument("--quick", action="store_true",
                        help="much shorter training: no verdict can be trusted")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report (default: "
                                                 "runs/reproduce, or runs/reproduce-quick)")
    args = parser.parse_args()
    args.out = args.out or Path("runs/reproduce-quick" if args.quick else "runs/reproduce")
    chosen = {k: v for k, v in claims(args).items() if not args.claims or k in args.claims}
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write into {args.out} ({e.strerror}): choose another --out") from None
    run_all(in_order(chosen), args)
    page = report(chosen, args)
    (args.out / "report.md").write_text(page)
    print(f"{page}\nthis page: {args.out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
