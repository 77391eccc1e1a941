"""iisan-fast import: other formats as a dataset folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..data import MISSING_TITLES, RECBOLE_FIELDS, TABLE_COLUMNS, Imported, ImportOptions, TableOptions
from .options import FOLDER, json_option
from .output import print_counts, print_json


@click.group("import")
def import_() -> None:
    """Make a dataset folder of interactions, titles and covers in another format.

    A user's interactions are ordered by timestamp, equal ones as they come in the file; repeated ones stay.
    """


def _import_command(command: Callable) -> Callable:
    """Arguments and options of every import."""
    for decorate in (
        json_option,
        click.option("--copy-covers", is_flag=True, help="Copy the covers instead of linking to their folder."),
        click.option(
            "--missing-titles",
            type=click.Choice(MISSING_TITLES),
            default=ImportOptions.missing_titles,
            help="Items without a title: their id stands for it, they and their interactions are dropped, or an error.",
        ),
        click.argument("destination", type=FOLDER),
        click.argument("source", type=FOLDER),
    ):
        command = decorate(command)
    return command


def _column_options(word: str, user: str, item: str) -> Callable:
    """The options that name columns, and those of what stands beside the interactions."""

    def decorate(command: Callable) -> Callable:
        defaults = {"user": user, "item": item, "timestamp": TableOptions.timestamp_column}
        titles = {"title": TableOptions.title_column}
        command = click.option("--covers", type=FOLDER, help="A folder of images named by item id.")(command)
        command = click.option("--items", type=FOLDER, help="A table of item ids and titles.")(command)
        for name, default in reversed((defaults | titles).items()):
            command = click.option(f"--{name}-{word}", f"{name}_column", default=default)(command)
        return command

    return decorate


@import_.command()
@_import_command
def microlens(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION of MicroLens: SOURCE holds *_pairs.csv or *_pairs.tsv, *_title_en.csv and *_covers."""
    from ..data import import_microlens  # imports polars, which not every installation has

    _report(import_microlens(source, destination, ImportOptions(**options)), destination, as_json)


@import_.command()
@_column_options("field", *RECBOLE_FIELDS)
@_import_command
def recbole(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION of RecBole's files: SOURCE is a .inter file or its folder, a .item file stands beside it."""
    from ..data import import_recbole

    _report(import_recbole(source, destination, TableOptions(**options)), destination, as_json)


@import_.command("csv")
@_column_options("column", *TABLE_COLUMNS)
@_import_command
def csv_(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION of the CSV file SOURCE, which has a header and may be compressed by gzip."""
    from ..data import import_csv

    _report(import_csv(source, destination, TableOptions(**options)), destination, as_json)


@import_.command()
@_column_options("column", *TABLE_COLUMNS)
@_import_command
def parquet(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION of the Parquet file SOURCE."""
    from ..data import import_parquet

    _report(import_parquet(source, destination, TableOptions(**options)), destination, as_json)


def _report(imported: Imported, destination: Path, as_json: bool) -> None:
    counts = asdict(imported)
    if as_json:
        print_json(counts)
        return
    rows = {name.replace("_", " "): "no covers" if count is None else f"{count:,}" for name, count in counts.items()}
    print_counts(str(destination), rows)
    click.echo(f"next: {shlex.join(['iisan-fast', 'stats', str(destination)])}")
