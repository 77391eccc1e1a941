"""Accuracy on Scientific, titles alone: the paper's form, terms added to it, a ranking without training, and `strong`.

    python -m iisan_fast.benchmarks.accuracy DATASET --work FOLDER --out FOLDER
    python -m iisan_fast.benchmarks.accuracy DATASET --work FOLDER --out FOLDER --ablation

The first writes accuracy.json: test and validation figures over seeds, a paired test over users, and if each bound is
met. It reads the test set, so the recipe has to be committed before. The second writes accuracy-ablation.json: each
option alone, for a fixed number of epochs, by validation figures only. A repeated call takes finished runs as they are
and resumes the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import NEIGHBOUR_WEIGHTS, RunConfig, ViewConfig
from ..evaluation import paired_test
from ..setting_fields import to_dict
from ..setting_sources import base_settings
from ..training import BestRun, load
from .ablation import EPOCHS, ablation
from .accuracy_runs import (
    CPU,
    EVALUATION,
    METRICS,
    PAPER,
    Data,
    figures,
    mean_gains,
    mean_of,
    split_figures,
    trained,
    training_figures,
    user_figures,
    with_weights,
)
from .harness import folder_argument, run_script, write_result
from .machine import last_commit, origin
from .scientific import encode, titles

COMMAND = "python -m iisan_fast.benchmarks.accuracy"
RECIPE = Path(__file__).parents[1] / "recipes" / "strong.yaml"
MAX_TOKENS = 64
SPLITS = ("validation", "test")
FORMS = ("paper", "neighbours", "paper_with_terms", "paper_scored_as_strong", "strong")
COSTS = ("best_epoch", "epochs", "epoch_s")
TESTED = "each user's HR@10 and NDCG@10, the mean over seeds; Fisher's randomisation test, paired by user"


def main() -> None:
    """Train the runs that are left and write the figures."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=folder_argument, help="the folder of the Scientific dataset")
    parser.add_argument("--work", type=Path, required=True, help="keeps states and runs; a repeated call resumes them")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results (default: the current one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each (default: 0 1 2)")
    parser.add_argument("--ablation", action="store_true", help="each option alone, by validation, with the first seed")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the ablation's runs (default {EPOCHS})")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="settings of `strong` (default recipes/strong.yaml)"
    )
    parser.add_argument(
        "--encoder-dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of the text encoder (default bfloat16, which is slow on processors without instructions for it)",
    )
    arguments = parser.parse_args()
    # The commit is that of the code as it starts.
    source = {"command": command(arguments), **origin(arguments.dataset.resolve().name, CPU)}
    committed = None if arguments.ablation else last_commit(arguments.recipe)
    arguments.work.mkdir(parents=True, exist_ok=True)
    dataset, views = titles(arguments.dataset, arguments.work, arguments.encoder_dtype)
    views = [dataclasses.replace(view, max_tokens=MAX_TOKENS) for view in views]
    encode(dataset, views, arguments.work / "states")
    data = Data(dataset, [view.name for view in views], arguments.work)
    recipe = base_settings(arguments.recipe)
    if arguments.ablation:
        name = "accuracy-ablation.json"
        result = ablation(data, recipe, arguments.seeds[0], arguments.epochs)
    else:
        name = "accuracy.json"
        result = {"recipe_commit": committed, **accuracy(data, recipe, arguments.seeds)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_result(arguments.out / name, {**source, "views": described(views), **result})


def command(arguments: argparse.Namespace) -> str:
    """Return the command that gives these figures again; folders are left out."""
    words = [COMMAND, "DATASET", "--work FOLDER", f"--encoder-dtype {arguments.encoder_dtype}"]
    words.append(f"--seeds {' '.join(map(str, arguments.seeds))}")
    words += [f"--ablation --epochs {arguments.epochs}"] if arguments.ablation else []
    return " ".join(words)


def described(views: Sequence[ViewConfig]) -> list[dict[str, Any]]:
    """Return the views' settings, with an encoder's folder cut to its last two names."""
    return [{**to_dict(view), "encoder": "/".join(Path(view.encoder).parts[-2:])} for view in views]


def accuracy(data: Data, recipe: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Train the paper's form and the recipe with each seed, and return the figures of all four forms.

    recipe: settings as `base_settings` returns them. Raises InputError as `trained` does.
    """
    paper_runs = [data.work / f"paper-seed-{seed}" for seed in seeds]
    strong_runs = [data.work / f"strong-seed-{seed}" for seed in seeds]
    for seed, paper_run, strong_run in zip(seeds, paper_runs, strong_runs):
        trained(data.configuration({}, PAPER, seed), paper_run)
        trained(data.configuration(recipe, {}, seed), strong_run)
    paper = [load(run, CPU) for run in paper_runs]
    strong = [load(run, CPU) for run in strong_runs]
    with_terms = [with_weights(best, NEIGHBOUR_WEIGHTS) for best in paper]
    scored_as_strong = [
        best._replace(terms=of_strong.terms, weights=of_strong.weights) for best, of_strong in zip(paper, strong)
    ]
    forms = {
        "paper": list(map(run_row, paper_runs, paper)),
        "neighbours": [baseline_row(paper[0])],  # the same for every seed
        "paper_with_terms": list(map(run_row, paper_runs, with_terms)),
        "paper_scored_as_strong": list(map(run_row, paper_runs, scored_as_strong)),
        "strong": list(map(run_row, strong_runs, strong)),
    }
    means = {form: mean_over_seeds(rows) for form, rows in forms.items()}
    compared = compare_users(strong, with_terms)
    at_equal_scoring = compare_users(strong, scored_as_strong)
    return {
        "seeds": list(seeds),
        "weights": NEIGHBOUR_WEIGHTS,
        "settings": {"paper": recorded_settings(paper[0].config), "strong": recorded_settings(strong[0].config)},
        "mean_over_seeds": means,
        "runs": forms,
        "strong_minus_paper_with_terms": compared,
        "strong_minus_paper_scored_as_strong": at_equal_scoring,
        "bounds": bounds(means, compared, at_equal_scoring),
    }


def run_row(run: Path, best: BestRun) -> dict[str, Any]:
    """Return a run's cost, the weights of its terms, and its figures on both splits by them."""
    row = {split: split_figures(best, split) for split in SPLITS}
    return {"run": run.name, **training_figures(run), "scoring": best.weights._asdict(), **row}


def baseline_row(best: BestRun) -> dict[str, Any]:
    """Return the figures of the baseline `neighbours` on both splits, by the terms of a run."""
    return {split: figures(best.scoring.baselines(split, EVALUATION)["neighbours"]) for split in SPLITS}


def mean_over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of the figures on both splits, and of the cost where something was trained."""
    costs = [{name: row[name] for name in COSTS if name in row} for row in rows]
    return {**{split: mean_of([row[split] for row in rows]) for split in SPLITS}, **mean_of(costs)}


def compare_users(strong: Sequence[BestRun], paper: Sequence[BestRun]) -> dict[str, Any]:
    """Test the recipe's runs against those of the paper's form, by the weights of each, paired by test users."""
    gains, others = (mean_gains(list(map(user_figures, bests))) for bests in (strong, paper))
    return {
        "tested": TESTED,
        "difference": {name: float((gains[name] - others[name]).mean()) for name in METRICS},
        "p_value": {name: paired_test(gains[name], others[name]) for name in METRICS},
    }


def bounds(
    means: Mapping[str, Any], compared: Mapping[str, Any], at_equal_scoring: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the bounds with what was measured: "must" ones, aims and one beside them, HR@10 and NDCG@10 in percent.

    means: by form, as `mean_over_seeds` returns them. compared, at_equal_scoring: `strong` against the paper's form
    with both terms by default and scored as `strong` is, as `compare_users` returns them.
    """
    paper, neighbours, terms, _, strong = (means[form] for form in FORMS)
    hr, ndcg = METRICS
    percent = {
        name: {metric: 100 * form["test"][metric] for metric in METRICS}
        for name, form in (("paper", paper), ("neighbours", neighbours), ("strong", strong))
    }
    gain = 100 * compared["difference"][hr]
    cold = 100 * (strong["test"][f"cold_{hr}"] or 0)
    return [
        bound("must", "HR@10 of the paper's form", percent["paper"][hr], least=7.5),
        bound("must", "NDCG@10 of the paper's form", percent["paper"][ndcg], least=4.5),
        bound("must", "HR@10 of neighbours", percent["neighbours"][hr], least=9.1),
        bound("must", "NDCG@10 of neighbours", percent["neighbours"][ndcg], least=5.9),
        bound("must", "HR@10 of strong less that of the paper's form with both terms", gain, least=0.3),
        bound("must", "p of that difference, over users", compared["p_value"][hr], below=0.05),
        bound(
            "beside",
            "HR@10 of strong less that of the paper's form scored as strong is",
            100 * at_equal_scoring["difference"][hr],
            least=0.3,
        ),
        bound("must", "epochs of strong as a share of the paper's form", strong["epochs"] / terms["epochs"], most=0.5),
        bound(
            "must",
            "epochs of strong to its best as a share of the paper's form",
            strong["best_epoch"] / terms["best_epoch"],
            most=0.5,
        ),
        bound("must", "HR@10 of strong for cold targets", cold, least=5.5),
        bound("aim", "HR@10 of strong", percent["strong"][hr], least=11.0),
        bound("aim", "NDCG@10 of strong", percent["strong"][ndcg], least=7.0),
    ]


def bound(
    kind: str,
    figure: str,
    measured: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> dict[str, Any]:
    """Return a bound's row with its verdict, "met" or "not met". Of least, most and below, one is given."""
    limits = {"least": least, "most": most, "below": below}
    required = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
    met = least <= measured <= most and measured < below
    return {"kind": kind, "figure": figure, "measured": measured, **required, "verdict": "met" if met else "not met"}


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return the resolved settings of a run, without the places of its data and its seed."""
    settings = to_dict(config)
    del settings["dataset"], settings["cache"], settings["train"]["seed"]
    return settings


if __name__ == "__main__":
    run_script(main)
