"""Encode further items as a trained run encodes its catalogue: by its encoders, statistics, weights and basis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import NEIGHBOURS, SIDE_METHODS, TUNING_METHODS, RunConfig
from ..data import ItemContents
from ..errors import InputError, first_few
from ..kernels import States
from ..models import Recommender, Similarity, build_recommender, popularity_scores
from ..precision import resolve_precision
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..states import EncoderPlaces, RecordedEncoders, StateStatistics
from .checkpoints import RESTORE, load_weights
from .run_folder import RunFolder


class EncodedItems(NamedTuple):
    """The vectors and coordinates by which a run ranks N items. All tensors are float32 on the host."""

    vectors: Tensor  # [N, d]
    coordinates: Tensor | None  # [N, dims] of similarity; None for a run without it


class RunItemEncoder:
    """The item encoder of a run's best checkpoint, over the contents of a few items."""

    def __init__(
        self,
        config: RunConfig,
        encoders: RecordedEncoders,
        model: Recommender | None,
        statistics: Mapping[str, StateStatistics],
        similarity: Similarity | None,
        training_counts: np.ndarray,
        table_dtype: torch.dtype | None,
    ) -> None:
        """Take the parts of a run.

        model: None for the method neighbours. statistics: of each view that is standardised. training_counts: of each
        item number of the run, int64 [items + 1]. table_dtype: of the states that the model reads; None for the
        recorded one.
        """
        self.config = config
        self.encoders = encoders
        self.model = model
        self.statistics = statistics
        self.similarity = similarity
        self.training_counts = training_counts
        self.table_dtype = table_dtype

    @torch.inference_mode()
    def encode(self, numbers: np.ndarray) -> EncodedItems:
        """Return the vectors and coordinates of all items.

        numbers: of the items in the run's training, int64 [N], whose trained vectors are added if the run has such; 0
        for an item that it was not trained with.
        """
        parts = []
        rows = torch.arange(1, self.encoders.rows)
        with progress_bar("encoding items", len(rows), "items") as advance:
            for items in rows.tensor_split(-(-len(rows) // self.encoders.items_at_once)):
                parts.append(self._part(items, torch.from_numpy(numbers[items.numpy() - 1])))
                advance(len(items))
        vectors, coordinates = zip(*parts)
        return EncodedItems(torch.cat(vectors), None if self.similarity is None else torch.cat(coordinates))

    def _part(self, items: Tensor, numbers: Tensor) -> EncodedItems:
        """Return the vectors and coordinates of a few items. numbers: as in `encode`, of these items."""
        if self.config.model.method in TUNING_METHODS:
            return EncodedItems(self._vectors(self.encoders.inputs(items), numbers), None)
        states = self.encoders.states(items)
        coordinates = None
        if self.similarity is not None:
            coordinates = self.similarity.project([view[:, -1] for view in states]).cpu()
        if self.model is None:
            counts = np.concatenate([[0], self.training_counts[numbers.numpy()]])
            return EncodedItems(popularity_scores(counts, 0, torch.device("cpu"))[1], coordinates)
        return EncodedItems(self._vectors(self._table(states), numbers), coordinates)

    def _table(self, states: list[Tensor]) -> list[States]:
        """Return the rows that a run's table would have: the selected layers, in its dtype, standardised."""
        views = []
        for name, selected in zip(self.encoders.descriptions, self.encoders.selected(states)):
            table = selected.to(self.table_dtype or selected.dtype)
            if name in self.statistics:
                self.statistics[name].standardise(table)
            views.append(States(table))
        return views

    def _vectors(self, inputs: list, numbers: Tensor) -> Tensor:
        """Return the item vectors for the inputs of the item encoder."""
        assert self.model is not None
        return self.model.encoded(inputs, numbers).float().cpu()


@contextmanager
def open_item_encoder(
    folder: RunFolder,
    contents: ItemContents,
    places: EncoderPlaces,
    device: torch.device,
    similarity: Similarity | None,
    training_counts: np.ndarray,
    missing_images: str | None = None,
) -> Iterator[RunItemEncoder]:
    """Open the item encoder of a run's best checkpoint for these items, whose contents are all checked.

    similarity: of the run. training_counts: of each item number of the run, int64 [items + 1]. missing_images: one of
    config.MISSING_IMAGES; None for the run's. Raises InputError for a method that learns no contents, for contents that
    are missing or cannot be read, and for an encoder that is missing or is not that of the run.
    """
    fix_cublas_workspace()
    config = on_device(folder.config, device)
    descriptions = folder.views
    _refuse_without_contents(folder.path, config, descriptions, contents)
    uncached = config.uncached
    with RecordedEncoders(
        contents,
        descriptions,
        places,
        device,
        missing_images or ("error" if uncached is None else uncached.missing_images),
        "auto" if uncached is None else uncached.attention,
        tuned=config.model.method in TUNING_METHODS,
        layer_groups=config.model.layer_groups if config.has_states else None,
        features=config.features,
    ) as encoders:
        if config.model.method == NEIGHBOURS:
            yield RunItemEncoder(config, encoders, None, {}, similarity, training_counts, None)
            return
        tensors, _ = folder.load_best()
        precision = resolve_precision(config, device)
        model = build_recommender(encoders, config, training_counts / training_counts.sum(), precision)
        load_weights(model, tensors, folder.best)
        statistics = stored_statistics(tensors, list(descriptions), folder.best) if config.model.standardise else {}
        yield RunItemEncoder(
            config, encoders, model.to(device).eval(), statistics, similarity, training_counts, precision.table
        )


def on_device(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the configuration with a precision that the device has: a run of a GPU may rank on a CPU."""
    if device.type == "cpu" and config.model.method in SIDE_METHODS:
        return replace(config, train=replace(config.train, precision="auto"))
    return config


def _refuse_without_contents(
    run: Path, config: RunConfig, descriptions: Mapping[str, Mapping[str, object]], contents: ItemContents
) -> None:
    """Raise InputError if the run has no vectors for new items, or if contents that it reads are missing as a whole."""
    method = config.model.method
    if method == "id":
        raise InputError(
            f"{run}: the method id learns a vector for each item number, so it has none for new contents; "
            "train a run of a method that reads contents, such as iisan"
        )
    if not descriptions:
        raise InputError(
            f"{run}: this run of {method} reads no contents, so it cannot rank new items; train with a cache"
        )
    sources = {view["source"] for view in descriptions.values()}
    if "image" in sources and contents.images is None:
        raise InputError(f"{run}: the run reads images, found none; give their folder by --images, in Python images=")
    if "image" not in sources and contents.images is not None:
        raise InputError(f"{run}: the run reads no images; leave --images out, in Python images=")
    needs_captions = any(
        view["source"] == "caption" and view.get("missing_captions", "error") == "error"
        for view in descriptions.values()
    )
    if needs_captions:
        lacking = [item_id for item_id, caption in zip(contents.item_ids, contents.captions) if not caption]
        if lacking:
            raise InputError(
                f"{run}: the run reads captions, and {len(lacking)} of {len(contents.item_ids)} items have none "
                f"({first_few(lacking, len(lacking))}); give them in the column caption of a .csv, .parquet or .jsonl "
                "file"
            )


def stored_statistics(tensors: Mapping[str, Tensor], views: list[str], path: Path) -> dict[str, StateStatistics]:
    """Return the statistics of each view in a best checkpoint. Raises InputError, naming the file, if they are missing.

    The shapes fit, because a run's weights do.
    """
    statistics = {}
    for view in views:
        mean, deviation = (tensors.get(f"states.{name}.{view}") for name in ("mean", "deviation"))
        if mean is None or deviation is None:
            raise InputError(f"{path}: the statistics of view {view!r} are missing; {RESTORE}")
        statistics[view] = StateStatistics(mean, deviation)
    return statistics
