"""Build the neighbour terms of a run from its histories and its cache, and keep them in its folder.

neighbours.safetensors holds the co-occurrence matrix, and for a run with a cache the coordinates of its items with the
mean and the basis that project further items. It can be made again from sequences.npz and the cache.
"""

from __future__ import annotations

import logging

import safetensors
import safetensors.torch
from torch import Tensor

from ..config import RunConfig
from ..data import Sequences
from ..errors import InputError
from ..models import CoOccurrence, NeighbourTerms, Similarity
from .item_sources import Descriptions, open_final_states, refuse_changed_views
from .run_folder import RunFolder

LOGGER = logging.getLogger(__name__)
ITEMS_AT_ONCE = 1 << 17  # whose coordinates are read at once: 64 MiB at 128 dimensions


def build_terms(config: RunConfig, sequences: Sequences) -> tuple[NeighbourTerms, Descriptions]:
    """Return the neighbour terms of a run, and the descriptions of the views that they are made from.

    There is no similarity and no view without stored states. Raises InputError if the cache, a view or an item's states
    are missing or damaged.
    """
    cooccurrence = CoOccurrence.of(sequences, config.scoring.cooccurrence_neighbours)
    if not config.has_states:
        return NeighbourTerms(cooccurrence, None), {}
    with open_final_states(config, sequences.item_ids) as (source, views):
        return NeighbourTerms(cooccurrence, Similarity.of(source, config.scoring.similarity_dims)), views


def file_of_terms(terms: NeighbourTerms) -> bytes:
    """Return the content of neighbours.safetensors."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in terms.tensors().items()})


def read_terms(folder: RunFolder) -> NeighbourTerms:
    """Return the neighbour terms in a run's folder. Raises InputError if the file is missing or damaged.

    The tensors lie in the file, of which parts come into memory where they are read.
    """
    remedy = how_to_make_again(folder)
    path = folder.check_neighbours(remedy)
    try:
        return NeighbourTerms.of_tensors(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, InputError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder.neighbours}: damaged: {error}; {remedy}") from None


def copy_coordinates(folder: RunFolder, similarity: Similarity, target: Tensor) -> None:
    """Copy the coordinates of a run's items, those of `similarity`, into a tensor [items, dims].

    They are read from the run's file in parts, so that the file is never in memory as a whole.
    """
    if not folder.neighbours.exists():
        target.copy_(similarity.vectors)
        return
    for first in range(0, len(target), ITEMS_AT_ONCE):
        part = slice(first, first + ITEMS_AT_ONCE)
        with safetensors.safe_open(folder.neighbours, framework="pt") as file:  # closed, it leaves the memory
            target[part] = file.get_slice("similarity.vectors")[part]


def how_to_make_again(folder: RunFolder) -> str:
    """Return what to do about a damaged neighbours.safetensors."""
    return (
        f"`iisan-fast train --resume {folder.path}` makes it again from the run's histories and its cache or features"
    )


def terms_of_run(folder: RunFolder, config: RunConfig, sequences: Sequences, similarity: bool) -> NeighbourTerms:
    """Return the neighbour terms in a run's folder; build those of a run of an earlier version, which has none.

    similarity: demand it. Otherwise it is left out, with a message, if the run's cache cannot be read. Raises
    InputError if the file is damaged or was lost, or if similarity is demanded and the run has none.
    """
    if folder.neighbours.exists() or folder.is_recorded(folder.neighbours.name):
        terms = read_terms(folder)
        _refuse_other_items(folder, terms, sequences)
    elif not config.has_states:
        terms, _ = build_terms(config, sequences)
    else:
        terms = _terms_of_earlier_run(folder, config, sequences, similarity)
    if similarity and terms.similarity is None:
        raise InputError(
            f"{folder.path}: similarity compares states of a cache, and this run of {config.model.method} has none; "
            "leave it out, or train with a cache"
        )
    return terms


def damage_of_terms(folder: RunFolder) -> str:
    """Return why a run's neighbours.safetensors cannot be used; "" if it can, or if an earlier version wrote none."""
    if not folder.neighbours.exists() and not folder.is_recorded(folder.neighbours.name):
        return ""
    try:
        read_terms(folder)
    except InputError as error:
        return str(error)
    return ""


def terms_again(folder: RunFolder, config: RunConfig, sequences: Sequences) -> bytes | None:
    """Return the content for a neighbours.safetensors that is damaged, lost, or was never written; None if it is whole.

    config: of the run, with its cache's place of now. Raises InputError if the cache has changed since the run began.
    """
    damage = damage_of_terms(folder)
    if not damage and folder.neighbours.exists():
        return None
    if damage:
        LOGGER.warning("%s", damage)
    return file_of_terms(_rebuilt(folder, config, sequences))


def _terms_of_earlier_run(
    folder: RunFolder, config: RunConfig, sequences: Sequences, similarity: bool
) -> NeighbourTerms:
    """Build the terms of a run that has no neighbours.safetensors and read a cache. Raises as `terms_of_run` does."""
    try:
        return _rebuilt(folder, config, sequences)
    except InputError as error:
        if similarity:
            raise InputError(
                f"{folder.path}: has no {folder.neighbours.name}, and its cache cannot give similarity: {error}"
            ) from None
        LOGGER.info("%s: neighbours without similarity, because %s", folder.path, error)
    return NeighbourTerms(CoOccurrence.of(sequences, config.scoring.cooccurrence_neighbours), None)


def _rebuilt(folder: RunFolder, config: RunConfig, sequences: Sequences) -> NeighbourTerms:
    """Return a run's terms, built again. Raises InputError if its cache cannot be read, or has changed since."""
    terms, views = build_terms(config, sequences)
    if config.has_states:
        refuse_changed_views(folder.views, views, folder.path)
    return terms


def _refuse_other_items(folder: RunFolder, terms: NeighbourTerms, sequences: Sequences) -> None:
    """Raise InputError if the terms are of another number of items than the run."""
    items = len(terms.cooccurrence.offsets) - 1
    if items != len(sequences.item_ids):
        raise InputError(
            f"{folder.neighbours}: expected {len(sequences.item_ids)} items, found {items}; {how_to_make_again(folder)}"
        )
