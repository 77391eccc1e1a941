"""iisan-fast bench methods: every method trained by the same trainer, what it reaches and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..devices import torch_device
from .options import FOLDER, device_option, json_option, out_option
from .output import command_line, mebibytes, percent, print_result, with_deviation, write_result
from .sweeps import numbers, said, sweep_options, sweep_settings

DEFAULT_METHODS = "full,adapter,lora,bitfit,iisan-uncached,iisan"


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    help="Names that train --method knows; with -uncached, encoders run in every step.",
)
@click.option("--against", help="The method that the others are tested against. [the last of --methods]")
@click.option("--weights", default="0.45,0.1,0.45", help="Of time, parameters and memory in TPME.")
@sweep_options
@out_option
@device_option
@json_option
def methods(dataset: Path, methods: str, out: Path | None, device: str, as_json: bool, **options: Any) -> None:
    """Train methods on DATASET over one or several sets of encoders, and compare what they reach and cost.

    The test against --against is a paired randomisation test on the users' NDCG@10.
    """
    command = command_line("methods", dataset, {"methods": methods, **said(options)})
    settings = sweep_settings(options, tuple(name.strip() for name in methods.split(",")))
    from ..benchmarks.methods import Comparison, benchmark  # imports torch, which takes seconds

    against = options["against"] or settings.methods[-1]
    comparison = Comparison(against, numbers("--weights", options["weights"], float))
    result = benchmark(dataset, options["folder"], settings, comparison, torch_device(device))
    result = {"command": command, **result}
    write_result(options["folder"] / "result.json", result)
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=Text(f"{result['dataset']}: test set, history masked, mean over {_seeds(result)}"))
    for column in ("encoders", "method"):
        table.add_column(column, no_wrap=True)
    columns = ("HR@10", "NDCG@10", "p", "s / epoch", "trained M", "peak MiB", "TPME %")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    captions = []
    for name, one in result["encoders"].items():
        for method, row in one["methods"].items():
            table.add_row(
                name,
                method,
                with_deviation(row["hr"], row["hr_sd"]),
                with_deviation(row["ndcg"], row["ndcg_sd"]),
                "-" if row["p_value"] is None else f"{row['p_value']:.4f}",
                f"{row['epoch_s']:.2f}",
                f"{row['trainable_parameters'] / 1e6:.2f}",
                mebibytes(row["peak_bytes"]),
                percent(row.get("tpme")),
            )
        table.add_section()
        order = one["cost_order"]
        caption = f"{name}: p against {one['against']}"
        if isinstance(one["encoding_s"], float):
            caption += f"; its states took {one['encoding_s']:.0f} s to encode, once"
        if ">" in order["expected"]:
            verdict = "yes" if order["holds"] else "no: " + "; ".join(order["violations"])
            caption += f"; time an epoch as expected, {order['expected']}: {verdict}"
        captions.append(caption)
    table.caption = "\n".join(captions)
    return table


def _seeds(result: dict[str, Any]) -> str:
    seeds = result["settings"]["seeds"]
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
