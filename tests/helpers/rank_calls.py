"""Functions that tests call on the ranks of a job; the processes import them from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iisan_fast.errors import InputError
from iisan_fast.ranks import Ranks, gathered


def exchanges(ranks: Ranks, rows: Tensor) -> dict[str, Any]:
    """Return what each exchange of a rank gives. rows: [N, d], equal on all ranks."""
    weight = ranks.rank + 1
    block = rows[ranks.block(len(rows))].clone().requires_grad_()
    whole = gathered(block, len(rows), ranks)
    (whole * whole * weight).sum().backward()
    sent = torch.arange(ranks.count).repeat_interleave(torch.arange(1, ranks.count + 1))
    sizes = list(range(1, ranks.count + 1))
    labelled = torch.stack([torch.full_like(sent, ranks.rank), sent], dim=1)
    return {
        "whole": whole.detach(),
        "gradient": block.grad,
        "sum": ranks.add_up(rows * weight),
        "exchanged": ranks.exchange(labelled, sizes, [ranks.rank + 1] * ranks.count),
        "values": ranks.from_all(ranks.rank),
        "first": ranks.from_first({"rank": ranks.rank}),
        "on_first": ranks.first_does(lambda: ranks.rank),
        "errors": [_message(ranks.first_does), _message(ranks.all_do)],
    }


def _message(do: Any) -> str:
    """Return the message of the InputError that all ranks get."""

    def fail() -> None:
        raise InputError("bad input")

    try:
        do(fail)
    except InputError as error:
        return str(error)
    return ""
