"""Run the code that a checkpoint brings with it, after the user has asked for it, and say which code ran."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..errors import InputError
from ..fingerprints import file_digest, value_digest
from .hub_files import cached_or_fetched
from .own_code import MODELS, OwnClass


def own_model_class(
    name: str, named: Sequence[OwnClass], kind: str, revision: str | None = None
) -> type[PreTrainedModel] | None:
    """Import and return the class of a checkpoint's own model; None if it names none.

    name: a folder or a hub name. named: from `accepted_own_code`. kind: what is read, as there. revision: of a hub
    name. Raises InputError if the checkpoint has classes of its own for other heads alone.
    """
    models = [own_class for own_class in named if own_class.automatic.startswith("AutoModel")]
    fitting = [own_class for own_class in models if own_class.automatic == MODELS[kind]]
    if models and not fitting:
        raise InputError(f"{name}: {models[0]}, and none for {MODELS[kind]}, which is what is read here")
    if not fitting:
        return None

    def load(repository: str, **options: Any) -> type[PreTrainedModel]:
        return get_class_from_dynamic_module(fitting[0].reference, repository, **options)

    return cached_or_fetched(load, name, revision)


def refuse_other_classes(name: str, named: Sequence[OwnClass], kind: str, running: Sequence[type]) -> None:
    """Raise InputError if another class than the one that a checkpoint names has been loaded in its place.

    named, kind: as in `own_model_class`. running: the classes of the configuration, the processors and the model.
    """
    running_references = {_reference(loaded) for loaded in running if _is_own(loaded)}
    references: dict[str, list[str]] = {}
    for own_class in named:
        if own_class.automatic == MODELS[kind] or not own_class.automatic.startswith("AutoModel"):
            references.setdefault(own_class.automatic, []).append(own_class.reference.rpartition("--")[2])
    for automatic, expected in references.items():
        if not running_references.intersection(expected):
            raise InputError(
                f"{name}: its code {expected[0]} for {automatic} did not run, transformers took another class; remove "
                "the entry of auto_map if that is right"
            )


def code_digest(running: Sequence[type]) -> str:
    """Return the sha256 (hex) of the Python files of own code: those of the classes, and those that they import.

    running: as in `refuse_other_classes`. Classes of transformers do not count.
    """
    digests = {}
    for loaded in running:
        if _is_own(loaded):
            file = inspect.getfile(loaded)
            for path in map(Path, [file, *get_relative_import_files(file)]):
                digests[f"{_reference(loaded)}: {path.name}"] = file_digest(path)
    return value_digest(digests)


def _is_own(loaded: type) -> bool:
    """Return True if a class comes from a checkpoint's own code."""
    return loaded.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def _reference(loaded: type) -> str:
    """Return a class as an `auto_map` names it, "module.Class"."""
    return f"{loaded.__module__.rpartition('.')[2]}.{loaded.__name__}"
