"""The loss, the side network and the rank alone, at a large batch and a small one, by replays of a graph."""

from __future__ import annotations

from typing import Any

from ..ops import kernel_rows
from ..settings import KernelSettings
from .common import device_of, histories
from .settings import Save, Settings

OPS = ("loss", "side-network", "target-rank")


def measure(settings: Settings, save: Save) -> None:
    """Save the kernels' rows, then those of the eager references."""
    sequences = histories(settings)
    device = device_of(settings)
    rows: list[dict[str, Any]] = []
    many_users = min(settings.many_users, len(sequences.user_ids))
    kernels = "eager" if settings.dry_run else "triton"
    for form, users in ((kernels, many_users), (kernels, settings.users), ("eager", many_users)):
        sizes = {"width": settings.width, "layers": settings.layers}
        chosen = KernelSettings(users=(users,), ops=OPS, forms=(form,), exact_users=many_users, **sizes)
        result = kernel_rows(sequences, settings.dataset.name, chosen, device)
        rows += result["rows"]
        save({"rates_of_the_floors": result["rates_of_the_floors"], "rows": rows, "headline": headline(rows)})


def headline(rows: list[dict[str, Any]]) -> str:
    """Return a line on the passes that were timed."""
    return "; ".join(
        f"{row['op']} {row['form']} {row['users']} {row['pass']} "
        + (row["status"] if row["p50_ms"] is None else f"{row['p50_ms']:.3f} ms")
        for row in rows
    )
