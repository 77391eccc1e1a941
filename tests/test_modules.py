"""Every module of the package can be imported with the versions that are installed, and by the newest Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"iisan_fast": "iisan_fast"} | {name: f"iisan_fast.{name}" for name in ("kernels", "cli", "benchmarks")}
OPTIONAL = ("accelerate", "cut_cross_entropy", "liger_kernel", "matplotlib", "peft", "polars", "xformers")
IMPORT_ALL = """
import importlib, importlib.util, sys
names, missing = sys.argv[1].split(","), sys.argv[2].split(",")
sys.modules.update(dict.fromkeys(missing))
polars = importlib.util.find_spec("polars") is not None
for name in names:
    if not polars and name.startswith(("iisan_fast.data.imports", "iisan_fast.states.parquet_features")):
        continue
    module = importlib.import_module(name)
    for exported in getattr(module, "__all__", ()):
        if polars or not exported.startswith("import_"):  # these need polars, and say so
            getattr(module, exported)
"""
COMPILE_ALL = """
import sys, warnings
warnings.simplefilter("error")
for path in sys.argv[1:]:
    compile(open(path, "rb").read(), path, "exec")
"""


def module_names() -> list[str]:
    """Return the names of all modules but those that are programs."""
    names = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join([package, *parts]).removesuffix(".__init__"))
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.slow
@pytest.mark.parametrize("missing", [pytest.param("nothing", marks=pytest.mark.long), ",".join(OPTIONAL)])
def test_every_module_and_all_that_doors_export_can_be_imported(missing):
    """Import with and without the packages of the extras: a GPU machine may lack polars and xformers."""
    names = module_names()
    assert {"iisan_fast", "iisan_fast.encoders.attention", "iisan_fast.kernels.gpu.launch", "iisan_fast.cli"} <= {
        *names
    }
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(names), missing]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_source_makes_python_warn():
    """Compile all sources: newer versions of Python warn of more, 3.12 of unknown escapes."""
    folders = (*FOLDERS, "tests")
    sources = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    result = subprocess.run([sys.executable, "-c", COMPILE_ALL, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
