"""Data that several stages share: histories of the dataset, random hidden states, trainers on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data import Sequences, load_dataset
from ...devices import torch_device
from ...training import Trainer
from .. import machine
from ..captures import call_again_for_graphs
from ..settings import TrainSettings
from ..tables import NOT_MEASURED
from ..train import FORMS, TrainingForm, new_trainer
from .settings import Settings


def device_of(settings: Settings) -> torch.device:
    """Return the device, the current one of its kind. Raises InputError for a GPU that is not there."""
    device = torch_device(settings.device)
    return torch.device(device.type, torch.cuda.current_device() if device.type == "cuda" else None)


def origin_of(settings: Settings) -> dict[str, Any]:
    """Return where figures come from: the dataset's name, the commit, the machine and the versions."""
    origin = machine.origin(settings.dataset.name, device_of(settings))
    return origin | {"commit": origin["commit"] or settings.commit or NOT_MEASURED}


def histories(settings: Settings) -> Sequences:
    """Load the dataset's histories."""
    return load_dataset(settings.dataset).sequences


def train_settings(settings: Settings, users: int | None = None) -> TrainSettings:
    """Return the benchmark's settings of these sizes. users: of a batch; None: as the settings have."""
    return TrainSettings(users=users or settings.users, width=settings.width, layers=settings.layers)


def random_states(sequences: Sequences, settings: Settings) -> list[Tensor]:
    """Draw two views' hidden states on the device: bf16 [items + 1, layers, width], row 0 zeros."""
    device = device_of(settings)
    generator = torch.Generator(device).manual_seed(0)
    shape = len(sequences.item_ids) + 1, settings.layers, settings.width
    tables = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for table in tables:
        table[0] = 0
    return tables


def trainer_of(form: TrainingForm, sequences: Sequences, tables: list[Tensor], settings: Settings) -> Trainer:
    """Make a trainer at its first weights; in a dry run calls stand in for its graphs."""
    trainer = new_trainer(form, sequences, tables, train_settings(settings), device_of(settings))
    if settings.dry_run and form.captured:
        call_again_for_graphs(trainer)
    return trainer


def captured_forms(settings: Settings) -> dict[str, TrainingForm]:
    """Return the forms whose steps are captured, the one that training takes by default first."""
    forms = {name: FORMS[name] for name in ("bfloat16", "float32")}
    return {name: form for name, form in forms.items() if form.runs_on(device_of(settings))}
