"""Prepare the encoders of a run to be written, with inputs and the results that the run itself gives for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..models import PlainSequenceEncoder, Recommender
from .module_files import PortableModule
from .trained_model import TrainedModel
from .user_histories import UserHistories

USERS_OF_EACH_LENGTH = 8

Case = tuple[tuple[Tensor, ...], Tensor]  # inputs, and the result that is expected


class ExportedEncoder(NamedTuple):
    """An encoder to write, and what it is compared with."""

    portable: PortableModule
    cases: list[Case]
    compared: str  # on which inputs, in words


class _OnlyState(nn.Module):
    """The state of every user in a run without a model: 1."""

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Return ones, float32 [users, 1]."""
        return torch.ones_like(inputs[:, 0])


def sequence_encoder_of(model: TrainedModel) -> ExportedEncoder:
    """Return the sequence encoder of a run, with histories of every length."""
    most = model.config.protocol.max_inputs
    histories = random_histories(model, USERS_OF_EACH_LENGTH * most, np.random.default_rng(0))
    vectors = model.catalogue.vectors.cpu()
    inputs = history_inputs(vectors, histories.latest(most))
    lengths = torch.from_numpy(histories.lengths)
    expected = model.user_states(histories).cpu()
    cases = [((inputs, lengths), expected), ((inputs[:1], lengths[:1]), expected[:1])]
    encoder = model.encoder.model
    module = (
        PlainSequenceEncoder(encoder.sequence_encoder.weights()) if isinstance(encoder, Recommender) else _OnlyState()
    )
    portable = PortableModule(
        "sequence_encoder", module, (inputs[:3], lengths[:3]), ["inputs", "lengths"], "states", rows="users"
    )
    return ExportedEncoder(portable, cases, f"{len(lengths)} histories of 1 to {most} random items")


def history_inputs(vectors: Tensor, numbers: np.ndarray) -> Tensor:
    """Return the vectors [R, width, d] of item numbers int64 [R, width], zeros for padding. vectors: [items, d]."""
    rows = torch.from_numpy(numbers)
    return vectors[(rows - 1).clamp(min=0)] * (rows > 0)[:, :, None]


def random_histories(model: TrainedModel, users: int, generator: np.random.Generator) -> UserHistories:
    """Return histories of random items, of every length up to the sequence encoder's width in turn."""
    lengths = np.arange(users) % model.config.protocol.max_inputs + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = generator.integers(1, len(model.catalogue.item_ids) + 1, offsets[-1])
    return UserHistories([f"user {number}" for number in range(users)], offsets, items)
