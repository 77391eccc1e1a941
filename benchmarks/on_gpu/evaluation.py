"""An evaluation of all users over the whole catalogue, stage by stage, from states in fp32 and in bf16."""

from __future__ import annotations

from typing import Any

import torch

from .. import evaluate
from ..machine import cuda_peak
from ..settings import EvaluateSettings
from ..stopwatch import quantiles
from .common import device_of, histories
from .settings import Save, Settings

FORMS = {"float32": evaluate.fast, "bfloat16": evaluate.bfloat16}


def measure(settings: Settings, save: Save) -> None:
    """Save the seconds of item vectors, user states and ranks, and the peak of GPU memory."""
    sequences = histories(settings)
    device = device_of(settings)
    # The dense form, which alone ranks a sample of the users, does not run here.
    chosen = EvaluateSettings(width=settings.width, layers=settings.layers, argsort_users=1)
    inputs = evaluate.make_inputs(sequences, chosen, device)
    for form in FORMS.values():  # compiles
        form(inputs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs = evaluate.measure(FORMS, inputs, settings.rounds)
    peak = cuda_peak(device)
    rows = [row_of(name, laps) for name, laps in runs.items()]
    sizes = {"users": len(inputs.split.targets), "catalogue": len(sequences.item_ids)}
    times = "; ".join(f"{row['form']} {row['evaluation']['p50_s']:.3f} s" for row in rows)
    headline = f"{sizes['users']:,} users, {sizes['catalogue']:,} items: {times}"
    save({**sizes, "forms": rows, "peak_cuda_bytes": peak, "headline": headline})


def row_of(form: str, laps: list[dict[str, float]]) -> dict[str, Any]:
    """Return the quantiles of each stage and of the whole, in which the ranking once more alone does not count."""
    whole = [sum(lap[stage] for stage in evaluate.EVALUATION["fast"]) for lap in laps]
    stages = {stage: quantiles([lap[stage] for lap in laps], "s") for stage in laps[0]}
    return {"form": form, "stages": stages, "evaluation": quantiles(whole, "s")}
