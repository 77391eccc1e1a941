"""The tests' own tree: what is shared lies in helpers, and no test file is a module that others import."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path != Path(__file__))
IMPORT = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)  # also in programs that are strings


def imported_modules(source: str) -> set[str]:
    """Return the parts of the dotted names that a file imports."""
    return {part for name in IMPORT.findall(source) for part in name.split(".")}


@pytest.mark.parametrize("source", ["import test_cli as t", 'RUN = """\nfrom tests.conftest import x\n"""'])
def test_an_import_of_a_test_file_is_seen(source):
    assert any(name == "conftest" or name.startswith("test_") for name in imported_modules(source))


def test_no_test_imports_from_conftest_or_from_another_test():
    wrong = {}
    for path in FILES:
        names = imported_modules(path.read_text())
        test_files = sorted(name for name in names if name == "conftest" or name.startswith("test_"))
        if test_files:
            wrong[str(path.relative_to(TESTS))] = test_files
    assert not wrong, "what tests share belongs in tests/helpers"


def test_each_folder_of_tests_is_named_after_a_room():
    rooms = {path.parent.name for path in (ROOT / "iisan_fast").glob("*/__init__.py")} | {"cli", "ops", "benchmarks"}
    assert {path.parent.name for path in TESTS.glob("*/test_*.py")} <= rooms


def test_helpers_are_found_through_one_folder(pytestconfig):
    folders = [folder for folder in pytestconfig.getini("pythonpath") if folder.is_relative_to(TESTS)]
    assert folders == [TESTS]


def test_an_unknown_marker_is_an_error(pytestconfig):
    assert "--strict-markers" in pytestconfig.getini("addopts")
