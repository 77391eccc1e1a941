"""iisan-fast bench train: the training step beside the dense reference."""

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
@click.option("--users", type=SIZE, default=64, help="Users a batch.")
@click.option("--width", type=SIZE, default=768, help="Width of the hidden states, which are random.")
@click.option("--layers", type=SIZE, default=7, help="Kept layers of a view.")
@click.option("--followed", type=SIZE, default=50, help="Steps over which the losses are compared.")
@click.option("--rounds", type=SIZE, default=12, help="Turns of each form.")
@click.option("--steps", type=SIZE, default=3, help="Steps of a turn.")
@click.option("--epochs/--no-epochs", default=True, help="Measure whole epochs, a whole run and their memory too.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@out_option
@device_option
@json_option
def train(dataset: Path | None, out: Path | None, device: str, as_json: bool, **values: Any) -> None:
    """Time training steps beside the dense reference, on the histories of DATASET or of the embedded demo.

    The losses of both must follow each other. Without CUDA launches and its memory are not measured.
    """
    from ..benchmarks.train import TrainSettings, benchmark  # imports torch, which takes seconds

    settings = TrainSettings(**values)
    result = benchmark(dataset, settings, torch_device(device))
    result = {"command": command_line("train", dataset, result["settings"]), **result}
    print_result(result, out, as_json, _table)


def _table(result: dict[str, Any]) -> Table:
    settings, run = result["settings"], result["run"]
    on_cuda = not isinstance(result["forms"][0]["launches"], str)
    title = (
        f"{result['dataset']}, {settings['users']} users a batch, {settings['layers']} layers of {settings['width']}"
    )
    caption = f"{result['steps_an_epoch']} steps an epoch"
    if not isinstance(run, str):
        caption += f"; a whole run takes {mebibytes(run['peak_pss_bytes'])} MiB at its peak"
    if not on_cuda:
        caption += "; launches and CUDA memory: not measured"
    caption += "".join(f"; {row['form']}: {row['remark']}" for row in result["forms"] if "remark" in row)
    table = Table(title=Text(title), caption=Text(caption))
    for column in ("", "step, p20 / p50 / p80 ms"):
        table.add_column(column, no_wrap=True)
    on_cuda_alone = ("launches", "CUDA MiB", "captures s") * on_cuda
    for column in ("dense / this", "loss differs by", "epoch s", "peak MiB", *on_cuda_alone):
        table.add_column(column, justify="right")
    for row in result["forms"]:
        cells = [
            row["form"],
            " / ".join(f"{row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")),
            f"{row['ratio']:.2f}",
            f"{row['largest_loss_difference']:.1e}",
            row["epoch_s"] if isinstance(row["epoch_s"], str) else f"{row['epoch_s']:.1f}",
            mebibytes(row.get("peak_pss_bytes", "not measured")),
        ]
        if on_cuda:
            capture = row["capture_s"] if isinstance(row["capture_s"], str) else f"{row['capture_s']:.1f}"
            cells += [str(row["launches"]), mebibytes(row.get("peak_cuda_bytes", "not measured")), capture]
        table.add_row(*cells)
    return table
