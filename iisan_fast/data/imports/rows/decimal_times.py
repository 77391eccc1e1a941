"""Read numbers as whole multiples of a decimal fraction of their unit, exactly, into 64 bits."""

from __future__ import annotations

from decimal import Decimal

from ..polars_module import pl

EXACT_FLOAT = 2**53  # a larger whole number may not be the one that its text says
MOST = 2**63 - 1
POINT_AND_ZEROS = r"^([+-]?[0-9]+)\.0*$"
FRACTION = r"^([+-]?[0-9]*)\.([0-9]*[1-9])0*$"  # whole digits and decimals, without zeros at the end
SCALES = (0, 6, 9)  # decimals of a time: whole units, millionths, or billionths


def scale_of(decimals: int) -> int | None:
    """Return the smallest scale with as many decimals; None if there are too many."""
    return next((scale for scale in SCALES if scale >= decimals), None)


def rescale(whole: pl.Series, scale: int, new_scale: int) -> pl.Series:
    """Return numbers of one scale at a larger one, null where 64 bits do not hold them."""
    if scale == new_scale:
        return whole
    factor = 10 ** (new_scale - scale)
    fits = whole.is_between(-(MOST // factor), MOST // factor)
    return whole.set(~fits, None) * factor


def read_numbers(column: pl.Series, least_scale: int = 0) -> tuple[pl.Series, int]:
    """Return a column of numbers, or of their texts, as Int64 multiples of 10^-scale, and the scale.

    The scale is the smallest, from `least_scale` up, that holds all decimals. Null stands for what is no number, has
    more than nine decimals, or does not fit into 64 bits.
    """
    whole = whole_numbers(column)
    rest = whole.is_null() & column.is_not_null()
    if not rest.any():
        return rescale(whole, 0, least_scale), least_scale
    # A float's text is the shortest that reads as the same float.
    texts = _without_exponents(column.set(~rest, None).cast(pl.String))
    digits = texts.str.extract_groups(FRACTION).struct.unnest()
    decimals = digits["2"].str.len_bytes()
    decimals = decimals.set(decimals > SCALES[-1], None)
    scale = max(least_scale, scale_of(int(decimals.max() or 0)) or 0)
    joined = digits["1"] + digits["2"].str.pad_end(scale, "0")
    fractions = joined.cast(pl.Int64, strict=False).set(decimals.is_null(), None)
    return rescale(whole, 0, scale).zip_with(~rest, fractions), scale


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


def _without_exponents(texts: pl.Series) -> pl.Series:
    """Return texts of numbers with those such as 1.5e-3 written out; others stay."""
    powers = texts.str.contains(r"^[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]{1,2}$").fill_null(False)
    if not powers.any():
        return texts
    written = [f"{Decimal(text):f}" for text in texts.filter(powers)]
    return texts.scatter(powers.arg_true(), pl.Series(written, dtype=pl.String))


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
