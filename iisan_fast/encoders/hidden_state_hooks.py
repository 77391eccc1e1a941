"""An encoder's hidden states, each read in passing where it is made, so that no two of them have to be kept at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """A module's input or output at one of its calls: some encoders call one block for all layers."""

    module: nn.Module
    call: int
    is_input: bool


def find_places(model: nn.Module, run: Callable[[], Any], states: Sequence[Tensor]) -> list[Place] | None:
    """Return the places in the model where `run`, which calls it, makes these states, in order and bit for bit.

    Return None if one of them is made nowhere.
    """
    places: list[Place] = []

    def see(place: Place, state: Tensor) -> None:
        if len(places) < len(states) and _same(state, states[len(places)]):
            places.append(place)

    with _watched(model.modules(), see, _Seen()):
        run()
    return places if len(places) == len(states) else None


def keeps_nothing(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> bool:
    """Return True if the modules keep no state of a batch, so that threads may share the model.

    runs: calls with different batches. Recurrent encoders, for one, keep the states of the last batch.
    """
    left = []
    for run in runs:
        run()
        left.append([{**vars(module), **module._buffers} for module in model.modules()])
    return all(
        first.keys() == later.keys() and all(_alike(value, later[name]) for name, value in first.items())
        for others in left[1:]
        for first, later in zip(left[0], others, strict=True)
    )


def _alike(value: Any, other: Any) -> bool:
    """Return True if a module's attribute has not changed: one object, or an equal number or text."""
    return value is other or (isinstance(value, int | float | str) and type(value) is type(other) and value == other)


Take = Callable[[Tensor], Tensor]
Read = Callable[[Callable[[], Any], Sequence[Take]], list[Tensor]]


@contextmanager
def reading(places: Sequence[Place]) -> Iterator[Read]:
    """Yield `read(run, takes)`, which calls `run` and returns takes[i](state) for the state at places[i].

    A state is taken the moment that it is made. A place may be named several times, to be taken in several ways.
    Several threads may read at once, each its own run.
    """
    seen = _Seen()
    positions: dict[Place, list[int]] = {}
    for position, place in enumerate(places):
        positions.setdefault(place, []).append(position)

    def see(place: Place, state: Tensor) -> None:
        for position in positions.get(place, ()):
            seen.taken[position] = seen.takes[position](state)

    def read(run: Callable[[], Any], takes: Sequence[Take]) -> list[Tensor]:
        seen.calls, seen.taken, seen.takes = Counter(), {}, takes
        run()
        return [seen.taken[position] for position in range(len(places))]

    with _watched(dict.fromkeys(place.module for place in places), see, seen):
        yield read


class _Seen(threading.local):
    """The calls and states that one thread has seen in its run."""

    def __init__(self) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.taken: dict[int, Tensor] = {}  # by the position of its place
        self.takes: Sequence[Take] = ()


@contextmanager
def _watched(modules: Iterable[nn.Module], see: Callable[[Place, Tensor], None], seen: _Seen) -> Iterator[None]:
    """Pass `see` the first input and the first output of each module at each call, which `seen` counts."""

    def show(module: nn.Module, is_input: bool, values: Iterable[Any]) -> None:
        state = next((value for value in values if isinstance(value, Tensor)), None)
        if state is not None:
            see(Place(module, seen.calls[module], is_input), state)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        show(module, True, (*args, *kwargs.values()))

    def after(module: nn.Module, _args: tuple, output: Any) -> None:
        show(module, False, output if isinstance(output, tuple) else (output,))
        seen.calls[module] += 1

    hooks = []
    try:
        for module in modules:
            hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same(state: Tensor, other: Tensor) -> bool:
    alike = state.shape == other.shape and state.dtype == other.dtype
    return alike and torch.equal(state.to(other.device), other)
