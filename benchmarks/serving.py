"""Serving by a trained run: loading, recommending, one user's time, the forms of top_items, and a made catalogue.

Each part runs in a process of its own, whose peak memory is taken while the part's work is done. A part that needs what
is not here has the reason in place of its figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..errors import InputError
from ..serving import TrainedModel, UserHistories, recommend
from ..training import RunFolder, TermWeights
from .harness import Setup
from .machine import in_a_process, peak_figures, synchronise
from .made_catalogue import made_histories, made_model
from .peak_memory import PeakMemory
from .settings import ServingSettings
from .stopwatch import quantiles

K = 10
WARM_UP_USERS = 10
FORM_USERS = 2048  # on whom the forms of top_items are compared
ROUNDING = 1e-5  # of the largest score: forms may order scores within it differently
SCIENTIFIC = {"users": 12_076, "items": 20_314}
GOALS = {"all_users_s": 2.0, "made_items": 1_000_000, "made_users": 10_000, "made_bytes": 2_000_000_000}
NOTES = {
    "cpu_s": "seconds of all threads of the process; with several rounds the median",
    "loading": "a run's folder to a model in memory, from a warm file cache; imports are not counted",
    "recommending": "the ten best items of every user of the run after the whole history, as item numbers with scores. "
    "run: with the run's terms. no_terms: with their weights 0. with_history: items of the history may be recommended",
    "latency": "one user at a time, histories spread over all users, after ten to warm up",
    "forms": "top_items alone, from given queries, item vectors and terms; the reference sorts all scores of each user",
    "made": "random item vectors of 64 numbers, coordinates of 128, a co-occurrence matrix of ten entries an item, and "
    "histories of 5 to 13 items; an untrained SASRec. The peak holds the model and the imports too",
    "goals": "all users of Scientific in 2 s on two cores; 10,000 users and 1,000,000 items in 2 GB. null: other sizes",
    "peak": "the largest sum of proportional set sizes of the process while the part's work was done",
}


def measure_serving(setup: Setup, settings: ServingSettings) -> dict[str, Any]:
    """Measure all parts of serving on the run in the folder `setup.dataset`. Raises InputError if it cannot be read."""
    from .serving_changes import CHANGES  # imports what a part needs

    run = setup.dataset
    assert run is not None
    device = setup.device
    folder = RunFolder.open(run)
    histories = dataset_histories(run)
    figures: dict[str, Any] = {
        "settings": asdict(settings),
        "dataset": Path(folder.config.dataset).name,
        "run": run_description(folder, histories),
        "notes": NOTES,
        "loading": in_a_process(loading, run, settings, device),
        "recommending": [in_a_process(recommending, run, form, settings, device) for form in VARIANTS],
        "latency": in_a_process(latency, run, settings, device),
        "forms": in_a_process(forms, run, settings, device),
        "made": in_a_process(made_catalogue, settings, device),
    }
    for name, part in CHANGES.items():
        figures[name] = measured_or_reason(part, run, settings, device)
    return figures | {"goals": goals(figures)}


def run_description(folder: RunFolder, histories: UserHistories) -> dict[str, Any]:
    """Return the method and the sizes of a run."""
    config = folder.config
    return {
        "method": config.model.method,
        "embedding_dim": config.model.embedding_dim,
        "users": len(histories.user_ids),
        "items": len(folder.items.item_ids),
    }


def measured_or_reason(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the figures of a part, or the reason why it cannot be measured here, under "not_measured"."""
    try:
        return in_a_process(part, *arguments)
    except InputError as error:
        return {"not_measured": str(error)}


def goals(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the goals and whether they were met; None for a run or a made catalogue of another size."""
    sizes = {name: figures["run"][name] for name in SCIENTIFIC}
    made = figures["made"]
    whole_run = figures["recommending"][0]["p50_s"] <= GOALS["all_users_s"] if sizes == SCIENTIFIC else None
    is_large = made["items"] >= GOALS["made_items"] and made["users"] >= GOALS["made_users"]
    peak = made["peak_pss_bytes"]
    memory = peak <= GOALS["made_bytes"] if is_large and not isinstance(peak, str) else None
    return {**GOALS, "all_users_met": whole_run, "made_bytes_met": memory}


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
