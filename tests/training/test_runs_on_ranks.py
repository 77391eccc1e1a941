"""Whole runs on several ranks: those of one rank, stopped and resumed, also on other numbers of ranks."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.rank_processes import run_on_ranks
from helpers.run_calls import PRECISION, in_float64, resumed, trained, trained_unlike, unshared
from helpers.run_folders import assert_same_run, untimed, write_recorded
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import make_batch
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.models.recommender import build_recommender
from iisan_fast.ranks import ALONE
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.item_sources import open_source

FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}
EPOCHS = 2
STEPS = 5  # of an epoch: 60 users, 13 a batch, 8 in the last


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    train = TrainConfig(batch_users=13, max_epochs=EPOCHS, learning_rates=FAST)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=train)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """Train the run on one rank, and return its folder."""
    run = tmp_path_factory.mktemp("alone") / "run"
    trained(ALONE, config, run)
    return run


def assert_near(run: Path, other: Path) -> None:
    """Assert that two finished runs are the same to 1e-9: losses and figures, weights, Adam's state, item vectors."""
    for line, expected in zip(untimed(run), untimed(other), strict=True):
        assert line.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-9)
        assert line == expected
    assert json.loads((run / "test.json").read_text()) == json.loads((other / "test.json").read_text())
    for name in ("best.safetensors", "last.safetensors"):
        (tensors, state), (expected, expected_state) = (load_checkpoint(folder / name) for folder in (run, other))
        assert tensors.keys() == expected.keys() and state.keys() == expected_state.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


def test_a_run_on_ranks_is_that_of_one(tmp_path, config, alone):
    results = run_on_ranks(2, trained, config, tmp_path / "run")
    assert results[0][0] == results[1][0]
    assert [epochs for _, epochs in results] == [[1, 2], []]  # rank 0 alone reports
    assert_near(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2


KINDS = {
    "options": {"train": {"ema_decay": 0.6, "clip_norm": 0.05, "schedule": "cosine", "warmup_epochs": 0.5}},
    "reversed": {"train": {"reverse": True, "weight_decay": 1.0}},
    "full": {"train": {"loss": "full"}},
    "sampled": {"train": {"loss": "sampled:8"}},
    "gbce": {"train": {"loss": "gbce:8"}},
    "item ids": {"model": {"item_ids": True}},
    "id": {
        "model": {"method": "id", "bottleneck": 64},
        "train": {"learning_rates": {}},
        "whole": {"cache": None, "views": ()},
    },
    "frozen": {"model": {"method": "frozen", "bottleneck": 64}, "train": {"learning_rates": {}}},
    "terms": {"scoring": {"fit_terms": True, "cooccurrence": None, "similarity": None}},
    "neighbours": {"whole": {"model": ModelConfig(method="neighbours"), "train": TrainConfig()}},
    "sharded": {"placement": "sharded"},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_is_that_of_one_rank(tmp_path, config, kind):
    changes = dict(KINDS[kind])
    placement = changes.pop("placement", "auto")
    sections = changes.pop("whole", {})
    sections |= {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    changed = dataclasses.replace(config, **sections)
    expected, _ = trained(ALONE, changed, tmp_path / "alone")
    assert isinstance(expected, dict), expected
    results = run_on_ranks(3, functools.partial(trained, placement=placement), changed, tmp_path / "run")
    assert [figures for figures, _ in results] == [expected] * 3
    if kind != "neighbours":
        assert_near(tmp_path / "run", tmp_path / "alone")
        for results in (
            run_on_ranks(3, trained, changed, tmp_path / "stopped", (2, STEPS + 1)),
            run_on_ranks(2, resumed, tmp_path / "stopped", (0, 3)),
        ):
            assert all("is saved" in message for message, _ in results), results
        assert resumed(ALONE, tmp_path / "stopped")[0] == expected
        assert_near(tmp_path / "stopped", tmp_path / "alone")


def test_a_signal_on_one_rank_stops_all_after_the_same_step_and_one_goes_on(tmp_path, config, alone):
    run = tmp_path / "run"
    results = run_on_ranks(2, trained, config, run, (1, STEPS + 3))
    message = f"{run}: step 3 of epoch 2 is saved; go on with iisan-fast train --resume {run}"
    assert [text for text, _ in results] == [message] * 2
    state = load_checkpoint(run / "last.safetensors")[1]
    assert (state["epoch"], state["under_way"]["steps"]) == (1, 3)
    resumed(ALONE, run)
    assert_near(run, alone)


def test_ranks_with_other_settings_or_histories_are_one_line(tmp_path, config):
    dataset = tmp_path / "dataset"
    shutil.copytree(config.dataset, dataset)
    first, *lines = (dataset / "users.tsv").read_text().splitlines(keepends=True)
    user, items = first.rstrip("\n").split("\t")
    (dataset / "users.tsv").write_text("".join([f"{user}\t{' '.join(reversed(items.split()))}\n", *lines]))
    others = {
        "train.seed is 1 there, 0 here;": dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)),
        'dataset.histories is "': dataclasses.replace(config, dataset=str(dataset)),
    }
    for difference, other in others.items():
        messages = run_on_ranks(2, trained_unlike, [config, other], tmp_path / "run")
        assert messages[0] == messages[1]
        assert messages[0].startswith(f"rank 1 on {socket.gethostname()} differs from rank 0: {difference}")
        there, here = messages[0].partition(" is ")[2].partition(";")[0].split(", ")[:2]
        assert there.removesuffix(" there") != here.removesuffix(" here")
    assert not (tmp_path / "run").exists()


def local(config: RunConfig, **changes) -> RunConfig:
    """Return the settings of one epoch with local negatives."""
    train = dataclasses.replace(config.train, **{"negatives": "local", "max_epochs": 1, **changes})
    return dataclasses.replace(config, train=train)


def test_local_negatives_are_the_average_of_a_step_on_each_ranks_users(tmp_path, config):
    """Two batches of 21 users, and one of 18, for three ranks."""
    one_epoch = local(config, batch_users=21)
    run_on_ranks(3, trained, one_epoch, tmp_path / "run")
    loss, weights = averaged_steps(one_epoch, 3)
    assert untimed(tmp_path / "run")[0]["loss"] == pytest.approx(loss, rel=1e-9)
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(tensors[f"model.{name}"], weight, rtol=1e-7, atol=1e-10, msg=name)


def averaged_steps(config: RunConfig, count: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Train an epoch by batches in `count` parts, whose mean losses are averaged, by autograd and torch's Adam.

    Returns the mean loss of the rows, and the weights.
    """
    dataset = load_dataset(Path(config.dataset), config.protocol)
    sequences = dataset.sequences
    train = config.train
    order = np.random.default_rng((train.seed, 0)).permutation(len(sequences.user_ids))
    total = rows = 0.0
    with in_float64(), open_source(config, dataset, torch.device("cpu"), "auto", PRECISION) as (source, _):
        model = build_recommender(source, config, sequences.popularity, PRECISION).double().train()
        groups = [
            {"params": group, "lr": train.learning_rates[name]} for name, group in model.parameter_groups().items()
        ]
        optimizer = torch.optim.Adam(groups)
        for step, users in enumerate(
            np.array_split(order, np.arange(train.batch_users, len(order), train.batch_users))
        ):
            parts = [make_batch(sequences, part, step) for part in np.array_split(users, count)]
            losses = [model.loss(part, source.read(part.distinct)) for part in parts]
            optimizer.zero_grad()
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            its_rows = sum(len(part.targets) for part in parts)
            total += loss.item() * its_rows
            rows += its_rows
    return total / rows, {name: weight.detach() for name, weight in model.named_parameters()}


def test_local_negatives_of_one_rank_are_the_global_ones(tmp_path, config):
    trained(ALONE, local(config), tmp_path / "local")
    trained(ALONE, local(config, negatives="global"), tmp_path / "global")
    assert_same_run(tmp_path / "local", tmp_path / "global")


def test_a_run_with_local_negatives_goes_on_with_as_many_ranks(tmp_path, config):
    run = tmp_path / "run"
    trained(ALONE, local(config), run, (0, 2))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == 1
    write_recorded(run, "environment.json", {**environment, "ranks": 2})
    assert resumed(ALONE, run)[0] == (
        f"{run}: negatives local: a rank's own users give its negatives, so the run goes on with 2 ranks, as it began; "
        "found 1; start 2"
    )


@pytest.mark.parametrize("loss", ["full", "sampled:8", "gbce"])
def test_a_loss_without_negatives_of_the_batch_has_no_local_ones(loss):
    with pytest.raises(InputError, match=f"negatives: local takes those .*; {loss} takes the same on all ranks"):
        TrainConfig(loss=loss, negatives="local")


def test_a_folder_that_the_machines_do_not_share_is_one_line(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "runs").mkdir(parents=True)
    messages = run_on_ranks(2, unshared, folders)
    expected = (
        f"rank 1 on {socket.gethostname()}: {folders[1] / 'runs'}: the files that rank 0 writes there are not seen"
    )
    assert messages[0] == messages[1] and messages[0][0] == "" and messages[0][1].startswith(expected)
    assert [list((folder / "runs").iterdir()) for folder in folders] == [[], []]
