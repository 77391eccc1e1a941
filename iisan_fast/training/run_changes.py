"""Describe the settings that a run may change when it goes on, and apply them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..config import FeaturesConfig, RunConfig, UncachedConfig
from ..errors import InputError


@dataclass(frozen=True)
class RunChanges:
    """The settings that a run may change when it goes on; None changes nothing."""

    dataset: str | None = None  # folders to which the data has moved
    cache: str | None = None
    features: Mapping[str, str] = field(default_factory=dict)  # the file to which a view's features have moved
    image_encoder: str | None = None
    text_encoder: str | None = None
    max_epochs: int | None = None
    patience: int | None = None
    checkpoint_every: str | int | None = None

    def __bool__(self) -> bool:
        """Return True if anything changes."""
        return self != RunChanges()

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return a run's configuration with the changes. Raises InputError for a place of what the run does not read.

        Whether the new places hold the same content is not checked.
        """
        names = ("max_epochs", "patience", "checkpoint_every")
        train = replace(config.train, **{name: value for name in names if (value := getattr(self, name)) is not None})
        if self.cache is not None and config.cache is None:
            raise InputError("cache: the run reads none; leave it out")
        uncached = config.uncached
        for kind, encoder in (("image", self.image_encoder), ("text", self.text_encoder)):
            if encoder is not None:
                uncached = _moved_encoder(config, uncached, kind, encoder)
        return replace(
            config,
            dataset=self.dataset or config.dataset,
            cache=self.cache or config.cache,
            features=moved_features(config.features, self.features),
            uncached=uncached,
            train=train,
        )


NO_CHANGES = RunChanges()


def _moved_encoder(config: RunConfig, uncached: UncachedConfig | None, kind: str, encoder: str) -> UncachedConfig:
    """Return the encoders of a run, where the image's or the text's encoder has a new place.

    Raises InputError if the run has not exactly one such encoder.
    """
    if uncached is None:
        remedy = "give the place of the cache" if config.cache is not None else "leave it out"
        raise InputError(f"{kind}_encoder: no encoder runs in this run; {remedy}")
    of_kind = [view for view in uncached.views if (view.source == "image") == (kind == "image")]
    if len(of_kind) != 1:
        raise InputError(f"{kind}_encoder: expected one {kind} encoder in the run, found {len(of_kind)}; leave it out")
    views = tuple(replace(view, encoder=encoder) if view in of_kind else view for view in uncached.views)
    return replace(uncached, views=views)


def moved_features(features: tuple[FeaturesConfig, ...], places: Mapping[str, str]) -> tuple[FeaturesConfig, ...]:
    """Return features with other files. places: the new file by the view's name. Raises InputError for another name."""
    names = [view.name for view in features]
    for name in places:
        if name not in names:
            raise InputError(f"features: the run reads no features {name!r}; expected {', '.join(names) or 'none'}")
    return tuple(replace(view, path=places.get(view.name, view.path)) for view in features)
