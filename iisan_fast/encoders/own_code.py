"""Find the Python code that a checkpoint brings with it, and refuse it unless it was asked for.

A checkpoint names its own classes under `auto_map` in its JSON files. Under a model type that transformers knows,
transformers leaves them aside without a word and runs its own class, which gives other states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from ..errors import InputError
from ..files import refuse_irregular

LOGGER = getLogger(__name__)
FILES = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    "video_preprocessor_config.json",
)
# For each kind of checkpoint, the automatic classes that are not loaded from it.
NOT_LOADED = {
    "text": {"AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor", "AutoProcessor"},
    "image": {"AutoTokenizer", "AutoVideoProcessor", "AutoProcessor"},
    "captions": set(),
}
MODELS = {"text": "AutoModel", "image": "AutoModel", "captions": "AutoModelForImageTextToText"}
MOST_BYTES = 64 << 20  # of one of the JSON files
HOW_TO_RUN = "it runs only if you ask for it: --trust-remote-code, in Python trust_remote_code=True"


class OwnClass(NamedTuple):
    """A class of a checkpoint's own code, as one of its JSON files names it."""

    file: str  # the name of the JSON file
    automatic: str  # the automatic class of transformers that it stands for, such as "AutoModel"
    reference: str  # "module.Class", after "owner/repository--" if the code is in another repository

    def __str__(self) -> str:
        return f"{self.file}: auto_map names {self.reference} for {self.automatic}"


def own_classes(folder: Path, kind: str) -> list[OwnClass]:
    """Return the classes of a checkpoint's own code that reading `kind` needs.

    folder: of the checkpoint's files. kind: "text", "image" or "captions". Raises InputError for a JSON file that
    cannot be read, and for an `auto_map` that does not name classes.
    """
    classes: list[OwnClass] = []
    for file in FILES:
        if (folder / file).exists() or (folder / file).is_symlink():
            classes += _named_classes(read_json(folder / file), folder / file)
    return [named for named in classes if named.automatic not in NOT_LOADED[kind]]


def accepted_own_code(name: str, folder: Path, kind: str, trusted: bool) -> list[OwnClass]:
    """Return the classes of a checkpoint's own code that reading `kind` needs; the usual checkpoint has none.

    name: of the checkpoint, for messages. folder, kind: as in `own_classes`. trusted: whether the user has asked for
    that code by name. Raises InputError, with file and class, if there is such code and the user has not.
    """
    named = own_classes(folder, kind)
    if named and not trusted:
        raise InputError(f"{name}: {named[0]}, code of its own; {HOW_TO_RUN}")
    if kind == "captions" and (folder / "custom_generate").is_dir() and not trusted:
        raise InputError(f"{name}: custom_generate/generate.py is code of its own; {HOW_TO_RUN}")
    if not any(own_class.automatic == MODELS[kind] for own_class in named):
        _refuse_defined_architecture(name, folder)
    return named


def mention_unknown_architecture(name: str, folder: Path, model_class: type) -> None:
    """Log a warning if config.json names an architecture that transformers does not have.

    model_class: takes its place.
    """
    for architecture in _unknown_architectures(folder):
        LOGGER.warning(
            "%s: config.json names the architecture %s, which transformers does not have; %s takes its place",
            name,
            architecture,
            model_class.__name__,
        )


def refuse_adapter(name: str, folder: Path) -> None:
    """Raise InputError if a checkpoint is, or holds, an adapter of peft, which would change the model or be left out.

    name: of the checkpoint, for the message. folder: of its files.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{name}: adapter_config.json: an adapter; merge it into its model (merge_and_unload of peft), and give "
            "the folder of the merged model"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in one of a checkpoint's files. Raises InputError, naming the file, if there is none."""
    refuse_irregular(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: expected at most {MOST_BYTES} bytes of JSON, found {path.stat().st_size}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        kind = "null" if values is None else type(values).__name__
        raise InputError(f"{path}: expected a JSON object, found {kind}")
    return values


def _refuse_defined_architecture(name: str, folder: Path) -> None:
    """Raise InputError if config.json names an architecture that a Python file of the checkpoint defines.

    Call it if no `auto_map` names the model, because then transformers runs its own class.
    """
    for architecture in _unknown_architectures(folder):
        defined = _defining_file(folder, architecture)
        if defined is not None:
            raise InputError(
                f"{name}: config.json names the architecture {architecture}, which is code of its own in "
                f"{defined.name}; name it under auto_map to run it, or name a class of transformers"
            )


def _unknown_architectures(folder: Path) -> list[str]:
    """Return the class names under `architectures` in a checkpoint's config.json that transformers does not have.

    Raises InputError if the names are no list of text.
    """
    names = read_json(folder / "config.json").get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / 'config.json'}: architectures: expected a list of class names, found {names!r}")
    return [name for name in names if not hasattr(transformers, name)]


def _named_classes(values: Mapping[str, Any], path: Path) -> Iterator[OwnClass]:
    """Yield the classes under every `auto_map` in a JSON object, also in the objects inside it."""
    waiting = [values]
    while waiting:
        current = waiting.pop()
        if current.get("auto_map"):
            yield from _entries(current["auto_map"], path)
        waiting += [value for value in current.values() if isinstance(value, dict)]


def _entries(auto_map: Any, path: Path) -> Iterator[OwnClass]:
    """Yield the classes of one `auto_map`. Raises InputError if it names no classes."""
    if isinstance(auto_map, list):  # the old form of a tokenizer's
        auto_map = {"AutoTokenizer": auto_map}
    if not isinstance(auto_map, dict):
        raise InputError(f"{path}: auto_map: expected names and classes, found {auto_map!r}")
    for automatic, value in auto_map.items():
        references = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        for reference in references:
            if reference is None:  # a tokenizer without a slow or without a fast form
                continue
            if not isinstance(reference, str) or not re.search(r"\w\.\w", reference):
                raise InputError(f"{path}: auto_map.{automatic}: expected module.Class, found {reference!r}")
            yield OwnClass(path.name, automatic, reference)


def _defining_file(folder: Path, class_name: str) -> Path | None:
    """Return the Python file in a folder that defines a class; None if there is none."""
    definition = re.compile(rf"^class {re.escape(class_name)}\b", re.MULTILINE)
    for path in sorted(folder.glob("*.py")):
        refuse_irregular(path)
        if definition.search(path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None
