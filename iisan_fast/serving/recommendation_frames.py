"""Give recommendations to a Python caller as a frame of polars, pandas or arrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import InputError, check_choice
from .growing.catalogue import Catalogue
from .recommendation import Recommended

MODULES = {"polars": "polars", "pandas": "pandas", "arrow": "pyarrow"}
INSTALLED_BY = {"polars": "'iisan-fast[import]'", "pandas": "pandas", "arrow": "pyarrow"}
RECORDS = "records"  # a list of dicts


def library_of(histories: Any, asked: str | None) -> str | None:
    """Return the library of the frame to give: the one that is asked for, or that of the histories.

    None stands for lists of named tuples, "records" for a list of dicts. A frame of another library gets one of polars.
    Raises InputError for an unknown library.
    """
    if asked is not None:
        check_choice("frame", asked, tuple(MODULES))
        return asked
    if isinstance(histories, list):
        return RECORDS if histories and isinstance(histories[0], dict) else None
    module = type(histories).__module__.partition(".")[0]
    libraries = [library for library, name in MODULES.items() if name == module]
    if libraries:
        return libraries[0]
    return "polars" if hasattr(histories, "__arrow_c_stream__") or hasattr(histories, "__dataframe__") else None


def recommendation_frame(recommended: Iterable[Recommended], catalogue: Catalogue, library: str) -> Any:
    """Return recommendations with a row for each user and rank: user_id, rank from 1, item_id and score.

    library: as `library_of` returns it. Raises InputError, with the command that installs it, if it is missing.
    """
    if library == RECORDS:
        columns = _columns(recommended, catalogue)
        values = [np.asarray(column).tolist() for column in columns.values()]
        return [dict(zip(columns, row)) for row in zip(*values)]
    try:
        module = importlib.import_module(MODULES[library])
    except ImportError:
        raise InputError(f"frame: {library} is not installed; pip install {INSTALLED_BY[library]}") from None
    columns = _columns(recommended, catalogue)
    return module.table(columns) if library == "arrow" else module.DataFrame(columns)


def _columns(recommended: Iterable[Recommended], catalogue: Catalogue) -> dict[str, Any]:
    """Return the columns of all recommendations, without the places behind a user's last item."""
    parts = list(recommended)
    users = [user_id for part in parts for user_id in part.user_ids]
    items = np.concatenate([part.items for part in parts]) if parts else np.zeros((0, 0), dtype=np.int64)
    scores = np.concatenate([part.scores for part in parts]) if parts else np.zeros((0, 0), dtype=np.float32)
    rows, places = np.nonzero(items)
    return {
        "user_id": [users[row] for row in rows],
        "rank": places + 1,
        "item_id": [catalogue.item_ids[number - 1] for number in items[rows, places]],
        "score": scores[rows, places],
    }
