"""Train several methods by the same trainer on the same batches, and compare their accuracy and cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import EvaluationConfig
from ..data import Split
from ..errors import InputError
from ..evaluation import check_weights, paired_test, target_ranks, tpme, user_gains
from ..models import Scores
from ..training import load
from .cells import LONGEST_WAIT, Cell, K, encoding_seconds, run_sweep
from .harness import Setup
from .sweep_settings import UNCACHED, MethodsSettings, SweepSettings, reads_a_cache
from .tables import NOT_MEASURED

# Dearest first, as the paper finds them; within a group there is no order.
COST_ORDER = (("full",), ("lora", "adapter", "bitfit"), (f"iisan{UNCACHED}",), ("iisan",))


def compare_methods(setup: Setup, settings: MethodsSettings) -> dict[str, Any]:
    """Train the methods, as far as that is not done yet in the setup's folder, and return all their figures.

    Several ranks share out the runs, and rank 0 compares them.

    Raises InputError for fewer than two methods, for bad weights, and as `run_sweep` does.
    """
    check_weights(settings.weights)
    if len(settings.methods) < 2:
        raise InputError(f"methods: expected two or more, found {', '.join(settings.methods)}")
    settings = replace(settings, against=settings.against or settings.methods[-1])
    if settings.against not in settings.methods:
        raise InputError(f"against: expected one of {', '.join(settings.methods)}, found {settings.against!r}")
    folder = run_sweep(setup, settings.sweep)

    def compare() -> dict[str, Any]:
        return {name: summary(name, folder, settings, setup.device) for name in settings.encoders}

    encoders = setup.ranks.apart(LONGEST_WAIT).first_does(compare)
    return {"settings": asdict(settings), "encoders": encoders}


def summary(encoders: str, out: Path, settings: MethodsSettings, device: torch.device) -> dict[str, Any]:
    """Return a row for each method over one set of encoders and for each baseline, TPME, and the order of times."""
    cell_figures = {
        method: [Cell(encoders, method, seed).figures(out) for seed in settings.seeds] for method in settings.methods
    }
    against = settings.against
    users = {method: _user_gains(encoders, method, out, settings, device) for method in settings.methods}
    rows = {method: seeds_row(figures) for method, figures in cell_figures.items()}
    for method in rows:
        rows[method]["p_value"] = None if method == against else paired_test(users[method], users[against])
    seconds, parameters, memory = (
        {method: row[name] for method, row in rows.items()}
        for name in ("epoch_s", "trainable_parameters", "peak_bytes")
    )
    if NOT_MEASURED not in memory.values():
        for method, share in tpme(seconds, parameters, memory, settings.weights).items():
            rows[method]["tpme"] = share
    return {
        "against": against,
        "encoding_s": encoding_seconds(encoders, out),
        "methods": rows,
        "baselines": baseline_rows(encoders, out, settings, device, users[against]),
        "cost_order": cost_order(seconds),
    }


def baseline_rows(
    encoders: str, out: Path, settings: SweepSettings, device: torch.device, others: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Return the HR@10 and NDCG@10 of the rankings without training over one set of encoders.

    They are the same for all seeds, and for all methods but for similarity, which needs a cache: "similarity" says if
    there is one. out: the sweep's folder. others: each user's gain of the method to test against, as `_user_gains`
    returns it; it gives "p_value". Raises InputError for a run that is missing or damaged.
    """
    method = next((name for name in settings.methods if reads_a_cache(name)), settings.methods[0])
    best = load(Cell(encoders, method, settings.seeds[0]).folder(out) / "run", device)
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in best.scoring.baseline_scores("test").items():
        gains = _gains(scores, best.sequences.split("test"))
        rows[name] = {metric: float(gains[f"{metric}@{K}"].mean()) for metric in ("hr", "ndcg")}
        rows[name] |= {"hr_sd": None, "ndcg_sd": None}  # nothing is drawn at random
        if others is not None:
            rows[name]["p_value"] = paired_test(gains[f"ndcg@{K}"], others)
    rows["neighbours"]["similarity"] = best.terms.similarity is not None
    return rows


def cost_order(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Compare the methods' seconds an epoch with the order that the paper finds; methods of one group have none.

    Returns the expected order of the methods at hand, and the violations.
    """
    groups = [{name: seconds[name] for name in group if name in seconds} for group in COST_ORDER]
    groups = [group for group in groups if group]
    violations = []
    for above, below in pairwise(groups):
        for dear, cheap in product(above, below):
            if below[cheap] >= above[dear]:
                violations.append(f"{cheap} takes {below[cheap]:.2f} s, {dear} {above[dear]:.2f} s")
    return {
        "expected": " > ".join(", ".join(group) for group in groups),
        "holds": not violations,
        "violations": violations,
    }


def seeds_row(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, deviations of the metrics, and the first seed's profile of a step."""
    first = figures[0]
    peaks = [cell["peak_bytes"] for cell in figures]
    means = {
        name: statistics.mean(cell[name] for cell in figures) for name in ("hr", "ndcg", "epoch_s", "validation_s")
    }
    for name in ("hr", "ndcg"):
        means[f"{name}_sd"] = statistics.stdev(cell[name] for cell in figures) if len(figures) > 1 else None
    return {
        **means,
        "seeds": len(figures),
        "epochs": [cell["epochs"] for cell in figures],
        "losses": first["losses"],
        "trainable_parameters": first["trainable_parameters"],
        "parameters": first["parameters"],
        "peak_bytes": NOT_MEASURED if NOT_MEASURED in peaks else max(peaks),
        "memory_bytes": first["memory_bytes"],
        "phases_ms": first["phases_ms"],
    }


def _user_gains(encoders: str, method: str, out: Path, settings: MethodsSettings, device: torch.device) -> np.ndarray:
    """Rank the test targets by the best checkpoint of each seed, and return each user's gain, the mean over seeds.

    out: the sweep's folder, which holds the runs. Returns each user's contribution to NDCG@10, history masked: float64
    [users]. Raises InputError for a run that is missing or damaged.
    """
    gains = []
    for seed in settings.seeds:
        best = load(Cell(encoders, method, seed).folder(out) / "run", device)
        gains.append(_gains(best.scores("test"), best.sequences.split("test"))[f"ndcg@{K}"])
    return np.mean(gains, axis=0)


def _gains(scores: Scores, split: Split) -> dict[str, np.ndarray]:
    """Return each user's contribution to HR@10 and NDCG@10, history masked, float64 [users]."""
    masked, _ = target_ranks(scores.queries, scores.vectors, split, EvaluationConfig(ks=(K,)), scores.added)
    return user_gains(masked, K, split.repeated_users)
