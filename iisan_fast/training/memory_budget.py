"""Plan the memory of a run's batches before the first one, and explain a lack of memory in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import TUNING_METHODS, RunConfig
from ..data import Sequences
from ..errors import InputError
from ..models import EncodingPlan, Recommender
from ..states import ItemSource, size_text, usable_memory

LOGGER = logging.getLogger(__name__)
STATE_COPIES = 3  # of a batch's states, 4 bytes for an element: the states, and the towers' results


class MemoryBudget:
    """An estimate of the memory of a run's largest batches, and the plan for encoding them."""

    def __init__(
        self, config: RunConfig, sequences: Sequences, source: ItemSource, model: Recommender, device: torch.device
    ) -> None:
        """Estimate the memory. For trained encoders, choose and log how many items they encode at a time.

        Raises InputError if one item does not fit.
        """
        self.device = device
        self.users = config.train.batch_users
        self.items = min(self.users * (sequences.max_inputs + 1), source.rows - 1)
        self.encoding: EncodingPlan | None = None
        if config.model.method in TUNING_METHODS:
            self.encoding = self._plan_encoding(config, source, model)
            self.estimate = self.encoding.estimate
        else:
            self.estimate = 4 * STATE_COPIES * self.items * sum(layers * width for layers, width in source.shapes)

    @contextmanager
    def refuse_lack_of_memory(self) -> Iterator[None]:
        """Turn a lack of memory inside the context into an InputError of one line: what takes it, and what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is raised for CUDA only
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
            if not known:
                raise
            largest, lower = "states", "batch_users"
            if self.encoding is not None:
                largest, lower = "activations", "items_at_once or batch_users, or set checkpointing"
            raise InputError(
                f"not enough memory on {self.device} for batches of {self.users} users and up to {self.items} items, "
                f"whose {largest} take up to {size_text(self.estimate)} by estimate; lower {lower}, or try "
                "table: pinned"
            ) from error

    def _plan_encoding(self, config: RunConfig, source: ItemSource, model: Recommender) -> EncodingPlan:
        """Choose the parts in which trained encoders encode a batch, set them, and return the plan."""
        usable = usable_memory(self.device)
        free = sys.maxsize if usable is None else usable
        plan = model.item_encoder.plan(source.largest, self.items, free, config.uncached.items_at_once)
        source.part_items = min(source.part_items, plan.items_at_once)
        twice = ", each part twice" if plan.recompute else ""
        LOGGER.info(
            f"encoders: up to {self.items} items a batch, {source.part_items} at a time{twice}; "
            f"activations of up to {size_text(plan.estimate)}"
        )
        return plan
