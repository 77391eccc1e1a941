"""Read points in time as whole numbers of 64 bits."""

from __future__ import annotations

from decimal import Decimal

from .polars_module import pl

EXACT_FLOAT = 2**53  # a larger whole number may not be the one that its text says
POINT_AND_ZEROS = r"^([+-]?[0-9]+)\.0*$"


def whole_numbers(column: pl.Series) -> pl.Series:
    """Return a column of numbers, or of text such as 12, 12.0 or 1.2e1, as Int64; null for all but whole numbers."""
    if column.dtype.is_float():
        return _whole_floats(column)
    if column.dtype.is_decimal():
        column = column.cast(pl.String)
    exact = column.cast(pl.Int64, strict=False)
    if exact.null_count() == 0 or column.dtype != pl.String:
        return exact
    exact = column.str.replace(POINT_AND_ZEROS, "$1").cast(pl.Int64, strict=False)
    with_exponent = exact.is_null() & column.str.contains("[eE]")
    if not with_exponent.any():
        return exact
    numbers = column.set(~with_exponent, None).cast(pl.Float64, strict=False)
    whole = _whole_floats(numbers)
    for place in (numbers.is_finite() & (numbers.abs() >= EXACT_FLOAT)).fill_null(False).arg_true():
        whole[place] = _exact_number(column[place])
    return exact.zip_with(exact.is_not_null(), whole)


def _whole_floats(numbers: pl.Series) -> pl.Series:
    """Return a column of floats as Int64, null for all but whole numbers."""
    whole = numbers.cast(pl.Int64, strict=False)
    return whole.set(whole.cast(pl.Float64) != numbers, None)


def _exact_number(text: str) -> int | None:
    """Return the whole number of 64 bits that a number's text says, None if it says another number."""
    number = Decimal(text)
    if number != number.to_integral_value() or not -(2**63) <= number < 2**63:
        return None
    return int(number)
