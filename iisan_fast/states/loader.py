"""Batches and what they need of their items, prepared ahead of the step that takes them."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Batch, Shape
from .item_source import Gathered, ItemInputs, ItemSource

AHEAD = 2  # batches
TOGETHER = 8  # batches are laid out one after the other: the first finds the caches full of a step's numbers


class PreparedBatch(NamedTuple):
    """A batch on the device, and what the item encoder reads of its distinct items."""

    batch: Batch
    item_inputs: ItemInputs
    rows: int  # real ones, without padding
    slots: int  # of the users' histories


def prepared_batches(
    batches: Iterator[Batch], source: ItemSource, device: torch.device, pad: Callable[[Shape], Shape] | None = None
) -> Generator[PreparedBatch, None, None]:
    """The batches in order, each made while the steps before it run: checked, padded as `pad` says, what the source
    has on the host of its items gathered, and all copied to the device on a stream of its own.
    """
    copies, batches = _copy_stream(device) if device.type == "cuda" else None, _checked(batches, source.rows)
    with ThreadPoolExecutor(1, "batches") as thread:  # waited for at the end: the source may be closed after
        waiting = deque(thread.submit(_on_host, batches, source, device, pad) for _ in range(AHEAD))
        moved = deque([_moved(waiting.popleft().result(), device, copies)])
        while moved[0] is not None:
            waiting.append(thread.submit(_on_host, batches, source, device, pad))
            moved.append(_moved(waiting.popleft().result(), device, copies))
            yield _arrived(moved.popleft(), source, device)


class _Waiting(NamedTuple):
    batch: Batch
    packed: Tensor | None  # the batch as it will cross to CUDA
    gathered: Gathered
    rows: int
    slots: int
    copied: torch.cuda.Event | None = None  # when all of it is on the device


def _checked(batches: Iterator[Batch], table_rows: int) -> Iterator[Batch]:
    """Check the batches, several at a time, and yield them. A bad one raises before the others of its group."""
    while checked := [batch.checked(table_rows) for batch in itertools.islice(batches, TOGETHER)]:
        yield from checked


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: freed memory is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _on_host(
    batches: Iterator[Batch], source: ItemSource, device: torch.device, pad: Callable[[Shape], Shape] | None
) -> _Waiting | None:
    """The next batch, or None at the end."""
    batch = next(batches, None)
    if batch is None:
        return None
    rows, slots = len(batch.targets), int(batch.multiplicity.sum())
    if pad is not None:
        batch = batch.padded(pad(batch.shape))
    packed = batch.packed(pin=True) if device.type == "cuda" else None
    return _Waiting(batch, packed, source.gather(batch.distinct), rows, slots)


def _moved(waiting: _Waiting | None, device: torch.device, copies: torch.cuda.Stream | None) -> _Waiting | None:
    """The copies to the device begun."""
    if waiting is None or copies is None:
        return waiting
    with torch.cuda.stream(copies):
        tensors = [tensor.to(device, non_blocking=True) for tensor in waiting.gathered.tensors]
        batch = Batch.unpacked(waiting.packed.to(device, non_blocking=True), waiting.batch.shape)
        gathered = waiting.gathered._replace(tensors=tensors)
        return waiting._replace(batch=batch, packed=None, gathered=gathered, copied=copies.record_event())


def _arrived(moved: _Waiting, source: ItemSource, device: torch.device) -> PreparedBatch:
    """The copies waited for, by the device alone."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in (moved.batch.buffer, *moved.gathered.tensors):
            tensor.record_stream(current)
    item_inputs = source.read(moved.batch.distinct, moved.gathered)
    return PreparedBatch(moved.batch, item_inputs, moved.rows, moved.slots)
