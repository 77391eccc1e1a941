"""Take the same training steps on any number of ranks, and compare the traces that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from helpers.datasets import make_sequences
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import Batch, epoch_batches, make_batch, padded_shape
from iisan_fast.data.loss_columns import Negatives
from iisan_fast.data.sequences import Sequences
from iisan_fast.kernels import States
from iisan_fast.models.recommender import Recommender, build_recommender
from iisan_fast.precision import resolve_precision
from iisan_fast.ranks import Ranks
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.states.item_source import Gathered
from iisan_fast.states.loader import prepared_batches
from iisan_fast.training.fused_step import CpuFusedStep, fused_step_refusal
from iisan_fast.training.training_step import CapturedStep, TrainingStep
from iisan_fast.training.update_options import UpdateOptions

CPU = torch.device("cpu")
USERS, ITEMS = 22, 60  # in batches of 7: the last of an epoch has one user, fewer than there are ranks
FEW_ITEMS = 0  # a user of two items, fewer than there are ranks
SHAPES = [(2, 32), (2, 32)]
SMALL = ModelConfig(embedding_dim=16, bottleneck=8)
PLAIN = TrainConfig(batch_users=7, seed=2)


@dataclass(frozen=True)
class Case:
    """A model, its data and its optimisation."""

    model: ModelConfig = SMALL
    train: TrainConfig = PLAIN
    steps: int = 5  # the second has few items, the fourth one user; the last has gradients
    fused: bool = True  # take fused steps; False: steps by autograd
    cached: bool = True  # read states from a table; False: compute them in each step
    captured: bool = False  # with autograd: pad the batches, and take the step that CUDA captures
    dtype: torch.dtype = torch.float64
    fails: bool = False  # the loss of the last user of the third batch is not finite


@dataclass
class Trace:
    """The tensors that the steps of a rank leave."""

    losses: Tensor
    record: Tensor
    tensors: dict[str, Tensor]  # weights, averages, and the gradients of the last step, by name
    rows: int  # of all batches, as the loader counts them
    failed_at: dict[str, Tensor]  # the weights before the step that fails


class EncodedItems:
    """Stands in for frozen encoders that run in each step: the states of an item are a function of its number."""

    index_device = CPU
    items_at_once = 16
    rows = ITEMS + 1
    shapes = SHAPES

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def gather(self, items: Tensor) -> Gathered:
        """Return the items' content."""
        return Gathered([items.double() / ITEMS])

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """Return the states of the gathered content."""
        (content,) = (gathered or self.gather(items)).tensors
        waves = torch.arange(1, 1 + 2 * 32).double().view(1, 2, 32)
        return [States(function(content.view(-1, 1, 1) * waves).to(self.dtype)) for function in (torch.sin, torch.cos)]


def rank_sequences() -> Sequences:
    """Return histories of 2 to 12 items; one user has two items again and again."""
    rng = np.random.default_rng(5)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(4, 13, USERS)]
    histories[FEW_ITEMS] = [3, 9, 3, 9, 3, 9]
    return make_sequences(histories, items=ITEMS)


def batches_of(case: Case, sequences: Sequences) -> Iterator[Batch]:
    """Yield the batches of a case's steps: those of some epochs, and one of fewer items than there are ranks."""
    negatives = Negatives.of(case.train)
    for step in range(case.steps):
        if step == 1:
            yield make_batch(sequences, np.array([FEW_ITEMS]), step, negatives)
            continue
        epoch, taken = divmod(step, -(-USERS // case.train.batch_users))
        users = case.train.batch_users, case.train.seed
        batch = next(epoch_batches(sequences, *users, epoch, taken=taken, negatives=negatives))
        if case.fails and step == 2:
            batch.weights[-1] = float("inf")
        yield replace(batch, step=step)


def take_steps(ranks: Ranks, case: Case) -> Trace:
    """Take the steps of a case on this rank, with its shares of the batches."""
    source = source_of(case)
    model, sequences = model_and_data(case)
    step, take = step_of(case, model, sequences, ranks)
    shape = padded_shape(sequences, case.train.batch_users, Negatives.of(case.train), ranks) if case.captured else None
    losses = []
    rows = 0
    failed_at = {}
    for number, prepared in enumerate(prepared_batches(batches_of(case, sequences), source, CPU, shape, ranks)):
        if case.fails and number == 2:
            failed_at = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if case.train.scheduled:
            step.scale_rates(1 / (number + 1))
        losses.append(take(prepared.batch, prepared.item_inputs).clone())
        rows += prepared.rows
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    averages = {f"average of {names[parameter]}": value for parameter, value in step.averages.items()}
    return Trace(torch.stack(losses), step.record, {**tensors, **gradients, **averages}, rows, failed_at)


def model_and_data(case: Case) -> tuple[Recommender, Sequences]:
    """Return the model of a case in training mode, and its histories."""
    sequences = rank_sequences()
    states = (None, ()) if case.model.method == "id" else ("", ("image", "title"))
    config = RunConfig("", *states, model=case.model, train=case.train)
    popularity = np.maximum(sequences.popularity, 1e-4) * (np.arange(ITEMS + 1) > 0)
    model = build_recommender(source_of(case), config, popularity, resolve_precision(config, CPU))
    return spread(model.to(case.dtype)), sequences


def take_all_steps(ranks: Ranks, cases: dict[str, Case]) -> dict[str, Trace]:
    """Return the trace of each case on this rank."""
    return {name: take_steps(ranks, case) for name, case in cases.items()}


def source_of(case: Case) -> Any:
    """Return the items of a case."""
    if case.model.method == "id":
        return FeatureTable((torch.arange(ITEMS + 1).view(-1, 1, 1),))
    return random_table(SHAPES, ITEMS, case.dtype) if case.cached else EncodedItems(case.dtype)


def step_of(
    case: Case, model: Recommender, sequences: Sequences, ranks: Ranks
) -> tuple[CpuFusedStep | TrainingStep, Callable[..., Tensor]]:
    """Return the step of a case, and the function that takes it for a batch."""
    rates = {name: 1e-3 * (i + 1) for i, name in enumerate(model.parameter_groups())}
    options = UpdateOptions.of(case.train)
    if case.fused:
        assert not fused_step_refusal(model, CPU, case.dtype, Negatives.of(case.train))
        step = CpuFusedStep(model, rates, options, ranks)
        return step, step
    step = TrainingStep(model, rates, CPU, options, ranks)
    return step, CapturedStep(step, capture=lambda run: run) if case.captured else step


def spread(model: Recommender) -> Recommender:
    """Move all weights at random, so that no gate or bias is 0, and set the training mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.train()


def differences(trace: Trace, expected: Trace) -> dict[str, float]:
    """Return the largest difference of the losses and of each tensor, relative to the largest number of it."""
    assert trace.tensors.keys() == expected.tensors.keys()
    pairs = {name: (tensor, expected.tensors[name]) for name, tensor in trace.tensors.items()}
    pairs |= {"losses": (trace.losses, expected.losses), "record": (trace.record, expected.record)}
    result = {}
    for name, (tensor, other) in pairs.items():
        result[name] = float((tensor - other).abs().max() / other.abs().max().clamp(min=1e-6))
    return result


class AveragingRanks(Ranks):
    """Ranks with a fault: the gradients of the weights are averaged, not added up. The loss is right."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add up all numbers but a loss and its rows, and divide by the number of ranks."""
        super().add_up(tensor)
        tensor[:-2] /= self.count
        return tensor


class LocalGradientRanks(Ranks):
    """Ranks with a fault: an item vector gets the gradient of one rank's rows alone."""

    def add_blocks(self, rows: Tensor) -> Tensor:
        """Return this rank's block of its rows."""
        whole = rows.new_zeros(self.block_size(len(rows)) * self.count, *rows.shape[1:])
        whole[: len(rows)] = rows
        return whole.chunk(self.count)[self.rank]


class MisplacingRanks(Ranks):
    """Ranks with a fault: the item vectors are gathered one row further."""

    def gather_blocks(self, rows: Tensor, count: int) -> Tensor:
        """Return the blocks in a wrong order."""
        return super().gather_blocks(rows, count).roll(1, dims=0)


FAULTS = (AveragingRanks, LocalGradientRanks, MisplacingRanks)


def take_faulty_steps(ranks: Ranks, case: Case) -> dict[str, Trace]:
    """Return the trace of a case on ranks with each fault, by the name of the fault."""
    places = ranks.rank, ranks.count, ranks.on_this_machine, ranks.local_rank
    return {fault.__name__: take_steps(fault(*places), case) for fault in FAULTS}


class Exchange(NamedTuple):
    """A call of torch.distributed."""

    kind: str
    nbytes: int  # of the largest tensor


KINDS = {
    "all_gather_single": "gather",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_single": "scatter",
    "reduce_scatter_tensor": "scatter",
    "all_reduce": "sum",
    "all_to_all_single": "exchange",
    "all_gather_object": "objects",
    "broadcast_object_list": "objects",
    "broadcast": "broadcast",
    "barrier": "barrier",
}


@contextmanager
def logged_exchanges() -> Iterator[list[Exchange]]:
    """Log the outermost calls of torch.distributed in the block."""
    log: list[Exchange] = []
    inside = []

    def logged(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not inside:
                sizes = [argument.nbytes for argument in arguments if isinstance(argument, Tensor)]
                log.append(Exchange(kind, max(sizes, default=0)))
            inside.append(kind)
            try:
                return function(*arguments, **named)
            finally:
                inside.pop()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, kind in KINDS.items():
            if (function := getattr(distributed, name, None)) is not None:
                patch.setattr(distributed, name, logged(kind, function))
        yield log


def exchanges_of(ranks: Ranks, case: Case) -> list[Exchange]:
    """Return all exchanges of a case's steps."""
    with logged_exchanges() as log:
        take_steps(ranks, case)
    return log


def two_ranks_do(ranks: Ranks, faulty: Case, failing: dict[str, Case], counted: dict[str, Case]) -> dict[str, Any]:
    """Return the traces of faulty ranks and of failing steps, and the exchanges of steps, on this rank."""
    return {
        "faulty": take_faulty_steps(ranks, faulty),
        "failing": take_all_steps(ranks, failing),
        "counted": {name: exchanges_of(ranks, case) for name, case in counted.items()},
    }
