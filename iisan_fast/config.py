"""Every setting of a run as frozen dataclasses that check themselves and survive a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError

SOURCES = ("image", "title", "caption")
POOLINGS = ("cls", "mean", "last")
ENCODER_DTYPES = ("auto", "float32", "bfloat16", "float16")
STORE_DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("auto", "float32", "bfloat16")
PLACEMENTS = ("auto", "device", "pinned", "mapped")  # of the feature table
METHODS = ("iisan", "iisan-versa")
ACTIVATIONS = ("relu", "gelu")
TIE_SHARES = {"half": 0.5, "best": 0.0}
LEARNING_RATE_GROUPS = ("adapters", "gates", "heads", "sequence_encoder")

Config = TypeVar("Config")


@dataclass(frozen=True)
class ViewConfig:
    """One view of an item: a source, the frozen encoder that reads it, its pooling and the layers kept."""

    name: str
    source: str
    encoder: str
    pooling: str | None = None  # None: the encoder family's default
    layers: tuple[int, ...] | None = None  # indices into hidden_states, 0 the embedding output; None: 0, 2, 4, …
    max_tokens: int = 30
    encoder_dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere

    def __post_init__(self) -> None:
        _choice("source", self.source, SOURCES)
        _choice("encoder_dtype", self.encoder_dtype, ENCODER_DTYPES)
        if self.pooling is not None:
            _choice("pooling", self.pooling, POOLINGS)
        _within("max_tokens", self.max_tokens, 1, 1_000_000)
        if not self.name or "\0" in self.name:
            raise InputError(f"name: expected a view's name, found {self.name!r}")


@dataclass(frozen=True)
class ProtocolConfig:
    """Which users and interactions count (DESIGN: at least 5 interactions, at most 10 inputs)."""

    min_interactions: int = 5
    max_inputs: int = 10
    unescape_titles: bool = True

    def __post_init__(self) -> None:
        # Four: two to train on, one each to validate and to test.
        _within("min_interactions", self.min_interactions, 4, 1_000_000)
        _within("max_inputs", self.max_inputs, 1, 10_000)

    @property
    def max_history(self) -> int:
        """Interactions kept of a user: the inputs, and one target each for training, validation and test."""
        return self.max_inputs + 3


@dataclass(frozen=True)
class ModelConfig:
    """The side network, its heads and the sequence encoder."""

    method: str = "iisan"
    embedding_dim: int = 64
    bottleneck: int = 64
    activation: str = "relu"
    gates: bool = True
    intra: bool = True
    inter: bool = True
    blocks: int = 2
    attention_heads: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("activation", self.activation, ACTIVATIONS)
        for name in ("embedding_dim", "bottleneck", "blocks", "attention_heads"):
            _within(name, getattr(self, name), 1, 65_536)
        if self.embedding_dim % self.attention_heads:
            raise InputError(
                f"embedding_dim: expected a multiple of attention_heads ({self.attention_heads}), "
                f"found {self.embedding_dim}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a probability from 0 to below 1, found {self.dropout}")
        if not (self.intra or self.inter):
            raise InputError("intra, inter: expected at least one of the two towers, found neither")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation: Adam, one learning rate a parameter group, early stop on validation HR@10."""

    batch_users: int = 64
    max_epochs: int = 100
    patience: int = 10  # stops at the first epoch after more than this many without a better one
    seed: int = 0
    precision: str = "auto"  # of the side network's products: auto is bfloat16 on CUDA, float32 elsewhere
    learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"adapters": 1e-4, "gates": 2e-4, "heads": 2e-4, "sequence_encoder": 2e-4}
    )

    def __post_init__(self) -> None:
        _within("batch_users", self.batch_users, 1, 10_000_000)
        _within("max_epochs", self.max_epochs, 1, 1_000_000)
        _within("patience", self.patience, 0, 1_000_000)
        _within("seed", self.seed, 0, 2**63 - 1)
        _choice("precision", self.precision, PRECISIONS)
        if set(self.learning_rates) != set(LEARNING_RATE_GROUPS):
            raise InputError(
                f"learning_rates: expected one rate each for {', '.join(LEARNING_RATE_GROUPS)}, "
                f"found {', '.join(self.learning_rates) or 'none'}"
            )
        for group, rate in self.learning_rates.items():
            if not 0 <= rate < 1:
                raise InputError(f"learning_rates.{group}: expected a rate from 0 to below 1, found {rate}")


@dataclass(frozen=True)
class EvaluationConfig:
    """How targets are ranked against the full catalogue."""

    ks: tuple[int, ...] = (10,)
    mask_history: bool = True  # which of the two figures leads and selects the best epoch; both are always reported
    ties: str = "half"  # what of the items that score like the target counts above it: half of them, or "best": none
    chunk_mib: int = 64  # memory that the score chunks may take

    def __post_init__(self) -> None:
        if not self.ks or any(k < 1 for k in self.ks):
            raise InputError(f"ks: expected one or more cut-offs of at least 1, found {list(self.ks)}")
        _choice("ties", self.ties, tuple(TIE_SHARES))
        _within("chunk_mib", self.chunk_mib, 1, 1_000_000)


@dataclass(frozen=True)
class RunConfig:
    """All that one training run is made from; saved resolved as the run folder's config.json."""

    dataset: str
    cache: str
    views: tuple[str, ...]  # names in the cache; the first takes the image's role
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not 1 <= len(self.views) <= 2 or len(set(self.views)) != len(self.views):
            raise InputError(f"views: expected one or two different views, found {list(self.views)}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """A `cls` from JSON values. An unknown or missing key, or a value of the wrong type, is an InputError."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise InputError(f"{prefix}{key}: unknown setting; expected one of {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    for key, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise InputError(f"{prefix}{key}: missing setting")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def read_json(cls: type[Config], path: Path) -> Config:
    """A `cls` from a JSON file."""
    values = read_settings(path)
    try:
        return from_dict(cls, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file, its settings not yet checked."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
        return _convert(value, hint, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, _expect(value, Mapping, where), where)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        return tuple(_convert(item, element, where) for item in _expect(value, (list, tuple), where))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        element = typing.get_args(hint)[1]
        return {key: _convert(item, element, f"{where}.{key}") for key, item in _expect(value, Mapping, where).items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(value, hint, where)


def _expect(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = getattr(kind, "__name__", "list")
        raise InputError(f"{where}: expected {expected}, found {json.dumps(value)}")
    return value


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def _within(name: str, value: int, minimum: int, maximum: int) -> None:
    if not minimum <= value <= maximum:
        raise InputError(f"{name}: expected {minimum} to {maximum}, found {value}")
