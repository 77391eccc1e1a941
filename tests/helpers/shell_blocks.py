"""Shell blocks of documents: split into commands, checked against what they name, and run in small."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import click
import pytest

from iisan_fast.cli import cli
from iisan_fast.config import NEIGHBOURS

from .command_line import iisan_fast
from .documents import ROOT

PROGRAM = "iisan-fast"
SMALL = {  # command: options, each with a value, that a document's command has where it runs in a test
    ("train",): ["--epochs", "1"],
    ("bench", "methods"): ["--epochs", "1", "--seeds", "0", "--methods", "full,iisan"],
    ("bench", "encoders"): ["--epochs", "1", "--seeds", "0"],
}
LAUNCHERS = frozenset(("torchrun", "srun"))  # of them the program that they start is checked
PYTHONS = frozenset(("python", "python3"))
RUNNABLE = frozenset((PROGRAM, "python", "mkdir", "ls", "head", "cat", "cp", "printf", "eval", "grep", "wc"))
KNOWN = RUNNABLE | {"git", "curl", "tar", "unzip", "cd", "export", "rm", "sbatch", "scp", "ssh", "brew", "apt-get"}
KNOWN |= {"nvidia-smi", "source", "benchmarks/on_gpu.sh"}
OTHER_MODULES = frozenset(("pip", "venv", "build", "twine", "pytest"))
ASSIGNMENT = re.compile(r"\w+=")
OPERATORS = re.compile(r"[|&;<>()]+")


def logical_lines(text: str) -> list[str]:
    """Return a block's commands, continued lines joined, comments and empty lines left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def words_of(line: str) -> list[str]:
    """Return the words and operators of a line, as a shell splits them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += "=~+*?[]{}@%:,!"
    lexer.commenters = "#"
    return list(lexer)


def commands_of(line: str) -> Iterator[list[str]]:
    """Yield each command of a line: its words without variables before it and without redirections."""
    command: list[str] = []
    skip_next = False
    for word in [*words_of(line), ";"]:
        is_operator = OPERATORS.fullmatch(word) is not None
        if skip_next:
            skip_next = False
        elif is_operator and word[0] in "<>":
            skip_next = True
        elif is_operator:
            if command:
                yield command
            command = []
        elif command or not ASSIGNMENT.match(word):
            command.append(word)


def check(line: str) -> None:
    """Raise ValueError, InputError or a click exception if a line names an option or a file that is not there."""
    for command in commands_of(line):
        name, *arguments = command
        if name in LAUNCHERS:
            _check_launched(arguments)
        elif name == PROGRAM:
            check_program(arguments)
        elif name == "make":
            _check_make(arguments)
        elif name in PYTHONS or name.endswith("bin/python"):
            _check_python(arguments)
        elif name == "pip":
            _check_pip(arguments)
        elif name not in KNOWN:
            raise ValueError(f"{name}: no command that documents may hold")


def check_program(arguments: list[str]) -> None:
    """Parse a command of iisan-fast and run nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Command, "invoke", lambda command, context: None)
        cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)


def _check_launched(arguments: list[str]) -> None:
    """Check the program that torchrun or srun starts."""
    for place, word in enumerate(arguments):
        if word == PROGRAM:
            return check_program(arguments[place + 1 :])
        if word in ("-m", "--module"):
            return _check_python(["-m", *arguments[place + 1 :]])
    raise ValueError(f"no program in: {' '.join(arguments)}")


def _check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([\w.-]+)(?=:)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wanted = {word for word in arguments if "=" not in word}
    if not wanted or wanted - targets:
        raise ValueError(f"make {' '.join(arguments)}: the Makefile has {', '.join(sorted(targets))}")


def _check_python(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-m" and rest[0] == "iisan_fast":
        check_program(rest[1:])
    elif first == "-m" and rest[0] == "pip":
        _check_pip(rest[1:])
    elif first == "-m":
        if rest[0] not in OTHER_MODULES and importlib.util.find_spec(rest[0]) is None:
            raise ValueError(f"no module {rest[0]}")
    elif first == "-c":
        compile(rest[0], "a document", "exec")
    elif not (ROOT / first).is_file():
        raise ValueError(f"no file {first}")


def _check_pip(arguments: list[str]) -> None:
    """Check that the extras in `pip install '.[a,b]'` exist."""
    extras = set(metadata("iisan-fast").get_all("Provides-Extra") or ())
    for word in arguments:
        match = re.search(r"(?:^\.|iisan-fast.*)\[([\w,-]+)\]$", word)
        unknown = set(match[1].split(",")) - extras if match else set()
        if unknown:
            raise ValueError(f"{word}: no extra {', '.join(sorted(unknown))}")


def all_options() -> set[str]:
    """Return every option of every command of iisan-fast."""
    commands: list[click.Command] = [cli]
    options = {"--help", "--version"}
    for command in commands:  # which grows
        options.update(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
        if isinstance(command, click.Group):
            commands += command.commands.values()
    return options


def command_path(arguments: list[str]) -> tuple[str, ...]:
    """Return the names of the command and subcommand that the arguments call, such as ("import", "csv")."""
    command: click.Command = cli
    path: list[str] = []
    for word in arguments:
        if not isinstance(command, click.Group):
            break
        if word in command.commands:
            command = command.commands[word]
            path.append(word)
    return tuple(path)


def run(line: str) -> str:
    """Run a line in the working folder and return its standard output. Fail the test if it fails.

    A line of iisan-fast alone, perhaps with variables before it and `> FILE` after it, runs in this process.
    """
    words = words_of(line)
    start = next(place for place, word in enumerate(words) if not ASSIGNMENT.match(word))
    redirected = words[-1] if words[-2:-1] == [">"] else None
    command = words[start : -2 if redirected else None]
    if command[0] != PROGRAM or any(OPERATORS.fullmatch(word) for word in command):
        return _run_by_shell(line)
    arguments = command[1:]
    has_epochs = not {"--resume", NEIGHBOURS} & set(arguments)
    limits = SMALL.get(command_path(arguments), []) if has_epochs else []
    with pytest.MonkeyPatch.context() as patch:
        for assignment in words[:start]:
            patch.setenv(*assignment.split("=", 1))
        result = iisan_fast(*_without(arguments, limits[::2]), *limits)
    assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    if redirected:
        Path(redirected).write_text(result.stdout)
    return result.stdout


def _without(arguments: list[str], options: list[str]) -> list[str]:
    """Return a command's arguments without some options and their values."""
    remaining = list(arguments)
    for option in options:
        if option in remaining:
            place = remaining.index(option)
            del remaining[place : place + 2]
    return remaining


def _run_by_shell(line: str) -> str:
    foreign = {command[0] for command in commands_of(line)} - RUNNABLE
    assert not foreign, f"{', '.join(foreign)} cannot run in a test; mark the block"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    result = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    return result.stdout
