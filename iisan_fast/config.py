"""Every setting of a run as frozen dataclasses that check themselves and survive a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError, check_choice
from .files import expanded_name
from .intervals import Interval
from .setting_fields import check_settings, same_setting, setting

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
# Options of loading an encoder that are set here, that would be right for its weights and not for the rest, that run
# code from elsewhere (weights_only, kernels), or that replace weights (ignore_mismatched_sizes draws some at random;
# gguf_file and use_safetensors choose files that the digest of the weights does not cover).
RESERVED_OPTIONS = (
    *("attn_implementation", "config", "local_files_only", "output_hidden_states", "output_loading_info"),
    *("revision", "subfolder", "torch_dtype", "trust_remote_code", "code_revision", "weights_only"),
    *("use_kernels", "kernel_config", "allow_all_kernels", "adapter_kwargs", "adapter_name"),
    *("state_dict", "ignore_mismatched_sizes", "gguf_file", "use_safetensors"),
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
NEIGHBOURS = "neighbours"  # the method that trains nothing
# Default weights of the neighbour terms in a ranking without training. They were chosen on the validation users of
# Scientific, with 128 components of two views: each weight is the best one beside the other. With the terms added to
# `iisan-versa` of seeds 0 and 1, HR@10 and NDCG@10 hardly change from 1.5 to 3 and from 6 to 9.
NEIGHBOUR_WEIGHTS = {"cooccurrence": 2.0, "similarity": 9.0}
METHODS = (*LEARNING_RATES, NEIGHBOURS)
TOWERS = ("first", "second", "inter")  # over the first view, the second, and both
ITEM_IDS_RATE = {"item_embeddings": 1e-3}  # learning rate of the vectors that the setting item_ids adds
LOSSES = ("in-batch", "full", "sampled", "gbce")
GBCE_NEGATIVES = 256  # drawn for a step if the loss gbce has no number
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class ViewConfig:
    """One view of the items: a source, the encoder that reads it, the pooling, and the layers that are kept."""

    name: str = setting(help="Name of the view in the cache and in a run.")
    source: str = setting(help="Content of an item that the encoder reads.", choices=SOURCES)
    encoder: str = setting(help="Hub name or folder of the encoder.")
    pooling: str | None = setting(
        None, help="Pooling of a layer's tokens.", choices=POOLINGS, automatic="the encoder family's default"
    )
    layers: tuple[int, ...] | None = setting(
        None,
        help="Hidden states that are kept, by number; 0 is the embedding output.",
        automatic="0, 2, 4, … to the last",
    )
    max_tokens: int = setting(30, help="Tokens of a text that are read.", minimum=1, maximum=1_000_000)
    encoder_dtype: str = setting(
        "auto",
        help="Data type of the encoder's weights.",
        choices=ENCODER_DTYPES,
        automatic="bfloat16 on CUDA, else float32",
    )
    layer_groups: int | None = setting(
        None,
        help="Keep the embedding output and the last block of each of so many equal groups, in place of layers.",
        minimum=1,
        maximum=1000,
        automatic="by layers",
    )
    options: Mapping[str, Any] = setting({}, help="Options of Hugging Face's from_pretrained, by name.")
    trust_remote_code: bool = setting(
        False, help="Run Python code that the checkpoint brings with it; a settings file cannot switch it on."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "encoder", expanded_name(self.encoder))
        if self.layer_groups is not None and self.layers is not None:
            raise InputError("layers, layer_groups: expected one of them, found both")
        if "dtype" in self.options:
            self._rename_dtype()
        for name in self.options:
            if name in RESERVED_OPTIONS:
                raise InputError(f"options.{name}: is decided here; expected another option of from_pretrained")
        if not self.name or "\0" in self.name:
            raise InputError(f"name: expected a view's name, found {self.name!r}")

    def _rename_dtype(self) -> None:
        """Move the option dtype, which is Hugging Face's name of encoder_dtype, to encoder_dtype.

        Raises InputError if the two differ.
        """
        options = dict(self.options)
        dtype = options.pop("dtype")
        check_choice("options.dtype", dtype, ENCODER_DTYPES)
        if self.encoder_dtype not in ("auto", dtype):
            raise InputError(f"encoder_dtype, options.dtype: found {self.encoder_dtype} and {dtype}; give one of them")
        object.__setattr__(self, "encoder_dtype", dtype)
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ProtocolConfig:
    """The data protocol: the users and interactions that count, and the ones that are held out."""

    # At least 4: two to train on, one to validate and one to test. The papers use 5, and 10 inputs.
    min_interactions: int = setting(5, help="Users with fewer interactions are left out.", minimum=4, maximum=1_000_000)
    max_inputs: int = setting(
        10, help="Items of a history that the model reads, the latest ones.", minimum=1, maximum=10_000
    )
    unescape_titles: bool = setting(True, help="Replace HTML entities in titles and captions by their characters.")
    missing_captions: str = setting(
        "error",
        help="For items without a caption, if others have one: stop with an error, or read the title.",
        choices=MISSING_CAPTIONS,
    )
    split: str = setting(
        "leave-one-out",
        help="Hold out each user's last two interactions, or all after two points in time (needs times.tsv).",
        choices=SPLITS,
    )
    validation_from: float = setting(0.8, help="Temporal split: share of all interactions that come before validation.")
    test_from: float = setting(0.9, help="Temporal split: share of all interactions that come before the test.")

    def __post_init__(self) -> None:
        check_settings(self)
        shares = self.validation_from, self.test_from
        if not 0 < shares[0] < shares[1] < 1:
            raise InputError(f"validation_from, test_from: expected ascending shares between 0 and 1, found {shares}")
        if self.split != "temporal" and shares != (ProtocolConfig.validation_from, ProtocolConfig.test_from):
            raise InputError(f"validation_from, test_from: {self.split} takes no shares; they are for temporal")

    @property
    def max_history(self) -> int:
        """Return how many interactions of a user leave-one-out keeps: the inputs, and three targets."""
        return self.max_inputs + 3


@dataclass(frozen=True)
class ModelConfig:
    """The method, its side network and heads, and the sequence encoder."""

    method: str = setting(
        "iisan",
        help="IISAN, or a method to compare with: tuned encoders (full, adapter, lora, bitfit), frozen encoders, "
        "SASRec on item ids (id), or no training (neighbours).",
        choices=METHODS,
    )
    embedding_dim: int = setting(64, help="Width of item vectors and user states.", minimum=1, maximum=65_536)
    bottleneck: int = setting(64, help="Width inside the SANBs, or inside adapters.", minimum=1, maximum=65_536)
    bottlenecks: Mapping[str, int] = setting(
        {}, help="Width inside one tower's SANBs: first, second or inter.", minimum=1, maximum=65_536
    )
    activation: str = setting("relu", help="Activation inside the SANBs, or inside adapters.", choices=ACTIVATIONS)
    sanb: str = setting(
        "adapter",
        help="Form of a SANB's weights: matrices, sums of Kronecker products, or products of rank 1.",
        choices=SANBS,
    )
    gates: bool = setting(True, help="Join a tower's layers by learned gates; without, by plain sums.")
    intra: bool = setting(True, help="Use a tower for each view.")
    inter: bool | None = setting(None, help="Use a tower that joins two views.", automatic="if there are two views")
    layer_groups: int | None = setting(
        None,
        help="Keep only the embedding output and the last block of each of so many equal groups.",
        minimum=1,
        maximum=1000,
        automatic="all layers that there are",
    )
    blocks: int = setting(2, help="Transformer blocks of the sequence encoder.", minimum=1, maximum=65_536)
    attention_heads: int = setting(2, help="Attention heads of the sequence encoder.", minimum=1, maximum=65_536)
    dropout: float = setting(0.1, help="Dropout probability of the sequence encoder.", minimum=0, below=1)
    standardise: bool = setting(
        False, help="Give each number of the cached states mean 0 and deviation 1 over the catalogue."
    )
    item_ids: bool = setting(
        False, help="Add a trained vector to the vector of each item that occurs in training, and none to other items."
    )
    item_id_dropout: float = setting(
        0.3, help="Dropout probability of the vectors that item_ids adds.", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.sanb == "phm":
            for tower, width in {"all": self.bottleneck, **self.bottlenecks}.items():
                if width % PHM_TERMS:
                    raise InputError(f"sanb: phm needs bottlenecks that {PHM_TERMS} divides, found {width} ({tower})")
        for tower in self.bottlenecks:
            check_choice("bottlenecks", tower, TOWERS)
        if self.embedding_dim % self.attention_heads:
            raise InputError(
                f"embedding_dim: expected a multiple of attention_heads ({self.attention_heads}), "
                f"found {self.embedding_dim}"
            )
        if not self.intra and self.inter is False:
            raise InputError("intra, inter: expected at least one of the two towers, found neither")
        if self.method not in SIDE_METHODS:
            self._refuse_towers()
        if self.item_ids and self.method == "id":
            raise InputError("item_ids: id has a trained vector of each item already; leave it out")
        if not self.item_ids and self.item_id_dropout != ModelConfig.item_id_dropout:
            raise InputError("item_id_dropout: is for the vectors that item_ids adds; give item_ids, or leave it out")

    def _refuse_towers(self) -> None:
        """Raise InputError for settings of towers, which the method does not have."""
        names = ("bottlenecks", "sanb", "gates", "intra", "inter", "layer_groups")
        for name in names if self.method == "adapter" else (*names, "bottleneck", "activation"):
            if (value := getattr(self, name)) != getattr(ModelConfig(), name):
                raise InputError(
                    f"{name}: {self.method} has no towers; {json.dumps(value)} is for {' and '.join(SIDE_METHODS)}"
                )

    def towers(self, count: int) -> tuple[str, ...]:
        """Return the names of the towers over `count` views, of "first", "second" and "inter"."""
        intra = TOWERS[:count] if self.intra else ()
        return intra if self.inter is False or count < 2 else (*intra, "inter")

    def check_views(self, count: int) -> None:
        """Raise InputError if the method cannot take `count` views."""
        if self.method == "id" and count:
            raise InputError("views: id reads neither encoders nor their states; leave them out")
        least = 0 if self.method == NEIGHBOURS else 1
        if self.method != "id" and not least <= count <= 2:
            raise InputError(f"views: {self.method} takes {least or 'none, 1'} or 2, found {count}")
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

    batch_users: int = setting(64, help="Users in a batch.", minimum=1, maximum=10_000_000)
    max_epochs: int = setting(100, help="Epochs at most.", minimum=1, maximum=1_000_000)
    patience: int = setting(
        10,
        help="Stop once more than so many epochs bring no better validation HR@10.",
        minimum=0,
        maximum=1_000_000,
    )
    seed: int = setting(0, help="Seed of weights, batches and dropout.", minimum=0, maximum=2**63 - 1)
    checkpoint_every: str | int | None = setting(
        None,
        help="Save within epochs too, after so many steps (500) or so much time (90s, 10m, 2h); results do not change.",
        automatic="after each epoch",
    )
    precision: str = setting(
        "auto",
        help="Precision of the trained matrix products; on a CPU, bfloat16 is for fine-tuned encoders.",
        choices=PRECISIONS,
        automatic="bfloat16 on CUDA, else float32",
    )
    learning_rates: Mapping[str, float] = setting(
        {},
        help="Learning rate of a parameter group; by method, the groups are "
        f"{', '.join(dict.fromkeys(group for rates in LEARNING_RATES.values() for group in rates))}.",
        minimum=0,
        below=1,
        automatic="the method's own",
    )
    reverse: bool = setting(
        False, help="Train on each training history a second time, in reverse order, as the history of one more user."
    )
    loss: str = setting(
        "in-batch",
        help="Cross-entropy over the batch's items (in-batch), all items of training (full) or N drawn ones "
        "(sampled:N), or gSASRec's binary loss (gbce:N).",
    )
    debias: bool | None = setting(
        None,
        help="Subtract log popularity from the scores of the in-batch loss.",
        automatic="on for in-batch, else off",
    )
    own_mask: bool = setting(True, help="Leave the user's items out of the loss's negatives.")
    weight_decay: float = setting(
        0.0,
        help="Decoupled weight decay (AdamW) of matrices and item id vectors, times the learning rate; 0: none.",
        minimum=0,
        maximum=100,
    )
    schedule: str = setting(
        "constant",
        help="Learning rates after the warm-up: constant, or falling to 0 at the end of the last epoch.",
        choices=SCHEDULES,
    )
    warmup_epochs: float = setting(
        0.0, help="Epochs in which the learning rates rise from 0; 0.5 is half an epoch.", minimum=0, maximum=1_000_000
    )
    clip_norm: float | None = setting(
        None,
        help="Scale the gradients down to this L2 norm if the norm of all together is larger.",
        minimum=0,
        maximum=1_000_000,
        automatic="none",
    )
    ema_decay: float = setting(
        0.0,
        help="Decay of a moving average of the weights; validation and the best checkpoint take the average; 0: none.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if (interval := self.checkpoint_interval) is not None and interval.steps is not None:
            object.__setattr__(self, "checkpoint_every", interval.steps)  # a number, also if it was text
        if self.clip_norm == 0:
            raise InputError("clip_norm: expected a number above 0, found 0; leave it out for no clipping")
        if self.warmup_epochs > self.max_epochs:
            raise InputError(
                f"warmup_epochs: expected at most max_epochs ({self.max_epochs}), found {self.warmup_epochs:g}"
            )
        kind, _ = self.loss_and_negatives
        if self.debias and kind != "in-batch":
            raise InputError(
                f"debias: corrects the popularity of in-batch negatives; {self.loss} has none of them, leave it out"
            )

    @property
    def loss_and_negatives(self) -> tuple[str, int]:
        """Return the loss, one of LOSSES, and how many negatives are drawn for each step; 0 if none are.

        Raises InputError for another loss.
        """
        kind, colon, number = self.loss.partition(":")
        drawn = kind in ("sampled", "gbce")
        if kind == "gbce" and not colon:
            return kind, GBCE_NEGATIVES
        if kind in LOSSES and bool(colon) == drawn and (not drawn or re.fullmatch("0*[1-9][0-9]{0,8}", number)):
            return kind, int(number or 0)
        raise InputError(
            f"loss: expected in-batch, full, sampled:N, gbce or gbce:N, N from 1 to 999999999, found {self.loss!r}"
        )

    @property
    def debiased(self) -> bool:
        """Return True if log popularity is subtracted from the loss's scores."""
        return self.loss == "in-batch" if self.debias is None else self.debias

    @property
    def scheduled(self) -> bool:
        """Return True if the learning rates change from step to step."""
        return self.schedule != "constant" or self.warmup_epochs > 0

    @property
    def checkpoint_interval(self) -> Interval | None:
        """Return the interval between two checkpoints within an epoch; None for no such checkpoints."""
        return None if self.checkpoint_every is None else Interval.of(self.checkpoint_every, "checkpoint_every")


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the ranking of targets against the full catalogue."""

    ks: tuple[int, ...] = setting((10,), help="Cut-offs of HR and NDCG.", minimum=1)
    mask_history: bool = setting(
        True, help="Lead, and choose the best epoch, by rankings without the user's history; both are reported."
    )
    ties: str = setting(
        "half",
        help="Of the items that score like the target, rank half above it, or none (best).",
        choices=tuple(TIE_SHARES),
    )
    chunk_mib: int = setting(64, help="Memory that a chunk of scores may take, in MiB.", minimum=1, maximum=1_000_000)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.ks:
            raise InputError("ks: expected one or more cut-offs, found none")


@dataclass(frozen=True)
class ScoringConfig:
    """Settings of what is added to a model's scores: two neighbour terms, and a number for cold items."""

    cooccurrence: float | None = setting(
        None,
        help="Weight of co-occurrence: items that users took near those of the history in training.",
        minimum=0,
        maximum=1_000_000,
        automatic=f"0, none; with {NEIGHBOURS} {NEIGHBOUR_WEIGHTS['cooccurrence']:g}",
    )
    similarity: float | None = setting(
        None,
        help="Weight of similarity: items whose stored states are like those of the last three items; needs a cache.",
        minimum=0,
        maximum=1_000_000,
        automatic=f"0, none; with {NEIGHBOURS} and a cache {NEIGHBOUR_WEIGHTS['similarity']:g}",
    )
    cold_bias: float | None = setting(
        None,
        help="Number to add to the scores of items that do not occur in training.",
        minimum=-1_000_000,
        maximum=1_000_000,
        automatic="0",
    )
    fit_terms: bool = setting(
        False,
        help="Choose cooccurrence and similarity on a small grid, by validation HR@10 of the best epoch.",
    )
    cooccurrence_neighbours: int = setting(
        200,
        help="Items that each item keeps in the co-occurrence matrix, the strongest ones.",
        minimum=1,
        maximum=1_000_000,
    )
    similarity_dims: int = setting(
        128,
        help="Principal components of the states that similarity compares; all of them if there are fewer.",
        minimum=1,
        maximum=65_536,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.fit_terms and not (self.cooccurrence is None and self.similarity is None):
            raise InputError("fit_terms: chooses cooccurrence and similarity; leave them out, or leave out fit_terms")


@dataclass(frozen=True)
class ExtractionConfig:
    """Settings of extraction, which stores the hidden states of frozen encoders in a cache."""

    dtype: str = setting(
        "bfloat16",
        help="Data type of hidden states in the cache; encoders that run in every step round to it.",
        choices=STORE_DTYPES,
    )
    missing_images: str = setting(
        "error",
        help="For images that are missing or cannot be read: stop with an error, or encode a blank image.",
        choices=MISSING_IMAGES,
    )
    attention: str = setting(
        "auto",
        help="Implementation of attention in encoders.",
        choices=ATTENTIONS,
        automatic="xformers on CUDA if it is installed, else torch's (sdpa)",
    )
    layer_groups: int | None = setting(
        None,
        help="Keep the embedding output and the last block of each of so many equal groups.",
        minimum=1,
        maximum=1000,
        automatic="the layers of each view",
    )
    batch_size: int = setting(64, help="Items that are encoded at a time.", minimum=1)
    workers: int | None = setting(
        None,
        help="Processes that read images ahead of the encoder; 0 is none.",
        minimum=0,
        automatic="by idle CPUs and the number of images",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class UncachedConfig:
    """Encoders that run in every step, in place of a cache of their states."""

    views: tuple[ViewConfig, ...] = setting(help="Views whose encoders run.")
    dtype: str = same_setting(ExtractionConfig, "dtype")
    missing_images: str = same_setting(ExtractionConfig, "missing_images")
    attention: str = same_setting(ExtractionConfig, "attention")
    items_at_once: int | None = setting(
        None,
        help="Items that a trained encoder takes at a time.",
        minimum=1,
        maximum=1_000_000,
        automatic="as many as memory allows",
    )
    checkpointing: bool = setting(False, help="Compute the blocks of a trained encoder twice, which takes less memory.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run; the run folder's config.json holds them."""

    dataset: str = setting(help="Folder of the dataset.")
    cache: str | None = setting(None, help="Folder of the hidden states that extract stored.", automatic="no cache")
    views: tuple[str, ...] = setting(
        (),
        help="One or two views of the cache, or of the encoders that run; the first takes the image's role.",
        automatic="all",
    )
    uncached: UncachedConfig | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)

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
        if method == NEIGHBOURS:
            self._refuse_settings_of_training()
        self.model.check_views(len(self.views))
        self._refuse_what_has_no_effect()
        object.__setattr__(self, "scoring", self._resolved_scoring())
        rates = LEARNING_RATES.get(method, {}) | (ITEM_IDS_RATE if self.model.item_ids else {})
        unknown = [group for group in self.train.learning_rates if group not in rates]
        if unknown:
            raise InputError(f"learning_rates.{unknown[0]}: {method} has {', '.join(rates)}")
        resolved = dataclasses.replace(self.train, learning_rates={**rates, **self.train.learning_rates})
        object.__setattr__(self, "train", resolved)

    def _refuse_standardise(self) -> None:
        """Raise InputError unless the run reads states from a cache, which are all known before the first step."""
        method = self.model.method
        if method not in STATE_METHODS:
            reason = "reads no states" if method == "id" else "trains its encoders, so their states change"
            raise InputError(f"standardise: {method} {reason}; leave it out")
        if self.uncached is not None:
            raise InputError(
                "standardise: needs the states of all items before the first step, and encoders that run in every step "
                "give those of a batch; store them with iisan-fast extract and give the cache"
            )

    def _refuse_settings_of_training(self) -> None:
        """Raise InputError for settings that a run without training does not read."""
        if self.uncached is not None:
            raise InputError(f"uncached: {NEIGHBOURS} runs no encoders; extract a cache and give it, or leave them out")
        if bool(self.views) != (self.cache is not None):
            raise InputError(f"cache, views: {NEIGHBOURS} takes a cache and its views, or neither; found one of them")
        for section, defaults in ((self.model, ModelConfig(NEIGHBOURS)), (self.train, TrainConfig())):
            for name, value in vars(section).items():
                if value != getattr(defaults, name):
                    raise InputError(f"{name}: {NEIGHBOURS} trains nothing, found {json.dumps(value)}; leave it out")

    def _resolved_scoring(self) -> ScoringConfig:
        """Return the weights of the neighbour terms with the method's own where none are given.

        Those that fit_terms chooses stay None.

        Raises InputError for settings of similarity in a run without stored states.
        """
        scoring = self.scoring
        if self.cache is None:
            for name in ("similarity", "similarity_dims"):
                if getattr(scoring, name) not in (None, 0, getattr(ScoringConfig, name)):
                    raise InputError(
                        f"{name}: compares states of a cache, and this run of {self.model.method} has none; "
                        f"give a cache to {', '.join(STATE_METHODS)} or {NEIGHBOURS}, or leave it out"
                    )
        weights = {"cold_bias": 0.0}
        if self.model.method == NEIGHBOURS and not scoring.fit_terms:
            weights |= NEIGHBOUR_WEIGHTS if self.cache is not None else {**NEIGHBOUR_WEIGHTS, "similarity": 0.0}
        elif not scoring.fit_terms:
            weights |= dict.fromkeys(NEIGHBOUR_WEIGHTS, 0.0)
        chosen = {name: getattr(scoring, name) for name in weights if getattr(scoring, name) is not None}
        return dataclasses.replace(scoring, **{**weights, **chosen})

    def _refuse_what_has_no_effect(self) -> None:
        """Raise InputError for settings that have no effect with the method."""
        method = self.model.method
        uncached = self.uncached
        if self.train.precision == "bfloat16" and method in ("frozen", "id"):
            raise InputError(f"precision: {method} has no products to take bfloat16; leave it at auto")
        if self.model.standardise:
            self._refuse_standardise()
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
                raise InputError(f"layer_groups: view {view.name!r} names its layers already; give one or the other")
            if method in TUNING_METHODS and view.encoder_dtype not in ("auto", "float32"):
                raise InputError(
                    f"encoder_dtype: {method} trains view {view.name!r}'s encoder in float32, found "
                    f"{view.encoder_dtype}; the setting precision is for its products"
                )
