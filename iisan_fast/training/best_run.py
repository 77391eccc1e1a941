"""Load the best checkpoint of a finished run from its folder alone, ready to rank items."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import EvaluationConfig, RunConfig
from ..data import Sequences
from ..evaluation import evaluate, popularity_baseline
from ..models import Recommender
from ..runtime import fix_cublas_workspace
from .checkpoints import item_vectors, load_weights, without_item_weights
from .run_folder import RunFolder


class BestRun(NamedTuple):
    """A run's best checkpoint in memory."""

    config: RunConfig
    sequences: Sequences
    epoch: int  # counted from 1
    model: Recommender  # without an item encoder, because item_vectors holds its results
    item_vectors: Tensor  # [items, d], item number i in row i - 1

    @property
    def item_ids(self) -> list[str]:
        """Return the dataset's item ids, in the order of item_vectors."""
        return self.sequences.item_ids

    def user_states(self, split: str = "test") -> Tensor:
        """Return the states [users, d] of all users with a target in the split, after the inputs before that target.

        split: "validation" or "test".
        """
        return self.model.user_states(self.item_vectors, self.sequences.split(split).inputs)


def load(path: Path, device: torch.device) -> BestRun:
    """Load the best checkpoint of the run in the folder `path` onto a device.

    Raises InputError if the folder holds no run, or one without a best checkpoint, or a damaged file.
    """
    fix_cublas_workspace()
    folder = RunFolder.open(path)
    config = folder.config
    sequences = folder.sequences
    tensors, state = folder.load_best()
    model = Recommender(nn.Identity, config.model, sequences.max_inputs, sequences.popularity, config.train.seed)
    load_weights(model, without_item_weights(tensors), folder.best)
    vectors = item_vectors(tensors, len(sequences.item_ids), config.model.embedding_dim, folder.best).to(device)
    return BestRun(config, sequences, state["epoch"], model.to(device).eval(), vectors)


def evaluate_run(path: Path, split: str, evaluation: EvaluationConfig, device: torch.device) -> dict[str, Any]:
    """Return the metrics of a run's best checkpoint on a split, and those of the popularity baseline.

    path: the run folder. split: "validation" or "test". The metrics of `evaluate` are under the split's name and under
    "popularity"; "method" and "best_epoch" (counted from 1) describe the run. Raises InputError as `load` does.
    """
    best = load(path, device)
    return {
        "method": best.config.model.method,
        "best_epoch": best.epoch,
        split: evaluate(best.user_states(split), best.item_vectors, best.sequences, split, evaluation),
        "popularity": popularity_baseline(best.sequences, split, evaluation),
    }
