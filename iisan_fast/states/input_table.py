"""Read items for uncached training: the encoders' inputs, or states that are encoded each time they are read.

Token ids are in host memory. Images are kept as bytes, on the device or in (pinned) host memory, if there is room. If
not, they are decoded from the dataset's files ahead of each step. All of these give the encoders the same inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import ViewConfig
from ..data import Dataset, ImageFolder, ImageLmdb
from ..encoders import Backbone, ByteForm, ModelInputs, load_backbones, views_by_model
from ..errors import InputError
from ..kernels import States
from ..progress import progress_bar
from ..workers import batched, usable_cpus, worker_count
from .encoder_inputs import (
    BLANK,
    ImageInputs,
    TextInputs,
    inputs_ahead,
    new_rows,
    open_sources,
    unstored,
    view_inputs,
)
from .item_source import Chunks, Gathered
from .placement import place
from .standardise import StateStatistics
from .view_shapes import ViewShape

LOGGER = logging.getLogger(__name__)
INPUTS_AT_ONCE = 256  # items to encode at a time when the whole catalogue is read
PART_ITEMS = {"cpu": 64, "cuda": 256}  # a CPU gains from texts of similar length, a GPU from large products
DECODED_AT_ONCE = 64  # images for one call of a worker, while a table is filled
MAX_DECODERS = 16  # threads

Inputs = TypeVar("Inputs")


class InputTable:
    """The encoders' inputs for the items of a catalogue, for one or more views. Padding gives the inputs of some item.

    Views that share a model read the same inputs, which are gathered once. `open_inputs` makes the table.
    """

    index_device = torch.device("cpu")
    items_at_once = INPUTS_AT_ONCE
    statistics: Mapping[str, StateStatistics] = {}  # no states are standardised

    def __init__(
        self,
        backbones: list[Backbone],
        views: list[_TextView | _ResidentImages | _GatheredImages],
        rows: int,
        part_items: int,
        device: torch.device,
        opened: ExitStack,
        placed: tuple[int, str],
    ) -> None:
        """Take the encoder of each view, and the inputs of each model.

        views: the inputs of the first view of each model. rows: the number of items, and one for padding. part_items:
        the most items of one encoder call. opened: the open files and threads, which `close` closes. placed: the size
        of the images in bytes, and their place.
        """
        self.backbones = backbones
        self.rows = rows
        self.part_items = part_items
        self.device = device
        self.views_by_model = views_by_model(backbones)
        self._views = views
        self._opened = opened
        self.size, self.place = placed  # of the images, in bytes, and where they are

    def gather(self, items: Tensor) -> Gathered:
        """Return the token ids and images that are not on the device, one tensor for each model that lacks them.

        items: int64 [N], on the host.
        """
        by_model = [view.gather(items, self.part_items) for view in self._views]
        tensors = [tensor for gathered in by_model for tensor in gathered.tensors]
        return Gathered(tensors, [gathered.layout for gathered in by_model])

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[Chunks]:
        """Return each view's encoder inputs for items int64 [N], on the device. gathered: `gather(items)`, or None."""
        gathered = gathered or self.gather(items)
        items = items.to(self.device, non_blocking=True)
        tensors = (tensor.to(self.device, non_blocking=True) for tensor in gathered.tensors)
        by_model = [
            view.chunks(items, tensors, layout, self.part_items) for view, layout in zip(self._views, gathered.layout)
        ]
        return self._by_view(by_model)

    def largest(self, count: int) -> list[ModelInputs]:
        """Return each view's encoder inputs for `count` items that are all as large as the largest item."""
        by_model: list[ModelInputs] = []
        for view in self._views:
            items = torch.full((count,), view.largest)
            tensors, layout = view.gather(items, count)
            moved = (tensor.to(self.device) for tensor in tensors)
            by_model += view.chunks(items.to(self.device), moved, layout, count).parts
        return self._by_view(by_model)

    def close(self) -> None:
        """Close the dataset's images, and end the threads that decode them."""
        self._opened.close()

    def _by_view(self, by_model: Sequence[Inputs]) -> list[Inputs]:
        """Return the entry of each view, in the order of the views, from one entry for each model."""
        by_view = {view: inputs for views, inputs in zip(self.views_by_model, by_model) for view in views}
        return [by_view[view] for view in range(len(self.backbones))]


class EncodedTable:
    """A table that stores nothing: it encodes items each time that they are read.

    States are rounded to the dtype `stored`, as a store of that dtype rounds them, and then converted to `dtype`.
    """

    index_device = torch.device("cpu")
    items_at_once = INPUTS_AT_ONCE
    statistics: Mapping[str, StateStatistics] = {}  # no states are standardised

    def __init__(self, inputs: InputTable, stored: torch.dtype, dtype: torch.dtype | None = None) -> None:
        """Take the encoders' inputs, the dtype to round states to, and the dtype of the result; None for `stored`."""
        self.inputs = inputs
        self.stored = stored
        self.dtype = dtype or stored
        self.rows = inputs.rows

    @property
    def shapes(self) -> list[ViewShape]:
        """Return the shape (layers K, width D) of each view."""
        return [ViewShape(len(backbone.layers), backbone.width) for backbone in self.inputs.backbones]

    def gather(self, items: Tensor) -> Gathered:
        """Return the encoders' inputs that are not on the device, for item numbers int64 [N] on the host.

        Padding (0) must stand last; it needs no inputs.
        """
        count = int((items > 0).sum())
        gathered = self.inputs.gather(items[:count])
        return gathered._replace(layout=(count, gathered.layout))

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """Return each view's states [N, K, D] of item numbers int64 [N], on the device; zeros for padding.

        gathered: the result of `gather(items)`; None to gather first.
        """
        gathered = gathered or self.gather(items)
        count, layout = gathered.layout
        chunks_by_view = self.inputs.read(items[:count], gathered._replace(layout=layout))
        # Encoders give inference tensors, which autograd cannot save: they are copied into ordinary ones.
        by_view = [
            torch.zeros((len(items), *shape), dtype=self.dtype, device=self.inputs.device) for shape in self.shapes
        ]
        for views in self.inputs.views_by_model if count else []:
            encoded = _encoded([self.inputs.backbones[view] for view in views], chunks_by_view[views[0]])
            for view, states in zip(views, encoded):
                by_view[view][:count] = states.to(self.stored)
        return [States(states) for states in by_view]

    def close(self) -> None:
        """Close the input table."""
        self.inputs.close()


def open_inputs(
    dataset: Dataset,
    views: Sequence[ViewConfig],
    device: torch.device,
    placement: str = "auto",
    missing_images: str = "error",
    part_items: int | None = None,
    workers: int | None = None,
    attention: str = "auto",
    trained: bool = False,
    images: ImageFolder | ImageLmdb | None = None,
) -> InputTable:
    """Load the views' encoders, frozen, and open the inputs that they read of every item.

    placement: of the images, as bytes, one of config.PLACEMENTS. "mapped" leaves them in the dataset's files; threads
    decode them ahead of each step. The other placements decode each image once, in this call, with `workers` processes
    as in `extract`. missing_images: "error", or "blank" for a blank image in place of one that cannot be read.
    part_items: the most items of one encoder call; None chooses by the device. attention: one of config.ATTENTIONS.
    trained: whether the encoders will be trained; if not, views that differ only in name, pooling and layers share one
    model. images: open ones in place of the dataset's, which stay open.

    Raises InputError for content that is missing or cannot be read, an encoder that cannot be used, or a placement that
    does not fit.
    """
    item_ids = dataset.sequences.item_ids
    part_items = part_items or PART_ITEMS[device.type]
    with ExitStack() as opened:
        images = opened.enter_context(open_sources(dataset, views, missing_images, images))
        threads = opened.enter_context(ThreadPoolExecutor(min(MAX_DECODERS, usable_cpus()), "images"))
        backbones = load_backbones(views, device, attention, shared=not trained)
        readers = [backbones[positions[0]] for positions in views_by_model(backbones)]
        forms = [backbone.byte_form() if backbone.view.source == "image" else None for backbone in readers]
        size = (1 + len(item_ids)) * sum(form.prepare([BLANK])["pixel_values"].nbytes for form in forms if form)
        home = "in the dataset's files, decoded ahead"
        where = place("image table", placement, size, device, home) if size else "mapped"
        opened_views = []
        for backbone, form in zip(readers, forms):
            inputs = view_inputs(backbone, dataset, images, missing_images, form and form.prepare)
            if isinstance(inputs, TextInputs):
                new_rows(backbone.view.name, inputs, unstored(len(item_ids)), item_ids)
                opened_views.append(_TextView(inputs, device))
            else:
                opened_views.append(_image_view(backbone, inputs, form, where, workers, threads))
        return InputTable(
            backbones, opened_views, 1 + len(item_ids), part_items, device, opened.pop_all(), (size, where)
        )


class _TextView:
    """The token ids of a view in host memory. Those of a batch are copied to the device as one tensor."""

    def __init__(self, texts: TextInputs, device: torch.device) -> None:
        self.texts = texts
        self.device = device
        self.largest = 1 + texts.longest

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """Return one int32 tensor with the token ids of all parts, all lengths and the order of the items.

        The layout is the shapes of the parts.
        """
        rows = items.numpy() - 1  # padding (0) reads the last text
        by_length = np.argsort(-self.texts.lengths(rows), kind="stable")
        ends = np.cumsum(_part_sizes(len(rows), part_items))
        ids = [self.texts.padded(part) for part in np.split(rows[by_length], ends)[:-1]]
        columns = [*(part.ravel() for part in ids), self.texts.lengths(rows[by_length]), np.argsort(by_length)]
        packed = torch.from_numpy(np.concatenate(columns, dtype=np.int32, casting="same_kind"))
        return Gathered([packed.pin_memory() if self.device.type == "cuda" else packed], [part.shape for part in ids])

    def chunks(
        self, items: Tensor, tensors: Iterator[Tensor], shapes: list[tuple[int, int]], part_items: int
    ) -> Chunks:
        """Return the encoder's inputs, by part, from the gathered tensor on the device."""
        *ids, lengths, order = next(tensors).split([*(count * width for count, width in shapes), *[len(items)] * 2])
        parts = []
        for flat, part_lengths, shape in zip(ids, lengths.split([count for count, _ in shapes]), shapes):
            mask = torch.arange(shape[1], device=flat.device) < part_lengths[:, None]
            parts.append({"input_ids": flat.view(shape).long(), "attention_mask": mask.long()})
        return Chunks(parts, order.long())


class _ResidentImages:
    """The bytes of all images, on the device."""

    largest = 1  # all images have one size

    def __init__(self, table: Tensor, form: ByteForm) -> None:
        self.table = table
        self.form = form

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """Return an empty result: the device holds all images already."""
        return Gathered([])

    def chunks(self, items: Tensor, tensors: Iterator[Tensor], layout: None, part_items: int) -> Chunks:
        """Return the encoder's inputs, by part, in the order of the items."""
        parts = items.split(_part_sizes(len(items), part_items))
        return Chunks([{"pixel_values": self.form.pixel_values(self.table.index_select(0, part))} for part in parts])


class _GatheredImages:
    """Images that are copied to the device when they are read.

    `read(items, into)` copies the images of items int64 [N] into host memory [N, 3, height, width]. `blank` [1, 3,
    height, width] has the size and dtype of every image.
    """

    largest = 1

    def __init__(
        self, read: Callable[[Tensor, Tensor], None], blank: Tensor, form: ByteForm | None, device: torch.device
    ) -> None:
        self.read = read
        self.blank = blank
        self.form = form
        self.device = device

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """Return the images [N, 3, height, width] in host memory: bytes, or float32 if the encoder has no byte form."""
        shape = (len(items), *self.blank.shape[1:])
        images = torch.empty(shape, dtype=self.blank.dtype, pin_memory=self.device.type == "cuda")
        self.read(items, images)
        return Gathered([images])

    def chunks(self, items: Tensor, tensors: Iterator[Tensor], layout: None, part_items: int) -> Chunks:
        """Return the encoder's inputs, by part, in the order of the items."""
        parts = next(tensors).split(_part_sizes(len(items), part_items))
        return Chunks([{"pixel_values": self.form.pixel_values(part) if self.form else part} for part in parts])


class _Decoder:
    """Reads images from a dataset's files, several at once: other threads run while Pillow decodes.

    An image has to stay what it was when it was read first, so that all steps see the same items.
    """

    def __init__(self, images: ImageInputs, threads: ThreadPoolExecutor) -> None:
        self.images = images
        self.threads = threads
        self.digests: dict[int, bytes] = {}  # of the images' contents, by row

    def __call__(self, items: Tensor, into: Tensor) -> None:
        """Fill the tensor `into` [N, 3, height, width] with the images of items int64 [N]; zeros for padding.

        Raises InputError if an image has changed, or can no longer be read.
        """

        def read(place: int, item: int) -> None:
            into[place] = self._pixels(item - 1) if item else 0

        for _ in self.threads.map(read, range(len(items)), items.tolist()):
            pass

    def _pixels(self, row: int) -> Tensor:
        """Return the image of a row of the catalogue [3, height, width]. Raises InputError if it has changed."""
        batch = self.images.batch([row])
        (digest,) = batch.digests
        if self.digests.setdefault(row, digest) != digest:
            item_id = self.images.item_ids[row]
            raise InputError(
                f"{self.images.images.path}: the image of item {item_id!r} has changed while it was in use; "
                "restore it, or begin a new run"
            )
        return batch.inputs["pixel_values"][0]


def _image_view(
    backbone: Backbone,
    images: ImageInputs,
    form: ByteForm | None,
    where: str,
    workers: int | None,
    threads: ThreadPoolExecutor,
) -> _ResidentImages | _GatheredImages:
    """Return a view's images in the place `where`, after a check that all of them can be read."""
    view = backbone.view.name
    device = backbone.device
    count = len(images.item_ids)
    workers, blank = worker_count(workers, count, device), images.prepare([BLANK])["pixel_values"]
    if form is None:
        LOGGER.info("view %r: its images cannot be kept as bytes, so each reading decodes them", view)
    if form is None or where == "mapped":
        new_rows(view, images, unstored(count), images.item_ids, workers)
        return _GatheredImages(_Decoder(images, threads), blank, form, device)
    resident = where == "device"
    table = torch.zeros(
        (1 + count, *blank.shape[1:]),
        dtype=torch.uint8,
        device=device if resident else None,
        pin_memory=device.type == "cuda" and not resident,
    )
    _fill(view, images, table, workers)
    if resident:
        return _ResidentImages(table, form)

    def select(items: Tensor, into: Tensor) -> None:
        torch.index_select(table, 0, items, out=into)

    return _GatheredImages(select, blank, form, device)


def _fill(view: str, images: ImageInputs, table: Tensor, workers: int) -> None:
    """Fill the rows from 1 of a table with the bytes of every image.

    Raises InputError, with the first few items, if images cannot be read.
    """
    count = len(images.item_ids)
    blank = 0
    requests = batched(range(count), DECODED_AT_ONCE)
    try:
        with (
            progress_bar(f"decoding {view}", count, "items") as advance,
            closing(inputs_ahead(images.batch, requests, workers)) as batches,
        ):
            for batch in batches:
                table[1 + batch.rows[0] : 2 + batch.rows[-1]] = batch.inputs["pixel_values"]
                blank += batch.blank
                advance(len(batch.rows))
    except InputError:
        # Raises InputError for all unreadable images, not only for the first.
        new_rows(view, images, unstored(count), images.item_ids, workers)
        raise
    if blank:
        LOGGER.info("view %r: %d of %d images are blank", view, blank, count)


def _encoded(backbones: list[Backbone], chunks: Chunks) -> list[Tensor]:
    """Return the states [N, K, D] of each backbone, in the encoder's dtype. The backbones share one model."""
    by_part = [backbones[0].encode_views(backbones, part) for part in chunks.parts]
    by_view = [torch.cat(states) for states in zip(*by_part)]
    return by_view if chunks.order is None else [states.index_select(0, chunks.order) for states in by_view]


def _part_sizes(count: int, most: int) -> list[int]:
    """Return the sizes of nearly equal parts of `count` items, as few as possible with at most `most` items each.

    Equal parts avoid a last part of one item, which is slow to multiply.
    """
    parts = -(-count // most)
    return [(count + part) // parts for part in range(parts)]
