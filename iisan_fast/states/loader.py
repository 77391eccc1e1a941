"""Batches and what they need of their items, prepared ahead of the step that takes them."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import kernels
from ..data import Batch, PackedWindow, RunPlan, Shape, Window
from .feature_table import FeatureTable
from .item_source import Gathered, ItemInputs, ItemSource

Argument, Result = TypeVar("Argument"), TypeVar("Result")

AHEAD = 2  # batches
TOGETHER = 8  # batches are laid out one after the other: the first finds the caches full of a step's numbers


class PreparedBatch(NamedTuple):
    """A batch on the device, and what the item encoder reads of its distinct items."""

    batch: Batch
    item_inputs: ItemInputs
    rows: int  # real ones, without padding
    slots: int  # of the users' histories


class PlannedBatch(NamedTuple):
    """A batch of a window of packed batches, which are taken in their order."""

    window: Tensor | None  # with its first batch: int32 [batches, words] on the device, in the plan's shape
    item_inputs: ItemInputs | None  # of the batch's distinct items; None if the device has all
    rows: int
    slots: int  # of the users' histories


def planned_batches(
    plan: RunPlan, epoch: int, source: ItemSource, device: torch.device
) -> Generator[PlannedBatch, None, None]:
    """Yield an epoch's batches in order. Their windows are packed, checked and copied while the steps before run.

    What the source has on the host of a batch's items is gathered ahead.
    """

    def pack(window: Window) -> tuple[PackedWindow, _Copied]:
        packed = plan.pack(window, pin=device.type == "cuda")
        items = torch.cat(packed.items)
        kernels.check_indices("batch.distinct", items, None, source.rows, items.device, 1)
        return packed, _copied([packed.words], device)

    # Both are waited for at the end: the source may be closed after.
    with ThreadPoolExecutor(1, "batches: windows") as packing, ThreadPoolExecutor(1, "batches: items") as gathering:
        windows = _ahead(packing, pack, plan.windows(epoch), 1)
        gathered: Iterator[ItemInputs | None] = itertools.repeat(None)
        if not isinstance(source, FeatureTable):
            windows, lists = itertools.tee(windows)  # which keeps what one of the two has not taken
            items = itertools.chain.from_iterable(packed.items for packed, _ in lists)
            gathered = _gathered(gathering, items, source, device)
        for packed, copied in windows:
            (window,) = _waited(copied, device)
            for number, (size, inputs) in enumerate(zip(packed.sizes, gathered)):
                yield PlannedBatch(None if number else window, inputs, *size)


def _gathered(
    thread: ThreadPoolExecutor, lists: Iterator[Tensor], source: ItemSource, device: torch.device
) -> Iterator[ItemInputs]:
    """Yield what the item encoder reads of each list of item numbers, gathered ahead in the thread."""

    def gather(items: Tensor) -> tuple[Gathered, _Copied]:
        gathered = source.gather(items)
        numbers = items.pin_memory() if device.type == "cuda" else items
        return gathered, _copied([numbers, *gathered.tensors], device)

    for gathered, copied in _ahead(thread, gather, lists, AHEAD):
        items, *tensors = _waited(copied, device)
        yield source.read(items, gathered._replace(tensors=tensors))


def prepared_batches(
    batches: Iterator[Batch], source: ItemSource, device: torch.device, shape: Shape | None = None
) -> Generator[PreparedBatch, None, None]:
    """Yield the batches in order, prepared while the steps before run.

    A batch is checked, and padded where a shape is named. What the source has on the host of its items is gathered, and
    all is copied to the device on another stream than the steps'.
    """
    copies = _copy_stream(device) if device.type == "cuda" else None
    batches = _checked(batches, source.rows)
    with ThreadPoolExecutor(1, "batches") as thread:  # waited for at the end: the source may be closed after
        waiting = deque(thread.submit(_on_host, batches, source, device, shape) for _ in range(AHEAD))
        moved = deque([_moved(waiting.popleft().result(), device, copies)])
        while moved[0] is not None:
            waiting.append(thread.submit(_on_host, batches, source, device, shape))
            moved.append(_moved(waiting.popleft().result(), device, copies))
            yield _arrived(moved.popleft(), source, device)


class _Waiting(NamedTuple):
    batch: Batch
    packed: Tensor | None  # the batch as it will cross to CUDA
    gathered: Gathered
    rows: int
    slots: int
    copied: torch.cuda.Event | None = None  # when all of it is on the device


class _Copied(NamedTuple):
    tensors: list[Tensor]
    copied: torch.cuda.Event | None  # when all of them are on the device


def _ahead(
    thread: ThreadPoolExecutor, function: Callable[[Argument], Result], arguments: Iterable[Argument], count: int
) -> Iterator[Result]:
    """Yield the results of a function in order, up to `count` of them computed in the thread beforehand."""
    waiting: deque[Future[Result]] = deque()
    for argument in arguments:
        waiting.append(thread.submit(function, argument))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _copied(tensors: list[Tensor], device: torch.device) -> _Copied:
    """Begin the copies of host tensors, pinned for CUDA, to the device."""
    if device.type != "cuda":
        return _Copied(tensors, None)
    copies = _copy_stream(device)
    with torch.cuda.stream(copies):
        return _Copied([tensor.to(device, non_blocking=True) for tensor in tensors], copies.record_event())


def _waited(moved: _Copied, device: torch.device) -> list[Tensor]:
    """Return the tensors, and let the device alone wait for their copies."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in moved.tensors:
            tensor.record_stream(current)
    return moved.tensors


def _checked(batches: Iterator[Batch], table_rows: int) -> Iterator[Batch]:
    """Check the batches, several at a time, and yield them. A bad one raises before the others of its group."""
    while checked := [batch.checked(table_rows) for batch in itertools.islice(batches, TOGETHER)]:
        yield from checked


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all epochs: freed memory stays with the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _on_host(
    batches: Iterator[Batch], source: ItemSource, device: torch.device, shape: Shape | None
) -> _Waiting | None:
    """Prepare the next batch on the host; return None at the end."""
    batch = next(batches, None)
    if batch is None:
        return None
    rows, slots = len(batch.targets), int(batch.multiplicity.sum())
    if shape is not None:
        batch = batch.padded(shape)
    packed = batch.packed(pin=True) if device.type == "cuda" else None
    return _Waiting(batch, packed, source.gather(batch.distinct), rows, slots)


def _moved(waiting: _Waiting | None, device: torch.device, copies: torch.cuda.Stream | None) -> _Waiting | None:
    """Begin the copies of a batch to the device."""
    if waiting is None or copies is None:
        return waiting
    with torch.cuda.stream(copies):
        tensors = [tensor.to(device, non_blocking=True) for tensor in waiting.gathered.tensors]
        batch = Batch.unpacked(waiting.packed.to(device, non_blocking=True), waiting.batch.shape)
        gathered = waiting.gathered._replace(tensors=tensors)
        return waiting._replace(batch=batch, packed=None, gathered=gathered, copied=copies.record_event())


def _arrived(moved: _Waiting, source: ItemSource, device: torch.device) -> PreparedBatch:
    """Return the batch, and let the device alone wait for its copies."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in (moved.batch.buffer, *moved.gathered.tensors):
            tensor.record_stream(current)
    item_inputs = source.read(moved.batch.distinct, moved.gathered)
    return PreparedBatch(moved.batch, item_inputs, moved.rows, moved.slots)
