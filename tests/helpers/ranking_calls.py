"""Functions that rank on the ranks of a job; the processes import them from here."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.datasets import make_sequences
from helpers.recommenders import side_recommender
from helpers.tables import random_table
from iisan_fast.cli import cli
from iisan_fast.config import EvaluationConfig, ModelConfig
from iisan_fast.data.sequences import Sequences
from iisan_fast.errors import InputError
from iisan_fast.evaluation import evaluate, target_ranks
from iisan_fast.models import CoOccurrence, NeighbourTerms
from iisan_fast.ranks import Ranks
from iisan_fast.serving import recommendation
from iisan_fast.training.scoring import Scoring, TermWeights, split_states

SHAPES = [(3, 16), (3, 16)]
CONFIG = EvaluationConfig((1, 10))


def random_histories(users: int, items: int) -> Sequences:
    """Return random histories, in some of which an item comes again."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 12, users)
    return make_sequences([rng.integers(1, items + 1, length).tolist() for length in lengths], items)


def ranking(ranks: Ranks, users: int, items: int, items_at_once: int) -> dict[str, Any]:
    """Return the vectors, ranks and figures of a random model with co-occurrence on random states and histories."""
    table = random_table(SHAPES, items, torch.float32)
    object.__setattr__(table, "items_at_once", items_at_once)
    sequences = random_histories(users, items)
    config = ModelConfig(embedding_dim=16, bottleneck=8)
    model = side_recommender(SHAPES, config, sequences.max_inputs, sequences.popularity, seed=0).eval()
    vectors = model.catalogue_vectors(table, ranks)
    scoring = Scoring(sequences, NeighbourTerms(CoOccurrence.of(sequences, 20), None), torch.device("cpu"), ranks)
    states = split_states(model, vectors, sequences.split("validation"), ranks)
    weights = TermWeights(cooccurrence=2.0, cold_bias=0.5)
    scores = scoring.scores(states, vectors, "validation", weights)
    split = sequences.split("validation")
    return {
        "states": len(states),
        "vectors": vectors,
        "ranks": target_ranks(scores.queries, scores.vectors, split, CONFIG, scores.added, ranks),
        "report": scoring.report(states, vectors, "validation", CONFIG, weights),
        "fitted": scoring.fitted(states, vectors, CONFIG),
        "baselines": scoring.baselines("test", CONFIG),
    }


def ranks_of_several_targets(ranks: Ranks, sequences: Sequences, queries: Tensor, vectors: Tensor) -> dict[str, Any]:
    """Return the metrics of a split in which users have several targets. queries: of all targets."""
    block = ranks.block(len(queries))
    return evaluate(queries[block], vectors, sequences, "test", CONFIG, ranks=ranks)


def broken_scores(ranks: Ranks, users: int) -> str:
    """Return the message that a rank gets if the states of the last user alone are not finite."""
    sequences = random_histories(users, 20)
    queries = torch.ones(users, 4)
    queries[-1] = torch.nan
    try:
        evaluate(queries[ranks.block(users)], torch.ones(20, 4), sequences, "test", CONFIG, ranks=ranks)
    except InputError as error:
        return str(error)
    return ""


def commands(ranks: Ranks, calls: list[list[str]], users_at_once: int) -> list[tuple[str, str]]:
    """Run commands one after the other; return the output and the error of each.

    calls: their words, in which {rank} stands for the number of this rank. users_at_once: of the parts in which users
    are recommended items.
    """
    recommendation.USERS_AT_ONCE = users_at_once
    return [command([word.format(rank=ranks.rank) for word in words]) for words in calls]


def command(words: list[str]) -> tuple[str, str]:
    """Run a command; return its text on standard output, and the message of its InputError."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            cli.main(words, standalone_mode=False)
        except InputError as error:
            return out.getvalue(), str(error)
    return out.getvalue(), ""
