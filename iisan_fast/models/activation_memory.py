"""How much memory a forward pass keeps for its backward pass, and how many items fit into what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import InputError


class Footprint(NamedTuple):
    """Bytes that one view's encoder takes for N items at once: fixed + each * N."""

    fixed: int
    each: int

    def of(self, items: int) -> int:
        """Bytes of that many items."""
        return self.fixed + self.each * items


class EncodingPlan(NamedTuple):
    """How a batch is encoded."""

    items_at_once: int
    recompute: bool  # whether a part's encoding is computed again in the backward pass, and meanwhile keeps nothing
    estimate: int  # bytes of the activations alive at a time


def plan_parts(views: list[Footprint], items: int, free: int, items_at_once: int | None = None) -> EncodingPlan:
    """All items at once where `free` bytes hold the activations of every view; else parts, one part's at a time. Or
    parts of `items_at_once`, whatever is free.

    Raises InputError where the free bytes do not hold one item's.
    """
    whole = sum(view.of(items) for view in views)
    fits = whole <= free if items_at_once is None else items_at_once >= items
    if fits:
        return EncodingPlan(items, False, whole)
    fitting = items_at_once or min([items, *((free - view.fixed) // view.each for view in views if view.each)])
    if fitting < 1:
        needed = max(view.of(1) for view in views)
        raise InputError(
            f"memory: one item's activations take {needed / 2**30:.2f} GiB, {max(free, 0) / 2**30:.2f} GiB are free; "
            "choose gradient checkpointing, bfloat16, smaller encoders or a method that trains less"
        )
    return EncodingPlan(fitting, True, max(view.of(fitting) for view in views))


def activation_bytes(function: Callable[[], Any], weights: Iterable[Tensor] = ()) -> int:
    """Bytes kept for the backward pass by what function() returns; `weights`, kept anyway, do not count.

    What several operations keep counts once. Of what torch.utils.checkpoint computes, only its inputs are kept.
    """
    held = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()  # named, so that no storage is freed and its place taken by another meanwhile
    total = sum(kept.values())
    del result
    return total
