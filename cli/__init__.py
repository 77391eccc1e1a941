"""The command line: thin click commands over the library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import click

from .. import __version__, runtime
from ..errors import InputError
from ..launcher import is_silent_rank, job_place
from .bench import bench
from .caption import caption
from .catalogue_changes import add_items, remove_items, update_items
from .evaluate import evaluate
from .export import export
from .extract import extract
from .failures import exit_code
from .help_pages import group
from .import_ import import_
from .output import print_text
from .rank_program import refuse_several_ranks, run_as_rank
from .recommend import recommend
from .show import show
from .stats import stats
from .stopping import leaving_on_signals
from .streams import discard_output, prepare_streams
from .train import train
from .verbosity import show_normal, verbosity_options
from .verify import verify

EXAMPLES = (
    "iisan-fast train                           # the embedded demo, in a minute",
    "iisan-fast import csv ratings.csv DATASET  # your own data, step by step",
    "iisan-fast stats DATASET",
    "iisan-fast extract DATASET --cache STATES --text-encoder bert-base-uncased",
    "iisan-fast train DATASET --cache STATES --out runs/first",
    "iisan-fast evaluate runs/first --k 5,10,20",
    "iisan-fast recommend runs/first --history i3,i7,i12",
    "iisan-fast show runs/first",
    "iisan-fast verify STATES",
)
COMPLETION = """\b
Completion of commands, options, choices and files, in bash or zsh:
  eval "$(_IISAN_FAST_COMPLETE=bash_source iisan-fast)"
  eval "$(_IISAN_FAST_COMPLETE=zsh_source iisan-fast)"
"""


@group(examples=EXAMPLES, epilog=COMPLETION)
@click.version_option(__version__, prog_name="iisan-fast", message="%(prog)s %(version)s")
@verbosity_options
@click.pass_context
def cli(context: click.Context) -> None:
    """Train IISAN: a small side network on frozen text and image encoders, for sequential recommendation.

    iisan-fast COMMAND --help shows the options of a command, with examples.
    """
    refuse_several_ranks(context)


COMMANDS = (
    import_,
    stats,
    caption,
    extract,
    train,
    evaluate,
    recommend,
    add_items,
    update_items,
    remove_items,
    show,
    export,
    verify,
    bench,
)
for command in COMMANDS:
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the program `iisan-fast` and raise SystemExit.

    arguments: the words of the command line after the program's name; by default the process's own.
    The exit code is 0, or 2 after one line on standard error for bad input or trouble of the machine, or 128 + n if the
    signal n stopped it, or 1 for an error of the program itself, whose traceback is in the file that the line names.
    """
    prepare_streams()
    runtime.prepare_program()
    show_normal()
    command = partial(_run, arguments)
    try:
        place = job_place()
    except InputError as error:
        sys.exit(2 if is_silent_rank() else exit_code(error))
    code = _run_alone(command) if place is None else run_as_rank(place, command)
    _end_output()
    sys.exit(code)


def _run_alone(command: Callable[[], int]) -> int:
    """Run a command in the only process, print the line for what ends it, and return its exit code."""
    try:
        with leaving_on_signals():
            code = command()
        sys.stdout.flush()
    except BaseException as error:
        return exit_code(error)
    return code


def _run(arguments: list[str] | None) -> int:
    """Run a command, and return its exit code. Without arguments it prints the help page."""
    try:
        return cli.main(arguments, standalone_mode=False, prog_name="iisan-fast") or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print_text(error.ctx.get_help())
        return 0


def _end_output() -> None:
    """Write what standard output still holds; drop it if that fails, which has been reported by now."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
