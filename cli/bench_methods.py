"""iisan-fast bench methods: every method trained by the same trainer, what it reaches and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..config import PLACEMENTS, ViewConfig
from ..errors import InputError
from .options import (
    FOLDER,
    attention_option,
    device_option,
    json_option,
    missing_images_option,
    out_option,
    torch_device,
)
from .output import command_line, mebibytes, percent, print_result
from .views import chosen_views, parsed_view, view_options

SIZE = click.IntRange(min=1)
METHODS = "full,adapter,lora,bitfit,iisan-uncached,iisan"


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--folder", type=FOLDER, required=True, help="Where the runs lie; a stopped sweep goes on there.")
@click.option(
    "--methods", default=METHODS, help="Names that train --method knows; with -uncached, encoders run in every step."
)
@click.option("--seeds", default="0", help="As 0,1,2.")
@click.option("--epochs", type=SIZE, default=100, help="At most.")
@click.option("--patience", type=click.IntRange(min=0), default=10, help="As of train.")
@click.option("--batch-users", type=SIZE, default=64, help="Users a step, of every method.")
@click.option("--users", type=SIZE, help="Users drawn of the dataset, for every method. [all]")
@click.option("--against", help="The method that the others are tested against. [the last of --methods]")
@click.option("--weights", default="0.45,0.1,0.45", help="Of time, parameters and memory in TPME.")
@view_options
@click.option(
    "--pair",
    "pairs",
    multiple=True,
    help='A named set of encoders in place of one: "NAME: VIEW; VIEW", each as of --view; may be repeated.',
)
@click.option("--table", type=click.Choice(PLACEMENTS), default="auto", help="As of train.")
@attention_option
@missing_images_option
@out_option
@device_option
@json_option
def methods(dataset: Path, folder: Path, out: Path | None, device: str, as_json: bool, **options: Any) -> None:
    """Train methods on DATASET over one or several sets of encoders, and compare what they reach and cost.

    The test against --against is a paired randomisation test on the users' NDCG@10.
    """
    said = {"folder": "FOLDER", **options, "view": options["view_texts"], "pair": options["pairs"]}
    command = command_line(
        "methods", dataset, {name: value for name, value in said.items() if name not in ("view_texts", "pairs")}
    )
    encoders = _encoders(options)
    from ..bench.methods import MethodsSettings, benchmark  # imports torch, which takes seconds

    settings = MethodsSettings(
        methods=tuple(options["methods"].split(",")),
        encoders=encoders,
        seeds=_numbers("--seeds", options["seeds"], int),
        weights=_numbers("--weights", options["weights"], float),
        missing_images=options["missing_images"] or "error",
        attention=options["attention"] or "auto",
        **{name: options[name] for name in ("epochs", "patience", "batch_users", "users", "against", "table")},
    )
    result = benchmark(dataset, folder, settings, torch_device(device))
    print_result({"command": command, **result}, out, as_json, _table)


def _encoders(options: dict[str, Any]) -> dict[str, tuple[ViewConfig, ...]]:
    """The named sets of views that the options ask for; one set has no need of a name."""
    views, found = chosen_views(options), {}
    for text in options.pop("pairs"):
        name, _, parts = text.partition(":")
        if not name.strip() or not parts.strip() or name.strip() in found:
            raise InputError(f"--pair {text!r}: expected a name of its own, a colon, and views with ; between them")
        found[name.strip()] = tuple(parsed_view(part) for part in parts.split(";"))
    if views and found:
        raise InputError("--pair: leave out --view, --image-encoder and --text-encoder, or give them as a pair too")
    if not views and not found:
        raise InputError("no encoders: give --text-encoder, --image-encoder, --view or --pair")
    return found or {"encoders": tuple(views)}


def _numbers(option: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers with commas between them, found {text!r}") from None


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
                _with_deviation(row["hr"], row["hr_sd"]),
                _with_deviation(row["ndcg"], row["ndcg_sd"]),
                "-" if row["p_value"] is None else f"{row['p_value']:.4f}",
                f"{row['epoch_s']:.2f}",
                f"{row['trainable_parameters'] / 1e6:.2f}",
                mebibytes(row["peak_bytes"]),
                percent(row.get("tpme")),
            )
        table.add_section()
        order = one["cost_order"]
        captions.append(
            f"{name}: p against {one['against']}; time an epoch as expected, {order['expected']}: "
            + ("yes" if order["holds"] else "no: " + "; ".join(order["violations"]))
        )
    table.caption = "\n".join(captions)
    return table


def _seeds(result: dict[str, Any]) -> str:
    seeds = result["settings"]["seeds"]
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"


def _with_deviation(mean: float, deviation: float | None) -> str:
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"
