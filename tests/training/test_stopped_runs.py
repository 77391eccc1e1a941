"""Check runs that are stopped by signals or killed within an epoch: they go on to the same results, bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.run_folders import assert_same_run
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig
from iisan_fast.errors import InputError, Stopped
from iisan_fast.kernels import FORM_VARIABLE
from iisan_fast.training import checkpoints
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer
from iisan_fast.training.training_loop import TrainingLoop
from iisan_fast.training.training_step import CapturedStep

CPU = torch.device("cpu")
STEPS = 10  # of an epoch: 60 users, 6 a batch
EPOCHS = 3
FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}


def of_the_long_tests(*values) -> object:
    """Return the values of a parametrized test that only the long tests run."""
    return pytest.param(*values, marks=pytest.mark.long)


class Killed(BaseException):
    """Stands in for a process that is killed."""


@pytest.fixture(scope="module")
def config(toy_run) -> RunConfig:
    """Return the settings of a run of three epochs, ten steps each."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    optimisation = TrainConfig(batch_users=6, max_epochs=EPOCHS, learning_rates=FAST)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=optimisation)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[Path, dict]:
    """Train the run without a stop; return its folder and its figures."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, train(config, run, CPU)


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def by_ids(config: RunConfig) -> RunConfig:
    """Return the configuration of a run by item numbers."""
    model = dataclasses.replace(config.model, method="id", bottleneck=64)
    train_config = dataclasses.replace(config.train, learning_rates={})
    return dataclasses.replace(config, cache=None, views=(), model=model, train=train_config)


def at_call(monkeypatch, target: type, name: str, number: int, action: Callable[[], None]) -> None:
    """Do something before the call of this number, counted from 1, of a method."""
    original = getattr(target, name)
    calls = itertools.count(1)

    def acting(*arguments, **keywords):
        if next(calls) == number:
            action()
        return original(*arguments, **keywords)

    monkeypatch.setattr(target, name, acting)


def send(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def kill() -> None:
    raise Killed


def goes_on_to(whole: tuple[Path, dict], run: Path, **changes) -> None:
    """Resume a run, and assert that its results are those of the whole one."""
    folder, figures = whole
    assert resume(run, CPU, changes=RunChanges(**changes)) == figures
    assert_same_run(run, folder)


def state_of(run: Path) -> tuple[int, int]:
    """Return the finished epochs, and the steps of the epoch under way, of the last checkpoint."""
    state = load_checkpoint(run / "last.safetensors")[1]
    return state["epoch"], state["under_way"]["steps"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_under_way_and_the_run_goes_on_exactly(tmp_path, config, whole, number, monkeypatch):
    at_call(monkeypatch, Trainer, "take", STEPS + 4, send(number))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        train(config, tmp_path / "run", CPU)
    assert signal.getsignal(number) == before and stop.value.signal_number == number
    run = tmp_path / "run"
    assert str(stop.value) == f"{run}: step 4 of epoch 2 is saved; go on with iisan-fast train --resume {run}"
    assert state_of(run) == (1, 4) and not (run / "test.json").exists()
    monkeypatch.undo()
    goes_on_to(whole, run)


@pytest.fixture(params=["fused", "autograd", of_the_long_tests("captured"), "ids"])
def form(request, config, monkeypatch) -> RunConfig:
    """Choose the form of the step, and return the run's configuration."""
    if request.param == "autograd":
        monkeypatch.setenv(FORM_VARIABLE, "reference")
    if request.param == "captured":
        original = Trainer.__init__

        def captured(self, *arguments) -> None:
            original(self, *arguments)
            self.step_by_autograd(captured=False)
            self.captured = CapturedStep(self.step, capture=lambda run: run)

        monkeypatch.setattr(Trainer, "__init__", captured)
    return by_ids(config) if request.param == "ids" else config


def test_every_form_of_the_step_goes_on_exactly(tmp_path, form):
    form = with_train(form, max_epochs=2)
    figures = train(form, tmp_path / "whole", CPU)
    assert train_with_stops(form, tmp_path / "run", (1, 10, 13)) == figures
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_every_option_of_the_update_goes_on_exactly(tmp_path, form):
    """Runs with a warm-up that ends, and stops, within an epoch."""
    form = with_train(form, max_epochs=2, weight_decay=1.0, schedule="cosine", warmup_epochs=0.25)
    form = with_train(form, clip_norm=0.05, ema_decay=0.6)
    figures = train(form, tmp_path / "whole", CPU)
    assert train_with_stops(form, tmp_path / "run", (2, 10, 13)) == figures
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_averaged_weights_are_validated_and_kept_and_change_no_training(tmp_path, config, monkeypatch):
    """A signal in the validation saves the trained weights; a lost best checkpoint is made again with averages."""
    one_epoch = with_train(config, max_epochs=1)
    train(one_epoch, tmp_path / "plain", CPU)
    averaged = with_train(one_epoch, ema_decay=0.6)
    run = tmp_path / "run"
    figures = train(averaged, run, CPU)
    plain, last, best = (
        load_checkpoint(tmp_path / name)[0]
        for name in ("plain/last.safetensors", "run/last.safetensors", "run/best.safetensors")
    )
    assert plain.keys() < last.keys() and all(torch.equal(last[name], tensor) for name, tensor in plain.items())
    averages = {name: tensor for name, tensor in last.items() if name not in plain}
    for name, tensor in averages.items():
        in_model = name.replace("average.", "model.")
        assert torch.equal(best[in_model], tensor) and not torch.equal(plain[in_model], tensor)
    assert len(averages) == sum(name.startswith("model.") for name in plain)
    at_call(monkeypatch, TrainingLoop, "_user_states", 1, send())
    with pytest.raises(Stopped):
        train(averaged, tmp_path / "stopped", CPU)
    monkeypatch.undo()
    goes_on_to((run, figures), tmp_path / "stopped")
    (run / "best.safetensors").unlink()  # the tensors above are views of the file
    at_call(monkeypatch, Trainer, "take", 1, kill)
    with pytest.raises(Killed):
        resume(run, CPU, changes=RunChanges(max_epochs=2))
    again, _ = load_checkpoint(run / "best.safetensors")
    assert again.keys() == best.keys() and all(torch.equal(again[name], tensor) for name, tensor in best.items())


def test_averages_of_another_run_are_refused(tmp_path, config):
    run = tmp_path / "run"
    train(with_train(config, max_epochs=1), run, CPU)
    tensors, state = load_checkpoint(run / "last.safetensors")
    position = tensors["model.sequence_encoder.position"].clone()
    tensors["average.sequence_encoder.position"] = position
    checkpoints.save_checkpoint(run / "last.safetensors", tensors, state)
    message = r"the averaged weights of another model \(average.sequence_encoder.position: expected nothing"
    with pytest.raises(InputError, match=message):
        resume(run, CPU, changes=RunChanges(max_epochs=2))


def train_with_stops(config: RunConfig, run: Path, stops: tuple[int, ...], **options) -> dict:
    """Train a run that is stopped in these steps, counted from its beginning, and return its figures."""
    taken = 0
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, Trainer, "take", stop - taken, send())
            with pytest.raises(Stopped):
                resume(run, CPU, **options) if taken else train(config, run, CPU, **options)
        taken = stop
        assert state_of(run) == divmod(stop, STEPS) or (stop % STEPS == 0 and state_of(run)[1] == STEPS)
    return resume(run, CPU, **options)


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(tmp_path, config, whole, monkeypatch):
    at_call(monkeypatch, Trainer, "take", STEPS + 9, kill)
    with pytest.raises(Killed):
        train(with_train(config, checkpoint_every=3), tmp_path / "run", CPU)
    assert state_of(tmp_path / "run") == (1, 6)
    monkeypatch.undo()
    goes_on_to(whole, tmp_path / "run", checkpoint_every="2h")
    assert RunFolder.open(tmp_path / "run").config.train.checkpoint_every == "2h"


def test_checkpoints_within_an_epoch_come_after_their_steps_or_time(tmp_path, config, monkeypatch):
    from iisan_fast import intervals

    places = []
    save = RunFolder.save_last

    def noted(self, tensors, state) -> None:
        places.append((state["epoch"], state["under_way"]["steps"]))
        save(self, tensors, state)

    monkeypatch.setattr(RunFolder, "save_last", noted)
    config = with_train(config, max_epochs=1)
    looks = itertools.count(step=4)  # four seconds between two looks at the clock, one a step
    monkeypatch.setattr(intervals.time, "monotonic", lambda: next(looks))
    for every, expected in ((4, [4, 8]), (None, []), ("10s", [3, 6, 9])):
        train(with_train(config, checkpoint_every=every), tmp_path / f"run-{every}", CPU)
        assert places == [*((0, step) for step in expected), (1, 0)], every
        places.clear()


def test_a_run_stopped_in_validation_does_it_again(tmp_path, config, whole, monkeypatch):
    at_call(monkeypatch, TrainingLoop, "_user_states", 2, send(signal.SIGINT))
    with pytest.raises(Stopped, match="step 10 of epoch 2 is saved") as stop:
        train(config, tmp_path / "run", CPU)
    assert stop.value.signal_number == signal.SIGINT and state_of(tmp_path / "run") == (1, STEPS)
    monkeypatch.undo()
    goes_on_to(whole, tmp_path / "run")


def test_a_run_stopped_in_its_test_does_it_again(tmp_path, config, whole, monkeypatch):
    at_call(monkeypatch, TrainingLoop, "_user_states", EPOCHS + 1, send())
    with pytest.raises(Stopped, match="epoch 3 is saved"):
        train(config, tmp_path / "run", CPU)
    assert not (tmp_path / "run" / "test.json").exists()
    monkeypatch.undo()
    goes_on_to(whole, tmp_path / "run")


@pytest.mark.parametrize("name", [of_the_long_tests("save_best"), "save_last", of_the_long_tests("write_metrics")])
def test_a_file_under_way_is_finished_before_a_run_stops(tmp_path, config, whole, name, monkeypatch):
    at_call(monkeypatch, RunFolder, name, 1, send())
    with pytest.raises(Stopped, match="epoch 1 is saved"):
        train(config, tmp_path / "run", CPU)
    assert state_of(tmp_path / "run") == (1, 0) and (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    goes_on_to(whole, tmp_path / "run")


def test_a_signal_before_the_first_step_leaves_a_run_that_begins_again(tmp_path, config, whole, monkeypatch):
    begin = TrainingLoop._epoch

    def signalled(self) -> None:
        self._stop._request.signal_number = signal.SIGTERM
        raise self._stopped()

    monkeypatch.setattr(TrainingLoop, "_epoch", signalled)
    with pytest.raises(Stopped, match="there was nothing to save yet; go on with iisan-fast train --resume"):
        train(config, tmp_path / "run", CPU)
    monkeypatch.setattr(TrainingLoop, "_epoch", begin)
    goes_on_to(whole, tmp_path / "run")


def test_a_signal_after_the_last_file_reaches_the_caller(tmp_path, config, monkeypatch):
    at_call(monkeypatch, RunFolder, "write_test", 1, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(with_train(config, max_epochs=1), tmp_path / "run", CPU)
    assert (tmp_path / "run" / "test.json").exists()


def full_disk(monkeypatch, at: int) -> None:
    """Let the write of this number fail for lack of space."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.safetensors")

    at_call(monkeypatch, checkpoints.safetensors.torch, "save_file", at, fail)


@pytest.mark.parametrize(
    ("write", "kept"),
    [
        of_the_long_tests(1, "stopped in epoch 1: .*; there is no checkpoint yet"),
        (2, "stopped in epoch 1: .*; the checkpoint of step 4 of epoch 1 is kept"),
        of_the_long_tests(5, "stopped in epoch 2: .*; the checkpoint of epoch 1 is kept"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    tmp_path, config, whole, write, kept, monkeypatch
):
    full_disk(monkeypatch, write)  # of steps 4 and 8, the best and the last of epoch 1, then step 4 of epoch 2
    with pytest.raises(InputError, match=f"run: {kept}") as error:
        train(with_train(config, checkpoint_every=4), tmp_path / "run", CPU)
    assert "last.safetensors: No space left on device" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    goes_on_to(whole, tmp_path / "run")


def test_memory_refused_within_an_epoch_names_the_step_that_is_kept(tmp_path, config, monkeypatch):
    def refuse() -> None:
        raise MemoryError("refused")

    at_call(monkeypatch, TrainingLoop, "_read", 1, refuse)  # after step 10
    message = "stopped in epoch 1: not enough memory on cpu .*; the checkpoint of step 7 of epoch 1 is kept"
    with pytest.raises(InputError, match=message):
        train(with_train(config, checkpoint_every=7), tmp_path / "run", CPU)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, config, monkeypatch):
    original = Trainer.take

    def poisoned(self, prepared):
        if prepared.batch.step == 5:
            with torch.no_grad():
                self.model.item_encoder.heads.fusion.bias.fill_(float("nan"))
        return original(self, prepared)

    monkeypatch.setattr(Trainer, "take", poisoned)
    message = "stopped in epoch 1: step 6: the loss is nan; .*; the checkpoint of step 4 of epoch 1 is kept"
    with pytest.raises(InputError, match=message):
        train(with_train(config, checkpoint_every=2), tmp_path / "run", CPU)
    tensors, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert state_of(tmp_path / "run") == (0, 4) and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_damaged_checkpoint_within_an_epoch_is_replaced_by_the_one_before(
    tmp_path, config, whole, monkeypatch, caplog
):
    at_call(monkeypatch, Trainer, "take", STEPS + 9, send())
    with pytest.raises(Stopped):
        train(with_train(config, checkpoint_every=3), tmp_path / "run", CPU)
    monkeypatch.undo()
    last = tmp_path / "run" / "last.safetensors"
    content = bytearray(last.read_bytes())
    content[-9] ^= 1
    last.write_bytes(content)
    goes_on_to(whole, tmp_path / "run")
    assert "the run goes on from the checkpoint before it" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_runs_stopped_at_random_steps_go_on_exactly(tmp_path, form, seed):
    whole = train(form, tmp_path / "whole", CPU)
    chance = random.Random(seed)
    for trial in range(7):
        stops = tuple(sorted(chance.sample(range(1, EPOCHS * STEPS), chance.randint(1, 4))))
        assert train_with_stops(form, tmp_path / f"run-{trial}", stops) == whole
        assert_same_run(tmp_path / f"run-{trial}", tmp_path / "whole")
