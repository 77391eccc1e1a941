"""Find the files of a Hugging Face model: a folder, or a hub name that is looked up in the local cache first."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import InputError
from ..files import refuse_irregular
from .checkpoint_files import refuse_damaged
from .own_code import refuse_adapter

COMMIT = re.compile("[0-9a-f]{40}")


def cached_or_fetched(load: Callable[..., Any], name: str, revision: str | None = None, **options: Any) -> Any:
    """Call `load(name, local_files_only=…, **options)` for a folder or a hub name, and return the result.

    revision: a branch, tag or commit of a hub name, which `load` takes too; None for the default branch. A hub name
    is loaded from the local cache if it is there, and else from the hub: without a network, asking the hub first takes
    minutes. Raises the error of `load` if that fails too.
    """
    if revision is not None:
        options["revision"] = revision
    if not Path(name).is_dir():
        with contextlib.suppress(OSError, ValueError, InputError):  # not in the cache: ask the hub
            return load(name, local_files_only=True, **options)
    return load(name, local_files_only=False, **options)


def fetched_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder with the files of a model, whose config.json is fetched if it is not there yet.

    Raises OSError if there is no config.json, and InputError for a folder with a revision, for a revision that is not
    there, for an adapter, and for files that cannot be read safely.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise InputError(
                f"{name}: revision: a folder has none, found {revision!r}; leave it out, or give the name on the hub"
            )
        refuse_adapter(name, path)
        refuse_irregular(path / "config.json")
    try:
        folder = Path(cached_or_fetched(cached_file, name, revision, filename="config.json")).parent
    except OSError as error:
        if revision is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: revision {revision!r} is neither in the local cache nor on the hub ({reason})"
        ) from None
    refuse_adapter(name, folder)
    refuse_damaged(folder, complete=path.is_dir())
    return folder


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder with the files of a loaded model: the folder itself, or the cached snapshot of a hub name."""
    path = Path(name)
    if path.is_dir():
        return path
    options = {} if revision is None else {"revision": revision}
    return Path(cached_file(name, "config.json", local_files_only=True, **options)).parent


def model_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a loaded hub name, which names its snapshot in the cache; None for a folder."""
    if Path(name).is_dir():
        return None
    snapshot = model_folder(name, revision).name
    return snapshot if COMMIT.fullmatch(snapshot) else None
