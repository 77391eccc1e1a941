"""The ablation of the accuracy benchmark: each option alone on top of the paper's form, by validation figures only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import NEIGHBOUR_WEIGHTS
from ..training import load
from .accuracy_runs import CPU, PAPER, Data, split_figures, trained_without_test, training_figures, with_weights

EPOCHS = 12
OPTIONS: dict[str, dict[str, Any]] = {  # settings by dotted name, on top of those of the paper's form
    "paper's form": {},
    "frozen": {"model.method": "frozen"},
    "standardise": {"model.standardise": True},
    "item_ids": {"model.item_ids": True},
    "reverse": {"train.reverse": True},
    "loss sampled:2048": {"train.loss": "sampled:2048"},
    "loss gbce:256": {"train.loss": "gbce:256"},
    "loss full, 1,024 users a batch": {"train.loss": "full", "train.batch_users": 1024},
    "1,024 users a batch": {"train.batch_users": 1024},
    "256 users a batch": {"train.batch_users": 256},
    "no debias": {"train.debias": False},
    "no own_mask": {"train.own_mask": False},
    "weight_decay 0.01": {"train.weight_decay": 0.01},
    "schedule linear": {"train.schedule": "linear"},
    "schedule cosine": {"train.schedule": "cosine"},
    "warmup_epochs 1": {"train.warmup_epochs": 1},
    "clip_norm 1": {"train.clip_norm": 1},
    "ema_decay 0.999": {"train.ema_decay": 0.999},
    "embedding_dim 128": {"model.embedding_dim": 128},
    "learning rates doubled": {"train.learning_rates": {"adapters": 2e-4, "heads": 4e-4, "sequence_encoder": 4e-4}},
}
SCORINGS = {  # the terms that are added to the scores of a trained run
    "no term": dict.fromkeys(NEIGHBOUR_WEIGHTS, 0.0),
    **{name: {**dict.fromkeys(NEIGHBOUR_WEIGHTS, 0.0), name: weight} for name, weight in NEIGHBOUR_WEIGHTS.items()},
    "both terms": NEIGHBOUR_WEIGHTS,
}


def ablation(data: Data, recipe: Mapping[str, Any], seed: int, epochs: int) -> dict[str, Any]:
    """Train each option for some epochs, and return validation figures without terms, with each, and with both.

    recipe: the settings of the row "strong", as `base_settings` returns them; that run has the same number of epochs.
    The best epoch of a run is chosen by its own validation figures. Raises InputError as `trained_without_test` does.
    """
    fixed = {"train.max_epochs": epochs, "train.patience": epochs}
    configurations = {
        option: data.configuration({}, {**PAPER, **changes, **fixed}, seed) for option, changes in OPTIONS.items()
    }
    configurations["strong"] = data.configuration(recipe, fixed, seed)
    rows = []
    for option, config in configurations.items():
        run = data.work / "ablation" / f"{option}, {epochs} epochs, seed {seed}".replace(" ", "-")
        trained_without_test(config, run)
        rows.append({"option": option, "settings": OPTIONS.get(option, recipe), **ablation_row(run)})
    return {"seed": seed, "epochs": epochs, "weights": NEIGHBOUR_WEIGHTS, "rows": rows}


def ablation_row(run: Path) -> dict[str, Any]:
    """Return a run's cost, and the validation figures of its best epoch by each scoring."""
    best = load(run, CPU)
    scored = {name: with_weights(best, weights) for name, weights in SCORINGS.items()}
    validation = {name: split_figures(by_weights, "validation") for name, by_weights in scored.items()}
    return {**training_figures(run), "validation": validation}
