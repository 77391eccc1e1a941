"""Rows of a source that do not fit: an error with the first one's place, or counts by kind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError, first_few

LOGGER = logging.getLogger(__name__)
BAD_ROWS = ("error", "skip")
PLACES_SHOWN = 5
HINT = "correct it, or leave out such rows with --bad-rows skip"


@dataclass
class BadKind:
    """The rows of one kind that were left out."""

    unit: str  # "line" if places count the lines of a text, "row" if they count rows
    count: int = 0
    places: list[int] = field(default_factory=list)  # from 1, of the first few
    files: list[str] = field(default_factory=list)  # of these places; empty if all rows are of one file


class BadRows:
    """The rows of one file, or of the files of a folder, that do not fit, under the policy "error" or "skip"."""

    def __init__(self, path: Path, policy: str, unit: str, hint: str = HINT) -> None:
        """Start without bad rows. unit: as in BadKind. hint: what to do about a bad row, for the error."""
        self.path = path
        self.file = path  # of the rows that are read now; one in the folder `path`, if that is a folder
        self.hint = hint
        self.policy = policy
        self.unit = unit
        self.kinds: dict[str, BadKind] = {}
        self.good = 0  # rows that fit, once all are read
        self._files: list[Path] = []  # with bad rows, in the order in which they are read
        self._first: dict[str, list[tuple[int, int]]] = {}  # number of the file, and place, of the first of each kind
        self._lock = threading.Lock()  # a table reads ahead in a thread, while the rows before are checked
        self.low_rated = 0  # interactions of rows that fit, left out for their rating

    @property
    def count(self) -> int:
        """Return the number of rows that were left out."""
        return sum(kind.count for kind in self.kinds.values())

    def add(self, kind: str, places: Sequence[int], problem: str, hint: Callable[[], str] | None = None) -> None:
        """Count rows of one kind, in the order of the file. problem: what is wrong with the first of them.

        hint: says what to do about this kind, in place of the usual hint. Raises InputError, with the first row's
        place, if the policy is "error".
        """
        if self.policy == "error":
            advice = self.hint if hint is None else hint()
            raise InputError(f"{self.file} {self.unit} {places[0]}: {problem}; {advice}")
        with self._lock:
            of_kind = self.kinds.setdefault(kind, BadKind(self.unit))
            of_kind.count += len(places)
            if self.file not in self._files:
                self._files.append(self.file)
            first = self._first.setdefault(kind, [])
            first += [(len(self._files), int(place)) for place in places[:PLACES_SHOWN]]
            first.sort()
            del first[PLACES_SHOWN:]
            of_kind.places = [place for _, place in first]
            if self.file != self.path:
                of_kind.files = [str(self._files[number - 1].relative_to(self.path)) for number, _ in first]

    def finish(self, good: int) -> None:
        """Take the number of rows that fit, and warn of the others. Raises InputError if there are only others."""
        self.good = good
        if not self.count:
            return
        kinds = "; ".join(describe_bad_rows(name, kind) for name, kind in self.kinds.items())
        if not good:
            raise InputError(f"{self.path}: none of its {self.count:,} rows fits: {kinds}")
        LOGGER.warning("%s: left out %s of %s rows: %s", self.path, f"{self.count:,}", f"{self.count + good:,}", kinds)


def describe_bad_rows(name: str, kind: BadKind) -> str:
    """Return a kind's count, name and first places, such as "2 stray quote (lines 3, 5)"."""
    if kind.files:
        places = (f"{file} {kind.unit} {place}" for file, place in zip(kind.files, kind.places, strict=True))
        return f"{kind.count:,} {name} ({first_few(places, kind.count, PLACES_SHOWN)})"
    plural = "" if kind.count == 1 else "s"
    return f"{kind.count:,} {name} ({kind.unit}{plural} {first_few(kind.places, kind.count, PLACES_SHOWN)})"
