"""The released code's step beside the captured one, from the same weights on the same batches, in turns."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..stopwatch import quantiles
from ..train import FORMS, follow, largest_difference, start, timed
from .common import captured_forms, device_of, histories, random_states, train_settings
from .settings import Save, Settings

STEPS = 3  # of each form in a round


def measure(settings: Settings, save: Save) -> None:
    """Save the step's time in every form, the ratio to the dense form's, and how far the losses lie apart."""
    sequences = histories(settings)
    device = device_of(settings)
    sizes = train_settings(settings)
    tables = random_states(sequences, settings)
    forms = {"dense": FORMS["dense"], **captured_forms(settings)}
    started = {name: start(form, sequences, tables, sizes, device) for name, form in forms.items()}
    for form in started.values():
        form.capture()
    losses = {name: follow(form.step, settings.steps) for name, form in started.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(settings.rounds):
        for name, form in started.items():
            times[name] += timed(form.step, STEPS, device)
        save(result_of(times, losses))


def result_of(times: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return a row for every form, and a line on all."""
    rows = [
        {
            "form": name,
            **quantiles(milliseconds, "ms"),
            "ratio": median(times["dense"]) / median(milliseconds),
            "largest_loss_difference": largest_difference(losses[name], losses["dense"]),
        }
        for name, milliseconds in times.items()
    ]
    parts = [f"{row['form']} {row['p50_ms']:.2f} ms ({row['ratio']:.1f} times as fast)" for row in rows]
    return {"rounds": len(times["dense"]), "forms": rows, "headline": "; ".join(parts)}
