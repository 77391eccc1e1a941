"""Find the run that a job began before its launcher started all ranks again, with the same command line."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from ..config import RunConfig
from ..errors import InputError
from ..ranks import JobMemory, Ranks
from .run_folder import RunFolder

LOGGER = logging.getLogger(__name__)
CHOSEN_BY_RUN = ("uncached.items_at_once",)  # settings that a run chooses and records if they are not given

_calls: Counter[str] = Counter()  # how many runs this process has begun, by the folder that was asked for


class JobRunFolder(RunFolder):
    """The folder of a run that the command of a job asks for, which the job remembers when it claims it.

    A job that is started again asks for its runs in the same order, and gets their folders.
    """

    def __init__(self, path: Path | None, name: str, ranks: Ranks) -> None:
        """Take the folder that is asked for, or the one that the job has claimed for it before.

        path: None for the first free folder runs/NAME-N. ranks: those that train the run; all of them make it. Raises
        InputError if the launcher's store does not answer.
        """
        asked = f"runs/{name}-N" if path is None else str(path)
        self._memory = JobMemory(ranks)
        self._key = f"{asked} {_calls[asked]}"
        _calls[asked] += 1
        claimed = self._memory.recall(self._key)
        super().__init__(path if claimed is None else Path(claimed), name, ranks)
        self._was_claimed = claimed is not None

    @property
    def has_begun(self) -> bool:
        """Return True if the job has begun a run in the folder before it was started again. All ranks ask."""
        return self._ranks.first_does(lambda: self._was_claimed and (self.path / "config.json").exists())

    def refuse_other_settings(self, config: RunConfig) -> None:
        """Raise InputError if the run that the job has begun has other settings than the command of now."""
        record = self.read_record()
        for name, recorded, current in () if record is None else record.changed_settings(config):
            if name not in CHOSEN_BY_RUN:
                raise InputError(
                    f"{self.path}: {name}: expected {recorded}, as this job began the run, found {current}; "
                    "start another job for another run"
                )

    def _claimed(self) -> Path:
        """Claim the folder on rank 0, and remember it for the job. Raises InputError as `claim` does."""
        path = super()._claimed()
        self._memory.note(self._key, str(path))
        return path
