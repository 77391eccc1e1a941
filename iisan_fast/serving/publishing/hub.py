"""Save a run to be published, push it to the Hugging Face Hub, and fetch it from there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...errors import InputError
from ...files import absolute_path, as_path, whole_folder
from ...setting_sources import PathLike
from ...training import RunFolder, write_published
from ..growing.catalogue_file import read_changes, write_changes
from .model_card import LIBRARY, TAGS, model_card

CARD_FILE = "README.md"
PATTERNS = ("*.json", "*.npz", "*.safetensors", CARD_FILE)  # of the files that are fetched


class Publication(NamedTuple):
    """The name under which a run is published, and the parts that are published only if asked for."""

    name: str  # on the hub
    include_titles: bool = False
    include_histories: bool = False
    license_name: str | None = None

    def refuse_unfit(self) -> None:
        """Raise InputError for arguments of another type: a word in place of False would publish what is left out."""
        for name in ("include_titles", "include_histories"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, found {getattr(self, name)!r}")
        if self.license_name is not None and (not isinstance(self.license_name, str) or not self.license_name.strip()):
            raise InputError(f"license: expected a name on the hub, such as 'apache-2.0', found {self.license_name!r}")


class PublishedRun(ModelHubMixin, library_name=LIBRARY, tags=list(TAGS)):
    """A run's folder as the library of the hub saves, pushes and fetches it."""

    def __init__(self, run: Path, publication: Publication | None = None) -> None:
        """Take the folder of a run, and what is published of it; nothing is published of a fetched one."""
        self.run = run
        self.publication = publication or Publication(run.name)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write what is published into an empty folder. Raises InputError if the run is damaged or not tested yet."""
        publication = self.publication
        write_published(self.run, save_directory, publication.include_titles, publication.include_histories)
        _write_changes(self.run, save_directory, publication.include_titles)
        card = model_card(save_directory, publication.name, publication.license_name)
        (save_directory / CARD_FILE).write_text(card, encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> PublishedRun:
        """Return the run in a folder, or of a name on the hub, whose files are fetched."""
        is_folder = Path(model_id).is_dir()
        return cls(Path(model_id if is_folder else snapshot_download(model_id, allow_patterns=PATTERNS, **options)))


def save_published(run: Path, folder: PathLike, publication: Publication) -> None:
    """Write what is published of a run into a new folder, as a whole or not at all.

    Raises InputError if the folder exists, for arguments of another type, or if the run is damaged or not tested yet.
    """
    publication.refuse_unfit()
    target = absolute_path(as_path("folder", folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as temporary:
        PublishedRun(run, publication).save_pretrained(temporary)


def push_published(run: Path, publication: Publication, **options: Any) -> str:
    """Push what is published of a run to the hub, in one commit, and return the commit's address.

    options: those of the hub's `push_to_hub`. Raises InputError for a name that the hub does not take, and if the run
    is damaged or not tested yet; and the errors of the hub.
    """
    publication.refuse_unfit()
    try:
        validate_repo_id(publication.name)
    except HFValidationError as error:
        raise InputError(f"repo_id: {' '.join(str(error).split())}") from None
    return PublishedRun(run, publication).push_to_hub(publication.name, **options)


def fetched_run(name: PathLike, **options: Any) -> Path:
    """Return the folder of a published run, fetched from the hub unless `name` is a folder.

    options: those of the hub's `from_pretrained`. Raises InputError if there is neither a folder nor a model of this
    name that the hub gives.
    """
    folder = as_path("name", name)
    if folder.is_dir():
        return folder
    try:
        return PublishedRun.from_pretrained(str(name), **options).run
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: neither a folder nor a model that the hub gives: {reason}") from None


def _write_changes(run: Path, folder: Path, include_titles: bool) -> None:
    """Write the changes of a run's catalogue since its training into a folder, if there are any."""
    changes = read_changes(RunFolder(run))
    if changes is not None:
        titles = changes.titles if include_titles else [""] * len(changes.titles)
        write_changes(RunFolder(folder), replace(changes, titles=titles))
