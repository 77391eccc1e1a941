"""Gather the figures of a run's page: accuracy beside the baselines, the rule of ranking, settings and environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...config import EvaluationConfig, ModelConfig, RunConfig
from ...errors import InputError
from ...evaluation import headline_metrics
from ...setting_fields import settings_of, to_dict
from ...setting_sources import SECTIONS
from ...training import BestRun, RunFolder

BASELINES = ("popularity", "neighbours")
DATA_SETTINGS = ("dataset", "cache", "views", "uncached", "features")  # of a run; they have no defaults to differ from
METRICS = ("hr", "ndcg")


class MethodFigures(NamedTuple):
    """The accuracy of the model, or of a baseline, as fractions."""

    name: str
    all_targets: dict[str, float | None]  # by "hr" and "ndcg"; None without targets
    warm: dict[str, float | None]
    cold: dict[str, float | None]


class Headline(NamedTuple):
    """The accuracy of a run beside the baselines, on one split."""

    split: str  # "test", or "validation" for a run that is not tested yet
    k: int
    methods: list[MethodFigures]  # the model first
    users: int
    targets: int  # of all users
    warm_targets: int
    cold_targets: int
    rule: list[str]  # how targets are ranked, in sentences
    without_similarity: bool  # True if the baseline neighbours had no states to compare
    weights: list[tuple[str, float]]  # of the terms that were added to the model's scores


class ChangedSetting(NamedTuple):
    """A setting that differs from its default."""

    name: str
    value: str
    default: str
    help: str


def tested_figures(folder: RunFolder, best_epoch: int) -> dict[str, Any] | None:
    """Return the figures in test.json; None if there are none, or if they are of another epoch than the best one.

    The latter happens while a finished run goes on. Raises InputError if the file is damaged.
    """
    if not folder.test.exists():
        return None
    figures = folder.figures
    return figures if figures["best_epoch"] == best_epoch else None


def validation_figures(best: BestRun) -> dict[str, Any]:
    """Return the figures of a run's best checkpoint on the validation targets, in the form of test.json."""
    config = best.config.evaluation
    states = best.user_states("validation")
    report = best.scoring.report(states, best.item_vectors, "validation", config, best.weights)
    return {
        "method": best.config.model.method,
        "validation": report,
        **best.scoring.baselines("validation", config),
        "scoring": best.weights._asdict(),
    }


def headline(figures: Mapping[str, Any], split: str, items: int, config: EvaluationConfig) -> Headline:
    """Return the figures of a split beside the baselines. items: the number of the catalogue.

    figures: in the form of test.json. Raises InputError if a figure is missing.
    """
    k = shown_k(config)
    try:
        reports = {"this run": figures[split], **{name: figures[name] for name in BASELINES if name in figures}}
        methods = [_method_figures(name, headline_metrics(report), k) for name, report in reports.items()]
        leading = headline_metrics(figures[split])
        counted = "targets" if "targets" in figures[split] else "users"  # with one target a user the two are equal
        weights = [(name, weight) for name, weight in figures.get("scoring", {}).items() if weight]
        return Headline(
            split=split,
            k=k,
            methods=methods,
            users=figures[split]["users"],
            targets=figures[split][counted],
            warm_targets=leading["warm"][counted],
            cold_targets=leading["cold"][counted],
            rule=_rule(figures[split], items),
            without_similarity=not figures.get("neighbours", {}).get("similarity", True),
            weights=weights,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"test.json: expected HR@{k} and NDCG@{k} of {split}, found none ({error})") from None


def shown_k(config: EvaluationConfig) -> int:
    """Return the cut-off of the page: 10 if the run has it, else the least one."""
    return 10 if 10 in config.ks else min(config.ks)


def changed_settings(config: RunConfig) -> list[ChangedSetting]:
    """Return the settings that differ from the defaults of the run's method, by section."""
    data = {name: getattr(config, name) for name in DATA_SETTINGS}
    defaults = dict(_flat(to_dict(RunConfig(**data, model=ModelConfig(config.model.method)))))
    changed: list[ChangedSetting] = []
    for name, value in _flat(to_dict(config)):
        if name.partition(".")[0] in DATA_SETTINGS or (name in defaults and defaults[name] == value):
            continue
        default = _text(defaults[name]) if name in defaults else "none"
        changed.append(ChangedSetting(name, _text(value), default, _help_of(name)))
    return changed


def described_views(folder: RunFolder) -> list[dict[str, str]]:
    """Return one row for each view: its name, encoder, pooling, layers and width. Raises InputError for damage."""
    if not (folder.path / "views.json").exists():
        return []
    rows = []
    for name, view in folder.views.items():
        layers = ", ".join(map(str, view["layers"])) if isinstance(view.get("layers"), list) else "–"
        shown = {part: str(view.get(part, "–")) for part in ("source", "encoder", "pooling", "width", "dtype")}
        if "path" in view:
            shown["encoder"] = f"none: {Path(view['path']).name}"
        rows.append({"view": name, **shown, "layers": layers})
    return rows


def _method_figures(name: str, report: Mapping[str, Any], k: int) -> MethodFigures:
    """Return the figures of a method's report at one cut-off."""
    parts = [{metric: part[f"{metric}@{k}"] for metric in METRICS} for part in (report, report["warm"], report["cold"])]
    return MethodFigures(name, *parts)


def _rule(report: Mapping[str, Any], items: int) -> list[str]:
    """Return how targets are ranked, in sentences."""
    sentences = [f"Each target is ranked against the full catalogue of {items:,} items, not against a sample."]
    if report["history_masked_by_default"]:
        lost = report["unreachable"]
        missed = f"; {lost:,} targets stand in it and count as a miss" if lost else ""
        sentences.append(f"Items of the user's history are left out of the ranking{missed}.")
    else:
        sentences.append("Items of the user's history are ranked too.")
    if report["ties"] == "half":
        sentences.append("Of the items that score like the target, half count as ranked above it.")
    else:
        sentences.append("Items that score like the target count as ranked below it, the best case.")
    if "several_targets" in report:
        sentences.append(f"{report['targets']:,} targets of {report['users']:,} users: {report['several_targets']}.")
    if left_out := report.get("without_history"):
        sentences.append(f"{left_out:,} more targets are left out, as no interaction of their user comes before them.")
    return sentences


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    """Return a value as a settings file has it."""
    return json.dumps(value, ensure_ascii=False)


def _help_of(name: str) -> str:
    """Return the meaning of a setting, from the help of its field; "" for a part of a field's mapping."""
    section, *names = name.split(".")
    known = settings_of(SECTIONS[section]) if section in SECTIONS else {}
    return known[names[0]].rules.help if len(names) == 1 and names[0] in known else ""
