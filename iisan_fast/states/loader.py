"""Prepare batches and the inputs of their items ahead of the steps that take them."""

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
from ..ranks import ALONE, Ranks
from .feature_table import FeatureTable
from .item_source import Gathered, ItemInputs, ItemSource

Argument, Result = TypeVar("Argument"), TypeVar("Result")

AHEAD = 2  # batches to prepare before they are taken
TOGETHER = 8  # batches to check in one go, because the first one finds a step's data in the CPU's caches


class PreparedBatch(NamedTuple):
    """A batch, or a rank's share of it, on the device, and the inputs of an item encoder for the items to encode."""

    batch: Batch
    item_inputs: ItemInputs  # of the items batch.encoded
    rows: int  # of the whole batch, without padding
    slots: int  # items in the histories of the whole batch, without padding


class PlannedBatch(NamedTuple):
    """One of the batches of a window. The batches of a window are taken in their order."""

    window: Tensor | None  # int32 [batches, words] on the device, with its first batch; None with the others
    item_inputs: ItemInputs | None  # of the batch's distinct items; None if the device holds a full table
    rows: int  # without padding
    slots: int  # items in the users' histories, without padding


def planned_batches(
    plan: RunPlan, epoch: int, source: ItemSource, device: torch.device, taken: int = 0
) -> Generator[PlannedBatch, None, None]:
    """Yield an epoch's batches in order. Windows of batches are packed, checked and copied ahead of the steps.

    source: the items; unless it is a table on the device, the inputs of each batch's items are gathered ahead too.
    taken: the number of batches at the epoch's start that are left out. Raises ValueError if a batch names an item that
    the source does not have.
    """

    def pack(window: Window) -> tuple[PackedWindow, _Copied]:
        packed = plan.pack(window, pin=device.type == "cuda")
        items = torch.cat(packed.items)
        kernels.check_indices("batch.distinct", items, None, source.rows, items.device, 1)
        return packed, _copied([packed.words], device)

    # Both threads end with this block, so the caller may close the source afterwards.
    with ThreadPoolExecutor(1, "batches: windows") as packing, ThreadPoolExecutor(1, "batches: items") as gathering:
        windows = _ahead(packing, pack, plan.windows(epoch, taken), 1)
        gathered: Iterator[ItemInputs | None] = itertools.repeat(None)
        if not isinstance(source, FeatureTable):
            windows, lists = itertools.tee(windows)  # tee keeps the windows that only one of the two has taken
            items = itertools.chain.from_iterable(packed.items for packed, _ in lists)
            gathered = _gathered(gathering, items, source, device)
        for packed, copied in windows:
            (window,) = _waited(copied, device)
            for number, (size, inputs) in enumerate(zip(packed.sizes, gathered)):
                yield PlannedBatch(None if number else window, inputs, *size)


def _gathered(
    thread: ThreadPoolExecutor, lists: Iterator[Tensor], source: ItemSource, device: torch.device
) -> Iterator[ItemInputs]:
    """Yield the inputs of an item encoder for each list of item numbers, gathered ahead in the thread."""

    def gather(items: Tensor) -> tuple[Gathered, _Copied]:
        gathered = source.gather(items)
        numbers = items.pin_memory() if device.type == "cuda" else items
        return gathered, _copied([numbers, *gathered.tensors], device)

    for gathered, copied in _ahead(thread, gather, lists, AHEAD):
        items, *tensors = _waited(copied, device)
        yield source.read(items, gathered._replace(tensors=tensors))


def prepared_batches(
    batches: Iterator[Batch],
    source: ItemSource,
    device: torch.device,
    shape: Shape | None = None,
    ranks: Ranks = ALONE,
) -> Generator[PreparedBatch, None, None]:
    """Yield the batches in order, on the device, prepared ahead of the steps that take them.

    Each batch is checked, shared out among the ranks, and padded if `shape` is given. The inputs of the items to encode
    are gathered on the host. For CUDA, all of it is copied to the device on a stream beside the steps' own. Raises
    ValueError for a batch with an index out of range.
    """
    copies = _copy_stream(device) if device.type == "cuda" else None
    host = _Host(_checked(batches, source.rows), source, device, shape, ranks)
    with ThreadPoolExecutor(1, "batches") as thread:  # it ends with this block, so the caller may close the source
        waiting = deque(thread.submit(host.next_batch) for _ in range(AHEAD))
        moved = deque([_moved(waiting.popleft().result(), device, copies)])
        while moved[0] is not None:
            waiting.append(thread.submit(host.next_batch))
            moved.append(_moved(waiting.popleft().result(), device, copies))
            yield _arrived(moved.popleft(), source, device)


class _Waiting(NamedTuple):
    """A batch that is prepared on the host."""

    batch: Batch
    packed: Tensor | None  # the batch as one tensor, for CUDA
    gathered: Gathered
    rows: int
    slots: int
    copied: torch.cuda.Event | None = None  # set when the copies to the device end


class _Copied(NamedTuple):
    """Tensors that are being copied to the device."""

    tensors: list[Tensor]
    copied: torch.cuda.Event | None  # set when the copies end; None on a CPU


def _ahead(
    thread: ThreadPoolExecutor, function: Callable[[Argument], Result], arguments: Iterable[Argument], count: int
) -> Iterator[Result]:
    """Yield function(argument) for each argument, in order; the thread computes up to `count` results ahead."""
    waiting: deque[Future[Result]] = deque()
    for argument in arguments:
        waiting.append(thread.submit(function, argument))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _copied(tensors: list[Tensor], device: torch.device) -> _Copied:
    """Start copying host tensors, pinned for CUDA, to the device."""
    if device.type != "cuda":
        return _Copied(tensors, None)
    copies = _copy_stream(device)
    with torch.cuda.stream(copies):
        return _Copied([tensor.to(device, non_blocking=True) for tensor in tensors], copies.record_event())


def _waited(moved: _Copied, device: torch.device) -> list[Tensor]:
    """Return the tensors. The device waits for their copies, the host does not."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in moved.tensors:
            tensor.record_stream(current)
    return moved.tensors


def _checked(batches: Iterator[Batch], table_rows: int) -> Iterator[Batch]:
    """Check the batches, several at a time, and yield them. A wrong batch raises before its group is yielded."""
    while checked := [batch.checked(table_rows) for batch in itertools.islice(batches, TOGETHER)]:
        yield from checked


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for copies. One stream serves all epochs, so that freed memory can be used again."""
    return torch.cuda.Stream(device)


class _Host(NamedTuple):
    """The batches that are prepared on the host; the fields are arguments of `prepared_batches`."""

    batches: Iterator[Batch]
    source: ItemSource
    device: torch.device
    shape: Shape | None
    ranks: Ranks

    def next_batch(self) -> _Waiting | None:
        """Return the next batch, prepared on the host; None after the last one."""
        batch = next(self.batches, None)
        if batch is None:
            return None
        rows = len(batch.targets)
        slots = batch.slots
        batch = batch.share(self.ranks)
        if self.shape is not None:
            batch = batch.padded(self.shape, self.ranks)
        packed = batch.packed(pin=True) if self.device.type == "cuda" else None
        return _Waiting(batch, packed, self.source.gather(batch.encoded), rows, slots)


def _moved(waiting: _Waiting | None, device: torch.device, copies: torch.cuda.Stream | None) -> _Waiting | None:
    """Start copying a batch to the device, and return it; on a CPU return it unchanged."""
    if waiting is None or copies is None:
        return waiting
    with torch.cuda.stream(copies):
        tensors = [tensor.to(device, non_blocking=True) for tensor in waiting.gathered.tensors]
        packed = waiting.packed.to(device, non_blocking=True)
        batch = Batch.unpacked(packed, waiting.batch.shape, waiting.batch.block)
        gathered = waiting.gathered._replace(tensors=tensors)
        return waiting._replace(batch=batch, packed=None, gathered=gathered, copied=copies.record_event())


def _arrived(moved: _Waiting, source: ItemSource, device: torch.device) -> PreparedBatch:
    """Return the batch with the inputs of its items. The device waits for the copies, the host does not."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in (moved.batch.buffer, *moved.gathered.tensors):
            tensor.record_stream(current)
    item_inputs = source.read(moved.batch.encoded, moved.gathered)
    return PreparedBatch(moved.batch, item_inputs, moved.rows, moved.slots)
