"""Pool the maps of convolutional encoders: the mean of a map over its pixels is the state of a layer.

The maps of later stages have more channels. All layers are stored at one width, that of the widest map, and narrower
states end in zeros. A projection of such a state is a projection of the narrow one, so a model reads nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def channel_axis(maps: Sequence[Tensor]) -> int | None:
    """Return the axis of the channels, 1 or 3, of the maps of square images; None if these are no such maps.

    maps: each [N, C, H, W] or each [N, H, W, C], of which H equals W.
    """
    if any(map_.dim() != 4 for map_ in maps):
        return None
    if all(map_.shape[2] == map_.shape[3] for map_ in maps):
        return 1
    return 3 if all(map_.shape[1] == map_.shape[2] for map_ in maps) else None


def pooled_map(states: Tensor, axis: int, width: int) -> Tensor:
    """Return the mean of maps over their pixels, with zeros up to a width: [N, C, H, W] or [N, H, W, C] -> [N, width].

    axis: of the channels. states may also be [N, tokens, C], as some encoders report their last maps. The mean is
    computed in float32.
    """
    pixels = tuple(place for place in range(1, states.dim()) if place != (axis if states.dim() == 4 else 2))
    mean = states.float().mean(dim=pixels).to(states.dtype)
    return nn.functional.pad(mean, (0, width - mean.shape[1]))
