"""Lazy packages: a name that a package exports is imported when it is first used."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, file: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose `__init__` imports its names under `if TYPE_CHECKING:`.

    package, file: the package's `__name__` and `__file__`. The imports are read from the file's source, so that a type
    checker and this function use the same list. The returned function raises AttributeError for a name outside it.
    """
    homes = _homes(file)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return get


def _homes(file: str) -> dict[str, str]:
    """Return {name: its module} of the imports under `if TYPE_CHECKING:`.

    Raises AssertionError if anything but `from … import` stands there.
    """
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    homes = {}
    for block in tree.body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for statement in block.body:
                assert isinstance(statement, ast.ImportFrom) and statement.module, ast.unparse(statement)
                homes.update({alias.name: statement.module for alias in statement.names})
    return homes
