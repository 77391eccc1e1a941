"""Evaluation beside the released research code's: item vectors, user states, ranks and metrics of the same data.

The forms take turns in one process; the memory of each is measured in a process of its own. The dense form may rank a
sample of the users: what is then scaled to all of them is marked as scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import EvaluationConfig, RunConfig, TrainConfig
from ..data import Sequences, Split
from ..errors import InputError
from ..evaluation import evaluate, ranking_metrics, target_ranks
from ..models import Recommender, build_recommender
from ..precision import resolve_precision
from ..progress import progress_bar
from ..states import FeatureTable
from .dense import DenseModel
from .machine import NOT_MEASURED, QUANTILES, in_a_process, named_sequences, on, origin
from .peak_memory import PeakMemory
from .stopwatch import Stopwatch
from .train import VIEWS, TrainSettings, random_states

K = 10
ITEMS_AT_ONCE, USERS_AT_ONCE = 512, 1024  # of the dense form
SCORED_AT_ONCE = 64  # users
ARGSORT_USERS = 2000
RANK_TOLERANCE = 1e-3  # of the catalogue
METRIC_TOLERANCE = 1e-3  # and what one user is worth
NOTES = {
    "dense": "as the released research code evaluates: every item through the towers and the heads' maps one after the "
    "other, user states over all slots, padding too, scores of the whole catalogue, then user by user: history masked, "
    "torch.argsort, and the target's rank as the sum of all ranks times its one-hot label; history masked alone",
    "fast": "as iisan-fast train validates: heads folded into one map, packed histories, ranks by counting; history "
    "masked and unmasked at once, warm and cold targets apart",
    "bfloat16": "the fast form on states in bf16, as a run on CUDA holds them; not compared with the dense form",
    "both": "random states of bf16 numbers, held as fp32 on CUDA by the forms that are compared, which then compute in "
    "fp32; first weights",
    "ranking": "from given item vectors and user states",
    "evaluation": "item vectors, user states, ranks and metrics",
    "scaled": "the ranking's part of the time multiplied by all users / measured users",
    "peak": "the largest sum of proportional set sizes over one evaluation, in a process of its own, which holds the "
    "states and the imports as well",
}


@dataclass(frozen=True)
class EvaluateSettings:
    """Of a benchmark."""

    split: str = "test"
    width: int = 768
    layers: int = 7
    argsort_users: int | None = None  # spread over all, whom the dense form ranks; 0: all; None: at most ARGSORT_USERS
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class EvaluationWork:
    """What both forms evaluate."""

    sequences: Sequences
    split_name: str
    split: Split
    sample: np.ndarray  # numbers of the users whom the dense form ranks
    table: FeatureTable
    trained_table: FeatureTable  # as a run would hold it
    model: Recommender
    device: torch.device


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, and the seconds of its stages."""

    ranks: np.ndarray  # of the form's users, history masked
    metrics: dict[str, float]
    seconds: dict[str, float]


def benchmark(dataset: Path | None, settings: EvaluateSettings, device: torch.device) -> dict[str, Any]:
    """Both forms on a dataset's histories, or the embedded demo's, and random states.

    Raises InputError where they disagree.
    """
    name, sequences = named_sequences(dataset)
    settings = replace(settings, argsort_users=argsort_users(settings, name, len(sequences.user_ids)))
    with on(device):
        work = make_work(sequences, settings, device)
        first = {form: run(work) for form, run in FORMS.items()}  # warms up, too
        agreed = agreement(first["dense"], first["fast"], work)
        forms = FORMS | (ON_CUDA if device.type == "cuda" else {})
        runs = measure(forms, work, settings.rounds)
    peaks = {form: in_a_process(peak, form, sequences, settings, device) for form in forms}
    rows = {form: {"form": form, **summary(form, runs[form], work), **peaks[form]} for form in forms}
    return {
        **origin(name, device),
        "settings": asdict(settings),
        "users": len(work.split.targets),
        "catalogue": len(sequences.item_ids),
        "notes": NOTES,
        **agreed,
        "forms": list(rows.values()),
        "ratios": {
            part: rows["dense"][part]["all_users"]["p50_s"] / rows["fast"][part]["all_users"]["p50_s"]
            for part in ("ranking", "evaluation")
        },
        "ratios_scaled": rows["dense"]["ranking"]["all_users"]["scaled"],
    }


def argsort_users(settings: EvaluateSettings, name: str, users: int) -> int:
    """How many users the dense form ranks. Raises InputError where there are not as many."""
    if settings.argsort_users is None:
        return min(users, ARGSORT_USERS)
    if settings.argsort_users > users:
        raise InputError(f"--argsort-users {settings.argsort_users}: expected at most {users}, the users of {name}")
    return settings.argsort_users or users


def make_work(sequences: Sequences, settings: EvaluateSettings, device: torch.device) -> EvaluationWork:
    """Random states and a model at its first weights, on the device."""
    shape = TrainSettings(width=settings.width, layers=settings.layers, seed=settings.seed)
    trained = FeatureTable(tuple(view.to(device) for view in random_states(sequences, shape)))
    table = FeatureTable(tuple(view.float() for view in trained.views)) if device.type == "cuda" else trained
    config = RunConfig(dataset="", cache="", views=VIEWS, train=TrainConfig(seed=settings.seed))
    model = build_recommender(table, config, sequences.popularity, resolve_precision(config, device)).to(device).eval()
    users = len(sequences.user_ids)
    sample = np.linspace(0, users - 1, settings.argsort_users).round().astype(int)
    return EvaluationWork(
        sequences, settings.split, sequences.split(settings.split), sample, table, trained, model, device
    )


@torch.no_grad()
def dense(work: EvaluationWork) -> Evaluated:
    """All items, all users' states, and the ranks of the sample, densely."""
    form, watch = DenseModel(work.model, list(work.table.views)), Stopwatch(work.device)
    numbers = torch.arange(1, work.table.rows, device=work.device)
    vectors = torch.cat([form.item_vectors(part) for part in numbers.split(ITEMS_AT_ONCE)])
    watch.lap("item_vectors")
    states = dense_states(form, vectors, torch.from_numpy(work.split.inputs).to(work.device))
    watch.lap("user_states")
    ranks = argsort_ranks(states, vectors, work.split, work.sample)
    figures = ranking_metrics(ranks, (K,))
    watch.lap("ranking")
    return Evaluated(ranks, figures, watch.seconds)


def dense_states(form: DenseModel, vectors: Tensor, inputs: Tensor) -> Tensor:
    """[users, d] after each user's inputs int64 [users, L], 0 for padding."""
    padded = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
    return torch.cat([form.sequence_states(padded[part], part > 0)[:, -1] for part in inputs.split(USERS_AT_ONCE)])


def argsort_ranks(states: Tensor, vectors: Tensor, split: Split, users: np.ndarray) -> np.ndarray:
    """float64, a rank for each of the users: the target's place among all scores, sorted, their history masked."""
    queries, targets, history = (
        torch.as_tensor(part)[users].to(vectors.device) for part in (states, split.targets, split.history)
    )
    places = torch.arange(1, len(vectors) + 1, dtype=vectors.dtype, device=vectors.device)
    ranks = []
    for some, target, left_out in zip(*(part.split(SCORED_AT_ONCE) for part in (queries, targets, history))):
        scores = some @ vectors.T
        labels = torch.zeros_like(scores).scatter_(1, target[:, None] - 1, 1)
        for row, label, own in zip(scores, labels, left_out):
            row[own[own > 0] - 1] = float("-inf")
            order = torch.argsort(row, descending=True)
            ranks.append((label[order] * places).sum())
    return torch.stack(ranks).double().cpu().numpy()


@torch.inference_mode()
def fast(work: EvaluationWork) -> Evaluated:
    """All of it as a run is evaluated; the ranks are found once more, to be timed alone."""
    watch, config = Stopwatch(work.device), EvaluationConfig(ks=(K,))
    vectors = work.model.catalogue_vectors(work.table)
    watch.lap("item_vectors")
    states = work.model.user_states(vectors, work.split.inputs)
    watch.lap("user_states")
    report = evaluate(states, vectors, work.sequences, work.split_name, config)
    watch.lap("ranking_and_metrics")
    ranks, _ = target_ranks(states, vectors, work.split, config)
    watch.lap("ranking")
    return Evaluated(ranks, report["masked"], watch.seconds)


def bfloat16(work: EvaluationWork) -> Evaluated:
    """The same from the states as a run holds them."""
    return fast(replace(work, table=work.trained_table))


FORMS: dict[str, Callable[[EvaluationWork], Evaluated]] = {"dense": dense, "fast": fast}  # which must agree
ON_CUDA: dict[str, Callable[[EvaluationWork], Evaluated]] = {"bfloat16": bfloat16}
EVALUATION = {
    "dense": ("item_vectors", "user_states", "ranking"),
    "fast": ("item_vectors", "user_states", "ranking_and_metrics"),
    "bfloat16": ("item_vectors", "user_states", "ranking_and_metrics"),
}  # the stages that make up the whole


def agreement(dense_run: Evaluated, fast_run: Evaluated, work: EvaluationWork) -> dict[str, Any]:
    """HR and NDCG of the sample by both forms, and how far the ranks of one user lie apart at most.

    Scores that differ by rounding may change places, where argsort's order is arbitrary anyway. Raises InputError where
    the forms differ by more.
    """
    fast_ranks = fast_run.ranks[work.sample]
    reached = np.isfinite(fast_ranks)  # argsort puts a masked target last, which is a miss as well
    apart = np.abs(dense_run.ranks - fast_ranks, where=reached, out=np.zeros(len(reached)))
    allowed = max(1.0, RANK_TOLERANCE * len(work.sequences.item_ids))
    if not apart.max() <= allowed:
        raise InputError(f"the two forms' ranks differ by up to {apart.max():.0f}, expected at most {allowed:.0f}")
    figures = {"dense": dense_run.metrics, "fast": ranking_metrics(fast_ranks, (K,))}
    tolerance = METRIC_TOLERANCE + 1 / len(work.sample)
    found = {name: {form: figures[form][name] for form in FORMS} for name in (f"hr@{K}", f"ndcg@{K}")}
    for name, values in found.items():
        if not abs(values["dense"] - values["fast"]) <= tolerance:
            raise InputError(
                f"{name}: {values['dense']:.5f} by argsort, {values['fast']:.5f} by counting; "
                f"expected them within {tolerance:.5f}"
            )
    return {
        "agreement": {
            "users": len(work.sample),
            **found,
            "metric_tolerance": tolerance,
            "largest_rank_difference": float(apart.max()),
            "rank_tolerance": allowed,
            "ranks_that_differ": int((apart > 0).sum()),
        }
    }


def measure(
    forms: dict[str, Callable[[EvaluationWork], Evaluated]], work: EvaluationWork, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """The seconds of every form's stages, once a round, in turns."""
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    with progress_bar("benchmark", rounds * len(forms), "runs") as advance:
        for _ in range(rounds):
            for form, run in forms.items():
                runs[form].append(run(work).seconds)
                advance(1, form)
    return runs


def peak(form: str, sequences: Sequences, settings: EvaluateSettings, device: torch.device) -> dict[str, Any]:
    """The memory that one evaluation takes in this process."""
    with on(device):
        work = make_work(sequences, settings, device)
        own = work.trained_table if form in ON_CUDA else work.table  # the other's memory is not this form's
        work = replace(work, table=own, trained_table=own)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with PeakMemory() as memory:
            (FORMS | ON_CUDA)[form](work)
        allocated = torch.cuda.max_memory_allocated(device) if cuda else NOT_MEASURED
    return {"peak_pss_bytes": NOT_MEASURED if memory.bytes is None else memory.bytes, "peak_cuda_bytes": allocated}


def summary(form: str, runs: list[dict[str, float]], work: EvaluationWork) -> dict[str, Any]:
    """A form's figures over its runs: its stages, the ranking alone, and the whole evaluation."""
    users = len(work.split.targets)
    ranked = len(work.sample) if form == "dense" else users
    rest = [sum(run[stage] for stage in EVALUATION[form] if not stage.startswith("ranking")) for run in runs]
    last = [run[EVALUATION[form][-1]] for run in runs]
    return {
        "stages": {stage: quantiles([run[stage] for run in runs]) for stage in runs[0]},
        "ranking": part_summary([0.0] * len(runs), [run["ranking"] for run in runs], ranked, users),
        "evaluation": part_summary(rest, last, ranked, users),
    }


def part_summary(rest: list[float], ranking: list[float], ranked: int, users: int) -> dict[str, Any]:
    """Measured with so many users ranked, and for all users: scaled where those are more. rest: seconds that do not
    depend on whom is ranked."""
    for_all = [own + seconds * users / ranked for own, seconds in zip(rest, ranking)]
    found = quantiles(for_all) | {"scaled": ranked < users}
    return {
        "measured_users": ranked,
        **quantiles([own + seconds for own, seconds in zip(rest, ranking)]),
        "all_users": found,
        "users_per_second": users / found["p50_s"],
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return dict(zip(("p20_s", "p50_s", "p80_s"), np.quantile(seconds, QUANTILES).tolist()))
