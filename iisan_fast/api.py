"""The public functions: datasets, hidden states, training and evaluation, each in one call.

They resolve settings by the same code as the command line, which calls them. Paths may be text or `Path`, devices text
or `torch.device`. Every mistake in the arguments is an InputError, whose message is one line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .config import (
    PLACEMENTS,
    EvaluationConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from .data import Dataset
from .devices import torch_device
from .errors import InputError, check_choice
from .settings import (
    EvaluationSettings,
    ExtractionSettings,
    PathLike,
    ProtocolSettings,
    RunSettings,
    as_path,
    base_settings,
    changed_section,
    next_run_folder,
    refuse_unknown,
    run_config,
    take_views,
)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from .states import Extracted
    from .training import BestRun

OnEpoch = Callable[[dict[str, Any]], None]
Function = TypeVar("Function", bound=Callable[..., Any])


def _checks_names(settings: Any = None) -> Callable[[Function], Function]:
    """Make a function refuse keyword arguments that are neither its parameters nor keys of `settings`, a TypedDict.

    The InputError names the nearest that there are. Arguments that are missing or too many are an InputError too.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [name for name in signature.parameters if name != "settings"]
        known = [*parameters, *(settings.__annotations__ if settings else ())]

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


@_checks_names(ProtocolSettings)
def load_dataset(
    folder: PathLike, protocol: ProtocolConfig | None = None, **settings: Unpack[ProtocolSettings]
) -> Dataset:
    """Read a dataset's items and histories, and apply the data protocol.

    folder: holds items.tsv and users.tsv; captions.tsv and times.tsv are read where they are needed.
    settings: those of ProtocolConfig, as min_interactions=5; they change `protocol`.

    Returns a Dataset: `titles` and `captions` by item, and `sequences`, the users' histories.
    Raises InputError, naming file and line, for a missing or malformed file.
    """
    from . import data

    return data.load_dataset(as_path("folder", folder), changed_section("protocol", ProtocolConfig, protocol, settings))


@_checks_names(ExtractionSettings)
def extract(
    dataset: PathLike | Dataset,
    cache: PathLike,
    *,
    views: ViewConfig | Sequence[ViewConfig] = (),
    layer_groups: int | None = None,
    dtype: str = "bfloat16",
    missing_images: str = "error",
    batch_size: int = 64,
    workers: int | None = None,
    attention: str = "auto",
    device: str | torch.device = "auto",
    protocol: ProtocolConfig | None = None,
    **settings: Unpack[ExtractionSettings],
) -> list[Extracted]:
    """Run a dataset's items through frozen encoders and store their pooled hidden states in the folder `cache`.

    A stopped extraction goes on where it stopped; only new and changed items are encoded again.

    dataset: a dataset's folder, or what `load_dataset` returned.
    views: views beside those of image_encoder and text_encoder. The first of all takes the image's role.
    layer_groups: blocks kept of each encoder, evenly spread, in place of every second one.
    dtype: of the stored states: bfloat16, float16 or float32.
    missing_images: "error", or "blank" to encode a blank image where one is missing.
    batch_size: items encoded at a time.
    workers: processes that read images ahead; 0: none, None: as idle CPUs and images suggest.
    settings: image_encoder and text_encoder (hub names or folders), how they are read (image_pooling, text_layers, …),
        and settings of ProtocolConfig.

    Returns, for each view, how many items there are and how many were encoded now.
    Raises InputError, before anything is written, for content that is missing, an encoder that cannot be used, or a
    cache made with other encoders or settings.
    """
    remaining: dict[str, Any] = dict(settings)
    if names := _view_names(views):
        raise InputError(f"views: expected ViewConfigs, found {names[0]!r}")
    chosen = take_views(remaining, _view_configs(views), layer_groups)
    if not chosen:
        raise InputError("views: none to encode; give text_encoder, image_encoder or views")
    if isinstance(dataset, Dataset):
        if protocol is not None or remaining:
            refused = ", ".join(remaining) or "protocol"
            raise InputError(f"{refused}: the loaded dataset has its protocol already; give it to load_dataset")
        loaded = dataset
    else:
        loaded = load_dataset(as_path("dataset", dataset), protocol=protocol, **remaining)
    from . import states

    where = torch_device(device)
    folder = as_path("cache", cache)
    return states.extract(loaded, chosen, folder, where, batch_size, dtype, missing_images, workers, attention)


@_checks_names(RunSettings)
def train(
    dataset: PathLike | Dataset | RunConfig | None = None,
    cache: PathLike | None = None,
    *,
    views: str | ViewConfig | Sequence[str] | Sequence[ViewConfig] = (),
    uncached: bool | UncachedConfig = False,
    config: RunConfig | PathLike | Mapping[str, Any] | None = None,
    protocol: ProtocolConfig | None = None,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    out: PathLike | None = None,
    device: str | torch.device = "auto",
    table: str = "auto",
    on_epoch: OnEpoch | None = None,
    **settings: Unpack[RunSettings],
) -> dict[str, Any]:
    """Train a recommender, keep the epoch with the best validation HR@10, and test it once.

    Without a dataset and a configuration it trains the embedded demo, as the command does.

    dataset: a dataset's folder, what `load_dataset` returned, or a whole RunConfig.
    cache: the hidden states that `extract` stored; the method "id" needs none.
    views: one or two names of the cache's views, the first in the image's role; by default all that it holds.
        ViewConfigs name encoders that run in every step instead, as image_encoder and text_encoder do.
    uncached: True, or how encoders run; only needed where nothing else says that they run.
    config: settings to start from: a RunConfig, a mapping, or a JSON file such as a run's config.json.
    protocol, model, train, evaluation: sections of the configuration; they replace those of `config`.
    out: the run's folder, which must not hold a run yet; by default the next free runs/NAME-N.
    table: where the hidden states lie: device, pinned (host memory), mapped (their file), or auto, where they fit.
    on_epoch: gets each finished epoch's figures, a line of metrics.jsonl; `print` shows them.
    settings: any setting of a section by its name, as method="iisan", epochs=20, seed=1, ks=(5, 10); these go last.

    Returns the run's folder, the best epoch, and the figures on the test set: HR@K and NDCG@K as fractions, history
    masked and unmasked, beside the popularity baseline.
    Raises InputError for settings or files that cannot be used, before the run's folder is made, and where the loss
    stops being finite.
    """
    check_choice("table", table, PLACEMENTS)
    report, where = _on_epoch(on_epoch), torch_device(device)
    if not isinstance(uncached, (bool, UncachedConfig)):
        raise InputError(f"uncached: expected True, False or an UncachedConfig, found {uncached!r}")
    if isinstance(dataset, RunConfig):
        if config is not None:
            raise InputError("config: the first argument is a configuration already; give one of them")
        dataset, config = None, dataset
    sections = {"protocol": protocol, "model": model, "train": train, "evaluation": evaluation}
    chosen: dict[str, Any] = {name: value for name, value in sections.items() if value is not None}
    chosen |= _data_settings(dataset, cache, {**chosen, **settings})
    chosen |= settings
    encoders = take_views(chosen, _view_configs(views))
    if names := _view_names(views):
        chosen["views"] = names
    if isinstance(uncached, UncachedConfig):
        chosen["uncached"] = uncached
    from . import training

    if dataset is None and config is None:
        from . import demo

        if encoders:
            raise InputError(demo.NOT_OF_THE_DEMO)
        folder = next_run_folder("demo") if out is None else as_path("out", out)
        run = demo.configure(folder, chosen, bool(uncached), where)
    else:
        run = run_config(chosen, base_settings(config or {}), encoders, bool(uncached))
        folder = next_run_folder(Path(run.dataset).name) if out is None else as_path("out", out)
    result = training.train(run, folder, where, report, table)
    return {"run": str(folder), **result}


@_checks_names()
def resume(
    run: PathLike, *, device: str | torch.device = "auto", table: str = "auto", on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    """Continue a stopped run exactly as if it had not been stopped; a finished one returns its figures again.

    run: the run's folder, which holds all settings. The other arguments and the result are those of `train`.

    Raises InputError where the folder holds no run, or where its dataset or states have changed.
    """
    check_choice("table", table, PLACEMENTS)
    from . import training

    folder = as_path("run", run)
    return {"run": str(folder), **training.resume(folder, torch_device(device), _on_epoch(on_epoch), table)}


@_checks_names(EvaluationSettings)
def evaluate(
    run: PathLike,
    split: str = "test",
    *,
    device: str | torch.device = "auto",
    evaluation: EvaluationConfig | None = None,
    **settings: Unpack[EvaluationSettings],
) -> dict[str, Any]:
    """Rank the targets of a run's users in the full catalogue, by the run's best checkpoint.

    run: the run's folder; nothing else is read.
    split: test or validation.
    settings: those of EvaluationConfig, as ks=(5, 10); they change `evaluation`.

    Returns method, best epoch, the figures under the split's name, and those of the popularity baseline: HR@K and
    NDCG@K as fractions, history masked and unmasked.
    Raises InputError where the folder holds no finished epoch.
    """
    from . import training

    resolved = changed_section("evaluation", EvaluationConfig, evaluation, settings)
    return training.evaluate_run(as_path("run", run), split, resolved, torch_device(device))


@_checks_names()
def load(run: PathLike, *, device: str | torch.device = "auto") -> BestRun:
    """Load a run's best checkpoint, ready to rank.

    run: the run's folder; nothing else is read.

    Returns a BestRun: `config`, `sequences`, `item_ids`, `item_vectors` and `user_states`. A user's score of an item is
    the inner product of their two vectors.
    Raises InputError where the folder holds no run, or a damaged one.
    """
    from . import training

    return training.load(as_path("run", run), torch_device(device))


def _data_settings(
    dataset: PathLike | Dataset | None, cache: PathLike | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that say what a run reads; those of a loaded dataset's protocol are not given again."""
    sources: dict[str, Any] = {} if cache is None else {"cache": cache}
    if isinstance(dataset, Dataset):
        for name in ("protocol", *ProtocolSettings.__annotations__):
            if name in settings:
                raise InputError(f"{name}: the loaded dataset has its protocol already; give it to load_dataset")
        sources |= {"dataset": dataset.root, "protocol": dataset.protocol}
    elif dataset is not None:
        sources["dataset"] = dataset
    return sources


def _view_configs(views: Any) -> list[ViewConfig]:
    """Return the views among `views`; the others are names."""
    return [view for view in _listed(views) if isinstance(view, ViewConfig)]


def _view_names(views: Any) -> list[str]:
    """Return the names among `views`."""
    return [view for view in _listed(views) if not isinstance(view, ViewConfig)]


def _listed(views: Any) -> list[Any]:
    if isinstance(views, (str, ViewConfig)):
        return [views]
    if not isinstance(views, Sequence):
        raise InputError(f"views: expected names or ViewConfigs, found {views!r}")
    return list(views)


def _on_epoch(function: OnEpoch | None) -> OnEpoch:
    """Return the function that gets each epoch's figures, or one that does nothing."""
    if function is None:
        return lambda line: None
    if not callable(function):
        raise InputError(f"on_epoch: expected a function, found {function!r}")
    return function
