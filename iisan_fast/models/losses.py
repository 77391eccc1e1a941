"""Define the settings of gSASRec's binary cross-entropy: its negatives and its calibration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import TrainConfig

CALIBRATION = 0.75  # t of gSASRec, its authors' choice


class BinaryLoss(NamedTuple):
    """The generalised binary cross-entropy of gSASRec (Petrov and Macdonald, RecSys 2023, section 5)."""

    negatives: int  # drawn for each step
    power: float  # of the target's probability, beta

    @classmethod
    def of(cls, train: TrainConfig, popularity: np.ndarray) -> BinaryLoss | None:
        """Return the loss of a run, or None if its loss is a cross-entropy.

        With the share alpha = N / (items - 1) of the negatives that are drawn, beta = alpha (t (1 - 1 / alpha) + 1 /
        alpha) = 1 - t (1 - alpha). popularity: float64 [items + 1]; items count that occur in training.
        """
        kind, negatives = train.loss_and_negatives
        if kind != "gbce":
            return None
        share = min(1.0, negatives / max(1, np.count_nonzero(popularity) - 1))
        return cls(negatives, 1 - CALIBRATION * (1 - share))
