"""Read the results of runs, and change their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.run_folder import RunFolder


def untimed(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the times, which differ from run to run."""
    timed = ("train_seconds", "validation_seconds", "items_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def hit_rates(result: dict) -> tuple[float, float]:
    """Return the model's and the popularity baseline's test HR@10, history masked."""
    return result["test"]["masked"]["hr@10"], result["popularity"]["masked"]["hr@10"]


def without_later_figures(figures: dict) -> dict:
    """Return test figures without those that versions before the neighbour terms did not store."""
    assert {"neighbours", "scoring"} <= figures.keys()
    return {name: value for name, value in figures.items() if name not in ("neighbours", "scoring")}


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def assert_same_run(run: Path, other: Path) -> None:
    """Assert that two finished runs have the same results bit for bit: figures, losses, weights, optimizer states."""
    assert untimed(run) == untimed(other)
    assert json.loads((run / "test.json").read_text()) == json.loads((other / "test.json").read_text())
    for name in ("best.safetensors", "last.safetensors"):
        tensors, expected = (load_checkpoint(folder / name)[0] for folder in (run, other))
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor), (name, key)
    assert load_checkpoint(run / "last.safetensors")[1].keys() == load_checkpoint(other / "last.safetensors")[1].keys()


def write_recorded(run: Path, name: str, value: Any) -> None:
    """Write a JSON file of a run with its checksum, as a run that had begun with this content."""
    folder = RunFolder(run)
    folder.read_record()
    folder._write_json(name, value)
