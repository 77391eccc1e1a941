"""States of images and titles by encoders of random weights, built from their configuration: items a second."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...config import ViewConfig
from ...data import Dataset, load_dataset
from ...workers import worker_count
from .. import extract
from ..extract import ExtractionJob, Measured
from ..stand_ins import stand_ins
from ..tables import NOT_MEASURED
from .common import device_of
from .settings import Save, Settings

SEED = 0
STORED_AS = "bfloat16"
BATCH_SIZE = 64  # as iisan-fast extract takes by default


def measure(settings: Settings, save: Save) -> None:
    """Save how fast each encoder is, first on inputs in memory, then as `iisan-fast extract` runs it.

    The items' titles are the dataset's, their images noise; the encoders' weights are drawn with a fixed seed.
    """
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="iisan-fast-") as scratch:
        folder, views = stand_ins(settings.dataset, Path(scratch) / "stand-ins", settings.encoders, SEED)
        dataset = load_dataset(folder)
        total = len(dataset.titles)
        few, most = (
            extract.sample(dataset, min(count, total)) for count in (settings.items, settings.extracted_items or total)
        )
        for form, items in ((extract.FROM_MEMORY, few), ("fast", most)):
            for view in views:
                job = job_of(items, view, settings)
                cache = Path(scratch) / "states"
                measured = (
                    extract.run_from_memory(job) if form == extract.FROM_MEMORY else extract.run_once(form, job, cache)
                )
                shutil.rmtree(cache, ignore_errors=True)
                rows.append(row_of(form, view.source, measured))
                save({"encoders": settings.encoders, "rows": rows, "headline": headline(rows)})


def job_of(dataset: Dataset, view: ViewConfig, settings: Settings) -> ExtractionJob:
    """Return what one encoder does."""
    device = device_of(settings)
    workers = worker_count(None, len(dataset.titles), device) if view.source == "image" else 0
    return ExtractionJob(dataset, view, device, STORED_AS, BATCH_SIZE, workers)


def row_of(form: str, source: str, measured: Measured) -> dict[str, Any]:
    """Return a row of figures."""
    return {
        "form": form,
        "source": source,
        "items": measured.items,
        "seconds": measured.seconds,
        "items_per_second": measured.items / measured.seconds,
        "peak_cuda_bytes": NOT_MEASURED if measured.peak_cuda_bytes is None else measured.peak_cuda_bytes,
    }


def headline(rows: list[dict[str, Any]]) -> str:
    """Return a line on each form: items a second of both encoders one after the other."""
    parts = []
    for form in dict.fromkeys(row["form"] for row in rows):
        of_form = [row for row in rows if row["form"] == form]
        seconds = sum(row["seconds"] / row["items"] for row in of_form)
        parts.append(f"{form}: {1 / seconds:,.0f} items a second, {' and '.join(row['source'] for row in of_form)}")
    return "; ".join(parts)
