"""Full-catalogue metrics from the ranks of held-out targets: HR@K, NDCG@K and MRR, and the popularity baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..config import TIE_SHARES, EvaluationConfig
from ..data import Sequences, Split
from ..errors import InputError

HISTORIES_AT_ONCE = 1 << 22  # padded interactions: 32 MiB
BYTES_PER_SCORE = 24  # a score of up to 8 bytes, and what counting makes of it


def evaluate(
    queries: Tensor, vectors: Tensor, sequences: Sequences, split_name: str, config: EvaluationConfig
) -> dict[str, Any]:
    """Metrics of one split, as fractions, with the history masked and unmasked, for warm and cold targets.

    Args: queries [users, d]; vectors [items, d], item number i in row i - 1. Raises InputError where a score is not
    finite. A masked target that stands in its user's own history is unreachable: it counts as a miss.
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
    for name, ranks in zip(("masked", "unmasked"), target_ranks(queries, vectors, split, config)):
        report[name] = {
            **ranking_metrics(ranks, config.ks),
            "warm": {"users": int(warm.sum()), **ranking_metrics(ranks[warm], config.ks)},
            "cold": {"users": int((~warm).sum()), **ranking_metrics(ranks[~warm], config.ks)},
        }
    return report


def popularity_baseline(sequences: Sequences, split_name: str, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a ranking of the catalogue by training counts, the same for every user."""
    counts = torch.from_numpy(sequences.training_counts[1:, None]).double()
    queries = torch.ones(len(sequences.split(split_name).targets), 1, dtype=torch.float64)
    return evaluate(queries, counts, sequences, split_name, config)


def target_ranks(
    queries: Tensor, vectors: Tensor, split: Split, config: EvaluationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [users] twice: each target's rank from 1, history masked (infinite where unreachable) and not."""
    all_ranks = torch.empty(2, len(split.targets), dtype=torch.float64, device=queries.device)
    for rows in _parts(split):
        chosen = torch.from_numpy(rows).to(queries.device)
        ranks = kernels.target_rank(
            queries[chosen],
            vectors,
            torch.from_numpy(split.targets[rows] - 1).to(queries.device),
            torch.from_numpy(split.padded(rows) - 1).to(queries.device),
            tie_share=TIE_SHARES[config.ties],
            chunk_elements=config.chunk_mib * 2**20 // BYTES_PER_SCORE,
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
    """Return each user's share of HR@K and NDCG@K, float64 [users] under `hr@k` and `ndcg@k`; their means are those."""
    hit = ranks <= k
    return {f"hr@{k}": hit.astype(np.float64), f"ndcg@{k}": np.where(hit, 1 / np.log2(ranks + 1), 0)}


def _parts(split: Split) -> list[np.ndarray]:
    """The rows in parts whose padded histories take little memory: all at once, unless one history is very long."""
    rows, widths = np.arange(len(split.targets)), np.maximum(split.lengths, split.least_width)
    if len(rows) * int(widths.max(initial=0)) <= HISTORIES_AT_ONCE:
        return [rows]
    rows = rows[np.argsort(widths, kind="stable")]
    parts, start = [], 0
    while start < len(rows):
        sizes = (np.arange(start, len(rows)) - start + 1) * widths[rows[start:]]
        count = max(1, int(np.searchsorted(sizes, HISTORIES_AT_ONCE, side="right")))
        parts.append(rows[start : start + count])
        start += count
    return parts


def ranking_metrics(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, float | None]:
    """HR@K, NDCG@K for each K, and MRR, as means over ranks; None where there are none."""
    users = {name: values for k in ks for name, values in user_gains(ranks, k).items()} | {"mrr": 1 / ranks}
    return {name: float(values.mean()) if len(ranks) else None for name, values in users.items()}


def headline_metrics(report: dict[str, Any]) -> dict[str, Any]:
    """Return the masked metrics of a report, or the unmasked ones if the evaluation does not mask the history."""
    return report["masked" if report["history_masked_by_default"] else "unmasked"]
