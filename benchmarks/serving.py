"""Serving by a trained run: loading, recommending, one user's time, the forms of top_items, and a made catalogue.

Each part runs in a process of its own, whose peak memory is taken while the part's work is done. A part that needs what
is not here has the reason in place of its figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..serving import UserHistories
from ..training import RunFolder
from .harness import Setup
from .processes import in_a_process
from .serving_changes import CHANGES
from .serving_parts import VARIANTS, dataset_histories, forms, latency, loading, made_catalogue, recommending
from .settings import ServingSettings

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
    "added": "iisan-fast add-items on a copy of the run: load it, load its encoders, encode the titles, write. Imports "
    "are not counted",
    "export": "item vectors, terms, the encoders as ONNX and torch.export, each run again and compared; imports "
    "are counted. index: an export with it, and the share of the exact ten best of the whole score that it finds",
    "page": "iisan-fast show: figures, charts, and twenty users with titles, and pictures if the dataset has them",
    "peak": "the largest sum of proportional set sizes of the process while the part's work was done",
}


def measure_serving(setup: Setup, settings: ServingSettings) -> dict[str, Any]:
    """Measure all parts of serving on the run in the folder `setup.dataset`. Raises InputError if it cannot be read."""
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
    catalogue = figures["made"]
    whole_run = figures["recommending"][0]["p50_s"] <= GOALS["all_users_s"] if sizes == SCIENTIFIC else None
    is_large = catalogue["items"] >= GOALS["made_items"] and catalogue["users"] >= GOALS["made_users"]
    peak = catalogue["peak_pss_bytes"]
    memory = peak <= GOALS["made_bytes"] if is_large and not isinstance(peak, str) else None
    return {**GOALS, "all_users_met": whole_run, "made_bytes_met": memory}
