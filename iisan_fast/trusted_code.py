"""Let code that comes with a checkpoint run only if the user asks for it by name, never because a file says so.

A run's config.json, or a recipe, may record that its encoders need such code. Who opens that file has to ask again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import ViewConfig
from .errors import InputError
from .setting_fields import from_dict
from .settings_files import read_run_config

TRUST = "trust_remote_code"  # the setting of a view, and of a command for all its encoders


def is_trusted(settings: Mapping[str, Any]) -> bool:
    """Return True if the settings of a command ask for trust_remote_code. Raises InputError unless it is a bool."""
    trusted = settings.get(TRUST)
    if trusted is not None and not isinstance(trusted, bool):
        raise InputError(f"{TRUST}: expected True or False, found {trusted!r}")
    return bool(trusted)


def without_trust(values: Mapping[str, Any]) -> set[str]:
    """Switch off trust_remote_code, in place, in the views of a file's settings.

    Returns the names of the views that had it on.
    """
    asking = set()
    for view in _views_of(values):
        if view.get(TRUST):
            asking.add(view["name"])
            view[TRUST] = False
    return asking


def trust_running_views(values: Mapping[str, Any], asking: Collection[str], trusted: bool) -> None:
    """Switch on trust_remote_code, in place, in the views whose encoders run in every step, if the user asks for it.

    values: of a run's configuration. asking: from `without_trust`. Raises InputError if only a file asks, or if the
    user asks and no encoders run.
    """
    views = _views_of({"uncached": values.get("uncached")})
    if trusted and not views:
        raise InputError(f"{TRUST}: is for encoders that run, of which there are none; leave it out")
    if trusted:
        for view in views:
            view[TRUST] = True
    if asking:
        refuse_unasked_code([from_dict(ViewConfig, view, "uncached.views") for view in views], asking)


def refuse_unasked_code(views: Iterable[ViewConfig], asking: Collection[str]) -> None:
    """Raise InputError if a view needs code of its checkpoint to run, and only a file of settings asks for that.

    asking: the names of the views for which a file asks.
    """
    for view in views:
        if view.name in asking and not view.trust_remote_code:
            raise InputError(
                f"{TRUST}: the settings ask to run code that comes with {view.encoder} (view {view.name!r}); a file "
                "cannot decide that, so give --trust-remote-code, in Python trust_remote_code=True, if you trust it"
            )


def refuse_unasked_code_of_run(folder: Path, trusted: bool) -> None:
    """Raise InputError if a run's encoders need code of their checkpoints, and the user does not ask for it again.

    folder: of the run. A folder without config.json is left to what reads the run. Also raises InputError for a
    config.json that cannot be read.
    """
    if trusted or not (folder / "config.json").is_file():
        return
    config = read_run_config(folder / "config.json")
    views = () if config.uncached is None else config.uncached.views
    asking = {view.name for view in views if view.trust_remote_code}
    refuse_unasked_code([replace(view, trust_remote_code=False) for view in views], asking)


def _views_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the views whose encoders a configuration's values describe, or run, as names and values."""
    uncached = values.get("uncached")
    running = uncached.get("views") if isinstance(uncached, Mapping) else None
    views = [*(values.get("encoders") or ()), *(running or ())]
    return [view for view in views if isinstance(view, dict) and "name" in view]
