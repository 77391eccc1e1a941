"""Prepare the encoders of a run to be written, with inputs and the results that the run itself gives for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .module_files import PortableModule
from .query_encoder import QueryEncoder, history_width
from .trained_model import TrainedModel
from .user_histories import UserHistories

USERS_OF_EACH_LENGTH = 8

Case = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs, and the outputs that are expected


class ExportedEncoder(NamedTuple):
    """An encoder to write, and what it is compared with."""

    portable: PortableModule
    cases: list[Case]
    compared: str  # on which inputs, in words


def sequence_encoder_of(model: TrainedModel) -> ExportedEncoder:
    """Return the sequence encoder of a run, with histories of every length."""
    width = history_width(model)
    histories = random_histories(model, USERS_OF_EACH_LENGTH * width, np.random.default_rng(0))
    inputs = history_inputs(model.joined.cpu(), histories.latest(width))
    lengths = torch.from_numpy(histories.lengths)
    states, queries = model.user_states(histories).cpu(), model.scores(histories).queries.cpu()
    cases = [((inputs, lengths), (states, queries)), ((inputs[:1], lengths[:1]), (states[:1], queries[:1]))]
    portable = PortableModule(
        name="sequence_encoder",
        module=QueryEncoder(model),
        example=(inputs[:3], lengths[:3]),
        inputs=["inputs", "lengths"],
        outputs=["states", "queries"],
        rows="users",
    )
    return ExportedEncoder(portable, cases, f"{len(lengths)} histories of 1 to {width} random items")


def history_inputs(vectors: Tensor, numbers: np.ndarray) -> Tensor:
    """Return the vectors [R, width, D] of item numbers int64 [R, width], zeros for padding. vectors: [items, D]."""
    rows = torch.from_numpy(numbers)
    return vectors[(rows - 1).clamp(min=0)] * (rows > 0)[:, :, None]


def random_histories(model: TrainedModel, users: int, generator: np.random.Generator) -> UserHistories:
    """Return histories of random items, of every length that the sequence encoder takes in turn."""
    lengths = np.arange(users) % history_width(model) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = generator.integers(1, len(model.catalogue.item_ids) + 1, offsets[-1])
    return UserHistories([f"user {number}" for number in range(users)], offsets, items)
