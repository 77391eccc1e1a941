"""iisan-fast bench kernels: every kernel beside its references and other libraries."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..benchmarks.settings import OPS, USERS, KernelSettings
from ..devices import torch_device
from .options import FOLDER, device_option, json_option, out_option
from .output import percent, print_json, print_table, write_result

DEFAULTS = KernelSettings()
SIZE = click.IntRange(min=1)


@click.command()
@click.argument("dataset", type=FOLDER, required=False)
@click.option("--users", type=SIZE, multiple=True, help=f"Users a batch; may be repeated. {list(USERS)}")
@click.option("--op", "ops", type=click.Choice(OPS), multiple=True, help="An op; may be repeated. [all]")
@click.option("--form", "forms", multiple=True, help="A form of the ops, as its row names it; may be repeated. [all]")
@click.option("--width", type=SIZE, default=DEFAULTS.width, help="Width of the hidden states.")
@click.option("--layers", type=SIZE, default=DEFAULTS.layers, help="Kept layers of a view.")
@click.option("--bottleneck", type=SIZE, default=DEFAULTS.bottleneck, help="Width inside the SANBs.")
@click.option("--embedding-dim", type=SIZE, default=DEFAULTS.embedding_dim, help="Width of item vectors and queries.")
@click.option(
    "--exact-users",
    type=click.IntRange(min=0),
    default=DEFAULTS.exact_users,
    help="The largest batch whose gradients are compared with fp64.",
)
@click.option("--tune", is_flag=True, help="Search launch configurations instead, and print entries of their table.")
@out_option
@device_option
@json_option
def kernels(dataset: Path | None, tune: bool, out: Path | None, device: str, as_json: bool, **values: Any) -> None:
    """Time the kernels beside their references and other libraries, on batches of DATASET or of the embedded demo.

    Without CUDA only the eager references are timed. liger-kernel and cut-cross-entropy come with the extra "bench".
    """
    from ..benchmarks import machine, ops, tuning  # imports torch, which takes seconds

    where = torch_device(device)
    values["ops"] = values["ops"] or (tuning.OPS if tune else OPS)
    settings = KernelSettings(**values)
    if tune:
        tuning.check_tunable(settings, where)
    name, sequences = machine.named_sequences(dataset)
    result: dict[str, Any] = {"command": _command(dataset, settings, tune)}
    if tune:
        configurations = tuning.tune(sequences, name, settings, where)
        result |= machine.origin(name, where) | {"entries": tuning.as_json(configurations, where)}
    else:
        result |= ops.benchmark(sequences, name, settings, where)
    write_result(out, result)
    if as_json:
        print_json(result)
    elif tune:
        click.echo(tuning.table_text(configurations, where))
    else:
        _print_rows(result)


def _command(dataset: Path | None, settings: KernelSettings, tune: bool) -> str:
    """Return the command that gives these figures again, the dataset's folder left out."""
    words = ["iisan-fast", "bench", "kernels"] + (["DATASET"] if dataset else []) + (["--tune"] if tune else [])
    words += [f"--users={count}" for count in settings.users] + [f"--op={op}" for op in settings.ops]
    words += [f"--form={form}" for form in settings.forms]
    for name in ("width", "layers", "bottleneck", "embedding_dim", "exact_users"):
        words.append(f"--{name.replace('_', '-')}={getattr(settings, name)}")
    return shlex.join(words)


def _print_rows(result: dict[str, Any]) -> None:
    """A table for every op and batch."""
    for (op, users), rows in groupby(result["rows"], key=lambda row: (row["op"], row["users"])):
        print_table(_table(op, users, list(rows), result["notes"].get(op)))
    for timed in dict.fromkeys(row["timed"] for row in result["rows"] if row["timed"]):
        rows = [row for row in result["rows"] if row["timed"] == timed]
        click.echo(f"{', '.join(dict.fromkeys(row['form'] for row in rows))}: {timed}")
    for batch, reason in result["not_measured"].items():
        click.echo(f"{batch} a batch: not measured ({reason})")


def _table(op: str, users: int, rows: list[dict[str, Any]], note: str | None) -> Table:
    sizes = ", ".join(f"{rows[0][name]:,} {name}" for name in ("rows", "items") if name in rows[0])
    table = Table(title=Text(f"{op}, {users:,} users: {sizes}, {rows[0]['dtype']}"), caption=note and Text(note))
    for column in ("", "pass"):
        table.add_column(column, no_wrap=True)
    table.add_column("p20 / p50 / p80 ms")
    for column in ("launches", "peak MiB", "gradient\nerror", "floor ms", "of floor"):
        table.add_column(column, justify="right")
    for form, passes in groupby(rows, key=lambda row: row["form"]):
        for _, group in groupby(passes, key=lambda row: row["status"] if row["p50_ms"] is None else row["pass"]):
            alike = list(group)  # one pass, or all that were not measured for one reason
            table.add_row(Text(form), alike[0]["pass"] if len(alike) == 1 else "all", *_cells(alike[0]))
        table.add_section()
    return table


def _cells(row: dict[str, Any]) -> list[Text | str]:
    """Everything but form and pass; empty where a device or a pass has no such figure."""
    times = [row[name] for name in ("p20_ms", "p50_ms", "p80_ms")]
    formats = {
        "launches": "{:,}".format,
        "peak_bytes": lambda value: f"{value / 2**20:,.1f}",
        "gradient_error": "{:.1e}".format,
        "floor_ms": "{:.3f}".format,
        "floor_share": lambda value: f"{percent(value)} %",
    }
    return [
        Text(row["status"] if None in times else " / ".join(f"{value:.3f}" for value in times)),
        *("" if row[name] is None else show(row[name]) for name, show in formats.items()),
    ]
