"""Sweeps on several ranks: each run is one rank's, and a failure names its rank."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from helpers.rank_processes import run_on_ranks
from helpers.sweep_calls import left_alone, placed, sweep
from iisan_fast.benchmarks.catalogue import BY_NAME
from iisan_fast.benchmarks.harness import Setup, run_benchmark
from iisan_fast.benchmarks.sweep_settings import MethodsSettings
from iisan_fast.config import ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.ranks import ALONE, Ranks, threads_of_rank

TITLES = ViewConfig("title", "title", "nowhere")
SETTINGS = MethodsSettings(("lora", "iisan", "id"), {"one": (TITLES,), "two": (TITLES,)}, seeds=(0, 1))


def test_each_piece_of_work_is_done_by_one_rank():
    works = {f"run {number}": number for number in range(8)}
    results = run_on_ranks(3, placed, works)
    failures = {f"run {number}": (number % 3, f"{number} is odd") for number in (1, 3, 5, 7)}
    assert results == [(list(range(8))[rank::3], failures) for rank in range(3)]
    assert list(results[0][1]) == list(failures)


@pytest.mark.long
def test_runs_are_placed_on_ranks_in_turn(small_catalogue, tmp_path):
    alone, message = sweep(ALONE, small_catalogue, tmp_path / "alone", SETTINGS)
    assert message.startswith(f"{tmp_path / 'alone'}: 4 of 12 cells failed") and "on rank" not in message
    encodings, runs = alone[:2], alone[2:]
    assert encodings == ["encoded one", "encoded two"] and len(runs) == 12
    for count in (2, 3):
        out = tmp_path / f"{count}"
        results = run_on_ranks(count, sweep, small_catalogue, out, SETTINGS)
        for rank, (done, _) in enumerate(results):
            assert done == encodings[rank::count] + runs[rank::count]
            for name in runs[rank::count]:
                encoders, method, seed = name.split()
                figures = out / encoders / method / f"seed-{seed}" / "figures.json"
                assert method == "lora" or json.loads(figures.read_text()) == {"rank": rank}
        ((message,),) = [{text for _, text in results}]
        failed = [(place, name) for place, name in enumerate(runs) if "lora" in name]
        assert message.startswith(f"{out}: 4 of 12 cells failed")
        for place, name in failed[:3]:
            encoders, method, seed = name.split()
            assert f"{encoders}/{method}/seed-{seed} on rank {place % count}" in message


def test_what_a_rank_starts_is_no_rank():
    assert run_on_ranks(2, left_alone) == [(2, True, 1)] * 2


def test_what_no_rank_starts_keeps_its_threads():
    assert threads_of_rank() is None


def test_a_benchmark_of_one_process_refuses_several():
    setup = Setup(None, torch.device("cpu"), ranks=Ranks(1, 2))
    with pytest.raises(
        InputError, match="^bench train: runs in one process, found 2 ranks; run it without the launcher"
    ):
        run_benchmark(BY_NAME["train"], BY_NAME["train"].settings(), setup)


@pytest.mark.long
def test_torchrun_gives_the_figures_of_a_sequential_sweep(encoder_views, small_catalogue, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # by which sums are rounded
    encoder = encoder_views[1].encoder
    words = [str(small_catalogue), "--methods", "iisan,id", "--text-encoder", encoder, "--max-tokens", "12"]
    words += ["--seeds", "0,1", "--epochs", "2", "--batch-users", "16", "--device", "cpu"]
    results = {}
    printed = {}
    for name, launcher in (("one", []), ("two", ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"])):
        folder = tmp_path / name
        command = [sys.executable, "-m", *launcher, "iisan_fast", "bench", "methods", *words, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((folder / "result.json").read_text())["encoders"]["encoders"]
        printed[name] = done.stdout.count("HR@10")
    assert printed["one"] == printed["two"] > 0
    assert results["one"]["baselines"] == results["two"]["baselines"]
    for method, expected in results["one"]["methods"].items():
        row = results["two"]["methods"][method]
        for figure in ("hr", "ndcg", "losses", "epochs", "p_value", "trainable_parameters"):
            assert row[figure] == expected[figure], (method, figure)
