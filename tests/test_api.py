"""The public API as a newcomer meets it: a light import, one call a step, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import iisan_fast
from helpers.run_folders import untimed
from iisan_fast import (
    EvaluationConfig,
    InputError,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
    settings,
)
from iisan_fast.cli import main
from iisan_fast.setting_sources import SECTIONS

SMALL = {"epochs": 2, "batch_users": 16, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}


def answer(script: str) -> str:
    """Return the standard output of a script in a new process."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def run(toy_run, tmp_path_factory) -> dict:
    dataset, cache = toy_run
    return iisan_fast.train(dataset, cache=cache, out=tmp_path_factory.mktemp("runs") / "run", **SMALL)


def test_the_import_is_light():
    script = """
import logging, os, sys, time
before, started = dict(os.environ), time.perf_counter()
import iisan_fast
milliseconds = (time.perf_counter() - started) * 1000
assert os.environ == before and not logging.root.handlers
assert logging.getLogger("iisan_fast").level == logging.NOTSET
assert not {"torch", "transformers", "numpy", "lmdb"} & sys.modules.keys(), "a heavy import"
print(milliseconds)
"""
    assert min(float(answer(script)) for _ in range(4)) < 50


def test_every_public_name_is_there_and_listed():
    assert set(iisan_fast.__all__) <= set(dir(iisan_fast))
    assert all(getattr(iisan_fast, name) is not None for name in iisan_fast.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        iisan_fast.trian  # noqa: B018


def test_public_functions_load_neither_torch_nor_transformers_before_they_are_called():
    names = ("load_dataset", "extract", "train", "resume", "evaluate", "load", "verify")
    loaded = f"import sys, iisan_fast as i; [getattr(i, name) for name in {names}]; print(*sys.modules)"
    assert not {"torch", "transformers"} & set(answer(loaded).split())


def test_prepare_sets_the_same_as_the_command():
    script = "import os, iisan_fast; iisan_fast.prepare(); iisan_fast.prepare(); print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-W", "error", "-c"]
    result = subprocess.run([*command, script], env=environment, capture_output=True, text=True)
    assert result.stdout == "3000\n", result.stderr


def test_prepare_after_torch_says_that_it_is_late(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    root = list(logging.root.handlers)
    level = logging.getLogger("iisan_fast").level
    with pytest.warns(RuntimeWarning, match="torch is imported already"):
        iisan_fast.prepare()
    assert logging.root.handlers == root and logging.getLogger("iisan_fast").level == level
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iisan_fast.prepare()


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "iisan_fast", "--version"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == f"iisan-fast {iisan_fast.__version__}\n", result.stderr


def test_each_flat_setting_is_a_field_of_one_section():
    fields = {
        (section, field.name)
        for section in settings.RUN_SECTIONS
        for field in dataclasses.fields(SECTIONS[section])
        if field.name != "views"
    }
    assert {(section, name) for name, section in settings.SECTION_OF.items()} == fields
    assert not settings.SECTION_OF.keys() & {field.name for field in dataclasses.fields(RunConfig)}
    flat = (*settings.SECTION_OF, *settings.ENCODER_SETTINGS)
    assert len(set(flat)) == len(flat)
    assert {"image_encoder", "text_layers", "max_tokens", "encoder_dtype"} <= set(settings.ENCODER_SETTINGS)


def test_settings_resolve_as_on_the_command_line(toy_run, tmp_path):
    dataset, cache = toy_run
    flat = {**SMALL, "method": "iisan-versa", "bottlenecks": {"first": 4}, "ks": [5], "mask_history": False}
    iisan_fast.train(dataset, cache=cache, out=tmp_path / "python", min_interactions=6, **flat)
    options = "--epochs 2 --batch-users 16 --embedding-dim 16 --bottleneck 8 --device cpu --method iisan-versa"
    options += " --bottleneck first=4 --k 5 --unmasked --min-interactions 6"
    with pytest.raises(SystemExit) as end:
        main(["train", str(dataset), "--cache", str(cache), "--out", str(tmp_path / "command"), *options.split()])
    assert not end.value.code
    configs = [(tmp_path / name / "config.json").read_text() for name in ("python", "command")]
    assert configs[0] == configs[1]
    assert untimed(tmp_path / "python") == untimed(tmp_path / "command")


def test_a_run_by_every_form_of_its_settings(toy_run, run, tmp_path):
    """Check that flat settings, sections, a RunConfig, its file, and a loaded dataset make the same run."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    train = TrainConfig(batch_users=16, max_epochs=2)
    config = RunConfig(dataset, cache, ("image", "title"), model=model, train=train)
    loaded = iisan_fast.load_dataset(str(dataset))
    first = Path(run["run"])
    cpu = {"device": torch.device("cpu")}
    iisan_fast.train(str(dataset), cache=str(cache), model=model, train=train, out=str(tmp_path / "sections"), **cpu)
    iisan_fast.train(config, out=tmp_path / "config", **cpu)
    iisan_fast.train(config=first / "config.json", out=tmp_path / "file", **cpu)
    iisan_fast.train(loaded, cache=cache, views=["image", "title"], out=tmp_path / "loaded", **SMALL)
    for name in ("sections", "config", "file", "loaded"):
        assert (tmp_path / name / "config.json").read_text() == (first / "config.json").read_text(), name
        assert untimed(tmp_path / name) == untimed(first), name


def test_flat_settings_change_a_configuration(toy_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[dict] = []
    result = iisan_fast.train(toy_config, epochs=1, seed=7, ks=(3,), device="cpu", on_epoch=lines.append)
    assert result["run"] == f"runs/{Path(toy_config.dataset).name}-1" and "hr@3" in result["test"]["masked"]
    saved = json.loads(Path(result["run"], "config.json").read_text())
    assert saved["train"]["seed"] == 7 and saved["train"]["batch_users"] == 16
    assert [line["epoch"] for line in lines] == [1]


def test_the_other_functions_on_a_run(toy_run, run):
    out = run["run"]
    again = iisan_fast.resume(out, device="cpu")
    assert again == run
    figures = iisan_fast.evaluate(out, split="test", device="cpu")
    assert figures["test"] == run["test"] and figures["popularity"] == run["popularity"]
    more = iisan_fast.evaluate(out, split="validation", ks=(5, 20), evaluation=EvaluationConfig(ties="best"))
    assert {"hr@5", "ndcg@20"} <= more["validation"]["masked"].keys() and more["validation"]["ties"] == "best"
    best = iisan_fast.load(out)
    users, items = len(best.sequences.user_ids), len(best.item_ids)
    assert best.item_vectors.shape == (items, 16) and best.user_states().shape == (users, 16)
    scores = best.user_states("validation") @ best.item_vectors.T
    assert scores.shape == (users, items) and best.config.train.max_epochs == 2


@pytest.mark.slow
def test_extract_then_train_from_python(catalogue, encoder_views, tmp_path):
    image, title = encoder_views
    dataset = iisan_fast.load_dataset(catalogue, min_interactions=5)
    cache = tmp_path / "states"
    results = iisan_fast.extract(
        dataset, cache, image_encoder=image.encoder, text_encoder=Path(title.encoder), text_layers=[0, 3, 6]
    )
    assert [(result.view, result.encoded) for result in results] == [("image", 70), ("title", 70)]
    (other,) = iisan_fast.extract(str(catalogue), str(cache), views=dataclasses.replace(title, name="again"))
    assert other.view == "again"
    result = iisan_fast.train(dataset, cache=cache, views="title", out=tmp_path / "run", **SMALL)
    assert json.loads((tmp_path / "run" / "views.json").read_text())["title"]["layers"] == [0, 3, 6]
    assert 0 <= result["test"]["masked"]["hr@10"] <= 1


@pytest.mark.slow
def test_encoders_that_run_are_named_in_any_form(small_catalogue, encoder_views, tmp_path):
    image, title = encoder_views
    forms = {
        "flat": {"image_encoder": image.encoder, "text_encoder": title.encoder},
        "views": {"views": encoder_views, "uncached": True},
        "section": {"uncached": UncachedConfig(encoder_views)},
    }
    for name, form in forms.items():
        iisan_fast.train(small_catalogue, out=tmp_path / name, dtype="float32", **form, **SMALL)
        assert (tmp_path / name / "config.json").read_text() == (tmp_path / "flat" / "config.json").read_text()


@pytest.mark.slow
def test_the_demo_by_its_settings(tmp_path):
    with pytest.raises(InputError, match="layer_groups: expected 1 to 6"):
        iisan_fast.train(out=tmp_path / "run", model=ModelConfig(layer_groups=9))
    for refused in (
        {"cache": "c"},
        {"text_encoder": "t"},
        {"protocol": ProtocolConfig(split="temporal")},
        {"split": "given"},
    ):
        with pytest.raises(InputError, match="dataset: none given, and the demo takes no cache"):
            iisan_fast.train(out=tmp_path / "run", **refused)
    with pytest.raises(InputError, match="method: expected one of iisan, "):
        iisan_fast.train(out=tmp_path / "run", method="ian")
    assert not (tmp_path / "run").exists()
    result = iisan_fast.train(out=tmp_path / "run", method="id", epochs=1, device="cpu")
    assert result["method"] == "id" and result["epochs"] == 1


MISTAKES = {
    "train: unknown setting epoch; did you mean epochs": {"epoch": 3},
    "train: unknown setting cahce; did you mean cache": {"cahce": "states"},
    "train: unknown setting lr; expected one of dataset, cache": {"lr": 1e-3},
    'batch_users: expected int, found "64"': {"batch_users": "64"},
    "epochs, max_epochs: are one setting": {"epochs": 1, "max_epochs": 2},
    "method: expected one of iisan": {"method": "isan"},
    "model: expected ModelConfig, found 'iisan'": {"model": "iisan"},
    "train: expected TrainConfig, found 20": {"train": 20, "epochs": 3},
    "train.batch_size: unknown setting; did you mean train.batch_users": {"changes": {"train.batch_size": 3}},
    "dropout: unknown setting; did you mean model.dropout?": {"changes": {"dropout": 0.2}},
    "extraction.workers: is no setting of this command": {"changes": {"extraction.workers": 2}},
    "uncached.items_at_once: needs encoders that run": {"changes": {"uncached.items_at_once": 2}},
    "encoders.title.max_tokens: the settings hold no encoders": {"changes": {"encoders.title.max_tokens": 2}},
    "device: expected auto, cpu, cuda or cuda:N, found 'gpu'": {"device": "gpu"},
    "device: expected auto, cpu, cuda or cuda:N, found None": {"device": None},
    "device: this machine has": {"device": "cuda:99"},
    "table: expected one of auto": {"table": "disk"},
    "no view 'video'; it has image, title": {"views": "video"},
    "views: expected names, ViewConfigs or FeaturesConfigs, found 3": {"views": 3},
    "views: expected str, found 3": {"views": [3]},
    "views: expected those that are encoded": {"views": ["x"], "text_encoder": "t", "cache": None},
    "out: expected a path, found 3": {"out": 3},
    "out: expected a path, found ''": {"out": ""},
    "ks: expected list, found 10": {"ks": 10},
    "cache: expected a path, found True": {"cache": True},
    "text_layers: needs text_encoder": {"text_layers": [0, 2]},
    "encoder_options: expected names and values, found 'a'": {"text_encoder": "t", "encoder_options": "a"},
    "dtype: needs encoders that run": {"dtype": "float32"},
    "cache, uncached: expected one of them": {"uncached": UncachedConfig([ViewConfig("t", "title", "e")])},
    "uncached: names its views already": {
        "uncached": UncachedConfig([ViewConfig("t", "title", "e")]),
        "text_encoder": "t",
    },
    "uncached: no encoders to run": {"uncached": True},
    "uncached: expected True, False or an UncachedConfig, found 'yes'": {"uncached": "yes", "text_encoder": "t"},
    "config: expected a path, found 3": {"config": 3},
    "on_epoch: expected a function, found 3": {"on_epoch": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_line(toy_run, tmp_path, message):
    dataset, cache = toy_run
    arguments = {"cache": cache, "out": tmp_path / "run", **MISTAKES[message]}
    with pytest.raises(InputError) as error:
        iisan_fast.train(dataset, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_other_functions_get_one_line(toy_run, toy_config, run, tmp_path):
    dataset, cache = toy_run
    loaded = iisan_fast.load_dataset(dataset)
    text = {"text_encoder": tmp_path}
    for message, call in (
        ("no such folder", lambda: iisan_fast.load_dataset("nowhere")),
        ("folder: expected a path, found None", lambda: iisan_fast.load_dataset(None)),
        ("load_dataset: missing a required argument: 'folder'", lambda: iisan_fast.load_dataset()),
        ("load_dataset: too many positional arguments", lambda: iisan_fast.load_dataset(dataset, None, 3)),
        ("protocol: expected ProtocolConfig, found {}", lambda: iisan_fast.load_dataset(dataset, {})),
        ("evaluation: expected EvaluationConfig", lambda: iisan_fast.evaluate(run["run"], evaluation=5)),
        ("min_interactions: expected 4 to", lambda: iisan_fast.load_dataset(dataset, min_interactions=1)),
        ("unknown setting min_interaction; did", lambda: iisan_fast.load_dataset(dataset, min_interaction=5)),
        ("views: none to encode", lambda: iisan_fast.extract(dataset, tmp_path / "c")),
        (
            "views: expected ViewConfigs, found 'title'",
            lambda: iisan_fast.extract(dataset, tmp_path / "c", views="title"),
        ),
        ("extract: unknown setting text_encodr", lambda: iisan_fast.extract(dataset, tmp_path / "c", text_encodr="t")),
        ("dtype: expected one of", lambda: iisan_fast.extract(dataset, tmp_path / "c", dtype="int8", **text)),
        ("missing_images: expected", lambda: iisan_fast.extract(dataset, tmp_path / "c", missing_images="no", **text)),
        (
            "batch_size: expected at least 1, found 0",
            lambda: iisan_fast.extract(dataset, tmp_path / "c", batch_size=0, **text),
        ),
        ('workers: expected int, found "2"', lambda: iisan_fast.extract(dataset, tmp_path / "c", workers="2", **text)),
        ("attention: expected one", lambda: iisan_fast.extract(dataset, tmp_path / "c", attention="x", **text)),
        ("max_inputs: the loaded dataset", lambda: iisan_fast.extract(loaded, tmp_path / "c", max_inputs=4, **text)),
        ("split: the loaded dataset", lambda: iisan_fast.train(loaded, cache=cache, split="temporal")),
        ("config: the first argument", lambda: iisan_fast.train(toy_config, config=toy_config)),
        ("already holds a run", lambda: iisan_fast.train(dataset, cache=cache, out=run["run"])),
        ("not a run folder", lambda: iisan_fast.resume(tmp_path)),
        ("resume: unknown setting batch_users", lambda: iisan_fast.resume(run["run"], batch_users=3)),
        ("not a run folder", lambda: iisan_fast.load(tmp_path)),
        ("split: expected one of validation, test", lambda: iisan_fast.evaluate(run["run"], "train")),
        ("split: expected one of validation, test", lambda: iisan_fast.load(run["run"]).user_states("train")),
        ("ks: expected one or more cut-offs", lambda: iisan_fast.evaluate(run["run"], ks=[])),
        ("did you mean ks", lambda: iisan_fast.evaluate(run["run"], k=5)),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
