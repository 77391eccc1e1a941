"""The verbs of a model whose run is trained: recommend, change its catalogue, evaluate, export, and show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..api import evaluate
from ..devices import torch_device
from ..errors import InputError
from ..files import absolute_path, as_path
from ..setting_sources import PathLike
from ..states import EncoderPlaces
from .growing.changing_catalogue import ChangedCatalogue, add_items, remove_items, update_items
from .histories.history_arguments import allowed_items, item_id_list, numbered_histories
from .ranked_items import RankedItem, ranked_lists
from .recommendation import recommend
from .recommendation_frames import library_of, recommendation_frame
from .similar_items import similar
from .trained_model import TrainedModel

if TYPE_CHECKING:
    import torch

    from .exports.exporting import ExportReport


class FittedModel:
    """A model with a run's folder, `run`, and its figures on the test set, `figures`; both are None before `fit`."""

    def __init__(self, device: str | torch.device) -> None:
        """Take the device that ranks: auto, cpu, cuda or cuda:N. Raises InputError if there is none of this name."""
        self.run: Path | None = None
        self.figures: dict[str, Any] | None = None
        self._device = torch_device(device)
        self._places = EncoderPlaces()
        self._is_fetched = False  # True for files in the hub's cache, which must not change
        self._trained: TrainedModel | None = None

    def __repr__(self) -> str:
        """Return the class with its run."""
        return f"{type(self).__name__}(run={None if self.run is None else str(self.run)!r})"

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

    def similar(self, item_id: str, k: int = 10, by: str = "vectors") -> list[RankedItem]:
        """Return the k items most similar to an item, best first, with the cosine similarity as score.

        by: "vectors" compares the item vectors of the model, "content" the frozen states of titles and images.
        Raises InputError for an item that the model does not have, and for a k beyond the catalogue.
        """
        return similar(self.trained, item_id, k, by)

    def evaluate(self, split: str = "test", **settings: Any) -> dict[str, Any]:
        """Rank the targets of the run's users in the full catalogue of its training, as `iisan_fast.evaluate` does.

        split: test or validation. settings: as ks=(5, 10). Raises InputError for a run without histories.
        """
        return evaluate(self.trained.run, split, device=self._device, **settings)

    def add_items(
        self,
        items: object,
        images: PathLike | None = None,
        *,
        features: Mapping[str, PathLike] | None = None,
        missing_images: str | None = None,
    ) -> None:
        """Encode new items by the run's encoders and add them to its catalogue; they can be recommended at once.

        items: a file (.tsv, .csv, .parquet, .jsonl), a frame of pandas, polars or arrow, or a list of dicts, with
        item_id, title and, if the run reads captions, caption. images: a folder of images named by item id, or an LMDB.
        features: the file of the items' ready-made features by the name of each view that reads such; its rows have
        ids, or stand in the order of the items. missing_images: "error", or "blank" for a blank image in place of one
        that cannot be read; by default the run's. The run's folder and the model change as a whole or not at all.
        Raises InputError for items that cannot be used or that the catalogue has, and for encoders that are not those
        of the run; `load` takes the places to which they have moved.
        """
        self._change(add_items, items, images, encoders=self._places_with(features), missing_images=missing_images)

    def update_items(
        self,
        items: object,
        images: PathLike | None = None,
        *,
        features: Mapping[str, PathLike] | None = None,
        missing_images: str | None = None,
    ) -> None:
        """Encode the new contents of items that the catalogue has. Arguments and errors are those of `add_items`."""
        self._change(update_items, items, images, encoders=self._places_with(features), missing_images=missing_images)

    def remove_items(self, item_ids: Iterable[str]) -> None:
        """Remove items from the catalogue: they are not recommended again, and may still stand in histories.

        Raises InputError for ids that the catalogue does not have, and if no item would be left.
        """
        self._change(remove_items, item_id_list("items", item_ids))

    def _places_with(self, features: Mapping[str, PathLike] | None) -> EncoderPlaces:
        """Return the places of the encoders, with files of features. Raises InputError for what is no path."""
        files = {name: str(as_path(f"features.{name}", path)) for name, path in (features or {}).items()}
        return replace(self._places, features=files)

    def _change(self, change: Callable[..., ChangedCatalogue], *arguments: Any, **options: Any) -> None:
        """Change the catalogue of the run's folder and of the model.

        Raises InputError if the change is refused, or if the files lie in the hub's cache.
        """
        run = self.trained.run
        if self._is_fetched:
            raise InputError(
                f"{run}: lies in the cache of the hub, which must not change; save the model in a folder by "
                "save_pretrained, and load it from there"
            )
        self._trained = change(run, *arguments, device=self._device, **options).model

    def export(self, folder: PathLike, index: str | None = None) -> ExportReport:
        """Write the item vectors and the encoders into a new folder for other programs, and return what it holds.

        index: "faiss" or "usearch" for an approximate index, whose recall is measured.
        Raises InputError if the folder exists, or if a library is missing; the message names the command for it.
        """
        from .exports.exporting import export  # onnx, which not every installation has

        target = absolute_path(as_path("folder", folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        return export(self.trained.run, target, index, self._device)

    def show(
        self,
        out: PathLike | None = None,
        *,
        dataset: PathLike | None = None,
        users: int = 20,
        seed: int = 0,
        pictures: bool = True,
    ) -> Path:
        """Write one self-contained HTML page about the run, and return its path.

        out: the file; by default report.html in the run's folder. dataset: the folder with the pictures; by default the
        one that the run names. users: how many to show, drawn at random by `seed`.
        Raises InputError for a run without histories, and for arguments that cannot be used.
        """
        from .report.page import show

        path = None if out is None else as_path("out", out)
        images = None if dataset is None else as_path("dataset", dataset)
        return show(self.trained.run, path, images, users, seed, pictures, self._device).path
