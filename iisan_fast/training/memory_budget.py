"""Plan the memory of a run's batches before the first one, and explain a lack of memory in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import TUNING_METHODS, RunConfig, TrainConfig
from ..data import Negatives, Sequences, padded_shape
from ..errors import InputError
from ..models import EncodingPlan, Recommender
from ..ranks import ALONE, Ranks
from ..states import ItemSource, free_memory, size_text, usable_memory

LOGGER = logging.getLogger(__name__)
STATE_COPIES = 3  # of a batch's states, 4 bytes for an element: the states, and the towers' results
SCORE_COPIES = {"cpu": 1, "cuda": 0}  # of a cross-entropy, 4 bytes for a score; the form on CUDA stores none
BINARY_SCORE_COPIES = 5  # of a binary cross-entropy: scores, their softplus, weights, products, gradients


class MemoryBudget:
    """An estimate of the memory of a run's largest batches, and the plan for encoding them."""

    def __init__(
        self,
        config: RunConfig,
        sequences: Sequences,
        source: ItemSource,
        model: Recommender,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        """Estimate the memory. For trained encoders, choose and log how many items they encode at a time.

        sequences: the histories that are trained on, with reversed ones if there are any. ranks: those that share out
        each batch; the estimate is of one of them, and all encode as many items at a time. Raises InputError if one
        item does not fit, or the columns of a loss that takes others than the batch's items.
        """
        self.device = device
        self.ranks = ranks
        self.users = config.train.batch_users
        negatives = Negatives.of(config.train)
        is_local = config.train.negatives == "local"
        users = ranks.block_size(self.users) if is_local else self.users  # whose items are one batch
        self.items = min(users * (sequences.max_inputs + 1), source.rows - 1)
        if not negatives.in_batch:
            shape = padded_shape(sequences, self.users, negatives, ranks)
            self.items = min(shape.distinct, source.rows - 1)
        self._encoded = self.items if is_local else ranks.block_size(self.items)  # items that a rank encodes
        self.encoding: EncodingPlan | None = None
        if config.model.method in TUNING_METHODS:
            self.encoding = self._plan_encoding(config, source, model)
            self.estimate = self.encoding.estimate
        else:
            self.estimate = 4 * STATE_COPIES * self._encoded * _numbers_of_an_item(config, source)
        self.lower = "batch_users"
        if not negatives.in_batch:
            ranks.all_do(lambda: self._add_scores(config.train, shape.rows, model))

    @contextmanager
    def refuse_lack_of_memory(self) -> Iterator[None]:
        """Turn a lack of memory inside the context into an InputError of one line: what takes it, and what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is raised for CUDA only
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
            if not known:
                raise
            largest = "states"
            lower = self.lower
            if self.encoding is not None:
                largest = "activations"
                lower = f"items_at_once or {lower}, or set checkpointing"
            raise InputError(
                f"not enough memory on {self.device} for batches of {self.users} users and up to {self.items} items, "
                f"whose {largest} take up to {size_text(self.estimate)} by estimate; lower {lower}, or try "
                "table: pinned"
            ) from error

    def _add_scores(self, train: TrainConfig, rows: int, model: Recommender) -> None:
        """Add the scores of a loss over many items to the estimate. Raises InputError if they do not fit.

        rows: of the largest batch.
        """
        copies = SCORE_COPIES[self.device.type] if model.binary_loss is None else BINARY_SCORE_COPIES
        of_items = self.estimate
        self.estimate += 4 * copies * rows * self.items
        self.lower = "batch_users, or choose sampled:N" if train.loss == "full" else "batch_users or N"
        free = self._of_this_rank(free_memory(self.device))
        if free is not None and self.estimate > free:
            remedy = "choose sampled:N" if train.loss == "full" and of_items > free else f"lower {self.lower}"
            raise InputError(
                f"loss: {train.loss} compares up to {rows} rows with {self.items} items a step, which takes "
                f"{size_text(self.estimate)} by estimate, found {size_text(free)} free on {self.device}; {remedy}"
            )

    def _plan_encoding(self, config: RunConfig, source: ItemSource, model: Recommender) -> EncodingPlan:
        """Choose the parts in which trained encoders encode a batch, set them, and return the plan."""
        usable = self._of_this_rank(usable_memory(self.device))
        free = sys.maxsize if usable is None else usable
        arguments = source.largest, self._encoded, free
        plan = self.ranks.all_do(lambda: model.item_encoder.plan(*arguments, config.uncached.items_at_once))
        agreed = min(self.ranks.from_all(plan.items_at_once))
        if agreed < plan.items_at_once:  # another rank has less memory
            plan = model.item_encoder.plan(*arguments, agreed)
        source.part_items = min(source.part_items, plan.items_at_once)
        twice = ", each part twice" if plan.recompute else ""
        LOGGER.info(
            f"encoders: up to {self._encoded} items a batch, {source.part_items} at a time{twice}; "
            f"activations of up to {size_text(plan.estimate)}"
        )
        return plan

    def _of_this_rank(self, memory: int | None) -> int | None:
        """Return this rank's part of a device's memory in bytes: the ranks of a machine share its CPU's."""
        shared = self.device.type == "cpu" and memory is not None
        return memory // self.ranks.on_this_machine if shared else memory


def _numbers_of_an_item(config: RunConfig, source: ItemSource) -> int:
    """Return how many numbers of an item's states a step takes: those of all kept layers, or of the last for frozen."""
    if config.model.method == "frozen":
        return sum(width for _, width in source.shapes)
    return sum(layers * width for layers, width in source.shapes)
