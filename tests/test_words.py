"""Plain words: docstrings begin with a verb, names have content, and a line does one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import words

ROOT = Path(__file__).parents[1]
FOLDERS = ("iisan_fast", "kernels", "cli", "benchmarks", "tests")
MOST_RIDDLES = 0.02  # of all docstrings
MOST_NAMES_WITHOUT_CONTENT = 0.003  # of all names


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Return the syntax trees of all sources, by path."""
    if not (ROOT / "cli").is_dir():
        pytest.skip("needs a checkout: the rules are read from the sources")
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 300
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _lines(places: list[words.Place]) -> str:
    return "\n".join(map(str, places))


def _all(trees: dict[str, ast.Module], rule) -> list[words.Place]:
    def places() -> Iterator[words.Place]:
        for path, tree in trees.items():
            yield from rule(path, tree)

    return list(places())


def test_docstrings_begin_with_a_verb_or_a_statement(trees):
    docstrings = _all(trees, words.docstrings)
    riddles = words.riddles(docstrings)
    assert len(docstrings) > 2000
    assert len(riddles) < MOST_RIDDLES * len(docstrings), _lines(riddles)


def test_names_have_content(trees):
    names = _all(trees, words.names)
    empty = words.names_without_content(names)
    assert len(names) > 20_000
    assert len(empty) < MOST_NAMES_WITHOUT_CONTENT * len(names), _lines(empty)


@pytest.mark.parametrize(
    "rule", [words.crowded_assignments, words.crowded_comprehensions], ids=lambda rule: rule.__name__
)
def test_a_line_does_one_thing(trees, rule):
    crowded = _all(trees, rule)
    assert not crowded, _lines(crowded)


def test_a_function_that_raises_says_so(trees):
    silent = [
        place
        for path, tree in trees.items()
        if not path.startswith("tests/")
        for place in words.silent_raises(path, tree)
    ]
    assert not silent, _lines(silent)


def test_a_silent_raise_is_seen():
    silent = 'def read():\n    """Return it."""\n    raise ValueError(1)\n'
    assert [place.text for place in words.silent_raises("a.py", ast.parse(silent))] == ["read"]
    for text in ("Return it. Raises ValueError if it is bad.", "Refuse it."):
        assert not list(words.silent_raises("a.py", ast.parse(silent.replace("Return it.", text))))
    inner = 'def read():\n    """Return it."""\n    def work():\n        raise ValueError(1)\n'
    assert not list(words.silent_raises("a.py", ast.parse(inner)))


def test_no_source_speaks_of_a_document_outside_the_project():
    sources = [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    speaking = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sources
        if path != Path(words.__file__)
        for text in words.UNDOCUMENTED
        if text in path.read_text(encoding="utf-8")
    ]
    assert not speaking


@pytest.mark.parametrize("text", ["What is read.", "Whether it fits.", "The same as bytes.", "Of two towers."])
def test_a_riddle_is_seen(text):
    tree = ast.parse(f'def read():\n    """{text}"""\n')
    assert words.riddles(words.docstrings("a.py", tree)) == [words.Place("a.py", 1, text)]
    plain = ast.parse('def read():\n    """Return what is read."""\n')
    assert not words.riddles(words.docstrings("a.py", plain))


def test_a_name_without_content_is_seen():
    tree = ast.parse("def made(own):\n    for each in own:\n        found = each\n    with x as rows:\n        pass\n")
    seen = [place.text for place in words.names_without_content(words.names("a.py", tree))]
    assert sorted(seen) == ["each", "found", "made", "own"]


@pytest.mark.parametrize(
    ("line", "crowded"),
    [
        ("a, b = len(x), y / 2", True),
        ("a, b = x, y", True),
        ("self.a, self.b = 1, 2", True),
        ("a, b = [], {}", True),
        ("a, b = b, a", False),
        ("a, b = b, a + b", False),
        ("a, b = len(x), len(y)", False),
        ("rows, columns = 3, 4", False),
        ("a, b = x.shape", False),
        ("a, *b = 1, *c", False),
    ],
)
def test_a_crowded_assignment_is_seen(line, crowded):
    assert bool(list(words.crowded_assignments("a.py", ast.parse(line)))) == crowded


@pytest.mark.parametrize(
    ("line", "crowded"),
    [
        ("[a for a in b]", False),
        ("[{a for a in b} for b in c]", False),
        ("[a for d in e for c in d for a in c]", True),
        ("[[{a for a in b} for b in c] for c in d]", True),
    ],
)
def test_a_crowded_comprehension_is_seen(line, crowded):
    assert bool(list(words.crowded_comprehensions("a.py", ast.parse(line)))) == crowded
