"""Rules of plain words that a linter does not know: openings of docstrings, names without content, crowded lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

RIDDLE = re.compile(r"(What|Whether|Those|Where|How|Which|Whose|The same|That which|As|Of)\b")
NAMES_WITHOUT_CONTENT = frozenset(("own", "found", "told", "each", "kept", "made", "some", "given"))
UNDOCUMENTED = ("DESIGN", "STYLE.md", "the issue")  # texts that are not in the project
SPEAKS_OF_ERRORS = re.compile(r"\b[Rr](aise|efuse)|Error\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Place:
    """A line of a source file, and what stands there."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def docstrings(path: str, tree: ast.Module) -> Iterator[Place]:
    """Yield the first line of every docstring of a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield Place(path, getattr(node, "lineno", 1), text.splitlines()[0])


def names(path: str, tree: ast.Module) -> Iterator[Place]:
    """Yield every name that a file gives: functions, classes, arguments and variables, once for each place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield Place(path, node.lineno, node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield Place(path, node.lineno, node.id)
        elif isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            yield Place(path, node.lineno, node.name)


def riddles(places: Iterable[Place]) -> list[Place]:
    """Return the docstrings that do not begin with a verb or a plain statement."""
    return [place for place in places if RIDDLE.match(place.text)]


def names_without_content(places: Iterable[Place]) -> list[Place]:
    """Return the names that do not say what a thing is."""
    return [place for place in places if place.text in NAMES_WITHOUT_CONTENT]


def crowded_assignments(path: str, tree: ast.Module) -> Iterator[Place]:
    """Yield the lines that assign unlike things at once: `users, path = len(rows), folder / "x"`.

    Values of one form are a pair and may stand together, as `rows, items = len(a), len(b)` or `first, last = 1, 9`;
    so may values that read the names on the left, as `a, b = b, a`.
    """
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)):
            continue
        if isinstance(node.value, ast.Tuple) and not _may_stand_together(node.targets[0].elts, node.value.elts):
            yield Place(path, node.lineno, ast.unparse(node))


def crowded_comprehensions(path: str, tree: ast.Module) -> Iterator[Place]:
    """Yield the comprehensions that hold two others, or that loop three times."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [part for part in ast.walk(node) if isinstance(part, COMPREHENSIONS) and part is not node]
            if len(inner) > 1 or len(node.generators) > 2:
                yield Place(path, node.lineno, ast.unparse(node))


def silent_raises(path: str, tree: ast.Module) -> Iterator[Place]:
    """Yield the documented functions that raise an error themselves, and whose docstring speaks of none."""
    for node in ast.walk(tree):
        if not (isinstance(node, FUNCTIONS) and (text := ast.get_docstring(node))):
            continue
        raises = any(isinstance(part, ast.Raise) and part.exc is not None for part in _direct_nodes(node))
        if raises and not SPEAKS_OF_ERRORS.search(text):
            yield Place(path, node.lineno, node.name)


def _direct_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from _direct_nodes(child)


def _may_stand_together(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    if len(targets) != len(values) or any(isinstance(value, ast.Starred) for value in values):
        return True
    if _read_names(values) & {ast.unparse(target) for target in targets}:
        return True
    if any(isinstance(target, ast.Attribute) for target in targets):
        return False
    if any(isinstance(value, (ast.Name, ast.Attribute)) for value in values):
        return False
    return all(_form(left) == _form(right) for left, right in pairwise(values))


def _read_names(values: Iterable[ast.expr]) -> set[str]:
    """Return the names, attributes and elements that expressions read, as their source writes them."""
    readers = (ast.Name, ast.Attribute, ast.Subscript)
    return {ast.unparse(node) for value in values for node in ast.walk(value) if isinstance(node, readers)}


def _form(node: ast.expr) -> str:
    """Return the kind of an expression: its outermost node, and the name of the function that a call calls."""
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        return f"call {name}"
    if isinstance(node, ast.Constant):
        return f"constant {type(node.value).__name__}"
    return type(node).__name__
