"""Import polars as `pl`. Raises InputError, saying how to install it, if it is missing."""

from __future__ import annotations

from ...errors import InputError

try:
    import polars as pl
except ImportError:
    raise InputError("tables are read by polars, which is missing; pip install 'iisan-fast[import]'") from None

__all__ = ["pl"]
