"""The house: rooms on floors, doors, names. Every rule holds for the sources, and fails on a made-up violation."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import iisan_fast
from helpers import house

ROOT = Path(__file__).parents[1]
FOLDERS = ("iisan_fast", "kernels", "cli", "benchmarks")
LAZY_DOORS = ("ranks", "data", "encoders", "states", "captioning", "evaluation", "models", "training")
DOOR = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .{module} import {name}\n__all__ = ['{name}']\n"
STATES = {
    "iisan_fast/states/__init__.py": DOOR.format(module="store", name="Store") + "__getattr__ = lazy_names(1, 2)\n",
    "iisan_fast/states/store.py": "class Store: ...\n",
}
EMPTY = ""


@pytest.fixture(scope="module")
def tree() -> house.Tree:
    if not (ROOT / "cli").is_dir():
        pytest.skip("needs a checkout: the rules are read from the sources")
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return house.Tree({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds(tree, rule):
    assert rule(tree) == []


def test_the_rules_read_the_whole_house(tree):
    rooms = {house.room_of(module) for module in tree.paths}
    assert {*LAZY_DOORS, "kernels", "cli", "benchmarks", "demo", *house.NEIGHBOURS} <= rooms
    assert len(tree.paths) > 100 and len(tree.imports) > 500


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"iisan_fast/states/store.py": "from ..models import Recommender\n"},
            "store.py:1: states imports models, which is not below it",
            id="an arrow up",
        ),
        pytest.param(
            {"iisan_fast/data/items.py": "def read():\n    from ..states import Store\n"},
            "items.py:2: data imports states, which is not below it",
            id="an arrow up inside a function",
        ),
        pytest.param(
            {"iisan_fast/encoders/base.py": "if TYPE_CHECKING:\n    from ..states import Store\n"},
            "base.py:2: encoders imports states, which is not below it",
            id="an arrow up for types alone",
        ),
        pytest.param(
            {"iisan_fast/captioning/captions.py": "from ..states import Store\n"},
            "captions.py:1: captioning imports states, which is not below it",
            id="rooms on one floor",
        ),
        pytest.param(
            {"iisan_fast/demo.py": EMPTY, "iisan_fast/config/__init__.py": "from .. import demo\n"},
            "config/__init__.py:1: config imports demo, which is not below it",
            id="a neighbour of config that imports upward",
        ),
        pytest.param(
            {"iisan_fast/__init__.py": "train = 1\n", "iisan_fast/data/items.py": "from .. import train\n"},
            "items.py:1: data imports api, which is not below it",
            id="the public API from a room",
        ),
        pytest.param(
            {"benchmarks/ops.py": "from ..cli import main\n"},
            "ops.py:1: benchmarks imports cli, which is not below it",
            id="the command line from a benchmark",
        ),
        pytest.param(
            {"kernels/gpu/launch.py": "from ...errors import InputError\n"},
            "launch.py:1: kernels import no room, found errors",
            id="a room from the kernels",
        ),
        pytest.param(
            {"iisan_fast/helpers/__init__.py": EMPTY, "iisan_fast/data/items.py": "from .. import helpers\n"},
            "items.py:1: helpers has no floor; give it one",
            id="a room without a floor",
        ),
    ],
)
def test_arrows_that_run_up_are_found(files, expected):
    _assert_found(house.arrows_up, files, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from ..states.store import Store\n", "reaches past the door of states: iisan_fast.states.store"),
        ("import iisan_fast.states.store\n", "reaches past the door of states: iisan_fast.states.store"),
        ("from ..states import store\n", "reaches past the door of states: iisan_fast.states.store"),
        ("from ..states import Cache\n", "the door of states does not export Cache"),
        (
            "from .. import states\n\nstates.store.Store()\n",
            "recommender.py:3: the door of states does not export store",
        ),
        ("def load():\n    from ..states.store import Store\n", "recommender.py:2: reaches past the door of states"),
        ("find('iisan_fast.states.store')\n", "reaches past a door in a string: iisan_fast.states.store"),
    ],
)
def test_what_reaches_past_a_door_is_found(text, expected):
    _assert_found(house.reaches_past_doors, {**STATES, "iisan_fast/models/recommender.py": text}, expected)


def test_the_kernels_door_is_a_door():
    files = {"kernels/__init__.py": "if __name__ == 'iisan_fast.kernels':\n    __all__ = ['fold_heads']\n"}
    files["kernels/gpu/launch.py"] = "SIZES = ()\n"
    files["benchmarks/tuning.py"] = "from ..kernels.gpu import launch\n"
    _assert_found(house.reaches_past_doors, files, "reaches past the door of kernels: iisan_fast.kernels.gpu.launch")


def test_an_export_that_nothing_uses_is_found():
    user = {"iisan_fast/models/recommender.py": "from ..states import Store\n"}
    whole = {"iisan_fast/models/recommender.py": "from .. import states\n\nstates.Store()\n"}
    for used in (user, whole):
        assert house.exports_without_use(house.Tree({**STATES, **used})) == []
    inside = {"iisan_fast/states/loader.py": "from ..states import Store\n"}
    _assert_found(house.exports_without_use, {**STATES, **inside}, "nothing outside states uses Store")


def test_a_module_named_like_an_export_is_found():
    files = {
        "iisan_fast/evaluation/__init__.py": DOOR.format(module="metrics", name="metrics"),
        "iisan_fast/evaluation/metrics.py": "def metrics(): ...\n",
    }
    _assert_found(
        house.modules_named_like_exports, files, "metrics.py:1: bears the name of an export of iisan_fast.evaluation"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("['Store']", "['Store', 'extract']", "extract is imported or exported, but not both"),
        ("['Store']", "['Other']", "Store is imported or exported, but not both"),
        ("['Store']", "['Store', 'Store']", "__all__ names something twice"),
        ("from .store", "from .shelf", "iisan_fast.states.shelf defines no Store"),
    ],
)
def test_a_door_that_disagrees_with_itself_is_found(old, new, expected):
    files = {**STATES, "iisan_fast/states/__init__.py": STATES["iisan_fast/states/__init__.py"].replace(old, new)}
    _assert_found(house.doors_that_disagree, files, expected)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("iisan_fast/models/sasrec.py", "import transformers\n", "transformers is not for models"),
        ("iisan_fast/demo.py", "from transformers.models import bert\n", "transformers is not for demo"),
        ("iisan_fast/training/trainer.py", "def f():\n    import lmdb\n", "lmdb is not for training"),
        ("benchmarks/train.py", "import click\n", "click is not for benchmarks"),
        (
            "kernels/cpu/adam.py",
            "import rich\n",
            "kernels import torch, triton, numpy and platformdirs alone, found rich",
        ),
    ],
)
def test_libraries_out_of_place_are_found(path, text, expected):
    _assert_found(house.libraries_out_of_place, {path: text}, expected)


def test_names_that_repeat_are_found():
    batch = "class Batch: ...\nclass _Job: ...\n"
    files = {"iisan_fast/data/batches.py": batch, "iisan_fast/states/inputs.py": batch}
    _assert_found(house.repeated_names, files, "class Batch stands also in iisan_fast/states/inputs.py:1")
    files = {"iisan_fast/training/memory.py": EMPTY, "kernels/cpu/memory.py": EMPTY}
    _assert_found(house.repeated_names, files, "file memory stands also in kernels/cpu/memory.py")
    forms = {f"kernels/{form}/target_rank.py": EMPTY for form in ("reference", "gpu", "cpu")}
    assert house.repeated_names(house.Tree({**forms, "cli/train.py": EMPTY, "benchmarks/train.py": EMPTY})) == []


def test_circles_are_found():
    files = {
        **STATES,
        "iisan_fast/states/store.py": "from .loader import load\nclass Store: ...\n",
        "iisan_fast/states/loader.py": "def load():\n    from ..states import Store\n",
    }
    _assert_found(house.cycles, files, "iisan_fast.states.store -> iisan_fast.states.loader -> iisan_fast.states.store")


@pytest.mark.parametrize("room", [*LAZY_DOORS, "kernels"])
def test_every_export_is_there(room):
    door = importlib.import_module(f"iisan_fast.{room}")
    for name in door.__all__:
        if name.startswith("import_") and importlib.util.find_spec("polars") is None:
            continue  # imports from other layouts need it, and not every installation has it
        assert getattr(door, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        door.nothing_of_that_name  # noqa: B018


def test_a_door_imports_a_name_on_first_use():
    program = f"""
import importlib, sys
for room in {LAZY_DOORS!r}:
    importlib.import_module("iisan_fast." + room)
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("iisan_fast", "torch", "numpy", "lmdb")))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(iisan_fast.__file__).parents[1],
    )
    rooms = {f"iisan_fast.{room}" for room in LAZY_DOORS}
    assert {*run.stdout.split()} == {"iisan_fast", "iisan_fast.doors", *rooms}


def _assert_found(rule, files: dict[str, str], expected: str) -> None:
    lines = rule(house.Tree(files))
    assert any(expected in line for line in lines), lines
