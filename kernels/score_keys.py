"""A score and its item's row in one int64: of two keys the larger one is the better item, and no two are equal.

Ties are broken by the row: of equal scores the lower row has the larger key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # half precision is widened, which rounds nothing
HIGHEST_ROW = (1 << 32) - 1
NO_ITEM = ~int(torch.tensor(torch.inf).view(torch.int32)) << 32  # below the key of every finite score


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """Return the int64 keys of scores and the rows of their items, of shapes that broadcast; -0.0 equals 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, negative numbers would fall as they rise
    return (ordered.long() << 32) + (HIGHEST_ROW - rows)


def unpack(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows and the scores of keys; they are -1 and minus infinity for `NO_ITEM` and scores as low."""
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    rows = HIGHEST_ROW - (keys & HIGHEST_ROW)
    return rows.masked_fill_(scores == -torch.inf, -1), scores.to(dtype)


def best_of_keys(keys: Tensor, broken: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows and scores [U, count] of keys [U, at most count], -1 and minus infinity behind them.

    broken: bool [U], the users with a score that is not finite; they get -1 and NaN everywhere.
    """
    missing = count - keys.shape[1]
    rows, scores = unpack(F.pad(keys, (0, missing), value=NO_ITEM), dtype)
    return rows.masked_fill_(broken[:, None], -1), scores.masked_fill_(broken[:, None], torch.nan)
