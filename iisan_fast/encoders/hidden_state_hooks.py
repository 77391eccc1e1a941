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
    """What a module is given, or what it gives, at one of its calls: some encoders call one block for all layers."""

    module: nn.Module
    call: int
    given: bool


def find_places(model: nn.Module, run: Callable[[], Any], states: Sequence[Tensor]) -> list[Place] | None:
    """Where within the model `run`, which calls it, makes all these states, in order and bit for bit; None if it does
    not.
    """
    found: list[Place] = []

    def see(place: Place, state: Tensor) -> None:
        if len(found) < len(states) and _same(state, states[len(found)]):
            found.append(place)

    with _watched(model.modules(), see, _OfThread()):
        run()
    return found if len(found) == len(states) else None


def keeps_nothing(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> bool:
    """Whether none of the runs, of unlike batches, leaves in the modules what another did not: if so, threads may run
    the model at once. Recurrent encoders, for one, leave the states of a batch in it."""
    left = []
    for run in runs:
        run()
        left.append([{**vars(module), **module._buffers} for module in model.modules()])
    return all(
        own.keys() == other.keys() and all(_alike(value, other[name]) for name, value in own.items())
        for others in left[1:]
        for own, other in zip(left[0], others, strict=True)
    )


def _alike(value: Any, other: Any) -> bool:
    """Whether a module's attribute is as it was: the same object, or an equal number or text."""
    return value is other or (isinstance(value, int | float | str) and type(value) is type(other) and value == other)


Take = Callable[[Tensor], Tensor]
Read = Callable[[Callable[[], Any], Take], list[Tensor]]


@contextmanager
def reading(places: Sequence[Place]) -> Iterator[Read]:
    """Gives what reads the states at all places: `read(run, take)` is what `take` makes of each, the moment that `run`
    has made it. Several threads may read at once, each what it runs itself."""
    own = _OfThread()

    def see(place: Place, state: Tensor) -> None:
        if place in places:
            own.taken[place] = own.take(state)

    def read(run: Callable[[], Any], take: Take) -> list[Tensor]:
        own.calls, own.taken, own.take = Counter(), {}, take
        run()
        return [own.taken[place] for place in places]

    with _watched(dict.fromkeys(place.module for place in places), see, own):
        yield read


class _OfThread(threading.local):
    """What a thread has seen of its own run."""

    def __init__(self) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.taken: dict[Place, Tensor] = {}
        self.take: Take = torch.clone


@contextmanager
def _watched(modules: Iterable[nn.Module], see: Callable[[Place, Tensor], None], own: _OfThread) -> Iterator[None]:
    """Shows the first tensor that each module is given, and that it gives, as it happens; `own` counts its calls."""

    def show(module: nn.Module, given: bool, values: Iterable[Any]) -> None:
        state = next((value for value in values if isinstance(value, Tensor)), None)
        if state is not None:
            see(Place(module, own.calls[module], given), state)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        show(module, True, (*args, *kwargs.values()))

    def after(module: nn.Module, _args: tuple, output: Any) -> None:
        show(module, False, output if isinstance(output, tuple) else (output,))
        own.calls[module] += 1

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
