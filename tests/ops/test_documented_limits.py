"""The documents name the same size limits of a fused GPU step as its kernels."""

from __future__ import annotations

from pathlib import Path

from iisan_fast.kernels import TILE_ROWS
from iisan_fast.kernels.gpu import projected_towers, sequence_encoder

PAGE = Path(__file__).parents[2] / "docs" / "performance-and-memory.md"


def test_the_documented_limits_on_a_gpu_equal_the_kernels():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    on_cuda = {row[0]: row[2] for row in cells if len(row) == 3}
    *widths, widest = sequence_encoder.WIDTHS
    assert {*widths, widest} <= {*projected_towers.DIMENSIONS}
    least, most = projected_towers.BOTTLENECKS
    heads = sequence_encoder.MOST_HEADS
    width = sequence_encoder.LEAST_HEAD_WIDTH
    expected = {
        "layers kept": f"at most {projected_towers.MOST_LAYERS}",
        "bottleneck": f"{least} to {most}",
        "embedding dim": f"{', '.join(map(str, widths))} or {widest}",
        "attention heads": f"at most {heads}, each at least {width} wide",
        "positions of a history": f"at most {TILE_ROWS[-1]}",
    }
    assert {name: on_cuda.get(name) for name in expected} == expected
