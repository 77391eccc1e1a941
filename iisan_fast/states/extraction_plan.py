"""Plan an extraction: check all content, and find the rows of the catalogue that each encoder has to encode."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ExtractionConfig
from ..data import Dataset
from ..fingerprints import value_digest
from ..ranks import Ranks, refuse_disagreement
from ..setting_fields import to_dict
from ..workers import worker_count
from .encoder_inputs import ViewInputs, new_rows
from .extraction_parts import Part, parts_of_process, planned_shard_count
from .shards import Shard
from .store import Store

if TYPE_CHECKING:  # importing transformers takes seconds
    from ..encoders import Backbone


@dataclass(frozen=True)
class Job:
    """The views that one model encodes from one source."""

    backbones: list[Backbone]  # one for each view; all share one model
    inputs: ViewInputs
    workers: int | None  # processes that read the content; None: chosen by `worker_count`
    sharing: int  # ranks that share the CPUs of this machine

    @property
    def views(self) -> list[str]:
        """Return the views' names."""
        return [backbone.view.name for backbone in self.backbones]

    @property
    def device(self) -> torch.device:
        """Return the device of the model's inputs."""
        return self.backbones[0].device

    def worker_count(self, items: int) -> int:
        """Return the number of worker processes that read the content of `items` items."""
        return worker_count(self.workers, items, self.device, self.sharing)


@dataclass(frozen=True)
class PlannedPart:
    """A part of the extraction, and its jobs, each with the rows to encode."""

    part: Part
    jobs: list[tuple[Job, list[int]]]


@dataclass(frozen=True)
class Plan:
    """The work of this process."""

    shards: int | None  # of the cache; None: it has none
    descriptions: dict[str, dict[str, Any]]  # of the views, by name
    parts: list[PlannedPart]

    @property
    def rows(self) -> int:
        """Return the number of rows to encode, over all parts and jobs."""
        return sum(len(rows) for part in self.parts for _, rows in part.jobs)


def plan_extraction(
    jobs: list[Job],
    descriptions: dict[str, dict[str, Any]],
    cache: Path,
    item_ids: list[str],
    as_writer: bool,
    shard: Shard | None,
    ranks: Ranks,
) -> Plan:
    """Return the work of this process, after all its content and stores were checked. Nothing is written.

    descriptions: of the jobs' views. as_writer: refuse a store that another extraction writes to. Raises InputError if
    content or a store cannot be used.
    """
    shards = planned_shard_count(cache, shard, ranks)
    parts = []
    for part in parts_of_process(cache, shards, item_ids, shard, ranks):
        part.refuse_other_views(descriptions)
        parts.append(PlannedPart(part, _plan_part(part, jobs, descriptions, item_ids, as_writer)))
    return Plan(shards, descriptions, parts)


def _plan_part(
    part: Part, jobs: list[Job], descriptions: dict[str, dict[str, Any]], item_ids: list[str], as_writer: bool
) -> list[tuple[Job, list[int]]]:
    """Return the jobs with the rows of a part to encode, in order.

    A job whose views lack different rows becomes several jobs, because the last bits of a state may differ between
    batches of different items. Raises InputError if content or the store cannot be used.
    """
    with ExitStack() as stack:
        store = part.open_existing(as_writer)
        if store is not None:
            stack.enter_context(store)
            store.check_views(descriptions)
        planned = []
        for job in jobs:
            for digests, of_views in _by_stored(job, store, [item_ids[row] for row in part.rows]).items():
                stored = list(zip(part.rows, digests))
                workers = of_views.worker_count(len(stored))
                planned.append((of_views, new_rows(of_views.views[0], of_views.inputs, stored, item_ids, workers)))
        return planned


def _by_stored(job: Job, store: Store | None, item_ids: list[str]) -> dict[tuple[bytes | None, ...], Job]:
    """Split a job into jobs of views with the same stored digests (None if not stored), by these digests.

    item_ids: of the part.
    """
    parts: dict[tuple[bytes | None, ...], list[Backbone]] = {}
    for name, backbone in zip(job.views, job.backbones):
        stored = (None,) * len(item_ids) if store is None else tuple(store.sound_digests(name, item_ids))
        parts.setdefault(stored, []).append(backbone)
    return {stored: replace(job, backbones=backbones) for stored, backbones in parts.items()}


def refuse_other_plans(
    plan: Plan, dataset: Dataset, config: ExtractionConfig, device: torch.device, ranks: Ranks
) -> None:
    """Raise InputError on all ranks unless they have the same items, texts, encoders, settings and shards."""
    if not ranks.several:
        return
    sources = sorted({description["source"] for description in plan.descriptions.values()} - {"image"})
    settings = {name: value for name, value in to_dict(config).items() if name != "workers"}
    views = {
        name: {key: value for key, value in description.items() if key != "encoder"}  # a folder may lie elsewhere
        for name, description in plan.descriptions.items()
    }
    values = {
        "items": value_digest(dataset.sequences.item_ids),
        **{f"{source}s": value_digest(dataset.texts(source)) for source in sources},
        **settings,
        "device": device.type,
        "number of shards": plan.shards,
        "views": views,
    }
    refuse_disagreement(ranks, values)
