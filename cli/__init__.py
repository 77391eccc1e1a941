"""The command line: thin click commands over the library."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from .. import __version__, runtime
from ..errors import InputError, Stopped
from ..stop_signals import STOP_SIGNALS
from .bench import bench
from .caption import caption
from .evaluate import evaluate
from .extract import extract
from .help_pages import group
from .import_ import import_
from .stats import stats
from .train import train
from .verbosity import show_normal, verbosity_options

EXAMPLES = (
    "iisan-fast train                           # the embedded demo, in a minute",
    "iisan-fast import csv ratings.csv DATASET  # your own data, step by step",
    "iisan-fast stats DATASET",
    "iisan-fast extract DATASET --cache STATES --text-encoder bert-base-uncased",
    "iisan-fast train DATASET --cache STATES --out runs/first",
    "iisan-fast evaluate runs/first --k 5,10,20",
)
COMPLETION = """\b
Completion of commands, options, choices and files, in bash or zsh:
  eval "$(_IISAN_FAST_COMPLETE=bash_source iisan-fast)"
  eval "$(_IISAN_FAST_COMPLETE=zsh_source iisan-fast)"
"""


@group(examples=EXAMPLES, epilog=COMPLETION)
@click.version_option(__version__, prog_name="iisan-fast", message="%(prog)s %(version)s")
@verbosity_options
def cli() -> None:
    """Train IISAN: a small side network on frozen text and image encoders, for sequential recommendation.

    iisan-fast COMMAND --help shows the options of a command, with examples.
    """


for command in (import_, stats, caption, extract, train, evaluate, bench):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the program `iisan-fast` and raise SystemExit.

    arguments: the words of the command line after the program's name; by default the process's own.
    The exit code is 0, or 2 after one line on standard error for bad input, or after a signal 128 and its number, as
    130 for Ctrl-C.
    """
    runtime.prepare_program()
    show_normal()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, _stop)
    try:
        sys.exit(cli.main(arguments, standalone_mode=False, prog_name="iisan-fast"))
    except InputError as error:
        _fail(str(error))
    except Stopped as stopped:
        click.echo(f"stopped: {stopped}", err=True)
        sys.exit(128 + stopped.signal_number)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        sys.exit(0)
    except OSError as error:  # no permission, no space, no such folder
        _fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
    except ValueError as error:
        if type(error).__name__ != "FormError":  # raised by the kernels, whose module imports torch
            raise
        _fail(str(error))
    except MemoryError as error:
        _fail(f"not enough memory ({error})")
    except (click.Abort, KeyboardInterrupt):  # click turns Ctrl-C into Abort, a RuntimeError
        click.echo("stopped", err=True)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):  # torch's
            raise
        _fail(f"not enough memory ({error}); try --table pinned, fewer --batch-users or a smaller --batch-size")
    except click.ClickException as error:
        _fail(error.format_message())


def _stop(number: int, _frame: FrameType | None) -> None:
    """Raise Stopped for a signal, so that half-written files are removed."""
    raise Stopped(f"by {signal.Signals(number).name}", number)


def _fail(message: str) -> None:
    """Print an error as one line on standard error, and leave with exit code 2."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)
