"""The training step of the side-network recommender on meta tensors, composed as on a GPU and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig, RunConfig, TrainConfig
from ..data import RunPlan
from ..kernels import StepOps, as_architecture
from ..models import build_recommender
from ..precision import Precision
from ..states import FeatureTable
from ..training import GpuFusedStep
from .launch_counts import LaunchCounter

ARCHITECTURES = {"sm_90": 90, "default": 89}  # whose configurations are read; sm_89 has the least shared memory
VIEWS = ("image", "title")
META = torch.device("meta")
DTYPE = torch.bfloat16  # of the hidden states and the products, as on a GPU by default


@dataclass(frozen=True)
class Sizes:
    """The sizes of the hidden states and of the model: IISAN's as published."""

    width: int = 768
    layers: int = 7
    bottleneck: int = 64
    embedding_dim: int = 64


@dataclass(frozen=True)
class CountedStep:
    """A counted step."""

    counter: LaunchCounter
    table_bytes: int  # of the hidden states
    packed: Mapping[int, Tensor]  # memory that holds the packed batch, by the address of its storage


def count_step(plan: RunPlan, architecture: str, sizes: Sizes) -> CountedStep:
    """Compose the step of a run and take it once, on meta tensors, as configured for an architecture."""
    counter = LaunchCounter()
    with as_architecture(architecture), counter:
        tables = state_tables(plan, sizes)
        step = compose(plan, tables, sizes)
        memory = step.new_ops()
        counter.forget_launches()
        for stage in step.stages(memory):
            for method in stage.methods:
                with counter.part(part_of(memory.ops, method)):
                    method()
            if stage.exchange is not None:
                with counter.part("exchange"):
                    stage.exchange()
        held = (memory.window, memory.ops.batch.batch.header)
        packed = {tensor.untyped_storage()._cdata: tensor for tensor in held}
        return CountedStep(counter, sum(table.nbytes for table in tables), packed)


def state_tables(plan: RunPlan, sizes: Sizes) -> list[Tensor]:
    """Allocate the hidden states of the catalogue, a table a view."""
    shape = (len(plan.sequences.item_ids) + 1, sizes.layers, sizes.width)
    return [torch.empty(shape, dtype=DTYPE, device=META) for _ in VIEWS]


def compose(plan: RunPlan, tables: list[Tensor], sizes: Sizes) -> GpuFusedStep:
    """Build the recommender and its step."""
    model_config = ModelConfig(bottleneck=sizes.bottleneck, embedding_dim=sizes.embedding_dim)
    train_config = TrainConfig(batch_users=plan.batch_users, precision="bfloat16")
    config = RunConfig(dataset="", cache="", views=VIEWS, model=model_config, train=train_config)
    source = FeatureTable(tuple(tables))
    precision = Precision(table=DTYPE, products=DTYPE)
    with META:
        model = build_recommender(source, config, plan.sequences.popularity, precision)
    model = model.to(META).train()
    return GpuFusedStep(model, config.train.learning_rates, source, plan, DTYPE)


def part_of(ops: StepOps, method: Callable[[], None]) -> str:
    """Return the name of a part of the step: its op and its pass."""
    op = next(name for name, pair in zip(ops._fields, ops) if pair is method.__self__)
    return f"{op}.{method.__name__}"
