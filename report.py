"""Numbers as people and programs read them: cells, Markdown tables, JSON files."""
import json
import statistics
from pathlib import Path

from model import InputError


def cell(value: object) -> str:
    """A figure as the paper prints it."""
    if isinstance(value, float):
        return "-" if value != value or value < 0 else f"{value:.1f}"
    return str(value)


def mean_and_deviation(values: list[float]) -> str:
    """Values in [0, 1] -> "mean±deviation" in percent (Table 5), the sample's deviation (n - 1)."""
    if min(values) < 0:
        return "-"  # the metric has -1 where no object has the size
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f}±{statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def markdown(first: str, header: tuple[str, ...], rows: list[tuple[str, tuple]]) -> str:
    """A Markdown table, its columns aligned so that it reads in a terminal too."""
    lines = [[first, *header]] + [[name, *map(cell, values)] for name, values in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    text = [[v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))]
            for line in (lines[0], rule, *lines[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def read_json(path: Path, command: str) -> dict:
    """A JSON object that a run left. `command` would make it. InputError if it is absent or damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it comes from {command}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} cannot be read ({e}): make it again by {command}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no run's figures: make it again by {command}")
    return content


def write_json(path: Path, content: dict) -> None:
    """Written to a temporary name and renamed, so that a file of this name is always whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
