"""Compare the runs that the ranks of a job have loaded, before they rank together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..checksums import checksum, tensor_checksums
from ..models import NeighbourTerms, Recommender
from ..ranks import Ranks, refuse_disagreement
from .scoring import TermWeights
from .untrained_run import Popularity


class LoadedRun(Protocol):
    """A run that is loaded to rank: a BestRun or a RankingRun."""

    @property
    def epoch(self) -> int:
        """Return the epoch of the checkpoint."""

    @property
    def model(self) -> Recommender | Popularity:
        """Return what gives user states."""

    @property
    def item_vectors(self) -> Tensor:
        """Return the vectors [items, d]."""

    @property
    def terms(self) -> NeighbourTerms:
        """Return the neighbour terms."""

    @property
    def weights(self) -> TermWeights:
        """Return their weights."""


def refuse_other_runs(ranks: Ranks, run: LoadedRun, values: Mapping[str, Any]) -> None:
    """Raise InputError on all ranks if they have loaded runs with other numbers, or have other values.

    values: what has to be equal beside the run, as `refuse_disagreement` takes it.
    """
    tensors = {"item vectors": run.item_vectors}
    if isinstance(run.model, nn.Module):
        tensors |= run.model.state_dict()
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    of_run = {
        "epoch": run.epoch,
        "weights": run.weights._asdict(),
        "co-occurrence": checksum(run.terms.cooccurrence.values.data).hex(),
        **tensor_checksums(on_host),
    }
    refuse_disagreement(ranks, {"run": of_run, **values})
