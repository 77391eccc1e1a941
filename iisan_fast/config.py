"""Every setting of a run as frozen dataclasses that check themselves and survive a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, check_choice, check_range
from .setting_fields import check_settings, from_dict

SOURCES = ("image", "title", "caption")
POOLINGS = ("cls", "mean", "last")
ENCODER_DTYPES = ("auto", "float32", "bfloat16", "float16")
STORE_DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("auto", "float32", "bfloat16")
PLACEMENTS = ("auto", "device", "pinned", "mapped")  # of the feature table
ACTIVATIONS = ("relu", "gelu")
SANBS = ("adapter", "phm", "low-rank")
MISSING_CAPTIONS = ("error", "title")
PHM_TERMS = 4  # of a sum of Kronecker products
TIE_SHARES = {"half": 0.5, "best": 0.0}
ATTENTIONS = ("auto", "xformers", "sdpa", "eager")
MISSING_IMAGES = ("error", "blank")
RESERVED_OPTIONS = (  # of loading an encoder: what is set, or would be right for its weights and not for the rest
    *("attn_implementation", "config", "local_files_only", "output_hidden_states", "output_loading_info"),
    *("revision", "subfolder", "torch_dtype", "trust_remote_code"),
)
SPLITS = ("leave-one-out", "temporal")

SIDE_METHODS = ("iisan", "iisan-versa")  # read the hidden states of several layers
TUNING_METHODS = ("full", "adapter", "lora", "bitfit")  # train encoders, or what is put into them
STATE_METHODS = (*SIDE_METHODS, "frozen")  # read states that do not change, so that a cache can hold them
_SIDE_RATES = {"adapters": 1e-4, "gates": 2e-4, "heads": 2e-4, "sequence_encoder": 2e-4}
_HEAD_RATES = {"heads": 2e-4, "sequence_encoder": 2e-4}
LEARNING_RATES: dict[str, dict[str, float]] = {  # of each method's groups of parameters
    "iisan": _SIDE_RATES,
    "iisan-versa": _SIDE_RATES,
    "full": {"encoders": 5e-5, "heads": 1e-4, "sequence_encoder": 1e-4},
    "adapter": {"adapters": 1e-4, **_HEAD_RATES},
    "lora": {"adapters": 1e-4, **_HEAD_RATES},
    "bitfit": {"encoders": 1e-4, **_HEAD_RATES},
    "frozen": _HEAD_RATES,
    "id": {"item_embeddings": 1e-3, "sequence_encoder": 1e-3},
}
METHODS = tuple(LEARNING_RATES)
TOWERS = ("first", "second", "inter")  # over the first view, the second, and both

RUN_FORMAT = 2  # of run folders, recorded in their config.json; runs of format 1 record none


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
    layer_groups: int | None = None  # in place of layers: the embedding output, and the last block of as many groups
    options: Mapping[str, Any] = field(default_factory=dict)  # of `from_pretrained`, beside those set here

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("source", self.source, SOURCES)
        if self.layer_groups is not None:
            check_range("layer_groups", self.layer_groups, 1, 1000)
            if self.layers is not None:
                raise InputError("layers, layer_groups: expected one of them, found both")
        check_choice("encoder_dtype", self.encoder_dtype, ENCODER_DTYPES)
        if "dtype" in self.options:
            self._rename_dtype()
        for name in self.options:
            if name in RESERVED_OPTIONS:
                raise InputError(f"options.{name}: is decided here; expected another option of from_pretrained")
        if self.pooling is not None:
            check_choice("pooling", self.pooling, POOLINGS)
        check_range("max_tokens", self.max_tokens, 1, 1_000_000)
        if not self.name or "\0" in self.name:
            raise InputError(f"name: expected a view's name, found {self.name!r}")

    def _rename_dtype(self) -> None:
        """An encoder_dtype that was given as Hugging Face calls it becomes one."""
        options = dict(self.options)
        dtype = options.pop("dtype")
        check_choice("options.dtype", dtype, ENCODER_DTYPES)
        if self.encoder_dtype not in ("auto", dtype):
            raise InputError(f"encoder_dtype, options.dtype: found {self.encoder_dtype} and {dtype}; give one of them")
        object.__setattr__(self, "encoder_dtype", dtype)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ProtocolConfig:
    """Which users and interactions count (in the papers at least 5, and 10 inputs at most), and which are held out."""

    min_interactions: int = 5
    max_inputs: int = 10
    unescape_titles: bool = True
    missing_captions: str = "error"  # what stands where captions.tsv has no line for an item: nothing, or its title
    split: str = "leave-one-out"  # each user's last two are the targets; temporal: what comes after two times of all
    validation_from: float = 0.8  # temporal: the share of all interactions that come before the first time
    test_from: float = 0.9  # and before the second

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("missing_captions", self.missing_captions, MISSING_CAPTIONS)
        check_choice("split", self.split, SPLITS)
        shares = self.validation_from, self.test_from
        if not 0 < shares[0] < shares[1] < 1:
            raise InputError(f"validation_from, test_from: expected ascending shares between 0 and 1, found {shares}")
        if self.split != "temporal" and shares != (ProtocolConfig.validation_from, ProtocolConfig.test_from):
            raise InputError(f"validation_from, test_from: {self.split} takes no shares; they are for temporal")
        # Four: two to train on, one each to validate and to test.
        check_range("min_interactions", self.min_interactions, 4, 1_000_000)
        check_range("max_inputs", self.max_inputs, 1, 10_000)

    @property
    def max_history(self) -> int:
        """Interactions that leave-one-out keeps of a user: the inputs, one target each to train, validate and test."""
        return self.max_inputs + 3


@dataclass(frozen=True)
class ModelConfig:
    """The side network, its heads and the sequence encoder."""

    method: str = "iisan"
    embedding_dim: int = 64
    bottleneck: int = 64
    bottlenecks: Mapping[str, int] = field(default_factory=dict)  # of a tower, by name, where it has one of its own
    activation: str = "relu"
    sanb: str = "adapter"  # what the weights of a SANB are made of: matrices, Kronecker products, or rank-1 products
    gates: bool = True
    intra: bool = True
    inter: bool | None = None  # None: where there are two views
    layer_groups: int | None = None  # blocks kept of each encoder, the last of as many groups; None: all that there are
    blocks: int = 2
    attention_heads: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("method", self.method, METHODS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("sanb", self.sanb, SANBS)
        if self.sanb == "phm":
            for tower, width in {"all": self.bottleneck, **self.bottlenecks}.items():
                if width % PHM_TERMS:
                    raise InputError(f"sanb: phm needs bottlenecks that {PHM_TERMS} divides, found {width} ({tower})")
        if self.layer_groups is not None:
            check_range("layer_groups", self.layer_groups, 1, 1000)
        for name in ("embedding_dim", "bottleneck", "blocks", "attention_heads"):
            check_range(name, getattr(self, name), 1, 65_536)
        for tower, width in self.bottlenecks.items():
            check_choice("bottlenecks", tower, TOWERS)
            check_range(f"bottlenecks.{tower}", width, 1, 65_536)
        if self.embedding_dim % self.attention_heads:
            raise InputError(
                f"embedding_dim: expected a multiple of attention_heads ({self.attention_heads}), "
                f"found {self.embedding_dim}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a probability from 0 to below 1, found {self.dropout}")
        if not self.intra and self.inter is False:
            raise InputError("intra, inter: expected at least one of the two towers, found neither")
        if self.method not in SIDE_METHODS:
            names = ("bottlenecks", "sanb", "gates", "intra", "inter", "layer_groups")
            for name in names if self.method == "adapter" else (*names, "bottleneck", "activation"):
                if (found := getattr(self, name)) != getattr(ModelConfig(), name):
                    raise InputError(
                        f"{name}: {self.method} has no towers; {json.dumps(found)} is for {' and '.join(SIDE_METHODS)}"
                    )

    def towers(self, count: int) -> tuple[str, ...]:
        """The names of the towers over so many views."""
        intra = TOWERS[:count] if self.intra else ()
        return intra if self.inter is False or count < 2 else (*intra, "inter")

    def check_views(self, count: int) -> None:
        """Raises InputError where the method cannot take so many views."""
        if self.method == "id" and count:
            raise InputError("views: id reads neither encoders nor their states; leave them out")
        if self.method != "id" and count not in (1, 2):
            raise InputError(f"views: {self.method} takes 1 or 2, found {count}")
        if count == 1 and self.inter:
            raise InputError("inter: the inter tower joins two views, found one; leave it out or give two views")
        if count == 1 and not self.intra:
            raise InputError("intra: one view has no inter tower, so its intra tower cannot be left out")
        towers = self.towers(count)
        for tower in self.bottlenecks:
            if tower not in towers:
                raise InputError(f"bottlenecks.{tower}: the model has no such tower, but {' and '.join(towers)}")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation: Adam, one learning rate a parameter group, early stop on validation HR@10."""

    batch_users: int = 64
    max_epochs: int = 100
    patience: int = 10  # stops at the first epoch after more than this many without a better one
    seed: int = 0
    precision: str = "auto"  # of the trained matrix products: auto is bfloat16 on CUDA, float32 elsewhere
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # of a group; a run fills in its method's others

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("batch_users", self.batch_users, 1, 10_000_000)
        check_range("max_epochs", self.max_epochs, 1, 1_000_000)
        check_range("patience", self.patience, 0, 1_000_000)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_choice("precision", self.precision, PRECISIONS)
        for group, rate in self.learning_rates.items():
            if not 0 <= rate < 1:
                raise InputError(f"learning_rates.{group}: expected a rate from 0 to below 1, found {rate}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the ranking of targets against the full catalogue."""

    ks: tuple[int, ...] = (10,)
    mask_history: bool = True  # which of the two figures leads and selects the best epoch; both are always reported
    ties: str = "half"  # what of the items that score like the target counts above it: half of them, or "best": none
    chunk_mib: int = 64  # memory that the score chunks may take

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.ks or any(k < 1 for k in self.ks):
            raise InputError(f"ks: expected one or more cut-offs of at least 1, found {list(self.ks)}")
        check_choice("ties", self.ties, tuple(TIE_SHARES))
        check_range("chunk_mib", self.chunk_mib, 1, 1_000_000)


@dataclass(frozen=True)
class UncachedConfig:
    """Encoders that run in every step, in place of a cache of their states."""

    views: tuple[ViewConfig, ...]
    dtype: str = "bfloat16"  # what states that do not change are rounded to, as a cache's are
    missing_images: str = "error"
    attention: str = "auto"
    items_at_once: int | None = None  # that a trained encoder takes at a time; None: as many as there is memory for
    checkpointing: bool = False  # a trained encoder's blocks keep their inputs alone and are computed twice

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("dtype", self.dtype, STORE_DTYPES)
        check_choice("missing_images", self.missing_images, MISSING_IMAGES)
        check_choice("attention", self.attention, ATTENTIONS)
        if self.items_at_once is not None:
            check_range("items_at_once", self.items_at_once, 1, 1_000_000)


@dataclass(frozen=True)
class RunConfig:
    """All that one training run is made from; saved resolved as the run folder's config.json."""

    dataset: str
    cache: str | None = None  # of hidden states
    views: tuple[str, ...] = ()  # names in the cache, or of the encoders that run; the first takes the image's role
    uncached: UncachedConfig | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_settings(self)
        method = self.model.method
        if self.uncached is not None:
            names = tuple(view.name for view in self.uncached.views)
            if self.views not in ((), names):
                raise InputError(f"views: expected those that are encoded ({', '.join(names)}), found {self.views}")
            object.__setattr__(self, "views", names)
        if len(set(self.views)) != len(self.views):
            raise InputError(f"views: expected different names, found {', '.join(self.views)}")
        if self.cache is not None and self.uncached is not None:
            raise InputError("cache, uncached: expected one of them, found both")
        if method in TUNING_METHODS and self.uncached is None:
            raise InputError(f"method: {method} trains encoders, so they have to run; name encoders, not a cache")
        if method in STATE_METHODS and self.cache is None and self.uncached is None:
            raise InputError(f"cache: {method} needs hidden states; give a cache, or encoders that run")
        if method == "id" and self.cache is not None:
            raise InputError("cache: id reads no states; leave it out")
        self.model.check_views(len(self.views))
        self._refuse_what_has_no_effect()
        rates = LEARNING_RATES[method]
        unknown = [group for group in self.train.learning_rates if group not in rates]
        if unknown:
            raise InputError(f"learning_rates.{unknown[0]}: {method} has {', '.join(rates)}")
        resolved = dataclasses.replace(self.train, learning_rates={**rates, **self.train.learning_rates})
        object.__setattr__(self, "train", resolved)

    def _refuse_what_has_no_effect(self) -> None:
        """Settings that the method would silently ignore."""
        method, uncached = self.model.method, self.uncached
        if self.train.precision == "bfloat16" and method in ("frozen", "id"):
            raise InputError(f"precision: {method} has no products to take bfloat16; leave it at auto")
        if uncached is None:
            return
        if method not in TUNING_METHODS and (uncached.checkpointing or uncached.items_at_once is not None):
            raise InputError(f"items_at_once, checkpointing: are for {', '.join(TUNING_METHODS)}; {method} trains none")
        if method in TUNING_METHODS and uncached.dtype != UncachedConfig.dtype:
            raise InputError(f"dtype: is for states that do not change; {method} trains encoders, leave it out")
        for view in uncached.views:
            layers = view.layers is not None or view.layer_groups is not None
            if layers and method not in SIDE_METHODS:
                raise InputError(f"layers: {method} reads view {view.name!r}'s final state alone; leave them out")
            if layers and self.model.layer_groups is not None:
                raise InputError(f"layer_groups: view {view.name!r} has layers of its own; give one or the other")
            if method in TUNING_METHODS and view.encoder_dtype not in ("auto", "float32"):
                raise InputError(
                    f"encoder_dtype: {method} trains view {view.name!r}'s encoder in float32, found "
                    f"{view.encoder_dtype}; the setting precision is for its products"
                )


def read_run_config(path: Path) -> RunConfig:
    """Return the configuration in a run's config.json. Raises InputError, naming the file, for any mistake in it."""
    values, _ = read_run_settings(path)
    try:
        return from_dict(RunConfig, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_run_settings(path: Path) -> tuple[dict[str, Any], int]:
    """Return the settings in a run's config.json, or in a file like it, and the format of the run.

    The settings are not checked yet. Raises InputError for a format that this version does not know.
    """
    values = read_settings(path)
    remedy = "use the version of iisan-fast that made the run"
    number = format_number(values, path, (1, RUN_FORMAT), remedy) if "format" in values else 1
    values.pop("format", None)
    return values, number


def format_number(values: Mapping[str, Any], path: Path, known: tuple[int, ...], remedy: str) -> int:
    """Return the format number that a JSON file holds. Raises InputError where it is none of the known ones."""
    number = values.get("format")
    if type(number) is int and number in known:  # not isinstance: True is an int, and equals 1
        return number
    expected = " or ".join(map(str, known))
    found = json.dumps(number) if "format" in values else "nothing"
    raise InputError(f"{path}: format: expected {expected}, found {found}; {remedy}")


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
