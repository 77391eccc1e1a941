"""Compute HR@K, NDCG@K and MRR over the full catalogue from the ranks of targets, and a popularity baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import TIE_SHARES, EvaluationConfig
from ..data import Sequences, Split
from ..errors import InputError

Added = Callable[[np.ndarray], kernels.AddedScores]  # takes rows of the queries, int64; on the queries' device

HISTORIES_AT_ONCE = 1 << 22  # interactions with padding, 32 MiB
ADDED_AT_ONCE = 1 << 12  # users whose added scores are in memory at once: 64 MiB at 1,000 items each
BYTES_PER_SCORE = 24  # a score of at most 8 bytes, and the memory to count with it


def evaluate(
    queries: Tensor,
    vectors: Tensor,
    sequences: Sequences,
    split_name: str,
    config: EvaluationConfig,
    added: Added | None = None,
) -> dict[str, Any]:
    """Return the metrics of one split as fractions, for warm and cold targets, with and without the history masked.

    queries: user states [users, d]. vectors: [items, d], item number i in row i - 1. split_name: "validation" or
    "test". added: returns what is added to the scores of a few items of some users; None adds nothing.

    A target is warm if it occurs in training. If the history is masked, a target within its user's own history is
    unreachable and counts as a miss. The result has "masked" and "unmasked", each with the metrics of `ranking_metrics`
    of all users and of the "warm" and "cold" ones. Raises InputError if a score is not finite.
    """
    split = sequences.split(split_name)
    warm = sequences.training_counts[split.targets] > 0
    report: dict[str, Any] = {
        "split": split_name,
        "users": len(split.targets),
        "unreachable": int((~split.reachable).sum()),
        "history_masked_by_default": config.mask_history,
        "ties": config.ties,
    }
    for name, ranks in zip(("masked", "unmasked"), target_ranks(queries, vectors, split, config, added)):
        report[name] = {
            **ranking_metrics(ranks, config.ks),
            "warm": {"users": int(warm.sum()), **ranking_metrics(ranks[warm], config.ks)},
            "cold": {"users": int((~warm).sum()), **ranking_metrics(ranks[~warm], config.ks)},
        }
    return report


def popularity_baseline(sequences: Sequences, split_name: str, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a ranking of the catalogue by training counts, which is the same for all users. See `evaluate`.

    Raises InputError for a split_name that is neither "validation" nor "test".
    """
    counts = torch.from_numpy(sequences.training_counts[1:, None]).double()
    queries = torch.ones(len(sequences.split(split_name).targets), 1, dtype=torch.float64)
    return evaluate(queries, counts, sequences, split_name, config)


def target_ranks(
    queries: Tensor, vectors: Tensor, split: Split, config: EvaluationConfig, added: Added | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return each target's rank, counted from 1, float64 [users], with the history masked and unmasked.

    queries [users, d] and vectors [items, d]: on one device. added: see `evaluate`; it is called for at most
    `ADDED_AT_ONCE` users at a time. A masked target within its user's history has rank
    infinity. Raises InputError if a score is not finite.
    """
    all_ranks = torch.empty(2, len(split.targets), dtype=torch.float64, device=queries.device)
    for rows in _parts(split) if added is None else _small_parts(split):
        chosen = torch.from_numpy(rows).to(queries.device)
        ranks = kernels.target_rank(
            queries[chosen],
            vectors,
            torch.from_numpy(split.targets[rows] - 1).to(queries.device),
            torch.from_numpy(split.padded(rows) - 1).to(queries.device),
            tie_share=TIE_SHARES[config.ties],
            chunk_elements=config.chunk_mib * 2**20 // BYTES_PER_SCORE,
            added=None if added is None else added(rows),
        )
        for into, part in zip(all_ranks, ranks):
            into[chosen] = part.double()
    masked, unmasked = all_ranks
    broken = unmasked.isnan()
    if broken.any():
        raise InputError(
            f"{int(broken.sum())} of {len(broken)} users have a score that is not finite; "
            "the model has diverged or the hidden states are damaged"
        )
    return masked.cpu().numpy(), unmasked.cpu().numpy()


def user_gains(ranks: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Return each user's contribution to HR@K and NDCG@K, float64 [users], as `hr@k` and `ndcg@k`.

    ranks: counted from 1, [users]. HR is 1 for a rank up to K, NDCG is 1 / log2(rank + 1) for such a rank; both are 0
    for others. The mean over users is the metric.
    """
    hit = ranks <= k
    return {f"hr@{k}": hit.astype(np.float64), f"ndcg@{k}": np.where(hit, 1 / np.log2(ranks + 1), 0)}


def _parts(split: Split) -> list[np.ndarray]:
    """Return the split's rows in parts, so that the padded histories of a part take little memory.

    All rows are one part unless a history is very long.
    """
    rows = np.arange(len(split.targets))
    widths = np.maximum(split.lengths, split.least_width)
    if len(rows) * int(widths.max(initial=0)) <= HISTORIES_AT_ONCE:
        return [rows]
    rows = rows[np.argsort(widths, kind="stable")]
    parts = []
    start = 0
    while start < len(rows):
        sizes = (np.arange(start, len(rows)) - start + 1) * widths[rows[start:]]
        count = max(1, int(np.searchsorted(sizes, HISTORIES_AT_ONCE, side="right")))
        parts.append(rows[start : start + count])
        start += count
    return parts


def _small_parts(split: Split) -> list[np.ndarray]:
    """Return the split's rows in the parts of `_parts`, cut into equal ones of at most `ADDED_AT_ONCE` rows."""
    parts = []
    for rows in _parts(split):
        parts += np.array_split(rows, max(1, -(-len(rows) // ADDED_AT_ONCE)))
    return parts


def ranking_metrics(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, float | None]:
    """Return HR@K and NDCG@K for each K, and MRR, as means over the ranks; None for each if there are no ranks."""
    users = {name: values for k in ks for name, values in user_gains(ranks, k).items()} | {"mrr": 1 / ranks}
    return {name: float(values.mean()) if len(ranks) else None for name, values in users.items()}


def headline_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's masked metrics, or the unmasked ones if its settings do not mask the history."""
    return report["masked" if report["history_masked_by_default"] else "unmasked"]
