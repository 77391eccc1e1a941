"""Functions that tests call on the ranks of a job; the processes import them from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iisan_fast
from iisan_fast.errors import InputError
from iisan_fast.ranks import Ranks, gathered, refuse_disagreement, refuse_too_few


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


def disagreements(ranks: Ranks, values: list[Mapping[str, Any]]) -> dict[str, str]:
    """Return the messages of a rank that gives values[rank], and of one that counts 1, 2 and 3 rows."""
    return {
        "values": error_of(lambda: refuse_disagreement(ranks, values[ranks.rank])),
        **{str(count): error_of(lambda count=count: refuse_too_few(ranks, count, "items")) for count in (1, 2, 3)},
    }


def errors_of_other_work(ranks: Ranks, folder: Path) -> list[str]:
    """Return the message of each call that differs between rank 0 and the others. folder: of no run and no dataset."""
    missing = folder / "none"
    calls = [
        (lambda: iisan_fast.train(missing), lambda: iisan_fast.evaluate(missing)),
        (lambda: iisan_fast.train(missing), lambda: iisan_fast.train(missing, dry_run=True)),
        (lambda: iisan_fast.train(missing), lambda: iisan_fast.train()),
        (lambda: iisan_fast.resume(missing), lambda: iisan_fast.resume(missing, epochs=3)),
        (lambda: iisan_fast.extract(missing, folder, text_encoder="x"), lambda: iisan_fast.resume(missing)),
    ]
    return [error_of(pair[ranks.rank > 0]) for pair in calls]


def error_of(work: Callable[[], Any]) -> str:
    """Return the message of the InputError that a function raises; empty if it raises none."""
    try:
        work()
    except InputError as error:
        return str(error)
    return ""


def _message(do: Any) -> str:
    """Return the message of the InputError that all ranks get."""

    def fail() -> None:
        raise InputError("bad input")

    return error_of(lambda: do(fail))
