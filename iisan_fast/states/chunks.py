"""Items' contents as encoders take them: in parts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Chunks(NamedTuple):
    """What one view's encoder reads of N items, on the device.

    With `order`, int64 [N], `torch.cat(results).index_select(0, order)` puts the parts' results back into the order of
    the items; without, they are in order.
    """

    parts: list[dict[str, Tensor]]  # of nearly equal size; texts of near-equal length together, the longest first
    order: Tensor | None = None
