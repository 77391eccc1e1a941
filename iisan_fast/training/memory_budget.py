"""What a run's batches ask of the memory: planned before the first, and told where it does not suffice."""

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
from ..states import DEVICE_SHARE, HOST_SHARE, ItemSource, free_memory, size_text

LOGGER = logging.getLogger(__name__)
STATE_COPIES = 3  # of a batch's states, in four bytes an element: as read, and what the towers make of them


class Demand:
    """A run's largest batches: how trained encoders take them, and what else is estimated of them."""

    def __init__(
        self, config: RunConfig, sequences: Sequences, source: ItemSource, model: Recommender, device: torch.device
    ) -> None:
        """Decides how many items a trained encoder takes at a time, and says so."""
        self.device, self.users = device, config.train.batch_users
        self.items = min(self.users * (sequences.max_inputs + 1), source.rows - 1)
        self.plan: EncodingPlan | None = None
        self.tuned = config.model.method in TUNING_METHODS
        if self.tuned:
            self.plan = self._planned(config, source, model)
            self.estimate = self.plan.estimate
        else:
            self.estimate = 4 * STATE_COPIES * self.items * sum(layers * width for layers, width in source.shapes)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns the lack of memory into one line (InputError) that says for what, and what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch's own type is for CUDA alone
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
            if not known:
                raise
            kept, lower = "states", "--batch-users"
            if self.tuned:
                kept, lower = "activations", "--items-at-once or --batch-users, or give --checkpointing"
            raise InputError(
                f"not enough memory on {self.device} for batches of {self.users} users and up to {self.items} items, "
                f"whose {kept} take up to {size_text(self.estimate)} by estimate; lower {lower}, or try --table pinned"
            ) from error

    def _planned(self, config: RunConfig, source: ItemSource, model: Recommender) -> EncodingPlan:
        free = free_memory(self.device)
        share = DEVICE_SHARE if self.device.type == "cuda" else HOST_SHARE
        room = sys.maxsize if free is None else int(share * free)
        plan = model.item_encoder.plan(source.largest, self.items, room, config.uncached.items_at_once)
        source.part_items = min(source.part_items, plan.items_at_once)
        again = ", each part twice" if plan.recompute else ""
        LOGGER.info(
            f"encoders: up to {self.items} items a batch, {source.part_items} at a time{again}; "
            f"activations of up to {size_text(plan.estimate)}"
        )
        return plan
