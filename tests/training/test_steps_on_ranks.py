"""Training steps on several ranks: N ranks of B/N users are one rank of B users, in every form of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.rank_processes import run_on_ranks
from helpers.rank_steps import PLAIN, SMALL, Case, Trace, differences, take_all_steps
from iisan_fast.config import ModelConfig
from iisan_fast.ranks import ALONE

pytestmark = needs_compiler

VERSA = replace(SMALL, method="iisan-versa")
CASES = {
    "fused": Case(),
    "fused, computed states": Case(cached=False),
    "fused, versa": Case(VERSA, cached=False),
    "fused, full catalogue": Case(train=replace(PLAIN, loss="full")),
    "fused, sampled": Case(train=replace(PLAIN, loss="sampled:20")),
    "fused, no mask": Case(train=replace(PLAIN, own_mask=False, debias=False)),
    "fused, clipped, averaged, decayed": Case(
        train=replace(PLAIN, clip_norm=0.1, ema_decay=0.9, weight_decay=0.1, schedule="linear")
    ),
    "autograd": Case(fused=False),
    "autograd, computed states": Case(VERSA, fused=False, cached=False),
    "autograd, full catalogue": Case(fused=False, train=replace(PLAIN, loss="full")),
    "autograd, sampled": Case(fused=False, train=replace(PLAIN, loss="sampled:20", own_mask=False)),
    "autograd, clipped, averaged, decayed": Case(
        fused=False, train=replace(PLAIN, clip_norm=0.1, ema_decay=0.9, weight_decay=0.1, schedule="linear")
    ),
    "captured": Case(fused=False, captured=True),
    "captured, computed states": Case(fused=False, captured=True, cached=False),
    "gbce": Case(fused=False, train=replace(PLAIN, loss="gbce:8")),
    "item ids": Case(replace(SMALL, item_ids=True), fused=False),
    "id": Case(ModelConfig("id", embedding_dim=16), fused=False),
    "frozen": Case(ModelConfig("frozen", embedding_dim=16), fused=False),
}


def check_ranks(cases: dict[str, Case], counts: tuple[int, ...], tolerance: float = 1e-9, timeout: float = 60) -> None:
    """Check that the ranks end with equal bits, and with the losses and weights of one rank."""
    expected = take_all_steps(ALONE, cases)
    for count in counts:
        traces = run_on_ranks(count, take_all_steps, cases, timeout=timeout)
        for name, alone in expected.items():
            first, *others = (trace[name] for trace in traces)
            worst = {key: value for key, value in differences(first, alone).items() if not value <= tolerance}
            assert not worst, (name, count, worst)
            assert first.rows == alone.rows
            for other in others:
                assert_equal_bits(other, first)


def assert_equal_bits(trace: Trace, other: Trace) -> None:
    assert torch.equal(trace.losses, other.losses) and torch.equal(trace.record, other.record)
    for name, tensor in other.tensors.items():
        assert torch.equal(trace.tensors[name], tensor), name


def test_every_form_of_the_step_on_three_ranks_is_that_of_one():
    check_ranks({**CASES, "fused": replace(CASES["fused"], steps=50)}, (3,))


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fifty_steps_on_any_number_of_ranks_are_those_of_one(count):
    check_ranks({name: replace(case, steps=50) for name, case in CASES.items()}, (count,), timeout=240)
