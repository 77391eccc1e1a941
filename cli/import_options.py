"""Options of the imports: of every import, and of those that name columns, forms of text and files beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..data import BAD_ROWS, DUPLICATES, MISSING_TITLES, ImportOptions
from .help_pages import COLUMNS, DATA, ROWS, option
from .options import FILE_OR_FOLDER, FOLDER, output_options


def _decorated(command: Callable, decorators: Sequence[Callable]) -> Callable:
    """Return a command with the decorators, the first one's option first on the help page."""
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def import_command(several: bool = False) -> Callable:
    """Return the decorator that gives a command the arguments and options of every import.

    several: the command takes several sources.
    """
    sources = click.argument("sources", nargs=-1, type=FILE_OR_FOLDER, metavar="SOURCE...", callback=_refuse_no_source)

    def decorate(command: Callable) -> Callable:
        return _decorated(
            command,
            (
                sources if several else click.argument("source", type=FILE_OR_FOLDER),
                click.argument("destination", type=FOLDER),
                *_title_options(),
                *_row_options(),
                output_options,
            ),
        )

    return decorate


def _title_options() -> tuple[Callable, ...]:
    """Return the options of titles and covers that every import has."""
    return (
        option(
            "--missing-titles",
            group=DATA,
            type=click.Choice(MISSING_TITLES),
            default=ImportOptions.missing_titles,
            help="For items without a title: use their id as title, drop them and their interactions, or stop with an "
            "error.",
        ),
        option("--copy-covers", group=DATA, is_flag=True, help="Copy the covers, in place of a link to their folder."),
    )


def _row_options() -> tuple[Callable, ...]:
    """Return the options that say which rows count."""
    count = click.IntRange(min=1)
    return (
        option(
            "--bad-rows",
            group=ROWS,
            type=click.Choice(BAD_ROWS),
            default=BAD_ROWS[0],
            help="For rows that do not fit: stop with an error, or leave them out and count them.",
        ),
        option(
            "--duplicates",
            group=ROWS,
            type=click.Choice(DUPLICATES),
            default=ImportOptions.duplicates,
            help="For interactions of one user with one item: keep all, the first or the last.",
        ),
        option("--min-rating", group=ROWS, type=float, help="Leave out interactions with a lower rating."),
        option(
            "--user-core",
            group=ROWS,
            type=count,
            default=ImportOptions.user_core,
            help="Leave out users with fewer interactions.",
        ),
        option(
            "--item-core",
            group=ROWS,
            type=count,
            default=ImportOptions.item_core,
            help="Leave out items with fewer interactions, again until all that are left have as many.",
        ),
    )


def column_options(word: str, user: str, item: str) -> Callable:
    """Return the decorator of the options that name columns.

    word: the format's word for a column. user, item: the default columns of user and item ids.
    """
    named = word.capitalize()
    texts = {
        "user": (user, f"{named} of the user ids."),
        "item": (item, f"{named} of the item ids."),
        "timestamp": (None, f"{named} of the times, - for none; by default timestamp, if there is one."),
        "title": (None, f"{named} of the titles; by default title, if there is one."),
        "items-id": (None, f"{named} of the item ids in the table of titles; by default as in SOURCE."),
        "rating": (None, f"{named} of the ratings, for --min-rating; by default rating, overall, stars or score."),
        "split": (None, f"{named} of the given split, - for none; by default split, if there is one."),
    }
    options = [
        option(
            f"--{name}-{word}",
            f"{name.replace('-', '_')}_column",
            group=COLUMNS,
            default=default,
            metavar="NAME",
            help=text,
        )
        for name, (default, text) in texts.items()
    ]
    form = option(
        "--timestamp-format",
        group=COLUMNS,
        metavar="FORMAT",
        help="Form of times that are dates, as strptime has it, such as %d.%m.%Y; ISO 8601 and numbers need none.",
    )
    separator = option(
        "--item-separator",
        group=COLUMNS,
        metavar="TEXT",
        callback=_separator,
        help="Text between the ids of a field that holds several.",
    )
    return lambda command: _decorated(command, (*options, form, separator))


def file_options(*names: str) -> Callable:
    """Return the decorator of the options of files beside the interactions; names: of some, none for all."""
    options = {
        "items": option(
            "--items",
            group=DATA,
            type=FILE_OR_FOLDER,
            help="Table of item ids and titles: text, JSON lines or Parquet.",
        ),
        "covers": option(
            "--covers", group=DATA, type=FILE_OR_FOLDER, help="Folder of images named by item id, or an LMDB of images."
        ),
    }
    return lambda command: _decorated(command, [options[name] for name in names or options])


def split_file_options(command: Callable) -> Callable:
    """Give a command the options of the files of a given split."""
    return _decorated(
        command,
        [
            option(
                f"--{part}",
                group=DATA,
                type=FILE_OR_FOLDER,
                help=f"Interactions of the {part} part of a given split; SOURCE is then the training part.",
            )
            for part in ("validation", "test")
        ],
    )


def text_options(*left_out: str) -> Callable:
    """Return the decorator of the options of text files, without those that are left out."""
    texts: dict[str, dict[str, Any]] = {
        "--separator": {
            "metavar": "TEXT",
            "help": "Text between two fields: tab, semicolon, space, '::' and so on; by default found by looking.",
        },
        "--encoding": {
            "metavar": "NAME",
            "help": "Encoding of delimited text, such as latin-1 or gbk; by default UTF-8. JSON is always UTF-8.",
        },
        "--columns": {
            "metavar": "NAMES",
            "callback": _names,
            "help": "Names of the columns of SOURCE, if it has no header, in order; - for one to ignore.",
        },
        "--items-columns": {
            "metavar": "NAMES",
            "callback": _names,
            "help": "Names of the columns of the table of titles, if it has no header, in order; - for one to ignore.",
        },
    }
    options = [option(name, group=COLUMNS, **texts[name]) for name in texts if name not in left_out]
    return lambda command: _decorated(command, options)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names in a text with commas between; None without a text."""
    return None if value is None else tuple(value.split(","))


def _separator(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    r"""Return a separator, \t in it as a tab."""
    return None if value is None else value.replace("\\t", "\t")


def _refuse_no_source(context: click.Context, parameter: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the sources. Raises click.UsageError if there is none: a path alone is taken for the destination."""
    if not value and not context.resilient_parsing:
        raise click.UsageError("expected SOURCE... and DESTINATION, the dataset folder to write", context)
    return value
