"""Runs of the fused step on a GPU, by Triton's interpreter, that tests take on the ranks of a job."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast.config import ModelConfig
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.data.sequences import Sequences
from iisan_fast.models.recommender import Recommender
from iisan_fast.ranks import Ranks
from iisan_fast.states.feature_table import FeatureTable, PinnedTable
from iisan_fast.states.loader import planned_batches
from iisan_fast.training.fused_step import GpuFusedStep
from iisan_fast.training.update_options import UpdateOptions

RATES = {"adapters": 1e-3, "gates": 2e-3, "heads": 3e-3, "sequence_encoder": 4e-3}
ITEMS = 30


@dataclass(frozen=True)
class Run:
    """Epochs of a small model."""

    model: ModelConfig
    shapes: tuple[tuple[int, int], ...]  # of the views' hidden states
    users: int
    batch_users: int
    epochs: int = 1
    pinned: bool = False  # the table stays in host memory
    options: UpdateOptions = UpdateOptions()
    bad_user: int | None = None  # whose states are not finite


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    losses: list[float]
    record: list[float]
    steps: float  # of Adam
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]  # of the last step


def sequences_of(run: Run) -> Sequences:
    """Return histories of four to eleven items."""
    rng = np.random.default_rng(2)
    histories = [rng.integers(1, ITEMS + 1, length).tolist() for length in rng.integers(4, 12, run.users)]
    return make_sequences(histories, items=ITEMS)


def model_of(run: Run) -> Recommender:
    """Return the model with its first weights, in fp32 and training mode."""
    sequences = sequences_of(run)
    return side_recommender(list(run.shapes), run.model, sequences.max_inputs, sequences.popularity, 3).train()


def table_of(run: Run) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of all items, by view."""
    views = tuple(view.float() for view in random_table(list(run.shapes), ITEMS).views)
    if run.bad_user is not None:
        offsets, items = sequences_of(run).training
        views[0][items[offsets[run.bad_user]]] = float("nan")
    return views


def trained(ranks: Ranks, run: Run) -> Trained:
    """Train a run in windows of two batches."""
    device = torch.device("cpu")
    source = PinnedTable(table_of(run), device) if run.pinned else FeatureTable(table_of(run))
    model = model_of(run)
    plan = replace(RunPlan.of(sequences_of(run), run.batch_users, 3, ranks=ranks), window_batches=2, first_batches=2)
    step = GpuFusedStep(model, RATES, source, plan, torch.float32, lambda method: method, run.options)
    losses = []
    for epoch in range(run.epochs):
        losses += [step(planned).item() for planned in planned_batches(plan, epoch, source, device)]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Trained(losses, step.record.tolist(), step.storage.steps.item(), weights, gradients)
