"""Plan a table of hidden states: the layers that it holds, its size, and its place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..ranks import ALONE, Ranks
from .placement import place
from .state_reader import StateReader
from .store import group_positions
from .view_shapes import ViewShape


class TablePlan(NamedTuple):
    """The content of a feature table, its size, and its place."""

    names: list[str]  # of the views
    positions: list[list[int] | None]  # among each view's stored layers, the layers to read; None for all
    dtypes: list[torch.dtype]
    shapes: list[tuple[int, ...]]  # [items + 1, K, D] of each view
    size: int  # in bytes
    place: str  # one of placement.PLACES


def plan_table(
    store: StateReader,
    views: Iterable[str],
    item_ids: list[str],
    device: torch.device,
    placement: str,
    dtype: torch.dtype | None,
    layer_groups: int | None,
    ranks: Ranks = ALONE,
) -> TablePlan:
    """Plan the table of `load_table`. Raises InputError for a view that is missing or a placement that does not fit.

    ranks: that read equal descriptions of the views.
    """
    names = list(views)
    descriptions = [store.view(name) for name in names]
    dtypes = [dtype or getattr(torch, view["dtype"]) for view in descriptions]
    positions = [group_positions(name, view, layer_groups) for name, view in zip(names, descriptions)]
    shapes = [(len(item_ids) + 1, *selected_shape(view, layers)) for view, layers in zip(descriptions, positions)]
    size = sum(math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, dtypes))
    where = place("feature table", placement, size, device, "in the store's file", ranks)
    return TablePlan(names, positions, dtypes, shapes, size, where)


def selected_shape(view: dict[str, Any], positions: list[int] | None) -> ViewShape:
    """Return the shape of a stored view with the layers at `positions`; None for all its layers."""
    return ViewShape(len(view["layers"] if positions is None else positions), view["width"])
