"""Prepare the encoders of a run to be written, with inputs and the results that the run itself gives for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...config import NEIGHBOURS, STATE_METHODS, TUNING_METHODS
from ...errors import InputError
from ...models import PlainItemEncoder, ViewTreatment
from ...training import RunFolder, StoredItemEncoder, load_item_encoder, stored_states
from ..histories.user_histories import UserHistories
from ..trained_model import TrainedModel
from .module_files import Case, PortableModule
from .query_encoder import QueryEncoder, history_width

USERS_OF_EACH_LENGTH = 8
ITEMS_AT_ONCE = 2048
RANDOM_ITEMS = 256
NOT_EXPORTED = {  # by method
    **dict.fromkeys(TUNING_METHODS, "the item encoder of this method holds whole pretrained encoders"),
    "id": "the method id has a vector of each item number, and reads no contents",
    NEIGHBOURS: "the method neighbours has no item encoder",
}


class ExportedEncoder(NamedTuple):
    """An encoder to write, and what it is compared with."""

    portable: PortableModule
    cases: Iterable[Case]
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
        example=(inputs[:3].clone(), lengths[:3].clone()),  # a slice would be written with all rows
        inputs=["inputs", "lengths"],
        outputs=["states", "queries"],
        rows="users",
    )
    return ExportedEncoder(portable, cases, f"{len(lengths)} histories of 1 to {width} random items")


def item_encoder_of(model: TrainedModel) -> ExportedEncoder | str:
    """Return the item encoder of a run with states of its items, or a line that says why it is not exported."""
    method = model.config.model.method
    if method not in STATE_METHODS:
        return f"item_encoder: {NOT_EXPORTED[method]}"
    folder = RunFolder.open(model.run)
    encoder = load_item_encoder(folder, folder.items.training_counts)
    states, compared = _item_states(model, encoder)
    treatments = []
    for view in encoder.views:
        statistics = view.statistics
        numbers = (None, None) if statistics is None else (statistics.mean, statistics.deviation)
        treatments.append(ViewTreatment(view.dtype, *numbers))
    portable = PortableModule(
        name="item_encoder",
        module=PlainItemEncoder(encoder.module, treatments),
        example=tuple(torch.zeros(3, *view.shape) for view in encoder.views),
        inputs=[f"states.{view.name}" for view in encoder.views],
        outputs=["item_vectors"],
        rows="items",
        stacked=True,
    )
    return ExportedEncoder(portable, ((part, (encoder.vectors(part),)) for part in states), compared)


def _item_states(model: TrainedModel, encoder: StoredItemEncoder) -> tuple[Iterable[tuple[Tensor, ...]], str]:
    """Return the states of all items in the run's cache in parts, or random ones, as float32, and which they are."""
    item_ids = model.catalogue.item_ids[: model.catalogue.trained]
    parts = stored_states(model.config, encoder, item_ids, ITEMS_AT_ONCE)
    try:
        first = next(parts)
    except InputError as error:
        return [_random_states(encoder)], f"random states of {RANDOM_ITEMS} items, because {error}"
    states = (tuple(view.float() for view in part) for part in itertools.chain([first], parts))
    kind = "stored" if model.config.features else "cached"
    return states, f"the {kind} states of {len(item_ids)} items"


def _random_states(encoder: StoredItemEncoder) -> tuple[Tensor, ...]:
    """Return random states of each view, float32 [N, K, D], with the statistics of the run's."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for view in encoder.views:
        part = torch.randn(RANDOM_ITEMS, *view.shape, generator=generator)
        if view.statistics is not None:
            part = (part * view.statistics.deviation + view.statistics.mean).float()
        states.append(part)
    return tuple(states)


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
