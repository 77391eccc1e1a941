"""Draw the figures of a result into a PNG file; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import write_atomically


@contextmanager
def two_panels(path: Path, title: str) -> Iterator[Any]:
    """Yield the axes of two panels side by side, and write the PNG when both are drawn.

    Both have a grid and a legend. The file is written whole or not at all. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    yield panels
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    pyplot.close(figure)
    write_atomically(path, drawn.getvalue())
