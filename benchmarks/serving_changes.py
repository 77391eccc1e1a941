"""The parts of the benchmark of serving that write something: new items, an export with and without an index, the page.

New items go into a copy of the run, which is removed. The run itself stays as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..serving import add_items, export, show
from ..training import RunFolder
from .serving_parts import timed, with_peak
from .settings import ServingSettings

INDEXES = ("faiss", "usearch")
NO_INDEX = "neither faiss nor usearch is installed; pip install 'iisan-fast[faiss]'"


def adding(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure adding items to copies of a run, from its folder to its folder, by the run's encoders.

    The items have titles of the run's items. Raises InputError if the run has no titles or reads images, or if its
    encoders are not here.
    """
    titles = RunFolder.open(run).items.titles
    if titles is None:
        raise InputError(f"{run}: the run has no titles to make new items of")
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for place, count in enumerate((1, *settings.added)):  # the first one imports what encoders need
            copy = Path(home) / str(place)
            shutil.copytree(run, copy)
            items = [{"item_id": f"new-{n}", "title": titles[n % len(titles)]} for n in range(count)]
            figures = timed(partial(add_items, copy, items, device=device), 1, device)
            rows.append({"items": count, **figures})
            shutil.rmtree(copy)
    return {"rows": rows[1:]}


def exporting(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure an export without an index, and one with the first index whose library is installed.

    Raises InputError if a library that an export needs is missing, or if an exported encoder deviates.
    """
    with tempfile.TemporaryDirectory() as home:
        reports = []

        def write(name: str, index: str | None) -> Callable[[], None]:
            return lambda: reports.append(export(run, Path(home) / name, index, device))

        figures = with_peak(write("plain", None), 1, device)
        plain = reports[0]
        index: dict[str, Any] = {"not_measured": NO_INDEX}
        if kinds := [kind for kind in INDEXES if find_spec(kind)]:
            seconds = with_peak(write("indexed", kinds[0]), 1, device)
            index = {"kind": kinds[0], **seconds, **asdict(reports[1].index)}
    return {
        **figures,
        "bytes": sum(plain.files.values()),
        "files": plain.files,
        "compared": plain.compared,
        "index": index,
    }


def page(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure the page about a run, with twenty users. Raises InputError as `show` does."""
    with tempfile.TemporaryDirectory() as home:
        written = []
        figures = with_peak(lambda: written.append(show(run, Path(home) / "page.html", device=device)), 1, device)
    return {**figures, "bytes": written[0].size, "users": written[0].users, "pictures": written[0].pictures}


CHANGES: dict[str, Callable[..., dict[str, Any]]] = {"added": adding, "export": exporting, "page": page}
