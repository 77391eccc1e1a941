"""The fused step of a GPU on several ranks, by Triton's interpreter over Gloo, is the step of one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.fused_ranks import RATES, Run, Trained, model_of, sequences_of, table_of, trained
from helpers.rank_processes import run_on_ranks
from iisan_fast.config import ModelConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.ranks import ALONE
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.states.loader import prepared_batches
from iisan_fast.training import cuda_graphs
from iisan_fast.training.training_step import TrainingStep
from iisan_fast.training.update_options import UpdateOptions

# The smallest sizes that Triton's kernels take; the interpreter needs a second for a step.
SMALL = Run(
    ModelConfig(embedding_dim=32, bottleneck=8, blocks=1, attention_heads=1), ((1, 16),), users=5, batch_users=3
)
LARGER = Run(ModelConfig(embedding_dim=32, bottleneck=8), ((2, 16), (2, 16)), users=12, batch_users=5, epochs=2)
LONG = 600  # seconds


def trained_by_autograd(run: Run) -> Trained:
    """Train a run on one rank in fp64 by autograd."""
    sequences = sequences_of(run)
    source = FeatureTable(tuple(view.double() for view in table_of(run)))
    model = model_of(run).double()
    cpu = torch.device("cpu")
    step = TrainingStep(model, RATES, cpu, run.options)
    losses = []
    for epoch in range(run.epochs):
        batches = epoch_batches(sequences, run.batch_users, 3, epoch)
        prepared = prepared_batches(batches, source, cpu)
        losses += [step(batch.batch, batch.item_inputs).item() for batch in prepared]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Trained(losses, step.record.tolist(), len(losses), weights, gradients)


def check_alike(results: list[Trained], expected: Trained, run: Run, rtol: float) -> None:
    """Check that all ranks have equal bits, and the losses, weights and gradients of the expected result.

    rtol: of losses; of weights, by how far they moved from the first ones; and of gradients, by the largest.
    """
    first = dict(model_of(run).named_parameters())
    for result in results:
        assert result.losses == results[0].losses and result.record == results[0].record
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), name
    result = results[0]
    assert result.losses == pytest.approx(expected.losses, rel=rtol)
    assert result.record == pytest.approx(expected.record, rel=rtol) and result.steps == expected.steps
    assert result.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        moved = (weight - first[name]).norm()
        assert (result.weights[name] - weight).norm() <= rtol * moved > 0, name
        scale = expected.gradients[name].abs().max()
        assert (result.gradients[name] - expected.gradients[name]).abs().max() <= rtol * scale, name


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_autograd_in_fp64():
    """Batches of three users and of two: neither rank has as many users as the other in both."""
    results = run_on_ranks(2, trained, SMALL)
    check_alike(results, trained_by_autograd(SMALL), SMALL, rtol=2e-3)
    assert results[0].losses == pytest.approx(trained_by_autograd(SMALL).losses, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "run"),
    [
        pytest.param(2, LARGER, id="two ranks, users not divisible"),
        pytest.param(3, LARGER, id="three ranks, the last batch with fewer users"),
        pytest.param(3, replace(LARGER, pinned=True, epochs=1), id="a table in host memory"),
        pytest.param(
            2, replace(LARGER, epochs=1, options=UpdateOptions(clip_norm=0.5, ema_decay=0.9)), id="clipped, averaged"
        ),
        pytest.param(3, replace(SMALL, users=2), id="fewer users than ranks"),
    ],
)
def test_several_ranks_train_as_one_does(count, run):
    """Up to six steps, dropout on: only the order of sums in fp32 differs."""
    expected = trained(ALONE, run)
    results = run_on_ranks(count, trained, run, timeout=LONG)
    check_alike(results, expected, run, rtol=2e-4)


@pytest.mark.long
def test_after_a_loss_that_is_not_finite_on_one_rank_none_updates():
    order = np.random.default_rng((3, 0)).permutation(SMALL.users)
    run = replace(SMALL, bad_user=int(order[-1]), batch_users=2)
    expected = trained(ALONE, run)
    results = run_on_ranks(2, trained, run, timeout=LONG)
    for result in (*results, expected):
        failed = next(number for number, loss in enumerate(result.losses, start=1) if math.isnan(loss))
        assert result.record[2] == failed and math.isnan(result.record[3]) and result.steps == failed - 1
    for name, weight in expected.weights.items():
        assert weight.isfinite().all()
        assert all(torch.allclose(result.weights[name], weight, rtol=1e-4, atol=1e-6) for result in results), name


def test_graphs_are_freed_at_the_exit_before_the_ranks_part(monkeypatch):
    """Python calls at its exit first what was registered last, and graphs are captured after the ranks have joined."""
    registered, freed = [], []

    class Graph:
        def reset(self) -> None:
            freed.append(self)

    monkeypatch.setattr(cuda_graphs.atexit, "register", registered.append)
    lives, dies = Graph(), Graph()
    for graph in (dies, lives):
        cuda_graphs.free_at_exit(graph)
    del graph, dies
    assert len(registered) == 1
    registered[0]()
    assert freed == [lives]
