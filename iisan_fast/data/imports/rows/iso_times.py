"""Read dates and times, ISO 8601 or of another format, as numbers of micro- or nanoseconds since 1970 (UTC)."""

from __future__ import annotations

from ..polars_module import pl
from .decimal_times import rescale

ISO = (
    r"^\s*(?<date>[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2})"
    r"(?:[Tt ]\s*(?<clock>[0-9]{1,2}:[0-9]{2})(?::(?<second>[0-9]{2})(?:[.,](?<fraction>[0-9]{1,9}))?)?)?"
    r"\s*(?:[Zz]|UTC|GMT|(?<sign>[+-])(?<hours>[0-9]{2})(?::?(?<minutes>[0-9]{2}))?)?\s*$"
)
PLAIN_FORMS = {10: "%Y-%m-%d", 19: "%Y-%m-%d %H:%M:%S"}  # by the length of a text; these are read fast
MICROSECONDS, NANOSECONDS = 6, 9  # scales: decimals of a second
UNITS = {MICROSECONDS: "us", NANOSECONDS: "ns"}


def read_points(column: pl.Series) -> tuple[pl.Series, int]:
    """Return dates, or dates and times with or without a zone, as Int64 and their scale. Times without one are UTC."""
    if getattr(column.dtype, "time_unit", None) != "ns":
        return column.cast(pl.Datetime("us", getattr(column.dtype, "time_zone", None))).to_physical(), MICROSECONDS
    nanoseconds = column.to_physical()
    if (nanoseconds % 1000 == 0).all():
        return nanoseconds // 1000, MICROSECONDS
    return nanoseconds, NANOSECONDS


def read_iso(texts: pl.Series) -> tuple[pl.Series, int]:
    """Return dates and times of ISO 8601 as Int64 and their scale; null for all else. Times without a zone are UTC.

    Also read: slashes in a date, days and months of one digit, a space before the zone, and UTC as the zone.
    """
    lengths = texts.str.len_bytes()
    first = lengths.drop_nulls().head(1).to_list()
    plain = PLAIN_FORMS.get(first[0]) if first else None
    if plain is not None and (lengths == first[0]).all():
        points = texts.str.to_datetime(plain, time_unit="us", strict=False)
        if points.null_count() == texts.null_count():
            return points.to_physical(), MICROSECONDS
    fields = texts.str.extract_groups(ISO).struct.unnest()
    clock = pl.col("clock").fill_null("0:00")
    written = pl.concat_str(
        pl.col("date").str.replace_all("/", "-"), pl.lit(" "), clock, pl.lit(":"), pl.col("second").fill_null("00")
    )
    points = written.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
    hours = pl.col("hours").cast(pl.Int64).fill_null(0)
    minutes = pl.col("minutes").cast(pl.Int64).fill_null(0)
    east = (hours * 60 + minutes) * 60 * pl.when(pl.col("sign") == "-").then(-1).otherwise(1)
    read = fields.select(
        seconds=points.dt.epoch("s") - east,
        nanoseconds=pl.col("fraction").fill_null("").str.pad_end(NANOSECONDS, "0").cast(pl.Int64),
    )
    nanoseconds = read["nanoseconds"]
    scale = MICROSECONDS if (nanoseconds % 1000 == 0).all() else NANOSECONDS
    return rescale(read["seconds"], 0, scale) + nanoseconds // 10 ** (NANOSECONDS - scale), scale


def read_format(texts: pl.Series, form: str) -> tuple[pl.Series, int]:
    """Return dates and times of a strptime format as Int64 and their scale; null for all else.

    Raises a polars error if the format cannot be used.
    """
    if form.endswith("%z"):
        texts = texts.str.replace("[Zz]$", "+0000")
    chrono = form.replace(".%f", "%.f")
    return read_points(texts.str.to_datetime(chrono, time_unit="ns", strict=False))
