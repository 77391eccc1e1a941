"""The class of a model: fit it to a dataset, load it again, and publish it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import OnEpoch
from ..config import FeaturesConfig
from ..data import Dataset
from ..errors import InputError
from ..files import absolute_path, as_path
from ..setting_sources import PathLike
from ..settings import refuse_unknown
from ..training import RunFolder
from .fitted_model import FittedModel
from .fitting import FIT_SETTINGS, described_views, encoder_places, fit_run, listed_features
from .trained_model import TrainedModel

if TYPE_CHECKING:
    import torch


class IISAN(FittedModel):
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
        features: Mapping[str, PathLike] | Sequence[FeaturesConfig] = (),
        **settings: Any,
    ) -> None:
        """Take the encoders and the settings. Nothing is read yet.

        text, image: hub names or folders of the encoders of titles and of images; one is enough.
        device: auto, cpu, cuda or cuda:N.
        cache: folder of the hidden states; by default one in the user's cache folder, named after dataset and encoders.
        features: files of ready-made features by the names of their views, or FeaturesConfigs; these views come after
            those of encoders.
        settings: those of `train` and `extract` by name, as method="iisan", epochs=20, seed=1, text_pooling="mean".
            Without a method, two encoders of unequal shape, and features beside another view, take iisan-versa, and all
            others iisan.
        Raises InputError for a setting that is unknown or cannot be used.
        """
        refuse_unknown("IISAN", settings, ("text", "image", "device", "cache", "features", *FIT_SETTINGS))
        described_views(text, image, settings)
        super().__init__(device)
        self._places = encoder_places(text, image, settings)
        self._encoders = (text, image)
        self._cache = cache
        self._features = listed_features(features)
        self._settings = settings

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
        result = fit_run(data, out, views, self._cache, chosen, common, self._features)
        self.run = Path(result.pop("run"))
        self.figures = result
        self._trained = None
        return self

    @classmethod
    def load(
        cls,
        run: PathLike,
        device: str | torch.device = "auto",
        *,
        text: PathLike | None = None,
        image: PathLike | None = None,
        trust_remote_code: bool = False,
    ) -> IISAN:
        """Return the model of a run's folder.

        text, image: the places to which the run's encoders have moved; only new items need them. trust_remote_code:
        whether code that comes with them may run.
        Raises InputError if the folder holds no finished run, or a damaged one.
        """
        model = cls(device=device)
        model._places = encoder_places(text, image, {"trust_remote_code": trust_remote_code})
        model._may_fit = False
        model.run = as_path("run", run)
        model._trained = TrainedModel.load(model.run, model._device)
        model.figures = RunFolder.open(model.run).read_test()
        return model

    _may_fit = True  # False for a loaded model

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
        from .publishing.hub import Publication, save_published

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
        from .publishing.hub import Publication, push_published

        publication = Publication(repo_id, include_titles, include_histories, license)
        options = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        return push_published(self.trained.run, publication, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike,
        *,
        device: str | torch.device = "auto",
        text: PathLike | None = None,
        image: PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> IISAN:
        """Return a published model, from a folder or from the Hugging Face Hub.

        name: a folder, or "user/name" on the hub. device, text, image: as of `load`. The others are those of
        huggingface_hub.
        Raises InputError if there is no such model, or a damaged one.
        """
        from .publishing.hub import fetched_run

        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        model = cls.load(fetched_run(name, **options), device, text=text, image=image)
        model._is_fetched = not as_path("name", name).is_dir()
        return model
