"""Find the files of a Hugging Face model: a folder, or a hub name that is looked up in the local cache first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import InputError
from ..files import refuse_irregular
from .checkpoint_files import refuse_damaged
from .own_code import refuse_adapter


def cached_or_fetched(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Call `load(name, local_files_only=…, **options)` for a folder or a hub name, and return the result.

    A hub name is loaded from the local cache if it is there, and else from the hub: without a network, asking the hub
    first takes minutes. Raises the error of `load` if that fails too.
    """
    if not Path(name).is_dir():
        with contextlib.suppress(OSError, ValueError, InputError):  # not in the cache: ask the hub
            return load(name, local_files_only=True, **options)
    return load(name, local_files_only=False, **options)


def fetched_folder(name: str) -> Path:
    """Return the folder with the files of a model, whose config.json is fetched if it is not there yet.

    Raises OSError if there is no config.json, and InputError for an adapter, and for files that cannot be read safely.
    """
    path = Path(name)
    if path.is_dir():
        refuse_adapter(name, path)
        refuse_irregular(path / "config.json")
    folder = Path(cached_or_fetched(cached_file, name, filename="config.json")).parent
    refuse_adapter(name, folder)
    refuse_damaged(folder, complete=path.is_dir())
    return folder


def model_folder(name: str) -> Path:
    """Return the folder with the files of a loaded model: the folder itself, or the cached snapshot of a hub name."""
    path = Path(name)
    return path if path.is_dir() else Path(cached_file(name, "config.json", local_files_only=True)).parent
