"""Read an encoder's hidden states one by one, as its modules compute them, so that only one is in memory at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """The input or the output of a module at one of its calls; some encoders call one block once for each layer."""

    module: nn.Module
    call: int
    is_input: bool


def find_places(model: nn.Module, run: Callable[[], Any], states: Sequence[Tensor]) -> list[Place] | None:
    """Return the places where the model computes these hidden states, in their order; None if one is found nowhere.

    run: calls the model on the batch that gave the states. A place fits if its tensor equals the state bit for bit.
    """
    places: list[Place] = []

    def compare(place: Place, state: Tensor) -> None:
        if len(places) < len(states) and _same(state, states[len(places)]):
            places.append(place)

    with _watched(model.modules(), compare, _Progress()):
        run()
    return places if len(places) == len(states) else None


def keeps_nothing(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> bool:
    """Return True if the modules keep no state of a batch, so that threads may share the model.

    runs: functions that call the model, with different batches. Recurrent encoders, for example, keep the last batch's
    states.
    """
    attributes_by_run = []
    for run in runs:
        run()
        attributes_by_run.append([{**vars(module), **module._buffers} for module in model.modules()])
    first_run, *later_runs = attributes_by_run
    return all(_all_alike(first_run, later_run) for later_run in later_runs)


def _all_alike(first_run: Sequence[dict[str, Any]], later_run: Sequence[dict[str, Any]]) -> bool:
    """Return True if no module's attributes have changed between two runs."""
    for first, later in zip(first_run, later_run, strict=True):
        if first.keys() != later.keys() or not all(_alike(value, later[name]) for name, value in first.items()):
            return False
    return True


def _alike(value: Any, later: Any) -> bool:
    """Return True if a module's attribute has not changed: the same object, or an equal number or text of one type."""
    return value is later or (isinstance(value, int | float | str) and type(value) is type(later) and value == later)


Take = Callable[[Tensor], Tensor]
Read = Callable[[Callable[[], Any], Sequence[Take]], list[Tensor]]


@contextmanager
def reading(places: Sequence[Place]) -> Iterator[Read]:
    """Yield `read(run, takes)`, which calls `run` and returns takes[i](state) for the state at places[i].

    run: calls the model once. takes: functions, such as a pooling, that are called as soon as a state is computed. A
    place may be named several times, with different functions. Threads may call `read` at the same time, each with its
    own run.
    """
    progress = _Progress()
    positions: dict[Place, list[int]] = {}
    for position, place in enumerate(places):
        positions.setdefault(place, []).append(position)

    def take(place: Place, state: Tensor) -> None:
        for position in positions.get(place, ()):
            progress.taken[position] = progress.takes[position](state)

    def read(run: Callable[[], Any], takes: Sequence[Take]) -> list[Tensor]:
        progress.calls = Counter()
        progress.taken = {}
        progress.takes = takes
        run()
        return [progress.taken[position] for position in range(len(places))]

    with _watched(dict.fromkeys(place.module for place in places), take, progress):
        yield read


class _Progress(threading.local):
    """The calls of modules and the values taken in one thread's current run."""

    def __init__(self) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.taken: dict[int, Tensor] = {}  # by the position of the place in `places`
        self.takes: Sequence[Take] = ()


@contextmanager
def _watched(
    modules: Iterable[nn.Module], on_state: Callable[[Place, Tensor], None], progress: _Progress
) -> Iterator[None]:
    """Call `on_state` on the first input and the first output tensor of each module at each call.

    progress: counts the calls of each module.
    """

    def show(module: nn.Module, is_input: bool, values: Iterable[Any]) -> None:
        state = next((value for value in values if isinstance(value, Tensor)), None)
        if state is not None:
            on_state(Place(module, progress.calls[module], is_input), state)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        show(module, True, (*args, *kwargs.values()))

    def after(module: nn.Module, _args: tuple, output: Any) -> None:
        show(module, False, output if isinstance(output, tuple) else (output,))
        progress.calls[module] += 1

    hooks = []
    try:
        for module in modules:
            hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same(state: Tensor, expected: Tensor) -> bool:
    """Return True if two tensors have one shape and dtype and equal values."""
    comparable = state.shape == expected.shape and state.dtype == expected.dtype
    return comparable and torch.equal(state.to(expected.device), expected)
