"""iisan-fast bench static: what a training step would cost a GPU, counted without one."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from .options import FOLDER, json_option, out_option
from .output import command_line, mebibytes, print_json, print_table, write_result

USERS = (64, 8192)


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option(
    "--users", type=click.IntRange(min=1), multiple=True, help=f"Users a batch; may be repeated. {list(USERS)}"
)
@click.option("--kernels/--no-kernels", default=True, help="Compile the kernels, and read their machine code.")
@out_option
@json_option
def static(dataset: Path, users: tuple[int, ...], kernels: bool, out: Path | None, as_json: bool) -> None:
    """Count what a training step on the histories of DATASET costs a GPU: launches, memory, instructions.

    No GPU is needed, and none is used. Only the host's time for a batch is measured. The first call compiles the
    kernels, which takes minutes; Triton keeps them.
    """
    from ..benchmarks.static import StaticSettings, benchmark  # imports torch, which takes seconds

    result = benchmark(dataset, StaticSettings(users or USERS, kernels))
    result = {"command": command_line("static", dataset, result["settings"]), **result}
    write_result(out, result)
    if as_json:
        print_json(result)
        return
    print_table(_steps_table(result))
    if kernels:
        print_table(_ops_table(result["steps"]))
        for (count, architecture), rows in groupby(result["kernels"], lambda row: (row["users"], row["architecture"])):
            print_table(_kernels_table(f"{count:,} users, {architecture}", list(rows)))
    for name, note in result["notes"].items():
        click.echo(f"{name}: {note}")


def _steps_table(result: dict[str, Any]) -> Table:
    """Return the steps' figures, a column for each number of users."""
    steps = result["steps"]
    table = Table(title=Text(f"{result['dataset']}: a training step, counted; nothing ran on a GPU"))
    table.add_column("", no_wrap=True)
    for step in steps:
        table.add_column(f"{step['users']:,} users", justify="right")
    parts = dict.fromkeys(part for step in steps for part in step["launches_by_part"])
    for part in parts:
        table.add_row(f"launches of {part}", *(str(step["launches_by_part"].get(part, 0)) for step in steps))
    table.add_section()
    table.add_row("launches", *(str(step["launches"]) for step in steps))
    table.add_row("reads by the host", *(str(len(step["host_reads"])) for step in steps))
    table.add_row("padded shapes in ten epochs", *(str(step["padded_shapes"]) for step in steps))
    table.add_row("MiB moved", *(mebibytes(step["bytes"]) for step in steps))
    table.add_row("peak of allocations, MiB", *(mebibytes(step["peak_bytes"]) for step in steps))
    table.add_row("of it hidden states, MiB", *(mebibytes(step["table_bytes"]) for step in steps))
    table.add_row("host, us a batch", *(f"{step['host_us']:.0f}" for step in steps))
    for name in ("distinct", "rows", "tiles"):
        counts = (f"{step['true_counts'][name]:,} of {_bound(step['bounds'], name):,}" for step in steps)
        table.add_row(f"{name} of the first batch", *counts)
    return table


def _bound(bounds: dict[str, int], name: str) -> int:
    return bounds["tiles"] * bounds["tile_rows"] if name == "rows" else bounds[name]


def _ops_table(steps: list[dict[str, Any]]) -> Table:
    """Return the bounds beside the floors, a row for each op and number of users."""
    table = Table(title=Text("bounds of an H200, in ms"))
    table.add_column("", no_wrap=True)
    for column in ("launches", "issue", "bytes", "larger", "floor"):
        table.add_column(column, justify="right")
    for step in steps:
        for row in step["ops"]:
            figures = [f"{row[name]:.4f}" for name in ("issue_ms", "bytes_ms", "bound_ms")]
            floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.4f}"
            table.add_row(f"{row['op']}, {step['users']:,} users", str(row["launches"]), *figures, floor)
        table.add_section()
    return table


def _kernels_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return the kernels' figures, a row for each kernel of a step."""
    table = Table(title=Text(title))
    table.add_column("", no_wrap=True)
    columns = ("regis-\nters", "spilled\nbytes", "shared\nKiB", "instruc-\ntions", "in\nloops", "by\nelement")
    for column in (*columns, "copies\nahead", "issue\nms", "bytes\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        bounds = ["" if row[name] is None else f"{row[name]:.4f}" for name in ("issue_ms", "bytes_ms")]
        table.add_row(
            row["kernel"] + (f" x {row['launches']}" if row["launches"] > 1 else ""),
            str(row["registers"]),
            str(row["spilled"]),
            f"{row['shared'] / 1024:.0f}",
            f"{row['instructions']:,}",
            f"{row['loop_instructions']:,}" if row["loop_instructions"] else "",
            "" if row["per_element"] is None else f"{row['per_element']:.1f}",
            str(row["asynchronous"]) if row["loop_instructions"] else "",
            *bounds,
        )
    return table
