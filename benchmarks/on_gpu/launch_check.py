"""The launches of a captured step: as counted on meta tensors, and as nodes of the graph."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...data import RunPlan, Sequences
from ...training import GpuFusedStep, run_stages
from ..graph_nodes import LAUNCHES, captured_nodes
from ..static_step import Sizes, count_step
from ..tables import NOT_MEASURED
from ..train import FORMS, run_config
from .common import device_of, train_settings, trainer_of
from .settings import Settings


def compare_launches(sequences: Sequences, tables: list[torch.Tensor], settings: Settings) -> dict[str, Any]:
    """Count a step's launches on meta tensors, and the nodes of its graph; without CUDA the latter is not measured."""
    device = device_of(settings)
    seed = run_config(FORMS["bfloat16"], train_settings(settings)).train.seed
    plan = RunPlan.of(sequences, settings.users, seed)
    assert plan is not None, "histories of the data protocol fit into a tile"
    counted = count_step(plan, architecture_of(device), Sizes(settings.width, settings.layers)).counter.total()
    if device.type != "cuda":
        return {"launches": counted, "graph_nodes": NOT_MEASURED}
    step = trainer_of(FORMS["bfloat16"], sequences, tables, settings).step
    assert isinstance(step, GpuFusedStep), type(step)
    step.record[2] = 1  # as after a failure: nothing is trained
    run = functools.partial(run_stages, step.stages(step.new_ops()))
    run()  # compiles
    return {"launches": counted, "graph_nodes": dict(captured_nodes(run, device))}


def architecture_of(device: torch.device) -> str:
    """Return the architecture whose configurations a device takes; a CPU stands for an H200."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def disagreement(row: dict[str, Any]) -> str:
    """Return how the graph's nodes differ from the launches counted without a GPU; "" if equal or not measured.

    row: a form's row; `launches` is the count, `graph_nodes` the number of nodes by kind, or "not measured".
    """
    nodes = row["graph_nodes"]
    if nodes == NOT_MEASURED:
        return ""
    launches = sum(nodes.get(kind, 0) for kind in LAUNCHES)
    if launches == row["launches"]:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in nodes.items())
    return f"expected {row['launches']} launches as counted without a GPU, found {launches} in the graph: {kinds}"
