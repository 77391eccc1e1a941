"""iisan-fast import: a dataset folder from files in another format."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..data import (
    BAD_ROWS,
    MISSING_TITLES,
    RECBOLE_FIELDS,
    TABLE_COLUMNS,
    BadKind,
    Imported,
    ImportOptions,
    TableOptions,
    describe_bad_rows,
)
from ..printable import printable
from .help_pages import DATA, group, option
from .options import FILE, FILE_OR_FOLDER, FOLDER, output_options
from .output import print_counts, print_json, print_text
from .verbosity import verbosity_options

EXAMPLES = {
    "microlens": ("iisan-fast import microlens MicroLens-50k DATASET",),
    "recbole": (
        "iisan-fast import recbole Amazon_Scientific DATASET",
        "iisan-fast import recbole ml-100k DATASET --title-field movie_title",
    ),
    "csv": (
        "iisan-fast import csv ratings.csv.gz DATASET --timestamp-column time",
        "iisan-fast import csv ratings.csv DATASET --items items.csv --covers photos",
        "iisan-fast import csv ratings.csv DATASET --columns user,item,-,timestamp",
    ),
    "parquet": ("iisan-fast import parquet ratings.parquet DATASET --user-column user_id",),
}


@group(
    "import",
    examples=[example for examples in EXAMPLES.values() for example in examples[:1]],
    short_help="Make a dataset folder from MicroLens, RecBole, CSV or Parquet.",
)
@verbosity_options
def import_() -> None:
    """Make a dataset folder from interactions, titles and covers in another format.

    A user's interactions are ordered by timestamp; equal timestamps stay in the order of the file. Repeated
    interactions stay.
    """


def _import_command(command: Callable) -> Callable:
    """Give a command the arguments and options of every import."""
    for decorate in (
        output_options,
        option("--copy-covers", group=DATA, is_flag=True, help="Copy the covers, in place of a link to their folder."),
        option(
            "--missing-titles",
            group=DATA,
            type=click.Choice(MISSING_TITLES),
            default=ImportOptions.missing_titles,
            help="For items without a title: use their id as title, drop them and their interactions, or stop with an "
            "error.",
        ),
        option(
            "--bad-rows",
            group=DATA,
            type=click.Choice(BAD_ROWS),
            default=BAD_ROWS[0],
            help="For rows that do not fit: stop with an error, or leave them out and count them.",
        ),
        click.argument("destination", type=FOLDER),
        click.argument("source", type=FILE_OR_FOLDER),
    ):
        command = decorate(command)
    return command


def _column_options(word: str, user: str, item: str) -> Callable:
    """Return the decorator of the options that name columns, and files beside the interactions.

    word: the format's word for a column. user, item: the default columns of user and item ids.
    """

    def decorate(command: Callable) -> Callable:
        command = option("--covers", group=DATA, type=FOLDER, help="Folder of images named by item id.")(command)
        command = option("--items", group=DATA, type=FILE, help="Table of item ids and titles.")(command)
        for name, meaning, default in (
            ("title", "titles", TableOptions.title_column),
            ("timestamp", "times", TableOptions.timestamp_column),
            ("item", "item ids", item),
            ("user", "user ids", user),
        ):
            text = f"{word.capitalize()} of the {meaning}."
            command = option(f"--{name}-{word}", f"{name}_column", group=DATA, default=default, help=text)(command)
        return command

    return decorate


@import_.command(examples=EXAMPLES["microlens"], short_help="Make a dataset from the files of MicroLens.")
@_import_command
def microlens(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from MicroLens: SOURCE holds *_pairs.csv or *_pairs.tsv, *_title_en.csv and *_covers."""
    from ..data import import_microlens  # imports polars, which not every installation has

    _report(import_microlens(source, destination, ImportOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["recbole"], short_help="Make a dataset from the files of RecBole.")
@_column_options("field", *RECBOLE_FIELDS)
@_import_command
def recbole(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the files of RecBole: SOURCE is a .inter file beside a .item file, or the folder."""
    from ..data import import_recbole

    _report(import_recbole(source, destination, TableOptions(**options)), destination, as_json)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names in a text with commas between; None without a text."""
    return None if value is None else tuple(value.split(","))


def _no_header_options(command: Callable) -> Callable:
    """Give a command the options that name the columns of files without a header."""
    for name, file in (("--items-columns", "the table of titles"), ("--columns", "SOURCE")):
        text = f"Names of the columns of {file}, if it has no header, in order; - for one to ignore."
        command = option(name, group=DATA, metavar="NAMES", callback=_names, help=text)(command)
    return command


@import_.command("csv", examples=EXAMPLES["csv"], short_help="Make a dataset from a CSV file.")
@_column_options("column", *TABLE_COLUMNS)
@_no_header_options
@_import_command
def csv_(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the CSV file SOURCE, which may be compressed by gzip.

    It has a header, or --columns names its columns.
    """
    from ..data import import_csv

    _report(import_csv(source, destination, TableOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["parquet"], short_help="Make a dataset from a Parquet file.")
@_column_options("column", *TABLE_COLUMNS)
@_import_command
def parquet(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the Parquet file SOURCE."""
    from ..data import import_parquet

    _report(import_parquet(source, destination, TableOptions(**options)), destination, as_json)


def _report(imported: Imported, destination: Path, as_json: bool) -> None:
    """Print what was imported, as JSON or as a table that names the next command."""
    if as_json:
        print_json(asdict(imported))
        return
    rows = {name.replace("_", " "): _shown(count) for name, count in vars(imported).items()}
    print_counts(str(destination), rows)
    print_text(printable(f"next: {shlex.join(['iisan-fast', 'stats', str(destination)])}"))


def _shown(count: int | dict[str, BadKind] | None) -> str:
    """Return a count, or the counts of rows that were left out, with the first lines of each kind."""
    if count is None:
        return "no covers"
    if isinstance(count, int):
        return f"{count:,}"
    return "\n".join(describe_bad_rows(name, kind) for name, kind in count.items()) or "0"
