"""The assignment without a solution, with all solutions, and with a wrong sign in every other one. Each
grading runs in a process of its own."""
import ast
import shutil

import pytest
from conftest import ROOT, python, refused
from mutations import plant

from extras.assignment import PARTS, POINTS

TITLES = [title for title, *_ in PARTS]
WRONG_SIGNS = {  # part: the right text, the wrong text
    "sine positions (3.1)": ("(place - 0.5)", "(place + 0.5)"),
    "tokenizer (3.2, A.1)": ("x = norm(conv(x)", "x = -norm(conv(x)"),
    "deformable attention (3.2)": ("(2 * locations - 1)", "(2 * locations + 1)"),
    "encoder layer (Eq. 2, 3)": ("self.norm2(tokens + ", "self.norm2(tokens - "),
    "extra tokens (Eq. 1, 4)": ("reference_points(self.position)", "reference_points(-self.position)"),
    "task adaptor (Eq. 5)": ("prompted = extra + positions", "prompted = extra - positions"),
    "boxes (4.1)": ("+ start).sigmoid()", "- start).sigmoid()"),
    "GIoU (4.1)": ("area_a + area_b - overlap", "area_a + area_b + overlap"),
    "matching (4.1)": ("giou_cost = -giou(", "giou_cost = giou("),
    "losses (4.1)": ("(1 - giou(matched_boxes", "(1 + giou(matched_boxes"),
    "best boxes (4.2)": ("clamp(0, 1) * torch", "clamp(0, 1) * -torch"),
    "semantic softmax (A.3)": ("- smoothing * log_p", "+ smoothing * log_p")}


def grade(folder, *flags) -> dict[str, tuple[int, str]]:
    """Title of each part -> its points, and what went wrong."""
    *lines, total = python("-m", "extras.assignment", "--grade", folder, *flags).stdout.splitlines()
    rows = [(line[:28].rstrip(), int(line[28:32]), line[34:]) for line in lines]
    assert [title for title, *_ in rows] == TITLES
    assert total.split() == ["total", str(sum(n for _, n, _ in rows)), "of", str(POINTS * len(PARTS))]
    return {title: (points, problem) for title, points, problem in rows}


def outline(path):
    """The signature and docstring of each function and class."""
    return [(n.name, ast.dump(n.args) if hasattr(n, "args") else None, ast.get_docstring(n))
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def test_the_assignment_scores_nothing_and_says_why(tmp_path):
    out = tmp_path / "out"
    python("-m", "extras.assignment", out)
    for name in ("README.md", "deform_attn_kernel.cu", "tests/test_model.py", "extras/shapes.py"):
        assert (out / name).read_bytes() == (ROOT / name).read_bytes()
    for name in {module for _, module, *_ in PARTS}:
        assert outline(out / f"{name}.py") == outline(ROOT / f"{name}.py")
    # One file is broken, one function is gone and one does not come to an end.
    for file, right, wrong in (("pretrain.py", "import argparse", "import"),
                               ("finetune.py", "def giou(", "def iou("),
                               ("evaluate.py", 'raise NotImplementedError("your', 'while True: ("')):
        (out / file).write_text(plant(right, wrong, (out / file).read_text()))
    says = dict.fromkeys(TITLES, "not begun")
    says |= {"semantic softmax (A.3)": "invalid syntax (pretrain.py, line ",
             "GIoU (4.1)": "finetune.py has no function giou",
             "best boxes (4.2)": "did not come to an end within 5 seconds"}
    for title, (points, problem) in grade(out, "--limit", 5).items():
        assert points == 0 and says[title] in problem, title


@pytest.mark.parametrize("wrong", [[], TITLES[::2], TITLES[1::2]], ids=["none", "odd", "even"])
def test_a_wrong_sign_costs_the_points_of_its_part_alone(wrong, tmp_path):
    for title, module, *_ in PARTS:
        file = tmp_path / f"{module}.py"
        if not file.exists():
            shutil.copy(ROOT / file.name, file)
        if title in wrong:
            file.write_text(plant(*WRONG_SIGNS[title], file.read_text()))
    for title, (points, problem) in grade(tmp_path).items():
        assert points == (0 if title in wrong else POINTS), f"{title}: {problem}"


def test_a_part_whose_tests_are_not_found_has_no_points():
    code = ("import pathlib, extras.assignment as assignment; "
            "print(assignment.grade(pathlib.Path('finetune.py'), 'giou', 'no_such_test', 60))")
    assert python("-c", code).stdout.endswith("no test could run\n")


def test_no_folder_is_overwritten_or_graded_by_mistake(tmp_path):
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "extras.assignment", tmp_path, says="exists and is not empty")
    refused(tmp_path, "extras.assignment", "--grade", tmp_path, says="no assignment: it has no model.py")
