"""How figures are printed: tables for people, JSON for programs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_atomically

METRICS_ABREAST = 4  # as many columns as 80 characters hold


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))


def write_result(out: Path | None, value: Any) -> None:
    """The same as a file, where one was asked for."""
    if out is not None:
        write_atomically(out, (json.dumps(value, indent=1) + "\n").encode())


def print_result(
    result: dict[str, Any], out: Path | None, as_json: bool, table: Callable[[dict[str, Any]], Table]
) -> None:
    """A benchmark's result: into its file, then as JSON or as a table."""
    write_result(out, result)
    if as_json:
        print_json(result)
    else:
        print_table(table(result))


def command_line(name: str, dataset: Path | None, settings: dict[str, Any]) -> str:
    """How to get a benchmark's figures again, the dataset's folder left out."""
    words = ["iisan-fast", "bench", name] + (["DATASET"] if dataset else [])
    for setting, value in settings.items():
        option = setting.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}={each}" for each in (value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def mebibytes(figure: int | str) -> str:
    """Bytes as MiB; what was not measured says so."""
    return figure if isinstance(figure, str) else f"{figure / 2**20:,.0f}"


def print_counts(title: str, rows: dict[str, str]) -> None:
    """A two-column table of names and values."""
    table = Table(title=Text(title), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(Text(name), value)
    print_table(table)


def print_metrics(title: str, reports: dict[str, dict[str, Any]]) -> None:
    """Metrics in percent: for each report, history masked and unmasked, all targets, warm and cold ones."""
    any_report = next(iter(reports.values()))
    names = [name for name in any_report["masked"] if name not in ("warm", "cold")]
    parts = [names[start : start + METRICS_ABREAST] for start in range(0, len(names), METRICS_ABREAST)]
    for part in parts:
        print_table(_metrics_table(title, part, reports, _caption(any_report) if part is parts[-1] else None))


def _metrics_table(title: str, names: list[str], reports: dict[str, dict[str, Any]], caption: str | None) -> Table:
    table = Table(title=Text(title), caption=caption)
    for column in ("", "history", "targets"):
        table.add_column(column, no_wrap=True)
    for name in names:
        table.add_column(name.upper(), justify="right", no_wrap=True)
    for label, report in reports.items():
        for history in ("masked", "unmasked"):
            figures = report[history]
            for part, values in (("all", figures), ("warm", figures["warm"]), ("cold", figures["cold"])):
                table.add_row(label, history, part, *(percent(values[name]) for name in names))
        table.add_section()
    return table


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with two decimals."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def with_deviation(mean: float, deviation: float | None) -> str:
    """A mean of fractions in percent, and where there is one, its deviation."""
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"


def _caption(report: dict[str, Any]) -> str:
    warm, cold = report["masked"]["warm"]["users"], report["masked"]["cold"]["users"]
    return (
        f"percent; {report['split']} targets of {report['users']:,} users: {warm:,} warm, {cold:,} cold, "
        f"{report['unreachable']:,} in their own history (a miss when masked)"
        + ("" if report["ties"] == "half" else "; ties in the target's favour")
    )


def print_table(table: Table) -> None:
    """As wide as the terminal; 120 columns where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
