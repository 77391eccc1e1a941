"""Runs whose catalogue grows: trained on the first items of a dataset, beside the same states of all items."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from helpers.datasets import histories_in_steps, write_catalogue
from iisan_fast import demo
from iisan_fast.config import ExtractionConfig, RunConfig, ViewConfig
from iisan_fast.data.sequences import Dataset, load_dataset
from iisan_fast.models.recommender import build_recommender
from iisan_fast.models.similarity import Similarity
from iisan_fast.precision import resolve_precision
from iisan_fast.settings import run_config
from iisan_fast.states.extraction import extract
from iisan_fast.states.feature_table import final_states
from iisan_fast.states.standardise import StateStatistics
from iisan_fast.states.store import Store
from iisan_fast.training.checkpoints import load_weights
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.run_terms import read_terms
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
TRAINED, NEW = 40, 8  # items with interactions, and items that are added later


@dataclass(frozen=True)
class GrowingData:
    """A dataset of TRAINED items, the same with NEW items more, and encoders."""

    dataset: Path
    whole: Path
    text: Path
    image: Path

    def views(self, *sources: str, layers: tuple[int, ...] | None = None) -> list[ViewConfig]:
        """Return a view of each source, "title" or "image"."""
        encoders = {"title": self.text, "image": self.image}
        return [ViewConfig(s, s, str(encoders[s]), layers=layers, encoder_dtype="float32") for s in sources]

    def new_ids(self) -> list[str]:
        """Return the ids of the items that are added later."""
        return [f"i{number}" for number in range(TRAINED + 1, TRAINED + NEW + 1)]

    def lines(self, *item_ids: str) -> str:
        """Return the lines of items.tsv for these items."""
        lines = (self.whole / "items.tsv").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if line.split("\t")[0] in item_ids)


def write_growing_data(root: Path) -> GrowingData:
    """Write both datasets, with titles and images, and a text and an image encoder of six blocks."""
    histories = histories_in_steps(60, TRAINED)
    new = [list(range(TRAINED + 1, TRAINED + NEW + 1))]
    data = GrowingData(root / "dataset", root / "whole", root / "text", root / "image")
    write_catalogue(data.dataset, histories, TRAINED + NEW)  # those without interactions are in no catalogue
    write_catalogue(data.whole, histories + new, TRAINED + NEW)
    demo.write_text_encoder(data.text, 0)
    demo.write_image_encoder(data.image, 1)
    return data


def trained_run(data: GrowingData, root: Path, views: list[ViewConfig], dtype: str = "float32", **settings) -> Path:
    """Extract states of the smaller dataset, train for an epoch, and return the run's folder.

    settings: by dotted name; a cache is made unless they say how encoders run.
    """
    is_uncached = settings.pop("uncached", False)
    sources = {"dataset": str(data.dataset)}
    if not is_uncached:
        cache = root / "states"
        extract(load_dataset(data.dataset), views, cache, CPU, ExtractionConfig(dtype=dtype))
        sources |= {"cache": str(cache), "views": [view.name for view in views]}
    trains = settings.get("model.method") != "neighbours"
    changes = {**({"train.max_epochs": 1, "train.batch_users": 16} if trains else {}), **settings}
    config = run_config(sources, {}, encoders=views if is_uncached else (), changes=changes)
    train(config, root / "run", CPU)
    return root / "run"


def whole_catalogue(data: GrowingData, run: Path, root: Path, views: list[ViewConfig]) -> tuple[torch.Tensor, ...]:
    """Return the vectors and the coordinates of all items by a run's weights, from states of the whole dataset.

    The states are those of another extraction, or of encoders that run over the whole dataset. Without a cache there
    are no coordinates.
    """
    folder = RunFolder.open(run)
    config = folder.config
    dataset = load_dataset(data.whole)
    coordinates = torch.empty(0)
    if config.cache is not None:
        cache = root / "whole-states"
        extract(dataset, views, cache, CPU, ExtractionConfig(dtype=folder.views[views[0].name]["dtype"]))
        config = replace(config, cache=str(cache))
        similarity = read_terms(folder).similarity
        coordinates = _coordinates(similarity, Store(cache), config, dataset)
    return _vectors(folder, config, dataset), coordinates


def _coordinates(similarity: Similarity, store: Store, config: RunConfig, dataset: Dataset) -> torch.Tensor:
    item_ids = dataset.sequences.item_ids
    table = final_states(store, config.views, item_ids)
    states = table.read(torch.arange(1, len(item_ids) + 1))
    table.close()
    return similarity.project([view.table[:, -1] for view in states])


def _vectors(folder: RunFolder, config: RunConfig, dataset: Dataset) -> torch.Tensor:
    """Return the vectors of all items, with the statistics and the popularity of the training."""
    tensors, _ = folder.load_best()
    counts = folder.items.training_counts
    popularity = torch.zeros(TRAINED + NEW + 1, dtype=torch.float64).numpy()
    popularity[: len(counts)] = counts / counts.sum()
    precision = resolve_precision(config, CPU)
    plain = replace(config, model=replace(config.model, standardise=False))
    with open_source(plain, dataset, CPU, "device", precision) as (source, _):
        if config.model.standardise:
            for name, table in zip(config.views, source.views):
                statistics = (tensors[f"states.{kind}.{name}"] for kind in ("mean", "deviation"))
                StateStatistics(*statistics).standardise(table[1:])
        model = build_recommender(source, config, popularity, precision)
        load_weights(model, tensors, folder.best)
        return model.eval().catalogue_vectors(source)
