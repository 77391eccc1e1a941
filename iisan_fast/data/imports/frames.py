"""polars as `pl` for this package, or how to get it: not every installation has it."""

from __future__ import annotations

from ...errors import InputError

try:
    import polars as pl
except ImportError:
    raise InputError("import: needs polars; pip install 'iisan-fast[import]'") from None

__all__ = ["pl"]
