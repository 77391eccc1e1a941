"""iisan-fast bench: figures side by side with the reference."""

from __future__ import annotations

import click

from .bench_encoders import encoders
from .bench_evaluate import evaluate
from .bench_extract import extract
from .bench_growth import growth
from .bench_kernels import kernels
from .bench_methods import methods
from .bench_static import static
from .bench_train import train
from .bench_uncached import uncached


@click.group()
def bench() -> None:
    """Measure speed and memory, side by side with the reference."""


for command in (kernels, train, evaluate, extract, growth, methods, encoders, uncached, static):
    bench.add_command(command)
