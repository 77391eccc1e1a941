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
from ..ranks import ALONE, Ranks

Added = Callable[[np.ndarray], kernels.AddedScores]  # takes rows of the queries, int64; on the queries' device

HISTORIES_AT_ONCE = 1 << 22  # interactions with padding, 32 MiB
SEVERAL_TARGETS = (
    "each user counts once: HR is 1 if any of their targets is in the first K, NDCG is their DCG divided by the DCG of "
    "the best order, Recall is the share of their targets in the first K, MRR is by their target of the best rank"
)
ADDED_AT_ONCE = 1 << 12  # users whose added scores are in memory at once: 64 MiB at 1,000 items each
BYTES_PER_SCORE = 24  # a score of at most 8 bytes, and the memory to count with it


def evaluate(
    queries: Tensor,
    vectors: Tensor,
    sequences: Sequences,
    split_name: str,
    config: EvaluationConfig,
    added: Added | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Return the metrics of one split as fractions, for warm and cold targets, with and without the history masked.

    queries: user states [R, d], one for each target of the split, or of this rank's block of them. vectors: [items, d],
    item number i in row i - 1. split_name: "validation" or "test". added: returns what is added to the scores of a few
    items of some rows of the queries; None adds nothing. All ranks get the metrics of the whole split.

    A target is warm if it occurs in training. If the history is masked, a target within its user's own history is
    unreachable and counts as a miss. The result has "masked" and "unmasked", each with the metrics of `ranking_metrics`
    of all users and of the "warm" and "cold" targets alone. If a user has several targets, "targets" is the number of
    all, and "several_targets" says how they count. "without_history" is the number of targets that are left out, if
    there are any. Raises InputError if a score is not finite.
    """
    split = sequences.split(split_name)
    is_warm = sequences.training_counts[split.targets] > 0
    users = split.repeated_users
    left_out = sequences.without_history[split_name]
    report: dict[str, Any] = {
        "split": split_name,
        **_numbers(split.targets, users),
        **({} if users is None else {"several_targets": SEVERAL_TARGETS}),
        **({"without_history": left_out} if left_out else {}),
        "unreachable": int((~split.reachable).sum()),
        "history_masked_by_default": config.mask_history,
        "ties": config.ties,
    }
    both = target_ranks(queries, vectors, split, config, added, ranks)
    for name, places in zip(("masked", "unmasked"), both):
        report[name] = ranking_metrics(places, config.ks, users)
        for part, rows in (("warm", is_warm), ("cold", ~is_warm)):
            part_users = None if users is None else users[rows]
            metrics = ranking_metrics(places[rows], config.ks, part_users)
            report[name][part] = {**_numbers(places[rows], part_users), **metrics}
    return report


def popularity_baseline(
    sequences: Sequences, split_name: str, config: EvaluationConfig, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Evaluate a ranking of the catalogue by training counts, which is the same for all users. See `evaluate`.

    Raises InputError for a split_name that is neither "validation" nor "test".
    """
    counts = torch.from_numpy(sequences.training_counts[1:, None]).double()
    block = ranks.block(len(sequences.split(split_name).targets))
    queries = torch.ones(block.stop - block.start, 1, dtype=torch.float64)
    return evaluate(queries, counts, sequences, split_name, config, ranks=ranks)


def target_ranks(
    queries: Tensor,
    vectors: Tensor,
    split: Split,
    config: EvaluationConfig,
    added: Added | None = None,
    ranks: Ranks = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each target's rank, counted from 1, float64 [R], with the history masked and unmasked.

    queries [R, d] and vectors [items, d]: on one device. On several ranks the queries are those of this rank's block of
    the targets, and all ranks get the ranks of all targets. added: see `evaluate`; it is called for at most
    `ADDED_AT_ONCE` rows at a time. A masked target within its user's history has rank infinity. A user's other targets
    stay in the catalogue; those that tie take one place after another. Raises InputError if a score is not finite.
    """
    count = len(split.targets)
    of_block = _counted_ranks(queries, vectors, split.part(ranks.block(count)), config, added)
    masked, unmasked = ranks.gather_blocks(of_block, count).unbind(1)
    broken = unmasked.isnan()
    if broken.any():
        users = split.users[broken.cpu().numpy()]
        raise InputError(
            f"{len(np.unique(users))} of {len(split.first_rows)} users have a score that is not finite; "
            "the model has diverged or the hidden states are damaged"
        )
    users = split.repeated_users
    tie_share = TIE_SHARES[config.ties]
    if users is None:
        return masked.cpu().numpy(), unmasked.cpu().numpy()
    return _apart(masked.cpu().numpy(), users, tie_share), _apart(unmasked.cpu().numpy(), users, tie_share)


def _counted_ranks(
    queries: Tensor, vectors: Tensor, split: Split, config: EvaluationConfig, added: Added | None
) -> Tensor:
    """Return both ranks of each target, float64 [R, 2], NaN for a score that is not finite. See `target_ranks`."""
    both = torch.empty(len(split.targets), 2, dtype=torch.float64, device=queries.device)
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
        both[chosen] = torch.stack(ranks, dim=1).double()
    return both


def user_gains(ranks: np.ndarray, k: int, users: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return each user's contribution to HR@K and NDCG@K, float64 [users], as `hr@k` and `ndcg@k`.

    ranks: of targets, counted from 1, [R]. users: the user of each target, int64 [R], ascending; None if each target is
    another user's. The mean over users is the metric.

    With one target HR is 1 for a rank up to K, and NDCG is 1 / log2(rank + 1) for such a rank; both are 0 for others.
    With several HR is 1 if one of them has such a rank, and NDCG is the sum of their gains, divided by the sum if they
    had the ranks 1, 2, … With `users` the result has `recall@k` too, the share of the user's targets with such a rank.
    """
    hits = (ranks <= k).astype(np.float64)
    gains = np.where(hits, 1 / np.log2(ranks + 1), 0)
    if users is None:
        return {f"hr@{k}": hits, f"ndcg@{k}": gains}
    counts = np.diff(_first_rows(users), append=len(users))
    best = np.cumsum(1 / np.log2(np.arange(2, min(k, counts.max(initial=1)) + 2)))
    return {
        f"hr@{k}": _by_user(np.maximum, hits, users),
        f"ndcg@{k}": _by_user(np.add, gains, users) / best[np.minimum(counts, len(best)) - 1],
        f"recall@{k}": _by_user(np.add, hits, users) / counts,
    }


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


def ranking_metrics(ranks: np.ndarray, ks: tuple[int, ...], users: np.ndarray | None = None) -> dict[str, float | None]:
    """Return HR@K and NDCG@K for each K, and MRR, as means over users; None for each if there are no ranks.

    ranks, users: as `user_gains` takes them. With `users` there is Recall@K too, and MRR is by a user's least rank.
    """
    gains = {name: values for k in ks for name, values in user_gains(ranks, k, users).items()}
    gains["mrr"] = 1 / _by_user(np.minimum, ranks, users)
    return {name: float(values.mean()) if len(ranks) else None for name, values in gains.items()}


def headline_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's masked metrics, or the unmasked ones if its settings do not mask the history."""
    return report["masked" if report["history_masked_by_default"] else "unmasked"]


def _numbers(targets: np.ndarray, users: np.ndarray | None) -> dict[str, int]:
    """Return the number of users, and that of targets if some users have several. users: as in `user_gains`."""
    if users is None:
        return {"users": len(targets)}
    return {"users": len(_first_rows(users)), "targets": len(targets)}


def _by_user(combine: np.ufunc, values: np.ndarray, users: np.ndarray | None) -> np.ndarray:
    """Combine the values of each user's targets into one, [users]. values: [R]. users: as in `user_gains`."""
    return values if users is None else combine.reduceat(values, _first_rows(users))


def _first_rows(users: np.ndarray) -> np.ndarray:
    """Return the first row of each user, int64 [users]. users: of all rows, int64 [R], ascending."""
    return np.flatnonzero(np.diff(users, prepend=-1))


def _apart(ranks: np.ndarray, users: np.ndarray, tie_share: float) -> np.ndarray:
    """Return ranks at which the t targets of one user with equal scores stand one place after another, float64 [R].

    Each was ranked as if tie_share of the t - 1 others stood above it. users: as in `user_gains`.
    """
    order = np.lexsort((ranks, users))
    ranks_in_order, users_in_order = ranks[order], users[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(users_in_order) > 0) | (ranks_in_order[1:] != ranks_in_order[:-1])
    first = np.flatnonzero(begins)
    tied = np.diff(first, append=len(order))
    above = np.arange(len(order)) - np.repeat(first, tied) - tie_share * np.repeat(tied - 1, tied)
    apart = np.empty_like(ranks)
    apart[order] = ranks_in_order + above
    return apart
