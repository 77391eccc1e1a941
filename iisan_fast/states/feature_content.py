"""Define the content of a file of ready-made features: one array, and the ids of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..errors import InputError

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float32}  # of the features that are read


class FeatureContent(NamedTuple):
    """The features in a file."""

    array: np.ndarray  # [rows, K, D] as stored; int16 for bfloat16, which numpy lacks
    dtype: torch.dtype  # to which the features are converted when they are read
    ids: Sequence[str] | None  # of the rows; None if the file does not say them


def shaped(array: np.ndarray, where: str) -> np.ndarray:
    """Return an array [rows, D] or [rows, K, D] as [rows, K, D]. where: its place, for messages.

    Raises InputError for an array of another shape, or an empty one.
    """
    if array.ndim not in (2, 3) or not array.size:
        shape = " x ".join(map(str, array.shape)) or "one number"
        raise InputError(f"{where}: expected features [rows, width] or [rows, layers, width], found {shape}")
    return array[:, None] if array.ndim == 2 else array
