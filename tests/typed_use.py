"""A user's program that `make lint` type-checks: right calls pass, and each wrong one is an error.

Every `type: ignore` below marks an error that mypy must find; if it finds none there, `make lint` fails.
"""

from __future__ import annotations

from pathlib import Path

import iisan_fast
from iisan_fast import IISAN, ExtractionConfig, ModelConfig, ProtocolConfig, RunConfig, TrainConfig, ViewConfig
from iisan_fast.data import Dataset
from iisan_fast.kernels import form_on
from iisan_fast.setting_fields import from_dict


def right(folder: Path) -> list[str]:
    iisan_fast.prepare()
    dataset: Dataset = iisan_fast.load_dataset(folder, ProtocolConfig(max_inputs=10), min_interactions=5)
    view = ViewConfig("title", "title", "encoder", layers=(0, 2))
    results = iisan_fast.extract(dataset, "states", views=[view], image_encoder=folder, device="cpu")
    config: RunConfig = from_dict(RunConfig, {"dataset": str(folder), "model": {"method": "id"}})
    iisan_fast.train(config, out="runs/first", on_epoch=print)
    run = iisan_fast.train("DATASET", cache="states", model=ModelConfig(), epochs=20, ks=(5, 10))["run"]
    iisan_fast.evaluate(run, split="validation", ks=[5])
    fitted: IISAN = IISAN(text="encoder", image=folder, device="cpu", epochs=3).fit(dataset, out="runs/second")
    by_user = IISAN.load(run).recommend({"u1": ["i1"]}, k=5, allow=["i2"])["u1"]
    first = fitted.recommend([["i1", "i2"], []], unknown="skip")[0][0]
    fitted.add_items([{"item_id": "new", "title": "A title"}])
    print(fitted.similar("new", k=3)[0].score, fitted.show(folder / "page.html").name)
    print(first.item_id, first.score, by_user[0].title)
    return iisan_fast.load(run).item_ids + [result.view for result in results]


def wrong(folder: Path) -> None:
    ModelConfig(embedding_dim="64")  # type: ignore[arg-type]
    iisan_fast.load_dataset(folder, protocol=ModelConfig())  # type: ignore[arg-type]
    iisan_fast.load_dataset(folder, ProtocolConfig(min_interaction=5))  # type: ignore[call-arg]
    iisan_fast.train("DATASET", train=TrainConfig(max_epochs="20"))  # type: ignore[arg-type]
    iisan_fast.train("DATASET", model=TrainConfig())  # type: ignore[arg-type]
    iisan_fast.extract("DATASET", extraction=ExtractionConfig(worker=2))  # type: ignore[call-arg]
    iisan_fast.extract("DATASET", dry_run="yes")  # type: ignore[arg-type]
    iisan_fast.extract("DATASET", "states", views=["title"])  # type: ignore[list-item]
    iisan_fast.load(folder).item_vector  # type: ignore[attr-defined]  # noqa: B018
    iisan_fast.trian  # type: ignore[attr-defined]  # noqa: B018
    IISAN(text=3)  # type: ignore[arg-type]
    IISAN.load(run=folder).recomend([["i1"]])  # type: ignore[attr-defined]
    form_on("cpu", "gpu", 3)  # type: ignore[call-arg]
