"""Store the states of a model's views, several batches in one transaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .encoder_inputs import EncoderBatch
from .store import Store

GROUP_ITEMS = 1024
GROUP_BYTES = 32 << 20  # a transaction ends at one of these; a killed run loses only one


class StateWriter:
    """Collects the states of a job's views, and stores several batches in one transaction.

    A transaction holds the states of all views of an item, so the views stay together if the extraction is stopped.
    Leaving the context stores the rest.
    """

    def __init__(self, store: Store, views: list[str], dtype: torch.dtype, item_ids: list[str]) -> None:
        """Take the store, the names of the job's views, the dtype of the states, and the ids of the catalogue."""
        self.store = store
        self.views = views
        self.dtype = dtype
        self.item_ids = item_ids
        # Of each batch: rows, digests, and the states of each view.
        self.pending: list[tuple[Sequence[int], list[bytes], list[Tensor]]] = []

    def __enter__(self) -> StateWriter:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Store the collected states."""
        self._flush()

    def add(self, batch: EncoderBatch, states_by_view: Sequence[Tensor]) -> None:
        """Add a batch with the states [N, K, D] of each view, on any device.

        Raises InputError if a state that is stored in this call is not finite.
        """
        self.pending.append((batch.rows, batch.digests, [states.to(self.dtype) for states in states_by_view]))
        items = sum(len(rows) for rows, *_ in self.pending)
        size = sum(states.nbytes for *_, by_view in self.pending for states in by_view)
        if items >= GROUP_ITEMS or size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Store the collected states that are finite, then raise InputError if others are not."""
        if not self.pending:
            return
        ids = [self.item_ids[row] for rows, *_ in self.pending for row in rows]
        digests = [digest for _, batch_digests, _ in self.pending for digest in batch_digests]
        parts_by_view = zip(*(by_view for *_, by_view in self.pending))
        states_by_view = {view: torch.cat(parts) for view, parts in zip(self.views, parts_by_view)}
        finite = {view: states.isfinite().flatten(1).all(dim=1).tolist() for view, states in states_by_view.items()}
        good = [index for index, in_views in enumerate(zip(*finite.values())) if all(in_views)]
        if good:
            good_states = {view: states[good] for view, states in states_by_view.items()}
            self.store.write_views([ids[i] for i in good], [digests[i] for i in good], good_states)
        self.pending.clear()
        for view, in_items in finite.items():
            if not all(in_items):
                item_id = ids[in_items.index(False)]
                raise InputError(f"view {view!r}, item {item_id!r}: hidden states are not finite in {self.dtype}")
