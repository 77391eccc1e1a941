"""Find the items most similar to an item, by the vectors of the model or by the contents."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..errors import InputError, check_choice
from .ranked_items import RankedItem, ranked_items
from .recommendation import refuse_unfit_count
from .trained_model import TrainedModel

BY = ("vectors", "content")


def similar(model: TrainedModel, item_id: str, k: int = 10, by: str = "vectors") -> list[RankedItem]:
    """Return the items most similar to an item, best first, with the cosine similarity as score.

    The item itself and removed items are left out; the item may be a removed one. Of equally similar items the lower
    number comes first. k: the items to return, at most the catalogue; there are fewer if fewer are left. by: "vectors"
    compares the item vectors of the model, "content" the frozen states, by their coordinates. Raises InputError for an
    unknown item, for a k or a word that does not fit, and for "content" in a run without states.
    """
    check_choice("by", by, BY)
    catalogue = model.catalogue
    catalogue.refuse_unknown([item_id], "item_id")
    refuse_unfit_count(k, catalogue)
    row = catalogue.numbers[item_id] - 1
    directions = torch.nn.functional.normalize(_compared(model, by))
    excluded = torch.tensor([[row]], device=directions.device)
    allowed = torch.from_numpy(~catalogue.is_removed).to(directions.device)
    rows, scores = kernels.top_items(directions[row : row + 1], directions, k, excluded, allowed=allowed)
    return ranked_items((rows[0] + 1).tolist(), scores[0].tolist(), catalogue)


def _compared(model: TrainedModel, by: str) -> Tensor:
    """Return the numbers [items, width] by which items are compared. Raises InputError if there are none."""
    if by == "vectors":
        return model.catalogue.vectors
    if model.catalogue.coordinates is None:
        raise InputError(f"{model.run}: by: content compares the states of a cache, and this run has none; use vectors")
    if not model.catalogue.coordinates.shape[1]:
        raise InputError(
            f"{model.run}: by: the states of all items are equal, so no content is like another; use vectors"
        )
    return model.catalogue.coordinates
