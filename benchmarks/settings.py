"""The settings of the benchmarks, except of the sweeps: each field has its help text, range and choices."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import STORE_DTYPES
from ..errors import InputError
from ..setting_fields import check_settings, setting

OPS = ("side-network", "loss", "loss-unmasked", "target-rank", "target-rank-float32")
TUNED_OPS = ("side-network", "loss", "target-rank")
USERS = (64, 512, 8192)  # a batch of the kernels' benchmark
SPLITS = ("test", "validation")
SOURCES = ("title", "image")
ENCODER_SIZES = ("base", "demo")
ARGSORT_USERS = 2000  # whom the dense evaluation ranks by default


@dataclass(frozen=True)
class TrainSettings:
    """The settings of `bench train`."""

    users: int = setting(64, help="Users a batch.", minimum=1)
    width: int = setting(768, help="Width of the hidden states, which are random.", minimum=1)
    layers: int = setting(7, help="Kept layers of a view.", minimum=1)
    followed: int = setting(50, help="Steps over which the losses are compared.", minimum=1)
    rounds: int = setting(12, help="Turns of each form.", minimum=1)
    steps: int = setting(3, help="Steps of a turn.", minimum=1)
    epochs: bool = setting(True, help="Also measure whole epochs, a whole run and their memory.")
    seed: int = setting(0, help="Seed of weights, states, batches and dropout.", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings of `bench evaluate`."""

    split: str = setting("test", help="The split whose targets are ranked.", choices=SPLITS)
    width: int = setting(768, help="Width of the hidden states, which are random.", minimum=1)
    layers: int = setting(7, help="Kept layers of a view.", minimum=1)
    argsort_users: int | None = setting(
        None,
        help="Users whom the dense form ranks, spread over all users; 0: all.",
        minimum=0,
        automatic=f"{ARGSORT_USERS}, or all if fewer",
    )
    rounds: int = setting(5, help="Runs of each form.", minimum=1)
    seed: int = setting(0, help="Seed of weights and states.", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ExtractSettings:
    """The settings of `bench extract`."""

    items: int | None = setting(
        None, help="Number of items, spread evenly over the catalogue.", minimum=1, automatic="all"
    )
    source: str = setting("title", help="Contents that are encoded.", choices=SOURCES)
    encoder: str | None = setting(
        None, help="Hub name or folder of the encoder.", automatic="the embedded demo's, small and random"
    )
    max_tokens: int = setting(30, help="Read this many tokens of a title.", minimum=1)
    dtype: str = setting("bfloat16", help="Dtype of the stored states.", choices=STORE_DTYPES)
    batch_size: int = setting(64, help="Items encoded at a time.", minimum=1)
    workers: int | None = setting(
        None,
        help="Worker processes of the fast form.",
        minimum=0,
        automatic="from the idle CPU cores and the number of images",
    )
    rounds: int = setting(3, help="Runs of each form.", minimum=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class UncachedSettings:
    """The settings of `bench uncached`."""

    users: int = setting(64, help="Users a batch.", minimum=1)
    encoder_size: str = setting(
        "base", help="base: ViT-B/16 and BERT-base. demo: the embedded demo's, small.", choices=ENCODER_SIZES
    )
    steps: int | None = setting(
        None, help="Time this many steps and scale their time to an epoch.", minimum=1, automatic="all of an epoch"
    )
    seed: int = setting(0, help="Seed of weights, images and batches.", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class GrowthSettings:
    """The settings of `bench growth`."""

    items: tuple[int, ...] = setting((20_000, 100_000, 1_000_000), help="Sizes of the catalogue.", minimum=1)
    batch_users: tuple[int, ...] = setting((64, 256, 1024), help="Numbers of users a batch.", minimum=1)
    users: int = setting(12_076, help="Users of the synthetic dataset.", minimum=1)
    layers: int = setting(4, help="Kept layers of each of two views.", minimum=1)
    width: int = setting(384, help="Width of the hidden states.", minimum=1)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("items", "batch_users"):
            ascending = tuple(sorted(set(getattr(self, name))))
            object.__setattr__(self, name, ascending)


@dataclass(frozen=True)
class ScaleSettings:
    """The settings of `bench scale`."""

    items: tuple[int, ...] = setting((20_000, 200_000, 500_000, 1_000_000), help="Sizes of the catalogue.", minimum=10)
    ranks: int = setting(2, help="Processes over which a table is sharded.", minimum=2)
    steps: int = setting(40, help="Steps that are timed.", minimum=1)
    users: int = setting(64, help="Users a batch.", minimum=1)
    layers: int = setting(7, help="Kept layers of each of two views.", minimum=1)
    width: int = setting(768, help="Width of the hidden states.", minimum=16)
    seed: int = setting(0, help="Seed of weights, histories, batches and dropout.", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "items", tuple(sorted(set(self.items))))


@dataclass(frozen=True)
class HistoriesSettings:
    """The settings of `bench histories`."""

    interactions: int = setting(100_000_000, help="Interactions of the dataset, about.", minimum=1000)
    items: int = setting(100_000, help="Size of the catalogue.", minimum=10)
    steps: int = setting(1000, help="Training steps.", minimum=1)
    users: int = setting(64, help="Users a batch.", minimum=1)
    embedding_dim: int = setting(64, help="Width of item vectors.", minimum=1)
    seed: int = setting(0, help="Seed of weights, batches and dropout.", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class KernelSettings:
    """The settings of `bench kernels`."""

    users: tuple[int, ...] | None = setting(
        None, help="Numbers of users a batch.", minimum=1, automatic="64, 512 and 8192, as far as DATASET has them"
    )
    ops: tuple[str, ...] | None = setting(None, help="Ops that are measured.", choices=OPS, automatic="all")
    forms: tuple[str, ...] | None = setting(None, help="Forms of the ops, as rows name them.", automatic="all")
    width: int = setting(768, help="Width of the hidden states.", minimum=1)
    layers: int = setting(7, help="Kept layers of a view.", minimum=1)
    bottleneck: int = setting(64, help="Bottleneck width of the side network.", minimum=1)
    embedding_dim: int = setting(64, help="Width of item vectors and queries.", minimum=1)
    exact_users: int = setting(8192, help="The largest batch whose gradients are compared with fp64.", minimum=0)
    tune: bool = setting(False, help="Search launch configurations instead, and print entries of their table.")
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def op_names(self) -> tuple[str, ...]:
        """Return the ops that are measured, or tuned."""
        return self.ops or (TUNED_OPS if self.tune else OPS)


@dataclass(frozen=True)
class ServingSettings:
    """The settings of `bench serving`."""

    rounds: int = setting(5, help="Runs of each part on the run.", minimum=1)
    latency_users: int = setting(200, help="Users who are served one at a time.", minimum=1)
    added: tuple[int, ...] = setting((1, 100), help="Numbers of items that are added to copies of the run.", minimum=1)
    made_items: int = setting(1_000_000, help="Items of the made catalogue.", minimum=20)
    made_users: int = setting(10_000, help="Users of the made catalogue.", minimum=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class StaticSettings:
    """The settings of `bench static`."""

    users: tuple[int, ...] = setting((64, 8192), help="Numbers of users a batch.", minimum=1)
    kernels: bool = setting(True, help="Compile the kernels and read their machine code.")

    def __post_init__(self) -> None:
        check_settings(self)


def refuse_more(option: str, count: int, most: int, counted: str) -> None:
    """Raise InputError if an option asks for more than a dataset has.

    counted: what the dataset has `most` of, such as "the users of Scientific".
    """
    if count > most:
        raise InputError(f"{option} {count}: expected at most {most}, {counted}")
