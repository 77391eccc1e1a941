"""A dry run writes nothing, refuses what the real run refuses, and its numbers are those of the real run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import iisan_fast
from iisan_fast import InputError, ViewConfig, demo
from iisan_fast.config import RunConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.evaluation import parameter_counts
from iisan_fast.precision import resolve_precision
from iisan_fast.setting_sources import base_settings
from iisan_fast.settings import run_config
from iisan_fast.states import EncodedTable
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.run_files import CATALOGUE_FILE, RUN_FILES
from iisan_fast.training.trainer import Trainer

SMALL = {"batch_users": 16, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}
CPU = torch.device("cpu")


def all_files(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file and folder below some folders.

    Of lock.mdb the size alone: LMDB notes there who reads.
    """
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    status = {str(path): path.stat() for path in paths}
    times = {name: 0 if name.endswith("lock.mdb") else value.st_mtime_ns for name, value in status.items()}
    return {name: (value.st_size, times[name]) for name, value in status.items()}


def real_numbers(plan: dict) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the parameters, in all and by group, and the bytes of the table of the run that a plan describes."""
    config: RunConfig = run_config({}, base_settings(plan["config"]))
    dataset = load_dataset(Path(config.dataset), config.protocol)
    precision = resolve_precision(config, CPU)
    with open_source(config, dataset, CPU, "auto", precision) as (source, _):
        trainer = Trainer(config, dataset.sequences, source, CPU, precision)
        groups = trainer.model.parameter_groups()
        by_group = {name: sum(weight.numel() for weight in weights) for name, weights in groups.items()}
        table = sum(view.nbytes for view in source.views) if config.cache is not None else 0
        if isinstance(source, EncodedTable):
            table = source.inputs.size
        return parameter_counts(trainer.model), by_group, table


@pytest.mark.parametrize("method", ["iisan", "frozen", "id"])
def test_the_plan_of_a_run_from_a_cache(toy_run, tmp_path, method):
    dataset, cache = toy_run
    settings = {"cache": None} if method == "id" else {"cache": cache}
    settings |= {"method": method, **SMALL}
    if method != "iisan":
        del settings["bottleneck"]
    before = all_files(dataset, cache, tmp_path)
    plan = iisan_fast.train(dataset, out=tmp_path / "run", dry_run=True, **settings)
    assert all_files(dataset, cache, tmp_path) == before and not (tmp_path / "run").exists()
    assert json.loads(json.dumps(plan)) == plan
    result = iisan_fast.train(dataset, out=tmp_path / "run", epochs=1, **settings)
    counts, groups, table = real_numbers(plan)
    assert plan["parameters"] == {**counts, "groups": groups} and sum(groups.values()) == counts["trainable"]
    assert plan["method"] == result["method"] and (plan["users"], plan["items"]) == (60, 40)
    assert plan["steps_per_epoch"] == 4 and plan["memory"]["table"] == (0 if method == "id" else table)
    assert plan["memory"]["table_place"] == ("none" if method == "id" else "device")
    assert plan["memory"]["optimizer"] == 2 * plan["memory"]["gradients"] == 8 * counts["trainable"]
    assert (plan["memory"]["batch"] == "not estimated") == (method == "id")
    assert {*plan["files"]["written"]} == {*RUN_FILES} - {CATALOGUE_FILE}
    missing = {*RUN_FILES} - {*os.listdir(tmp_path / "run")}
    assert missing == {"previous.safetensors", CATALOGUE_FILE}  # of a second epoch, and of added items
    assert plan["files"]["folder"] == str(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["train"]["max_epochs"] = plan["config"]["train"]["max_epochs"]
    assert {name: value for name, value in saved.items() if name != "format"} == plan["config"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iisan", "bitfit"])
def test_the_plan_of_a_run_of_encoders(small_catalogue, encoder_views, tmp_path, method):
    settings = {"views": encoder_views, "method": method, "out": tmp_path / "run", "embedding_dim": 16}
    before = all_files(small_catalogue, tmp_path)
    plan = iisan_fast.train(small_catalogue, uncached=True, dry_run=True, device="cpu", **settings)
    assert all_files(small_catalogue, tmp_path) == before
    counts, groups, table = real_numbers(plan)
    assert plan["parameters"] == {**counts, "groups": groups}
    if method == "iisan":
        assert plan["memory"]["table"] == table > 0
    assert plan["files"]["read"] == [str(small_catalogue.resolve()), *(view.encoder for view in encoder_views)]
    assert [view["source"] for view in plan["views"].values()] == ["image", "title"]
    assert isinstance(plan["memory"]["batch"], int)


def test_a_dry_run_refuses_what_a_run_refuses(toy_run, tmp_path):
    dataset, cache = toy_run
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "items.tsv").write_text((dataset / "items.tsv").read_text() + "new\ta title\n")
    users = (dataset / "users.tsv").read_text()
    (larger / "users.tsv").write_text(users + "late\tnew i1 i2 i3 i4 i5\n")
    for settings, message in (
        ({"out": used}, "already holds a run"),
        ({"out": used / "config.json" / "run"}, "cannot be written; .*config.json is no folder that can be written"),
        ({"views": "video"}, "no view 'video'; it has image, title"),
        ({"dataset": larger}, "lacks 1 of 41 items"),
        ({"dataset": tmp_path / "none"}, "no such folder"),
        ({"layer_groups": 9}, "layer_groups: expected 1 to"),
        ({"precision": "bfloat16", "method": "frozen"}, "precision: frozen has no products"),
        ({"table": "disk"}, "table: expected one of"),
    ):
        call = {"dataset": dataset, "cache": cache, "out": tmp_path / "run", "device": "cpu", **settings}
        messages = []
        for dry_run in (True, False):
            with pytest.raises(InputError, match=message) as error:
                iisan_fast.train(dry_run=dry_run, **call)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_plan_of_the_demo(tmp_path):
    before = all_files(tmp_path)
    changes = {"train.max_epochs": 3}
    plan = iisan_fast.train(out=tmp_path / "run", method="id", dry_run=True, device="cpu", changes=changes)
    assert all_files(tmp_path) == before
    assert (plan["method"], plan["users"], plan["max_epochs"]) == ("id", demo.USERS, 3)
    assert 0 < plan["items"] <= demo.ITEMS
    assert plan["parameters"]["groups"]["item_embeddings"] == (plan["items"] + 1) * 64
    assert plan["config"]["dataset"] == str(tmp_path / "run" / "demo" / "dataset")
    assert {*plan["files"]["written"]} == {*RUN_FILES, "demo"} - {CATALOGUE_FILE}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        iisan_fast.train(out=tmp_path, dry_run=True)
    with pytest.raises(InputError, match="the demo takes no cache, views, encoders"):
        iisan_fast.train(out=tmp_path / "run", changes={"cache": "c"}, dry_run=True)


@pytest.mark.slow
def test_the_plan_of_an_extraction(catalogue, encoder_views, tmp_path):
    views = [encoder_views[1], ViewConfig("again", "title", encoder_views[1].encoder, layers=(0, 6))]
    cache = tmp_path / "states"
    before = all_files(catalogue, tmp_path)
    planned = iisan_fast.extract(catalogue, cache, views=views, dry_run=True, device="cpu")
    assert all_files(catalogue, tmp_path) == before
    done = iisan_fast.extract(catalogue, cache, views=views, device="cpu")
    assert [(counts.view, counts.items, counts.encoded, counts.entry_bytes) for counts in planned] == [
        (counts.view, counts.items, counts.encoded, counts.entry_bytes) for counts in done
    ]
    assert [counts.blank for counts in planned] == [None, None] and [counts.encoded for counts in done] == [70, 70]
    stored = (cache / "states.lmdb" / "data.mdb").stat().st_size
    assert sum(counts.entry_bytes for counts in done) <= stored
    titles = (catalogue / "items.tsv").read_text().splitlines(keepends=True)
    titles[0] = titles[0].rstrip("\n") + " for oak\n"
    (catalogue / "items.tsv").write_text("".join(titles))
    before = all_files(catalogue, tmp_path)
    again = iisan_fast.extract(catalogue, cache, views=views, dry_run=True, device="cpu")
    assert [counts.encoded for counts in again] == [1, 1] and all_files(catalogue, tmp_path) == before
    with pytest.raises(InputError, match="view 'again' was made with other settings: layers"):
        with_other_layers = ViewConfig("again", "title", encoder_views[1].encoder, layers=(0, 3))
        iisan_fast.extract(catalogue, cache, views=with_other_layers, dry_run=True, device="cpu")
