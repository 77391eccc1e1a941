"""Extract the hidden states of a catalogue with frozen encoders into a store, one batch of items at a time.

All content is checked before the first state is written. A stopped extraction continues with the items that are not
stored yet. A later extraction encodes only the items whose content is new or has changed, or whose stored states are
damaged.

Views that differ only in pooling and layers, and lack the same items, are extracted together with one forward of the
encoder for each batch. The states are the same as if each view were extracted alone.

The ranks of a job fill the shards of a cache. They exchange nothing while they encode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ExtractionConfig, ViewConfig
from ..data import Dataset
from ..encoders import load_backbones, views_by_model
from ..errors import Stopped
from ..files import refuse_unwritable
from ..progress import progress_bar
from ..ranks import ALONE, Ranks
from ..runtime import fix_cublas_workspace
from ..stop_signals import stop_requests
from ..workers import batched
from .encoder_inputs import inputs_ahead, open_sources, view_inputs
from .entries import entry_bytes
from .extraction_parts import begin_cache
from .extraction_plan import Job, Plan, PlannedPart, plan_extraction, refuse_other_plans
from .shards import Shard
from .state_writer import StateWriter
from .store import Store

if TYPE_CHECKING:
    from ..encoders import Backbone

LOGGER = logging.getLogger(__name__)
STATE_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
DEFAULTS = ExtractionConfig()
PATIENCE = timedelta(days=100)  # in which all ranks end; one whose shard is complete waits for the others
SUMMED = ("items", "encoded", "entry_bytes")


@dataclass(frozen=True)
class Extracted:
    """The counts of an extraction for one view."""

    view: str
    items: int  # in the catalogue, or in the one shard that was asked for
    encoded: int  # in this call, or to encode in a dry run; the store had the others already
    blank: int | None  # of the encoded ones, from a blank image; None after a dry run
    entry_bytes: int  # of the encoded ones' entries in the store


def extract(
    dataset: Dataset,
    views: list[ViewConfig],
    cache: Path,
    device: torch.device,
    config: ExtractionConfig = DEFAULTS,
    dry_run: bool = False,
    shard: Shard | None = None,
    ranks: Ranks = ALONE,
) -> list[Extracted]:
    """Encode every item of the dataset's catalogue, and store its hidden states of each view in the folder `cache`.

    config: with `workers` 0, this process reads the images; with None, the number of processes is chosen by idle CPUs
    and the size of the catalogue. The processes do not import the main module. dry_run: do all checks, write nothing,
    and count the items to encode. shard: encode its items alone. ranks: the processes that fill the shards of a cache
    together. A process alone fills all shards that the cache has. Returns the counts of each view, in the order of
    `views`; on all ranks those of the whole job.

    Raises InputError, before anything is written, for content that is missing or cannot be read, an encoder that cannot
    be used, a folder that cannot be written, or a store that other encoders or settings have filled. Raises InputError
    after the good states were written if a hidden state is not finite.
    """
    fix_cublas_workspace()
    ranks = ranks.apart(wait=PATIENCE)
    item_ids = dataset.sequences.item_ids
    with ExitStack() as stack:

        def plan() -> Plan:
            refuse_unwritable(cache)
            jobs = _jobs(stack, dataset, views, device, config, ranks)
            backbones = {backbone.view.name: backbone for job in jobs for backbone in job.backbones}
            descriptions = {view.name: _describe(backbones[view.name], config.dtype, dataset) for view in views}
            return plan_extraction(jobs, descriptions, cache, item_ids, not dry_run, shard, ranks)

        planned = ranks.all_do(plan)
        refuse_other_plans(planned, dataset, config, device, ranks)
        if dry_run:
            counts = [_counts(part, planned, [None] * len(part.jobs)) for part in planned.parts]
        else:
            begin_cache(cache, planned.shards, planned.rows, ranks)
            counts = [_fill(part, planned, item_ids, config) for part in planned.parts]
    none = [Extracted(view.name, 0, 0, None if dry_run else 0, 0) for view in views]
    return _added(ranks.from_all(_added([none, *counts])))


def _jobs(
    stack: ExitStack,
    dataset: Dataset,
    views: list[ViewConfig],
    device: torch.device,
    config: ExtractionConfig,
    ranks: Ranks,
) -> list[Job]:
    """Load the encoders, and return their jobs. The images stay open as long as the stack.

    Raises InputError for content that is missing, or an encoder that cannot be used.
    """
    images = stack.enter_context(open_sources(dataset, views, config.missing_images))
    backbones = load_backbones(views, device, config.attention, shared=True)
    jobs = []
    for positions in views_by_model(backbones):
        sharing = [backbones[position] for position in positions]
        inputs = view_inputs(sharing[0], dataset, images, config.missing_images)
        workers = config.workers if sharing[0].view.source == "image" else 0
        jobs.append(Job(sharing, inputs, workers, ranks.on_this_machine))
    return jobs


def _describe(backbone: Backbone, dtype: str, dataset: Dataset) -> dict[str, Any]:
    """Return a view's description for the store's manifest."""
    name = backbone.view.source
    source = {"source": name} | ({} if name == "image" else dataset.how_read(name))
    versions = {name: metadata.version(name) for name in STATE_LIBRARIES}
    return {**source, **backbone.describe(), "dtype": dtype, "versions": versions}


def _fill(planned: PlannedPart, plan: Plan, item_ids: list[str], config: ExtractionConfig) -> list[Extracted]:
    """Encode the rows of a part, and return the counts of each view. Raises Stopped after a signal."""
    part = planned.part
    if not part.can_write:  # and `begin_cache` has found that it lacks nothing
        return _counts(planned, plan, [0] * len(planned.jobs))
    dtype = getattr(torch, config.dtype)
    with part.open() as store:
        if part.shard is not None and any(rows for _, rows in planned.jobs):
            store.begin_shard(plan.descriptions)
        else:
            store.add_views(plan.descriptions)
        _mention_other_versions(plan.descriptions, store)
        blanks = []
        for job, rows in planned.jobs:
            blanks.append(_run(job, rows, StateWriter(store, job.views, dtype, item_ids), config.batch_size))
        if part.shard is not None:
            store.finish_shard()
    return _counts(planned, plan, blanks)


def _counts(planned: PlannedPart, plan: Plan, blanks: Sequence[int | None]) -> list[Extracted]:
    """Return the counts of a part, in the order of the views. blanks: of each job."""
    results = {}
    for (job, rows), blank in zip(planned.jobs, blanks):
        for name in job.views:
            size = len(rows) * entry_bytes(plan.descriptions[name])
            results[name] = Extracted(name, len(planned.part.rows), len(rows), blank, size)
    return [results[name] for name in plan.descriptions]


def _added(counts: Sequence[list[Extracted]]) -> list[Extracted]:
    """Return the sums, view by view, of counts that have the same views in one order."""
    sums = []
    for of_view in zip(*counts):
        first = of_view[0]
        blank = None if first.blank is None else sum(one.blank for one in of_view)
        items, encoded, size = (sum(getattr(one, name) for one in of_view) for name in SUMMED)
        sums.append(Extracted(first.view, items, encoded, blank, size))
    return sums


def _run(job: Job, todo: list[int], writer: StateWriter, batch_size: int) -> int:
    """Encode the rows, store their states through the writer, and return the number of blank images.

    Raises Stopped after a signal; the states of the batches that were encoded until then are stored.
    """
    workers = job.worker_count(len(todo))
    pin = job.device.type == "cuda"
    blank = 0
    encoded = 0
    with (
        stop_requests() as request,
        progress_bar(f"encoding {', '.join(job.views)}", len(todo), "items") as advance,
        closing(inputs_ahead(job.inputs.batch, batched(todo, batch_size), workers, pin)) as batches,
        writer,
    ):
        for batch in batches:
            writer.add(batch, job.backbones[0].encode_views(job.backbones, batch.inputs))
            blank += batch.blank
            encoded += len(batch.rows)
            advance(len(batch.rows))
            if request.signal_number is not None and encoded < len(todo):
                raise Stopped(
                    f"{writer.store.path}: {encoded} of {len(todo)} items of {', '.join(job.views)} are stored; "
                    "the same command goes on",
                    request.signal_number,
                )
    return blank


def _mention_other_versions(descriptions: dict[str, dict[str, Any]], store: Store) -> None:
    """Log a warning for each view whose states were stored under other library versions."""
    for name, description in descriptions.items():
        recorded = store.views[name].get("versions", {})
        changed = [
            f"{library} {recorded.get(library)} there, {version} now"
            for library, version in description["versions"].items()
            if recorded.get(library) != version
        ]
        if changed:
            LOGGER.warning("view %r was begun with other library versions: %s", name, ", ".join(changed))
