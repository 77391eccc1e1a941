"""Read the stored states of a run's views: those of a cache, and those of files of ready-made features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..config import FeaturesConfig
from ..errors import InputError
from .features import Features
from .store import Store


class StateReader(Protocol):
    """Stored states of items by view and item id."""

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of a view. Raises InputError if there is no view of this name."""

    def where(self, name: str) -> str:
        """Return the place of a view, for messages."""

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """Return one digest (hex) of the contents of the items' states, in the order of `item_ids`."""

    def check(self, view: str, item_ids: list[str]) -> None:
        """Raise InputError if any item's states are missing. States are not read."""

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Copy the items' states into the tensor `into` [N, K, D], which has the view's dtype.

        positions: of the layers to read, among the view's layers; None for all. Raises InputError if they cannot be
        read.
        """

    def read_ahead(self) -> AbstractContextManager[None]:
        """Return a context in which the files are read ahead, for reading the states of most items."""

    def close(self) -> None:
        """Close the files."""


class JoinedStates:
    """The views of a cache and of files of features, as one source of states."""

    def __init__(self, store: Store | None, features: Mapping[str, Features]) -> None:
        """Take an open cache and features by the names of their views.

        Raises InputError if a view of the cache has the name of features.
        """
        for name in features:
            if store is not None and name in store.views:
                raise InputError(f"{store.path}: has a view {name!r} too; give the features another name")
        self._store = store
        self._features = features

    def close(self) -> None:
        """Close the files."""
        for reader in (self._store, *self._features.values()):
            if reader is not None:
                reader.close()

    def read_ahead(self) -> AbstractContextManager[None]:
        """Return a context in which the cache's files are read ahead, for reading the states of most items."""
        return nullcontext() if self._store is None else self._store.read_ahead()

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of a view. Raises InputError if there is no view of this name."""
        return self._reader(name).view(name)

    def where(self, name: str) -> str:
        """Return the place of a view, for messages."""
        return self._reader(name).where(name)

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """Return one digest (hex) of the contents of the items' states. Raises InputError as `Features` does."""
        return self._reader(view).contents(view, item_ids)

    def check(self, view: str, item_ids: list[str]) -> None:
        """Raise InputError if any item's states are missing. States are not read."""
        self._reader(view).check(view, item_ids)

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Copy the items' states into the tensor `into` [N, K, D]. Raises InputError if they cannot be read."""
        self._reader(view).read(view, item_ids, into, positions)

    def _reader(self, name: str) -> StateReader:
        """Return the reader of a view. Raises InputError if there is none."""
        if name in self._features:
            return self._features[name]
        if self._store is None:
            raise InputError(f"views: no features are named {name!r}; there are {', '.join(self._features) or 'none'}")
        return self._store


def open_states(cache: Path | None, features: Iterable[FeaturesConfig], item_ids: list[str]) -> StateReader:
    """Open a cache, files of features, or both, for these items.

    Raises InputError if one cannot be read, or if features lack an item.
    """
    configs = list(features)
    if not configs:
        return Store(Path(cache or ""))
    with ExitStack() as opened:
        store = None if cache is None else opened.enter_context(Store(cache))
        views = {}
        for config in configs:
            views[config.name] = Features.open(config, item_ids)
            opened.callback(views[config.name].close)
        joined = JoinedStates(store, views)
        opened.pop_all()
    return joined
