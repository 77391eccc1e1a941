"""The gradients of ops in fp64, and the relative error of a form's gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels import States, Tower

EXACT_ITEMS = 2048  # items whose towers are computed in fp64 at a time
EXACT_LOGITS = 1 << 26  # logits held in fp64 at a time

side_towers_reference = functools.partial(kernels.side_towers, form="reference")
row_losses_reference = functools.partial(kernels.inbatch_cross_entropy, reduction="none", form="reference")


def gradient_error(gradients: Sequence[Tensor], truth: Callable[[], list[Tensor]]) -> float | None:
    """Return ||g - g64|| / ||g64|| over all gradients together, or None if fp64 does not fit into memory."""
    try:
        exact = truth()
    except torch.OutOfMemoryError:
        return None
    apart = sum(float((ours.double() - best).square().sum()) for ours, best in zip(gradients, exact))
    return math.sqrt(apart / sum(float(best.square().sum()) for best in exact))


def exact_side_network(states: list[States], towers: list[Tower], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradients of the towers' parameters by the reference in fp64, computed for parts of the items."""
    parameters = [[value.detach().double().requires_grad_() for value in tower[1:]] for tower in towers]
    doubles = [Tower(tower.views, *values) for tower, values in zip(towers, parameters)]
    leaves = [value for values in parameters for value in values]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for part in torch.arange(len(upstream[0]), device=upstream[0].device).split(EXACT_ITEMS):
        views = [States(view.table[view.rows[part]].double()) for view in states]
        outputs = side_towers_reference(views, doubles)
        for sum_, gradient in zip(total, torch.autograd.grad(outputs, leaves, [g[part].double() for g in upstream])):
            sum_ += gradient
    return total


def exact_loss(queries: Tensor, items: Tensor, targets: Tensor, **corrections: Tensor) -> list[Tensor]:
    """Return the gradients of queries and items by the reference in fp64, computed for parts of the rows."""
    corrections = {name: value.double() if value.is_floating_point() else value for name, value in corrections.items()}
    row_users = corrections.pop("row_users", None)
    vectors = items.detach().double().requires_grad_()
    of_queries = []
    of_items = torch.zeros_like(vectors)
    for part in torch.arange(len(queries), device=queries.device).split(max(1, EXACT_LOGITS // len(items))):
        part_queries = queries.detach()[part].double().requires_grad_()
        users = None if row_users is None else row_users[part]
        loss = row_losses_reference(part_queries, vectors, targets[part], users, **corrections).sum() / len(queries)
        gradients = torch.autograd.grad(loss, (part_queries, vectors))
        of_queries.append(gradients[0])
        of_items += gradients[1]
    return [torch.cat(of_queries), of_items]
