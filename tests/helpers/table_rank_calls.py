"""Functions that tests of sharded tables call on the ranks of a job; the processes import them from here."""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from helpers.ranking_calls import random_histories
from iisan_fast.benchmarks.counted_ranks import CountedRanks
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.errors import InputError
from iisan_fast.precision import resolve_precision
from iisan_fast.ranks import Ranks
from iisan_fast.states import placement
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.sharded_table import ShardedTable
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def sharded_rows(ranks: Ranks, cache: Path, item_ids: list[str], lists: list[list[list[int]]], **options) -> dict:
    """Return the rows that a rank gathers, and its part of the table.

    lists: for each gathering, the items of each rank. options: of `load_table`.
    """
    counted = CountedRanks.of(ranks)
    table = load_table(cache, ["a", "b"], item_ids, CPU, "sharded", ranks=counted, **options)
    assert isinstance(table, ShardedTable)
    gathered = []
    sizes = []
    for of_ranks in lists:
        counted.received.clear()
        items = torch.tensor(of_ranks[ranks.rank], dtype=torch.int64)
        gathered.append([view.table for view in table.read(items, table.gather(items))])
        sizes.append(counted.received["exchange"])
    table.close()
    return {
        "gathered": gathered,
        "received": sizes,
        "shard": table.views,
        "statistics": {name: (view.mean, view.deviation) for name, view in table.statistics.items()},
    }


def refused(ranks: Ranks, caches: list[Path], item_ids: list[str], **options) -> str:
    """Return the message of the error that loading a rank's cache raises. caches: of each rank."""
    try:
        load_table(caches[ranks.rank], ["a", "b"], item_ids, CPU, "sharded", ranks=ranks, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def placed(ranks: Ranks, cases: list[tuple[str, list[int]]], size: int) -> list[tuple[str, list[str]]]:
    """Return the place of a table on a rank, or the message of a refusal, and the lines of the log, for each case.

    cases: the placement that is asked for, and the bytes of memory that each rank finds free.
    """
    lines: list[str] = []
    handler: Any = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    placement.LOGGER.addHandler(handler)
    placement.LOGGER.setLevel(logging.INFO)
    results = []
    for asked, free in cases:
        lines.clear()
        placement.free_memory = lambda device, bytes_of=free: bytes_of[ranks.rank]
        try:
            place = placement.place("feature table", asked, size, CPU, "in the store's file", ranks)
        except InputError as error:
            place = str(error)
        results.append((place, [*lines]))
    return results


def counted_exchange(ranks: Ranks, cache: Path, item_ids: list[str], items: list[Tensor]) -> list[int]:
    """Return the bytes that a rank receives from others in each exchange of one gathering. items: of each rank."""
    table = load_table(cache, ["a", "b"], item_ids, CPU, "sharded", ranks=ranks)
    counted: list[int] = []
    exchange = torch.distributed.all_to_all_single

    def counting(into: Tensor, *arguments: Any, **options: Any) -> Any:
        of_ranks = [part.nbytes for part in into.split(arguments[1])]
        counted.append(sum(of_ranks) - of_ranks[ranks.rank])
        return exchange(into, *arguments, **options)

    torch.distributed.all_to_all_single = counting
    try:
        table.gather(items[ranks.rank])
    finally:
        torch.distributed.all_to_all_single = exchange
    return counted


def trained(ranks: Ranks, cache: Path, items: int, stopped_after: int) -> dict[str, dict[str, Any]]:
    """Return the losses, weights and item vectors of an epoch of 40 users over each placement of the table.

    stopped_after: steps after which the batches are closed, with others under way, and begun again from there.
    """
    sequences = random_histories(40, items)
    config = RunConfig(
        "", "", ("a", "b"), model=ModelConfig(embedding_dim=16, bottleneck=8), train=TrainConfig(batch_users=7)
    )
    results: dict[str, dict[str, Any]] = {}
    for place in ("device", "sharded"):
        counted = CountedRanks.of(ranks)
        table = load_table(cache, config.views, sequences.item_ids, CPU, place, ranks=counted)
        trainer = Trainer(config, sequences, table, CPU, resolve_precision(config, CPU), ranks=ranks)
        trainer.model.train()
        losses = []
        for taken, count in ((0, stopped_after), (stopped_after, None)):
            with closing(trainer.batches(0, taken)) as batches:
                losses += [trainer.take(batch).item() for batch in islice(batches, count)]
        received = counted.received["exchange"]
        trainer.model.eval()
        vectors = trainer.model.catalogue_vectors(table, ranks)
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        results[place] = {"losses": losses, "weights": weights, "vectors": vectors, "received": received}
    return results


def opened(ranks: Ranks, caches: list[Path], item_ids: list[str]) -> str:
    """Return the message of the error that opening the states of a rank raises. caches: of each rank."""
    config = RunConfig("", str(caches[ranks.rank]), ("a", "b"), model=ModelConfig(embedding_dim=16, bottleneck=8))
    dataset = SimpleNamespace(sequences=SimpleNamespace(item_ids=item_ids))
    try:
        with open_source(config, dataset, CPU, "sharded", resolve_precision(config, CPU), ranks):
            return ""
    except InputError as error:
        return str(error)
