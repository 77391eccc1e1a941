"""captions.tsv, filled by an image-text-to-text model: a batch of items at a time, so that a stopped run goes on.

What made the captions stands beside them in captions.json, without which captions.tsv is somebody's own. No line of
either kind is ever changed: only items without a caption get one.
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
from ..files import locked, write_atomically
from ..fingerprints import changed_settings
from ..progress import progress_bar
from ..runtime import fix_cublas_workspace
from ..settings_files import read_settings
from ..workers import CHECKED_AT_ONCE, batched, calls_ahead, worker_count
from .caption_images import MISSING_PICTURES, Covers, Frames, Pictures, problems

LOCK_FILE = ".captions.lock"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """Counts of a captioning run."""

    items: int  # in the catalogue
    present: int  # of them that had a caption already
    captioned: int  # now
    skipped: int  # without a picture that can be read
    empty: int  # of which the model said nothing; they are left without a caption, too


def caption(
    root: Path,
    model: str,
    device: torch.device,
    prompt: str | None = None,
    max_tokens: int = 64,
    batch_size: int = 8,
    frames: Path | None = None,
    frames_per_item: int = 4,
    dtype: str = "auto",
    missing_images: str = "error",
    protocol: ProtocolConfig = ProtocolConfig(),
    workers: int | None = None,
) -> Captioned:
    """Captions the items of a dataset's catalogue that have no caption yet, from their images or from `frames`.

    frames: a folder of video frames, <item_id>/*.jpg in natural order, of which `frames_per_item` evenly spread ones
    are shown. dtype: one of config.ENCODER_DTYPES. `workers` processes check the pictures first (None: as idle CPUs and
    the catalogue suggest). In float32 a caption does not depend on the batch it is made in.

    Raises InputError, before a caption is made, for pictures that are missing or cannot be read (unless
    `missing_images` is "skip"), a model that cannot be used, or captions made with another model or other settings.
    """
    fix_cublas_workspace()
    if missing_images not in MISSING_PICTURES:
        raise InputError(f"missing_images: expected one of {', '.join(MISSING_PICTURES)}, found {missing_images!r}")
    if not (root / "items.tsv").is_file():  # before a lock is left where it is none of ours
        raise InputError(f"{root}: no such dataset; expected a folder with items.tsv and users.tsv")
    with locked(root / LOCK_FILE, f"{root}: another process is captioning this dataset; wait for it to end"):
        captions = _CaptionFile(root)
        dataset = load_dataset(root, protocol)
        present = sum(text is not None for text in dataset.captions)
        todo = [item_id for item_id, text in zip(dataset.sequences.item_ids, dataset.captions) if text is None]
        with quiet_hugging_face(), nullcontext() if frames else open_images(root) as images:
            pictures = Frames(frames, frames_per_item) if frames else Covers(images)
            captioner = Captioner(model, device, prompt, max_tokens, pictures.at_most, dtype)
            settings = captioner.describe() | {"frames_per_item": frames_per_item if frames else None}
            captions.check(settings)
            readable = _readable(pictures, todo, missing_images, worker_count(workers, len(todo), device))
            if readable:
                captions.begin(model, settings, present)
            silent = _fill(captions, captioner, pictures, readable, batch_size)
    return Captioned(
        items=len(dataset.captions),
        present=present,
        captioned=len(readable) - len(silent),
        skipped=len(todo) - len(readable),
        empty=len(silent),
    )


class _CaptionFile:
    """captions.tsv, which only grows, and captions.json."""

    def __init__(self, root: Path) -> None:
        """Takes off what a run that was killed while it wrote has left of its last line."""
        self.path, self.record = root / "captions.tsv", root / "captions.json"
        self.made_here = self.path.exists() and self.record.exists()
        if self.made_here:
            self._cut_torn_line()

    def check(self, settings: dict[str, Any]) -> None:
        """Raises InputError where the captions that stand here were made with other settings, saying what differs."""
        if self.made_here:
            recorded = read_settings(self.record)
            if different := changed_settings(recorded.get("settings") or {}, settings):
                raise InputError(
                    f"{self.path}: made otherwise, by {recorded.get('model')}: {'; '.join(different)}; restore the old "
                    f"settings, or remove the file to caption all items again"
                )

    def begin(self, model: str, settings: dict[str, Any], present: int) -> None:
        """Records what makes the captions that will follow."""
        if self.made_here:
            return
        if self.path.exists():
            LOGGER.info("%s: not made by this command: its %d captions stay, only others follow", self.path, present)
            if not self.path.read_bytes().endswith(b"\n"):
                self._append(b"\n")
        record = {"model": model, "settings": settings, "captions_before": present}
        write_atomically(self.record, (json.dumps(record, indent=2) + "\n").encode())

    def add(self, captions: dict[str, str]) -> None:
        """Appends captions by item, and returns once they would survive a crash."""
        self._append("".join(f"{item_id}\t{text}\n" for item_id, text in captions.items()).encode())

    def _append(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _cut_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            LOGGER.warning("%s: its last line is not whole; that item is captioned again", self.path)
            os.truncate(self.path, whole)
        if not whole:
            self.path.unlink()
            self.made_here = False


def _readable(pictures: Pictures, item_ids: list[str], missing_images: str, workers: int) -> list[str]:
    """The items whose pictures can be read. Raises InputError, naming some, for others that are not to be skipped."""
    requests, check = batched(item_ids, CHECKED_AT_ONCE), partial(problems, pictures)
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
    """Captions items, and returns those of which the model said nothing."""
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
    shown = [_read(pictures, item_id) for item_id in item_ids]
    try:
        return captioner.captions(shown)
    except torch.OutOfMemoryError:
        lower = "lower batch_size, frames_per_item or max_tokens"
        raise InputError(f"not enough GPU memory for {len(shown)} items at a time; {lower}") from None


def _read(pictures: Pictures, item_id: str) -> list[Image.Image]:
    try:
        return pictures.read(item_id)
    except ImageError as error:  # it has gone or broken since it was checked
        raise InputError(f"item {item_id!r}: {error}") from None
