"""The public functions: datasets, hidden states, training and evaluation, each in one call.

They resolve settings by the same code as the command line, which calls them. Paths may be text or `Path`, devices text
or `torch.device`. Every mistake in the arguments is an InputError, whose message is one line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from .config import (
    PLACEMENTS,
    EvaluationConfig,
    ExtractionConfig,
    FeaturesConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    ScoringConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from .data import Dataset
from .devices import torch_device
from .errors import InputError, check_choice
from .files import absolute_path, as_path
from .ranks import Ranks, joined_ranks
from .setting_fields import from_dict, to_dict
from .setting_sources import SECTIONS, PathLike, base_settings
from .settings import (
    ENCODER_SETTINGS,
    EVALUATION_SETTINGS,
    EXTRACTION_SETTINGS,
    PROTOCOL_SETTINGS,
    RUN_SETTINGS,
    TERM_SETTINGS,
    changed_section,
    extraction_config,
    refuse_unknown,
    run_config,
    take_views,
)
from .trusted_code import is_trusted, refuse_unasked_code_of_run

if TYPE_CHECKING:
    import torch

    from .states import Extracted, Merged
    from .training import BestRun, JobRunFolder
    from .verified import Verified

OnEpoch = Callable[[dict[str, Any]], None]
View: TypeAlias = "str | ViewConfig | FeaturesConfig"
Function = TypeVar("Function", bound=Callable[..., Any])


def _checks_names(settings: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Make a function refuse keyword arguments that are neither its parameters nor named in `settings`.

    The InputError names the nearest names. Arguments that are missing or too many are an InputError too.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [name for name in signature.parameters if name != "settings"]
        known = [*parameters, *settings]

        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            refuse_unknown(function.__name__, named, known)
            try:
                signature.bind(*arguments, **named)
            except TypeError as error:
                raise InputError(f"{function.__name__}: {error}") from None
            return function(*arguments, **named)

        return cast(Function, checked)

    return decorate


@_checks_names(PROTOCOL_SETTINGS)
def load_dataset(folder: PathLike, protocol: ProtocolConfig | None = None, **settings: Any) -> Dataset:
    """Read a dataset's items and histories, and apply the data protocol.

    folder: holds items.tsv and users.tsv; captions.tsv and times.tsv are read where they are needed.
    settings: those of ProtocolConfig, as min_interactions=5; they change `protocol`.

    Returns a Dataset: `titles` and `captions` by item, and `sequences`, the users' histories.
    Raises InputError, naming file and line, for a missing or malformed file.
    """
    from . import data

    return data.load_dataset(as_path("folder", folder), changed_section("protocol", ProtocolConfig, protocol, settings))


@_checks_names((*EXTRACTION_SETTINGS, *PROTOCOL_SETTINGS, *ENCODER_SETTINGS))
def extract(
    dataset: PathLike | Dataset | None = None,
    cache: PathLike | None = None,
    *,
    views: ViewConfig | Sequence[ViewConfig] = (),
    config: PathLike | Mapping[str, Any] | None = None,
    protocol: ProtocolConfig | None = None,
    extraction: ExtractionConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    dry_run: bool = False,
    shard: str | None = None,
    **settings: Any,
) -> list[Extracted]:
    """Run a dataset's items through frozen encoders and store their pooled hidden states in the folder `cache`.

    A stopped extraction goes on where it stopped; only new and changed items are encoded again. The ranks of a job fill
    a cache in shards, which is read as any other.

    dataset: a dataset's folder, or what `load_dataset` returned; by default the one that `config` names.
    cache: a folder, made if it is not there; by default the one that `config` names.
    views: views beside those of image_encoder and text_encoder. The first of all takes the image's role.
    config: settings to start from: a YAML or JSON file such as a recipe, or a mapping of the same form. Its encoders
        are taken if no others are given.
    protocol, extraction: sections of the configuration; they replace those of `config`.
    changes: settings by dotted name, as {"encoders.title.max_tokens": 64}; they go last.
    dry_run: do all checks, write nothing, and return how many items would be encoded.
    shard: "2/4" fills the second of four shards alone, in one process. All shards are filled by default.
    settings: image_encoder and text_encoder (hub names or folders), how they are read (image_pooling, text_layers, …),
        and any setting of ExtractionConfig and ProtocolConfig by its name, as batch_size=32; `iisan-fast extract
        --help` lists them.

    Returns, for each view, how many items there are, how many were encoded now, and the bytes of their states.
    Raises InputError, before anything is written, for content that is missing, an encoder that cannot be used, or a
    cache made with other encoders or settings.
    """
    for view in _listed(views):
        if isinstance(view, FeaturesConfig):
            raise InputError(f"views: {view.name}: features are ready-made; give them to train")
        if not isinstance(view, ViewConfig):
            raise InputError(f"views: expected ViewConfigs, found {view!r}")
    chosen = _section_settings(protocol=protocol, extraction=extraction)
    chosen |= _data_settings(dataset, cache, [*chosen, *settings, *(changes or {})]) | settings
    plan = extraction_config(chosen, base_settings(config), _view_configs(views), changes)
    from . import states

    asked = None if shard is None else states.parsed_shard(shard)
    ranks = joined_ranks(f"extract{', dry run' * dry_run}")
    where = ranks.all_do(lambda: torch_device(device))
    loaded = dataset
    if not isinstance(loaded, Dataset):
        loaded = ranks.all_do(lambda: load_dataset(plan.dataset, protocol=plan.protocol))
    return states.extract(loaded, plan.views, plan.cache, where, plan.config, dry_run, asked, ranks)


@_checks_names()
def merge_shards(cache: PathLike) -> Merged:
    """Copy all shards of a cache into one store, which takes their place, and return what was copied.

    The cache is read as before, and gives the same numbers. Needs room for a second copy of the states.

    cache: the folder of a cache in shards.

    Returns a Merged: the number of shards, of entries, and their bytes.
    Raises InputError, with the cache still in shards, for a shard that is missing or unfinished, a damaged entry, or a
    disk without room. Raises Stopped, likewise, after a signal.
    """
    from . import states

    if joined_ranks().several:
        raise InputError("merge: is done by one process; leave out the launcher")
    return states.merge_shards(as_path("cache", cache))


@_checks_names(RUN_SETTINGS)
def train(
    dataset: PathLike | Dataset | RunConfig | None = None,
    cache: PathLike | None = None,
    *,
    views: View | Sequence[View] = (),
    uncached: bool | UncachedConfig = False,
    config: RunConfig | PathLike | Mapping[str, Any] | None = None,
    protocol: ProtocolConfig | None = None,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    scoring: ScoringConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    init: PathLike | None = None,
    out: PathLike | None = None,
    device: str | torch.device = "auto",
    table: str = "auto",
    on_epoch: OnEpoch | None = None,
    dry_run: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train a recommender, keep the epoch with the best validation HR@10, and test it once.

    Without a dataset and a configuration it trains the embedded demo, as the command does.

    dataset: a dataset's folder, what `load_dataset` returned, or a whole RunConfig.
    cache: the hidden states that `extract` stored; the method "id" needs none.
    views: one or two names of the cache's views, the first in the image's role; by default all that it holds.
        ViewConfigs name encoders that run in every step instead, as image_encoder and text_encoder do. FeaturesConfigs
        are views of ready-made features in files, with a cache or without one.
    uncached: True, or how encoders run; only needed where nothing else says that they run.
    config: settings to start from: a RunConfig, a YAML or JSON file such as a recipe or a run's config.json, or a
        mapping of the same form. Encoders in it run in every step if `uncached` or the method asks for it; otherwise
        the cache's views of their names are read.
    protocol, model, train, evaluation, scoring: sections of the configuration; they replace those of `config`.
    changes: settings by dotted name, as {"model.bottlenecks.first": 512}; they go last.
    init: the folder of a run of the same model, with whose best weights training begins, on this dataset.
    out: the run's folder, which must not hold a run yet; by default the next free runs/NAME-N.
    table: where the hidden states lie: device, pinned (host memory), mapped (their file), or auto, where they fit.
    on_epoch: gets each finished epoch's figures, a line of metrics.jsonl; `print` shows them.
    dry_run: do all checks, write nothing, and return a description of the run that would be trained.
    settings: any setting of a section by its name, as method="iisan", epochs=20, seed=1, ks=(5, 10); they change the
        sections. `iisan-fast train --help` lists them.

    Returns the run's folder, the best epoch, and the figures on the test set: HR@K and NDCG@K as fractions, history
    masked and unmasked, beside the baselines "popularity" and "neighbours". "scoring" has the weights of the neighbour
    terms. The method "neighbours" trains nothing: its epochs are 0, and "validation" has its figures on that split.
    Raises InputError for settings or files that cannot be used, before the run's folder is made, and where the loss
    stops being finite. Ctrl-C (SIGINT), SIGTERM and SIGHUP let the step under way end, save the run and raise Stopped,
    which like KeyboardInterrupt is no Exception; `resume` goes on. A second signal acts at once.
    """
    check_choice("table", table, PLACEMENTS)
    report = _on_epoch(on_epoch)
    where = torch_device(device)
    if not isinstance(uncached, (bool, UncachedConfig)):
        raise InputError(f"uncached: expected True, False or an UncachedConfig, found {uncached!r}")
    if isinstance(dataset, RunConfig):
        if config is not None:
            raise InputError("config: the first argument is a configuration already; give one of them")
        dataset, config = None, dataset
    chosen = _section_settings(protocol=protocol, model=model, train=train, evaluation=evaluation, scoring=scoring)
    chosen |= _data_settings(dataset, cache, [*chosen, *settings, *(changes or {})])
    chosen |= settings if init is None else {**settings, "init": init}
    encoders = take_views(chosen, _view_configs(views))
    chosen |= _stored_views(views)
    if isinstance(uncached, UncachedConfig):
        chosen["uncached"] = uncached
    from . import training

    is_demo = dataset is None and config is None
    ranks = joined_ranks(f"train{', demo' * is_demo}{', dry run' * dry_run}")
    if is_demo:
        from . import demo

        if encoders:
            raise InputError(demo.NOT_OF_THE_DEMO)
        with _new_run_folder("demo", out, ranks) as folder:
            if dry_run:
                return ranks.first_does(
                    lambda: demo.describe(folder.path, chosen, bool(uncached), where, changes or {}, table)
                )
            run = demo.configure(folder, chosen, bool(uncached), where, changes or {}, ranks)
            result = training.train(run, folder, where, report, table, ranks)
            return {"run": str(folder.path), **result}
    run = run_config(chosen, base_settings(config), encoders, bool(uncached), changes)
    folder = _new_run_folder(Path(run.dataset).name, out, ranks)
    if dry_run:
        return training.describe_new_run(run, folder.path, where, table, ranks)
    result = training.train(run, folder, where, report, table, ranks)
    return {"run": str(folder.path), **result}


@_checks_names()
def resume(
    run: PathLike,
    dataset: PathLike | None = None,
    *,
    cache: PathLike | None = None,
    features: Mapping[str, PathLike] | None = None,
    image_encoder: PathLike | None = None,
    text_encoder: PathLike | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    checkpoint_every: str | int | None = None,
    device: str | torch.device = "auto",
    table: str = "auto",
    on_epoch: OnEpoch | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Continue a stopped run exactly as if it had not been stopped; a finished one returns its figures again.

    run: the run's folder, which holds all settings.
    dataset, cache, image_encoder, text_encoder: the places to which these have moved. Their content has to be that with
        which the run began.
    features: the files to which ready-made features have moved, by the names of their views.
    epochs, patience: let a finished run go on. The results are those of a run that had these settings from the
        beginning.
    checkpoint_every: save within epochs after so many steps (500) or so much time ("10m").
    trust_remote_code: whether code that comes with the run's encoders may run; a run that needs it asks again.
    The other arguments and the result are those of `train`. What is given here replaces the setting in config.json.

    Raises InputError where the folder holds no run, or where its dataset, states or encoders have changed. Nothing is
    written then. Raises Stopped as `train` does.
    """
    check_choice("table", table, PLACEMENTS)
    from . import training

    folder = as_path("run", run)
    moved = features or {}
    refuse_unasked_code_of_run(folder, is_trusted({"trust_remote_code": trust_remote_code}))
    changes = training.RunChanges(
        dataset=None if dataset is None else str(absolute_path(as_path("dataset", dataset))),
        cache=None if cache is None else str(absolute_path(as_path("cache", cache))),
        features={name: str(absolute_path(as_path(f"features.{name}", path))) for name, path in moved.items()},
        image_encoder=None if image_encoder is None else str(image_encoder),
        text_encoder=None if text_encoder is None else str(text_encoder),
        max_epochs=epochs,
        patience=patience,
        checkpoint_every=checkpoint_every,
    )
    where = torch_device(device)
    report = _on_epoch(on_epoch)
    ranks = joined_ranks("resume, changed" if changes else "resume")
    return {"run": str(folder), **training.resume(folder, where, report, table, changes, ranks)}


@_checks_names((*EVALUATION_SETTINGS, *TERM_SETTINGS))
def evaluate(
    run: PathLike,
    split: str = "test",
    *,
    device: str | torch.device = "auto",
    evaluation: EvaluationConfig | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Rank the targets of a run's users in the full catalogue, by the run's best checkpoint and its neighbour terms.

    run: the run's folder; nothing else is read. For a run of an earlier version, which has no neighbours.safetensors,
        similarity is built from the run's cache.
    split: test or validation.
    settings: those of EvaluationConfig, as ks=(5, 10); they change `evaluation`. cooccurrence, similarity and
        cold_bias replace the run's; fit_terms=True chooses cooccurrence and similarity by validation, as `train` does.

    Returns method, best epoch, the figures under the split's name, those of the baselines "popularity" and
    "neighbours", and under "scoring" the weights of the terms and cold_bias. Figures are HR@K and NDCG@K as fractions,
    history masked and unmasked. "neighbours" also has "similarity": True if the run has states for that term.
    Raises InputError where the folder holds no finished epoch, and for a weight of similarity in a run without states.
    """
    from . import training

    terms = {name: settings.pop(name) for name in TERM_SETTINGS if name in settings}
    asked = changed_section("scoring", ScoringConfig, None, terms)
    resolved = changed_section("evaluation", EvaluationConfig, evaluation, settings)
    where = torch_device(device)
    return training.evaluate_run(as_path("run", run), split, resolved, where, asked, joined_ranks("evaluate"))


@_checks_names()
def load(run: PathLike, *, device: str | torch.device = "auto") -> BestRun:
    """Load a run's best checkpoint, ready to rank.

    run: the run's folder; nothing else is read. For a run of an earlier version, which has no neighbours.safetensors,
        the terms are built from its histories, and from its cache if that can be read.

    Returns a BestRun: `config`, `sequences`, `item_ids`, `item_vectors` and `user_states`, and the neighbour terms with
    their weights as `terms` and `weights`. A model's score of a user and an item is the inner product of their two
    vectors; `scores` adds the terms.
    Raises InputError where the folder holds no run, or a damaged one.
    """
    from . import training

    return training.load(as_path("run", run), torch_device(device))


@_checks_names()
def verify(path: PathLike, *, add: bool = True) -> Verified:
    """Compare the files of a cache or a run with their checksums, and find what is damaged.

    path: the folder of a cache or of a run.
    add: give a checksum to what an earlier version wrote without one; False writes nothing.

    Returns a Verified: counts, and `damage`, a list with where, problem and remedy; it is empty if all is well.
    Raises InputError where the folder holds neither, or is so damaged that its parts cannot be told apart.
    """
    folder = as_path("path", path)
    if (folder / "manifest.json").exists() or (folder / "states.lmdb").exists():
        from . import states

        return states.verify_cache(folder, add)
    if (folder / "config.json").exists():
        from . import training

        return training.verify_run(folder, add)
    raise InputError(f"{folder}: expected a cache (manifest.json) or a run (config.json), found neither")


def _new_run_folder(name: str, out: PathLike | None, ranks: Ranks) -> JobRunFolder:
    """Return the folder `out` for a new run, or the next free runs/NAME-N. Nothing is written."""
    from .training import JobRunFolder

    return JobRunFolder(None if out is None else as_path("out", out), name, ranks)


def _section_settings(**sections: Any) -> dict[str, Any]:
    """Return the sections that are given, by name. Raises InputError for a value that is no such section."""
    settings = {}
    for name, section in sections.items():
        if isinstance(section, Mapping):
            section = from_dict(SECTIONS[name], section, name)
        if section is not None and not isinstance(section, SECTIONS[name]):
            raise InputError(f"{name}: expected {SECTIONS[name].__name__}, found {section!r}")
        if section is not None:
            settings[name] = section
    return settings


def _data_settings(dataset: PathLike | Dataset | None, cache: PathLike | None, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that say what a command reads.

    names: of the other settings. Raises InputError if one of them is of the protocol, which a loaded dataset has.
    """
    sources: dict[str, Any] = {} if cache is None else {"cache": cache}
    if isinstance(dataset, Dataset):
        for name in names:
            if name in ("protocol", *PROTOCOL_SETTINGS) or name.startswith("protocol."):
                raise InputError(f"{name}: the loaded dataset has its protocol already; give it to load_dataset")
        sources |= {"dataset": dataset.root, "protocol": dataset.protocol}
    elif dataset is not None:
        sources["dataset"] = dataset
    return sources


def _view_configs(views: Any) -> list[ViewConfig]:
    """Return the views among `views`; the others are names."""
    return [view for view in _listed(views) if isinstance(view, ViewConfig)]


def _stored_views(views: Any) -> dict[str, Any]:
    """Return the settings of the views that are stored: `features`, and the names `views` in their order.

    Without the name of a cache's view there is no order: a cache then has all its views read, before the features.
    """
    stored = [view for view in _listed(views) if not isinstance(view, ViewConfig)]
    features = [view for view in stored if isinstance(view, FeaturesConfig)]
    settings: dict[str, Any] = {"features": [to_dict(view) for view in features]} if features else {}
    if len(stored) > len(features):
        names = [view.name if isinstance(view, FeaturesConfig) else view for view in stored]
        named = [view for view in stored if not isinstance(view, FeaturesConfig)]
        repeated = {view.name for view in features if view.name in named}  # --views gives the place of features
        settings["views"] = [name for name, view in zip(names, stored) if view is name or name not in repeated]
    return settings


def _listed(views: Any) -> list[Any]:
    """Return the argument `views` as a list. Raises InputError if it is neither views nor names."""
    if isinstance(views, (str, ViewConfig, FeaturesConfig)):
        return [views]
    if not isinstance(views, Sequence):
        raise InputError(f"views: expected names, ViewConfigs or FeaturesConfigs, found {views!r}")
    return list(views)


def _on_epoch(function: OnEpoch | None) -> OnEpoch:
    """Return the function that gets each epoch's figures, or one that does nothing.

    Raises InputError if it is no function.
    """
    if function is None:
        return lambda line: None
    if not callable(function):
        raise InputError(f"on_epoch: expected a function, found {function!r}")
    return function
