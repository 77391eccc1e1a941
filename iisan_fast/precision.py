"""Choose the dtypes of a run once, from its settings and its device."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from .config import SIDE_METHODS, STATE_METHODS, TUNING_METHODS, RunConfig
from .errors import InputError

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run. Weights, gradients and sums are float32 in every run."""

    table: torch.dtype | None  # of the hidden states in memory; None: the cache's dtype
    products: torch.dtype  # of the matrix products with trained weights


def resolve_precision(config: RunConfig, device: torch.device) -> Precision:
    """Return the dtypes of a run on a device.

    Side networks on CUDA multiply in the dtype of their table. On a CPU they read the states in the cache's dtype and
    multiply in float32. Trained encoders may multiply in bfloat16 on both. Raises InputError for bfloat16 products of a
    side network on a CPU: they are slower than float32 and less accurate.
    """
    method = config.model.method
    asked = config.train.precision
    on_cuda = device.type == "cuda"
    if asked == "bfloat16" and method in SIDE_METHODS and not on_cuda:
        raise InputError(
            f"precision: expected auto or float32 for {method} on a CPU, found bfloat16; "
            "train a run in float32, or choose the device cuda"
        )
    automatic = "bfloat16" if on_cuda else "float32"
    chosen = getattr(torch, automatic if asked == "auto" else asked)
    precision = Precision(
        table=chosen if on_cuda and method in STATE_METHODS else None,
        products=chosen if method in (*SIDE_METHODS, *TUNING_METHODS) else torch.float32,
    )
    table = "the cache's dtype" if precision.table is None else precision.table
    LOGGER.debug("precision: %s (%s, %s on %s), states in %s", precision.products, asked, method, device.type, table)
    return precision
