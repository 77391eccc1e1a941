"""Select the hidden states that a view keeps: by number, the last of each group of blocks, or every second one."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ViewConfig
from ..errors import InputError


def selected_layers(view: ViewConfig, depth: int, first: int = 0, all_by_default: bool = False) -> tuple[int, ...]:
    """Return the numbers of the hidden states that the view keeps, ascending; 0 is the embedding output.

    depth: the number of the encoder's hidden states. first: the first one that can be kept, above 0 for an encoder in
    stages. all_by_default: if a view that names no layers keeps all. Raises InputError, which names the encoder, if the
    view asks for layers that the encoder does not have.
    """
    try:
        if view.layer_groups is not None:
            return grouped_layers(depth - 1, view.layer_groups, first)
        if view.layers is not None:
            return ordered_layers(view.layers, depth - 1, first)
    except InputError as error:
        raise InputError(f"{view.encoder}: {error}") from None
    if all_by_default:
        return tuple(range(first, depth))
    return tuple(first + layer for layer in default_layers(depth - first))


def default_layers(depth: int) -> tuple[int, ...]:
    """Return 0 and every second of `depth` hidden states, counted back from the last (LayerDrop by pairs).

    For depth 13 these are 0, 2, 4, …, 12.
    """
    return tuple(sorted({0, *range(depth - 1, 0, -2)}))


def grouped_layers(blocks: int, groups: int, first: int = 0) -> tuple[int, ...]:
    """Return 0, the embedding output, and the last block of each of `groups` even groups of an encoder's blocks.

    blocks: the number of blocks. first: takes the place of 0 for an encoder in stages. Raises InputError for less than
    one group, or more groups than blocks.
    """
    blocks -= first
    if not 1 <= groups <= blocks:
        raise InputError(f"layer_groups: expected 1 to {blocks}, the encoder's blocks, found {groups}")
    return (first, *(first + group * blocks // groups for group in range(1, groups + 1)))


def ordered_layers(layers: Sequence[int], last: int, first: int = 0) -> tuple[int, ...]:
    """Return the layers as a tuple. Raises InputError if they are not ascending numbers from `first` to `last`."""
    in_range = bool(layers) and layers[0] >= first and layers[-1] <= last
    ascending = all(lower < higher for lower, higher in zip(layers, layers[1:]))
    if not (in_range and ascending):
        named = ",".join(map(str, layers)) or "none"
        allowed = f"{first}..{last}" + (", its last stage" if first else "")
        raise InputError(f"layers: expected ascending numbers within {allowed}, found {named}")
    return tuple(layers)
