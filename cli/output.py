"""Print figures: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..printable import printable
from .streams import BROKEN_PIPE, ESCAPED, discard_output

METRICS_ABREAST = 4  # columns of metrics that fit 80 characters
BASELINES = ("popularity", "neighbours")
WITHOUT_SIMILARITY = "; neighbours without similarity, which needs cached states"


class TableConsole(Console):
    """A console that leaves a closed pipe to its caller."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, in place of an exit with code 1."""
        raise BrokenPipeError


def print_json(value: Any) -> None:
    """Print a value as one JSON document on standard output."""
    print_text(json.dumps(value, indent=2))


def print_text(text: str) -> None:
    """Print text and a new line on standard output. Raises as `_checked_output` does."""
    with _checked_output():
        sys.stdout.write(f"{text}\n")


def cell(text: str) -> Text:
    """Return text from data for a table: without markup, control characters and those that the terminal lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return Text(printable(text).encode(encoding, ESCAPED).decode(encoding))


def print_counts(title: str, rows: dict[str, str]) -> None:
    """Print a table of two columns, names and values."""
    table = Table(title=cell(title), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(cell(name), cell(value))
    print_table(table)


def print_run_metrics(title: str, result: dict[str, Any], split: str) -> None:
    """Print a run's metrics in percent, beside those of the baselines, for which nothing is trained.

    There are rows for the history masked and unmasked, by all, warm and cold targets. The title has the weights of the
    terms that were added to the run's scores. The caption says if the baseline `neighbours` has no similarity.
    result: as `iisan_fast.train` and `iisan_fast.evaluate` return it; one of an earlier version may lack "neighbours"
    and "scoring". split: the name of the run's metrics in it.
    """
    reports = {result["method"]: result[split]}
    reports |= {name: result[name] for name in BASELINES if name in result and name not in reports}
    weights = ", ".join(f"{name} {weight:g}" for name, weight in result.get("scoring", {}).items() if weight)
    title = f"{title}, {weights}" if weights else title
    caption = _users_counted(result[split])
    if not result.get("neighbours", {}).get("similarity", True):
        caption += WITHOUT_SIMILARITY
    names = [name for name in result[split]["masked"] if name not in ("warm", "cold")]
    parts = [names[start : start + METRICS_ABREAST] for start in range(0, len(names), METRICS_ABREAST)]
    for part in parts:
        print_table(_metrics_table(title, part, reports, caption if part is parts[-1] else None))


def _metrics_table(title: str, names: list[str], reports: dict[str, dict[str, Any]], caption: str | None) -> Table:
    """Return the table of some metrics; caption: the text below it."""
    table = Table(title=cell(title), caption=caption)
    for column in ("", "history", "targets"):
        table.add_column(column, no_wrap=True)
    for name in names:
        table.add_column(name.upper(), justify="right", no_wrap=True)
    for label, report in reports.items():
        for history in ("masked", "unmasked"):
            figures = report[history]
            for part, values in (("all", figures), ("warm", figures["warm"]), ("cold", figures["cold"])):
                table.add_row(cell(label), history, part, *(percent(values[name]) for name in names))
        table.add_section()
    return table


def percent(fraction: float | None) -> str:
    """Return a fraction in percent with two decimals, or "-" if there is none."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _users_counted(report: dict[str, Any]) -> str:
    """Return a sentence about the users whose targets were ranked, and how the targets of one user count."""
    counted = "targets" if "targets" in report else "users"
    warm, cold = (report["masked"][part][counted] for part in ("warm", "cold"))
    number = f"{report['targets']:,} " if "targets" in report else ""
    left_out = report.get("without_history")
    return (
        f"percent; {number}{report['split']} targets of {report['users']:,} users: {warm:,} warm, {cold:,} cold, "
        f"{report['unreachable']:,} in their own history (a miss when masked)"
        + (f"; {left_out:,} more are left out, as no interaction comes before them" if left_out else "")
        + ("" if report["ties"] == "half" else "; ties in the target's favour")
        + (f"; {report['several_targets']}" if "several_targets" in report else "")
    )


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or in 120 columns if there is no terminal."""
    with _checked_output():
        TableConsole(width=table_width()).print(table)


@contextmanager
def _checked_output() -> Iterator[None]:
    """Write what the block has printed at its end.

    Raises InputError if standard output cannot be written, and SystemExit if its reader has closed it.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        discard_output()
        raise InputError(
            f"standard output: {error.strerror}; its text is incomplete; make room and run again"
        ) from None


def table_width() -> int:
    """Return the columns that a table may take: the terminal's, or 120 if there is no terminal."""
    console = Console()
    return console.width if console.is_terminal else 120
