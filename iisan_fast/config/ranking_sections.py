"""Define the settings of the ranking of targets, and of the terms that are added to scores."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..setting_fields import check_settings, setting
from .method_names import NEIGHBOURS

TIE_SHARES = {"half": 0.5, "best": 0.0}
# Default weights of the neighbour terms in a ranking without training. They were chosen on the validation users of
# Scientific, with 128 components of two views: each weight is the best one beside the other. With the terms added to
# `iisan-versa` of seeds 0 and 1, HR@10 and NDCG@10 hardly change from 1.5 to 3 and from 6 to 9.
NEIGHBOUR_WEIGHTS = {"cooccurrence": 2.0, "similarity": 9.0}


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
