"""Losses of training against plain formulas over single slots and items, in every form of the step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.compiler import needs_compiler
from helpers.datasets import make_sequences
from helpers.run_folders import assert_same_run
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import Batch, make_batch, padded_shape
from iisan_fast.data.loss_columns import Negatives, drawn_places
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError, Stopped
from iisan_fast.kernels import SequenceGrid
from iisan_fast.kernels.reference.binary_cross_entropy import generalised_binary_cross_entropy
from iisan_fast.models.losses import BinaryLoss
from iisan_fast.models.recommender import Recommender
from iisan_fast.models.side_network import SideItemEncoder
from iisan_fast.training import memory_budget
from iisan_fast.training.fused_step import CpuFusedStep, fused_step_refusal
from iisan_fast.training.resume_run import resume
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer
from iisan_fast.training.training_step import TrainingStep

CPU = torch.device("cpu")
ITEMS = 45
RANDOM = np.random.default_rng(3)
HISTORIES = [RANDOM.integers(1, 36, RANDOM.integers(2, 9)).tolist() for _ in range(14)]  # those of training
SEQUENCES = make_sequences([[*history, 40, 45] for history in HISTORIES], ITEMS)
TRAINED = sorted(set(sum(HISTORIES, [])))
USERS = [3, 12, 7, 0, 9]
STEP = 6
SHAPES = [(2, 16)]
RATES = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}
CROSS_ENTROPIES = [
    TrainConfig(loss=loss, debias=debias, own_mask=own_mask, seed=2)
    for (loss, debias), own_mask in itertools.product(
        [("in-batch", True), ("in-batch", False), ("full", None), ("sampled:8", None)], [True, False]
    )
]
BINARIES = [TrainConfig(loss=loss, own_mask=mask, seed=2) for loss in ("gbce:8", "gbce:1") for mask in (True, False)]


def name_of(train_config: TrainConfig) -> str:
    return f"{train_config.loss}, debias {train_config.debiased}, own mask {train_config.own_mask}"


def build(train_config: TrainConfig, seed: int = 1) -> Recommender:
    """Return a model in float64 and in training mode."""
    config = ModelConfig(embedding_dim=16, bottleneck=8, dropout=0)
    popularity = SEQUENCES.popularity if train_config.debiased else np.ones(ITEMS + 1)
    encoder = functools.partial(SideItemEncoder, SHAPES, config)
    binary = BinaryLoss.of(train_config, SEQUENCES.popularity)
    return Recommender(encoder, config, SEQUENCES.max_inputs, popularity, seed, binary_loss=binary).double().train()


def batch_of(train_config: TrainConfig, users: list[int] = USERS, step: int = STEP) -> Batch:
    return make_batch(SEQUENCES, np.array(users), step, Negatives.of(train_config))


def loss_and_gradients(model: Recommender, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def plain_loss(model: Recommender, table, train_config: TrainConfig) -> Tensor:
    """Return the mean loss of the users' rows, written row by row from the definition of the loss."""
    kind, count = train_config.loss_and_negatives
    vectors = model.item_encoder(table.read(torch.arange(1, ITEMS + 1)))  # of item v in row v - 1
    slots = [item for user in USERS for item in HISTORIES[user]]
    drawn = [TRAINED[place] for place in drawn_places(2, STEP, count, len(TRAINED))]
    columns = {"in-batch": slots, "full": TRAINED}.get(kind, drawn)
    share = len(SEQUENCES.training[1])
    log_popularity = {v: math.log(sum(history.count(v) for history in HISTORIES) / share) for v in TRAINED}
    losses = []
    for user in USERS:
        history = HISTORIES[user]
        inputs = torch.tensor(history[:-1]) - 1
        grid = SequenceGrid(torch.arange(len(inputs)), 1, len(inputs))
        queries = model.sequence_encoder(vectors[inputs], grid, None)
        for query, target in zip(queries, history[1:]):

            def score(v: int, query: Tensor = query) -> Tensor:
                return query @ vectors[v - 1] - (log_popularity[v] if train_config.debiased else 0)

            barred = {target, *history} if train_config.own_mask else {target}
            negatives = [score(v) for v in columns if v not in barred]
            if kind == "gbce":
                share_drawn = count / (len(TRAINED) - 1)
                beta = share_drawn * (0.75 * (1 - 1 / share_drawn) + 1 / share_drawn)
                logs = [beta * torch.sigmoid(score(target)).log()]
                logs += [(1 - torch.sigmoid(negative)).log() for negative in negatives]
                losses.append(-sum(logs) / (count + 1))
            else:
                losses.append(torch.stack([score(target), *negatives]).logsumexp(0) - score(target))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("train_config", [*CROSS_ENTROPIES, *BINARIES], ids=name_of)
def test_a_loss_and_its_gradients_are_those_of_its_definition(train_config):
    model = build(train_config)
    table = random_table(SHAPES, ITEMS)
    expected = loss_and_gradients(model, plain_loss(model, table, train_config))
    batch = batch_of(train_config)
    for form in (batch, batch.padded(padded_shape(SEQUENCES, len(USERS) + 2, Negatives.of(train_config)))):
        results = loss_and_gradients(model, model.loss(form, table.read(form.distinct)))
        torch.testing.assert_close(results, expected, rtol=1e-8, atol=1e-11)


@needs_compiler
@pytest.mark.parametrize("train_config", CROSS_ENTROPIES, ids=name_of)
def test_a_fused_step_trains_every_cross_entropy(train_config):
    table = random_table(SHAPES, ITEMS)
    models = build(train_config), build(train_config)
    assert fused_step_refusal(models[0], CPU, torch.float64, Negatives.of(train_config)) == ""
    fused = CpuFusedStep(models[0], RATES)
    autograd = TrainingStep(models[1], RATES, CPU)
    for number, users in enumerate([USERS, [1, 2, 13], [10]]):
        batch = batch_of(train_config, users, number)
        states = table.read(batch.distinct)
        torch.testing.assert_close(fused(batch, states), autograd(batch, states), rtol=1e-10, atol=0)
    for parameter, like in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(parameter, like, rtol=1e-5, atol=1e-7)


def test_losses_without_a_fused_step_say_so():
    reason = fused_step_refusal(build(TrainConfig(loss="gbce")), CPU, torch.float32)
    assert reason == "the loss gbce has no fused step"
    for loss in ("full", "sampled:8"):
        config = TrainConfig(loss=loss)
        reason = fused_step_refusal(build(config), torch.device("cuda"), torch.bfloat16, Negatives.of(config))
        assert reason == "the loss takes negatives from outside the batch, which a fused step takes on a CPU alone"


def test_a_sampled_loss_of_all_items_is_the_full_one():
    table = random_table(SHAPES, ITEMS)
    losses = []
    for loss in ("full", f"sampled:{len(TRAINED)}"):
        batch = batch_of(TrainConfig(loss=loss))
        losses.append(build(TrainConfig(loss=loss)).loss(batch, table.read(batch.distinct)))
    assert torch.equal(*losses)


def test_the_binary_loss_is_differentiable_and_finite_for_large_scores():
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 7))
    rest = (
        torch.tensor([0, 3, 6, 2, 2]),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([[9], [68]], dtype=torch.int32),
        torch.tensor([1, 1, 1, 1, 1, 1, 0]),
        0.4,
        5,
    )
    inputs = queries.requires_grad_(), items.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, e: generalised_binary_cross_entropy(q, e, *rest), inputs)
    losses = generalised_binary_cross_entropy(1e3 * queries, 1e3 * items, *rest)
    assert losses.isfinite().all() and (losses >= 0).all()


def test_the_calibration_of_the_binary_loss():
    popularity = np.array([0, 0.5, 0.25, 0.25, 0, 0.0])
    assert BinaryLoss.of(TrainConfig(loss="gbce:1"), popularity) == (1, 1 - 0.75 * 0.5)
    assert BinaryLoss.of(TrainConfig(loss="gbce:3"), popularity) == (3, 1)
    assert BinaryLoss.of(TrainConfig(loss="gbce"), popularity).negatives == 256
    assert BinaryLoss.of(TrainConfig(), popularity) is None


# Whole runs


@pytest.fixture
def config(toy_run) -> RunConfig:
    """Return the settings of a run of two epochs, four steps each."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    optimisation = TrainConfig(batch_users=16, max_epochs=2, learning_rates=RATES)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=optimisation)


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.mark.parametrize(
    "changes", [{"loss": "sampled:7", "own_mask": False}, pytest.param({"loss": "gbce:7"}, marks=pytest.mark.long)]
)
def test_a_run_stopped_within_an_epoch_draws_the_same_negatives(tmp_path, config, monkeypatch, changes):
    config = with_train(config, **changes)
    whole = train(config, tmp_path / "whole", CPU)
    take = Trainer.take
    calls = itertools.count(1)

    def stopped(self, prepared):
        loss = take(self, prepared)
        if next(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "take", stopped)
    with pytest.raises(Stopped):
        train(with_train(config, checkpoint_every=1), tmp_path / "run", CPU)
    monkeypatch.undo()
    assert resume(tmp_path / "run", CPU) == whole
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "softmax"}, "loss: expected in-batch, full, sampled:N, gbce or gbce:N, N from 1"),
        *(({"loss": loss}, f"found '{loss}'") for loss in ("sampled", "sampled:0", "sampled:-3", "sampled:1e3")),
        *(({"loss": loss}, f"found '{loss}'") for loss in ("full:3", "gbce:", "gbce:0", "in-batch:", "", "gbce:1:2")),
        *(
            ({"loss": loss, "debias": True}, f"debias: corrects the popularity of in-batch negatives; {loss} has none")
            for loss in ("full", "sampled:3", "gbce")
        ),
    ],
)
def test_losses_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        TrainConfig(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("loss", ["sampled:41", "gbce"])
def test_more_negatives_than_items_of_training_are_refused(tmp_path, config, loss):
    with pytest.raises(
        InputError, match=r"loss: expected at most the \d+ items that occur in training, found (41|256)"
    ):
        train(with_train(config, loss=loss), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "free", "remedy"),
    [
        ("full", 40_000, "lower batch_users, or choose sampled:N"),
        ("full", 20_000, "choose sampled:N"),
        ("sampled:3", 20_000, "lower batch_users or N"),
        ("gbce:3", 40_000, "lower batch_users or N"),
    ],
)
def test_a_loss_that_memory_does_not_hold_is_refused_before_training(tmp_path, config, monkeypatch, loss, free, remedy):
    """Forty items of two views of 2 x 16 numbers take 30,720 bytes; more than 60 rows of 40 scores the rest."""
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: free)
    with pytest.raises(InputError) as error:
        train(with_train(config, loss=loss), tmp_path / "run", CPU)
    text = str(error.value)
    assert text.startswith(f"loss: {loss} compares up to ") and text.endswith(f"free on cpu; {remedy}"), text
    assert not (tmp_path / "run").exists()


def rows_of_longest(config: RunConfig, times: int) -> int:
    """Return the rows of a batch of the longest training histories, each of which comes so many times."""
    lengths = np.diff(load_dataset(Path(config.dataset)).sequences.training[0])
    longest = sorted(np.repeat(lengths, times), reverse=True)[: config.train.batch_users]
    return sum(longest) - len(longest)


def test_the_largest_batch_of_reversed_histories_has_the_longest_ones_twice(tmp_path, config, monkeypatch):
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: 0)
    rows = rows_of_longest(config, 2)
    assert rows > rows_of_longest(config, 1)
    with pytest.raises(InputError, match=f"loss: full compares up to {rows} rows with 40 items a step"):
        train(with_train(config, loss="full", reverse=True), tmp_path / "run", CPU)


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_full_loss_of_frozen_encoders_takes_memory_for_their_last_layers(config, tmp_path, monkeypatch, lacking):
    """Forty items of two views of 16 numbers take 15,360 bytes; their scores the rest."""
    needed = 15_360 + 4 * 40 * rows_of_longest(config, 1)
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: needed - lacking)
    model = ModelConfig("frozen", embedding_dim=16)
    optimisation = dataclasses.replace(config.train, learning_rates={}, loss="full", max_epochs=1)
    frozen = dataclasses.replace(config, model=model, train=optimisation)
    with pytest.raises(InputError, match="loss: full") if lacking else contextlib.nullcontext():
        train(frozen, tmp_path / "run", CPU)
    assert (tmp_path / "run").exists() is not bool(lacking)


def test_a_run_of_the_defaults_plans_no_memory_for_scores(config, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: 1)
    assert train(config, tmp_path / "run", CPU)["epochs"] == 2


def test_the_log_says_why_a_loss_trains_by_autograd(config, tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO):
        train(with_train(config, loss="gbce:7", max_epochs=1), tmp_path / "run", CPU)
    assert "training by autograd: the loss gbce has no fused step" in caplog.messages
