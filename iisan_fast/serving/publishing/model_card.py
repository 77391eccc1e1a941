"""Write the model card of a published run: figures beside baselines, their rule, the encoders, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...config import FEATURES, NEIGHBOURS, TUNING_METHODS
from ...training import RunFolder
from ..report.page_figures import BASELINES

LIBRARY = "iisan-fast"
TAGS = ("recommendation", "sequential-recommendation", "multimodal", "iisan")
TASK = "sequential-recommendation"
NOT_RECORDED = "not recorded"
TIES = {
    "half": "items that score the same count half",
    "best": "items that score the same count nothing, which favours the model",
}
SPLITS = {
    "leave-one-out": "leave-one-out: a user's last item is the target, the last but one is for validation",
    "temporal": "temporal: the targets come after one moment, which is the same for all users",
    "given": "given: the dataset says which interactions are for training, validation and the test",
}
LOADING = """```python
from iisan_fast import IISAN

model = IISAN.from_pretrained({name})
for item in model.recommend([[{first}, {second}]], k=10)[0]:
    print(item.item_id, item.score)
```"""


def model_card(folder: Path, name: str, license_name: str | None) -> str:
    """Return the README.md of a published run, with the header that the hub reads.

    folder: of the published run. name: of the model on the hub. license_name: of its license on the hub; None leaves it
    out. Raises InputError if the folder is damaged.
    """
    run = RunFolder.open(folder)
    sections = [
        f"---\n{_header(run, name, license_name).to_yaml()}\n---",
        f"# {name}",
        _summary(run),
        f"## Use\n\n`pip install iisan-fast`, then:\n\n{_loading(run, name)}",
        f"## Figures\n\n{_figures(run)}\n\n{_rule(run)}",
        f"## Encoders\n\n{_encoders(run)}",
        f"## Files\n\n{_files(run)}",
    ]
    return "\n\n".join(sections) + "\n"


def _header(run: RunFolder, name: str, license_name: str | None) -> ModelCardData:
    """Return the header of the card: library, tags, license, and the test figures with history masked."""
    config = run.config
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Sequential recommendation",
            dataset_type=config.dataset,
            dataset_name=config.dataset,
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{metric.upper()}, full catalogue, history masked",
            metric_value=round(value, 6),
        )
        for metric, value in _metrics(run.figures["test"]["masked"])
    ]
    tags = [*TAGS, config.model.method]
    return ModelCardData(
        library_name=LIBRARY,
        license=license_name,
        tags=list(dict.fromkeys(tags)),
        model_name=name,
        eval_results=results,
    )


def _summary(run: RunFolder) -> str:
    """Return what the model is, in one paragraph."""
    config = run.config
    items = len(run.items.item_ids)
    return (
        f"A sequential recommender, trained on the {items:,} items of `{config.dataset}` with {LIBRARY} "
        f"by the method `{config.model.method}`, seed {config.train.seed}. It takes a history, a list of "
        "item ids with the oldest first, and ranks all items. The history may be of a user whom training has not seen."
    )


def _loading(run: RunFolder, name: str) -> str:
    """Return the lines of Python that load the model and rank."""
    first, second, *_ = [*run.items.item_ids, *run.items.item_ids]
    return LOADING.format(name=json.dumps(name), first=json.dumps(first), second=json.dumps(second))


def _figures(run: RunFolder) -> str:
    """Return a table of the test figures beside the baselines', for all targets, warm and cold ones, in percent."""
    figures = run.figures
    metrics = [metric for metric, _ in _metrics(figures["test"]["masked"])]
    lines = [
        f"| ranking | targets | users | {' | '.join(metric.upper() for metric in metrics)} |",
        f"|---|---|---|{'---|' * len(metrics)}",
    ]
    rankings = {f"this model (`{figures['method']}`)": "test", **{f"`{name}`": name for name in BASELINES}}
    for label, key in rankings.items():
        for targets, part in _parts(figures.get(key) or {}):
            values = " | ".join(
                "–" if (value := part.get(metric)) is None else f"{100 * value:.2f}" for metric in metrics
            )
            lines.append(f"| {label} | {targets} | {part['users']:,} | {values} |")
    return "\n".join(lines)


def _rule(run: RunFolder) -> str:
    """Return the rule that the figures follow."""
    config = run.config
    figures = run.figures
    test = figures["test"]
    weights = {name: value for name, value in figures.get("scoring", {}).items() if value}
    least = config.protocol.min_interactions
    too_short = "" if config.protocol.split == "given" else f"Users with fewer than {least} interactions are left out. "
    terms = ", ".join(f"{name} {value:g}" for name, value in weights.items()) or "none"
    return "\n".join(
        (
            "In percent, on the test set. The rule:",
            "",
            f"- The split is {SPLITS[config.protocol.split]}. {too_short}The last {config.protocol.max_inputs} inputs "
            "are read.",
            *_counting(test),
            "- Each target is ranked against the full catalogue, without the items of the user's history. "
            f"{test['unreachable']:,} targets stand in it already, and count as a miss.",
            f"- Of ties, {TIES[test['ties']]}.",
            f"- {_choice(run)}",
            "- Cold targets never occur in training, warm ones do.",
            f"- Neighbour terms added to the model's score: {terms}.",
            "- `popularity` ranks by training counts, `neighbours` by co-occurrence and similarity; nothing is trained "
            "for these two.",
        )
    )


def _counting(test: Mapping[str, Any]) -> list[str]:
    """Return the lines on several targets of one user, and on targets that are left out; none without them."""
    lines = []
    if "several_targets" in test:
        lines.append(f"- {test['targets']:,} targets of {test['users']:,} users; {test['several_targets']}.")
    if left_out := test.get("without_history"):
        lines.append(f"- {left_out:,} targets are left out: no interaction of their user comes before them.")
    return lines


def _choice(run: RunFolder) -> str:
    """Return how the weights that were tested were chosen."""
    if run.config.model.method == NEIGHBOURS:
        return "Nothing is trained, so no epoch was chosen."
    figures = run.figures
    return (
        f"The best of {figures['epochs']} epochs by validation HR@10 (epoch {figures['best_epoch']}) was tested once. "
        f"This is one seed ({run.config.train.seed}); the deviation over seeds is not measured here."
    )


def _encoders(run: RunFolder) -> str:
    """Return a table of the views and the digests of their encoders; they are not among the files."""
    views = run.views
    if not views:
        return "None: this method reads no content."
    lines = ["| view | reads | encoder | pooling | layers | SHA-256 of the weights |", "|---|---|---|---|---|---|"]
    for name, view in views.items():
        layers = ", ".join(map(str, view["layers"]))
        if view["source"] == FEATURES:
            lines.append(f"| {name} | {FEATURES} | none: `{view['path']}` | – | {layers} | – |")
            continue
        encoder, pooling, weights = (view.get(part, NOT_RECORDED) for part in ("encoder", "pooling", "weights"))
        lines.append(f"| {name} | {view['source']} | `{encoder}` | {pooling} | {layers} | `{weights}` |")
    if any(view["source"] != FEATURES for view in views.values()):
        lines += [
            "",
            f"{_training_of_encoders(run)} To rank, none is needed. To add items, name their folders; the digests are "
            "compared.",
        ]
    if any(view["source"] == FEATURES for view in views.values()):
        lines += ["", "Features are ready-made, and not among the files. To add items, give theirs in the same form."]
    return "\n".join(lines)


def _training_of_encoders(run: RunFolder) -> str:
    """Return whether the encoders were trained, and where their weights are."""
    if run.config.model.method in TUNING_METHODS:
        return "They are not among the files; what was trained of them is in `best.safetensors`."
    return "They were frozen, and are not among the files."


def _files(run: RunFolder) -> str:
    """Return what the files hold, what they reveal, and what is left out."""
    titles = "their titles" if run.items.titles is not None else "no titles"
    similarity = "" if not run.config.has_states else ", and the items' coordinates of similarity"
    lines = [
        f"- `items.npz`: the item ids with their training counts, {titles}.",
        *(["- `best.safetensors`: the weights and the item vectors."] if run.best.exists() else []),
        "- `config.json`, `views.json`: the settings, with names in place of paths. `test.json`: the figures.",
        f"- `neighbours.safetensors`: co-occurrence, made from the training histories{similarity}. Co-occurrence holds "
        "a weighted count for pairs of items that one user took near each other: which items were taken together, and "
        "of a rare pair, that at least one user took both. It names no user.",
    ]
    if (run.path / "catalogue.safetensors").exists():
        lines.append("- `catalogue.safetensors`: items that were added, updated or removed after training.")
    if run.has_histories:
        lines.append("- `sequences.npz`: the users' ids and histories, which were included on request.")
    left_out = [
        *([] if run.has_histories else ["user ids and histories"]),
        *([] if run.items.titles is not None else ["titles"]),
        "pictures",
        "the encoders",
        "the optimizer's state",
    ]
    lines.append(f"- Left out on purpose: {', '.join(left_out)}.")
    return "\n".join(lines)


def _metrics(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each metric over all targets."""
    for name, value in figures.items():
        if isinstance(value, float):
            yield name, value


def _parts(figures: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the figures of all targets, and of warm and cold ones if there are any.

    Nothing is yielded for a ranking without figures.
    """
    if not figures:
        return
    masked = figures["masked"]
    yield "all", {**masked, "users": figures["users"]}
    for name in ("warm", "cold"):
        if masked.get(name, {}).get("users"):
            yield name, masked[name]
