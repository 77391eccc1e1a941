"""Items for uncached training: the encoders' inputs, or states encoded at each reading.

Token numbers lie in host memory. Images lie, as bytes, on the device or in (pinned) host memory where there is room,
and are otherwise decoded from the dataset's files ahead of the step. What the encoders read is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import ViewConfig
from ..data import Dataset
from ..encoders import Backbone, ByteForm, ModelInputs, load_backbones, views_by_model
from ..errors import InputError
from ..kernels import States
from ..progress import progress_bar
from ..workers import batched, usable_cpus, worker_count
from .encoder_inputs import BLANK, ImageInputs, TextInputs, inputs_ahead, new_rows, open_sources, view_inputs
from .item_source import Chunks, Gathered
from .placement import place
from .view_shapes import ViewShape

LOGGER = logging.getLogger(__name__)
INPUTS_AT_ONCE = 256  # items that are encoded at a time when all are
PART_ITEMS = {"cpu": 64, "cuda": 256}  # near-equal lengths matter more to the one, large products to the other
DECODED_AT_ONCE = 64  # images a call, while a table is filled
MAX_DECODERS = 16  # threads

Inputs = TypeVar("Inputs")


class InputTable:
    """The encoders' inputs for a catalogue's items, for one or more views. Padding reads as any item's inputs.

    Views that share a model read the same inputs, which are gathered once.
    """

    index_device = torch.device("cpu")
    items_at_once = INPUTS_AT_ONCE

    def __init__(
        self,
        backbones: list[Backbone],
        views: list[_TextView | _ResidentImages | _GatheredImages],
        rows: int,
        part_items: int,
        device: torch.device,
        opened: ExitStack,
    ) -> None:
        """Made by `open_inputs`: `views` are the first view of each model, `opened` is what `close` gives back."""
        self.backbones, self.rows, self.part_items, self.device = backbones, rows, part_items, device
        self.views_by_model = views_by_model(backbones)
        self._views, self._opened = views, opened

    def gather(self, items: Tensor) -> Gathered:
        """Gather the tokens and images that the device lacks, a tensor a model. items: int64 [N] on the host."""
        by_model = [view.gather(items, self.part_items) for view in self._views]
        tensors = [tensor for gathered in by_model for tensor in gathered.tensors]
        return Gathered(tensors, [gathered.layout for gathered in by_model])

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[Chunks]:
        """Return each view's encoder inputs for items int64 [N], on the device."""
        gathered = gathered or self.gather(items)
        items = items.to(self.device, non_blocking=True)
        tensors = (tensor.to(self.device, non_blocking=True) for tensor in gathered.tensors)
        by_model = [
            view.chunks(items, tensors, layout, self.part_items) for view, layout in zip(self._views, gathered.layout)
        ]
        return self._by_view(by_model)

    def largest(self, count: int) -> list[ModelInputs]:
        """Return each view's encoder inputs for `count` items, all as large as the largest one."""
        by_model: list[ModelInputs] = []
        for view in self._views:
            items = torch.full((count,), view.largest)
            tensors, layout = view.gather(items, count)
            moved = (tensor.to(self.device) for tensor in tensors)
            by_model += view.chunks(items.to(self.device), moved, layout, count).parts
        return self._by_view(by_model)

    def close(self) -> None:
        """Gives back the dataset's images and the threads that decode them."""
        self._opened.close()

    def _by_view(self, by_model: Sequence[Inputs]) -> list[Inputs]:
        """Return the inputs of each view, in the views' order."""
        by_view = {view: inputs for views, inputs in zip(self.views_by_model, by_model) for view in views}
        return [by_view[view] for view in range(len(self.backbones))]


class EncodedTable:
    """The kept layers of every item, encoded whenever they are read: a feature table that holds nothing.

    States are rounded as a store of dtype `stored` would have rounded them, then converted to `dtype` (None: `stored`).
    """

    index_device = torch.device("cpu")
    items_at_once = INPUTS_AT_ONCE

    def __init__(self, inputs: InputTable, stored: torch.dtype, dtype: torch.dtype | None = None) -> None:
        self.inputs, self.stored, self.dtype = inputs, stored, dtype or stored
        self.rows = inputs.rows

    @property
    def shapes(self) -> list[ViewShape]:
        """(kept layers K, width D) of each view."""
        return [ViewShape(len(backbone.layers), backbone.width) for backbone in self.inputs.backbones]

    def gather(self, items: Tensor) -> Gathered:
        """Contents of item numbers int64 [N] on the host; of padding, which stands last, none."""
        count = int((items > 0).sum())
        gathered = self.inputs.gather(items[:count])
        return gathered._replace(layout=(count, gathered.layout))

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """Each view's states [N, K, D] on the device; zeros for padding."""
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
) -> InputTable:
    """Views' encoders, frozen, with this attention, and what they read of every item: at most `part_items` at a time
    (None: as suits the device).

    `placement` says where images lie (as bytes); "mapped" means in the dataset's files, from where threads decode them
    ahead of the step. Otherwise `workers` processes decode each of them once, now, as `extract` does.

    Views that differ in name, pooling and layers alone share one model, unless the encoders are to be `trained`.

    Raises InputError, before anything is kept, for content that is missing or cannot be read, an encoder that cannot be
    used, or a placement that does not fit.
    """
    item_ids = dataset.sequences.item_ids
    part_items = part_items or PART_ITEMS[device.type]
    with ExitStack() as opened:
        images = opened.enter_context(open_sources(dataset, views, missing_images))
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
                new_rows(backbone.view.name, inputs, [None] * len(item_ids), item_ids)
                opened_views.append(_TextView(inputs, device))
            else:
                opened_views.append(_image_view(backbone, inputs, form, where, workers, threads))
        return InputTable(backbones, opened_views, 1 + len(item_ids), part_items, device, opened.pop_all())


class _TextView:
    """Token numbers in host memory, from where a batch's cross to the device in one tensor."""

    def __init__(self, texts: TextInputs, device: torch.device) -> None:
        self.texts, self.device = texts, device
        self.largest = 1 + texts.longest

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """int32: each part's token numbers, all lengths, and each item's place; with the parts' shapes."""
        rows = items.numpy() - 1  # padding reads the last text
        by_length = np.argsort(-self.texts.lengths(rows), kind="stable")
        ends = np.cumsum(_part_sizes(len(rows), part_items))
        ids = [self.texts.padded(part) for part in np.split(rows[by_length], ends)[:-1]]
        columns = [*(part.ravel() for part in ids), self.texts.lengths(rows[by_length]), np.argsort(by_length)]
        packed = torch.from_numpy(np.concatenate(columns, dtype=np.int32, casting="same_kind"))
        return Gathered([packed.pin_memory() if self.device.type == "cuda" else packed], [part.shape for part in ids])

    def chunks(
        self, items: Tensor, tensors: Iterator[Tensor], shapes: list[tuple[int, int]], part_items: int
    ) -> Chunks:
        """The parts unpacked."""
        *ids, lengths, order = next(tensors).split([*(count * width for count, width in shapes), *[len(items)] * 2])
        parts = []
        for flat, part_lengths, shape in zip(ids, lengths.split([count for count, _ in shapes]), shapes):
            mask = torch.arange(shape[1], device=flat.device) < part_lengths[:, None]
            parts.append({"input_ids": flat.view(shape).long(), "attention_mask": mask.long()})
        return Chunks(parts, order.long())


class _ResidentImages:
    """Bytes of all images on the device."""

    largest = 1  # all are of one size

    def __init__(self, table: Tensor, form: ByteForm) -> None:
        self.table, self.form = table, form

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """Gather nothing: the device holds all images."""
        return Gathered([])

    def chunks(self, items: Tensor, tensors: Iterator[Tensor], layout: None, part_items: int) -> Chunks:
        """The images in order."""
        parts = items.split(_part_sizes(len(items), part_items))
        return Chunks([{"pixel_values": self.form.pixel_values(self.table.index_select(0, part))} for part in parts])


class _GatheredImages:
    """Images that `read(items, into)` puts into host memory as they are asked for, each like `blank` [1, 3, …, …]."""

    largest = 1

    def __init__(
        self, read: Callable[[Tensor, Tensor], None], blank: Tensor, form: ByteForm | None, device: torch.device
    ) -> None:
        self.read, self.blank, self.form, self.device = read, blank, form, device

    def gather(self, items: Tensor, part_items: int) -> Gathered:
        """[N, 3, height, width]: bytes, or what the encoder reads where its images have no byte form."""
        shape = (len(items), *self.blank.shape[1:])
        images = torch.empty(shape, dtype=self.blank.dtype, pin_memory=self.device.type == "cuda")
        self.read(items, images)
        return Gathered([images])

    def chunks(self, items: Tensor, tensors: Iterator[Tensor], layout: None, part_items: int) -> Chunks:
        """The images in order."""
        parts = next(tensors).split(_part_sizes(len(items), part_items))
        return Chunks([{"pixel_values": self.form.pixel_values(part) if self.form else part} for part in parts])


class _Decoder:
    """Reads images from a dataset's files, several at once: Pillow lets other threads run while it decodes."""

    def __init__(self, images: ImageInputs, threads: ThreadPoolExecutor) -> None:
        self.images, self.threads = images, threads

    def __call__(self, items: Tensor, into: Tensor) -> None:
        """Fills into [N, 3, height, width] with the images of items int64 [N]; with zeros for padding."""

        def read(place: int, item: int) -> None:
            into[place] = self.images.batch([item - 1]).inputs["pixel_values"][0] if item else 0

        for _ in self.threads.map(read, range(len(items)), items.tolist()):
            pass


def _image_view(
    backbone: Backbone,
    images: ImageInputs,
    form: ByteForm | None,
    where: str,
    workers: int | None,
    threads: ThreadPoolExecutor,
) -> _ResidentImages | _GatheredImages:
    """A view's images where they were placed, every one of them readable."""
    view, device, count = backbone.view.name, backbone.device, len(images.item_ids)
    workers, blank = worker_count(workers, count, device), images.prepare([BLANK])["pixel_values"]
    if form is None:
        LOGGER.info("view %r: its images cannot be kept as bytes, and are decoded whenever they are read", view)
    if form is None or where == "mapped":
        new_rows(view, images, [None] * count, images.item_ids, workers)
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
    """Puts the bytes of every image into rows 1 and on. Raises InputError that names those which cannot be read."""
    count, blank = len(images.item_ids), 0
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
        new_rows(view, images, [None] * count, images.item_ids, workers)  # says all that is wrong, not the first thing
        raise
    if blank:
        LOGGER.info("view %r: %d of %d images are blank", view, blank, count)


def _encoded(backbones: list[Backbone], chunks: Chunks) -> list[Tensor]:
    """Return states [N, K, D], in the encoder's dtype, of each of the backbones, which share a model."""
    by_part = [backbones[0].encode_views(backbones, part) for part in chunks.parts]
    by_view = [torch.cat(states) for states in zip(*by_part)]
    return by_view if chunks.order is None else [states.index_select(0, chunks.order) for states in by_view]


def _part_sizes(count: int, most: int) -> list[int]:
    """Return the sizes of as few, nearly equal parts as `most` allows: a part of one item is slow to multiply."""
    parts = -(-count // most)
    return [(count + part) // parts for part in range(parts)]
