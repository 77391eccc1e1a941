"""Runs of the accuracy benchmark: their settings, their commits, and their figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import EvaluationConfig, RunConfig
from ..errors import InputError
from ..evaluation import target_ranks, user_gains
from ..fingerprints import changed_settings
from ..setting_fields import to_dict
from ..settings import run_config
from ..settings_files import read_settings
from ..training import BestRun, RunFolder, TermWeights, resume, train
from .harness import write_result
from .machine import commit
from .scientific import PROTOCOL, show

CPU = torch.device("cpu")
K = 10
EVALUATION = EvaluationConfig(ks=(K,))
METRICS = (f"hr@{K}", f"ndcg@{K}")
PAPER = {"model.method": "iisan-versa", "train.max_epochs": 100}
NOT_RECORDED = "not recorded"
COMPARED_SECTIONS = ("protocol", "model", "train", "evaluation", "scoring")


@dataclass(frozen=True)
class Data:
    """The dataset and the states of the titles that all runs share, and the folder of the runs."""

    dataset: Path
    views: Sequence[str]  # names in the cache
    work: Path

    @property
    def cache(self) -> Path:
        """Return the folder of the hidden states."""
        return self.work / "states"

    def configuration(self, base: Mapping[str, Any], changes: Mapping[str, Any], seed: int) -> RunConfig:
        """Return a run's configuration.

        base: settings as `base_settings` returns them, those of a recipe or {}. changes: by dotted name. Raises
        InputError for settings that do not fit each other.
        """
        sources = {"dataset": str(self.dataset), "cache": str(self.cache), "views": list(self.views)}
        return run_config({**sources, "protocol": PROTOCOL}, base, changes={**changes, "train.seed": seed})


def trained(config: RunConfig, run: Path) -> dict[str, Any]:
    """Train a run, or resume it; a finished one stays as it is. Return its figures on the test set.

    The commit that trains is added to the run's list of commits. Raises InputError if the folder holds a run with other
    settings.
    """
    if not (run / "config.json").exists():
        _note_commit(run)
        return train(config, run, CPU, show)
    _refuse_other_settings(config, run)
    if not RunFolder(run).test.exists():
        _note_commit(run)
    return resume(run, CPU, show)


def trained_without_test(config: RunConfig, run: Path) -> None:
    """Train a run to its last epoch, or resume it, without a look at the test set.

    Raises InputError as `trained` does, and for a run that ended earlier.
    """

    def stop_at_the_end(line: dict[str, Any]) -> None:
        show(line)
        if line["epoch"] == config.train.max_epochs:
            raise _LastEpochDone

    begun = (run / "config.json").exists()
    if begun:
        _refuse_other_settings(config, run)
        if len(epoch_lines(run)) == config.train.max_epochs:
            return
    _note_commit(run)
    try:
        if begun:
            resume(run, CPU, stop_at_the_end)
        else:
            train(config, run, CPU, stop_at_the_end)
    except _LastEpochDone:
        return
    raise InputError(f"{run}: expected {config.train.max_epochs} epochs, found an earlier end; remove the folder")


class _LastEpochDone(Exception):
    """Says that a run's last epoch is validated and saved."""


def commits(run: Path) -> list[str]:
    """Return the commits that trained a run, the first one first; NOT_RECORDED stands for those of no record."""
    record = _commits_file(run)
    return read_settings(record)["commits"] if record.exists() else [NOT_RECORDED]


def epoch_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, one for each epoch."""
    metrics = RunFolder(run).metrics
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def training_figures(run: Path) -> dict[str, Any]:
    """Return a run's commits, its epochs to the best one and in all, and the median seconds an epoch."""
    lines = epoch_lines(run)
    best = max(line["epoch"] for line in lines if line["best"])
    return {
        "commits": commits(run),
        "best_epoch": best,
        "epochs": len(lines),
        "epoch_s": statistics.median(line["train_seconds"] for line in lines),
        "validation_s": statistics.median(line["validation_seconds"] for line in lines),
    }


def with_weights(best: BestRun, weights: Mapping[str, float]) -> BestRun:
    """Return a run that scores by other weights of the terms, given by name."""
    return best._replace(weights=TermWeights(**weights))


def split_figures(best: BestRun, split: str) -> dict[str, float | None]:
    """Return a run's figures on a split by its weights, as `figures` does."""
    states = best.user_states(split)
    return figures(best.scoring.report(states, best.item_vectors, split, EVALUATION, best.weights))


def user_figures(best: BestRun) -> dict[str, np.ndarray]:
    """Return each test user's HR@10 and NDCG@10 by a run's weights, history masked, float64 [users]."""
    scores = best.scores("test")
    split = best.sequences.split("test")
    masked, _ = target_ranks(scores.queries, scores.vectors, split, EVALUATION, scores.added)
    return user_gains(masked, K, split.repeated_users)


def figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return HR@10 and NDCG@10 of all, warm and cold targets, history masked, as fractions.

    report: as `evaluate` returns it.
    """
    masked = report["masked"]
    parts = {"": masked, "warm_": masked["warm"], "cold_": masked["cold"]}
    return {f"{part}{name}": values[name] for part, values in parts.items() for name in METRICS}


def mean_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each figure over rows; None if it is None in a row, as without cold targets."""
    means: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        means[name] = None if None in values else statistics.mean(values)
    return means


def mean_gains(gains: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return each user's HR@10 and NDCG@10, the mean over runs, float64 [users]."""
    return {name: np.mean([of_run[name] for of_run in gains], axis=0) for name in METRICS}


def _refuse_other_settings(config: RunConfig, run: Path) -> None:
    """Raise InputError if a run's settings are not those of a configuration; folders are not compared."""
    recorded, expected = to_dict(RunFolder.open(run).config), to_dict(config)
    for section in COMPARED_SECTIONS:
        if changed := changed_settings(recorded[section], expected[section]):
            raise InputError(f"{run}: {section}: {'; '.join(changed)}; choose another folder for --work, or remove it")


def _note_commit(run: Path) -> None:
    """Add the current commit to a run's list, before it is trained or goes on."""
    begun = (run / "config.json").exists()
    known = commits(run) if begun or _commits_file(run).exists() else []
    current = commit() or NOT_RECORDED
    run.parent.mkdir(parents=True, exist_ok=True)
    write_result(_commits_file(run), {"commits": list(dict.fromkeys([*known, current]))})


def _commits_file(run: Path) -> Path:
    """Return the file beside a run that lists its commits."""
    return run.with_name(f"{run.name}.commits.json")
