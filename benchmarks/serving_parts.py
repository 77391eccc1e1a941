"""The parts of the benchmark of serving on a trained run, each measured in the process that calls it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..errors import InputError
from ..serving import TrainedModel, UserHistories, recommend
from ..training import RunFolder, TermWeights
from .machine import peak_figures, synchronise
from .made_catalogue import made_histories, made_model
from .peak_memory import PeakMemory
from .settings import ServingSettings
from .stopwatch import quantiles

K = 10
WARM_UP_USERS = 10
FORM_USERS = 2048  # on whom the forms of top_items are compared
ROUNDING = 1e-5  # of the largest score: forms may order scores within it differently


def dataset_histories(run: Path) -> UserHistories:
    """Return the whole histories of a run's users. Raises InputError if they are missing, as in a published run."""
    sequences = RunFolder.open(run).sequences
    return UserHistories(sequences.user_ids, sequences.offsets, sequences.items)


def timed(call: Callable[[], Any], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the quantiles of a call's seconds over some rounds, and the median of its CPU seconds."""
    wall, cpu = [], []
    for _ in range(rounds):
        synchronise(device)
        started = time.perf_counter(), time.process_time()
        call()
        synchronise(device)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return {**quantiles(wall, "s"), "cpu_s": float(np.median(cpu))}


def with_peak(call: Callable[[], Any], rounds: int, device: torch.device) -> dict[str, Any]:
    """Time a call, as `timed` does, and take the peak memory of this process meanwhile."""
    with PeakMemory() as memory:
        seconds = timed(call, rounds, device)
    return seconds | peak_figures(memory, device)


def loading(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure how long a run takes to load."""
    return with_peak(lambda: TrainedModel.load(run, device), settings.rounds, device)


VARIANTS = {
    "run": (True, True),
    "no_terms": (False, True),
    "with_history": (True, False),
}  # with the run's terms; without the items of the history


def recommending(run: Path, form: str, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure the recommendations for all users of a run."""
    with_terms, exclude = VARIANTS[form]
    model = TrainedModel.load(run, device)
    model = model if with_terms else without_terms(model)
    histories = dataset_histories(run)
    figures = with_peak(lambda: list(recommend(model, histories, K, exclude)), settings.rounds, device)
    users = len(histories.user_ids)
    weights = model.weights._asdict()
    return {"form": form, "weights": weights, "users": users, **figures, "users_per_second": users / figures["p50_s"]}


def without_terms(model: TrainedModel) -> TrainedModel:
    """Return a model with the weights of its terms 0, whose matrix holds the item vectors alone."""
    vectors = model.catalogue.vectors.clone()  # other vectors, so that the matrix is made again
    plain = replace(model, weights=TermWeights())
    return plain.with_catalogue(replace(model.catalogue, vectors=vectors))


def latency(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure the time of one user, over users that are spread over the run."""
    model = TrainedModel.load(run, device)
    histories = dataset_histories(run)
    users = len(histories.user_ids)
    chosen = np.linspace(0, users - 1, settings.latency_users + WARM_UP_USERS).round().astype(int)
    seconds = []
    for user in chosen:
        history = histories.part(user, user + 1)
        started = time.perf_counter()
        list(recommend(model, history, K))
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    p50, p99 = np.quantile(seconds[WARM_UP_USERS:], (0.5, 0.99)).tolist()
    return {"users": settings.latency_users, "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99}


def forms(run: Path, settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure top_items beside its reference, and compare their items. Raises InputError if they disagree."""
    model = TrainedModel.load(run, device)
    histories = dataset_histories(run).part(0, FORM_USERS)
    scores = model.scores(histories)
    excluded = torch.from_numpy(histories.latest(int(histories.lengths.max())) - 1).to(device)
    added = None if scores.added is None else scores.added(np.arange(len(histories.user_ids)))
    results = {}

    def call(form: str) -> Callable[[], None]:
        def run_form() -> None:
            results[form] = kernels.top_items(scores.queries, scores.vectors, K, excluded, form=form, added=added)

        return run_form

    rows = [{"form": form, **timed(call(form), settings.rounds, device)} for form in ("auto", "reference")]
    return {
        "users": len(histories.user_ids),
        "rows": rows,
        "ratio": rows[1]["p50_s"] / rows[0]["p50_s"],
        **agreement(results["auto"], results["reference"]),
    }


def agreement(best: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Return how far two rankings agree. Raises InputError if their scores differ by more than rounding.

    Items within rounding of one another may change places, so items are counted and scores are compared.
    """
    rows, scores = best
    expected_rows, expected_scores = expected
    reached = torch.isfinite(expected_scores)
    if not torch.equal(reached, torch.isfinite(scores)):
        raise InputError("top_items: the forms leave out different numbers of items")
    largest = float(expected_scores[reached].abs().max())
    apart = float((scores[reached] - expected_scores[reached]).abs().max()) / max(largest, 1e-30)
    if not apart <= ROUNDING:
        raise InputError(f"top_items: scores of the forms differ by {apart:.1e} of the largest, expected {ROUNDING}")
    same = int((rows == expected_rows).all(dim=1).sum())
    return {"same_items_users": same, "largest_score_difference": apart}


def made_catalogue(settings: ServingSettings, device: torch.device) -> dict[str, Any]:
    """Measure the recommendations of a large made catalogue, once, and their peak memory."""
    model = made_model(settings.made_items, device)
    histories = made_histories(settings.made_items, settings.made_users)

    def serve() -> None:
        for _ in recommend(model, histories, K):  # a part at a time, as a file is written
            pass

    figures = with_peak(serve, 1, device)
    return {
        "items": settings.made_items,
        "users": settings.made_users,
        "cooccurrence_entries": len(model.cooccurrence.values),
        **figures,
        "users_per_second": settings.made_users / figures["p50_s"],
    }
