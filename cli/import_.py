"""iisan-fast import: a dataset folder from files in another format."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import RECBOLE_FIELDS, TABLE_COLUMNS, BadKind, Imported, ImportOptions, TableOptions, describe_bad_rows
from ..printable import printable
from .help_pages import group
from .import_options import column_options, file_options, import_command, split_file_options, text_options
from .output import print_counts, print_json, print_text
from .verbosity import verbosity_options

EXAMPLES = {
    "csv": (
        "iisan-fast import csv ratings.csv.gz DATASET --timestamp-column time",
        "iisan-fast import csv ratings.csv DATASET --items items.csv --covers photos",
        "iisan-fast import csv ratings.csv DATASET --columns user,item,-,timestamp",
        "iisan-fast import csv ratings.dat DATASET --separator :: \\\n    --columns user,item,-,timestamp",
        "iisan-fast import csv train.csv DATASET --validation valid.csv --test test.csv",
    ),
    "jsonl": (
        "iisan-fast import jsonl ratings.jsonl.gz DATASET --items items.jsonl",
        "iisan-fast import jsonl review.json DATASET --user-column user_id \\\n"
        "    --item-column business_id --timestamp-column date",
    ),
    "parquet": (
        "iisan-fast import parquet ratings.parquet DATASET --user-column user_id",
        "iisan-fast import parquet 2024.parquet 2025.parquet DATASET --user-core 5",
    ),
    "movielens": (
        "iisan-fast import movielens ml-1m DATASET",
        "iisan-fast import movielens ml-100k DATASET --min-rating 4 --user-core 5",
    ),
    "amazon": (
        "iisan-fast import amazon All_Beauty.jsonl.gz meta_All_Beauty.jsonl.gz DATASET",
        "iisan-fast import amazon Books.csv DATASET --items meta_Books.json.gz",
        "iisan-fast import amazon Books.train.csv Books.valid.csv Books.test.csv \\\n    DATASET",
    ),
    "recbole": (
        "iisan-fast import recbole Amazon_Scientific DATASET",
        "iisan-fast import recbole ml-100k DATASET --title-field movie_title",
    ),
    "microlens": ("iisan-fast import microlens MicroLens-50k DATASET",),
    "mmrec": ("iisan-fast import mmrec baby DATASET",),
    "iisan": ("iisan-fast import iisan Dataset/Scientific DATASET",),
}


LABELS = {  # of counts whose names are too short for a table
    "rows": "rows read",
    "bad_rows": "rows that do not fit",
    "bad_title_rows": "rows of titles that do not fit",
    "low_rated_interactions": "left out by rating",
    "duplicate_interactions": "left out as duplicates",
    "core_interactions": "left out by the cores",
    "dropped_interactions": "left out without title",
}


@group(
    "import",
    examples=[example for examples in EXAMPLES.values() for example in examples[:1]],
    short_help="Make a dataset folder from tables or a public dataset.",
)
@verbosity_options
def import_() -> None:
    """Make a dataset folder from interactions, titles and covers in another format.

    A user's interactions are ordered by timestamp; equal timestamps, or all without timestamps, stay in the order of
    the file. Repeated interactions stay, unless --duplicates says otherwise.
    """


@import_.command("csv", examples=EXAMPLES["csv"], short_help="Make a dataset from CSV or other delimited text.")
@import_command(several=True)
@file_options()
@split_file_options
@column_options("column", *TABLE_COLUMNS)
@text_options()
def csv_(sources: tuple[Path, ...], destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the text files SOURCE, which gzip, bzip2 or xz may have compressed.

    They have a header, or --columns names their columns. Several files are read one after the other.
    """
    _import_files(sources, destination, as_json, options)


@import_.command(examples=EXAMPLES["jsonl"], short_help="Make a dataset from JSON lines.")
@import_command(several=True)
@file_options()
@split_file_options
@column_options("column", *TABLE_COLUMNS)
@text_options("--columns")
def jsonl(sources: tuple[Path, ...], destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the files SOURCE, a JSON object a line, which gzip may have compressed.

    Several files are read one after the other.
    """
    _import_files(sources, destination, as_json, options)


@import_.command(examples=EXAMPLES["parquet"], short_help="Make a dataset from Parquet files.")
@import_command(several=True)
@file_options()
@split_file_options
@column_options("column", *TABLE_COLUMNS)
@text_options("--columns")
def parquet(sources: tuple[Path, ...], destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from SOURCE: Parquet files, or folders of them. Several are read one after the other."""
    _import_files(sources, destination, as_json, options)


@import_.command(examples=EXAMPLES["movielens"], short_help="Make a dataset from the files of MovieLens.")
@import_command()
@file_options("covers")
def movielens(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from MovieLens: SOURCE is the folder of 100K, 1M, 10M, 20M, 25M, 32M or latest."""
    from ..data import import_movielens  # imports polars, which not every installation has

    _report(import_movielens(source, destination, TableOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["amazon"], short_help="Make a dataset from the files of Amazon's reviews.")
@import_command(several=True)
@file_options()
def amazon(sources: tuple[Path, ...], destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the Amazon reviews of 2014, 2018 or 2023.

    SOURCE is a file of reviews (JSON lines) or of ratings (CSV), a file of products (meta_*), or a folder of them.
    Files named .train, .valid and .test are a given split.
    """
    from ..data import import_amazon

    _report(import_amazon(sources, destination, TableOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["recbole"], short_help="Make a dataset from the files of RecBole.")
@import_command()
@file_options()
@column_options("field", *RECBOLE_FIELDS)
@text_options("--columns", "--items-columns")
def recbole(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from the files of RecBole: SOURCE is a .inter file beside a .item file, or the folder.

    NAME.train.inter, NAME.valid.inter and NAME.test.inter are a given split. Lists of items beside an interaction are
    the history before it.
    """
    from ..data import import_recbole

    _report(import_recbole(source, destination, TableOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["microlens"], short_help="Make a dataset from the files of MicroLens.")
@import_command()
def microlens(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from MicroLens: SOURCE holds *_pairs.csv or *_pairs.tsv, *_title_en.csv and *_covers."""
    from ..data import import_microlens

    _report(import_microlens(source, destination, ImportOptions(**options)), destination, as_json)


@import_.command(examples=EXAMPLES["mmrec"], short_help="Make a dataset from a folder of MMRec.")
@import_command()
@file_options()
def mmrec(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from a folder of MMRec: NAME.inter, and features of the items, which train reads as views."""
    from ..data import feature_views, import_mmrec

    _report(import_mmrec(source, destination, TableOptions(**options)), destination, as_json)
    views = [word for view in feature_views(source) for word in ("--view", view)]
    if views and not as_json:
        command = [
            "iisan-fast",
            "train",
            str(destination),
            "--method",
            "iisan-versa",
            *_split_option(destination),
            *views,
        ]
        print_text(printable(f"with its features: {shlex.join(command)}"))


@import_.command(examples=EXAMPLES["iisan"], short_help="Make a dataset from files named as IISAN's code has them.")
@import_command()
@file_options("covers")
def iisan(source: Path, destination: Path, as_json: bool, **options: Any) -> None:
    """Make DESTINATION from a folder of the released IISAN code: *_items.tsv, *_users.tsv and am_*.lmdb."""
    from ..data import import_iisan

    _report(import_iisan(source, destination, TableOptions(**options)), destination, as_json)


def _import_files(sources: tuple[Path, ...], destination: Path, as_json: bool, options: dict[str, Any]) -> None:
    """Make a dataset from tables of interactions, and report it. Raises InputError for bad input."""
    from ..data import import_files

    _report(import_files(sources, destination, TableOptions(**options)), destination, as_json)


def _report(imported: Imported, destination: Path, as_json: bool) -> None:
    """Print what was imported, as JSON or as a table that names the next command."""
    if as_json:
        print_json(asdict(imported))
        return
    rows = {LABELS.get(name, name.replace("_", " ")): _shown(count) for name, count in vars(imported).items()}
    print_counts(str(destination), rows)
    command = ["iisan-fast", "stats", str(destination), *_split_option(destination)]
    print_text(printable(f"next: {shlex.join(command)}"))


def _split_option(destination: Path) -> list[str]:
    """Return the option of other commands that takes the split which a dataset comes with; none without a split."""
    return ["--split", "given"] if (destination / "splits.tsv").exists() else []


def _shown(count: int | dict[str, BadKind] | None) -> str:
    """Return a count, or the counts of rows that were left out, with the first lines of each kind."""
    if count is None:
        return "no covers"
    if isinstance(count, int):
        return f"{count:,}"
    return "\n".join(describe_bad_rows(name, kind) for name, kind in count.items()) or "0"
