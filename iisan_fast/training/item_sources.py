"""Open the source of a run's items: stored states, encoders that run in every step, or item numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..config import FEATURES, SIDE_METHODS, TUNING_METHODS, RunConfig, UncachedConfig, ViewConfig
from ..data import Dataset, Sequences
from ..errors import InputError
from ..fingerprints import NOT_COMPARED, changed_settings
from ..models import check_views
from ..precision import Precision
from ..ranks import ALONE, Ranks, refuse_disagreement
from ..states import (
    FeatureTable,
    ItemSource,
    StateReader,
    ViewShape,
    content_digest,
    final_states,
    load_table,
    open_states,
    unread_table,
)
from .checkpoints import RESTORE

Descriptions = dict[str, dict[str, Any]]  # of views, by name


@contextmanager
def open_source(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    placement: str,
    precision: Precision,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[ItemSource, Descriptions]]:
    """Yield the source of a run's items, and the description of each view by name; close the source at the end.

    placement: one of config.PLACEMENTS. precision: of the run; its `table` is the dtype of the states. ranks: that open
    it together. Raises InputError, on all of them, if states, contents or encoders are missing, do not fit the method,
    or differ between the ranks.
    """
    if config.has_states:
        source, views = _open_states(config, dataset.sequences, device, placement, precision.table, ranks)
    elif uncached := config.uncached:
        source, views = ranks.all_do(
            lambda: _open_encoders(config, uncached, dataset, device, placement, precision.table)
        )
    else:
        source = item_numbers(len(dataset.sequences.item_ids), device)
        views = {}
    with closing(source):
        yield source, views


@contextmanager
def open_unread_source(
    config: RunConfig, dataset: Dataset, device: torch.device, placement: str, precision: Precision
) -> Iterator[tuple[ItemSource, Descriptions, tuple[int, str]]]:
    """Open the source of a run's items without loading stored states, and say the size and the place of its table.

    Yields the source, the descriptions of the views, and the table's bytes and place, as `place` names it. The bytes
    are 0 if there is no table. Raises InputError as `open_source` does.
    """
    if not config.has_states:
        with open_source(config, dataset, device, placement, precision) as (source, views):
            inputs = getattr(source, "inputs", source)  # an EncodedTable reads an InputTable
            yield source, views, (0, "device") if config.uncached is None else (inputs.size, inputs.place)
        return
    item_ids = dataset.sequences.item_ids
    states, views = _described_states(config, item_ids)
    groups = config.model.layer_groups
    source, plan = unread_table(states, config.views, item_ids, device, placement, precision.table, groups)
    with closing(source):
        yield source, views, (plan.size, plan.place)


@contextmanager
def open_final_states(config: RunConfig, item_ids: list[str]) -> Iterator[tuple[ItemSource, Descriptions]]:
    """Yield the last stored layer of each view of a run, and the descriptions of the views.

    Raises InputError if the cache, a view or an item's states are missing.
    """
    states, views = _described_states(config, item_ids)
    with closing(final_states(states, config.views, item_ids)) as source:
        yield source, views


def refuse_changed_views(recorded: Descriptions, views: Descriptions, run: Path) -> None:
    """Raise InputError if states or encoders are not those with which a run began.

    recorded: of the run folder `run`. views: those of now.
    """
    if recorded.keys() != views.keys():
        raise InputError(
            f"{run / 'views.json'}: expected the views {', '.join(views)}, found {', '.join(recorded)}; {RESTORE}"
        )
    for name, description in recorded.items():
        if changed := changed_settings(description, views[name]):
            raise InputError(f"{run}: view {name!r} has changed since the run began: {'; '.join(changed)}; restore it")


def refuse_missing_libraries(config: RunConfig) -> None:
    """Raise InputError if the run's method needs a library that is not installed. Nothing is loaded."""
    if config.model.method == "lora" and find_spec("peft") is None:
        raise InputError("method: lora needs peft; pip install 'iisan-fast[lora]'")


def item_numbers(items: int, device: torch.device) -> FeatureTable:
    """Return a table with the item numbers as its only view: int64 [items + 1, 1, 1]."""
    return FeatureTable((torch.arange(items + 1, device=device).view(-1, 1, 1),))


def _open_states(
    config: RunConfig,
    sequences: Sequences,
    device: torch.device,
    placement: str,
    dtype: torch.dtype | None,
    ranks: Ranks,
) -> tuple[ItemSource, Descriptions]:
    """Return the table of stored states, and the descriptions of its views. Raises InputError as `open_source` does."""
    item_ids = sequences.item_ids
    states, views = ranks.all_do(lambda: _described_states(config, item_ids))
    for name, view in views.items():
        compared = {key: value for key, value in view.items() if key not in NOT_COMPARED}
        refuse_disagreement(ranks, {f"view {name!r}": compared})
    groups = config.model.layer_groups
    standardise = config.model.standardise
    table = load_table(states, config.views, item_ids, device, placement, dtype, groups, standardise, ranks)
    return table, views


def _described_states(config: RunConfig, item_ids: list[str]) -> tuple[StateReader, Descriptions]:
    """Open a run's stored states, and describe its views: the states that are read later are those.

    Raises InputError for states that cannot be read, and for views that the method cannot take.
    """
    cache = None if config.cache is None else Path(config.cache)
    with ExitStack() as opened:
        states = opened.enter_context(closing(open_states(cache, config.features, item_ids)))
        described = {name: states.view(name) for name in config.views}
        _refuse_unfit_views(config, described)
        views = {name: {**view, "contents": states.contents(name, item_ids)} for name, view in described.items()}
        opened.pop_all()
    return states, views


def _refuse_unfit_views(config: RunConfig, views: Descriptions) -> None:
    """Raise InputError if the method cannot take the views. Their states are not read."""
    shapes = [ViewShape(len(view["layers"]), view["width"]) for view in views.values()]
    if config.model.method in SIDE_METHODS and config.model.layer_groups is None:
        check_views(shapes, config.model)
    if config.model.method == "frozen":
        for name, view in views.items():
            if view["source"] != FEATURES and view["layers"][-1] != view["depth"] - 1:
                raise InputError(
                    f"layers: frozen reads the encoder's final state, layer {view['depth'] - 1}; view {name!r} of the "
                    f"cache ends with layer {view['layers'][-1]}"
                )


def _open_encoders(
    config: RunConfig,
    uncached: UncachedConfig,
    dataset: Dataset,
    device: torch.device,
    placement: str,
    dtype: torch.dtype | None,
) -> tuple[ItemSource, Descriptions]:
    """Return a source that runs the encoders in every step, and the descriptions of its views.

    placement: where the inputs lie, as the setting of `--table` names it.
    dtype: of the states that frozen encoders give to the model; None: the dtype that `uncached` rounds them to.
    Raises InputError for inputs or encoders that cannot be used, and for a sharded table, which holds stored states.
    """
    if placement == "sharded":
        raise InputError("table: sharded is for stored states, and this run encodes its items itself; choose another")
    from ..states import EncodedTable, open_inputs  # imports transformers, which takes seconds

    tuned = config.model.method in TUNING_METHODS
    views = [_resolved(view, config.model.layer_groups, tuned) for view in uncached.views]
    inputs = open_inputs(
        dataset, views, device, placement, uncached.missing_images, attention=uncached.attention, trained=tuned
    )
    descriptions = {
        view.name: {
            "source": view.source,
            **({} if view.source == "image" else _text_description(dataset, view.source)),
            **backbone.describe(),
            "dtype": uncached.dtype,
        }
        for view, backbone in zip(views, inputs.backbones)
    }
    if tuned:
        return inputs, descriptions
    return EncodedTable(inputs, getattr(torch, uncached.dtype), dtype), descriptions


def _resolved(view: ViewConfig, layer_groups: int | None, tuned: bool) -> ViewConfig:
    """Return the view with the run's layer groups, and with float32 weights if its encoder is trained."""
    if layer_groups is not None and view.layers is None:
        view = replace(view, layer_groups=layer_groups)
    if tuned and view.encoder_dtype == "auto":
        view = replace(view, encoder_dtype="float32")
    return view


def _text_description(dataset: Dataset, source: str) -> dict[str, Any]:
    """Return how a dataset's texts were read, with a digest of all of them."""
    digests = (content_digest((text or "").encode()) for text in dataset.texts(source))
    return {**dataset.how_read(source), "contents": sha256(b"".join(digests)).hexdigest()}
