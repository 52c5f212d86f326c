"""The README's map from the paper to the code: every name is where it says, and nothing of the paper is left
out.

    python tests/test_map.py        writes the present line ranges into the README
"""
import ast
import re

from conftest import ROOT

LINK = re.compile(r"\[`([\w.]+)`[^]]*\]\((\w+\.py)[^)]*\)")
SECTIONS = ["3", "3.1", "3.2", "3.3", "4.1", "4.2", "4.3", "4.4", "4.5", "A.1", "A.2", "A.3"]
EVERYTHING = {*SECTIONS, *(f"Eq. {i}" for i in range(1, 6)), *(f"Table {i}" for i in range(1, 9)),
              *(f"Figure {i}" for i in range(1, 4))}


def ranges(path) -> dict[str, tuple[int, int]]:
    """{name: (first line, last line)} of a file's functions, classes, methods ("Class.method") and
    constants."""
    found = {}

    def visit(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[prefix + node.name] = first, node.end_lineno
                visit(node.body if isinstance(node, ast.ClassDef) else [], f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno, node.end_lineno
    visit(ast.parse(path.read_text()).body)
    return found


def with_present_ranges(text: str) -> str:
    def link(match):
        first, last = ranges(ROOT / match[2])[match[1]]
        return f"[`{match[1]}` {match[2]}:{first}-{last}]({match[2]}#L{first}-L{last})"
    return LINK.sub(link, text)


def test_names_and_lines_are_where_the_map_says():
    text = (ROOT / "README.md").read_text()
    assert len(LINK.findall(text)) > 50
    assert text == with_present_ranges(text), "a name has moved: python tests/test_map.py"


def test_the_map_has_everything_of_the_paper():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[`", (ROOT / "README.md").read_text(), re.M)
    named = set()
    for row in rows:
        kind = ""
        for part in row.split(", "):  # "3.2, Eq. 2, 3" names Eq. 2 and Eq. 3
            kind, number = part.rsplit(" ", 1) if " " in part else ("" if "." in part else kind, part)
            named.add(f"{kind} {number}".strip())
    assert named == EVERYTHING


def test_the_map_knows_names_of_every_kind(tmp_path):
    (tmp_path / "a.py").write_text("A = 1\n\n@f\ndef b():\n    C = 2\n\nclass D:\n    e: int = 3\n\n"
                                   "    def g(self):\n        pass\n")
    assert ranges(tmp_path / "a.py") == {"A": (1, 1), "b": (3, 5), "D": (7, 11), "D.e": (8, 8),
                                          "D.g": (10, 11)}


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_present_ranges((ROOT / "README.md").read_text()))
