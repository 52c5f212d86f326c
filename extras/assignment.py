"""Makes an assignment of this project, and grades it.

    python -m extras.assignment OUT              writes the assignment into the folder OUT
    python -m extras.assignment --grade OUT      prints the points of each part and the total

For students: in OUT, twelve functions have no body. Search for "your part" and write the bodies.
Imports and helpers belong inside them, because nothing else is graded. `--grade .` inside OUT checks
your work. There, a part waits for the parts that its tests use: losses wait for matching, matching for
GIoU, boxes for the whole model. Read the tests last, because they spell out many formulas.

For teachers: run both commands in the whole project. Each part is graded alone: the student's function
takes the place of ours, and the tests and all other code are ours. It has its points if all its tests
pass. The student's code runs with your rights.
"""
import argparse
import ast
import importlib
import inspect
import shutil
import signal
import threading
from _thread import interrupt_main
from operator import attrgetter
from pathlib import Path

import engine
from engine import InputError

ROOT = Path(__file__).parent.parent
COPIED = "*.py *.cu *.md *.toml *.txt LICENSE .gitignore docs/* extras/*.py tests/*.* tests/forks/*.py"
LEFT_OUT = ("answers.md", "walkthrough.py", "test_walkthrough.py", "mutations.py", "test_mutations.py",
            "test_assignment.py")  # they hold solutions
POINTS = 10  # of each part
PARTS = [  # title, module, function, and which tests of the module's test file (as pytest's -k)
    ("sine positions (3.1)", "model", "sine_positions", "sine_positions"),
    ("tokenizer (3.2, A.1)", "model", "Tokenizer.forward", "tokenizer or tokens_see_every_pixel"),
    ("deformable attention (3.2)", "deform_attn", "ms_deform_attn_reference", "test_reference"),
    ("encoder layer (Eq. 2, 3)", "model", "EncoderLayer.forward", "layer_equals or every_branch"),
    ("extra tokens (Eq. 1, 4)", "model", "ExtraTokenEmbedding.forward", "extra_tokens_look"),
    ("task adaptor (Eq. 5)", "model", "TaskAdaptor.mix_queries", "adaptor_equals"),
    ("boxes (4.1)", "model", "Detector.boxes", "test_boxes"),
    ("GIoU (4.1)", "finetune", "giou", "test_giou"),
    ("matching (4.1)", "finetune", "match", "test_match_is or test_matching"),
    ("losses (4.1)", "finetune", "detection_loss", "test_losses"),
    ("best boxes (4.2)", "evaluate", "best_boxes", "test_best_boxes"),
    ("semantic softmax (A.3)", "pretrain", "semantic_softmax_loss", "test_a_small_tree")]


def find(path: Path, name: str) -> ast.FunctionDef:
    """The definition of a function or method. SyntaxError if the file is broken or has none."""
    node = ast.parse(path.read_bytes(), path)
    for word in name.split("."):
        node = {getattr(n, "name", None): n for n in getattr(node, "body", [])}.get(word)
    if not isinstance(node, ast.FunctionDef):
        raise SyntaxError(f"{path.name} has no function {name}")
    return node


def write(out: Path) -> None:
    """Copies the project without the bodies of PARTS. Docstrings stay, and comments right below them."""
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: give a new folder")
    for source in [path for pattern in COPIED.split() for path in ROOT.glob(pattern)]:
        if source.name not in LEFT_OUT:
            copy = out / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    for title, module, name, _ in PARTS:
        path = out / f"{module}.py"
        node, lines = find(path, name), path.read_text(encoding="utf-8").splitlines()
        body = node.body[1:] if ast.get_docstring(node) else node.body
        blank = " " * body[0].col_offset + f'raise NotImplementedError("your part: {title}")'
        lines[body[0].lineno - 1:node.end_lineno] = [blank]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Outcome:
    """A plugin of pytest. Counts the tests that pass, and describes the last one that does not."""
    passed, problem = 0, ""

    def pytest_runtest_logreport(self, report) -> None:
        self.passed += report.when == "call" and report.passed
        if not report.passed:  # a skipped test is a problem, too
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(crash.message if crash else report.longrepr).splitlines()[0]
            self.problem = f"{report.location[2]}: {text}"
            if "your part: " in text:
                self.problem = "waits for " + text.partition("your part: ")[2]


def grade(path: Path, name: str, tests: str, limit: float) -> str:
    """Runs the tests of a part with the function of a student's file. Returns "", or what went wrong."""
    import pytest  # imported here, because writing an assignment does not need it
    try:
        compiled = compile(ast.Module([find(path, name)], []), path, "exec").co_consts
        theirs = next(c for c in compiled if getattr(c, "co_name", "") == name.rpartition(".")[2])
        function = inspect.unwrap(attrgetter(name)(importlib.import_module(path.stem)))
        ours, function.__code__ = function.__code__, theirs  # for all that have imported it, too
    except (SyntaxError, ValueError) as e:
        return str(e)
    outcome, test_file = Outcome(), str(ROOT / "tests" / f"test_{path.name}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(limit, interrupt_main)  # ends an endless loop as Ctrl-C does
    timer.start()
    flags = "-x", "-pno:terminal", "-pno:cacheprovider"
    status = pytest.main([test_file, "-k", tests, *flags], [outcome])
    timer.cancel()
    function.__code__ = ours
    if status == pytest.ExitCode.INTERRUPTED:
        return f"the tests did not come to an end within {limit} seconds"
    return outcome.problem or ("" if outcome.passed else "no test could run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=engine.Help)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the assignment")
    parser.add_argument("--grade", action="store_true", help="grade it instead of writing it")
    parser.add_argument("--limit", type=engine.positive, default=60, help="seconds for a part's tests")
    args = parser.parse_args()
    if not args.grade:
        write(args.out)
        print(f"{args.out}: {len(PARTS)} parts of {POINTS} points. Students search for 'your part', write "
              f"the bodies, and check them there by python -m extras.assignment --grade .")
        return
    paths = [args.out / f"{module}.py" for _, module, *_ in PARTS]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise InputError(f"{args.out} is no assignment: it has no {absent[0]}")
    total = 0
    for path, (title, _, name, tests) in zip(paths, PARTS):
        problem = grade(path, name, tests, args.limit).replace(f"waits for {title}", "not begun")
        total += 0 if problem else POINTS
        print(f"{title:28}{0 if problem else POINTS:4}  {problem}".rstrip(), flush=True)
    print(f"{'total':28}{total:4}  of {POINTS * len(PARTS)}")


if __name__ == "__main__":
    engine.run_script(main)
