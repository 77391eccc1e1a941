"""Extractions on the ranks of a job with stand-ins for encoders; the processes import them from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from helpers.fake_encoders import FakeBackbone
from iisan_fast import encoders
from iisan_fast.config import ExtractionConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.ranks import ALONE, Ranks
from iisan_fast.states.shards import Shard

if TYPE_CHECKING:
    from iisan_fast.states.extraction import Extracted


def fill(
    ranks: Ranks = ALONE,
    root: Path = Path(),
    cache: Path = Path(),
    views: tuple[ViewConfig, ...] = (),
    shard: Shard | None = None,
    dry_run: bool = False,
    **settings: Any,
) -> tuple[list[Extracted], list]:
    """Extract by stand-ins, and return the counts and all contents that this process has encoded."""
    if ranks.several:
        _leave_transformers_out()
    from iisan_fast.states import extraction

    seen: list = []
    config = ExtractionConfig(**{"batch_size": 4, "dtype": "float32", **settings})
    with mock.patch.object(extraction, "load_backbones", lambda views, *_, shared: _backbones(views, seen)):
        device = torch.device("cpu")
        counts = extraction.extract(load_dataset(root), list(views), cache, device, config, dry_run, shard, ranks)
    return counts, seen


def dry_and_wet(ranks: Ranks, **options: Any) -> list[tuple[list[Extracted], list]]:
    """Return what `fill` returns in a dry run, and then in an extraction."""
    return [fill(ranks, dry_run=dry_run, **options) for dry_run in (True, False)]


def messages(
    ranks: Ranks, by_rank: Sequence[Mapping[int, Mapping[str, Any]]], **options: Any
) -> list[str | list[Extracted]]:
    """Extract once for each part of `by_rank`; return the messages of InputErrors, and the counts where there is none.

    by_rank: options of `fill` that one rank alone has.
    """
    results: list[str | list[Extracted]] = []
    for changes in by_rank:
        try:
            counts, _ = fill(ranks, **{**options, **changes.get(ranks.rank, {})})
            results.append(counts)
        except InputError as error:
            results.append(str(error))
    return results


def _leave_transformers_out() -> None:
    """Put stand-ins for the functions of encoders that extraction imports: a rank would import transformers first."""
    stand_ins = {"load_backbones": None, "views_by_model": lambda backbones: [[i] for i in range(len(backbones))]}
    vars(encoders).update(stand_ins)


def _backbones(views: list[ViewConfig], seen: list) -> list[FakeBackbone]:
    """Return a stand-in for each view."""
    return [FakeBackbone(view, seen) for view in views]
