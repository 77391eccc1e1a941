"""Check the layers that a view selects: the default, groups, and lists that are refused."""

from __future__ import annotations

import pytest

from helpers.encoders import (
    view,
)
from iisan_fast.encoders.layer_selection import default_layers, grouped_layers
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError


@pytest.mark.parametrize(
    ("depth", "layers"), [(13, (0, 2, 4, 6, 8, 10, 12)), (7, (0, 2, 4, 6)), (6, (0, 1, 3, 5)), (1, (0,))]
)
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


def test_layer_groups_keep_the_last_block_of_each_and_the_embedding():
    assert grouped_layers(12, 2) == (0, 6, 12) and grouped_layers(12, 3) == (0, 4, 8, 12)
    assert grouped_layers(12, 4) == (0, 3, 6, 9, 12) and grouped_layers(12, 6) == (0, 2, 4, 6, 8, 10, 12)
    assert grouped_layers(12, 12) == tuple(range(13)) and grouped_layers(5, 3) == (0, 1, 3, 5)


@pytest.mark.parametrize("groups", [0, 13])
def test_groups_beyond_the_blocks_are_refused(groups):
    with pytest.raises(InputError, match=f"layer_groups: expected 1 to 12, the encoder's blocks, found {groups}"):
        grouped_layers(12, groups)


@pytest.mark.parametrize("layers", [(0, 5), (-1, 2), (2, 0), (1, 1), ()])
def test_layers_out_of_range_or_order_are_refused(built, layers):
    with pytest.raises(InputError, match=r"layers: expected ascending numbers within 0\.\.4, found"):
        load_backbone(view(built("title", "bert"), layers=layers))
