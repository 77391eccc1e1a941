"""Extract the hidden states of a catalogue with frozen encoders into a store, one batch of items at a time.

All content is checked before the first state is written. A stopped extraction continues with the items that are not
stored yet. A later extraction encodes only the items whose content is new or has changed, or whose stored states are
damaged.

Views that differ only in pooling and layers, and lack the same items, are extracted together with one forward of the
encoder for each batch. The states are the same as if each view were extracted alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ExtractionConfig, ViewConfig
from ..data import Dataset
from ..encoders import Backbone, load_backbones, views_by_model
from ..errors import InputError, Stopped
from ..files import refuse_unwritable
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..stop_signals import stop_requests
from ..workers import batched, worker_count
from .encoder_inputs import EncoderBatch, ViewInputs, inputs_ahead, new_rows, open_sources, view_inputs
from .entries import entry_bytes
from .store import Store

LOGGER = logging.getLogger(__name__)
STATE_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
DEFAULTS = ExtractionConfig()
GROUP_ITEMS = 1024
GROUP_BYTES = 32 << 20  # a transaction ends at one of these; a killed run loses only one


@dataclass(frozen=True)
class Extracted:
    """The counts of an extraction for one view."""

    view: str
    items: int  # in the catalogue
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
) -> list[Extracted]:
    """Encode every item of the dataset's catalogue, and store its hidden states of each view in the folder `cache`.

    config: with `workers` 0, this process reads the images; with None, the number of processes is chosen by idle CPUs
    and the size of the catalogue. The processes do not import the main module. dry_run: do all checks, write nothing,
    and count the items to encode. Returns the counts of each view, in the order of `views`.

    Raises InputError, before anything is written, for content that is missing or cannot be read, an encoder that cannot
    be used, a folder that cannot be written, or a store that other encoders or settings have filled. Raises InputError
    after the good states were written if a hidden state is not finite.
    """
    refuse_unwritable(cache)
    fix_cublas_workspace()
    with ExitStack() as stack:
        images = stack.enter_context(open_sources(dataset, views, config.missing_images))
        backbones = load_backbones(views, device, config.attention, shared=True)
        jobs = []
        for positions in views_by_model(backbones):
            sharing = [backbones[position] for position in positions]
            inputs = view_inputs(sharing[0], dataset, images, config.missing_images)
            jobs.append(_Job(sharing, inputs, config.workers if sharing[0].view.source == "image" else 0))
        descriptions = {backbone.view.name: _describe(backbone, config.dtype, dataset) for backbone in backbones}
        item_ids = dataset.sequences.item_ids
        planned = _plan_all(jobs, descriptions, cache, item_ids, not dry_run)
        blanks: list[int | None] = [None] * len(planned)
        if not dry_run:
            store = stack.enter_context(Store(cache, writable=True))
            store.add_views(descriptions)
            _mention_other_versions(descriptions, store)
            for index, (job, rows) in enumerate(planned):
                writer = _Writer(store, job.views, getattr(torch, config.dtype), item_ids)
                blanks[index] = _run(job, rows, writer, config.batch_size)
        results: dict[str, Extracted] = {}
        for (job, rows), blank in zip(planned, blanks):
            for name in job.views:
                size = len(rows) * entry_bytes(descriptions[name])
                results[name] = Extracted(name, len(item_ids), len(rows), blank, size)
        return [results[view.name] for view in views]


@dataclass(frozen=True)
class _Job:
    """The views that one model encodes from one source."""

    backbones: list[Backbone]  # one for each view; all share one model
    inputs: ViewInputs
    workers: int | None  # processes that read the content; None: chosen by `worker_count`

    @property
    def views(self) -> list[str]:
        """Return the views' names."""
        return [backbone.view.name for backbone in self.backbones]

    @property
    def device(self) -> torch.device:
        """Return the device of the model's inputs."""
        return self.backbones[0].device


class _Writer:
    """Collects the states of a job's views, and stores several batches in one transaction.

    A transaction holds the states of all views of an item, so the views stay together if the extraction is stopped.
    Leaving the context stores the rest.
    """

    def __init__(self, store: Store, views: list[str], dtype: torch.dtype, item_ids: list[str]) -> None:
        self.store = store
        self.views = views
        self.dtype = dtype
        self.item_ids = item_ids
        # Of each batch: rows, digests, and the states of each view.
        self.pending: list[tuple[Sequence[int], list[bytes], list[Tensor]]] = []

    def __enter__(self) -> _Writer:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Store the collected states."""
        self._flush()

    def add(self, batch: EncoderBatch, states_by_view: Sequence[Tensor]) -> None:
        """Add a batch with the states [N, K, D] of each view, on any device.

        Raises InputError if a state that is stored in this call is not finite.
        """
        self.pending.append((batch.rows, batch.digests, [states.to(self.dtype) for states in states_by_view]))
        items = sum(len(rows) for rows, *_ in self.pending)
        size = sum(states.nbytes for *_, by_view in self.pending for states in by_view)
        if items >= GROUP_ITEMS or size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Store the collected states that are finite, then raise InputError if others are not."""
        if not self.pending:
            return
        ids = [self.item_ids[row] for rows, *_ in self.pending for row in rows]
        digests = [digest for _, batch_digests, _ in self.pending for digest in batch_digests]
        parts_by_view = zip(*(by_view for *_, by_view in self.pending))
        states_by_view = {view: torch.cat(parts) for view, parts in zip(self.views, parts_by_view)}
        finite = {view: states.isfinite().flatten(1).all(dim=1).tolist() for view, states in states_by_view.items()}
        good = [index for index, in_views in enumerate(zip(*finite.values())) if all(in_views)]
        if good:
            good_states = {view: states[good] for view, states in states_by_view.items()}
            self.store.write_views([ids[i] for i in good], [digests[i] for i in good], good_states)
        self.pending.clear()
        for view, in_items in finite.items():
            if not all(in_items):
                item_id = ids[in_items.index(False)]
                raise InputError(f"view {view!r}, item {item_id!r}: hidden states are not finite in {self.dtype}")


def _describe(backbone: Backbone, dtype: str, dataset: Dataset) -> dict[str, Any]:
    """Return a view's description for the store's manifest."""
    name = backbone.view.source
    source = {"source": name} | ({} if name == "image" else dataset.how_read(name))
    versions = {name: metadata.version(name) for name in STATE_LIBRARIES}
    return {**source, **backbone.describe(), "dtype": dtype, "versions": versions}


def _plan_all(
    jobs: list[_Job], descriptions: dict[str, dict[str, Any]], cache: Path, item_ids: list[str], writable: bool
) -> list[tuple[_Job, list[int]]]:
    """Return the jobs with the rows to encode, in order. Raises InputError if content or store cannot be used.

    writable: open an existing store as a writer, which refuses a store that another extraction writes to. A job whose
    views lack different rows becomes several jobs, because the last bits of a state may differ between batches of
    different items.
    """
    with ExitStack() as stack:
        exists = (cache / "manifest.json").exists()
        store = stack.enter_context(Store(cache, writable)) if exists else None
        if store is not None:
            store.check_views(descriptions)
        planned = []
        for job in jobs:
            for stored, part in _by_stored(job, store, item_ids).items():
                workers = worker_count(part.workers, len(stored), part.device)
                planned.append((part, new_rows(part.views[0], part.inputs, stored, item_ids, workers)))
        return planned


def _by_stored(job: _Job, store: Store | None, item_ids: list[str]) -> dict[tuple[bytes | None, ...], _Job]:
    """Split a job into jobs of views with the same stored digests (None if not stored), by these digests."""
    parts: dict[tuple[bytes | None, ...], list[Backbone]] = {}
    for name, backbone in zip(job.views, job.backbones):
        stored = (None,) * len(item_ids) if store is None else tuple(store.sound_digests(name, item_ids))
        parts.setdefault(stored, []).append(backbone)
    return {stored: replace(job, backbones=backbones) for stored, backbones in parts.items()}


def _run(job: _Job, todo: list[int], writer: _Writer, batch_size: int) -> int:
    """Encode the rows, store their states through the writer, and return the number of blank images.

    Raises Stopped after a signal; the states of the batches that were encoded until then are stored.
    """
    workers = worker_count(job.workers, len(todo), job.device)
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
