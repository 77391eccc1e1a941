"""A new setting is one field: a line in its section gives it an option, help, --set, Python and config.json."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FIELD = '    warmth: float = setting(0.5, help="Warmth of the towers.", minimum=0, maximum=2)\n'
BEFORE = "    dropout: float = setting("
# Loads the section with the field, as if it stood there, before any other module reads it.
PROGRAM = f"""
import importlib.util, json, sys
from pathlib import Path
import iisan_fast

specification = importlib.util.find_spec("iisan_fast.config.model_section")
source = Path(specification.origin).read_text(encoding="utf-8")
assert source.count({BEFORE!r}) == 1
module = importlib.util.module_from_spec(specification)
sys.modules[module.__name__] = module
source = source.replace({BEFORE!r}, {FIELD!r} + {BEFORE!r})
exec(compile(source, specification.origin, "exec"), module.__dict__)
iisan_fast.config.model_section = module

from iisan_fast import api
from iisan_fast.cli import main

def command(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0

dataset, cache = sys.argv[1:]
base = ["train", dataset, "--cache", cache, "--epochs", "1", "--device", "cpu", "--quiet"]
def train(name, **settings):
    api.train(dataset, cache=cache, epochs=1, device="cpu", out=name, **settings)

print("HELP")
command("train", "--help")
print("END")
Path("warm.yaml").write_text("model: {{warmth: 1.5}}")
command(*base, "--out", "option", "--warmth", "1.5")
command(*base, "--out", "set", "--set", "model.warmth=1.5")
command(*base, "--out", "file", "--config", "warm.yaml")
train("flat", warmth=1.5)
train("changes", changes={{"model.warmth": 1.5}})
train("section", model=module.ModelConfig(warmth=1.5))
train("default")
print("CODE", command(*base, "--out", "none", "--warmth", "3"))
try:
    train("none", warmht=1)
except api.InputError as error:
    print("ERROR", error)
"""
FORMS = ("option", "set", "file", "flat", "changes", "section")


@pytest.mark.slow
def test_a_field_is_all_that_a_new_setting_needs(toy_run, tmp_path):
    dataset, cache = toy_run
    command = [sys.executable, "-c", PROGRAM, str(dataset), str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in (*FORMS, "default")}
    assert {saved[name]["model"]["warmth"] for name in FORMS} == {1.5} and saved["default"]["model"]["warmth"] == 0.5
    help_page = " ".join(result.stdout.partition("END")[0].split())
    assert "--warmth" in help_page and "Warmth of the towers." in help_page and "[default: 0.5]" in help_page
    assert "CODE 2" in result.stdout and "warmth: expected 0 to 2, found 3" in result.stderr
    assert "ERROR train: unknown setting warmht; did you mean warmth" in result.stdout
    assert not (tmp_path / "none").exists()
