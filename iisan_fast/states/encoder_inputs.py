"""The inputs of a view's encoder, by row of the catalogue: rows to encode, content that cannot be read, batches.

Nothing here knows an encoder's weights, so worker processes can do all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from ..config import MISSING_IMAGES, ViewConfig
from ..data import Dataset, ImageError, ImageFolder, ImageLmdb, open_images
from ..encoders import WORKER_MODULES
from ..errors import InputError, first_few
from ..progress import progress_bar
from ..workers import CHECKED_AT_ONCE, batched, calls_ahead
from .store import DIGEST_BYTES, content_digest

if TYPE_CHECKING:  # importing transformers takes seconds
    from ..encoders import Backbone, ModelInputs, TextBackbone

BLANK = Image.new("RGB", (224, 224), "white")
TEXTS_AT_ONCE = 1024  # tokenized: a tokenizer's own results take a hundred times the room of the token numbers

Stored = tuple[int, bytes | None]  # a row, and its digest in the store
New = tuple[int, str]  # a row to encode, and the reason why its content cannot be read, or ""
Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncoderBatch:
    """N items, ready for the encoder."""

    rows: Sequence[int]  # of the catalogue
    digests: list[bytes]
    inputs: ModelInputs  # [N, …] each, on the CPU
    blank: int  # number of blank images among them

    def pin_memory(self) -> EncoderBatch:
        """Copy into pinned memory, from where a GPU copies by itself."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


class ViewInputs(Protocol):
    """The inputs of one view's encoder, by row of the catalogue."""

    remedy: str  # ends the message about content that is missing

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows whose stored states are out of date."""

    def arrange(self, rows: list[int]) -> list[int]:
        """Return the rows in the order that suits the encoder best."""

    def batch(self, rows: Sequence[int]) -> EncoderBatch:
        """Prepare arranged rows for the encoder."""


def open_sources(
    dataset: Dataset, views: Sequence[ViewConfig], missing_images: str
) -> AbstractContextManager[ImageFolder | ImageLmdb | None]:
    """Open the dataset's images if a view reads them. Raises InputError if the dataset lacks what the views read."""
    if missing_images not in MISSING_IMAGES:
        raise InputError(f"missing_images: expected one of {', '.join(MISSING_IMAGES)}, found {missing_images!r}")
    for view in views:
        if view.source == "caption" and not any(dataset.captions):
            raise InputError(f"{dataset.root / 'captions.tsv'}: view {view.name!r} needs captions, found none")
    return open_images(dataset.root) if any(view.source == "image" for view in views) else nullcontext()


def view_inputs(
    backbone: Backbone,
    dataset: Dataset,
    images: ImageFolder | ImageLmdb | None,
    missing_images: str,
    prepare: Callable[[Sequence[Image.Image]], ModelInputs] | None = None,
) -> TextInputs | ImageInputs:
    """Return the inputs of the view's encoder. `prepare` replaces the encoder's own preparation of images."""
    source = backbone.view.source
    if source == "image":
        fill_blank = missing_images == "blank"
        return ImageInputs(images, dataset.sequences.item_ids, prepare or backbone.preparation, fill_blank)
    remedy = "; missing_captions: title lets titles stand in for them" if source == "caption" else ""
    return TextInputs(dataset.texts(source), backbone, remedy)


def new_rows(
    view: str, inputs: ViewInputs, stored: Sequence[bytes | None], item_ids: Sequence[str], workers: int = 0
) -> list[int]:
    """Return the rows whose content is not the one that `stored` has a digest of, arranged for the encoder.

    stored: a digest, or None, a row. `workers` processes check all rows. Raises InputError, which names the first few,
    if any content cannot be read.
    """
    requests = batched(list(enumerate(stored)), CHECKED_AT_ONCE)
    new = []
    with (
        progress_bar(f"reading {view}", len(stored), "items") as advance,
        closing(inputs_ahead(inputs.check, requests, workers)) as checked,
    ):
        for request, new_in_request in zip(requests, checked):
            new += new_in_request
            advance(len(request))
    problems = [f"{item_ids[row]} ({problem})" for row, problem in new if problem]
    if problems:
        count = f"{len(problems)} of {len(item_ids)} items cannot be read"
        raise InputError(f"view {view!r}: {count}: {first_few(problems, len(problems))}{inputs.remedy}")
    return inputs.arrange([row for row, _ in new])


def inputs_ahead(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], workers: int, pin: bool = False
) -> Iterator[Result]:
    """Yield function(argument) for every argument as `calls_ahead` does, in processes that can prepare images."""
    return calls_ahead(function, arguments, workers, pin, modules=(__name__, *WORKER_MODULES))


class TextInputs:
    """Titles or captions. Arranging tokenizes them; only the token numbers are kept, 4 bytes each."""

    def __init__(self, texts: Sequence[str | None], backbone: TextBackbone, remedy: str = "") -> None:
        self.texts, self.backbone, self.remedy = texts, backbone, remedy
        self._tokens = np.zeros(0, dtype=np.int32)  # of all arranged rows, one after the other
        self._starts, self._lengths = np.zeros((2, len(texts)), dtype=np.int64)  # where each row's tokens stand

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows without a state or with the state of another text. A row without text is an error."""
        return [
            (row, "" if (self.texts[row] or "").strip() else "no text")
            for row, digest in stored
            if digest is None or digest != content_digest((self.texts[row] or "").encode())
        ]

    def arrange(self, rows: list[int]) -> list[int]:
        """Return the rows by falling number of tokens, so that batches need little padding and the largest comes first.

        Raises InputError for a text that gives no token.
        """
        tokens = [self._tokens]
        for part in batched(rows, TEXTS_AT_ONCE):
            token_rows = self.backbone.tokenize([self.texts[row] or "" for row in part])
            self._lengths[part] = [len(ids) for ids in token_rows]
            tokens += [np.array(ids, dtype=np.int32) for ids in token_rows]
        self._starts[rows] = len(self._tokens) + np.cumsum(self._lengths[rows]) - self._lengths[rows]
        self._tokens = np.concatenate(tokens)
        return [rows[index] for index in np.argsort(-self._lengths[rows], kind="stable")]

    def batch(self, rows: Sequence[int]) -> EncoderBatch:
        """Pad arranged rows to the longest of them."""
        tokens = [self._tokens[self._starts[row] :][: self._lengths[row]] for row in rows]
        digests = [content_digest((self.texts[row] or "").encode()) for row in rows]
        return EncoderBatch(rows, digests, self.backbone.pad(tokens), blank=0)

    @property
    def longest(self) -> int:
        """Return the arranged row that has most tokens."""
        return int(self._lengths.argmax())

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens, int64 [N], of arranged rows int64 [N]."""
        return self._lengths[rows]

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens, int32 [N, longest], of one or more arranged rows int64 [N], padded on the right."""
        lengths = self._lengths[rows, None]
        places = np.arange(lengths.max())
        in_text = places < lengths
        ids = np.full(in_text.shape, self.backbone.padding_token, dtype=np.int32)
        ids[in_text] = self._tokens[(self._starts[rows, None] + places)[in_text]]
        return ids


class ImageInputs:
    """A dataset's images, decoded and prepared as they are asked for. May be sent to another process."""

    remedy = "; missing_images: blank fills them"

    def __init__(
        self,
        images: ImageFolder | ImageLmdb,
        item_ids: list[str],
        prepare: Callable[[Sequence[Image.Image]], ModelInputs],
        fill_blank: bool,
    ) -> None:
        self.images, self.item_ids, self.prepare, self.fill_blank = images, item_ids, prepare, fill_blank

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows without a state or with the state of another image.

        Each of these images is decoded, unless a blank would fill its place.
        """
        new = []
        for row, digest in stored:
            content = self.images.content(self.item_ids[row])
            if digest is None or digest not in self._accepted(content):
                new.append((row, "" if self.fill_blank else self._problem(content)))
        return new

    def arrange(self, rows: list[int]) -> list[int]:
        """Return the rows unchanged: to the encoder all images have one size."""
        return rows

    def batch(self, rows: Sequence[int]) -> EncoderBatch:
        """Decode the rows, one at a time. Raises InputError for an image that was lost or damaged since its check."""
        digests, inputs, blanks = zip(*map(self._read, rows))
        merged = {name: torch.cat([image[name] for image in inputs]) for name in inputs[0]}
        return EncoderBatch(rows, list(digests), merged, sum(blanks))

    def _accepted(self, content: bytes | None) -> tuple[bytes, ...]:
        """Return the digests of states that are up to date."""
        blank = (_blank_digest(content),) if self.fill_blank else ()
        return blank if content is None else (content_digest(content), *blank)

    def _problem(self, content: bytes | None) -> str:
        if content is None:
            return "no image"
        try:
            self.images.decode(content)
        except ImageError as error:
            return str(error)
        return ""

    def _read(self, row: int) -> tuple[bytes, ModelInputs, bool]:
        """Return the digest, the encoder's input [1, …], and True if it is a blank image."""
        content = self.images.content(self.item_ids[row])
        try:
            if content is None:
                raise ImageError("no image")
            return content_digest(content), self.prepare([self.images.decode(content)]), False
        except ImageError as error:
            if not self.fill_blank:
                raise InputError(f"{self.images.path}: item {self.item_ids[row]!r}: {error}") from None
        return _blank_digest(content), self.prepare([BLANK]), True


def _blank_digest(content: bytes | None) -> bytes:
    """Return a digest that is not the content's, so that the blank is replaced once the image can be read."""
    return blake2b(content or b"", digest_size=DIGEST_BYTES, person=b"blank").digest()
