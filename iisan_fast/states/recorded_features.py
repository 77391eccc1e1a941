"""Read the features of a few new items as those of a recorded view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import FEATURES, FeaturesConfig
from ..errors import InputError
from .feature_files import open_content
from .features import Features
from .store import group_positions
from .view_shapes import ViewShape

COMPARED = ("layers", "depth", "width", "dtype")


class RecordedFeatures:
    """The features of new items in the form of a recorded view."""

    def __init__(
        self, config: FeaturesConfig, recorded: Mapping[str, Any], path: str, item_ids: list[str], groups: int | None
    ) -> None:
        """Open the file of the new items.

        config: of the recorded view `recorded`. path: of the new file, whose rows have ids, or stand in the order of
        the items, or are those of whole numbers if they were so in training. groups: of the layers that a model
        selects; None for all. Raises InputError if the file cannot be used, lacks an item, or has another form.
        """
        content = open_content(replace(config, path=path, ids=None, first_id=None), item_ids)
        first_id = recorded.get("first_id") if content.ids is None else None
        if content.ids is None and first_id is None:
            if len(content.array) != len(item_ids):
                raise InputError(
                    f"{path}: expected a row for each of {len(item_ids)} items, in their order, found "
                    f"{len(content.array)}; give those rows, or a file with ids"
                )
            content = content._replace(ids=item_ids)
        self._features = Features(replace(config, path=path, ids=None, first_id=first_id), content, item_ids)
        self._item_ids = item_ids
        self._recorded = recorded
        self.positions = group_positions(config.name, dict(recorded), groups)
        now = self._features.view(config.name)
        for name in COMPARED:
            if now[name] != recorded[name]:
                raise InputError(
                    f"{path}: {name}: expected {recorded[name]}, as view {config.name!r} of the run, found {now[name]}"
                )
        self._features.contents(config.name, item_ids)  # refuses numbers that are not finite

    @property
    def shape(self) -> ViewShape:
        """Return the shape (layers K, width D) of the selected states."""
        layers = self._recorded["layers"] if self.positions is None else self.positions
        return ViewShape(len(layers), self._recorded["width"])

    def close(self) -> None:
        """Leave the file."""
        self._features.close()

    def states(self, items: Tensor, device: torch.device) -> Tensor:
        """Return all layers [N, K, D] of item numbers int64 [N], counted from 1, on a device."""
        recorded = self._recorded
        shape = (len(items), len(recorded["layers"]), recorded["width"])
        states = torch.empty(shape, dtype=getattr(torch, recorded["dtype"]))
        self._features.read("", [self._item_ids[item - 1] for item in items.tolist()], states)
        return states.to(device)


def refuse_other_features(names: Iterable[str], descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError unless there are new features of the recorded views of features, and of no other.

    names: of the views that there are new features of.
    """
    recorded = [name for name, view in descriptions.items() if view["source"] == FEATURES]
    new_names = list(names)
    for name in new_names:
        if name not in recorded:
            raise InputError(
                f"features: the run reads no features {name!r}; expected {', '.join(recorded) or 'none'}; leave it out"
            )
    for name in recorded:
        if name not in new_names:
            raise InputError(
                f"features: the run reads ready-made features as view {name!r}; give those of the items by "
                f"--features {name}=FILE, in Python features={{{name!r}: FILE}}"
            )
