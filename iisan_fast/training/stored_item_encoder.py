"""Load the item encoder of a run's best checkpoint alone: it maps hidden states, as a cache stores them, to vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..errors import InputError
from ..kernels import States
from ..models import build_recommender
from ..precision import resolve_precision
from ..states import FeatureTable, StateStatistics, ViewShape, group_positions, load_table, open_states
from .checkpoints import load_weights
from .run_folder import RunFolder
from .run_item_encoder import on_device, stored_statistics

CPU = torch.device("cpu")


class StoredView(NamedTuple):
    """The shape, the dtype and the statistics with which a run reads the states of a view."""

    name: str
    shape: ViewShape  # of the selected layers
    dtype: torch.dtype  # to which states are rounded, before and after they are standardised
    statistics: StateStatistics | None  # None if they are not standardised


class StoredItemEncoder(NamedTuple):
    """An item encoder on the CPU, which reads stored states."""

    module: nn.Module
    views: list[StoredView]

    @torch.inference_mode()
    def vectors(self, states: Sequence[Tensor]) -> Tensor:
        """Return the vectors [N, d] of N items without trained vectors of ids. states: of each view, [N, K, D]."""
        tables = []
        for view, part in zip(self.views, states):
            table = part.to(view.dtype, copy=True)
            if view.statistics is not None:
                view.statistics.standardise(table)
            tables.append(States(table))
        return self.module(tables)


def load_item_encoder(folder: RunFolder, training_counts: np.ndarray) -> StoredItemEncoder:
    """Return the item encoder of a run's best checkpoint, for a method that reads states.

    training_counts: of each item number, int64 [items + 1]. Raises InputError if a file is missing or damaged.
    """
    config = on_device(folder.config, CPU)
    precision = resolve_precision(config, CPU)
    groups = config.model.layer_groups if config.has_states else None
    descriptions = folder.views
    shapes = []
    for name, view in descriptions.items():
        positions = group_positions(name, view, groups)
        shapes.append(ViewShape(len(view["layers"] if positions is None else positions), view["width"]))
    tensors, _ = folder.load_best()
    source = FeatureTable(tuple(torch.empty(1, *shape) for shape in shapes))
    model = build_recommender(source, config, training_counts / training_counts.sum(), precision)
    load_weights(model, tensors, folder.best)
    statistics = stored_statistics(tensors, list(descriptions), folder.best) if config.model.standardise else {}
    views = [
        StoredView(name, shape, precision.table or getattr(torch, view["dtype"]), statistics.get(name))
        for (name, view), shape in zip(descriptions.items(), shapes)
    ]
    return StoredItemEncoder(model.item_encoder.eval(), views)


def stored_states(
    config: RunConfig, encoder: StoredItemEncoder, item_ids: list[str], items_at_once: int
) -> Iterator[list[Tensor]]:
    """Yield the stored states of a run's items in parts, in their dtype: [N, K, D] of each view.

    Raises InputError if the run has no stored states, or if they are missing, damaged or others.
    """
    if not config.has_states:
        raise InputError("the run has no cache and no features")
    groups = config.model.layer_groups
    states = open_states(None if config.cache is None else Path(config.cache), config.features, item_ids)
    with closing(load_table(states, config.views, item_ids, CPU, "mapped", layer_groups=groups)) as table:
        if table.shapes != [view.shape for view in encoder.views]:
            place = config.cache or config.features[0].path
            raise InputError(f"{place}: its views have other layers or widths than those of the run")
        for items in torch.arange(1, table.rows).split(items_at_once):
            yield [states.table for states in table.read(items)]
