"""Fill a dataset's captions.tsv with an image-text-to-text model, one batch of items at a time.

A stopped run continues with the items that have no caption yet. captions.json records the model and the settings; if it
is missing, the captions were written by somebody else. Existing lines of captions.tsv are never changed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import ProtocolConfig
from ..data import ImageError, load_dataset, open_images
from ..encoders import Captioner, quiet_hugging_face
from ..errors import InputError, first_few
from ..files import expanded_name, locked, naming, write_atomically
from ..fingerprints import changed_settings
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..settings_files import read_settings
from ..workers import CHECKED_AT_ONCE, batched, calls_ahead, worker_count
from .caption_images import Covers, Frames, Pictures, problems
from .caption_settings import CaptionSettings

DEFAULTS = CaptionSettings()
LOCK_FILE = ".captions.lock"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """The counts of a captioning run."""

    items: int  # in the catalogue
    present: int  # items that had a caption already
    captioned: int  # items that got a caption in this run
    skipped: int  # items whose pictures cannot be read
    empty: int  # items for which the model generated no text; they get no caption


def caption(
    root: Path,
    model: str,
    device: torch.device,
    settings: CaptionSettings = DEFAULTS,
    frames: Path | None = None,
    protocol: ProtocolConfig = ProtocolConfig(),
) -> Captioned:
    """Caption the items of a dataset's catalogue that have no caption yet, from their images or from video frames.

    root: the dataset's folder. model: a folder or a hub name. frames: a folder of video frames, <item_id>/*.jpg in
    natural order; None to use the dataset's images.

    Raises InputError, before the first caption, for pictures that are missing or cannot be read (unless they are
    skipped), a model that cannot be used, captions made by another model or with other settings, or another process
    that captions the same dataset.
    """
    fix_cublas_workspace()
    model = expanded_name(model)
    if not (root / "items.tsv").is_file():  # check before a lock file is written into the wrong folder
        raise InputError(f"{root}: no such dataset; expected a folder with items.tsv and users.tsv")
    with locked(root / LOCK_FILE, f"{root}: another process is captioning this dataset; wait for it to end"):
        captions = _CaptionFile(root)
        dataset = load_dataset(root, protocol)
        present = sum(text is not None for text in dataset.captions)
        todo = [item_id for item_id, text in zip(dataset.sequences.item_ids, dataset.captions) if text is None]
        with quiet_hugging_face(), nullcontext() if frames else open_images(root) as images:
            pictures = Frames(frames, settings.frames_per_item) if frames else Covers(images)
            captioner = Captioner(
                model,
                device,
                settings.prompt,
                settings.max_tokens,
                pictures.at_most,
                settings.dtype,
                settings.trust_remote_code,
            )
            description = captioner.describe() | {"frames_per_item": settings.frames_per_item if frames else None}
            captions.check(description)
            workers = worker_count(settings.workers, len(todo), device)
            readable = _readable(pictures, todo, settings.missing_images, workers)
            if readable:
                captions.begin(model, description, present)
            silent = _fill(captions, captioner, pictures, readable, settings.batch_size)
    return Captioned(
        items=len(dataset.captions),
        present=present,
        captioned=len(readable) - len(silent),
        skipped=len(todo) - len(readable),
        empty=len(silent),
    )


class _CaptionFile:
    """A dataset's captions.tsv, to which lines are only appended, and its captions.json."""

    def __init__(self, root: Path) -> None:
        """Open the files of a dataset, and cut off an incomplete last line that a killed run has left."""
        self.path = root / "captions.tsv"
        self.record = root / "captions.json"
        self.made_here = self.path.exists() and os.path.lexists(self.record)  # a link that leads nowhere is named
        if self.made_here:
            self._cut_torn_line()

    def check(self, settings: dict[str, Any]) -> None:
        """Raise InputError, with the differences, if the existing captions were made with other settings."""
        if self.made_here:
            recorded = read_settings(self.record)
            if not isinstance(recorded.get("settings"), dict):
                raise InputError(f"{self.record}: not a record of captions (no settings); restore it, or remove it")
            if different := changed_settings(recorded["settings"], settings):
                raise InputError(
                    f"{self.path}: made with other settings, by {recorded.get('model')}: {'; '.join(different)}; "
                    f"restore the old settings, or remove the file to caption all items again"
                )

    def begin(self, model: str, settings: dict[str, Any], present: int) -> None:
        """Record the model and the settings in captions.json, unless it exists.

        present: the number of captions that somebody else has written into captions.tsv.
        """
        if self.made_here:
            return
        if self.path.exists():
            LOGGER.info("%s: not made by this command: its %d captions stay, new ones follow", self.path, present)
            if not self.path.read_bytes().endswith(b"\n"):
                self._append(b"\n")
        record = {"model": model, "settings": settings, "captions_before": present}
        write_atomically(self.record, (json.dumps(record, indent=2) + "\n").encode())

    def add(self, captions: dict[str, str]) -> None:
        """Append captions by item id, and return when they are safe on disk."""
        self._append("".join(f"{item_id}\t{text}\n" for item_id, text in captions.items()).encode())

    def _append(self, content: bytes) -> None:
        """Append bytes to captions.tsv, and wait until they are on disk."""
        with naming(self.path), self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _cut_torn_line(self) -> None:
        """Cut off an incomplete last line; remove a file that has no complete line."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            LOGGER.warning("%s: its last line is incomplete; that item is captioned again", self.path)
            os.truncate(self.path, whole)
        if not whole:
            self.path.unlink()
            self.made_here = False


def _readable(pictures: Pictures, item_ids: list[str], missing_images: str, workers: int) -> list[str]:
    """Return the items whose pictures can be read.

    missing_images: "error" raises InputError, with the first few items, if others cannot; "skip" logs a warning.
    """
    requests = batched(item_ids, CHECKED_AT_ONCE)
    check = partial(problems, pictures)
    all_problems: list[str] = []
    with (
        progress_bar("reading images", len(item_ids), "items") as advance,
        closing(calls_ahead(check, requests, workers, modules=(problems.__module__,))) as answers,
    ):
        for answer in answers:
            all_problems += answer
            advance(len(answer))
    unreadable = [f"{item_id} ({problem})" for item_id, problem in zip(item_ids, all_problems) if problem]
    if unreadable:
        message = f"{len(unreadable)} of {len(item_ids)} items to caption: {first_few(unreadable, len(unreadable))}"
        if missing_images == "error":
            raise InputError(f"{message}; missing_images: skip leaves them without a caption")
        LOGGER.warning("no caption for %s", message)
    return [item_id for item_id, problem in zip(item_ids, all_problems) if not problem]


def _fill(
    captions: _CaptionFile, captioner: Captioner, pictures: Pictures, item_ids: list[str], batch_size: int
) -> list[str]:
    """Caption the items, write the captions, and return the items for which the model generated no text."""
    silent: list[str] = []
    with progress_bar("captioning", len(item_ids), "items") as advance:
        for batch in batched(item_ids, batch_size):
            texts = dict(zip(batch, _captions(captioner, pictures, batch)))
            silent += [item_id for item_id in batch if not texts[item_id]]
            if written := {item_id: text for item_id, text in texts.items() if text}:
                captions.add(written)
            advance(len(batch))
    if silent:
        LOGGER.warning("an empty caption, left out, for %d items: %s", len(silent), first_few(silent, len(silent)))
    return silent


def _captions(captioner: Captioner, pictures: Pictures, item_ids: Sequence[str]) -> list[str]:
    """Return the caption of each item. Raises InputError if the GPU has not enough memory for the batch."""
    shown = [_read(pictures, item_id) for item_id in item_ids]
    try:
        return captioner.captions(shown)
    except torch.OutOfMemoryError:
        lower = "lower batch_size, frames_per_item or max_tokens"
        raise InputError(f"not enough GPU memory for {len(shown)} items at a time; {lower}") from None


def _read(pictures: Pictures, item_id: str) -> list[Image.Image]:
    """Return an item's pictures. Raises InputError if they cannot be read."""
    try:
        return pictures.read(item_id)
    except ImageError as error:  # its files have changed since they were checked
        raise InputError(f"item {item_id!r}: {error}") from None
