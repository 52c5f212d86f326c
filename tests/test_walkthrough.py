"""The walk along one picture, as a script and as cells, on models that have hardly been trained."""
import ast
import re

import pytest
from conftest import ROOT, call, python, run
from PIL import Image

SHORT = "--epochs 1 --limit-train 8 --limit-val 2 --device cpu".split()
CLASSIFIER, DETECTOR = "runs/pretrain-tiny-shapes/last.pt", "runs/finetune-tiny-shapes/last.pt"
SLIDES = {"1-tokens.png", "2-positions.png", "3-samples.png", "4-class-token.png", "5-prompts.png",
          "6-adaptor.png", "7-matching.png", "8-losses.png", "9-precision.png"}
OF_THE_PHOTOGRAPH = {"1-tokens-photograph.png", "3-samples-photograph.png"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which both stages have been run, shortened."""
    folder = tmp_path_factory.mktemp("trained")
    call(folder, "pretrain.py", *SHORT)
    call(folder, "finetune.py", *SHORT)
    return folder


def check_slides(folder, names):
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        with Image.open(path) as slide:
            assert slide.size == (1920, 1080) and len(slide.convert("RGB").getcolors(1 << 21)) > 10


def check_numbers(printed):
    """Each number by hand stands beside that of the project's code."""
    losses = re.findall(r"by hand (\S+), by detection_loss (\S+)", printed)
    costs = re.findall(r"cost (\S+); the cheapest of all pairs: (\S+)", printed)
    precision = re.findall(r"AP50 (\S+), by coco_metrics (\S+)", printed)
    sines = re.findall(r"first token: +(\S+)\n.*: +(\S+)", printed)
    assert [len(x) for x in (losses, costs, precision, sines)] == [3, 1, 1, 1]
    for by_hand, computed in losses + costs + precision + sines:
        assert float(by_hand) == pytest.approx(float(computed), abs=2e-4)


def test_script_with_a_photograph(trained, tmp_path):
    Image.linear_gradient("L").resize((150, 100)).convert("RGB").save(tmp_path / "photo.jpg")
    done = run(tmp_path, "docs/walkthrough.py", "photo.jpg", "--out", "slides",
               "--classifier", trained / CLASSIFIER, "--detector", trained / DETECTOR)
    check_slides(tmp_path / "slides", SLIDES | OF_THE_PHOTOGRAPH)
    check_numbers(done.stdout)
    assert "skipped" not in done.stdout and "Warning" not in done.stderr


def test_cells_in_a_notebook_without_a_photograph(trained):
    """There is no __file__, the arguments are the notebook's, and the backend is one that we lack."""
    cells = (ROOT / "docs" / "walkthrough.py").read_text()
    here = 'Path(engine.__file__).parent / "runs"'
    assert cells.count(here) == 1
    cells = cells.replace(here, f"Path({str(trained / 'runs')!r})")
    done = python("-c", cells, "-f", "kernel.json", folder=ROOT / "docs", MPLBACKEND="module://absent")
    check_slides(trained / "runs" / "walkthrough", SLIDES)
    check_numbers(done.stdout)
    assert done.stdout.count("skipped") == 2


def test_each_cell_ends_with_its_slide():
    """A notebook shows the last expression of a cell."""
    cells = re.split(r"^# %%.*$", (ROOT / "docs" / "walkthrough.py").read_text(), flags=re.MULTILINE)
    last = [ast.parse(cell).body[-1] for cell in cells if "_slide(" in cell]
    assert len(last) == len(SLIDES | OF_THE_PHOTOGRAPH)
    assert all(isinstance(statement, ast.Expr) for statement in last)


@pytest.mark.parametrize("flags, says", [
    (["--classifier", "absent.pt"], "absent.pt is missing: python pretrain.py makes it"),
    (["--detector", "absent.pt"], "absent.pt is missing: python finetune.py makes it"),
    (["--classifier", DETECTOR], "no classifier"),
    (["--detector", CLASSIFIER], "no detector"),
    (["absent.jpg"], "absent.jpg is missing"),
])
def test_mistakes_end_in_one_line(trained, flags, says):
    done = python(ROOT / "docs" / "walkthrough.py", "--out", "unused", "--classifier", CLASSIFIER,
                  "--detector", DETECTOR, *flags, folder=trained, code=2)
    assert done.stdout == "" and not (trained / "unused").exists()
    assert done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1
