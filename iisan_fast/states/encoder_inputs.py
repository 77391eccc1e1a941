"""Prepare the inputs of a view's encoder by row of the catalogue: find the rows to encode, and make batches.

A row is an item's position in the catalogue, from 0. Nothing here needs an encoder's weights, so worker processes can
do all of it.
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
from .entries import DIGEST_BYTES, content_digest

if TYPE_CHECKING:  # importing transformers takes seconds
    from ..encoders import Backbone, ModelInputs, TextBackbone

BLANK = Image.new("RGB", (224, 224), "white")
TEXTS_AT_ONCE = 1024  # tokenized in one call, whose results take a hundred times the memory of the token ids

Stored = tuple[int, bytes | None]  # a row, and its digest in the store
New = tuple[int, str]  # a row to encode, and the reason why its content cannot be read, or ""
Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncoderBatch:
    """The encoder's inputs for N items, and the digests of the items' contents."""

    rows: Sequence[int]  # [N], of the catalogue
    digests: list[bytes]  # [N], of the contents, as a store keeps them
    inputs: ModelInputs  # tensors [N, ...] on the CPU
    blank: int  # number of blank images among the N

    def pin_memory(self) -> EncoderBatch:
        """Return a copy in pinned memory, from which a GPU copies without waiting."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


class ViewInputs(Protocol):
    """The inputs of one view's encoder, by row of the catalogue."""

    remedy: str  # the end of the error message about missing content; may be empty

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows whose stored states are out of date, each with the reason why its content cannot be read.

        stored: rows with the digest in the store, or None. The reason is "" for content that can be read.
        """

    def arrange(self, rows: list[int]) -> list[int]:
        """Return the rows in the order that makes batches fastest. `batch` takes arranged rows only."""

    def batch(self, rows: Sequence[int]) -> EncoderBatch:
        """Return the encoder's inputs for N arranged rows."""


def open_sources(
    dataset: Dataset,
    views: Sequence[ViewConfig],
    missing_images: str,
    images: ImageFolder | ImageLmdb | None = None,
) -> AbstractContextManager[ImageFolder | ImageLmdb | None]:
    """Open the dataset's images if a view reads them. The result is a context manager; it gives None for text alone.

    missing_images: one of config.MISSING_IMAGES. images: open ones in place of the dataset's, which stay open. Raises
    InputError if the word is unknown, if the dataset has no images, or if a view reads captions and the dataset has
    none.
    """
    if missing_images not in MISSING_IMAGES:
        raise InputError(f"missing_images: expected one of {', '.join(MISSING_IMAGES)}, found {missing_images!r}")
    for view in views:
        if view.source == "caption" and not any(dataset.captions):
            raise InputError(f"{dataset.root / 'captions.tsv'}: view {view.name!r} needs captions, found none")
    if images is not None or not any(view.source == "image" for view in views):
        return nullcontext(images)
    return open_images(dataset.root)


def view_inputs(
    backbone: Backbone,
    dataset: Dataset,
    images: ImageFolder | ImageLmdb | None,
    missing_images: str,
    prepare: Callable[[Sequence[Image.Image]], ModelInputs] | None = None,
) -> TextInputs | ImageInputs:
    """Return the inputs of the view's encoder for the dataset's items.

    images: from `open_sources`. missing_images: "error", or "blank" to use a blank image for one that cannot be read.
    prepare: used in place of the encoder's own preparation of images; None for that one.
    """
    source = backbone.view.source
    if source == "image":
        fill_blank = missing_images == "blank"
        return ImageInputs(images, dataset.sequences.item_ids, prepare or backbone.preparation, fill_blank)
    remedy = "; missing_captions: title lets titles stand in for them" if source == "caption" else ""
    return TextInputs(dataset.texts(source), backbone, remedy)


def new_rows(
    view: str, inputs: ViewInputs, stored: Sequence[Stored], item_ids: Sequence[str], workers: int = 0
) -> list[int]:
    """Return the rows whose content differs from the stored one, arranged for the encoder.

    view: the view's name, for messages. stored: the rows to check, each with the digest in the store, or None.
    item_ids: the ids of all rows of the catalogue, for messages. workers: the number of processes that check the rows,
    0 for this process. Raises InputError, with the first few items, if any content to encode cannot be read.
    """
    requests = batched(stored, CHECKED_AT_ONCE)
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
        count = f"{len(problems)} of {len(stored)} items cannot be read"
        raise InputError(f"view {view!r}: {count}: {first_few(problems, len(problems))}{inputs.remedy}")
    return inputs.arrange([row for row, _ in new])


def unstored(count: int) -> list[Stored]:
    """Return all rows of a catalogue of `count` items as rows without stored states."""
    return [(row, None) for row in range(count)]


def inputs_ahead(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], workers: int, pin: bool = False
) -> Iterator[Result]:
    """Yield function(argument) for each argument, in order, computed ahead by `workers` processes.

    The processes have imported everything that preparing images needs; see `workers.calls_ahead`. pin: whether results
    are copied into pinned memory.
    """
    return calls_ahead(function, arguments, workers, pin, modules=(__name__, *WORKER_MODULES))


class TextInputs:
    """The titles or captions of the catalogue's items.

    `arrange` tokenizes the texts. Only the token ids are kept, 4 bytes each.
    """

    def __init__(self, texts: Sequence[str | None], backbone: TextBackbone, remedy: str = "") -> None:
        """Take the text of each row, or None, and the encoder that tokenizes them. remedy: as in `ViewInputs`."""
        self.texts = texts
        self.backbone = backbone
        self.remedy = remedy
        self._tokens = np.zeros(0, dtype=np.int32)  # ids of all arranged rows, one row after the other
        self._starts, self._lengths = np.zeros((2, len(texts)), dtype=np.int64)  # of each row within `_tokens`

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows whose stored digest is missing or is not that of their text.

        The reason is "no text" for a row without text, else "".
        """
        return [
            (row, "" if (self.texts[row] or "").strip() else "no text")
            for row, digest in stored
            if digest is None or digest != content_digest((self.texts[row] or "").encode())
        ]

    def arrange(self, rows: list[int]) -> list[int]:
        """Tokenize the rows' texts, and return the rows by falling number of tokens.

        So a batch needs little padding, and the batch that needs most memory comes first. Raises InputError for a text
        that gives no tokens.
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
        """Return the inputs of N arranged rows, padded to the longest of them."""
        tokens = [self._tokens[self._starts[row] :][: self._lengths[row]] for row in rows]
        digests = [content_digest((self.texts[row] or "").encode()) for row in rows]
        return EncoderBatch(rows, digests, self.backbone.pad(tokens), blank=0)

    @property
    def longest(self) -> int:
        """Return the arranged row that has the most tokens."""
        return int(self._lengths.argmax())

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens, int64 [N], of arranged rows int64 [N]."""
        return self._lengths[rows]

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids, int32 [N, width], of one or more arranged rows int64 [N].

        They are padded on the right; the longest row gives the width.
        """
        lengths = self._lengths[rows, None]
        places = np.arange(lengths.max())
        in_text = places < lengths
        ids = np.full(in_text.shape, self.backbone.padding_token, dtype=np.int32)
        ids[in_text] = self._tokens[(self._starts[rows, None] + places)[in_text]]
        return ids


class ImageInputs:
    """A dataset's images, decoded and prepared when they are read. It can be sent to another process."""

    remedy = "; missing_images: blank fills them"

    def __init__(
        self,
        images: ImageFolder | ImageLmdb,
        item_ids: list[str],
        prepare: Callable[[Sequence[Image.Image]], ModelInputs],
        fill_blank: bool,
    ) -> None:
        """Take the dataset's images, the id of each row, and the function that prepares decoded RGB images.

        fill_blank: whether a blank image stands in for an image that cannot be read.
        """
        self.images = images
        self.item_ids = item_ids
        self.prepare = prepare
        self.fill_blank = fill_blank

    def check(self, stored: Sequence[Stored]) -> list[New]:
        """Return the rows whose stored digest is missing or is not that of their image.

        Each of these images is decoded to find out if it can be read, unless a blank one may stand in for it.
        """
        new = []
        for row, digest in stored:
            content = self.images.content(self.item_ids[row])
            if digest is None or digest not in self._accepted(content):
                new.append((row, "" if self.fill_blank else self._problem(content)))
        return new

    def arrange(self, rows: list[int]) -> list[int]:
        """Return the rows unchanged: prepared images are all of one size."""
        return rows

    def batch(self, rows: Sequence[int]) -> EncoderBatch:
        """Return the inputs of N rows, whose images are decoded one at a time.

        Raises InputError for an image that cannot be read and is not to be filled.
        """
        digests, inputs, blanks = zip(*map(self._read, rows))
        merged = {name: torch.cat([image[name] for image in inputs]) for name in inputs[0]}
        return EncoderBatch(rows, list(digests), merged, sum(blanks))

    def _accepted(self, content: bytes | None) -> tuple[bytes, ...]:
        """Return the digests of stored states that are up to date for this content."""
        blank = (_blank_digest(content),) if self.fill_blank else ()
        return blank if content is None else (content_digest(content), *blank)

    def _problem(self, content: bytes | None) -> str:
        """Return why an image cannot be read; "" if it can."""
        if content is None:
            return "no image"
        try:
            self.images.decode(content)
        except ImageError as error:
            return str(error)
        return ""

    def _read(self, row: int) -> tuple[bytes, ModelInputs, bool]:
        """Return the digest of a row's content, the encoder's input [1, ...], and True if a blank image was used.

        Raises ImageError if the item has no image.
        """
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
    """Return a digest for a blank image. It differs from the content's, so that a readable image replaces the blank."""
    return blake2b(content or b"", digest_size=DIGEST_BYTES, person=b"blank").digest()
