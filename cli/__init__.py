"""The command line: thin click commands over the library."""

from __future__ import annotations

import signal
import sys

import click

from .. import __version__, runtime
from ..errors import InputError
from .bench import bench
from .caption import caption
from .evaluate import evaluate
from .extract import extract
from .import_ import import_
from .stats import stats
from .train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="iisan-fast")
def cli() -> None:
    """Train IISAN: a small side network on frozen text and image encoders, for sequential recommendation."""


for command in (import_, stats, caption, extract, train, evaluate, bench):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """The `iisan-fast` program. Leaves through SystemExit; bad input: code 2 and one line on standard error."""
    runtime.prepare_program()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # rather than at once: what is half written is removed
    try:
        sys.exit(cli.main(arguments, standalone_mode=False, prog_name="iisan-fast"))
    except InputError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        sys.exit(0)
    except OSError as error:  # no permission, no space, not a folder: the message names the file
        _fail(str(error))
    except ValueError as error:
        if type(error).__name__ != "FormError":  # of the kernels, which import torch
            raise
        _fail(str(error))
    except MemoryError as error:
        _fail(f"not enough memory ({error})")
    except (click.Abort, KeyboardInterrupt):  # an Abort, which click makes of Ctrl-C, is a RuntimeError
        click.echo("stopped", err=True)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):  # torch's
            raise
        _fail(f"not enough memory ({error}); try --table pinned, fewer --batch-users or a smaller --batch-size")
    except click.ClickException as error:
        _fail(error.format_message())


def _fail(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)
