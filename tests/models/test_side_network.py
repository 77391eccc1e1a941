"""Check the side network and its heads: published parameter counts, and views that cannot be joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.recommenders import side_recommender
from iisan_fast.config import ModelConfig
from iisan_fast.config.model_section import TOWERS
from iisan_fast.errors import InputError
from iisan_fast.kernels import States
from iisan_fast.models.recommender import Recommender


def build(views, **config) -> Recommender:
    return side_recommender(views, ModelConfig(**config), 10, np.array([0, 0.5, 0.5]), seed=0)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tower(layers, width, bottleneck=64):
    return layers * (2 * width * bottleneck + bottleneck + width + 1)


SASREC = 100_224


def test_iisan_has_the_published_parameter_count():
    assert count(build([(7, 768), (7, 768)])) == 4_113_877


def test_versa_has_the_published_parameter_count():
    assert count(build([(4, 384), (4, 384)], method="iisan-versa")) == 937_868


def test_parameter_counts_follow_the_formula():
    d = 64
    assert count(build([(7, 768)])) == tower(7, 768) + 768 * 769 + 769 * 64 - 64 * 768 + 64 * 768 + d * d + d + SASREC
    wide, narrow, paired = 768, 384, 4
    versa = tower(7, wide) + tower(4, narrow) + tower(paired, narrow) + paired * (wide * narrow + narrow)
    heads = (wide + 1) * d + (narrow + 1) * d + 2 * (d + 1) * d + (narrow + 1) * narrow + (narrow + 1) * d
    expected = versa + heads + (3 * d + 1) * d + SASREC
    assert count(build([(7, wide), (4, narrow)], method="iisan-versa")) == expected
    assert count(build([(4, narrow), (7, wide)], method="iisan-versa")) == expected


@pytest.mark.parametrize("depths", [(2, 6), (6, 2), (5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("widths", [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("bottlenecks", [{}, {"first": 24}, {"first": 24, "second": 12, "inter": 4}], ids=str)
def test_parameter_counts_of_views_of_any_depth_width_and_bottleneck(depths, widths, bottlenecks):
    d = 64
    views = list(zip(depths, widths))
    paired = min(depths)
    narrow = min(widths)
    wide = max(widths)
    towers = {"first": views[0], "second": views[1], "inter": (paired, narrow)}
    expected = sum(tower(*shape, bottlenecks.get(name, 16)) for name, shape in towers.items())
    expected += sum((width + 1) * d + (d + 1) * d for width in widths)  # intra heads
    expected += (narrow + 1) * narrow + (narrow + 1) * d + (3 * d + 1) * d + SASREC
    expected += paired * (wide + 1) * narrow if wide > narrow else 0  # alignment
    assert count(build(views, method="iisan-versa", bottleneck=16, bottlenecks=bottlenecks)) == expected


@pytest.mark.parametrize("depths", [(2, 6), (6, 2), (5, 3)])
@pytest.mark.parametrize("widths", [(12, 8), (8, 12), (8, 8)])
def test_layers_pair_from_the_last_one_backwards(depths, widths):
    """The inter tower reads no layer of the deeper view that comes before the pairs."""
    encoder = build(list(zip(depths, widths)), method="iisan-versa", bottleneck=4).item_encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        for name in ("first", "second"):  # the intra towers give zero
            encoder.heads.get_submodule(name)[0].weight.zero_()
    states = [torch.randn(3, layers, width) for layers, width in zip(depths, widths)]
    before = encoder([States(table) for table in states])
    deep = depths.index(max(depths))
    unpaired = max(depths) - min(depths)
    for layer in range(max(depths)):
        changed = [table.clone() for table in states]
        changed[deep][:, layer] += 1
        unchanged = torch.equal(encoder([States(table) for table in changed]), before)
        assert unchanged == (layer < unpaired)


def test_towers_of_their_own_bottleneck_have_the_counts_of_their_formulas():
    """The bottlenecks are published for MicroLens: 512 in the image tower, 64 in the others."""
    whole = 4_113_877
    towers = tower(7, 768, 512) - tower(7, 768)
    assert count(build([(7, 768)] * 2, bottlenecks={"first": 512})) == whole + towers
    assert count(build([(7, 768)] * 2, bottleneck=8, bottlenecks={name: 64 for name in TOWERS})) == whole


def test_without_a_tower_or_gates():
    whole = 4_113_877
    tower_and_heads = tower(7, 768) + 768 * 769 + 769 * 64
    assert count(build([(7, 768)] * 2, gates=False)) == whole - 21
    assert count(build([(7, 768)] * 2, inter=False)) == whole - tower_and_heads - 64 * 64
    assert count(build([(7, 768)] * 2, intra=False)) == whole - 2 * tower_and_heads - 2 * 64 * 64


def test_sanbs_of_fewer_parameters_have_the_counts_of_their_formulas():
    tower_matrices = 2 * 7 * 768 * 64
    whole = 4_113_877
    phm = 2 * 7 * (4**3 + 768 * 64 // 4)
    assert count(build([(7, 768)] * 2, sanb="phm")) == whole - 3 * tower_matrices + 3 * phm
    low_rank = 2 * 7 * (768 + 64)
    assert count(build([(7, 768)] * 2, sanb="low-rank")) == whole - 3 * tower_matrices + 3 * low_rank


@pytest.mark.parametrize("sanb", ["phm", "low-rank"])
def test_composed_matrices_are_what_their_names_say_and_start_as_small(sanb):
    tower = build([(3, 96)], sanb=sanb, bottleneck=48).item_encoder.side_network.first
    view = tower.reading(0)
    assert view.down_weight.shape == (3, 48, 96) and view.up_weight.shape == (3, 96, 48)
    assert 0.005 < view.down_weight.std() < 0.02
    if sanb == "phm":
        rules, parts = tower.down_weight.rules[1], tower.down_weight.parts[1]
        expected = sum(torch.kron(rule, part) for rule, part in zip(rules, parts))
        torch.testing.assert_close(view.down_weight[1], expected)
    else:
        assert (torch.linalg.matrix_rank(view.down_weight) == 1).all()


def test_phm_needs_sizes_that_it_can_divide():
    with pytest.raises(InputError, match="sanb: phm needs bottlenecks that 4 divides, found 6"):
        build([(2, 8)], sanb="phm", bottleneck=6)
    with pytest.raises(InputError, match="phm needs a bottleneck and widths that are multiples of 4, found 8 and 6"):
        build([(2, 6)], sanb="phm", bottleneck=8)


ABLATIONS = [
    {"gates": False},
    {"inter": False},
    {"intra": False},
    {"sanb": "phm"},
    {"sanb": "low-rank"},
    {"activation": "gelu"},
    {"bottlenecks": {"first": 4, "inter": 12}},
]


@pytest.mark.parametrize("change", ABLATIONS, ids=str)
def test_every_parameter_of_an_ablation_learns(change):
    model = build([(2, 16), (2, 16)], bottleneck=8, embedding_dim=8, **change)
    states = [States(torch.randn(5, 2, 16)) for _ in range(2)]
    with torch.no_grad():
        for parameter in model.item_encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.item_encoder(states).square().sum().backward()
    for name, parameter in model.item_encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_iisan_refuses_views_of_unequal_shape():
    with pytest.raises(InputError, match="choose iisan-versa"):
        build([(7, 768), (4, 768)])
    with pytest.raises(InputError, match="choose iisan-versa"):
        build([(4, 768), (4, 384)])


def test_one_view_needs_its_intra_tower():
    with pytest.raises(InputError, match="one view"):
        build([(4, 384)], intra=False)


def test_parameter_groups_cover_everything_once():
    groups = build([(5, 48), (3, 32)], method="iisan-versa").parameter_groups()
    assert list(groups) == ["adapters", "gates", "heads", "sequence_encoder"]
    assert [len(group) for group in groups.values()] == [12, 3, 2 + 12 + 2, 1 + 2 + 2 * 12]


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    first = build([(2, 8), (2, 8)]).state_dict()
    torch.rand(5)
    second = build([(2, 8), (2, 8)]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    down = first["item_encoder.side_network.first.down_weight"]
    assert 0.008 < down.std() < 0.012 and not first["item_encoder.side_network.first.down_bias"].any()
