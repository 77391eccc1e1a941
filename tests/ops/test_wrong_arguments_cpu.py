"""Each tensor of each op's arguments in turn gets another size, layout, dtype or range: C++ never reads outside of one.

`make sanitize` runs this with AddressSanitizer. Without it, a call that is not refused has to give finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as trees

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.kernels import (
    AdamState,
    AddedScores,
    Chain,
    SequenceDropout,
    SequenceGrid,
    SequenceWeights,
    States,
    Tower,
)

pytestmark = needs_compiler

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda tensor: tensor[:-1],
    "a column less": lambda tensor: tensor[..., :-1],
    "twice the rows": lambda tensor: torch.cat([tensor, tensor]),
    "no rows": lambda tensor: tensor[:0],
    "another dtype": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.short(),
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "apart in memory": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "indices larger by 1": lambda tensor: tensor if tensor.is_floating_point() else tensor + 1,
    "indices smaller by 1": lambda tensor: tensor if tensor.is_floating_point() else tensor - 1,
    "indices far larger": lambda tensor: tensor if tensor.is_floating_point() else tensor + 2**14,
}


class Case(NamedTuple):
    """An op, and arguments that fit together."""

    run: Callable[..., Any]
    arguments: list[Any]


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) / 4


def tower() -> Tower:
    return Tower((0, 1), random(2), random(2, 16, 20), random(2, 16), random(2, 20, 16), random(2, 20))


def weights() -> SequenceWeights:
    block = [*(random(16, 16) for _ in range(4)), random(16), random(16), random(32, 16), random(32), random(16, 32)]
    return SequenceWeights([random(5, 16), *(random(16) for _ in "ab"), *block, *(random(16) for _ in "abc")], 2, 1e-6)


def adam(states: list[AdamState], gradients: list[Tensor]) -> list[AdamState]:
    kernels.adam(states, form="cpu")(gradients, [0.1], (0.9, 0.999), 1e-8)
    return states


def ranks_with_added(*arguments: Any, form: str) -> tuple[Tensor, Tensor]:
    *tensors, added = arguments
    return kernels.target_rank(*tensors, form=form, added=added)


def best_with_added(*arguments: Any, form: str) -> tuple[Tensor, Tensor]:
    queries, items, count, excluded, added = arguments
    return kernels.top_items(queries, items, count, excluded, form=form, added=added)


def cases() -> dict[str, Case]:
    views = [States(random(9, 2, 20), torch.tensor([8, 0, 3])), States(random(4, 2, 20), torch.tensor([3, 3, 0]))]
    grid = SequenceGrid(torch.tensor([0, 1, 2, 3, 4, 8, 9, 14]), 3, 5)
    users, bits = torch.tensor([0, 1, 1]), torch.tensor([[5, 0], [0, 7]], dtype=torch.int32)
    moments = AdamState(random(7, 5), random(7, 5), random(7, 5), torch.zeros(()))
    loss = [random(3, 16), random(40, 16), torch.tensor([39, 0, 7]), users, bits, random(40), random(40), "none"]
    ranks = [random(3, 16), random(40, 16), torch.tensor([39, 0, 7]), torch.tensor([[1, -1], [39, 3], [-1, -1]])]
    added = AddedScores(torch.tensor([0, 2, 2, 5]), torch.tensor([1, 39, 0, 7, 8]), random(5))
    return {
        "side_towers": Case(kernels.side_towers, [views, [tower(), tower()], "relu", [random(9, 20), random(9, 20)]]),
        "fold_heads": Case(
            kernels.fold_heads, [[Chain(random(16, 5), random(5, 7), random(5), random(7, 32), random(7))]]
        ),
        "sequence_encoder": Case(
            kernels.sequence_encoder,
            [random(8, 16), weights(), grid, SequenceDropout(5, 1 << 30, 1.3, torch.arange(3))],
        ),
        "last_states": Case(kernels.last_states, [random(8, 16), weights(), grid]),
        "inbatch_cross_entropy": Case(kernels.inbatch_cross_entropy, loss),
        "target_rank": Case(kernels.target_rank, ranks),
        "target_rank with added scores": Case(ranks_with_added, [*ranks, added]),
        "top_items": Case(best_with_added, [*ranks[:2], 5, ranks[3], added]),
        "adam": Case(adam, [[moments], [random(7, 5)]]),
    }


def changed(arguments: list[Any], change: Callable[[Tensor], Tensor], trained: bool) -> Iterator[list[Any]]:
    """Yield the arguments with one tensor changed, for each tensor; trained: matrices get gradients."""
    leaves, layout = trees.tree_flatten(arguments)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.dim():
            copies = [value.clone() if isinstance(value, Tensor) else value for value in leaves]
            copies[i] = change(copies[i])
            for j, value in enumerate(copies if trained else ()):
                if isinstance(value, Tensor) and value.is_floating_point() and leaves[j].dim() == 2:
                    copies[j] = value.detach().requires_grad_()
            yield trees.tree_unflatten(copies, layout)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", cases())
def test_arguments_that_do_not_fit_are_refused_or_computed(name, trained, change):
    run, arguments = cases()[name]
    form = {} if name == "adam" else {"form": "cpu"}
    refused = 0
    for case in changed(arguments, CHANGES[change], trained and name not in ("adam", "last_states")):
        try:
            outputs = [output for output in trees.tree_leaves(run(*case, **form)) if isinstance(output, Tensor)]
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert all(output.isfinite().all() for output in outputs)
        if recorded := [output.square().sum() for output in outputs if output.requires_grad]:
            torch.stack(recorded).sum().backward()
            gradients = [leaf.grad for leaf in trees.tree_leaves(case) if isinstance(leaf, Tensor) and leaf.is_leaf]
            assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    without_indices = change.startswith("indices") and name in ("fold_heads", "adam")
    assert refused or without_indices or change in ("apart in memory", "transposed")
