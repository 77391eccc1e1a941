"""Help pages: they fit 80 columns, each option stands under one heading, and their examples can be copied."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from helpers import shell_blocks
from iisan_fast.cli import cli
from iisan_fast.cli.help_pages import GROUPS

GROUP_HEADINGS = {f"{group}:" for group in GROUPS}


def contexts(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Yield the context of a command and of all commands below it."""
    name = "iisan-fast" if parent is None else command.name
    context = click.Context(command, parent, info_name=name, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from contexts(command.commands[name], context)


CONTEXTS = list(contexts(cli))
every_command = pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.command_path)


def page_of(context: click.Context) -> list[str]:
    formatter = click.HelpFormatter(width=78)  # as in a terminal of 80 columns
    context.command.format_help(context, formatter)
    return formatter.getvalue().splitlines()


def test_all_commands_are_read():
    paths = {context.command_path for context in CONTEXTS}
    assert {"iisan-fast", "iisan-fast train", "iisan-fast import csv", "iisan-fast bench kernels"} <= paths


@every_command
def test_no_line_is_longer_than_80_columns(context):
    assert [line for line in page_of(context) if len(line) > 80] == []


@every_command
def test_every_option_stands_under_one_heading(context):
    heading = None
    headings_of: dict[str, list[str | None]] = {}
    for line in page_of(context):
        if line and not line.startswith(" "):
            heading = line
        elif line.startswith("  -") and heading in GROUP_HEADINGS:
            headings_of.setdefault(line.split()[0].rstrip(","), []).append(heading)
    options = [option for option in context.command.get_params(context) if isinstance(option, click.Option)]
    assert headings_of.keys() == {option.get_help_record(context)[0].split()[0].rstrip(",") for option in options}
    assert all(len(headings) == 1 for headings in headings_of.values()), headings_of


@every_command
def test_every_option_has_a_help_text_that_is_a_sentence(context):
    options = [option for option in context.command.get_params(context) if isinstance(option, click.Option)]
    assert [option.opts[0] for option in options if not (option.help or "").split("  [")[0].endswith((".", ".)"))] == []


@every_command
def test_every_command_has_examples_that_parse(context):
    page = page_of(context)
    examples = page[page.index("Examples:") + 1 :]
    lines = shell_blocks.logical_lines("\n".join(line.removeprefix("  ") for line in examples))
    commands = [line for line in lines if line.startswith("iisan-fast")]
    assert commands and all(line.startswith(context.command_path) for line in commands)
    for line in commands:
        shell_blocks.check(line)


def test_the_list_of_commands_is_in_the_order_of_use():
    rows = commands_on(page_of(CONTEXTS[0]))
    names = [
        "import",
        "stats",
        "caption",
        "extract",
        "train",
        "evaluate",
        "recommend",
        "show",
        "export",
        "verify",
        "bench",
    ]
    names[7:7] = ["add-items", "update-items", "remove-items"]
    assert [row.split()[0] for row in rows] == names


def commands_on(page: list[str]) -> list[str]:
    """Return the lines of a page that list commands."""
    start = page.index("Commands:") + 1
    return page[start : page.index("", start)]


@pytest.mark.parametrize("path", ["iisan-fast", "iisan-fast import", "iisan-fast bench"])
def test_each_command_has_one_line_that_is_a_sentence(path):
    (context,) = [context for context in CONTEXTS if context.command_path == path]
    rows = commands_on(page_of(context))
    assert len(rows) == len(context.command.commands)
    assert [row for row in rows if not row.endswith(".") or row.endswith("..")] == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "kernels", "--help"]])
def test_help_imports_neither_torch_nor_numpy(arguments):
    program = f"""
import sys
from iisan_fast.cli import main
try:
    main({arguments!r})
finally:
    print(*sorted({{"torch", "numpy", "transformers", "polars"}} & sys.modules.keys()), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (0, ""), result.stderr
    assert "Usage: iisan-fast" in result.stdout
