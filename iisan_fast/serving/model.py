"""The class of a model: fit it to a dataset, recommend, load it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..api import OnEpoch, evaluate
from ..data import Dataset
from ..devices import torch_device
from ..errors import InputError
from ..files import absolute_path
from ..setting_sources import PathLike, as_path
from ..settings import refuse_unknown
from ..training import RunFolder
from .fitting import FIT_SETTINGS, described_views, fit_run
from .history_arguments import allowed_items, numbered_histories
from .ranked_items import RankedItem, ranked_lists
from .recommendation import recommend
from .recommendation_frames import library_of, recommendation_frame
from .trained_model import TrainedModel

if TYPE_CHECKING:
    import torch


class IISAN:
    """A recommender on the hidden states of frozen encoders, with its run folder.

    `run` is the folder of the fitted run, and `figures` holds its figures on the test set; both are None before.
    """

    def __init__(
        self,
        text: PathLike | None = None,
        image: PathLike | None = None,
        *,
        device: str | torch.device = "auto",
        cache: PathLike | None = None,
        **settings: Any,
    ) -> None:
        """Take the encoders and the settings. Nothing is read yet.

        text, image: hub names or folders of the encoders of titles and of images; one is enough.
        device: auto, cpu, cuda or cuda:N.
        cache: folder of the hidden states; by default one in the user's cache folder, named after dataset and encoders.
        settings: those of `train` and `extract` by name, as method="iisan", epochs=20, seed=1, text_pooling="mean".
            Without a method, two encoders of unequal shape take iisan-versa, and all others iisan.
        Raises InputError for a setting that is unknown or cannot be used.
        """
        refuse_unknown("IISAN", settings, ("text", "image", "device", "cache", *FIT_SETTINGS))
        described_views(text, image, settings)
        self.run: Path | None = None
        self.figures: dict[str, Any] | None = None
        self._encoders = (text, image)
        self._device = torch_device(device)
        self._cache = cache
        self._settings = settings
        self._trained: TrainedModel | None = None

    def __repr__(self) -> str:
        """Return the class with its run."""
        return f"IISAN(run={None if self.run is None else str(self.run)!r})"

    def fit(
        self,
        data: PathLike | Dataset,
        out: PathLike | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        **settings: Any,
    ) -> IISAN:
        """Encode the items that the cache lacks, train, test the best epoch once, and return the model.

        data: a dataset's folder, or what `load_dataset` returned.
        out: the run's folder, which must not hold a run yet; by default the next free runs/NAME-N.
        on_epoch: gets each finished epoch's figures; `print` shows them.
        settings: as of the class; they go before those.
        Raises InputError, before an encoder runs, for settings that cannot be used, and as `train` and `extract` do.
        """
        refuse_unknown("fit", settings, ("data", "out", "on_epoch", *FIT_SETTINGS))
        if not self._may_fit:
            raise InputError(f"fit: this model is loaded from {self.run}; make a new IISAN, with encoders and settings")
        views, chosen = described_views(*self._encoders, {**self._settings, **settings})
        common = {"device": self._device, "on_epoch": on_epoch}
        result = fit_run(data, out, views, self._cache, chosen, common)
        self.run = Path(result.pop("run"))
        self.figures = result
        self._trained = None
        return self

    @classmethod
    def load(cls, run: PathLike, device: str | torch.device = "auto") -> IISAN:
        """Return the model of a run's folder. Raises InputError if it holds no finished run, or a damaged one."""
        model = cls(device=device)
        model._may_fit = False
        model.run = as_path("run", run)
        model._trained = TrainedModel.load(model.run, model._device)
        model.figures = RunFolder.open(model.run).read_test()
        return model

    _may_fit = True  # False for a loaded model

    @property
    def trained(self) -> TrainedModel:
        """Return the model in memory, which is loaded when it is first needed.

        Raises InputError if it is not fitted yet, and as `load` does.
        """
        if self.run is None:
            raise InputError("IISAN: the model is not fitted yet; call fit, or take one with IISAN.load")
        if self._trained is None:
            self._trained = TrainedModel.load(self.run, self._device)
        return self._trained

    @overload
    def recommend(self, histories: Sequence[Sequence[str]], k: int = 10, **options: Any) -> list[list[RankedItem]]: ...

    @overload
    def recommend(
        self, histories: Mapping[str, Sequence[str]], k: int = 10, **options: Any
    ) -> dict[str, list[RankedItem]]: ...

    @overload
    def recommend(self, histories: object, k: int = 10, **options: Any) -> Any: ...

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude_history: bool = True,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        unknown: str = "error",
        frame: str | None = None,
    ) -> Any:
        """Return the best items for histories, best first.

        histories: lists of item ids, oldest first; or such lists by user id; or a frame of pandas, polars or arrow, or
        a list of dicts, with user_id and history (a list, or ids joined by spaces), or with user_id and item_id. An
        empty history gets the popular items.
        k: items for each history. allow, deny: ids of the only items to recommend, and of those not to recommend.
        exclude_history: leave out the items of the history itself. unknown: "skip" leaves out ids of histories that
        the model does not have, with a warning; "error" refuses them. frame: polars, pandas or arrow asks for a frame.
        Returns for each history a list of items with item_id, score and title; for lists by user id, those lists by
        user id; for a frame, a frame of its library with user_id, rank, item_id and score.
        Raises InputError for ids that the model does not have, and for a k beyond the catalogue.
        """
        catalogue = self.trained.catalogue
        library = library_of(histories, frame)
        users = numbered_histories(histories, catalogue, unknown)
        allowed = allowed_items(catalogue, allow, deny)
        recommended = recommend(self.trained, users, k, exclude_history, allowed)
        if library is not None:
            return recommendation_frame(recommended, catalogue, library)
        lists = ranked_lists(recommended, catalogue)
        return dict(zip(users.user_ids, lists)) if isinstance(histories, Mapping) else lists

    def evaluate(self, split: str = "test", **settings: Any) -> dict[str, Any]:
        """Rank the targets of the run's users in the full catalogue of its training, as `iisan_fast.evaluate` does.

        split: test or validation. settings: as ks=(5, 10). Raises InputError for a run without histories.
        """
        return evaluate(self.trained.run, split, device=self._device, **settings)

    def save_pretrained(
        self,
        folder: PathLike,
        *,
        include_titles: bool = False,
        include_histories: bool = False,
        license: str | None = None,
    ) -> None:
        """Save the part of the run that ranks in a new folder, with a model card, as `push_to_hub` publishes it.

        include_titles: save the items' titles. include_histories: save the users' ids and histories. license: its name
        on the hub, such as "apache-2.0", for the card. Local paths are left out.
        Raises InputError if the folder exists, and for a run that is damaged or not tested yet.
        """
        from .hub import Publication, save_published

        path = as_path("folder", folder)
        publication = Publication(absolute_path(path).name, include_titles, include_histories, license)
        save_published(self.trained.run, path, publication)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_titles: bool = False,
        include_histories: bool = False,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "A model of iisan-fast",
    ) -> str:
        """Publish the part of the run that ranks on the Hugging Face Hub, and return the address of the commit.

        repo_id: "user/name"; it is made if it is not there. include_titles, include_histories, license: as of
        `save_pretrained`. The others are those of huggingface_hub.
        Raises InputError for a run that is damaged or not tested yet, and the errors of the hub.
        """
        from .hub import Publication, push_published

        publication = Publication(repo_id, include_titles, include_histories, license)
        options = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        return push_published(self.trained.run, publication, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike,
        *,
        device: str | torch.device = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> IISAN:
        """Return a published model, from a folder or from the Hugging Face Hub.

        name: a folder, or "user/name" on the hub. The others but device are those of huggingface_hub.
        Raises InputError if there is no such model, or a damaged one.
        """
        from .hub import fetched_run

        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        return cls.load(fetched_run(name, **options), device)
