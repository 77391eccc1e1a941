"""Extraction: a catalogue through frozen encoders into a store, streaming, a batch of items at a time.

Everything is checked before the first state is written. A killed extraction resumes where it stopped, and a later one
adds or redoes only the items whose content is new or has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from .backbones import Backbone, load_backbone
from .config import STORE_DTYPES, ViewConfig
from .errors import InputError, first_few
from .hidden_states import DIGEST_BYTES, Store, content_digest
from .items import ImageError, ImageFolder, ImageLmdb, open_images
from .progress import progress_bar
from .sequences import Dataset

LOGGER = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")
MISSING_IMAGES = ("error", "blank")
BLANK = Image.new("RGB", (224, 224), "white")


@dataclass(frozen=True)
class Extracted:
    """What extraction did for one view."""

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
) -> list[Extracted]:
    """Puts the hidden states of every item into the store at `cache`, one entry per item and view.

    Raises InputError, before anything is written, for content that is missing or cannot be read, an encoder that
    cannot be used, or a store made with other encoders or settings.
    """
    if dtype not in STORE_DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(STORE_DTYPES)}, found {dtype!r}")
    if missing_images not in MISSING_IMAGES:
        raise InputError(f"missing_images: expected one of {', '.join(MISSING_IMAGES)}, found {missing_images!r}")
    with ExitStack() as stack:
        images = None
        if any(view.source == "image" for view in views):
            images = stack.enter_context(open_images(dataset.root))
        jobs = []
        for view in views:
            contents = _contents(view, dataset, images, missing_images == "blank")
            backbone = load_backbone(view, device)
            description = _describe(backbone, view, dtype, dataset.unescaped)
            jobs.append(_Job(view.name, contents, backbone, description))
        descriptions = {job.name: job.description for job in jobs}
        todo = _plan_all(jobs, descriptions, cache, dataset.sequences.item_ids)
        store = stack.enter_context(Store(cache, writable=True))
        store.add_views(descriptions)
        return [_run(job, todo[job.name], store, dataset, batch_size) for job in jobs]


class _Contents(Protocol):
    """One view's raw contents, by row of the catalogue."""

    def accepted(self, row: int) -> tuple[bytes, ...]: ...  # digests with which stored states still stand
    def problem(self, row: int) -> str | None: ...  # why the row cannot be encoded
    def fetch(self, row: int) -> tuple[bytes, Any, bool]: ...  # digest, what the encoder takes, whether it is blank


@dataclass(frozen=True)
class _Job:
    name: str
    contents: _Contents
    backbone: Backbone
    description: dict[str, Any]


class _Texts:
    def __init__(self, texts: list[str | None]) -> None:
        self.texts = texts

    def accepted(self, row: int) -> tuple[bytes, ...]:
        text = self.texts[row]
        return () if text is None else (content_digest(text.encode()),)

    def problem(self, row: int) -> str | None:
        return None if (self.texts[row] or "").strip() else "no text"

    def fetch(self, row: int) -> tuple[bytes, str, bool]:
        text = self.texts[row]
        assert text
        return content_digest(text.encode()), text, False


class _Images:
    def __init__(self, images: ImageFolder | ImageLmdb, item_ids: list[str], fill_blank: bool) -> None:
        self.images, self.item_ids, self.fill_blank = images, item_ids, fill_blank

    def accepted(self, row: int) -> tuple[bytes, ...]:
        content = self.images.content(self.item_ids[row])
        blank = (_blank_digest(content),) if self.fill_blank else ()
        return blank if content is None else (content_digest(content), *blank)

    def problem(self, row: int) -> str | None:
        content = self.images.content(self.item_ids[row])
        if self.fill_blank:
            return None
        if content is None:
            return "no image"
        try:
            self.images.decode(content)
        except ImageError as error:
            return str(error)
        return None

    def fetch(self, row: int) -> tuple[bytes, Image.Image, bool]:
        content = self.images.content(self.item_ids[row])
        if content is not None:
            try:
                return content_digest(content), self.images.decode(content), False
            except ImageError:
                if not self.fill_blank:
                    raise
        return _blank_digest(content), BLANK, True


def _contents(
    view: ViewConfig, dataset: Dataset, images: ImageFolder | ImageLmdb | None, fill_blank: bool
) -> _Contents:
    if view.source == "image":
        assert images is not None
        return _Images(images, dataset.sequences.item_ids, fill_blank)
    if view.source == "caption" and not any(dataset.captions):
        raise InputError(f"{dataset.root / 'captions.tsv'}: view {view.name!r} needs captions, found none")
    return _Texts(list(dataset.titles) if view.source == "title" else dataset.captions)


def _describe(backbone: Backbone, view: ViewConfig, dtype: str, unescaped: bool) -> dict[str, Any]:
    source = {"source": view.source} if view.source == "image" else {"source": view.source, "unescaped": unescaped}
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {**source, **backbone.describe(), "dtype": dtype, "versions": versions}


def _plan_all(
    jobs: list[_Job], descriptions: dict[str, dict[str, Any]], cache: Path, item_ids: list[str]
) -> dict[str, list[int]]:
    """{view: the rows to encode}, every one of them readable and the store fit to take them."""
    with ExitStack() as stack:
        begun = (cache / "manifest.json").exists()
        store = stack.enter_context(Store(cache, writable=True)) if begun else None
        if store is not None:
            store.check_views(descriptions)
        todo = {}
        for job in jobs:
            stored = [None] * len(item_ids) if store is None else store.digests(job.name, item_ids)
            todo[job.name] = _plan(job, stored, item_ids)
        return todo


def _plan(job: _Job, stored: Iterable[bytes | None], item_ids: list[str]) -> list[int]:
    todo, problems = [], {}
    with progress_bar(f"reading {job.name}", len(item_ids), "items") as advance:
        for row, digest in enumerate(stored):
            if digest is None or digest not in job.contents.accepted(row):
                todo.append(row)
                if problem := job.contents.problem(row):
                    problems[row] = problem
            advance(1)
    if problems:
        named = first_few((f"{item_ids[row]} ({what})" for row, what in problems.items()), len(problems))
        hint = "; --missing-images blank fills them" if isinstance(job.contents, _Images) else ""
        raise InputError(f"view {job.name!r}: {len(problems)} of {len(item_ids)} items cannot be read: {named}{hint}")
    return todo


def _run(job: _Job, todo: list[int], store: Store, dataset: Dataset, batch_size: int) -> Extracted:
    _mention_other_versions(job, store)
    item_ids, blank = dataset.sequences.item_ids, 0
    dtype = getattr(torch, job.description["dtype"])
    with progress_bar(f"encoding {job.name}", len(todo), "items") as advance:
        for start in range(0, len(todo), batch_size):
            rows = todo[start : start + batch_size]
            digests, contents, blanks = zip(*(job.contents.fetch(row) for row in rows))
            states = job.backbone.encode(job.backbone.prepare(contents)).to(dtype)
            ids = [item_ids[row] for row in rows]
            finite = states.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                item_id = ids[int(finite.long().argmin())]
                raise InputError(f"view {job.name!r}, item {item_id!r}: hidden states are not finite in {dtype}")
            store.write(job.name, ids, list(digests), states)
            blank += sum(blanks)
            advance(len(rows))
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


def _blank_digest(content: bytes | None) -> bytes:
    """Differs from the content's own digest, so that the blank is redone once the image can be read."""
    return blake2b(content or b"", digest_size=DIGEST_BYTES, person=b"blank").digest()
