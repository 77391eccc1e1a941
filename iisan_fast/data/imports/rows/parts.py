"""Read the part of each interaction in a split that the source gives."""

from __future__ import annotations

from ..polars_module import pl
from ..table import PARTS

WORDS = {
    "training": ("training", "train", "0"),
    "validation": ("validation", "valid", "val", "dev", "1"),
    "test": ("test", "testing", "2"),
}
NUMBERS = {word: PARTS.index(part) for part, words in WORDS.items() for word in words}
FLOAT = r"^([0-9])\.0+$"  # as pandas writes the whole numbers of a column with missing ones
EXPECTED_PART = "training (train, 0), validation (valid, val, dev, 1) or test (2)"


def read_parts(column: pl.Series) -> pl.Series:
    """Return the places in PARTS, UInt8, that words or numbers name; null for all else."""
    words = column.cast(pl.Int64, strict=False) if column.dtype.is_float() else column
    words = words.cast(pl.String).str.strip_chars().str.to_lowercase().str.replace(FLOAT, "$1")
    return words.replace_strict(NUMBERS, default=None, return_dtype=pl.UInt8)
