"""Find the encoders that made recorded views, also where they have moved, and encode new items as they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import FEATURES, FeaturesConfig, ProtocolConfig, ViewConfig
from ..data import ItemContents
from ..encoders import Backbone
from ..errors import InputError
from ..fingerprints import changed_settings
from ..trusted_code import refuse_unasked_code
from .input_table import EncodedTable, InputTable, open_inputs
from .item_source import Chunks
from .recorded_features import RecordedFeatures, refuse_other_features
from .recorded_views import same_encoder
from .store import group_positions
from .view_shapes import ViewShape

Descriptions = Mapping[str, Mapping[str, Any]]  # of views by name, as a run or a cache records them
FEATURES_AT_ONCE = 4096  # items to read at a time where no encoder runs
# What a view records beside its encoder, and what may differ from device to device.
NOT_OF_ENCODERS = ("source", "unescaped", "missing_captions", "dtype", "versions", "contents", "encoder", "batches")


@dataclass(frozen=True)
class EncoderPlaces:
    """The places to which the encoders of recorded views have moved."""

    image: str | None = None  # hub name or folder; None for the recorded one
    text: str | None = None
    trusted: bool = False  # whether code that comes with an encoder may run
    features: Mapping[str, str] = field(default_factory=dict)  # the file of new items' features, by the view's name


class RecordedEncoders:
    """The encoders of recorded views, open to read a few new items. Use it as a context manager."""

    def __init__(
        self,
        contents: ItemContents,
        descriptions: Descriptions,
        places: EncoderPlaces,
        device: torch.device,
        missing_images: str = "error",
        attention: str = "auto",
        tuned: bool = False,
        layer_groups: int | None = None,
        features: Sequence[FeaturesConfig] = (),
    ) -> None:
        """Load the encoders, and check all contents.

        descriptions: of the views, in their order. missing_images: one of config.MISSING_IMAGES. attention: one of
        config.ATTENTIONS. tuned: whether trained weights will replace those of the encoders. layer_groups: of the
        layers that a model selects; None for all. features: the settings of views that no encoder reads. Raises
        InputError for content that is missing or cannot be read, and
        for an encoder that is missing or is not the recorded one.
        """
        self.descriptions = descriptions
        self._positions = [group_positions(name, dict(view), layer_groups) for name, view in descriptions.items()]
        self._opened = ExitStack()
        self._parts: list[tuple[list[str], InputTable]] = []
        self._device = device
        self._items = len(contents.item_ids)
        self._features: dict[str, RecordedFeatures] = {}
        encoded = {name: view for name, view in descriptions.items() if view["source"] != FEATURES}
        refuse_other_features(places.features, descriptions)
        views = {view.name: view for view in _view_configs(encoded, places)}
        try:
            for config in features:
                opened = RecordedFeatures(
                    config,
                    descriptions[config.name],
                    places.features[config.name],
                    contents.item_ids,
                    layer_groups,
                )
                self._opened.callback(opened.close)
                self._features[config.name] = opened
            for names in _read_alike(encoded):
                dataset = contents.dataset(_protocol(descriptions[names[0]]))
                chosen = [views[name] for name in names]
                table = open_inputs(
                    dataset,
                    chosen,
                    device,
                    missing_images=missing_images,
                    attention=attention,
                    trained=tuned,
                    images=contents.images,
                )
                self._opened.callback(table.close)
                self._parts.append((names, table))
                for name, backbone in zip(names, table.backbones):
                    _refuse_other_encoder(name, backbone, descriptions[name])
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> RecordedEncoders:
        """Return the encoders."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the contents."""
        self.close()

    def close(self) -> None:
        """Close the contents."""
        self._opened.close()

    @property
    def rows(self) -> int:
        """Return the number of items, and one for padding."""
        return self._items + 1

    @property
    def items_at_once(self) -> int:
        """Return how many items to read at a time."""
        return self._parts[0][1].items_at_once if self._parts else FEATURES_AT_ONCE

    @property
    def backbones(self) -> list[Backbone]:
        """Return the encoder of each view that has one, in the order of the views."""
        by_name = {name: backbone for names, table in self._parts for name, backbone in zip(names, table.backbones)}
        return [by_name[name] for name in self.descriptions if name in by_name]

    @property
    def shapes(self) -> list[ViewShape]:
        """Return the shape (layers K, width D) of each view's selected states."""
        shapes = []
        backbones = iter(self.backbones)
        for name, positions in zip(self.descriptions, self._positions):
            if name in self._features:
                shapes.append(self._features[name].shape)
            else:
                backbone = next(backbones)
                shapes.append(ViewShape(len(backbone.layers if positions is None else positions), backbone.width))
        return shapes

    def inputs(self, items: Tensor) -> list[Chunks]:
        """Return each view's encoder inputs for item numbers int64 [N], counted from 1, on the device."""
        return self._by_view([(names, table.read(items)) for names, table in self._parts])

    def states(self, items: Tensor) -> list[Tensor]:
        """Return each view's states [N, K, D] of item numbers int64 [N], on the device, rounded as the view's are."""
        by_part = [([name], [opened.states(items, self._device)]) for name, opened in self._features.items()]
        for names, table in self._parts:
            encoded = EncodedTable(table, getattr(torch, self.descriptions[names[0]]["dtype"]))
            by_part.append((names, [states.table for states in encoded.read(items)]))
        return self._by_view(by_part)

    def selected(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of each view's states [N, K, D] with the layers that a model selects."""
        return [
            view.clone() if positions is None else view[:, positions]
            for view, positions in zip(states, self._positions)
        ]

    def _by_view(self, by_part: Sequence[tuple[list[str], Sequence[Any]]]) -> list[Any]:
        """Return the entry of each view, in the order of the views."""
        by_name = {name: entry for names, entries in by_part for name, entry in zip(names, entries)}
        return [by_name[name] for name in self.descriptions]


def _view_configs(descriptions: Descriptions, places: EncoderPlaces) -> list[ViewConfig]:
    """Return the settings of recorded views, with the encoders' places of now.

    Raises InputError for an encoder that is not there or is another one, and if one needs code of its checkpoint to run
    and that was not asked for.
    """
    moved = {"image": places.image, "text": places.text}
    for kind, encoder in moved.items():
        if encoder is not None:
            _refuse_unfit_place(kind, encoder, descriptions)
    views = []
    asking = set()
    for name, recorded in descriptions.items():
        view = _view_config(name, recorded)
        kind = _kind(recorded)
        encoder = moved[kind]
        if encoder is not None and same_encoder(encoder, recorded):
            view = replace(view, encoder=encoder, revision=view.revision if encoder == view.encoder else None)
        elif encoder is not None and not _is_folder(encoder) and len(_encoders(kind, descriptions)) == 1:
            view = replace(
                view, encoder=encoder, revision=None
            )  # a hub name, whose weights are compared once they are loaded
        elif _is_gone(view.encoder):
            raise InputError(
                f"view {name!r}: the folder of its encoder, {view.encoder}, is not there; give its place of now by "
                f"--{kind}-encoder, in Python {kind}_encoder="
            )
        if "code" in recorded:
            asking.add(name)
            view = replace(view, trust_remote_code=places.trusted)
        views.append(view)
    refuse_unasked_code(views, asking)
    return views


def _view_config(name: str, recorded: Mapping[str, Any]) -> ViewConfig:
    """Return the settings of a recorded view."""
    is_image = recorded["source"] == "image"
    return ViewConfig(
        name,
        recorded["source"],
        recorded["encoder"],
        recorded["pooling"],
        tuple(recorded["layers"]),
        **({} if is_image else {"max_tokens": recorded["max_tokens"]}),
        encoder_dtype=recorded["encoder_dtype"],
        options=recorded.get("options", {}),
        revision=recorded.get("commit", recorded["revision"]) if "revision" in recorded else None,
    )


def _refuse_unfit_place(kind: str, encoder: str, descriptions: Descriptions) -> None:
    """Raise InputError if an encoder that was named in place of a recorded one is none of those."""
    encoders = _encoders(kind, descriptions)
    option = f"{kind}_encoder"
    if not encoders:
        raise InputError(f"{option}: the run has no view of this kind; leave it out")
    if not _is_folder(encoder):
        if _is_gone(encoder):
            raise InputError(f"{option}: {encoder}: no such folder; expected one with the weights of {encoders[0]}")
        return
    if not any(same_encoder(encoder, view) for view in descriptions.values() if _kind(view) == kind):
        raise InputError(
            f"{option}: {encoder}: its weights are not those that the run was trained with; expected the weights of "
            f"{' or '.join(encoders)}"
        )


def _encoders(kind: str, descriptions: Descriptions) -> list[str]:
    """Return the recorded encoders of a kind, "image" or "text"."""
    return list(dict.fromkeys(view["encoder"] for view in descriptions.values() if _kind(view) == kind))


def _kind(recorded: Mapping[str, Any]) -> str:
    """Return the kind of encoder that reads a view: "image" or "text"."""
    return "image" if recorded["source"] == "image" else "text"


def _is_folder(encoder: str) -> bool:
    """Return True if an encoder is a folder that is there."""
    return Path(encoder).is_dir()


def _is_gone(encoder: str) -> bool:
    """Return True if an encoder is named by a path, and not as on the hub, and the path leads to no folder."""
    path = Path(encoder)
    return not path.is_dir() and (path.is_absolute() or encoder.startswith(".") or len(path.parts) > 2)


def _read_alike(descriptions: Descriptions) -> list[list[str]]:
    """Return the names of the views, in groups whose texts are read alike and whose states have one dtype."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, view in descriptions.items():
        key = (view.get("unescaped"), view.get("missing_captions"), view["dtype"])
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _protocol(recorded: Mapping[str, Any]) -> ProtocolConfig:
    """Return a protocol that reads texts as a recorded view did."""
    return ProtocolConfig(
        unescape_titles=recorded.get("unescaped", True),
        missing_captions=recorded.get("missing_captions", "error"),
    )


def _refuse_other_encoder(name: str, backbone: Backbone, recorded: Mapping[str, Any]) -> None:
    """Raise InputError if a loaded encoder is not the one that made a recorded view."""
    before, now = (
        {key: value for key, value in description.items() if key not in NOT_OF_ENCODERS}
        for description in (recorded, backbone.describe())
    )
    if changed := changed_settings(before, now):
        kind = _kind(recorded)
        raise InputError(
            f"{backbone.view.encoder}: not the encoder with which view {name!r} was made: {'; '.join(changed)}; "
            f"restore it, or give the place of the right one by --{kind}-encoder, in Python {kind}_encoder="
        )
