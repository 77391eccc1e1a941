"""Read the results of runs."""

from __future__ import annotations

import json
from pathlib import Path


def untimed(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the times, which differ from run to run."""
    timed = ("train_seconds", "validation_seconds", "items_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def hit_rates(result: dict) -> tuple[float, float]:
    """Return the model's and the popularity baseline's test HR@10, history masked."""
    return result["test"]["masked"]["hr@10"], result["popularity"]["masked"]["hr@10"]
