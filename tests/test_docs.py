"""docs/maths.md: its numbers resolve, its tests exist, and no absent text is cited."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MATHS = ROOT / "docs" / "maths.md"

NUMBER = r"\d+(?:\.\d+)?"
CITED = re.compile(rf"\b[Mm]aths ({NUMBER}(?:(?:, and |, | and | to ){NUMBER})*)")
IN_BRACKETS = re.compile(r"\((\d+\.\d+(?:, \d+\.\d+)*)\)")
# Documents and numberings that a reader of the repository does not have.
ABSENT = re.compile(
    r"\bspec §?\d|\bT-[A-Z]+\d|\btraps? \d|\bidea \d|\bthe issue\b"
    r"|\b(?:spec|contract|house|formats|viewer|training|data)\.md\b|/work/",
    re.IGNORECASE,
)


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of everything a reader may open, its white space evened out."""
    folders = ("jaxclt", "tests", "benchmarks", "experiments", "docs")
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            own = path == Path(__file__) or "node_modules" in path.parts
            if path.suffix in (".py", ".md", ".ts", ".toml", ".ipynb") and not own:
                yield str(path.relative_to(ROOT)), read(path)
    for name in ("README.md", "CONTRIBUTING.md"):
        yield name, read(ROOT / name)


def read(path: Path) -> str:
    # A comment's next line begins with another sign.
    return re.sub(r"\s+(?:# )?", " ", path.read_text("utf-8"))


def numbers() -> list[str]:
    """Sections and statements of docs/maths.md, in its order."""
    found = re.findall(
        r"^## (\d+)\. |\*\*\((\d+\.\d+)\)", MATHS.read_text("utf-8"), re.MULTILINE
    )
    return [section or statement for section, statement in found]


def cited(text: str) -> list[str]:
    return [n for m in CITED.finditer(text) for n in re.findall(NUMBER, m[1])]


def test_every_number_is_given_once_and_in_order():
    found = numbers()
    order = [tuple(map(int, n.split("."))) for n in found]
    assert order == sorted(set(order))
    assert len(found) > 150


def test_every_citation_resolves():
    known = set(numbers())
    found = {(name, n) for name, text in sources() for n in cited(text)}
    found |= {
        ("docs/maths.md", n)
        for m in IN_BRACKETS.finditer(read(MATHS))
        for n in m[1].split(", ")
    }
    assert sorted((name, n) for name, n in found if n not in known) == []
    assert len({name for name, _ in found}) > 40


def test_the_search_sees_every_spelling():
    text = "Maths 1.2, and 3.4 of it (maths 5, 6.7); maths 8.1 to 8.3, not 9.9."
    assert cited(text) == ["1.2", "3.4", "5", "6.7", "8.1", "8.3"]
    for wrong in ("(spec 3.3)", "[T-E1]", "see house.md", "Trap 4"):
        assert ABSENT.search(wrong)


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", MATHS.read_text("utf-8")))
    assert len(named) > 150
    there = set()
    for path in {path for path, _ in named if (ROOT / path).is_file()}:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        there |= {(path, n.name) for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert sorted(named - there) == []


def test_no_document_is_cited_that_is_not_here():
    found = [
        f"{name}: {text[max(0, m.start() - 30) : m.end() + 20]}"
        for name, text in sources()
        for m in ABSENT.finditer(text)
    ]
    assert found == []
