"""Read texts that look like lists, such as [1, 2] or ['a', 'b'], as the lists that they write."""

from __future__ import annotations

import re

from ..bad_rows import BadRows
from ..polars_module import pl
from ..records.json_values import PARSE_ERRORS, fits_column, parse_python, shortened, text_of

VALUE = r"""-?[0-9]+|"[^"\\]*"|'[^'\\]*'"""
SIMPLE = rf"^\[\s*(?:(?:{VALUE})(?:(?:\s*,\s*|\s+)(?:{VALUE}))*)?\s*\]$"  # a space alone stands between numpy's values
IN_QUOTES = r"""(?s)^["'](.*)["']$"""
# Three points are no word: numpy writes them for the values of a long list that it leaves out.
WORD = re.compile(r"(?!(?:null|none|nan|true|false|\.+)$)[\w.:+-]+", re.IGNORECASE)
NAMES = ("item", "timestamp", "rating", "part")


def read_lists(rows: pl.DataFrame, bad_rows: BadRows) -> pl.DataFrame:
    """Return rows with lists of text in place of texts in brackets. A text without them becomes a list of one.

    A column without texts in brackets stays as it is. Rows with brackets that hold no list of values are added to
    `bad_rows`. Raises InputError as it says.
    """
    for name in NAMES:
        if rows.schema.get(name) != pl.String:
            continue
        texts = rows[name].str.strip_chars()
        listed = (texts.str.starts_with("[") & texts.str.ends_with("]")).fill_null(False)
        if not listed.any():
            continue
        lists = _lists(texts, listed)
        unfit = lists.is_null() & texts.is_not_null()
        rows = rows.with_columns(lists.alias(name))
        if unfit.any():
            problem = f"{name}: expected a list such as [1, 2], found {shortened(texts.filter(unfit)[0])}"
            bad_rows.add(f"bad {name}", rows["place"].filter(unfit), problem)
            rows = rows.filter(~unfit)
    return rows


def _lists(texts: pl.Series, listed: pl.Series) -> pl.Series:
    """Return the lists of texts; null for those that hold none. listed: True for texts in brackets."""
    simple = listed & texts.str.contains(SIMPLE)
    values = texts.set(~simple, None).str.extract_all(VALUE)
    lists = values.list.eval(pl.element().str.replace(IN_QUOTES, "$1"))
    frame = pl.DataFrame([texts.alias("text"), lists.alias("list"), listed.alias("listed"), simple.alias("simple")])
    one = pl.when(pl.col("text").is_not_null()).then(pl.concat_list("text"))
    lists = frame.select(pl.when("simple").then("list").when(~pl.col("listed")).then(one))["list"]
    others = listed & ~simple
    if not others.any():
        return lists
    parsed = [_parsed(text, texts.name) if other else None for text, other in zip(texts, others, strict=True)]
    return lists.zip_with(~others, pl.Series("list", parsed, pl.List(pl.String)))


def _parsed(text: str, name: str) -> list[str | None] | None:
    """Return the values of one list of JSON, of Python or of words; None for another text."""
    try:
        value = parse_python(text)
    except PARSE_ERRORS:
        words = re.split(r"\s*,\s*|\s+", text[1:-1].strip())
        return [*words] if all(WORD.fullmatch(word) for word in words) else None
    if not isinstance(value, list) or not fits_column(name, value):
        return None
    return [text_of(name, entry) for entry in value]
