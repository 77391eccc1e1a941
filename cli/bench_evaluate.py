"""iisan-fast bench evaluate: evaluation beside that of the released research code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..devices import torch_device
from .options import FOLDER, device_option, json_option, out_option
from .output import command_line, mebibytes, print_result

SIZE = click.IntRange(min=1)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Whose targets are ranked.")
@click.option("--width", type=SIZE, default=768, help="Width of the hidden states, which are random.")
@click.option("--layers", type=SIZE, default=7, help="Kept layers of a view.")
@click.option(
    "--argsort-users",
    type=click.IntRange(min=0),
    help="Users whom the dense form ranks, spread over all; 0: all. [2000, or all if fewer]",
)
@click.option("--rounds", type=SIZE, default=5, help="Runs of each form.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@out_option
@device_option
@json_option
def evaluate(dataset: Path | None, out: Path | None, device: str, as_json: bool, **values: Any) -> None:
    """Time the evaluation beside the released research code's, on the histories of DATASET or of the embedded demo.

    The ranks of both must agree. Without CUDA its memory is not measured.
    """
    from ..benchmarks.evaluate import EvaluateSettings, benchmark  # imports torch, which takes seconds

    settings = EvaluateSettings(**values)
    result = benchmark(dataset, settings, torch_device(device))
    result = {"command": command_line("evaluate", dataset, result["settings"]), **result}
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['users']:,} users of {result['dataset']}, {result['catalogue']:,} items"
    table = Table(title=Text(title), caption=_caption(result))
    for column in ("", "", "p20 / p50 / p80 s"):
        table.add_column(column, no_wrap=True)
    for column in ("users ranked", "all users, s", "users a second", "peak MiB", "peak CUDA MiB"):
        table.add_column(column, justify="right")
    for part in ("ranking", "evaluation"):
        for row in result["forms"]:
            figures = row[part]
            whole = figures["all_users"]
            memory = [mebibytes(row[name]) if part == "evaluation" else "" for name in PEAKS]
            table.add_row(
                part,
                row["form"],
                " / ".join(f"{figures[name]:.3f}" for name in ("p20_s", "p50_s", "p80_s")),
                f"{figures['measured_users']:,}",
                f"{whole['p50_s']:.3f}{' (scaled)' if whole['scaled'] else ''}",
                f"{figures['users_per_second']:,.0f}",
                *memory,
            )
        table.add_section()
    return table


PEAKS = ("peak_pss_bytes", "peak_cuda_bytes")


def _caption(result: dict[str, Any]) -> str:
    ratios, found = result["ratios"], result["agreement"]
    how = " (scaled)" if result["ratios_scaled"] else ""
    return (
        f"dense / fast{how}: {ratios['ranking']:.1f} in ranking, {ratios['evaluation']:.1f} in the evaluation; "
        f"ranks of {found['users']:,} users agree within {found['largest_rank_difference']:.0f}"
    )
