"""Hold items out of a dataset, and encode a whole catalogue by the weights of a run that was trained without them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import ExtractionConfig, ProtocolConfig, RunConfig, ViewConfig
from ..data import Dataset, ItemContents, load_dataset
from ..errors import InputError
from ..models import Similarity, build_recommender
from ..precision import resolve_precision
from ..states import FeatureTable, StateStatistics, Store, extract, final_states, load_table
from ..training import RunFolder, load_weights

CPU = torch.device("cpu")


class HeldOut(NamedTuple):
    """A dataset without some items, and these."""

    rest: Path  # the folder of the dataset without them
    file: Path  # the items as a file like items.tsv
    item_ids: list[str]
    cold: int  # items of the whole dataset without training interactions, among which they were drawn
    interactions: int  # of the held-out items, which the rest lacks
    lost: int  # other items that are in the whole catalogue, and not in the rest's
    whole: Dataset  # the items of the rest and the held-out ones, without users


def hold_out(dataset: Path, folder: Path, protocol: ProtocolConfig, count: int, seed: int) -> HeldOut:
    """Write a dataset without `count` cold items, drawn at random, and return both parts.

    Cold items have no training interaction: they are targets of the validation or the test. Their interactions are left
    out of the histories, which are then cut and split again; so other items may lose their last user, and older ones
    may join. Raises InputError if there are fewer cold items.
    """
    whole = load_dataset(dataset, protocol).sequences
    cold = np.flatnonzero(whole.training_counts[1:] == 0)
    if len(cold) < count:
        raise InputError(f"items: expected at most {len(cold)}, the cold items of {dataset}, found {count}")
    drawn = np.sort(np.random.default_rng(seed).choice(cold, count, replace=False))
    held = {whole.item_ids[row] for row in drawn}
    rest, file = folder / "rest", folder / "held-out.tsv"
    rest.mkdir(parents=True, exist_ok=True)
    lines = (dataset / "items.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (rest / "items.tsv").write_text("".join(line for line in lines if _id(line) not in held), encoding="utf-8")
    file.write_text("".join(line for line in lines if _id(line) in held), encoding="utf-8")
    removed = _write_histories(dataset / "users.tsv", rest / "users.tsv", held)
    remaining = set(load_dataset(rest, protocol).sequences.item_ids)
    lost = len(set(whole.item_ids) - remaining - held)
    texts = [line.rstrip("\r\n").split("\t") for line in lines]
    ids, titles = zip(*(fields for fields in texts if fields[0] in remaining | held))
    joined = ItemContents(list(ids), list(titles), [None] * len(ids)).dataset(protocol)
    return HeldOut(rest, file, [item_id for item_id in ids if item_id in held], len(cold), removed, lost, joined)


def cache_of(dataset: Dataset, views: list[ViewConfig], cache: Path, dtype: str, exact: Path) -> Path:
    """Return the folder `cache` with the states of a dataset in a dtype, made if it is not there.

    exact: a cache of the same views in float32. States of another dtype are rounded from it, as an extraction in that
    dtype rounds them.
    """
    if dtype == "float32":
        extract(dataset, views, exact, CPU, ExtractionConfig(dtype="float32"))
        return exact
    if (cache / "manifest.json").exists():
        return cache
    item_ids = dataset.sequences.item_ids
    with Store(exact) as source, Store(cache, writable=True) as target:
        target.add_views({name: {**view, "dtype": dtype} for name, view in source.views.items()})
        for name, view in source.views.items():
            states = torch.empty(len(item_ids), len(view["layers"]), view["width"])
            source.read(name, item_ids, states)
            digests = [digest or b"" for digest in source.digests(name, item_ids)]
            target.write(name, item_ids, digests, states.to(getattr(torch, dtype)))
    return cache


def whole_vectors(run: Path, cache: Path, item_ids: list[str], similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Return the vectors and the coordinates of items by a run's weights, statistics and basis, from a cache.

    cache: has states of all these items. item_ids: those of the run come first. similarity: of the run.
    """
    folder = RunFolder.open(run)
    config = folder.config
    tensors, _ = folder.load_best()
    counts = np.zeros(len(item_ids) + 1)
    trained = folder.items.training_counts
    counts[: len(trained)] = trained
    table = _table(config, cache, item_ids, tensors)
    model = build_recommender(table, config, counts / counts.sum(), resolve_precision(config, CPU))
    load_weights(model, tensors, folder.best)
    vectors = model.eval().catalogue_vectors(table)
    states = final_states(Store(cache), config.views, item_ids)
    parts = torch.arange(1, len(item_ids) + 1).split(states.items_at_once)
    coordinates = [similarity.project([view.table[:, -1] for view in states.read(part)]) for part in parts]
    states.close()
    return vectors, torch.cat(coordinates)


def _table(config: RunConfig, cache: Path, item_ids: list[str], tensors: dict[str, Tensor]) -> FeatureTable:
    """Return the states of items, standardised by a run's statistics if it standardises."""
    table = load_table(cache, config.views, item_ids, CPU, "device", layer_groups=config.model.layer_groups)
    assert isinstance(table, FeatureTable)
    if config.model.standardise:
        for name, view in zip(config.views, table.views):
            statistics = StateStatistics(tensors[f"states.mean.{name}"], tensors[f"states.deviation.{name}"])
            statistics.standardise(view[1:])
    return table


def _write_histories(source: Path, target: Path, held: set[str]) -> int:
    """Write a users.tsv without the held-out items, and return the number of interactions left out.

    Users of whom nothing is left are left out.
    """
    removed = 0
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as file:
        for line in lines:
            user_id, history = line.rstrip("\r\n").split("\t")
            items = history.split(" ")
            remaining = [item for item in items if item not in held]
            removed += len(items) - len(remaining)
            if remaining:
                file.write(f"{user_id}\t{' '.join(remaining)}\n")
    return removed


def _id(line: str) -> str:
    """Return the item id of a line of items.tsv."""
    return line.split("\t")[0]
