"""Extraction: a catalogue through frozen encoders into a store, streaming, a batch of items at a time.

Everything is checked before the first state is written. A killed extraction resumes with what it had not yet written,
and a later one adds or redoes only the items whose content is new or has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ATTENTIONS, MISSING_IMAGES, STORE_DTYPES, ViewConfig
from ..data import Dataset
from ..encoders import Backbone, load_backbones
from ..errors import InputError, check_choice, check_range
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..workers import batched, worker_count
from .encoder_inputs import EncoderBatch, ViewInputs, inputs_ahead, new_rows, open_sources, view_inputs
from .store import Store

LOGGER = logging.getLogger(__name__)
STATE_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
GROUP_ITEMS, GROUP_BYTES = 1024, 32 << 20  # a transaction takes as many states as reach either; a kill loses one group


@dataclass(frozen=True)
class Extracted:
    """The result of extraction for one view."""

    view: str
    items: int  # in the catalogue
    encoded: int  # now; the rest stood in the store already
    blank: int  # of those encoded now, filled with a blank image


def extract(
    dataset: Dataset,
    views: list[ViewConfig],
    cache: Path,
    device: torch.device,
    batch_size: int = 64,
    dtype: str = "bfloat16",
    missing_images: str = "error",
    workers: int | None = None,
    attention: str = "auto",
) -> list[Extracted]:
    """Put the hidden states of every item into the store at `cache`, one entry an item and view.

    `workers` processes read images ahead (0: this process reads them; None: as idle CPUs and the catalogue suggest).
    They import the main module, so a script calls this under `if __name__ == "__main__"`.

    Raises InputError, before anything is written, for content that is missing or cannot be read, an encoder that
    cannot be used, or a store that was made with other encoders or settings.
    """
    fix_cublas_workspace()
    check_choice("dtype", dtype, STORE_DTYPES)
    check_choice("missing_images", missing_images, MISSING_IMAGES)
    check_choice("attention", attention, ATTENTIONS)
    check_range("batch_size", batch_size, 1)
    if workers is not None:
        check_range("workers", workers, 0)
    with ExitStack() as stack:
        images = stack.enter_context(open_sources(dataset, views, missing_images))
        jobs = []
        for view, backbone in zip(views, load_backbones(views, device, attention)):
            inputs = view_inputs(backbone, dataset, images, missing_images)
            description = _describe(backbone, view, dtype, dataset)
            jobs.append(_Job(view.name, inputs, backbone, description, workers if view.source == "image" else 0))
        descriptions = {job.name: job.description for job in jobs}
        todo = _plan_all(jobs, descriptions, cache, dataset.sequences.item_ids)
        store = stack.enter_context(Store(cache, writable=True))
        store.add_views(descriptions)
        return [_run(job, todo[job.name], store, dataset.sequences.item_ids, batch_size) for job in jobs]


@dataclass(frozen=True)
class _Job:
    name: str
    inputs: ViewInputs
    backbone: Backbone
    description: dict[str, Any]
    workers: int | None  # that read its content; None: not decided


class _Writer:
    """Stores one view's states, several batches in a transaction; leaving the context stores the rest."""

    def __init__(self, store: Store, job: _Job, item_ids: list[str]) -> None:
        self.store, self.job, self.item_ids = store, job, item_ids
        self.dtype = getattr(torch, job.description["dtype"])
        self.pending: list[tuple[Sequence[int], list[bytes], Tensor]] = []  # rows, digests, states; never the inputs

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, batch: EncoderBatch, states: Tensor) -> None:
        """Take a batch's states [N, K, D], on any device. Raises InputError for states that are not finite."""
        self.pending.append((batch.rows, batch.digests, states.to(self.dtype)))
        items = sum(len(states) for *_, states in self.pending)
        if items >= GROUP_ITEMS or sum(states.nbytes for *_, states in self.pending) >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        ids = [self.item_ids[row] for rows, *_ in self.pending for row in rows]
        digests = [digest for _, batch_digests, _ in self.pending for digest in batch_digests]
        states = torch.cat([states for *_, states in self.pending])
        finite = states.isfinite().flatten(1).all(dim=1).tolist()
        good = [index for index, ok in enumerate(finite) if ok]
        if good:
            self.store.write(self.job.name, [ids[i] for i in good], [digests[i] for i in good], states[good])
        self.pending.clear()
        if len(good) < len(ids):
            bad = ids[finite.index(False)]
            raise InputError(f"view {self.job.name!r}, item {bad!r}: hidden states are not finite in {self.dtype}")


def _describe(backbone: Backbone, view: ViewConfig, dtype: str, dataset: Dataset) -> dict[str, Any]:
    source = {"source": view.source} | ({} if view.source == "image" else dataset.how_read(view.source))
    versions = {name: metadata.version(name) for name in STATE_LIBRARIES}
    return {**source, **backbone.describe(), "dtype": dtype, "versions": versions}


def _plan_all(
    jobs: list[_Job], descriptions: dict[str, dict[str, Any]], cache: Path, item_ids: list[str]
) -> dict[str, list[int]]:
    """Return {view: the rows to encode, in order}, once all of them can be read and the store can take them."""
    with ExitStack() as stack:
        begun = (cache / "manifest.json").exists()
        store = stack.enter_context(Store(cache, writable=True)) if begun else None
        if store is not None:
            store.check_views(descriptions)
        todo = {}
        for job in jobs:
            stored = [None] * len(item_ids) if store is None else list(store.digests(job.name, item_ids))
            workers = worker_count(job.workers, len(stored), job.backbone.device)
            todo[job.name] = new_rows(job.name, job.inputs, stored, item_ids, workers)
        return todo


def _run(job: _Job, todo: list[int], store: Store, item_ids: list[str], batch_size: int) -> Extracted:
    _mention_other_versions(job, store)
    device = job.backbone.device
    workers, pin = worker_count(job.workers, len(todo), device), device.type == "cuda"
    blank = 0
    with (
        progress_bar(f"encoding {job.name}", len(todo), "items") as advance,
        closing(inputs_ahead(job.inputs.batch, batched(todo, batch_size), workers, pin)) as batches,
        _Writer(store, job, item_ids) as writer,
    ):
        for batch in batches:
            writer.add(batch, job.backbone.encode(batch.inputs))
            blank += batch.blank
            advance(len(batch.rows))
    return Extracted(job.name, len(item_ids), len(todo), blank)


def _mention_other_versions(job: _Job, store: Store) -> None:
    recorded = store.views[job.name].get("versions", {})
    changed = [
        f"{name} {recorded.get(name)} there, {version} now"
        for name, version in job.description["versions"].items()
        if recorded.get(name) != version
    ]
    if changed:
        LOGGER.warning("view %r was begun with other versions: %s", job.name, ", ".join(changed))
