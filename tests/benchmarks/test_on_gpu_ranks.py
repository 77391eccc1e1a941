"""The GPU script's stage on several GPUs: ranks of a CPU in a dry run, and nothing on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks.on_gpu import ranks
from iisan_fast.benchmarks.on_gpu.settings import DRY_RUN, Settings
from iisan_fast.benchmarks.tables import NOT_MEASURED


@pytest.fixture
def dataset(tmp_path) -> Path:
    histories = [[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(24)]
    return write_dataset_folder(tmp_path / "toy", make_sequences(histories, items=40))


def row(form: str, losses: list[float], milliseconds: float, users: int = 64) -> dict[str, Any]:
    return {"form": form, "users": users, "losses": losses, "p50_ms": milliseconds}


@pytest.mark.parametrize(
    ("gpus", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_powers_of_two_and_all_gpus_are_measured(gpus, counts):
    assert ranks.rank_counts(gpus) == counts


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_with_one_gpu_has_no_figure(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    saved: list[dict[str, Any]] = []
    ranks.measure(Settings("ranks", Path("data"), Path("out"), None), saved.append)
    assert saved == [{"gpus": gpus, "rows": NOT_MEASURED, "headline": f"{gpus} GPU: not measured"}]


@pytest.mark.parametrize(("float32", "is_refused"), [(1.0001, False), (1.01, True), (float("nan"), True)])
def test_losses_in_fp32_must_be_those_of_one_gpu(float32, is_refused, monkeypatch):
    """Losses in bfloat16 are reported without a check. The rows of a refused job are saved all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    jobs = {
        1: [row("bfloat16", [2.0, 4.0], 1.0), row("float32", [2.0, 4.0], 3.0)],
        2: [row("bfloat16", [2.0, 5.0], 0.5), row("float32", [2.0, 4.0 * float32], 2.0)],
    }
    monkeypatch.setattr(ranks, "job", lambda count, settings: jobs[count])
    saved: list[dict[str, Any]] = []
    settings = Settings("ranks", Path("data"), Path("out"), None)
    if is_refused:
        with pytest.raises(SystemExit, match="ranks: expected losses within 1e-03 of one GPU's, found .* on 2 GPUs"):
            ranks.measure(settings, saved.append)
    else:
        ranks.measure(settings, saved.append)
    rows = saved[-1]["rows"]
    assert [(line["ranks"], line["form"]) for line in rows] == [
        (1, "bfloat16"),
        (1, "float32"),
        (2, "bfloat16"),
        (2, "float32"),
    ]
    assert [line["ratio"] for line in rows] == [1, 1, 2, 1.5]
    assert [line["loss_difference"] for line in rows[:3]] == [0, 0, 0.25]
    expected = "bfloat16, GPUs x users of a whole batch: 1 x 64 users: 1.00 ms a step; 2 x 64 users: 0.50 ms a step"
    assert saved[-1]["headline"] == expected


@pytest.mark.long
def test_two_ranks_of_a_cpu_have_the_losses_of_one(dataset, tmp_path):
    saved: list[dict[str, Any]] = []
    ranks.measure(Settings("ranks", dataset, tmp_path, None, **DRY_RUN), saved.append)
    assert [(line["ranks"], line["form"], line["users"]) for line in saved[-1]["rows"]] == [
        (1, "float32", 8),
        (1, "float32", 16),
        (2, "float32", 8),
        (2, "float32", 16),
    ]
    assert all(len(line["losses"]) == 2 and line["loss_difference"] < 1e-5 for line in saved[-1]["rows"])


@pytest.mark.long
def test_a_job_that_fails_is_named(dataset, tmp_path):
    settings = Settings("ranks", dataset / "nowhere", tmp_path, None, **DRY_RUN)
    with pytest.raises(SystemExit, match="ranks: a job of 2 ranks ended with exit code 1"):
        ranks.job(2, settings)
