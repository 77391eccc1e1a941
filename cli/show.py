"""iisan-fast show: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from .help_pages import DATA, OUTPUT, command, option
from .options import FILE, FOLDER, device_option, output_options, writable_file
from .output import print_json, print_text

EXAMPLES = (
    "iisan-fast show runs/first",
    "iisan-fast show runs/first --out first.html --users 50 --seed 1",
    "iisan-fast show runs/first --dataset DATASET --json",
)


@command(examples=EXAMPLES, short_help="Write a page about a run: figures, curves, users.")
@click.argument("run", type=FOLDER)
@option("--dataset", group=DATA, type=FOLDER, help="Dataset with the pictures; by default the one the run names.")
@option("--pictures/--no-pictures", group=DATA, default=True, help="Show small pictures of the items.")
@option("--users", group=DATA, type=int, default=20, help="Number of users to draw at random, at most 100.")
@option("--seed", group=DATA, type=int, default=0, help="Seed of the draw.")
@option(
    "--out",
    group=OUTPUT,
    type=FILE,
    callback=writable_file,
    help="HTML file for the page; by default report.html in RUN.",
)
@device_option
@output_options
def show(
    run: Path,
    dataset: Path | None,
    pictures: bool,
    users: int,
    seed: int,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Write one self-contained HTML page about RUN, and print its path.

    It has the figures, learning curves, gates, accuracy by group, settings, and users with their recommendations.
    """
    from ..serving import show as write_page  # imports torch, which takes seconds

    page = write_page(run, out, dataset, users=users, seed=seed, pictures=pictures, device=device)
    if as_json:
        print_json({**page._asdict(), "path": str(page.path)})
    else:
        print_text(str(page.path))
