"""Check TPME against the paper's table and at its limits, and parameters, bytes and times against counts by hand."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from iisan_fast.errors import InputError
from iisan_fast.evaluation.efficiency import memory_split, parameter_counts, tpme

# IISAN, table 3, Scientific, as printed: seconds an epoch, millions of trainable parameters, GB, TPME in percent.
TABLE = {
    "FFT": (443, 195, 46.76, 100),
    "Adapter": (354, 5, 37.82, 71.50),
    "LoRA": (378, 0.8, 39.07, 75.14),
    "BitFit": (403, 0.4, 36.97, 70.82),
    "IISAN uncached": (179, 4, 8.32, 22.34),
    "IISAN cached": (22, 4, 3.11, 0.19),
}
PRINTED = {method: row[3] for method, row in TABLE.items()}
METHODS = st.lists(st.tuples(*[st.floats(0, 1e12)] * 3), min_size=2, max_size=6)


def columns(rows):
    """Return (seconds, parameters, memory), each by method."""
    return [{method: row[index] for method, row in rows.items()} for index in range(3)]


def table_percent(**parameters):
    """Return the TPME of the table's inputs in percent, with other parameter counts for some methods."""
    seconds, printed, memory = columns(TABLE)
    return {name: 100 * value for name, value in tpme(seconds, printed | parameters, memory).items()}


@pytest.mark.parametrize("method", ["FFT", "Adapter", "LoRA", "IISAN uncached"])
def test_the_papers_inputs_give_its_figures(method):
    assert table_percent()[method] == pytest.approx(PRINTED[method], abs=0.01)


def test_the_printed_figure_of_bitfit_does_not_follow_from_its_printed_inputs():
    assert table_percent()["BitFit"] == pytest.approx(75.63, abs=0.01)
    assert PRINTED["BitFit"] == 70.82


def test_two_printed_figures_need_parameters_that_were_not_rounded():
    """The table prints 5 and 4 million parameters. Its figures follow exactly from 4.96 and 4.11 million."""
    rounded = table_percent()
    assert rounded["Adapter"] == pytest.approx(71.507, abs=5e-4)
    assert rounded["IISAN cached"] == pytest.approx(0.185, abs=5e-4)
    exact = table_percent(**{"Adapter": 4.96, "IISAN uncached": 4.11, "IISAN cached": 4.11})
    assert {name: round(exact[name], 2) for name in ("Adapter", "IISAN uncached", "IISAN cached")} == {
        "Adapter": 71.50,
        "IISAN uncached": 22.34,
        "IISAN cached": 0.19,
    }


def test_weights_settle_which_figure_counts():
    rows = {"a": (1, 30, 5), "b": (3, 10, 5.5), "c": (2, 20, 7)}
    for index, expected in enumerate([(0, 1, 0.5), (1, 0, 0.5), (0, 0.25, 1)]):
        weights = [float(index == figure) for figure in range(3)]
        assert tpme(*columns(rows), weights) == dict(zip("abc", expected))
    assert tpme(*columns(rows), (0.5, 0.25, 0.25)) == {"a": 0.25, "b": 0.5625, "c": 0.625}


def test_a_figure_that_all_share_adds_nothing():
    rows = {"a": (1, 7, 3), "b": (2, 7, 3)}
    assert tpme(*columns(rows)) == {"a": 0, "b": 0.45}
    assert tpme(*columns({"a": (0, 0, 0), "b": (0, 0, 0)})) == {"a": 0, "b": 0}


@given(METHODS)
def test_between_the_best_and_the_worst_in_everything(figures):
    low, high = map(min, zip(*figures)), map(max, zip(*figures))
    rows = dict(enumerate([tuple(low), tuple(high), *figures]))
    best, worst, *between = tpme(*columns(rows)).values()
    assert best == 0 and all(0 <= cost <= worst + 1e-12 for cost in between) and worst <= 1 + 1e-12


@given(METHODS, st.integers(-20, 20))
def test_units_do_not_matter(figures, power):
    rows = {index: tuple(round(value) for value in row) for index, row in enumerate(figures)}
    scaled = {index: (row[0] * 2.0**power, row[1], row[2] * 2.0**power) for index, row in rows.items()}
    assert tpme(*columns(scaled)) == pytest.approx(tpme(*columns(rows)), abs=1e-9)


@pytest.mark.parametrize(
    "weights",
    [(0.5, 0.5), (0.25,) * 4, (0.5, 0.5, 0.5), (1.5, -0.5, 0), (nan, 0.5, 0.5), (inf, 0, 0), (0.5, 0.5, 1e-8)],
)
def test_weights_that_are_no_weights(weights):
    with pytest.raises(InputError, match="expected three numbers from 0 that sum to 1"):
        tpme(*columns(TABLE), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": {"a": 1, "c": 1}}, r"TPME memory: expected the methods \['a', 'b'\], found \['a', 'c'\]"),
        ({"parameters": {"a": 1}}, r"TPME parameters: expected the methods \['a', 'b'\], found \['a'\]"),
        ({"seconds": {"a": 1, "b": -1}}, "TPME seconds of b: expected a finite number from 0, found -1"),
        ({"memory": {"a": nan, "b": 1}}, "TPME memory of a: expected a finite number from 0, found nan"),
        ({"parameters": {"a": 1, "b": inf}}, "TPME parameters of b: expected a finite number from 0, found inf"),
        ({name: {"a": 1} for name in ("seconds", "parameters", "memory")}, "expected at least two, found 1"),
        ({"seconds": {}}, "expected at least two, found 0"),
    ],
)
def test_figures_that_cannot_be_compared(change, message):
    good = {name: {"a": 1, "b": 2} for name in ("seconds", "parameters", "memory")}
    with pytest.raises(InputError, match=message):
        tpme(**(good | change))


def test_shared_parameters_count_once():
    first, second = nn.Linear(3, 5), nn.Linear(3, 5)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    assert parameter_counts(nn.Sequential(first, second)) == {"trainable": 15 + 5, "total": 15 + 5 + 5}


def test_memory_by_purpose():
    frozen = nn.BatchNorm1d(6).requires_grad_(False)
    trained = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.Adam(trained.parameters())

    def split():
        return memory_split([frozen, trained, trained], optimizer, 1000)

    before = {"trained_weights": 96, "gradients": 0, "optimizer_states": 0, "activations": 1000}
    before["frozen_weights"] = (6 + 6) * 4 + (6 + 6) * 4 + 8  # scale and shift; mean, variance and an int64 count
    assert split() == before
    trained(frozen(torch.randn(3, 6))).sum().backward()
    optimizer.step()
    assert split() == before | {"gradients": 96, "optimizer_states": 96 + 96 + 4}  # two moments and a step count


def test_states_on_another_device_than_their_parameter_do_not_count():
    module = nn.Linear(6, 4, bias=False, device="meta")
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.state[module.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(module.weight)}
    assert memory_split([module], optimizer, 0)["optimizer_states"] == 96
