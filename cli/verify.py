"""iisan-fast verify: compare the files of a cache or a run with their checksums."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from .help_pages import DATA, command, option
from .options import FOLDER, output_options
from .output import print_counts, print_json

EXAMPLES = (
    "iisan-fast verify STATES",
    "iisan-fast verify runs/first --check-only",
    "iisan-fast verify STATES --json > verified.json",
)


@command(examples=EXAMPLES, short_help="Compare a cache or a run with its checksums.")
@click.argument("folder", type=FOLDER, metavar="CACHE|RUN")
@option("--check-only", group=DATA, is_flag=True, help="Write nothing: missing checksums are not added.")
@output_options
def verify(folder: Path, check_only: bool, as_json: bool) -> None:
    """Read all of CACHE or RUN, compare it with its checksums, and print a line for each damaged part.

    The exit code is 2 if anything is damaged. Parts that an earlier version wrote without a checksum get one.
    """
    from .. import api  # imports numpy

    result = api.verify(folder, add=not check_only)
    if as_json:
        print_json({**dataclasses.asdict(result), "path": str(result.path)})
    else:
        counts = {"checked": result.checked, "checksums added": result.added, "without checksum": result.unchecked}
        shown = {name: count for name, count in counts.items() if count or name == "checked"}
        rows = {name: f"{count:,}" for name, count in {**shown, "damaged": len(result.damage)}.items()}
        print_counts(f"{result.kind} {result.path}", rows)
    for damage in result.damage:
        click.echo(f"damaged: {damage.where}: {damage.problem}; {damage.remedy}", err=True)
    if result.damage:
        click.get_current_context().exit(2)
