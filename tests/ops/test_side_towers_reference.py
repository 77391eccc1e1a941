"""The reference of the towers by hand and by finite differences."""

from __future__ import annotations

import pytest
import torch

from iisan_fast import kernels
from iisan_fast.kernels.reference import side_towers as towers_reference


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("inter", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_side_tower_gradients(gated, inter, activation):
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    arguments = [leaf(3, 2, 4), leaf(3, 2, 4) if inter else None, leaf(2) if gated else None]
    arguments += [leaf(2, 3, 4), leaf(2, 3), leaf(2, 4, 3), leaf(2, 4)]
    assert torch.autograd.gradcheck(lambda *a: towers_reference.side_tower(*a, activation), arguments)


def test_side_tower_by_hand():
    """Check one layer of width 1: the gate at 0 halves the input, then x + up * relu(down * x + b) + c."""
    one = torch.ones(1, 1, dtype=torch.float64)
    out = towers_reference.side_tower(
        torch.tensor([[[4.0]]], dtype=torch.float64),
        None,
        torch.zeros(1, dtype=torch.float64),
        3 * one[None],
        5 * one,
        7 * one[None],
        11 * one,
    )
    assert out.item() == 2 + 7 * (3 * 2 + 5) + 11


def test_side_towers_gradients():
    """Check two towers at once, one over rows of a table, one over both views with the second differentiable."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    table = leaf(4, 2, 3).detach()
    rows = torch.tensor([3, 0, 3])
    dense = leaf(3, 2, 3)
    shapes = [(2,), (2, 5, 3), (2, 5), (2, 3, 5), (2, 3)]
    leaves = [leaf(*shape) for _ in range(2) for shape in shapes]

    def towers(dense, *parameters):
        states = [kernels.States(table, rows), kernels.States(dense)]
        both = [kernels.Tower((0,), *parameters[:5]), kernels.Tower((0, 1), *parameters[5:])]
        return tuple(kernels.side_towers(states, both))

    assert torch.autograd.gradcheck(towers, (dense, *leaves))
