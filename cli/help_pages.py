"""Commands whose help sorts the options into groups and ends with examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

DATA, ENCODERS, MODEL, TRAINING, EVALUATION = "Data", "Encoders", "Model", "Training", "Evaluation"
SCORING, SETTINGS, BENCHMARK, OUTPUT = "Neighbour terms", "Settings", "Benchmark", "Device and output"
RECOMMENDATION = "Recommendation"
COLUMNS, ROWS = "Columns and form of text", "Rows"
# In the order of a help page.
GROUPS = (
    DATA,
    COLUMNS,
    ROWS,
    ENCODERS,
    MODEL,
    TRAINING,
    EVALUATION,
    SCORING,
    RECOMMENDATION,
    BENCHMARK,
    SETTINGS,
    OUTPUT,
)
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


class GroupedOption(click.Option):
    """An option that stands under the heading `group` of its command's help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        """Take the heading, and the arguments of click.Option."""
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedHelp(click.Command):
    """A command whose help has a heading for each group of options, and examples at the end."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """Take the command lines that the help ends with, and the arguments of click.Command."""
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)  # each a command line as a shell takes it, of one or more lines

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a group's commands, then the options by heading; --help and --version stand under the last one."""
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)
        for group in GROUPS:
            options = [option for option in self.get_params(ctx) if _group_of(option) == group]
            records = [option.get_help_record(ctx) for option in options]
            rows = [record for record in records if record is not None]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, then the epilog."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    for line in example.splitlines():
                        formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


class OrderedGroup(GroupedHelp, click.Group):
    """A group whose help lists its commands in the order in which they were added."""

    command_class = GroupedHelp

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order of use."""
        return list(self.commands)


def option(*names: str, group: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the decorator of an option under the heading `group`; otherwise as click.option."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


command = partial(click.command, cls=GroupedHelp)
group = partial(click.group, cls=OrderedGroup, context_settings=CONTEXT)


def _group_of(parameter: click.Parameter) -> str | None:
    """Return the heading that an option stands under; None for an argument."""
    return getattr(parameter, "group", OUTPUT) if isinstance(parameter, click.Option) else None
