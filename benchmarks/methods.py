"""Methods side by side: each trained by the same trainer on the same batches, what it reaches and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import EvaluationConfig
from ..errors import InputError
from ..evaluation import check_weights, paired_test, target_ranks, tpme, user_gains
from ..training import load
from .cells import Cell, K, encoding_seconds, run_sweep
from .harness import Setup
from .sweep_settings import UNCACHED, MethodsSettings
from .tables import NOT_MEASURED

# Dearest first, as the paper finds them; within a group there is no order.
COST_ORDER = (("full",), ("lora", "adapter", "bitfit"), (f"iisan{UNCACHED}",), ("iisan",))


def compare_methods(setup: Setup, settings: MethodsSettings) -> dict[str, Any]:
    """Train the methods, as far as that is not done yet in the setup's folder, and return all their figures.

    Raises InputError for fewer than two methods, for bad weights, and as `run_sweep` does.
    """
    check_weights(settings.weights)
    if len(settings.methods) < 2:
        raise InputError(f"methods: expected two or more, found {', '.join(settings.methods)}")
    settings = replace(settings, against=settings.against or settings.methods[-1])
    if settings.against not in settings.methods:
        raise InputError(f"against: expected one of {', '.join(settings.methods)}, found {settings.against!r}")
    folder = run_sweep(setup, settings.sweep)
    encoders = {name: summary(name, folder, settings, setup.device) for name in settings.encoders}
    return {"settings": asdict(settings), "encoders": encoders}


def summary(encoders: str, out: Path, settings: MethodsSettings, device: torch.device) -> dict[str, Any]:
    """One set of encoders: a row a method, their TPME, and whether time an epoch falls in the expected order."""
    found = {
        method: [Cell(encoders, method, seed).figures(out) for seed in settings.seeds] for method in settings.methods
    }
    against = settings.against
    users = {method: _user_gains(encoders, method, out, settings, device) for method in settings.methods}
    rows = {method: row(figures) for method, figures in found.items()}
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


def _user_gains(encoders: str, method: str, out: Path, settings: MethodsSettings, device: torch.device) -> np.ndarray:
    """float64 [users]: what each test user adds to NDCG@10, the mean over seeds."""
    found = []
    for seed in settings.seeds:
        best = load(Cell(encoders, method, seed).folder(out) / "run", device)
        split = best.sequences.split("test")
        states = best.model.user_states(best.item_vectors, split.inputs)
        masked, _ = target_ranks(states, best.item_vectors, split, EvaluationConfig(ks=(K,)))
        found.append(user_gains(masked, K)[f"ndcg@{K}"])
    return np.mean(found, axis=0)
