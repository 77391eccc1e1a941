"""The settings of sweeps: runs of several methods, sets of encoders and seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from ..config import METHODS, NEIGHBOURS, PLACEMENTS, STATE_METHODS, ExtractionConfig, ViewConfig
from ..errors import InputError
from ..setting_fields import check_settings, same_setting, setting

TRAINED_METHODS = tuple(method for method in METHODS if method != NEIGHBOURS)  # every table has neighbours beside them
UNCACHED = "-uncached"  # after a method's name: its encoders run in every step although a cache could hold their states
ENCODERS_NAME = re.compile(r"\w[\w .+-]*")  # the name of a set of encoders, and of its folder
COMPARED_METHODS = ("full", "adapter", "lora", "bitfit", "iisan-uncached", "iisan")


@dataclass(frozen=True)
class SweepSettings:
    """The methods, sets of encoders and seeds of a sweep, and how each run is trained."""

    methods: tuple[str, ...] = setting(
        help="Methods that train --method knows; with -uncached after it, a method runs its encoders in every step."
    )
    encoders: dict[str, tuple[ViewConfig, ...]] = field(default_factory=dict)  # sets of views by name
    seeds: tuple[int, ...] = setting((0,), help="Seeds; each is a run of every method.", minimum=0)
    epochs: int = setting(100, help="Train at most this many epochs.", minimum=1)
    patience: int = setting(10, help="Stop after this many epochs without a better validation HR@10.", minimum=0)
    batch_users: int = setting(64, help="Users a batch, for every method.", minimum=1)
    users: int | None = setting(
        None, help="Draw this many users of DATASET, the same for every run.", minimum=1, automatic="all"
    )
    profiled: int = 10  # steps whose phases are timed
    missing_images: str = same_setting(ExtractionConfig, "missing_images")
    attention: str = same_setting(ExtractionConfig, "attention")
    table: str = setting("auto", help="Where cached states lie while a run trains.", choices=PLACEMENTS)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(f"methods: expected different ones, found {', '.join(self.methods) or 'none'}")
        for name in self.methods:
            method, uncached = split_name(name)
            if method not in TRAINED_METHODS or (uncached and method not in STATE_METHODS):
                allowed = [*TRAINED_METHODS, *(method + UNCACHED for method in STATE_METHODS)]
                raise InputError(f"methods: expected some of {', '.join(allowed)}, found {name!r}")
        if not self.encoders:
            raise InputError("encoders: expected at least one set of views, found none")
        for name in self.encoders:
            if not ENCODERS_NAME.fullmatch(name):
                raise InputError(f"encoders: expected a name of letters, digits and . + - between, found {name!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: expected different ones, found {self.seeds}")

    @property
    def sweep(self) -> SweepSettings:
        """Return the part that decides how runs are trained, without the settings of a comparison of them."""
        return SweepSettings(**{part.name: getattr(self, part.name) for part in fields(SweepSettings)})


@dataclass(frozen=True)
class MethodsSettings(SweepSettings):
    """The settings of `bench methods`."""

    methods: tuple[str, ...] = setting(
        COMPARED_METHODS,
        help="Methods that train --method knows; with -uncached after it, a method runs its encoders in every step.",
    )
    against: str | None = setting(
        None, help="The method that the others are tested against.", automatic="the last of --methods"
    )
    weights: tuple[float, ...] = setting(
        (0.45, 0.10, 0.45), help="Weights of time, parameters and memory in TPME.", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class EncodersSettings(SweepSettings):
    """The settings of `bench encoders`."""

    methods: tuple[str, ...] = setting(
        ("iisan-versa",),
        help="A method that train --method knows; with -uncached after it, it runs its encoders in every step.",
    )


def reads_a_cache(name: str) -> bool:
    """Return True for the name of a method whose runs read cached states."""
    method, uncached = split_name(name)
    return method in STATE_METHODS and not uncached


def split_name(name: str) -> tuple[str, bool]:
    """Return a name's method, and True if its encoders run although a cache could hold their states."""
    return name.removesuffix(UNCACHED), name.endswith(UNCACHED)
