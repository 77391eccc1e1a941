"""Check runs that go on: for more epochs or patience, and with their data in other places."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.run_folders import assert_same_run
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.errors import InputError, Stopped
from iisan_fast.states.entries import content_digest
from iisan_fast.states.store import Store
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.fused_step import CpuFusedStep
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")
FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    """Return the settings of a run of four epochs, four steps each."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    optimisation = TrainConfig(batch_users=16, max_epochs=4, learning_rates=FAST)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=optimisation)


@pytest.fixture(scope="module")
def four_epochs(config, tmp_path_factory) -> Path:
    """Train four epochs from the beginning."""
    run = tmp_path_factory.mktemp("four") / "run"
    train(config, run, CPU)
    return run


@pytest.fixture(scope="module")
def two_epochs_to_copy(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    train(with_train(config, max_epochs=2), run, CPU)
    return run


@pytest.fixture
def two_epochs(two_epochs_to_copy, tmp_path) -> Path:
    """Return a finished run of two epochs, which the test may change."""
    return shutil.copytree(two_epochs_to_copy, tmp_path / "run")


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def go_on(run: Path, **changes) -> dict:
    return resume(run, CPU, changes=RunChanges(**changes))


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def figures(run: Path) -> dict:
    return json.loads((run / "test.json").read_text())


def test_more_epochs_give_the_results_of_a_run_that_had_them_from_the_beginning(two_epochs, four_epochs):
    result = go_on(two_epochs, max_epochs=4)
    assert result == figures(four_epochs) and result["epochs"] == 4
    assert_same_run(two_epochs, four_epochs)
    assert (two_epochs / "config.json").read_bytes() == (four_epochs / "config.json").read_bytes()


@pytest.mark.parametrize("taken", [3, 6])
def test_a_stop_while_more_epochs_are_trained_keeps_the_old_figures(two_epochs, four_epochs, taken, monkeypatch):
    old = figures(two_epochs)
    take = Trainer.take

    def signalled(self, prepared):
        if prepared.batch.step == 8 + taken:
            signal.raise_signal(signal.SIGTERM)
        return take(self, prepared)

    monkeypatch.setattr(Trainer, "take", signalled)
    with pytest.raises(Stopped):
        go_on(two_epochs, max_epochs=4)
    assert figures(two_epochs) == old and old["epochs"] == 2
    assert RunFolder.open(two_epochs).config.train.max_epochs == 4
    monkeypatch.undo()
    assert go_on(two_epochs) == figures(four_epochs)
    assert_same_run(two_epochs, four_epochs)


@pytest.fixture(scope="module")
def frozen_in_place(config) -> RunConfig:
    """Return the settings of a run that never gets better after its first epoch: nothing is learned."""
    rates = dict.fromkeys(FAST, 0.0)
    return with_train(config, learning_rates=rates, patience=1, max_epochs=9)


def test_more_epochs_do_not_outlast_the_patience(frozen_in_place, tmp_path, caplog):
    early = train(frozen_in_place, tmp_path / "run", CPU)
    assert early["epochs"] == 3
    before = files(tmp_path / "run")
    assert go_on(tmp_path / "run", max_epochs=20) == early
    message = "ended after epoch 3, since more than 1 epochs brought no better validation; to go on, give more patience"
    assert message in caplog.text
    changed = {name for name, content in files(tmp_path / "run").items() if content != before[name]}
    assert changed == {"config.json", "checksums.json"}


def test_more_patience_gives_the_results_of_a_run_that_had_it_from_the_beginning(frozen_in_place, tmp_path):
    train(frozen_in_place, tmp_path / "run", CPU)
    train(with_train(frozen_in_place, patience=3, max_epochs=20), tmp_path / "whole", CPU)
    result = go_on(tmp_path / "run", patience=3, max_epochs=20)
    assert result["epochs"] == 5
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "end"), [({"max_epochs": 1}, "max_epochs 1 and patience 10 a run ends with epoch 1, but epoch 2 is")]
)
def test_fewer_epochs_than_are_done_are_refused(two_epochs, changes, end):
    before = files(two_epochs)
    with pytest.raises(InputError, match=f"run: with {end} done; give more"):
        go_on(two_epochs, **changes)
    assert files(two_epochs) == before


def test_less_patience_than_the_run_needed_is_refused(frozen_in_place, tmp_path):
    train(with_train(frozen_in_place, patience=3), tmp_path / "run", CPU)
    with pytest.raises(InputError, match="patience 0 a run ends with epoch 2, but epoch 5 is done"):
        go_on(tmp_path / "run", patience=0)


@needs_compiler
def test_a_schedule_under_way_keeps_its_epochs(config, tmp_path, monkeypatch):
    factors = []
    original = CpuFusedStep.scale_rates
    monkeypatch.setattr(
        CpuFusedStep, "scale_rates", lambda self, factor: factors.append(factor) or original(self, factor)
    )
    run = tmp_path / "run"
    figures = train(with_train(config, max_epochs=2, schedule="linear", warmup_epochs=0.5), run, CPU)
    assert factors == pytest.approx([1 / 2, 1, *((6 - step) / 6 for step in range(6))], rel=1e-14)
    before = (run / "config.json").read_text()
    for epochs in (1, 3):
        message = f"run: max_epochs: the linear schedule under way .* after 2 epochs, found {epochs}; leave it out"
        with pytest.raises(InputError, match=message):
            resume(run, CPU, changes=RunChanges(max_epochs=epochs))
    assert (run / "config.json").read_text() == before
    assert resume(run, CPU, changes=RunChanges(max_epochs=2, patience=20)) == figures


def test_an_epoch_under_way_is_not_forgotten(config, tmp_path, monkeypatch):
    take = Trainer.take

    def signalled(self, prepared):
        if prepared.batch.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return take(self, prepared)

    monkeypatch.setattr(Trainer, "take", signalled)
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", CPU)
    with pytest.raises(InputError, match="a run ends with epoch 1, but step 3 of epoch 2 is done"):
        go_on(tmp_path / "run", max_epochs=1)


def test_dataset_and_cache_may_have_moved(config, two_epochs, four_epochs, tmp_path):
    places = {
        "dataset": str(shutil.copytree(config.dataset, tmp_path / "dataset")),
        "cache": str(shutil.copytree(config.cache, tmp_path / "cache")),
    }
    saved = json.loads((two_epochs / "config.json").read_text()) | {"dataset": "/gone", "cache": "/gone"}
    (two_epochs / "config.json").write_text(json.dumps(saved))
    assert go_on(two_epochs, **places) == figures(two_epochs)  # of a finished run, the places alone are recorded
    recorded = RunFolder.open(two_epochs).config
    assert {"dataset": recorded.dataset, "cache": recorded.cache} == places
    assert go_on(two_epochs, max_epochs=4) == figures(four_epochs)
    assert_same_run(two_epochs, four_epochs)


def shorter_history(dataset: Path) -> None:
    lines = (dataset / "users.tsv").read_text().splitlines()
    lines[7] = lines[7].rsplit(" ", 1)[0]
    (dataset / "users.tsv").write_text("\n".join(lines) + "\n")


def fewer_users(dataset: Path) -> None:
    lines = (dataset / "users.tsv").read_text().splitlines()
    (dataset / "users.tsv").write_text("\n".join(lines[:-1]) + "\n")


def another_order(dataset: Path) -> None:
    lines = (dataset / "users.tsv").read_text().splitlines()
    (dataset / "users.tsv").write_text("\n".join(reversed(lines)) + "\n")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (shorter_history, "the history of user 'u[0-9]+' has changed"),
        (fewer_users, "60 users there, 59 now"),
        (another_order, "users 1 'u[0-9]+' there, 'u[0-9]+' now"),
    ],
)
def test_another_dataset_is_refused_with_the_difference(config, two_epochs, tmp_path, change, difference):
    dataset = shutil.copytree(config.dataset, tmp_path / "dataset")
    change(dataset)
    before = files(two_epochs)
    with pytest.raises(InputError, match=f"dataset: not the dataset that the run was trained on: {difference}"):
        go_on(two_epochs, dataset=str(dataset), max_epochs=4)
    assert files(two_epochs) == before


def test_another_cache_is_refused_with_the_difference(config, two_epochs, tmp_path):
    cache = shutil.copytree(config.cache, tmp_path / "cache")
    with Store(cache, writable=True) as store:
        store.write("image", ["i7"], [content_digest(b"another title")], torch.zeros(1, 2, 16))
    before = files(two_epochs)
    with pytest.raises(InputError, match="view 'image' has changed since the run began: contents .* there, .* now"):
        go_on(two_epochs, cache=str(cache), max_epochs=4)
    assert files(two_epochs) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": "bert"}, "text_encoder: no encoder runs in this run; give the place of the cache"),
        ({"image_encoder": "vit"}, "image_encoder: no encoder runs in this run"),
        ({"cache": "/nowhere"}, "/nowhere"),
        ({"dataset": "/nowhere"}, "/nowhere"),
        ({"checkpoint_every": "often"}, "checkpoint_every: expected a number of steps"),
        ({"max_epochs": 0}, "max_epochs: expected 1 to"),
    ],
)
def test_changes_that_cannot_be_made_write_nothing(two_epochs, changes, message):
    before = files(two_epochs)
    with pytest.raises(InputError, match=message):
        go_on(two_epochs, **changes)
    assert files(two_epochs) == before


def test_a_run_by_ids_reads_no_cache(toy_run, tmp_path):
    config = RunConfig(str(toy_run[0]), model=ModelConfig("id", embedding_dim=16), train=TrainConfig(max_epochs=1))
    train(config, tmp_path / "run", CPU)
    with pytest.raises(InputError, match="cache: the run reads none; leave it out"):
        go_on(tmp_path / "run", cache=str(toy_run[1]))


def test_figures_without_their_epochs_are_made_again(two_epochs):
    expected = figures(two_epochs)
    (two_epochs / "checksums.json").unlink()  # as in a run of an older version
    (two_epochs / "test.json").write_text("{}")
    assert go_on(two_epochs) == expected == figures(two_epochs)


def test_a_finished_run_without_its_last_checkpoint_says_its_figures_and_does_not_go_on(two_epochs):
    for name in ("last.safetensors", "previous.safetensors"):
        (two_epochs / name).unlink()
    assert go_on(two_epochs) == figures(two_epochs)
    with pytest.raises(InputError, match=r"last\.safetensors: no such checkpoint"):
        go_on(two_epochs, max_epochs=4)


def test_a_best_checkpoint_of_another_epoch_is_refused(two_epochs, four_epochs):
    epoch = load_checkpoint(two_epochs / "best.safetensors")[1]["epoch"]
    assert load_checkpoint(four_epochs / "best.safetensors")[1]["epoch"] != epoch
    shutil.copy(four_epochs / "best.safetensors", two_epochs)
    (two_epochs / "test.json").unlink()
    with pytest.raises(InputError, match=f"best.safetensors: expected the best epoch, {epoch}, found epoch"):
        go_on(two_epochs)
