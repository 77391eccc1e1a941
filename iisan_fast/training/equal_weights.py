"""Check that all ranks of a run have the same weights, bit for bit, as each takes the same update in each step."""

from __future__ import annotations

from torch import nn

from ..checksums import tensor_checksums
from ..errors import InputError, first_few
from ..ranks import Ranks
from .checkpoints import named_weights


def refuse_unequal_weights(ranks: Ranks, model: nn.Module, moment: str) -> None:
    """Raise InputError on all ranks if their trained weights differ. moment: for the message, as "after epoch 3"."""
    if not ranks.several:
        return
    weights = {name: weight.detach().cpu().contiguous() for name, weight in named_weights(model).items()}
    checksums = ranks.from_all(tensor_checksums(weights))
    for rank, on_rank in enumerate(checksums):
        unequal = [name for name, expected in checksums[0].items() if on_rank.get(name) != expected]
        if unequal:
            raise InputError(
                f"{moment} rank {rank} has other weights than rank 0 ({first_few(unequal, len(unequal))}); start all "
                "ranks on machines of one kind, with the same checkpoint in sight"
            )
