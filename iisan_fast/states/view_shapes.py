"""Define the shape of a view's states."""

from __future__ import annotations

from typing import NamedTuple


class ViewShape(NamedTuple):
    """The sizes of one item's states in a view."""

    layers: int  # number of selected layers K
    width: int  # of a hidden state, D
