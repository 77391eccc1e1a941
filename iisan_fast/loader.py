"""Batches and the states they need, prepared ahead of the step that takes them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import Batch, Shape
from .feature_table import Table
from .kernels import States

AHEAD = 2  # batches


class Prepared(NamedTuple):
    """A batch on the device, and the states of its distinct items."""

    batch: Batch
    states: list[States]
    rows: int  # that count
    slots: int  # of histories in it


def prepared(
    batches: Iterator[Batch], table: Table, device: torch.device, pad: Callable[[Shape], Shape] | None = None
) -> Generator[Prepared, None, None]:
    """The batches in order, each made while the steps before it run: checked, padded as `pad` says, its states gathered
    where the device does not hold the table, and copied to the device on a stream of its own.
    """
    copies = _copy_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "batches") as thread:  # waited for at the end: the table may be closed after
        waiting = deque(thread.submit(_on_host, batches, table, device, pad) for _ in range(AHEAD))
        moved = deque([_moved(waiting.popleft().result(), device, copies)])
        while moved[0] is not None:
            waiting.append(thread.submit(_on_host, batches, table, device, pad))
            moved.append(_moved(waiting.popleft().result(), device, copies))
            yield _arrived(moved.popleft(), table, device)


class _Waiting(NamedTuple):
    batch: Batch
    packed: Tensor | None  # the batch as it will cross to CUDA
    gathered: list[Tensor]
    rows: int
    slots: int
    copied: torch.cuda.Event | None = None  # when all of it is on the device


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: freed memory is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _on_host(
    batches: Iterator[Batch], table: Table, device: torch.device, pad: Callable[[Shape], Shape] | None
) -> _Waiting | None:
    """The next batch, or None at the end."""
    batch = next(batches, None)
    if batch is None:
        return None
    rows, slots = len(batch.targets), int(batch.multiplicity.sum())
    batch.checked(table.rows)
    if pad is not None:
        batch = batch.padded(pad(batch.shape))
    packed = batch.packed(pin=True) if device.type == "cuda" else None
    return _Waiting(batch, packed, table.gather(batch.distinct), rows, slots)


def _moved(waiting: _Waiting | None, device: torch.device, copies: torch.cuda.Stream | None) -> _Waiting | None:
    """The copies to the device begun."""
    if waiting is None or copies is None:
        return waiting
    with torch.cuda.stream(copies):
        gathered = [rows.to(device, non_blocking=True) for rows in waiting.gathered]
        batch = Batch.unpacked(waiting.packed.to(device, non_blocking=True), waiting.batch.shape)
        return waiting._replace(batch=batch, packed=None, gathered=gathered, copied=copies.record_event())


def _arrived(moved: _Waiting, table: Table, device: torch.device) -> Prepared:
    """The copies waited for, by the device alone."""
    if moved.copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(moved.copied)
        for tensor in (moved.batch.buffer, *moved.gathered):
            tensor.record_stream(current)
    states = [States(rows) for rows in moved.gathered] or table.states(moved.batch.distinct)
    return Prepared(moved.batch, states, moved.rows, moved.slots)
