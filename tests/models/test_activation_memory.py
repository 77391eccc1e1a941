"""Check the bytes of activations against sums by hand, and plans at their limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from iisan_fast.errors import InputError
from iisan_fast.models.activation_memory import EncodingPlan, Footprint, activation_bytes, plan_parts

FLOAT = 4


def test_what_operations_keep_counts_once_and_weights_do_not():
    linear = nn.Linear(8, 3)
    x = torch.randn(5, 8)
    assert activation_bytes(lambda: linear(x).relu(), linear.parameters()) == (5 * 8 + 5 * 3) * FLOAT
    assert activation_bytes(lambda: linear(x).sum() + linear(x[1:]).sum(), linear.parameters()) == 5 * 8 * FLOAT
    y = torch.randn(5, 8, requires_grad=True)
    assert activation_bytes(lambda: linear(y), linear.parameters()) == 5 * 8 * FLOAT
    assert activation_bytes(lambda: linear(y)) == (5 * 8 + 8 * 3) * FLOAT
    linear.requires_grad_(False)
    assert activation_bytes(lambda: linear(x).relu(), linear.parameters()) == 0


def test_of_a_checkpoint_the_inputs_alone_are_kept():
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 2))
    x = torch.randn(5, 8)
    whole = activation_bytes(lambda: model(x), model.parameters())
    assert whole == 5 * (8 + 30) * FLOAT
    stored_bytes = activation_bytes(lambda: checkpoint(model, x, use_reentrant=False), model.parameters())
    assert stored_bytes == 5 * 8 * FLOAT


def test_without_a_device_the_bytes_are_the_same():
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 2)).to("meta")
    x = torch.empty(5, 8, device="meta")
    assert activation_bytes(lambda: model(x), model.parameters()) == 5 * (8 + 30) * FLOAT


def test_all_items_at_once_where_they_fit():
    views = [Footprint(10, 3), Footprint(0, 2)]
    assert plan_parts(views, items=4, free=30) == EncodingPlan(4, False, 30)


def test_else_as_many_as_fit_of_the_view_that_takes_most():
    views = [Footprint(10, 3), Footprint(0, 2)]
    assert plan_parts(views, items=4, free=29) == EncodingPlan(4, True, 22)
    assert plan_parts(views, items=4, free=19) == EncodingPlan(3, True, 19)
    assert plan_parts(views, items=4, free=13) == EncodingPlan(1, True, 13)


def test_frozen_views_take_nothing():
    assert plan_parts([Footprint(0, 0), Footprint(0, 0)], items=7, free=0) == EncodingPlan(7, False, 0)
    assert plan_parts([Footprint(0, 0), Footprint(0, 2)], items=7, free=6) == EncodingPlan(3, True, 6)


def test_too_little_for_one_item_is_an_error():
    with pytest.raises(InputError, match=r"one item's activations take 3\.00 GiB, 2\.00 GiB are free; choose gradient"):
        plan_parts([Footprint(2**30, 2**31)], items=4, free=2**31)
    with pytest.raises(InputError, match=r"0\.00 GiB are free"):
        plan_parts([Footprint(2**30, 2**31)], items=4, free=-5)
