"""Methods side by side: each trained by the same trainer on the same batches, what it reaches and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import EvaluationConfig
from ..errors import InputError
from ..evaluation import TPME_WEIGHTS, check_weights, paired_test, target_ranks, tpme, user_gains
from ..training import load
from .cells import UNCACHED, Cell, K, SweepSettings, encoding_seconds, run_sweep
from .machine import NOT_MEASURED, origin

# Dearest first, as the paper finds them; within a group there is no order.
COST_ORDER = (("full",), ("lora", "adapter", "bitfit"), (f"iisan{UNCACHED}",), ("iisan",))


@dataclass(frozen=True)
class Comparison:
    """How the methods of a sweep are compared."""

    against: str  # the method that the others are tested against
    weights: tuple[float, float, float] = TPME_WEIGHTS

    def __post_init__(self) -> None:
        check_weights(self.weights)


def benchmark(
    dataset: Path, out: Path, settings: SweepSettings, comparison: Comparison, device: torch.device
) -> dict[str, Any]:
    """Runs the sweep, as far as it has not run yet, in the folder `out`, and returns all its figures.

    Raises InputError for fewer than two methods, and as `run_sweep` does.
    """
    if len(settings.methods) < 2:
        raise InputError(f"methods: expected two or more, found {', '.join(settings.methods)}")
    if comparison.against not in settings.methods:
        raise InputError(f"against: expected one of {', '.join(settings.methods)}, found {comparison.against!r}")
    run_sweep(dataset, out, settings, device)
    return {
        **origin(dataset.resolve().name, device),
        "settings": {**asdict(settings), **asdict(comparison)},
        "encoders": {name: summary(name, out, settings, comparison, device) for name in settings.encoders},
    }


def summary(
    encoders: str, out: Path, settings: SweepSettings, comparison: Comparison, device: torch.device
) -> dict[str, Any]:
    """One set of encoders: a row a method, their TPME, and whether time an epoch falls in the expected order."""
    found = {
        method: [Cell(encoders, method, seed).figures(out) for seed in settings.seeds] for method in settings.methods
    }
    against = comparison.against
    users = {method: _user_gains(encoders, method, out, settings, device) for method in settings.methods}
    rows = {method: row(figures) for method, figures in found.items()}
    for method in rows:
        rows[method]["p_value"] = None if method == against else paired_test(users[method], users[against])
    seconds, parameters, memory = (
        {method: row[name] for method, row in rows.items()}
        for name in ("epoch_s", "trainable_parameters", "peak_bytes")
    )
    if NOT_MEASURED not in memory.values():
        for method, share in tpme(seconds, parameters, memory, comparison.weights).items():
            rows[method]["tpme"] = share
    return {
        "against": against,
        "encoding_s": encoding_seconds(encoders, out),
        "methods": rows,
        "cost_order": cost_order(seconds),
    }


def cost_order(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Whether each method of a dearer group takes longer an epoch than each of the next, of those in the sweep."""
    groups = [{name: seconds[name] for name in group if name in seconds} for group in COST_ORDER]
    groups = [group for group in groups if group]
    violations = [
        f"{cheap} takes {below[cheap]:.2f} s, {dear} {above[dear]:.2f} s"
        for above, below in zip(groups, groups[1:])
        for dear in above
        for cheap in below
        if below[cheap] >= above[dear]
    ]
    return {
        "expected": " > ".join(", ".join(group) for group in groups),
        "holds": not violations,
        "violations": violations,
    }


def row(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, deviations of the metrics, and the first seed's account of a step."""
    first = figures[0]
    peaks = [each["peak_bytes"] for each in figures]
    means = {
        name: statistics.mean(each[name] for each in figures) for name in ("hr", "ndcg", "epoch_s", "validation_s")
    }
    for name in ("hr", "ndcg"):
        means[f"{name}_sd"] = statistics.stdev(each[name] for each in figures) if len(figures) > 1 else None
    return {
        **means,
        "seeds": len(figures),
        "epochs": [each["epochs"] for each in figures],
        "losses": first["losses"],
        "trainable_parameters": first["trainable_parameters"],
        "parameters": first["parameters"],
        "peak_bytes": NOT_MEASURED if NOT_MEASURED in peaks else max(peaks),
        "memory_bytes": first["memory_bytes"],
        "phases_ms": first["phases_ms"],
    }


def _user_gains(encoders: str, method: str, out: Path, settings: SweepSettings, device: torch.device) -> np.ndarray:
    """float64 [users]: what each test user adds to NDCG@10, the mean over seeds."""
    found = []
    for seed in settings.seeds:
        best = load(Cell(encoders, method, seed).folder(out) / "run", device)
        split = best.sequences.split("test")
        states = best.model.user_states(best.item_vectors, split.inputs)
        masked, _ = target_ranks(states, best.item_vectors, split, EvaluationConfig(ks=(K,)))
        found.append(user_gains(masked, K)[f"ndcg@{K}"])
    return np.mean(found, axis=0)
