"""Tables of a result: columns say how the figures of a row are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"
QUANTILES = (0.2, 0.5, 0.8)
Row = Mapping[str, Any]
Format = str | Callable[[Any], str]  # a format string of one figure, or a function of it


@dataclass(frozen=True)
class Column:
    """One column: its head, the figures of a row that it shows, and their format.

    A figure that is text is shown as it is, and None as nothing.
    """

    head: str
    figure: str | tuple[str, ...] | Callable[[Row], Any]  # a key; keys, shown with " / " between; or a function
    format: Format = "{}"
    right: bool = True  # aligned
    wraps: bool = True  # False: its texts are never broken into lines

    def text(self, row: Row) -> str:
        """Return the column's text in a row. Raises KeyError for a row without its figure."""
        if callable(self.figure):
            return self._shown(self.figure(row))
        if isinstance(self.figure, str):
            return self._shown(row[self.figure])
        return " / ".join(self._shown(row[key]) for key in self.figure)

    def _shown(self, figure: Any) -> str:
        """Return a figure as the column formats it; text unchanged, nothing for None."""
        if figure is None:
            return ""
        if isinstance(figure, str):
            return figure
        return self.format(figure) if callable(self.format) else self.format.format(figure)


@dataclass(frozen=True)
class ResultTable:
    """A table: its title, its columns, and its rows in sections with a line between."""

    title: str
    columns: Sequence[Column]
    sections: Sequence[Sequence[Row]]
    caption: str = ""


def label(head: str, key: str | Callable[[Row], Any]) -> Column:
    """Return the column of a row's name, at the left."""
    return Column(head, key, right=False, wraps=False)


def quantile_column(head: str, unit: str, decimals: int) -> Column:
    """Return the column of p20, p50 and p80 in a unit: "ms" or "s"."""
    return Column(f"{head}p20 / p50 / p80 {unit}", quantile_keys(unit), f"{{:.{decimals}f}}", right=False, wraps=False)


def quantile_keys(unit: str) -> tuple[str, ...]:
    """Return the keys of QUANTILES in a row: "p20_s", "p50_s" and "p80_s" for the unit "s"."""
    return tuple(f"p{100 * share:.0f}_{unit}" for share in QUANTILES)


def mebibytes(figure: int) -> str:
    """Return bytes in MiB."""
    return f"{figure / 2**20:,.0f}"


def millions(figure: int) -> str:
    """Return a count in millions, with two decimals."""
    return f"{figure / 1e6:.2f}"


def percent(fraction: float) -> str:
    """Return a fraction in percent, with two decimals."""
    return f"{100 * fraction:.2f}"


def mean_with_deviation(name: str) -> Callable[[Row], str]:
    """Return a function that shows a row's mean of a metric in percent, and its deviation over seeds if it has one."""

    def shown(row: Row) -> str:
        deviation = row[f"{name}_sd"]
        return percent(row[name]) if deviation is None else f"{percent(row[name])} ± {percent(deviation)}"

    return shown
