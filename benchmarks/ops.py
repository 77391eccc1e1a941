"""The kernels beside their references and other libraries: time, launches, memory, gradient error, floor.

Every form of an op runs on the same batch of a dataset, its distinct items once, in one process. A row that could not
be measured says why.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..data import Sequences
from ..errors import InputError
from ..progress import progress_bar
from .floors import device_rates
from .harness import Setup
from .machine import on
from .op_cases import OpCase, make_cases, random_tables
from .op_rows import measure_case
from .settings import USERS, KernelSettings, refuse_more
from .tuning import tuned_entries

NOTES = {
    "side-network": "bf16: the reference under autocast, with the products in bf16 that triton has; otherwise in fp32",
    "loss-unmasked": "neither masked nor debiased, which is all that liger-kernel (whose forward already makes the "
    "gradients) and cut-cross-entropy (exact: filter_eps=None) can do",
    "target-rank-float32": "as evaluation ranks; no floor, since those of the others count bf16 products",
}
MOST_CPU_USERS = 512  # of a batch, where no number is given


def measure_kernels(setup: Setup, settings: KernelSettings) -> dict[str, Any]:
    """Return a row for every op, batch, form and pass; or, with `tune`, the best launch configurations.

    Raises InputError for a form that an op does not have, for more users than the dataset has, and for settings that
    tuning does not take.
    """
    settings = replace(settings, ops=settings.op_names)
    if settings.tune:
        return {"settings": asdict(settings), "entries": tuned_entries(setup, settings)}
    return {"settings": asdict(settings), **kernel_rows(setup.sequences, setup.name, settings, setup.device)}


def kernel_rows(sequences: Sequences, name: str, settings: KernelSettings, device: torch.device) -> dict[str, Any]:
    """Measure every op, batch, form and pass."""
    users, left_out = batch_sizes(sequences, name, settings, device)
    measured = []
    with progress_bar("benchmark", len(users) * len(settings.op_names), "ops") as advance, on(device):
        tables = random_tables(sequences, settings, device)
        for count in users:
            for case in make_cases(sequences, count, tables, settings, device):
                measured += measure_case(chosen_forms(case, settings), device, exact=count <= settings.exact_users)
                advance(1, f"{case.op}, {count:,} users")
    rates = device_rates(device)
    return {
        "shapes": {"width": settings.width, "layers": settings.layers, "bottleneck": settings.bottleneck}
        | {"embedding_dim": settings.embedding_dim, "catalogue": len(sequences.item_ids), "seed": settings.seed},
        "rates_of_the_floors": rates and asdict(rates),
        "notes": {op: NOTES[op] for op in settings.op_names if op in NOTES},
        "not_measured": left_out,
        "rows": measured,
    }


def chosen_forms(case: OpCase, settings: KernelSettings) -> OpCase:
    """Return the case with the forms that the settings name. Raises InputError for a form that it does not have."""
    if settings.forms is None:
        return case
    for name in settings.forms:
        if name not in case.forms:
            raise InputError(f"--form {name!r}: expected one of {'; '.join(case.forms)}, the forms of {case.op}")
    return replace(case, forms={name: form for name, form in case.forms.items() if name in settings.forms})


def batch_sizes(
    sequences: Sequences, name: str, settings: KernelSettings, device: torch.device
) -> tuple[list[int], dict[str, str]]:
    """Return the numbers of users a batch, and why other default numbers are left out.

    Raises InputError for a given number that is larger than the dataset's users.
    """
    most = len(sequences.user_ids)
    if settings.users is not None:
        for count in settings.users:
            refuse_more("--users", count, most, f"the users of {name}")
        return list(dict.fromkeys(settings.users)), {}
    left_out = {count: f"{name} has {most:,} users" for count in USERS if count > most}
    if device.type != "cuda":
        left_out |= {count: "needs CUDA, or --users" for count in USERS if count > MOST_CPU_USERS}
    chosen = [count for count in USERS if count not in left_out] or [most]
    return chosen, {f"{count:,} users": reason for count, reason in left_out.items()}
