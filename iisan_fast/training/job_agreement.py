"""Refuse to train a run on ranks with other data or settings than each other, or with fewer rows than ranks."""

from __future__ import annotations

import numpy as np
import torch

from ..checksums import checksum
from ..config import RunConfig
from ..data import Sequences
from ..ranks import Ranks, refuse_disagreement, refuse_too_few
from ..setting_fields import to_dict

SECTIONS = ("protocol", "model", "train", "evaluation", "scoring")  # the others say where data lies, or how it is read


def refuse_unfit_job(
    ranks: Ranks, config: RunConfig, sequences: Sequences, device: torch.device, placement: str
) -> None:
    """Raise InputError on all ranks if one has other data or settings, or if they are more than the users or items.

    sequences: of the run. placement: of its table. Every rank calls it.
    """
    if not ranks.several:
        return
    refuse_too_few(ranks, len(sequences.training_users), "training users")
    refuse_too_few(ranks, len(sequences.item_ids), "items")
    settings = {name: to_dict(getattr(config, name)) for name in SECTIONS}
    values = {"dataset": _digests(sequences), **settings, "views": config.views, "init": config.init is not None}
    refuse_disagreement(ranks, {**values, "device": device.type, "table": placement})


def _digests(sequences: Sequences) -> dict[str, str]:
    """Return checksums (hex) of a run's items, histories and targets."""
    arrays = {
        "histories": (sequences.offsets, sequences.items, sequences.training_ends),
        "targets": (*sequences.targets.values(), *sequences.target_counts.values()),
    }
    digests = {name: checksum(b"".join(map(_array_checksum, parts))).hex() for name, parts in arrays.items()}
    return {"items": checksum("\n".join(sequences.item_ids).encode()).hex(), **digests}


def _array_checksum(array: np.ndarray) -> bytes:
    """Return the checksum of an array's numbers."""
    return checksum(memoryview(np.ascontiguousarray(array)).cast("B"), str(array.dtype).encode())
