"""The ablation of the accuracy benchmark: each option alone on top of the paper's form, by validation figures only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import NEIGHBOUR_WEIGHTS
from ..training import TermWeights, load
from .accuracy_runs import CPU, PAPER, Data, split_figures, trained_without_test, training_figures, with_weights

EPOCHS = 12
RATES = {"adapters": 5e-4, "gates": 1e-3, "heads": 1e-3, "sequence_encoder": 1e-3}  # five times the method's own
FAST = {"train.learning_rates": RATES, "train.schedule": "cosine"}
LARGE = {"train.learning_rates": {group: 2 * rate for group, rate in RATES.items()}, "train.schedule": "cosine"}
OPTIONS: dict[str, dict[str, Any]] = {  # settings by dotted name, on top of those of the paper's form
    "paper's form": {},
    "schedule linear": {"train.schedule": "linear"},
    "schedule cosine": {"train.schedule": "cosine"},
    "warmup_epochs 1": {"train.warmup_epochs": 1},
    "learning rates 5 times": {"train.learning_rates": RATES},
    "fast (learning rates 5 times, schedule cosine)": FAST,
    "fast, standardise": {**FAST, "model.standardise": True},
    "fast, item_ids": {**FAST, "model.item_ids": True},
    "fast, reverse": {**FAST, "train.reverse": True},
    "fast, no debias": {**FAST, "train.debias": False},
    "fast, no own_mask": {**FAST, "train.own_mask": False},
    "fast, weight_decay 0.1": {**FAST, "train.weight_decay": 0.1},
    "fast, clip_norm 1": {**FAST, "train.clip_norm": 1},
    "fast, ema_decay 0.99": {**FAST, "train.ema_decay": 0.99},
    "fast, dropout 0.2": {**FAST, "model.dropout": 0.2},
    "fast, embedding_dim 128": {**FAST, "model.embedding_dim": 128},
    "fast, bottleneck 128": {**FAST, "model.bottleneck": 128},
    "fast, frozen": {
        **FAST,
        "model.method": "frozen",
        "train.learning_rates": {"heads": 1e-3, "sequence_encoder": 1e-3},
    },
    "256 users a batch, learning rates 10 times, schedule cosine": {**LARGE, "train.batch_users": 256},
    "the same, loss sampled:2048": {**LARGE, "train.batch_users": 256, "train.loss": "sampled:2048"},
    "the same, loss gbce:256": {**LARGE, "train.batch_users": 256, "train.loss": "gbce:256"},
    "1,024 users a batch, the same rates, loss full": {**LARGE, "train.batch_users": 1024, "train.loss": "full"},
}
NO_TERM = TermWeights()._asdict()
SCORINGS = {  # what is added to the scores of a trained run
    "no term": NO_TERM,
    **{name: {**NO_TERM, name: weight} for name, weight in NEIGHBOUR_WEIGHTS.items()},
    "both terms": {**NO_TERM, **NEIGHBOUR_WEIGHTS},
    "both terms, cold_bias 1": {**NO_TERM, **NEIGHBOUR_WEIGHTS, "cold_bias": 1.0},
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
