"""iisan-fast bench: figures side by side with the reference."""

from __future__ import annotations

import click

from .bench_extract import extract
from .bench_kernels import kernels


@click.group()
def bench() -> None:
    """Measure speed and memory, side by side with the reference."""


for command in (kernels, extract):
    bench.add_command(command)
