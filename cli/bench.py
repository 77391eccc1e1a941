"""iisan-fast bench: one command for each benchmark, made from its description."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..benchmarks.catalogue import BENCHMARKS
from ..benchmarks.harness import NONE, OPTIONAL, Benchmark, Setup, imported, run_benchmark, write_result
from ..benchmarks.tables import Column, ResultTable
from ..config import ViewConfig
from ..devices import torch_device
from ..errors import InputError
from ..printable import printable
from ..ranks import joined_ranks
from ..setting_fields import settings_of
from .help_pages import BENCHMARK, ENCODERS, OUTPUT, GroupedHelp, group, option
from .options import FILE, FOLDER, device_option, out_option, output_options, writable_file
from .output import cell, print_json, print_table, print_text, table_width
from .setting_options import Spelling, given_settings, setting_options
from .verbosity import verbosity_options
from .views import chosen_views, parsed_view, view_options

BORDERS = 3  # characters of a column beside its text: a line and a blank at each side
ABOUT_ENCODERS = ("attention", "missing_images")  # settings that stand under the heading of the encoders
PLOT_HELP = "A PNG file for a plot; needs matplotlib."
PAIR_HELP = 'A named set of encoders, "NAME: VIEW; VIEW", each VIEW as --view takes it; may be repeated.'


EXAMPLES = ("iisan-fast bench train DATASET", "iisan-fast bench kernels DATASET --out kernels.json")


@group(examples=EXAMPLES, short_help="Measure speed, memory and accuracy beside a reference.")
@verbosity_options
def bench() -> None:
    """Measure speed, memory and accuracy, side by side with the reference."""


def bench_command(benchmark: Benchmark) -> click.Command:
    """Return the command that runs a benchmark, with an option for each of its settings."""

    def run(dataset: Path | None = None, **options: Any) -> None:
        _run(benchmark, dataset, options)

    run.__doc__ = f"{benchmark.summary}\n\n{benchmark.details}"
    command: Any = run
    for decorate in reversed(_decorators(benchmark)):
        command = decorate(command)
    return click.command(benchmark.name, cls=GroupedHelp, examples=benchmark.examples)(command)


def _decorators(benchmark: Benchmark) -> list[Callable[[Any], Any]]:
    """Return the decorators of a command: its argument and its options, in the order of its help page."""
    decorators: list[Callable[[Any], Any]] = []
    if benchmark.dataset != NONE:
        metavar = None if benchmark.argument == "DATASET" else benchmark.argument  # click adds the brackets by itself
        required = benchmark.dataset != OPTIONAL
        decorators.append(click.argument("dataset", metavar=metavar, type=FOLDER, required=required))
    headings = {name: ENCODERS if name in ABOUT_ENCODERS else BENCHMARK for name in settings_of(benchmark.settings)}
    decorators.append(setting_options(benchmark.settings, headings, spellings=_spellings(benchmark)))
    if benchmark.takes_encoders:
        decorators += [view_options, option("--pair", "pairs", group=ENCODERS, multiple=True, help=PAIR_HELP)]
    if (folder := benchmark.folder) is not None:
        of_folder = {"group": BENCHMARK, "type": FOLDER, "required": folder.required, "help": folder.help}
        decorators.append(option(f"--{folder.name}", "folder", **of_folder))
    if benchmark.drawing:
        decorators.append(option("--plot", group=OUTPUT, type=FILE, callback=writable_file, help=PLOT_HELP))
    decorators.append(out_option)
    if benchmark.on_device:
        decorators.append(device_option)
    return [*decorators, output_options]


def _spellings(benchmark: Benchmark) -> Mapping[str, Spelling]:
    """Return the options whose names differ from their settings; names of forms may hold commas."""
    spellings = {}
    for name, flag in benchmark.option_names.items():
        spellings[name] = Spelling(f"--{flag}", commas=name != "forms")
    return spellings


def _run(benchmark: Benchmark, dataset: Path | None, options: dict[str, Any]) -> None:
    """Run a benchmark by the options that were given; write and print its result.

    Raises InputError if a plot is asked for and matplotlib is not installed.
    """
    plot = options.pop("plot", None)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: needs matplotlib; pip install 'iisan-fast[bench]'")
    settings = given_settings(options, benchmark.settings, spellings=_spellings(benchmark))
    if benchmark.takes_encoders:
        settings["encoders"] = _encoder_sets(options)
    device = torch_device(options.get("device", "cpu"))
    setup = Setup(dataset, device, options.get("folder"), joined_ranks(f"bench {benchmark.name}"))
    result = run_benchmark(benchmark, benchmark.settings(**settings), setup)
    if not setup.ranks.is_first:
        return
    if options["out"] is not None:
        write_result(options["out"], result)
    if plot is not None:
        imported(benchmark.drawing)(result, plot)
    if options["as_json"]:
        print_json(result)
        return
    for part in benchmark.tables(result):
        if isinstance(part, str):
            print_text(printable(part))
        else:
            print_table(_rich_table(part, table_width()))


def _encoder_sets(options: dict[str, Any]) -> dict[str, tuple[ViewConfig, ...]]:
    """Take the options of encoders out of `options` and return the sets of views by name.

    A set that --view and the options of encoders describe has the name "encoders".
    Raises InputError if both --pair and options of encoders are given.
    """
    views = chosen_views(options)
    named: dict[str, tuple[ViewConfig, ...]] = {}
    for text in options.pop("pairs"):
        name, _, parts = text.partition(":")
        name = name.strip()
        if not name or not parts.strip() or name in named:
            raise InputError(f"--pair {text!r}: expected a new name, a colon, and views with ; between them")
        named[name] = tuple(parsed_view(part) for part in parts.split(";"))
    if views and named:
        raise InputError("--pair: leave out --view, --image-encoder and --text-encoder, or give them as a pair too")
    if not views and not named:
        raise InputError("no encoders: give --text-encoder, --image-encoder, --view or --pair")
    return named or {"encoders": tuple(views)}


def _rich_table(table: ResultTable, width: int) -> Table:
    """Return a result's table as rich prints it in `width` columns; no figure is cut.

    If the columns do not fit side by side, each row becomes a section of lines, one for each column.
    """
    widths = [_column_width(column, table, broken=True) for column in table.columns]
    spare = width - sum(widths) - BORDERS * len(widths) - 1
    if spare < 0:
        return _listed_table(table)
    for place, column in reversed([*enumerate(table.columns)]):  # the last ones hold "not measured" most often
        extra = min(spare, _column_width(column, table, broken=False) - widths[place])
        widths[place] += extra
        spare -= extra
    shown = _titled_table(table)
    for column, column_width in zip(table.columns, widths):
        justify: Any = "right" if column.right else "left"
        shown.add_column(cell(column.head), justify=justify, no_wrap=not column.wraps, width=column_width)
    for section in table.sections:
        for row in section:
            shown.add_row(*(cell(column.text(row)) for column in table.columns))
        shown.add_section()
    return shown


def _listed_table(table: ResultTable) -> Table:
    """Return a table of two columns, heads and figures, with a section for each row; heads without a figure go."""
    shown = _titled_table(table, show_header=False)
    for row in [row for section in table.sections for row in section]:
        for column in table.columns:
            text = column.text(row)
            if text:
                shown.add_row(cell(" ".join(column.head.split())), cell(text))
        shown.add_section()
    return shown


def _titled_table(table: ResultTable, show_header: bool = True) -> Table:
    """Return a table without columns, with the title and the caption of a result's table."""
    caption = cell(table.caption) if table.caption else None
    return Table(title=cell(table.title), caption=caption, show_header=show_header)


def _column_width(column: Column, table: ResultTable, broken: bool) -> int:
    """Return the characters of a column's longest line; broken: of its longest word, if it wraps."""
    texts = [column.text(row) for section in table.sections for row in section]
    lines = [line for text in (column.head, *texts) for line in text.splitlines()]
    if broken and column.wraps:
        lines = [word for line in lines for word in line.split()]
    return max(map(len, lines), default=0)


for benchmark in BENCHMARKS:
    bench.add_command(bench_command(benchmark))
