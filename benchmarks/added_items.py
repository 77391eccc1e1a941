"""Add held-out cold items to a trained run, and compare them with a catalogue that had them from the beginning.

    python -m iisan_fast.benchmarks.added_items DATASET --text-encoder ENCODER --folder FOLDER [--out FILE]

Some cold items are held out of the dataset. A run of the recipe `strong` is trained on the rest, over two views of the
titles; the items are then added by `add_items`. The same weights, basis, statistics and popularity are applied to
states of the whole catalogue, from another extraction. Vectors, coordinates and scores are compared, with states in
float32, the same not standardised, and states in bfloat16. A repeated call takes the states that are there, and trains
again.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ViewConfig
from ..data import load_dataset
from ..serving import Recommended, TrainedModel, UserHistories, add_items, recommend
from ..setting_sources import base_settings
from ..settings import run_config
from ..training import RunFolder, train
from .harness import folder_argument, run_script, script_parser, write_result
from .held_out_items import CPU, HeldOut, cache_of, hold_out, whole_vectors
from .machine import origin
from .scientific import LAYERS, PROTOCOL, show

COMMAND = "python -m iisan_fast.benchmarks.added_items"
RECIPE = Path(__file__).parents[1] / "recipes" / "strong.yaml"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # of runs: the dtype of the states, and changes of the recipe
    "float32": ("float32", {}),
    "float32_not_standardised": ("float32", {"model.standardise": False}),
    "bfloat16": ("bfloat16", {}),
}
ROUNDING = 2.0**-22  # of a number in float32, after the few operations of a layer
K = 10
SEED = 0
USERS_AT_ONCE = 1024
NOTES = {
    "held_out": "items without training interactions in the whole dataset, drawn at random; their interactions, which "
    "are targets of the validation or the test, are left out of the histories, which are then cut and split again",
    "lost": "other items whose last user has too few interactions then; they are left out of the comparison",
    "items": "of the rest and held-out; a history is cut to its last interactions, so older items may have joined",
    "deviation": "the largest absolute difference between the two ways, divided by the largest magnitude of the values",
    "scores": "of all users' whole histories in the whole dataset, without the term of co-occurrence, which is equal",
    "standardised": "how standardising amplifies rounding: the largest |mean| / deviation of a number of the states "
    "over the catalogue, the median, and how many numbers have a deviation within rounding, 2^-22 |mean|",
    "equal_top_10": "share of these users with the same ten items in the same order, with all terms",
    "equal_top_10_sets": "the same, in any order",
    "equal_top_10_titles": "the same, where an item counts as equal to others with its title",
    "add_cpu_s": "CPU seconds of add_items, the loading of the encoder included",
}


def main() -> None:
    """Compare, and print the result."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("dataset", type=folder_argument, help="the folder of the dataset")
    parser.add_argument("--text-encoder", required=True, help="hub name or folder of the encoder of titles")
    parser.add_argument("--folder", type=Path, required=True, help="for the states and the runs")
    parser.add_argument("--items", type=int, default=2000, help="to hold out (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of the training (%(default)s)")
    arguments = parser.parse_args()
    command = f"{COMMAND} DATASET --text-encoder ENCODER --folder FOLDER --items {arguments.items}"
    result = {
        "command": f"{command} --epochs {arguments.epochs}",
        **origin(arguments.dataset.resolve().name, CPU),
        **compare(arguments.dataset, arguments.text_encoder, arguments.folder, arguments.items, arguments.epochs),
        "notes": NOTES,
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)


def compare(dataset: Path, encoder: str, folder: Path, items: int, epochs: int, **changes: Any) -> dict[str, Any]:
    """Return the counts and the deviations with states of each dtype. changes: of the recipe, by dotted name."""
    held = hold_out(dataset, folder, PROTOCOL, items, SEED)
    text = {"source": "title", "encoder": encoder, "layers": LAYERS, "encoder_dtype": "float32"}
    views = [ViewConfig("title-cls", pooling="cls", **text), ViewConfig("title-mean", pooling="mean", **text)]
    parts = {"rest-states": load_dataset(held.rest, PROTOCOL), "whole-states": held.whole}
    by_form = {}
    for form, (dtype, of_form) in FORMS.items():
        caches = {
            name: cache_of(part, views, folder / f"{name}-{dtype}", dtype, folder / f"{name}-float32")
            for name, part in parts.items()
        }
        run = folder / f"run-{form}"
        if run.exists():
            shutil.rmtree(run)
        epochs_of_run = {"train.max_epochs": epochs, "train.patience": epochs}
        _train(held.rest, caches["rest-states"], run, epochs_of_run | of_form | changes)
        by_form[form] = _compared(dataset, held, run, caches["whole-states"])
    return {
        "held_out": len(held.item_ids),
        "cold": held.cold,
        "interactions_left_out": held.interactions,
        "lost": held.lost,
        "epochs": epochs,
        "states": by_form,
    }


def _train(dataset: Path, cache: Path, run: Path, changes: dict[str, Any]) -> None:
    """Train a run of the recipe `strong` on the rest of the dataset."""
    views = ["title-cls", "title-mean"]
    sources = {"dataset": str(dataset), "cache": str(cache), "views": views, "protocol": PROTOCOL}
    train(run_config(sources, base_settings(RECIPE), changes=changes), run, CPU, show)


def _compared(dataset: Path, held: HeldOut, run: Path, cache: Path) -> dict[str, Any]:
    """Add the held-out items to a run, and return the deviations from states of the whole catalogue in a cache."""
    trained = TrainedModel.load(run, CPU, changed=False)
    began = time.process_time()
    added = add_items(run, held.file, device=CPU).model
    seconds = time.process_time() - began
    catalogue = added.catalogue
    assert trained.similarity is not None and catalogue.coordinates is not None
    vectors, coordinates = whole_vectors(run, cache, catalogue.item_ids, trained.similarity)
    whole = added.with_catalogue(replace(catalogue, vectors=vectors, coordinates=coordinates))
    new = slice(catalogue.trained, None)
    histories = _histories(dataset, added)
    return {
        "items": len(catalogue.item_ids),
        "dims": coordinates.shape[1],
        "add_cpu_s": seconds,
        "deviation": {
            "vectors": _deviation(catalogue.vectors[new], vectors[new]),
            "coordinates": _deviation(catalogue.coordinates[new], coordinates[new]),
            "scores": _score_deviation(added, whole, histories, new),
            "vectors_of_trained_items": _deviation(catalogue.vectors[: new.start], vectors[: new.start]),
            "coordinates_of_trained_items": _deviation(catalogue.coordinates[: new.start], coordinates[: new.start]),
        },
        **({"standardised": _amplification(run)} if added.config.model.standardise else {}),
        **_rankings(added, whole, histories),
    }


def _amplification(run: Path) -> dict[str, float]:
    """Return by how much standardising amplifies a relative error of a number of the states."""
    tensors, _ = RunFolder.open(run).load_best()
    ratios = []
    for name, mean in tensors.items():
        if name.startswith("states.mean."):
            deviation = tensors[name.replace("mean", "deviation", 1)]
            ratios.append((mean.abs() / deviation)[deviation > 0])
    joined = torch.cat(ratios)
    return {
        "largest": float(joined.max()),
        "median": float(joined.median()),
        "within_rounding": int((joined > 1 / ROUNDING).sum()),
    }


def _histories(dataset: Path, model: TrainedModel) -> UserHistories:
    """Return all users' whole histories in the whole dataset, without the items that the catalogue lacks."""
    sequences = load_dataset(dataset, PROTOCOL).sequences
    numbers = np.array([0, *(model.catalogue.numbers.get(item_id, 0) for item_id in sequences.item_ids)])
    items = numbers[sequences.items]
    users = np.repeat(np.arange(len(sequences.user_ids)), np.diff(sequences.offsets))
    lengths = np.bincount(users[items > 0], minlength=len(sequences.user_ids))
    return UserHistories(sequences.user_ids, np.concatenate([[0], np.cumsum(lengths)]), items[items > 0])


def _deviation(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude."""
    return float((values - expected).abs().max() / expected.abs().max())


def _score_deviation(model: TrainedModel, whole: TrainedModel, histories: UserHistories, new: slice) -> float:
    """Return the largest difference of the users' scores of the new items, relative to the largest score."""
    difference = largest = 0.0
    for first in range(0, len(histories.user_ids), USERS_AT_ONCE):
        part = histories.part(first, first + USERS_AT_ONCE)
        one, other = (_scores(entry, part, new) for entry in (model, whole))
        difference = max(difference, float((one - other).abs().max()))
        largest = max(largest, float(other.abs().max()))
    return difference / largest


def _scores(model: TrainedModel, histories: UserHistories, new: slice) -> Tensor:
    """Return the scores [R, N] of the new items, without co-occurrence."""
    scores = model.scores(histories)
    return scores.queries @ scores.vectors[new].T


def _rankings(model: TrainedModel, whole: TrainedModel, histories: UserHistories) -> dict[str, float]:
    """Return the shares of users with equal top ten, and of new items among the recommended ones."""
    one, other = (_top(entry, histories) for entry in (model, whole))
    titles = np.unique(model.catalogue.titles or [], return_inverse=True)[1]
    return {
        "users": len(one),
        "equal_top_10": float((one == other).all(axis=1).mean()),
        "equal_top_10_sets": float((np.sort(one, axis=1) == np.sort(other, axis=1)).all(axis=1).mean()),
        "equal_top_10_titles": float((titles[one - 1] == titles[other - 1]).all(axis=1).mean()),
        "new_among_top_10": float((one > model.catalogue.trained).mean()),
    }


def _top(model: TrainedModel, histories: UserHistories) -> np.ndarray:
    """Return the numbers of the best ten items of all users, int64 [users, 10]."""
    parts: list[Recommended] = list(recommend(model, histories, K))
    return np.concatenate([part.items for part in parts])


if __name__ == "__main__":
    run_script(main)
