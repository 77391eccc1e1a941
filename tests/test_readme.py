"""The examples of the README run as they stand, on a small dataset and small encoders under the names used there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_line import iisan_fast

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def as_in_the_readme(catalogue, encoder_views, tmp_path, monkeypatch) -> None:
    """A working folder with DATASET and the encoders, found as local folders."""
    image, title = encoder_views
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image.encoder, "google/vit-base-patch16-224")
    shutil.copytree(title.encoder, "bert-base-uncased")
    catalogue.rename("DATASET")


@pytest.mark.slow
def test_the_python_example(as_in_the_readme, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    best = names["best"]
    assert best.item_vectors.shape == (len(best.item_ids), 64) and best.user_states().shape[1] == 64
    assert "'hr@5'" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.long
def test_the_python_example_as_a_script_with_worker_processes(as_in_the_readme):
    """The workers do not begin the script again."""
    (example,) = re.findall(r"^```python\n(.*?^iisan_fast\.extract.*?)\n", README, flags=re.MULTILINE | re.DOTALL)
    Path("script.py").write_text(example.replace('"STATES",', '"STATES", workers=1,') + "\nprint('once')\n")
    result = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "once\n", result.stdout + result.stderr


@pytest.mark.slow
def test_the_first_commands(as_in_the_readme):
    (block,) = re.findall(r"^```\n(iisan-fast stats .*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    commands = [line.split() for line in block.splitlines()]
    assert [command[1] for command in commands] == ["stats", "extract", "train", "evaluate"]
    for program, *arguments in commands:
        limit = ["--epochs", 1] if arguments[0] == "train" else []
        result = iisan_fast(*arguments, *limit)
        assert program == "iisan-fast" and result.returncode == 0, result.stderr
