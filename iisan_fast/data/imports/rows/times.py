"""Read the times of interactions, batch by batch: numbers or dates, as whole numbers of one unit."""

from __future__ import annotations

import logging

from ....errors import InputError
from ..polars_module import pl
from .decimal_times import read_numbers, rescale
from .iso_times import read_format, read_iso, read_points

LOGGER = logging.getLogger(__name__)
NO_TIME = ("", "null", "Null", "NULL", r"\N", "NaN", "nan", "NAN", "None", "none", "NA", "N/A", "NaT", "<NA>")
NUMBERS, DATES = "a number", "a date and time"  # what an import's times are, as messages call it
UNITS = {6: "microseconds", 9: "nanoseconds"}  # by the scale


class TimeReader:
    """The times of one import: all are numbers, or all are dates, as the first one that can be read.

    Numbers stay as they are while all are whole. Where one has a fraction of at most six decimals, all are multiplied
    by a million, and where one has up to nine decimals, by a billion, so that order and equality are exact. Dates are
    microseconds since 1970 (UTC), or nanoseconds if one has more than six decimals.
    """

    def __init__(self) -> None:
        """Start without times."""
        self.kind: str | None = None  # NUMBERS or DATES once there is one
        self.scale = 0  # decimals of the source's unit that the times read so far have

    def read(self, column: pl.Series, form: str | None = None) -> pl.Series:
        """Return a column's times at the scale so far, Int64; null for what is none, or is of the other kind.

        form: of strptime, for text; None for numbers or ISO 8601. Raises InputError for a form that cannot be used.
        """
        times, scale, kind = self._parsed(column, form)
        if self.kind is None and times.null_count() < len(times):
            self.kind = kind
        if kind != self.kind:
            return pl.Series(times.name, [None] * len(times), dtype=pl.Int64)
        times = rescale(times, scale, max(scale, self.scale))
        self.scale = max(scale, self.scale)
        return times

    def expected(self, form: str | None = None) -> str:
        """Return, for messages, what a time has to be."""
        if form is not None:
            return f"a date and time of the form {form!r}"
        if self.kind is None:
            return f"{NUMBERS}, or {DATES} such as 2018-09-20 12:00:00 (--timestamp-format names another form)"
        if self.kind == NUMBERS:
            return f"{NUMBERS} of at most nine decimals and 64 bits, as other times are numbers"
        return f"{DATES} such as 2018-09-20 12:00:00, as other times are dates"

    def report_unit(self) -> None:
        """Say which unit the times of the dataset have, if it is not simply the source's."""
        if self.kind == DATES:
            LOGGER.info("times: %s since 1970 (UTC)", UNITS[self.scale])
        elif self.scale:
            LOGGER.info(
                "times: fractions in the source, so all are multiplied by %s (seconds become %s)",
                f"{10**self.scale:,}",
                UNITS[self.scale],
            )

    def _parsed(self, column: pl.Series, form: str | None) -> tuple[pl.Series, int, str]:
        """Return a column's times with their scale, and their kind."""
        if column.dtype in (pl.Date, pl.Datetime):
            return *read_points(column), DATES
        if column.dtype != pl.String:
            return *read_numbers(column), NUMBERS
        if form is not None:
            return *_formatted(column, form), DATES
        if self.kind == DATES:
            return *read_iso(column), DATES
        numbers, scale = read_numbers(column)
        if self.kind is None:
            first_number = numbers.is_not_null().arg_max() if numbers.null_count() < len(numbers) else len(numbers)
            dates, _ = read_iso(column.head(first_number))
            if dates.null_count() < len(dates):
                return *read_iso(column), DATES
        return numbers, scale, NUMBERS


def is_blank(column: pl.Series) -> pl.Series:
    """Return True for what says that there is no time: null, NaN, an empty text, or a usual word for it."""
    blank = column.is_null()
    if column.dtype == pl.String:
        return blank | column.str.strip_chars().is_in(NO_TIME).fill_null(True)
    if column.dtype.is_float():
        return blank | column.is_nan().fill_null(True)
    return blank


def at_scale(times: pl.Series, scale: int, new_scale: int) -> pl.Series:
    """Return times at a larger scale. Raises InputError if 64 bits do not hold them."""
    scaled = rescale(times, scale, new_scale)
    lost = scaled.is_null()
    if lost.any():
        raise InputError(
            f"times: {times.filter(lost)[0] // 10**scale} does not fit into 64 bits as {UNITS[new_scale]}, which other "
            "times need for their decimals; write all times in one unit"
        )
    return scaled


def _formatted(column: pl.Series, form: str) -> tuple[pl.Series, int]:
    """Return the times of texts of one form. Raises InputError for a form that cannot be used."""
    try:
        return read_format(column, form)
    except pl.exceptions.PolarsError as error:
        problem = str(error).strip().splitlines()[0]
        raise InputError(
            f"timestamp_format: {form!r} cannot be used ({problem}); write such as %m/%d/%Y %H:%M"
        ) from None
