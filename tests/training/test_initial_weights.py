"""Check runs that begin with the weights of another run: they are taken by name and item id, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import iisan_fast
from helpers.command_line import iisan_fast as command
from helpers.datasets import histories_in_steps, make_sequences, write_dataset_folder
from helpers.run_folders import assert_same_run, flip_bit, untimed
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, ProtocolConfig, RunConfig, ScoringConfig, TrainConfig, UncachedConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.precision import resolve_precision
from iisan_fast.training.checkpoints import load_checkpoint, named_weights
from iisan_fast.training.initial_weights import read_initial_weights
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer
from iisan_fast.training.training_loop import TrainingLoop

CPU = torch.device("cpu")
FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2, "item_embeddings": 1e-2}
MORE_ITEMS = 50
VIEWS = ("image", "title")


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    """Return the settings of two epochs, four steps each, with vectors of item ids."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8, item_ids=True)
    optimisation = TrainConfig(batch_users=16, max_epochs=2, learning_rates=FAST)
    return RunConfig(str(dataset), str(cache), VIEWS, model=model, train=optimisation)


@pytest.fixture(scope="module")
def first(config, tmp_path_factory) -> Path:
    """Train the run with whose weights the others begin. No test may change it."""
    run = tmp_path_factory.mktemp("first") / "run"
    train(config, run, CPU)
    return run


@pytest.fixture(scope="module")
def id_run(config, tmp_path_factory) -> Path:
    """Train a run of the method id."""
    run = tmp_path_factory.mktemp("id") / "run"
    train(of_method_id(config), run, CPU)
    return run


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[Path, Path]:
    """Return a dataset and a cache with more items and users, the items in another order and with other states."""
    root = tmp_path_factory.mktemp("grown")
    sequences = make_sequences(histories_in_steps(80, MORE_ITEMS), items=MORE_ITEMS)
    dataset = write_dataset_folder(root / "toy", sequences)
    lines = (dataset / "items.tsv").read_text().splitlines(keepends=True)
    (dataset / "items.tsv").write_text("".join(reversed(lines)))
    table = random_table([(2, 16), (2, 16)], MORE_ITEMS, torch.float32)
    return dataset, fill_store(root / "cache", sequences.item_ids, table, VIEWS)


def of_method_id(config: RunConfig) -> RunConfig:
    optimisation = TrainConfig(batch_users=16, max_epochs=2)
    return dataclasses.replace(
        config, cache=None, views=(), model=ModelConfig("id", embedding_dim=16), train=optimisation
    )


def beginning_with(run: Path, config: RunConfig, **changes) -> RunConfig:
    optimisation = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, init=str(run), train=optimisation)


def on_grown(config: RunConfig, grown: tuple[Path, Path]) -> RunConfig:
    dataset, cache = grown
    return dataclasses.replace(config, dataset=str(dataset), cache=None if config.cache is None else str(cache))


def weights_before_the_first_step(config: RunConfig) -> tuple[dict[str, torch.Tensor], list[str], list[int]]:
    """Return the weights of a trainer of the configuration, the item ids, and how often each occurs in training."""
    dataset = load_dataset(Path(config.dataset), config.protocol)
    precision = resolve_precision(config, CPU)
    with open_source(config, dataset, CPU, "auto", precision) as (source, _):
        trainer = Trainer(config, dataset.sequences, source, CPU, precision, read_initial_weights(config))
        weights = {name: weight.detach().clone() for name, weight in named_weights(trainer.model).items()}
    return weights, dataset.sequences.item_ids, dataset.sequences.training_counts.tolist()


def vectors_by_id(vectors: torch.Tensor, item_ids: list[str], counts: list[int]) -> dict[str, torch.Tensor]:
    """Return the trained vector of each item that occurs in training: from row 1, in the order of the items."""
    trained = [item_id for number, item_id in enumerate(item_ids, start=1) if counts[number]]
    assert len(vectors) == len(trained) + 1
    return dict(zip(trained, vectors[1:]))


def best_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "best.safetensors")[0]


def test_on_the_same_data_all_weights_are_those_of_the_best_checkpoint(config, first):
    weights, _, _ = weights_before_the_first_step(beginning_with(first, config, seed=3))
    expected = {name: tensor for name, tensor in best_tensors(first).items() if name.startswith("model.")}
    assert weights.keys() == expected.keys() and weights["model.item_ids.weight"].any()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    random_weights, _, _ = weights_before_the_first_step(config)
    assert not torch.equal(
        random_weights["model.sequence_encoder.position"], expected["model.sequence_encoder.position"]
    )


def test_vectors_of_items_are_taken_by_id_and_new_items_begin_as_in_a_new_run(config, first, grown):
    weights, item_ids, counts = weights_before_the_first_step(beginning_with(first, on_grown(config, grown)))
    now = vectors_by_id(weights["model.item_ids.weight"], item_ids, counts)
    _, ids_before, counts_before = weights_before_the_first_step(config)
    tensors = best_tensors(first)
    before = vectors_by_id(tensors["model.item_ids.weight"], ids_before, counts_before)
    assert len(now) > len(before) and [*now][: len(before)] != [*before]
    for item_id, vector in now.items():
        expected = before.get(item_id, torch.zeros(16))
        assert torch.equal(vector, expected), item_id
    for name in weights.keys() - {"model.item_ids.weight"}:
        assert torch.equal(weights[name], tensors[name]), name


def test_the_embedding_of_the_method_id_is_taken_by_id(config, id_run, grown):
    new = on_grown(of_method_id(config), grown)
    weights, item_ids, _ = weights_before_the_first_step(beginning_with(id_run, new))
    random_weights, _, _ = weights_before_the_first_step(new)
    name = "model.item_encoder.embedding.weight"
    _, ids_before, _ = weights_before_the_first_step(of_method_id(config))
    before = dict(zip(ids_before, best_tensors(id_run)[name][1:]))
    for number, item_id in enumerate(item_ids, start=1):
        assert torch.equal(weights[name][number], before.get(item_id, random_weights[name][number])), item_id
    assert {*item_ids} - before.keys() and before.keys() <= {*item_ids}


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
@pytest.mark.parametrize("item_ids", [True, False])
def test_without_learning_the_validation_is_that_of_the_trained_run(config, first, tmp_path, item_ids, ema_decay):
    """Averages of weights begin with the weights that are taken, too; without item ids the steps are fused."""
    trained, chosen = (first, config) if item_ids else (tmp_path / "first", with_model(config, item_ids=False))
    if not item_ids:
        train(chosen, trained, CPU)
    still = dict.fromkeys(chosen.train.learning_rates, 0.0)
    train(
        beginning_with(trained, chosen, learning_rates=still, max_epochs=1, ema_decay=ema_decay), tmp_path / "run", CPU
    )
    (line,) = untimed(tmp_path / "run")
    best = [line for line in untimed(trained) if line["best"]][-1]
    assert line["validation"] == best["validation"]


def test_the_first_epoch_goes_on_where_the_other_run_ended(config, first, tmp_path):
    results = []
    for name in ("run", "again"):
        results.append(train(beginning_with(first, config, max_epochs=1), tmp_path / name, CPU))
    assert_same_run(tmp_path / "run", tmp_path / "again")
    (line,) = untimed(tmp_path / "run")
    assert line["loss"] < untimed(first)[0]["loss"] and results[0] == results[1]
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["init"] == str(first)


def test_more_users_and_items_are_trained_and_tested(config, first, grown, tmp_path):
    result = train(beginning_with(first, on_grown(config, grown), max_epochs=1), tmp_path / "run", CPU)
    best = iisan_fast.load(tmp_path / "run", device="cpu")
    assert len(best.item_ids) == MORE_ITEMS == len(best.item_vectors) and result["epochs"] == 1


class Killed(Exception):
    """The process ends before the first checkpoint."""


@pytest.fixture
def begun(config, first, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Return a copy of the first run, and a run that was killed after it began with the copy's weights."""

    def killed(*_):
        raise Killed

    initial = shutil.copytree(first, tmp_path / "initial")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "run", killed)
        with pytest.raises(Killed):
            train(beginning_with(initial, config), tmp_path / "run", CPU)
    return initial, tmp_path / "run"


def test_a_run_that_was_killed_at_its_beginning_begins_again_with_the_same_weights(config, begun, tmp_path):
    initial, run = begun
    resume(run, CPU)
    train(beginning_with(initial, config), tmp_path / "whole", CPU)
    assert_same_run(run, tmp_path / "whole")
    shutil.rmtree(initial)  # nobody needs it once there is a checkpoint
    assert resume(run, CPU, changes=RunChanges(max_epochs=3))["epochs"] == 3


@pytest.mark.parametrize("damage", ["other", "gone"])
def test_a_run_that_was_killed_at_its_beginning_refuses_other_weights(begun, id_run, damage):
    initial, run = begun
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    if damage == "gone":
        (initial / "best.safetensors").unlink()
        expected = "init: .*initial: no best checkpoint"
    else:
        shutil.copy(id_run / "best.safetensors", initial)
        expected = "best.safetensors is not the checkpoint with which this run began, and there is no later one"
    with pytest.raises(InputError, match=expected):
        resume(run, CPU)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_place_of_the_other_run_may_change_in_config_json(begun, tmp_path):
    initial, run = begun
    initial.rename(tmp_path / "moved")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"init": str(tmp_path / "moved")}))
    assert resume(run, CPU)["epochs"] == 2


def with_model(config: RunConfig, **changes) -> RunConfig:
    model = dataclasses.replace(config.model, **changes)
    return dataclasses.replace(config, model=model, train=TrainConfig(batch_users=16, max_epochs=1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: with_model(config, bottleneck=4), "model.bottleneck: 8 there, 4 here; give the same"),
        (lambda config: with_model(config, method="frozen", bottleneck=64), 'model.method: "iisan" there, "frozen"'),
        (lambda config: with_model(config, item_ids=False), "model.item_ids: true there, false here"),
        (
            lambda config: dataclasses.replace(config, protocol=ProtocolConfig(max_inputs=9)),
            "protocol.max_inputs: 10 there, 9 here",
        ),
        (lambda config: dataclasses.replace(config, views=VIEWS[::-1]), "views: image, title there, title, image here"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(config, first, tmp_path, change, expected):
    with pytest.raises(InputError) as error:
        train(change(beginning_with(first, dataclasses.replace(config))), tmp_path / "run", CPU)
    assert str(error.value).startswith(f"init: {first}: ") and expected in str(error.value)
    assert not (tmp_path / "run").exists()


def test_other_encoders_are_refused(config, first, grown, tmp_path):
    dataset, _ = grown
    item_ids = [f"i{number}" for number in range(1, MORE_ITEMS + 1)]
    table = random_table([(2, 16), (2, 16)], MORE_ITEMS, torch.float32)
    other = fill_store(tmp_path / "cache", item_ids, table, VIEWS, pooling="mean")
    with pytest.raises(
        InputError, match="init: .*view 'image': pooling null there, \"mean\" now; encode as for that run"
    ):
        train(beginning_with(first, on_grown(config, (dataset, other))), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("gone", "no best checkpoint; choose a run with a finished epoch"),
        ("flipped", "best.safetensors: damaged: tensor"),
        ("format", "format"),
        ("no run", "not a run folder"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused_before_anything_is_written(config, first, tmp_path, damage, expected):
    initial = shutil.copytree(first, tmp_path / "initial")
    if damage == "gone":
        (initial / "best.safetensors").unlink()
    elif damage == "flipped":
        flip_bit(initial / "best.safetensors", (initial / "best.safetensors").stat().st_size - 10)
    elif damage == "format":
        settings = json.loads((initial / "config.json").read_text())
        (initial / "config.json").write_text(json.dumps(settings | {"format": 99}))
    else:
        shutil.rmtree(initial)
    with pytest.raises(InputError) as error:
        train(beginning_with(initial, config), tmp_path / "run", CPU)
    assert str(error.value).startswith("init: ") and expected in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_run_without_training_neither_begins_with_weights_nor_gives_some(config, first, tmp_path):
    with pytest.raises(InputError, match="init: neighbours trains nothing"):
        RunConfig(config.dataset, model=ModelConfig("neighbours"), init=str(first))
    untrained = RunConfig(config.dataset, model=ModelConfig("neighbours"), scoring=ScoringConfig())
    train(untrained, tmp_path / "neighbours", CPU)
    with pytest.raises(InputError, match='init: .*model.method: "neighbours" there, "iisan" here'):
        train(beginning_with(tmp_path / "neighbours", config), tmp_path / "run", CPU)


def test_the_setting_has_all_its_forms(config, first, tmp_path, monkeypatch):
    monkeypatch.chdir(first.parent)
    small = {"embedding_dim": 16, "bottleneck": 8, "item_ids": True, "device": "cpu", "dry_run": True}
    places = {"cache": config.cache, "out": tmp_path / "run"}
    expected = {"run": str(first), "best_epoch": load_checkpoint(first / "best.safetensors")[1]["epoch"]}
    for form in ({"init": "run"}, {"config": {"init": str(first)}}, {"changes": {"init": "run"}}):
        plan = iisan_fast.train(config.dataset, **places, **small, **form)
        assert plan["init"] == expected and plan["config"]["init"] == str(first) and str(first) in plan["files"]["read"]
    assert iisan_fast.train(config.dataset, **places, **small)["init"] is None
    options = ("--cache", config.cache, "--embedding-dim", 16, "--bottleneck", 8, "--item-ids", "--device", "cpu")
    result = command("train", config.dataset, *options, "--init", "run", "--dry-run", "--out", tmp_path / "run")
    assert (
        result.returncode == 0
        and "begins with" in result.stdout
        and "epoch 2" in " ".join(result.stdout.replace("│", " ").split())
    )
    with pytest.raises(InputError, match="the demo takes no cache, views, encoders, init"):
        iisan_fast.train(init="run", dry_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_what_is_trained_of_encoders_is_taken(small_catalogue, encoder_views, tmp_path):
    """Adapters that were trained in encoders begin with the trained weights; frozen weights come from the encoders."""
    model = ModelConfig("adapter", embedding_dim=16, bottleneck=8)
    optimisation = TrainConfig(batch_users=16, max_epochs=1)
    uncached = UncachedConfig(tuple(encoder_views))
    config = RunConfig(str(small_catalogue), uncached=uncached, model=model, train=optimisation)
    train(config, tmp_path / "first", CPU)
    tensors = best_tensors(tmp_path / "first")
    weights, _, _ = weights_before_the_first_step(beginning_with(tmp_path / "first", config, seed=3))
    adapters = [name for name in weights if name.startswith("model.item_encoder.models.")]
    assert adapters and all(torch.equal(weights[name], tensors[name]) for name in weights)
    random_weights, _, _ = weights_before_the_first_step(config)
    assert not all(torch.equal(random_weights[name], tensors[name]) for name in adapters)
