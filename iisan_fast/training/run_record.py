"""Record a copy of a run's settings, and the checksums of its small files, in checksums.json; compare them later.

The settings are a copy, so that an error names the one that has changed. Those that say where the data lies, and how
long to train, may be changed in config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checksums import checksum, file_checksum
from ..config import RunConfig
from ..errors import InputError
from ..files import refuse_irregular, write_atomically
from ..setting_fields import from_dict, to_dict
from ..settings_files import read_settings

RECORD_FILE = "checksums.json"
MAY_CHANGE = re.compile(
    r"dataset|cache|init|train\.(max_epochs|patience|checkpoint_every)|uncached\.views\.\d+\.encoder"
    r"|features\.\d+\.(path|ids)"
)
NOTHING = object()


@dataclass(frozen=True)
class RunRecord:
    """The content of checksums.json."""

    settings: dict[str, Any] | None = None  # those of config.json; None if they were not recorded
    files: dict[str, str] = field(default_factory=dict)  # the checksum (hex) of each file by its name
    published: bool = False  # True for the part of a run that ranks, written to be published

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Return the record of a run; None if it has none. Raises InputError if the file is damaged."""
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        remedy = f"remove it, and `iisan-fast verify {folder}` makes it again"
        values = _own_values(path, remedy)
        stored = values.pop("checksum", None)
        settings, files = values.get("settings"), values.get("files")
        if stored != _json_checksum(values) or not isinstance(settings, (dict, type(None))):
            raise InputError(f"{path}: damaged: its checksum does not fit; {remedy}")
        if not isinstance(files, dict):
            raise InputError(f"{path}: expected the checksums of files, found something else; {remedy}")
        return cls(settings, files, values.get("published") is True)

    def write(self, folder: Path) -> None:
        """Write the record of a run. Raises OSError if it cannot be written."""
        values: dict[str, Any] = {"settings": self.settings, "files": self.files}
        if self.published:
            values["published"] = True
        values["checksum"] = _json_checksum(values)
        write_atomically(folder / RECORD_FILE, (json.dumps(values, indent=2) + "\n").encode())

    def with_settings(self, config: RunConfig) -> RunRecord:
        """Return the record with a copy of these settings."""
        return replace(self, settings=json.loads(json.dumps(to_dict(config))))

    def without_settings(self) -> RunRecord:
        """Return the record without a copy of settings."""
        return replace(self, settings=None)

    def with_file(self, name: str, content: bytes) -> RunRecord:
        """Return the record with the checksum of a file."""
        return replace(self, files={**self.files, name: _file_checksum(name, content)})

    def with_file_at(self, path: Path) -> RunRecord:
        """Return the record with the checksum of a file, which is not in memory as a whole. Raises OSError."""
        return replace(self, files={**self.files, path.name: file_checksum(path, path.name.encode()).hex()})

    def without_file(self, name: str) -> RunRecord:
        """Return the record without the checksum of a file."""
        return replace(self, files={other: recorded for other, recorded in self.files.items() if other != name})

    def refuse_changed_file(self, path: Path, remedy: str) -> None:
        """Raise InputError, with the remedy, if a file's checksum was recorded and does not fit.

        A missing file is left to its reader.
        """
        recorded = self.files.get(path.name)
        if recorded is None or not path.exists():
            return
        refuse_irregular(path)
        if file_checksum(path, path.name.encode()).hex() != recorded:
            raise InputError(f"{path}: damaged: its checksum does not fit; {remedy}")

    def refuse_changed_settings(self, config: RunConfig, path: Path) -> None:
        """Raise InputError, naming the setting, if config.json has another value than when it was written."""
        for name, recorded, current in self.changed_settings(config):
            if not MAY_CHANGE.fullmatch(name):
                raise InputError(
                    f"{path}: {name}: expected {recorded}, as this run is trained, found {current}; restore it"
                )

    def permitted_changes(self, config: RunConfig) -> list[str]:
        """Return a phrase for each setting that has another value than recorded, and may have it."""
        return [
            f"{name} {recorded} then, {current} now"
            for name, recorded, current in self.changed_settings(config)
            if MAY_CHANGE.fullmatch(name)
        ]

    def changed_settings(self, config: RunConfig) -> Iterator[tuple[str, str, str]]:
        """Yield the name, the recorded and the current value of each setting that is not as recorded."""
        if self.settings is None:
            return
        recorded = dict(_flat(to_dict(from_dict(RunConfig, self.settings))))
        current = dict(_flat(to_dict(config)))
        for name in sorted(recorded.keys() | current.keys()):
            values = (recorded.get(name, NOTHING), current.get(name, NOTHING))
            if values[0] != values[1]:
                before, now = ("nothing" if value is NOTHING else json.dumps(value) for value in values)
                yield name, before, now


def _own_values(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in checksums.json. Raises InputError, with the remedy, if there is none."""
    try:
        return read_settings(path)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None


def _file_checksum(name: str, content: bytes) -> str:
    """Return the checksum (hex) of a file's content under its name."""
    return checksum(content, name.encode()).hex()


def _json_checksum(values: dict[str, Any]) -> str:
    """Return the checksum (hex) of JSON values."""
    return checksum(json.dumps(values).encode(), RECORD_FILE.encode()).hex()


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting inside a section."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    else:
        yield name, value
