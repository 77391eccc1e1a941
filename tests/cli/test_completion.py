"""Shell completion, by the protocol that bash and zsh use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHANGES = {"add-items", "update-items", "remove-items"}
PROGRAM = Path(sys.executable).with_name("iisan-fast")


def ask(instruction: str, cwd: Path | None = None, **variables: str) -> list[str]:
    """Return the lines of the program's answer to a shell."""
    environment = os.environ | variables | {"_IISAN_FAST_COMPLETE": instruction}
    result = subprocess.run([PROGRAM], env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.splitlines()


def complete(words: str) -> set[str]:
    """Return bash's completions of the last word; an empty word ends with a space."""
    lines = ask("bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    return {line.partition(",")[2] for line in lines}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "iisan-fast ",
            CHANGES
            | {
                "import",
                "stats",
                "caption",
                "extract",
                "verify",
                "train",
                "evaluate",
                "recommend",
                "show",
                "export",
                "bench",
            },
        ),
        (
            "iisan-fast import ",
            {"csv", "jsonl", "parquet", "movielens", "amazon", "recbole", "microlens", "mmrec", "iisan"},
        ),
        ("iisan-fast train --meth", {"--method"}),
        ("iisan-fast train --method iisan", {"iisan", "iisan-versa"}),
        ("iisan-fast train DATASET --table p", {"pinned"}),
        ("iisan-fast --quiet ev", {"evaluate"}),
    ],
)
def test_bash_completes_commands_options_and_choices(words, expected):
    assert complete(words) == expected


@pytest.mark.parametrize(
    ("words", "kind"), [("extract ", "dir"), ("train --cache ", "dir"), ("train --config ", "file")]
)
def test_bash_is_told_where_a_folder_or_a_file_stands(words, kind):
    (line,) = ask("bash_complete", COMP_WORDS=f"iisan-fast {words}", COMP_CWORD=str(len(words.split(" "))))
    assert line.split(",")[0] == kind


def test_zsh_completes_with_the_commands_descriptions():
    lines = ask("zsh_complete", COMP_WORDS="iisan-fast st", COMP_CWORD="1")
    assert lines == ["plain", "stats", "Count the users, items and interactions of a dataset."]


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o nosort -F"), ("zsh", "compdef")])
def test_the_shell_gets_a_script_that_asks_the_program(shell, word):
    script = "\n".join(ask(f"{shell}_source"))
    assert word in script and f"_IISAN_FAST_COMPLETE={shell}_complete" in script


def test_completion_imports_no_heavy_library():
    program = """
import sys
from iisan_fast.cli import main
try:
    main([])
finally:
    print(*sorted({"torch", "numpy", "transformers", "polars"} & sys.modules.keys()), file=sys.stderr)
"""
    variables = {"_IISAN_FAST_COMPLETE": "bash_complete", "COMP_WORDS": "iisan-fast train --met", "COMP_CWORD": "2"}
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (0, "plain,--method\n", "")
