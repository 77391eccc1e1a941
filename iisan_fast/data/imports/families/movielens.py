"""Imports of MovieLens as GroupLens' archives are unpacked: 100K, 1M, 10M, 20M, 25M, 32M and latest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ....errors import InputError
from ..flat import import_tables
from ..options import Imported, TableOptions
from ..text.delimited import DelimitedText
from .sources import is_utf_8, unpacked

LATIN_1 = "latin-1"  # 100K and 1M are older than the others, which are UTF-8


class Release(NamedTuple):
    """The files of a release of MovieLens."""

    ratings: str
    movies: str
    separators: tuple[str, str]  # between the fields of ratings and of movies
    columns: tuple[Sequence[str], Sequence[str]] | None  # of ratings and of movies; None if they have headers


DAT_COLUMNS = (("userId", "movieId", "rating", "timestamp"), ("movieId", "title", "-"))
RELEASES = (
    Release("ratings.csv", "movies.csv", (",", ","), None),
    Release("rating.csv", "movie.csv", (",", ","), None),  # as Kaggle has 20M
    Release("ratings.dat", "movies.dat", ("::", "::"), DAT_COLUMNS),
    Release("u.data", "u.item", ("\t", "|"), (DAT_COLUMNS[0], ("movieId", "title", *["-"] * 22))),
)


def import_movielens(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a folder of MovieLens, or from the file of ratings in it.

    Titles come from the file of movies beside the ratings, if it is there. Raises InputError for bad input.
    """
    folder, release = _release(unpacked(source))
    ratings, movies = (_table(folder / name, release, place) for place, name in enumerate(release[:2]))
    if ratings is None:
        raise InputError(f"{folder / release.ratings}: no such file")
    options = replace(options, timestamp_column="timestamp", title_column="title")
    return import_tables([(ratings, None)], movies, destination, options, names=("userId", "movieId"))


def _release(source: Path) -> tuple[Path, Release]:
    """Return the folder and the release of a source; the folder may lie in the source, as some archives have it.

    Raises InputError if it is none of those known.
    """
    if not source.is_dir():
        named = [release for release in RELEASES if release.ratings == source.name]
        if named:
            return source.parent, named[0]
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())] if source.is_dir() else []
    for folder, release in product(folders, RELEASES):
        if os.path.lexists(folder / release.ratings):
            return folder, release
    expected = ", ".join(release.ratings for release in RELEASES if release.ratings != "rating.csv")
    raise InputError(f"{source}: expected a folder of MovieLens, with one of {expected} in it")


def _table(path: Path, release: Release, place: int) -> DelimitedText | None:
    """Return a file of a release, None if there is none. place: 0 for ratings, 1 for movies.

    Raises InputError if it cannot be opened.
    """
    if not os.path.lexists(path):
        return None
    columns = None if release.columns is None else release.columns[place]
    encoding = LATIN_1 if place and not is_utf_8(path) else None
    quoted = columns is None
    return DelimitedText(path, release.separators[place], quoted=quoted, columns=columns, encoding=encoding)
