"""Evaluation beside the released research code's: item vectors, user states, ranks and metrics of the same data.

The forms take turns in one process; the memory of each is measured in another process. The dense form may rank a
sample of the users; figures that are scaled to all users say so. A further form ranks with the neighbour terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import NEIGHBOUR_WEIGHTS, EvaluationConfig, RunConfig, TrainConfig
from ..data import Sequences, Split
from ..errors import InputError
from ..evaluation import evaluate, ranking_metrics, target_ranks
from ..models import (
    CoOccurrence,
    NeighbourTerms,
    Recommender,
    Scores,
    Similarity,
    build_recommender,
)
from ..precision import resolve_precision
from ..progress import progress_bar
from ..states import FeatureTable
from .dense import DenseModel
from .harness import Setup
from .machine import on, peak_figures
from .peak_memory import PeakMemory
from .processes import in_a_process
from .settings import ARGSORT_USERS, EvaluateSettings, TrainSettings, refuse_more
from .stopwatch import Stopwatch, quantiles
from .train import VIEWS, random_states

K = 10
ITEMS_AT_ONCE = 512  # of the dense form, as the next
USERS_AT_ONCE = 1024
SCORED_AT_ONCE = 64  # users
PARTS = ("ranking", "evaluation")
RANK_TOLERANCE = 1e-3  # of the catalogue
METRIC_TOLERANCE = 1e-3  # and what one user is worth
NOTES = {
    "dense": "as the released research code evaluates: every item through the towers and the heads' maps one after the "
    "other, user states over all slots, padding too, scores of the whole catalogue, then user by user: history masked, "
    "torch.argsort, and the target's rank as the sum of all ranks times its one-hot label; history masked alone",
    "fast": "as iisan-fast train validates: heads folded into one map, packed histories, ranks by counting; history "
    "masked and unmasked at once, warm and cold targets apart",
    "bfloat16": "the fast form on states in bf16, as a run on CUDA holds them; not compared with the dense form",
    "terms": "as fast, with co-occurrence and similarity added to the scores: the users' terms are computed within the "
    "ranking; the matrix and the coordinates, which a run computes once, before",
    "both": "random states of bf16 numbers, held as fp32 on CUDA by the forms that are compared, which then compute in "
    "fp32; first weights",
    "ranking": "from given item vectors and user states",
    "evaluation": "item vectors, user states, ranks and metrics",
    "scaled": "the ranking's part of the time multiplied by all users / measured users",
    "peak": "the largest sum of proportional set sizes over one evaluation, in a process of its own, which holds the "
    "states and the imports as well",
}


@dataclass(frozen=True)
class EvaluationInputs:
    """The data, states and model that both forms evaluate."""

    sequences: Sequences
    split_name: str
    split: Split
    sample: np.ndarray  # numbers of the users whom the dense form ranks
    table: FeatureTable
    trained_table: FeatureTable  # as a run would hold it
    model: Recommender
    terms: NeighbourTerms
    device: torch.device


@dataclass(frozen=True)
class Evaluated:
    """The ranks and metrics of an evaluation, and the seconds of its stages."""

    ranks: np.ndarray  # of the form's users, history masked
    metrics: dict[str, float]
    seconds: dict[str, float]


def compare_evaluation(setup: Setup, settings: EvaluateSettings) -> dict[str, Any]:
    """Measure both forms on random states. Raises InputError where their ranks or metrics disagree."""
    sequences = setup.sequences
    device = setup.device
    settings = replace(settings, argsort_users=argsort_users(settings, setup.name, len(sequences.user_ids)))
    with on(device):
        inputs = make_inputs(sequences, settings, device)
        first = {name: run(inputs) for name, run in FORMS.items()}  # warms up, too
        agreed = agreement(first["dense"], first["fast"], inputs)
        forms = FORMS | WITH_TERMS | (ON_CUDA if device.type == "cuda" else {})
        runs = measure(forms, inputs, settings.rounds)
    peaks = {name: in_a_process(peak, name, sequences, settings, device) for name in forms}
    rows = {name: {"form": name, **summary(name, runs[name], inputs), **peaks[name]} for name in forms}
    seconds = {name: {part: row[part]["all_users"]["p50_s"] for part in PARTS} for name, row in rows.items()}
    return {
        "settings": asdict(settings),
        "users": len(inputs.split.targets),
        "catalogue": len(sequences.item_ids),
        "notes": NOTES,
        **agreed,
        "forms": list(rows.values()),
        "ratios": {part: seconds["dense"][part] / seconds["fast"][part] for part in PARTS},
        "terms_ratios": {part: seconds["terms"][part] / seconds["fast"][part] for part in PARTS},
        "ratios_scaled": rows["dense"]["ranking"]["all_users"]["scaled"],
    }


def argsort_users(settings: EvaluateSettings, name: str, users: int) -> int:
    """Return the number of users whom the dense form ranks. Raises InputError for more users than there are."""
    if settings.argsort_users is None:
        return min(users, ARGSORT_USERS)
    refuse_more("--argsort-users", settings.argsort_users, users, f"the users of {name}")
    return settings.argsort_users or users


def make_inputs(sequences: Sequences, settings: EvaluateSettings, device: torch.device) -> EvaluationInputs:
    """Make random states, a model at its first weights, and the neighbour terms of the histories and the states."""
    shape = TrainSettings(width=settings.width, layers=settings.layers, seed=settings.seed)
    trained = FeatureTable(tuple(view.to(device) for view in random_states(sequences, shape)))
    table = FeatureTable(tuple(view.float() for view in trained.views)) if device.type == "cuda" else trained
    config = RunConfig(dataset="", cache="", views=VIEWS, train=TrainConfig(seed=settings.seed))
    model = build_recommender(table, config, sequences.popularity, resolve_precision(config, device)).to(device).eval()
    scoring = config.scoring
    cooccurrence = CoOccurrence.of(sequences, scoring.cooccurrence_neighbours)
    terms = NeighbourTerms(cooccurrence, Similarity.of(table, scoring.similarity_dims))
    users = len(sequences.user_ids)
    sample = np.linspace(0, users - 1, settings.argsort_users).round().astype(int)
    return EvaluationInputs(
        sequences, settings.split, sequences.split(settings.split), sample, table, trained, model, terms, device
    )


@torch.no_grad()
def dense(inputs: EvaluationInputs) -> Evaluated:
    """Evaluate densely: the vectors of all items, the states of all users, the ranks of the sample."""
    form = DenseModel(inputs.model, list(inputs.table.views))
    watch = Stopwatch(inputs.device)
    numbers = torch.arange(1, inputs.table.rows, device=inputs.device)
    vectors = torch.cat([form.item_vectors(part) for part in numbers.split(ITEMS_AT_ONCE)])
    watch.lap("item_vectors")
    states = dense_states(form, vectors, torch.from_numpy(inputs.split.inputs).to(inputs.device))
    watch.lap("user_states")
    ranks = argsort_ranks(states, vectors, inputs.split, inputs.sample)
    figures = ranking_metrics(ranks, (K,))
    watch.lap("ranking")
    return Evaluated(ranks, figures, watch.seconds)


def dense_states(form: DenseModel, vectors: Tensor, inputs: Tensor) -> Tensor:
    """Return the states [users, d] after each user's inputs int64 [users, L], 0 for padding."""
    padded = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
    return torch.cat([form.sequence_states(padded[part], part > 0)[:, -1] for part in inputs.split(USERS_AT_ONCE)])


def argsort_ranks(states: Tensor, vectors: Tensor, split: Split, users: np.ndarray) -> np.ndarray:
    """Return the rank of each user's target among all items by sorting the scores: float64, history masked."""
    queries, targets, history = (
        torch.as_tensor(part)[users].to(vectors.device) for part in (states, split.targets, split.history)
    )
    places = torch.arange(1, len(vectors) + 1, dtype=vectors.dtype, device=vectors.device)
    ranks = []
    for part_queries, target, left_out in zip(*(part.split(SCORED_AT_ONCE) for part in (queries, targets, history))):
        scores = part_queries @ vectors.T
        labels = torch.zeros_like(scores).scatter_(1, target[:, None] - 1, 1)
        for row, label, items in zip(scores, labels, left_out):
            row[items[items > 0] - 1] = float("-inf")
            order = torch.argsort(row, descending=True)
            ranks.append((label[order] * places).sum())
    return torch.stack(ranks).double().cpu().numpy()


def fast(inputs: EvaluationInputs) -> Evaluated:
    """Evaluate as a run is evaluated; then rank once more, to time the ranking alone."""
    return evaluated(inputs, lambda states, vectors: Scores(states, vectors, None))


def with_terms(inputs: EvaluationInputs) -> Evaluated:
    """Evaluate as `fast` does, with both neighbour terms added to the scores."""
    histories = inputs.split.history

    def scores(states: Tensor, vectors: Tensor) -> Scores:
        return inputs.terms.scored(states, vectors, histories, **NEIGHBOUR_WEIGHTS)

    return evaluated(inputs, scores)


@torch.inference_mode()
def evaluated(inputs: EvaluationInputs, score: Callable[[Tensor, Tensor], Scores]) -> Evaluated:
    """Evaluate with the scores that `score` makes of user states and item vectors, and rank once more."""
    watch = Stopwatch(inputs.device)
    config = EvaluationConfig(ks=(K,))
    vectors = inputs.model.catalogue_vectors(inputs.table)
    watch.lap("item_vectors")
    states = inputs.model.user_states(vectors, inputs.split.inputs)
    watch.lap("user_states")
    queries, wide_vectors, added = score(states, vectors)
    report = evaluate(queries, wide_vectors, inputs.sequences, inputs.split_name, config, added)
    watch.lap("ranking_and_metrics")
    queries, wide_vectors, added = score(states, vectors)
    ranks, _ = target_ranks(queries, wide_vectors, inputs.split, config, added)
    watch.lap("ranking")
    return Evaluated(ranks, report["masked"], watch.seconds)


def bfloat16(inputs: EvaluationInputs) -> Evaluated:
    """Evaluate as `fast` does, from the states in the dtype that a run holds."""
    return fast(replace(inputs, table=inputs.trained_table))


FORMS: dict[str, Callable[[EvaluationInputs], Evaluated]] = {"dense": dense, "fast": fast}  # which must agree
WITH_TERMS: dict[str, Callable[[EvaluationInputs], Evaluated]] = {"terms": with_terms}
ON_CUDA: dict[str, Callable[[EvaluationInputs], Evaluated]] = {"bfloat16": bfloat16}
EVALUATION = {
    "dense": ("item_vectors", "user_states", "ranking"),
    "fast": ("item_vectors", "user_states", "ranking_and_metrics"),
    "terms": ("item_vectors", "user_states", "ranking_and_metrics"),
    "bfloat16": ("item_vectors", "user_states", "ranking_and_metrics"),
}  # the stages that make up the whole


def agreement(dense_run: Evaluated, fast_run: Evaluated, inputs: EvaluationInputs) -> dict[str, Any]:
    """Return HR and NDCG of the sample by both forms, and the largest difference of a user's ranks.

    Rounding may let scores change places. Raises InputError if the forms differ by more than that explains.
    """
    fast_ranks = fast_run.ranks[inputs.sample]
    reached = np.isfinite(fast_ranks)  # argsort puts a masked target last, which is a miss as well
    apart = np.abs(dense_run.ranks - fast_ranks, where=reached, out=np.zeros(len(reached)))
    allowed = max(1.0, RANK_TOLERANCE * len(inputs.sequences.item_ids))
    if not apart.max() <= allowed:
        raise InputError(f"the two forms' ranks differ by up to {apart.max():.0f}, expected at most {allowed:.0f}")
    figures = {"dense": dense_run.metrics, "fast": ranking_metrics(fast_ranks, (K,))}
    tolerance = METRIC_TOLERANCE + 1 / len(inputs.sample)
    metrics = {name: {form: figures[form][name] for form in FORMS} for name in (f"hr@{K}", f"ndcg@{K}")}
    for name, values in metrics.items():
        if not abs(values["dense"] - values["fast"]) <= tolerance:
            raise InputError(
                f"{name}: {values['dense']:.5f} by argsort, {values['fast']:.5f} by counting; "
                f"expected them within {tolerance:.5f}"
            )
    return {
        "agreement": {
            "users": len(inputs.sample),
            **metrics,
            "metric_tolerance": tolerance,
            "largest_rank_difference": float(apart.max()),
            "rank_tolerance": allowed,
            "ranks_that_differ": int((apart > 0).sum()),
        }
    }


def measure(
    forms: dict[str, Callable[[EvaluationInputs], Evaluated]], inputs: EvaluationInputs, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of every form's stages, once a round; the forms take turns."""
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    with progress_bar("benchmark", rounds * len(forms), "runs") as advance:
        for _ in range(rounds):
            for form, run in forms.items():
                runs[form].append(run(inputs).seconds)
                advance(1, form)
    return runs


def peak(form: str, sequences: Sequences, settings: EvaluateSettings, device: torch.device) -> dict[str, Any]:
    """Measure the memory of one evaluation in this process."""
    with on(device):
        inputs = make_inputs(sequences, settings, device)
        table = inputs.trained_table if form in ON_CUDA else inputs.table  # the other's memory is not this form's
        inputs = replace(inputs, table=table, trained_table=table)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with PeakMemory() as memory:
            (FORMS | WITH_TERMS | ON_CUDA)[form](inputs)
        return peak_figures(memory, device)


def summary(form: str, runs: list[dict[str, float]], inputs: EvaluationInputs) -> dict[str, Any]:
    """Return a form's figures over its runs: its stages, the ranking alone, and the whole evaluation."""
    users = len(inputs.split.targets)
    ranked = len(inputs.sample) if form == "dense" else users
    rest = [sum(run[stage] for stage in EVALUATION[form] if not stage.startswith("ranking")) for run in runs]
    last = [run[EVALUATION[form][-1]] for run in runs]
    return {
        "stages": {stage: quantiles([run[stage] for run in runs], "s") for stage in runs[0]},
        "ranking": part_summary([0.0] * len(runs), [run["ranking"] for run in runs], ranked, users),
        "evaluation": part_summary(rest, last, ranked, users),
    }


def part_summary(rest: list[float], ranking: list[float], ranked: int, users: int) -> dict[str, Any]:
    """Return the measured seconds, and those of all users, which are scaled if fewer users were ranked.

    rest: seconds that do not depend on the number of ranked users.
    """
    for_all = [others + seconds * users / ranked for others, seconds in zip(rest, ranking)]
    all_users = quantiles(for_all, "s") | {"scaled": ranked < users}
    return {
        "measured_users": ranked,
        **quantiles([others + seconds for others, seconds in zip(rest, ranking)], "s"),
        "all_users": all_users,
        "users_per_second": users / all_users["p50_s"],
    }
