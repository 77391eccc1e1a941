"""Check heads on final states, and vectors by item number, against computation by hand."""

from __future__ import annotations

import pytest
import torch

from helpers.tables import random_table
from iisan_fast.kernels import States
from iisan_fast.models.item_encoders import FinalHeads, FrozenItemEncoder, IdItemEncoder
from iisan_fast.training.item_sources import item_numbers

D = 8


def test_heads_by_hand():
    heads = FinalHeads([6, 4], D)
    states = [torch.randn(3, 6), torch.randn(3, 4)]
    outputs = [torch.nn.functional.gelu(x @ head[0].weight.T + head[0].bias) for head, x in zip(heads.views, states)]
    expected = torch.cat(outputs, dim=1) @ heads.fusion.weight.T + heads.fusion.bias
    torch.testing.assert_close(heads(states), expected)
    assert FinalHeads([6], D).fusion.weight.shape == (D, D)


def test_frozen_states_are_read_from_the_last_layer():
    tables = random_table([(3, 6), (2, 4)], items=9, dtype=torch.float32)
    encoder = FrozenItemEncoder([6, 4], D)
    numbers = torch.tensor([7, 2, 9])
    expected = encoder.heads([tables.views[0][numbers, 2], tables.views[1][numbers, 1]])
    assert torch.equal(encoder(tables.read(numbers)), expected)
    assert list(encoder.parameter_groups()) == ["heads"]


def test_item_numbers_have_vectors_of_their_own():
    encoder = IdItemEncoder(1000, D)
    source = item_numbers(1000, torch.device("cpu"))
    numbers = torch.tensor([3, 1, 1000, 0, 0])
    read = source.read(numbers)
    assert torch.equal(encoder(read), encoder.embedding.weight[numbers])
    assert torch.equal(encoder([States(read[0].table[numbers])]), encoder(read))  # as captured steps read it
    assert encoder.embedding.weight.std().item() == pytest.approx((2 / (1001 + D)) ** 0.5, rel=0.05)
    (weight,) = encoder.parameter_groups()["item_embeddings"]
    encoder(read).sum().backward()
    assert weight.grad.sum(dim=1).tolist() == [2.0 * D, D, 0, D, *[0] * 996, D]
