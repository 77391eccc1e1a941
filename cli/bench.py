"""iisan-fast bench: figures side by side with the reference."""

from __future__ import annotations

import click

from .bench_kernels import kernels


@click.group()
def bench() -> None:
    """Measure speed and memory, side by side with the reference."""


for command in (kernels,):
    bench.add_command(command)
