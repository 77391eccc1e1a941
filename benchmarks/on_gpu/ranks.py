"""Training on 1, 2, 4 and more GPUs by torchrun: seconds a step, and how far the losses lie from one GPU's."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..tables import NOT_MEASURED
from ..train import REFUSED_ABOVE, largest_difference
from .gpu_tests import interrupts_ignored
from .settings import Save, Settings

DRY_RUN_RANKS = 2  # on the CPU


def measure(settings: Settings, save: Save) -> None:
    """Save a row for every number of GPUs, form and batch size; nothing is measured on a machine with one GPU.

    Raises SystemExit where a job fails, or its losses in fp32 leave those of one GPU.
    """
    gpus = DRY_RUN_RANKS if settings.dry_run else torch.cuda.device_count()
    if gpus < 2:
        save({"gpus": gpus, "rows": NOT_MEASURED, "headline": f"{gpus} GPU: {NOT_MEASURED}"})
        return
    rows: list[dict[str, Any]] = []
    for count in rank_counts(gpus):
        rows += compared(job(count, settings), count, rows)
        save({"gpus": gpus, "rows": rows, "headline": headline(rows)})
    if wrong := [row for row in rows if row["form"] == "float32" and not row["loss_difference"] <= REFUSED_ABOVE]:
        ranks, difference = wrong[0]["ranks"], wrong[0]["loss_difference"]
        raise SystemExit(
            f"ranks: expected losses within {REFUSED_ABOVE:.0e} of one GPU's, found {difference:.1e} on {ranks} GPUs"
        )


def rank_counts(gpus: int) -> list[int]:
    """Return the powers of 2 up to the number of GPUs, and that number."""
    powers = [1 << power for power in range(gpus.bit_length()) if 1 << power <= gpus]
    return sorted({*powers, gpus})


def job(count: int, settings: Settings) -> list[dict[str, Any]]:
    """Run a job of so many ranks by torchrun, and return what its first rank measured, a row for each form and size.

    Raises SystemExit if the job fails.
    """
    with TemporaryDirectory(prefix="on-gpu-") as folder:
        result = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words += ["-m", "iisan_fast.benchmarks.on_gpu.rank_worker", json.dumps(asdict(settings), default=str)]
        with interrupts_ignored():  # torchrun, interrupted with this process, then ends its ranks
            code = subprocess.Popen([*words, str(result)]).wait()
        if code:
            raise SystemExit(f"ranks: a job of {count} ranks ended with exit code {code}")
        return json.loads(result.read_text())


def compared(rows: list[dict[str, Any]], count: int, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a job with their differences to one GPU's: of losses, the largest; of the time, the ratio.

    before: the rows of the jobs before, the first of which has one rank.
    """
    alone = {(row["form"], row["users"]): row for row in (before or rows) if row.get("ranks", 1) == 1}
    result = []
    for row in rows:
        one = alone[row["form"], row["users"]]
        difference = largest_difference(row["losses"], one["losses"])
        result.append({"ranks": count, **row, "loss_difference": difference, "ratio": one["p50_ms"] / row["p50_ms"]})
    return result


def headline(rows: list[dict[str, Any]]) -> str:
    """Return a line on the times of the form that training takes by default."""
    parts = [
        f"{row['ranks']} x {row['users']} users: {row['p50_ms']:.2f} ms a step"
        for row in rows
        if row["form"] == rows[0]["form"]
    ]
    return f"{rows[0]['form']}, GPUs x users of a whole batch: " + "; ".join(parts)
