"""Estimate the memory that activations take in a forward pass, and how many items fit into the free memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import InputError


class Footprint(NamedTuple):
    """The bytes that one view's encoder needs for the activations of N items at a time: fixed + per_item * N."""

    fixed: int
    per_item: int

    def of(self, items: int) -> int:
        """Return the bytes for this many items at a time."""
        return self.fixed + self.per_item * items


class EncodingPlan(NamedTuple):
    """The number of items of an encoder call, and the memory that the activations of a batch take."""

    items_at_once: int  # the most items of one encoder call
    recompute: bool  # True: the backward pass encodes each part again, so that no activations are stored
    estimate: int  # the most bytes of activations at a time


def plan_parts(views: list[Footprint], items: int, free: int, items_at_once: int | None = None) -> EncodingPlan:
    """Plan how `items` items are encoded with `free` bytes for activations.

    All items are encoded together if the activations of all views fit. If not, they are encoded in parts as large as
    fit, and each part is encoded again in the backward pass. items_at_once: the size of the parts, without regard to
    `free`; None to choose it. Raises InputError if it is None and the activations of one item do not fit.
    """
    whole = sum(view.of(items) for view in views)
    fits = whole <= free if items_at_once is None else items_at_once >= items
    if fits:
        return EncodingPlan(items, False, whole)
    fitting = items_at_once or min([items, *((free - view.fixed) // view.per_item for view in views if view.per_item)])
    if fitting < 1:
        needed = max(view.of(1) for view in views)
        raise InputError(
            f"memory: one item's activations take {needed / 2**30:.2f} GiB, {max(free, 0) / 2**30:.2f} GiB are free; "
            "choose gradient checkpointing, bfloat16, smaller encoders or a method that trains less"
        )
    return EncodingPlan(fitting, True, max(view.of(fitting) for view in views))


def activation_bytes(function: Callable[[], Any], weights: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors that function() stores for its backward pass.

    A storage that several operations keep counts once. weights: tensors whose storage does not count. Inside
    torch.utils.checkpoint only the inputs are stored.
    """
    weight_storages = {tensor.untyped_storage()._cdata for tensor in weights}
    stored_bytes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weight_storages:
            stored_bytes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()  # keep the result, so that no storage is freed and its address used again
    total = sum(stored_bytes.values())
    del result
    return total
