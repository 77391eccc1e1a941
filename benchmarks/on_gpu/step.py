"""Run one training step in every form and compare its loss and gradients with the reference in fp64."""

from __future__ import annotations

import time
import traceback
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...data import Sequences, epoch_batches
from ...models import Recommender, build_recommender
from ...precision import Precision
from ...states import FeatureTable
from ...training import deterministic
from ..machine import synchronise
from ..train import FORMS, TrainingForm, form_of_ops, run_config
from .common import device_of, histories, random_states, train_settings, trainer_of
from .launch_check import compare_launches, disagreement
from .settings import Save, Settings

PERTURBATION = 0.02  # of all weights, so that gates and biases are seen to act
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 1e-1)}  # of the loss and of all gradients together, relative
MORE_STEPS = 3  # after the first, which compiles and captures
REASON_LENGTH = 300


@dataclass(frozen=True)
class Differentiated:
    """The loss and the gradients of one step, in fp64."""

    loss: float
    gradients: dict[str, Tensor]


def measure(settings: Settings, save: Save) -> None:
    """Save a row for every form, then the count of the captured step's launches.

    Raises SystemExit where a form does not run or leaves the reference, or the graph has other launches than counted.
    """
    sequences = histories(settings)
    tables = random_states(sequences, settings)
    with deterministic():
        exact = reference_step(sequences, tables, settings)
        rows: list[dict[str, Any]] = []
        for name, form in forms_of(settings).items():
            rows.append(row_of(name, form, sequences, tables, exact, settings))
            save({"reference_loss": exact.loss, "forms": rows, "headline": headline(rows)})
        counted = compare_launches(sequences, tables, settings)
    save({"reference_loss": exact.loss, "forms": rows, "counted": counted, "headline": headline(rows)})
    if differs := disagreement(counted):
        raise SystemExit(f"step: {differs}")
    if wrong := [row["form"] for row in rows if row["status"] != "agrees"]:
        raise SystemExit(f"step: {', '.join(wrong)}: see the rows of its result")


def forms_of(settings: Settings) -> dict[str, TrainingForm]:
    """Return the forms of the step, the one that training takes by default first after its eager twin."""
    fp32 = FORMS["float32"]
    forms = {
        "eager bfloat16": FORMS["eager"],
        "captured bfloat16": FORMS["bfloat16"],
        "eager float32": replace(fp32, captured=False),
        "captured float32": fp32,
        "reference ops, float32": replace(FORMS["reference ops"], captured=False),
    }
    return {name: form for name, form in forms.items() if form.runs_on(device_of(settings))}


def reference_step(sequences: Sequences, tables: list[Tensor], settings: Settings) -> Differentiated:
    """Compute the first step's loss and gradients by the reference ops in fp64, on the device."""
    device = device_of(settings)
    config = run_config(FORMS["float32"], train_settings(settings))
    table = FeatureTable(tuple(view.double() for view in tables))
    precision = Precision(table=torch.float64, products=torch.float64)
    model = build_recommender(table, config, sequences.popularity, precision).to(device).double().train()
    perturb(model)
    batch = next(epoch_batches(sequences, settings.users, config.train.seed, 0)).to(device)
    with form_of_ops(FORMS["reference ops"].ops):
        loss = model.loss(batch, table.read(batch.distinct))
    loss.backward()
    return differentiated(model, loss)


def perturb(model: Recommender) -> None:
    """Add the same small random numbers to the weights of any model of this shape."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += PERTURBATION * noise.to(parameter)


def differentiated(model: Recommender, loss: Tensor) -> Differentiated:
    """Copy a loss and the gradients that it left in the model."""
    gradients = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
    return Differentiated(float(loss.detach()), {name: gradient.clone() for name, gradient in gradients.items()})


def row_of(
    name: str, form: TrainingForm, sequences: Sequences, tables: list[Tensor], exact: Differentiated, settings: Settings
) -> dict[str, Any]:
    """Run a form's first steps and compare the first with the reference; a form that fails says why."""
    row: dict[str, Any] = {"form": name}
    try:
        with form_of_ops(form.ops):
            trainer = trainer_of(form, sequences, tables, settings)
            perturb(trainer.model)
            with closing(trainer.batches(0)) as batches:
                started = time.perf_counter()
                first = differentiated(trainer.model, trainer.take(next(batches)))
                row["first_step_s"] = time.perf_counter() - started
                losses = [trainer.take(batch).clone() for batch in islice(batches, MORE_STEPS)]
                synchronise(trainer.device)
        row |= compare(first, exact, form.precision or "float32") | {"next_losses": [float(loss) for loss in losses]}
        if failed := trainer.step.read().failed_step:
            row |= {"status": "fails", "reason": f"the loss of step {failed} is not finite"}
    except Exception as error:  # a form that does not run is a result too, and the next may run
        traceback.print_exc()
        row |= {"status": "fails", "reason": f"{type(error).__name__}: {error}"[:REASON_LENGTH]}
    return row


def compare(result: Differentiated, exact: Differentiated, precision: str) -> dict[str, Any]:
    """Return the relative errors of the loss, of all gradients together and of the worst parameter."""
    errors = {}
    squares = 0.0
    scale = 0.0
    for name, right in exact.gradients.items():
        difference, norm = float((result.gradients[name] - right).norm()), float(right.norm())
        errors[name] = difference / norm if norm else difference
        squares, scale = squares + difference**2, scale + norm**2
    worst = max(errors, key=errors.__getitem__)
    figures = {
        "loss_error": abs(result.loss - exact.loss) / abs(exact.loss),
        "gradient_error": (squares / scale) ** 0.5,
    }
    limits = dict(zip(figures, LIMITS[precision]))
    agrees = all(figures[name] <= limit for name, limit in limits.items())
    status = "agrees" if agrees else "leaves the reference"
    return {**figures, "worst": {worst: errors[worst]}, "limits": limits, "status": status}


def headline(rows: list[dict[str, Any]]) -> str:
    """Return one line that names each form, its status, and the error of its gradients if that was computed."""
    parts = [
        f"{row['form']} {row['status']}"
        + (f" (gradients {row['gradient_error']:.1e})" if "gradient_error" in row else "")
        for row in rows
    ]
    return "; ".join(parts)
