"""Training steps on several ranks: N ranks of B/N users are one rank of B users, in every form of the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.rank_encoders import encode_all
from helpers.rank_processes import run_on_ranks
from helpers.rank_steps import (
    FAULTS,
    PLAIN,
    SMALL,
    Case,
    Trace,
    batches_of,
    differences,
    logged_exchanges,
    model_and_data,
    rank_sequences,
    source_of,
    step_of,
    take_all_steps,
    take_steps,
    two_ranks_do,
)
from iisan_fast.config import ModelConfig
from iisan_fast.ranks import ALONE, Ranks

pytestmark = needs_compiler

FLOAT64 = 8  # bytes
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

ENCODED = [("iisan", None), ("full", None), ("full", 3), ("lora", None), ("adapter", 3), ("bitfit", None)]


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


FAILING = {"fused": Case(fails=True), "autograd": Case(fused=False, fails=True)}
COUNTED = {"fused": Case(), "autograd": Case(fused=False)}


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict[str, Any]]:
    """Return what `two_ranks_do` returns on each of two ranks."""
    return run_on_ranks(2, two_ranks_do, Case(), FAILING, COUNTED)


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_a_wrong_exchange_would_be_seen(of_two_ranks, fault):
    gaps = differences(of_two_ranks[0]["faulty"][fault], take_steps(ALONE, Case()))
    assert max(gap for name, gap in gaps.items() if name.startswith("gradient")) > 1e-2


@pytest.mark.parametrize("form", FAILING)
def test_after_a_loss_that_is_not_finite_on_one_rank_no_rank_updates(of_two_ranks, form):
    alone = take_steps(ALONE, FAILING[form])
    for result in of_two_ranks:
        trace = result["failing"][form]
        sums, rows, failed_step, failed_loss = trace.record.tolist()
        assert (failed_step, failed_loss) == (3, float("inf"))
        assert rows == alone.record[1] and sums == pytest.approx(float(alone.record[0]), rel=1e-12)
        assert trace.losses[:2].isfinite().all() and trace.losses[2] == float("inf")
        for name, weight in trace.failed_at.items():
            assert torch.equal(trace.tensors[name], weight), name


def test_a_fused_step_gathers_scatters_and_adds_up_once(of_two_ranks):
    """Of V items, d numbers each, and P numbers of flat storage, in N ranks: N ceil(V/N) d, the same, and P + 2."""
    storage = step_of(COUNTED["fused"], *model_and_data(COUNTED["fused"]), ALONE)[0].storage
    expected = []
    for batch in batches_of(COUNTED["fused"], rank_sequences()):
        vectors = 2 * -(-len(batch.distinct) // 2) * SMALL.embedding_dim * FLOAT64
        expected += [("gather", vectors), ("scatter", vectors), ("sum", (len(storage.gradient) + 2) * FLOAT64)]
    for result in of_two_ranks:
        assert result["counted"]["fused"] == expected


def test_a_step_by_autograd_adds_up_its_loss_and_its_gradients(of_two_ranks):
    model, _ = model_and_data(COUNTED["autograd"])
    numbers = sum(parameter.numel() for parameter in model.parameters())
    expected = []
    for batch in batches_of(COUNTED["autograd"], rank_sequences()):
        vectors = 2 * -(-len(batch.distinct) // 2) * SMALL.embedding_dim * FLOAT64
        expected += [("gather", vectors), ("sum", 2 * FLOAT64), ("scatter", vectors), ("sum", numbers * FLOAT64)]
    for result in of_two_ranks:
        assert result["counted"]["autograd"] == expected


def test_one_rank_exchanges_nothing():
    with logged_exchanges() as log:
        take_all_steps(ALONE, COUNTED)
    assert not log


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fifty_steps_on_any_number_of_ranks_are_those_of_one(count):
    check_ranks({name: replace(case, steps=50) for name, case in CASES.items()}, (count,), timeout=240)


@pytest.mark.long
def test_encoders_that_run_in_each_step_train_on_ranks_as_on_one(encoder_views, small_catalogue):
    arguments = small_catalogue, encoder_views, ENCODED
    expected = encode_all(ALONE, *arguments)
    for count in (2, 3):
        results = run_on_ranks(count, encode_all, *arguments, timeout=500)
        for case, (alone, whole), *of_ranks in zip(ENCODED, expected, *results, strict=True):
            method, items_at_once = case
            first, part = of_ranks[0]
            assert max(differences(first, alone).values()) < 1e-9, case
            assert first.rows == alone.rows
            if method != "iisan":
                assert part == (items_at_once or -(-whole // count)), case
            for trace, other_part in of_ranks[1:]:
                assert other_part == part
                assert_equal_bits(trace, first)


@pytest.mark.parametrize("form", COUNTED)
def test_ranks_refuse_a_batch_that_is_not_shared_out(form):
    case = COUNTED[form]
    step, _ = step_of(case, *model_and_data(case), Ranks(0, 2))
    batch = next(batches_of(case, rank_sequences()))
    with pytest.raises(ValueError, match=r"batch\.block: expected one, found None"):
        step(batch, source_of(case).read(batch.distinct))
