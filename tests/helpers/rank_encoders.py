"""Take training steps with encoders that run in each step, frozen or trained, on any number of ranks."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from helpers.rank_steps import Trace, spread
from iisan_fast.config import SIDE_METHODS, ModelConfig, RunConfig, TrainConfig, UncachedConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.precision import resolve_precision
from iisan_fast.ranks import Ranks
from iisan_fast.states.input_table import EncodedTable
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 4


def encode_all(
    ranks: Ranks, dataset: Path, views: list[ViewConfig], cases: list[tuple[str, int | None]]
) -> list[tuple[Trace, int]]:
    """Return the result of `encode_in_each_step` for each method and size of parts."""
    return [encode_in_each_step(ranks, dataset, views, *case) for case in cases]


def encode_in_each_step(
    ranks: Ranks, dataset: Path, views: list[ViewConfig], method: str, items_at_once: int | None
) -> tuple[Trace, int]:
    """Return the trace of a few steps in float64, and how many items the encoders take at a time.

    items_at_once: the size of the parts in which trained encoders encode; None to choose it by the memory.
    """
    sizes = {"bottleneck": 8} if method in (*SIDE_METHODS, "adapter") else {}
    config = RunConfig(
        str(dataset),
        None,
        tuple(view.name for view in views),
        UncachedConfig(tuple(views), items_at_once=items_at_once),
        model=ModelConfig(method, embedding_dim=16, **sizes),
        train=TrainConfig(batch_users=40),
    )
    loaded = load_dataset(dataset)
    precision = resolve_precision(config, CPU)
    with open_source(config, loaded, CPU, "auto", precision) as (source, _):
        trainer = Trainer(config, loaded.sequences, source, CPU, precision, ranks=ranks)
        spread(trainer.model.double())
        if isinstance(source, EncodedTable):
            source.stored = source.dtype = torch.float64
            for backbone in source.inputs.backbones:
                backbone.model.double()
        trainer._choose_step(precision.products)  # again: the weights have moved
        losses = []
        rows = 0
        for epoch in range(STEPS // 2):
            with closing(trainer.batches(epoch)) as batches:
                for prepared in batches:
                    losses.append(trainer.take(prepared).clone())
                    rows += prepared.rows
        trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        tensors = {name: weight.detach() for name, weight in trained.items()}
        tensors |= {f"gradient of {name}": weight.grad for name, weight in trained.items()}
        encoding = trainer.memory.encoding
        part = encoding.items_at_once if encoding else 0
        return Trace(torch.stack(losses), trainer.step.record, tensors, rows, {}), part
