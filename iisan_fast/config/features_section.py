"""Define the settings of a view of ready-made features, which a file holds for each item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..files import expanded_name
from ..setting_fields import check_settings, setting

FEATURES = "features"  # the source of such a view
BESIDE_ENCODERS = (
    "features: are ready-made, and cannot stand beside encoders that run; store the encoders' states with "
    "iisan-fast extract and give the cache, or leave the encoders out"
)


@dataclass(frozen=True)
class FeaturesConfig:
    """One view of the items that is read from a file of ready-made features, without an encoder."""

    name: str = setting(help="Name of the view in a run.")
    path: str = setting(help="File of the features: .npy, .safetensors, .parquet, or a folder of .parquet files.")
    layers: tuple[int, ...] | None = setting(
        None, help="Layers that are read, by number from 0.", automatic="all layers of the file"
    )
    ids: str | None = setting(
        None,
        help="File with the item id of each row: text, an id a line, or .npy.",
        automatic="the ids in the file; without these, whole numbers give the rows",
    )
    first_id: int | None = setting(
        None,
        help="Item id of the first row, where ids are whole numbers.",
        minimum=0,
        maximum=1,
        automatic="0 if an item 0 occurs, 1 if the last row is the largest id's",
    )
    id_column: str | None = setting(None, help="Column of the item ids in Parquet.", automatic="found by its name")
    column: str | None = setting(None, help="Column of the features in Parquet.", automatic="the only one with lists")
    tensor: str | None = setting(
        None, help="Tensor of the features in a safetensors file.", automatic="the only one that can be it"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.name or "\0" in self.name:
            raise InputError(f"name: expected a view's name, found {self.name!r}")
        for field in ("path", "ids"):
            value = getattr(self, field)
            if value is not None:
                if not value or "\0" in value:
                    raise InputError(f"{field}: expected a file, found {value!r}")
                object.__setattr__(self, field, expanded_name(value))
        if self.ids is not None and self.first_id is not None:
            raise InputError("ids, first_id: both say which row an item has; give one of them")
        if self.layers is not None:
            self._check_layers(self.layers)

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        """Raise InputError unless the layers are ascending numbers from 0."""
        ascending = all(lower < higher for lower, higher in zip(layers, layers[1:]))
        if not layers or layers[0] < 0 or not ascending:
            raise InputError(f"layers: expected ascending numbers from 0, found {','.join(map(str, layers)) or 'none'}")


def resolved_views(views: tuple[str, ...], features: tuple[FeaturesConfig, ...], has_cache: bool) -> tuple[str, ...]:
    """Return the names of a run's views, of a cache and of features, in order. Features that are not named go last.

    Raises InputError for two features of one name, and for a name that is neither of the cache nor of features.
    """
    names = [view.name for view in features]
    if len(set(names)) < len(names):
        raise InputError(f"features: two have one name ({', '.join(names)}); give each its own name")
    of_cache = [name for name in views if name not in names]
    if of_cache and not has_cache:
        raise InputError(f"views: {', '.join(of_cache)} would be read from a cache; give the cache, or leave it out")
    if has_cache and not of_cache:
        raise InputError("cache: no view of it is read; name one in views, or leave the cache out")
    return (*views, *(name for name in names if name not in views))


def is_features(values: Mapping[str, object]) -> bool:
    """Return True if plain values describe a view of ready-made features."""
    return values.get("source") == FEATURES
