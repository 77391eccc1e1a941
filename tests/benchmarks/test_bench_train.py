"""The training and growth benchmarks: what they report, what they refuse, and that the dense reference is one."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks import captures, growth, train
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.phase_profile import PHASES, profile
from iisan_fast.benchmarks.settings import GrowthSettings, TrainSettings
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.benchmarks.train import FORMS
from iisan_fast.cli import main
from iisan_fast.data import RunPlan, epoch_batches
from iisan_fast.errors import InputError
from iisan_fast.precision import resolve_precision
from iisan_fast.states import FeatureTable
from iisan_fast.training import Trainer
from iisan_fast.training.training_step import TrainingStep

CPU = torch.device("cpu")
SMALL = TrainSettings(users=8, width=16, layers=2, followed=4, rounds=2, steps=2, epochs=False)


@pytest.fixture
def sequences():
    return make_sequences([[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(24)], items=40)


@pytest.fixture
def dataset(tmp_path, sequences):
    return write_dataset_folder(tmp_path / "toy", sequences)


def test_every_form_follows_the_dense_reference(sequences):
    forms = {name: form for name, form in FORMS.items() if not form.needs_cuda}
    rows = train.side_by_side(forms, sequences, SMALL, CPU)
    assert list(rows) == ["dense", "reference ops", "float32"]
    assert rows["dense"]["largest_loss_difference"] == 0 and rows["dense"]["ratio"] == 1
    assert all(row["launches"] == NOT_MEASURED for row in rows.values())
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows.values())
    assert rows["float32"]["largest_loss_difference"] < 1e-5


def drift_by(share: float, monkeypatch) -> dict[str, train.TrainingForm]:
    """Return three forms, the losses of the third, float32, off by a share."""
    follow = train.follow
    followed = []

    def drifting(step, count):
        followed.append(step)
        losses = follow(step, count)
        return [*losses[:-1], losses[-1] * (1 + share)] if len(followed) == 3 else losses

    monkeypatch.setattr(train, "follow", drifting)
    return {name: FORMS[name] for name in ("dense", "reference ops", "float32")}


@pytest.mark.parametrize("share", [2e-3, float("nan")])
def test_a_form_that_leaves_the_reference_is_an_error(share, sequences, monkeypatch):
    forms = drift_by(share, monkeypatch)
    message = f"form 'float32': its losses leave the dense reference's by {share:.1e}, expected at most 1e-03"
    with pytest.raises(InputError, match=message):
        train.side_by_side(forms, sequences, SMALL, CPU)


def test_a_form_a_little_off_is_reported_and_remarked_on(sequences, monkeypatch):
    rows = train.side_by_side(drift_by(2e-4, monkeypatch), sequences, SMALL, CPU)
    assert rows["float32"]["largest_loss_difference"] == pytest.approx(2e-4, rel=0.01)
    assert "by 2.0e-04, more than 1e-04" in rows["float32"]["remark"]
    assert "remark" not in rows["reference ops"] and rows["reference ops"]["largest_loss_difference"] < 1e-5


def test_losses_fall_and_differ_between_steps(sequences):
    step = train.start(FORMS["float32"], sequences, train.random_states(sequences, SMALL), SMALL, CPU).step
    losses = train.follow(step, 60)
    assert len(set(losses)) == 60 and sum(losses[-10:]) < sum(losses[:10])


@pytest.fixture
def trainer_with_stand_in(sequences) -> Trainer:
    """Return a trainer whose padded steps are called again where CUDA would replay a graph."""
    config = train.run_config(FORMS["float32"], SMALL)
    table = FeatureTable(tuple(train.random_states(sequences, SMALL)))
    trainer = Trainer(config, sequences, table, CPU, resolve_precision(config, CPU))
    trainer.model.train()
    captures.call_again_for_graphs(trainer)
    return trainer


def test_nothing_is_captured_once_the_step_is(trainer_with_stand_in):
    trainer = trainer_with_stand_in
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    seconds = captures.capture_step(trainer)
    captured = trainer.captured._captured
    assert seconds > 0 and captured is not None
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    assert not trainer.step.record.any()
    for epoch in range(2):
        for batch in trainer.batches(epoch):
            trainer.take(batch)
    assert trainer.captured._captured is captured
    rows = sum(len(batch.targets) for batch in epoch_batches(trainer.sequences, 8, 0, 0))
    assert trainer.step.read().rows == 2 * rows


def test_a_trainer_that_packs_its_batches_is_profiled_by_autograd(sequences):
    """A trainer with a plan takes fused steps, which have no phases that the host could tell apart."""
    config = train.run_config(FORMS["float32"], SMALL)
    table = FeatureTable(tuple(train.random_states(sequences, SMALL)))
    trainer = Trainer(config, sequences, table, CPU, resolve_precision(config, CPU))
    trainer.plan = RunPlan.of(sequences, 8, seed=0)
    figures = profile(trainer, steps=1)
    assert isinstance(trainer.step, TrainingStep) and all(figures["phases_ms"][phase] > 0 for phase in PHASES)


def test_captures_are_figures_of_their_own(sequences, monkeypatch):
    """The step and the epoch are timed once the step is captured."""
    events = []
    monkeypatch.setattr(train, "capture_step", lambda trainer: events.append("captured") or 2.5)
    original = train.timed
    monkeypatch.setattr(train, "timed", lambda *arguments: events.append("timed") or original(*arguments))
    rows = train.side_by_side({name: FORMS[name] for name in ("dense", "float32")}, sequences, SMALL, CPU)
    assert events == ["captured"] + ["timed"] * 4
    assert rows["float32"]["capture_s"] == 2.5
    assert rows["dense"]["capture_s"] == NOT_MEASURED
    events.clear()
    figures = train.epoch("float32", sequences, SMALL, CPU)
    assert events == ["captured", "timed"] and figures["capture_s"] == 2.5 and figures["epoch_s"] > 0


def test_forms_are_warmed_up_as_long_as_they_need():
    cuda = torch.device("cuda")
    assert FORMS["eager"].warm_up_steps(189, cuda) == 189
    assert all(FORMS[name].warm_up_steps(189, cuda) == train.WARM_UP_STEPS for name in ("dense", "bfloat16"))
    assert FORMS["float32"].warm_up_steps(189, CPU) == train.WARM_UP_STEPS


def test_the_ops_of_a_form_are_given_back(monkeypatch):
    monkeypatch.setenv("IISAN_FAST_FORM", "gpu")
    with train.form_of_ops("reference"):
        assert train.os.environ["IISAN_FAST_FORM"] == "reference"
    assert train.os.environ["IISAN_FAST_FORM"] == "gpu"


def test_the_command_writes_what_it_prints(dataset, tmp_path, capsys, in_either_place):
    out = tmp_path / "train.json"
    options = "--users=8 --width=16 --layers=2 --followed=3 --rounds=1 --steps=1 --json --device=cpu"
    with pytest.raises(SystemExit) as left:
        main(["bench", "train", str(dataset), *options.split(), f"--out={out}"])
    assert not left.value.code
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert result["command"].startswith("iisan-fast bench train DATASET --users=8")
    assert result["steps_an_epoch"] == 3 and result["dataset"] == "toy" and result["catalogue"] == 40
    for row in result["forms"]:
        assert row["epoch_s"] > 0 and row["peak_pss_bytes"] > 1 << 20 and row["peak_cuda_bytes"] == NOT_MEASURED
    run = result["run"]
    assert run["peak_pss_bytes"] > 1 << 20 and 0 < run["train_s"] + run["validation_s"] < run["seconds"]
    assert set(result["notes"]) == {row["form"] for row in result["forms"]} | {"step", "epoch", "capture", "run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "DATASET", "--users=25"], "--users 25: expected at most 24, the users of toy"),
        (["train", "DATASET", "--out=/nowhere/x.json"], "--out: expected a file in a folder that exists"),
        (["growth", "--plot=/nowhere/x.png"], "--plot: expected a file in a folder that exists"),
        (["growth", "--items=0"], "--items: expected at least 1, found 0"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, dataset, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", *(str(dataset) if argument == "DATASET" else argument for argument in arguments)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


def test_growth_measures_every_catalogue_and_batch():
    settings = GrowthSettings(items=(50, 90), batch_users=(4, 16), users=30, layers=2, width=16)
    result = growth.measure_growth(Setup(None, CPU), settings)
    assert [(row["items"], row["batch_users"]) for row in result["rows"]] == [(50, 4), (50, 16), (90, 4), (90, 16)]
    assert all(row["epoch_s"] > 0 and row["evaluation_s"] > 0 for row in result["rows"])
    assert all(row["capture_s"] == NOT_MEASURED for row in result["rows"])


def test_growth_captures_before_it_times(monkeypatch):
    seen = []

    def capture(trainer):
        seen.append(int(trainer.step.record[1]))
        return 1.5

    monkeypatch.setattr(growth, "capture_step", capture)
    settings = GrowthSettings(items=(50,), batch_users=(16,), users=30, layers=2, width=16)
    (row,) = growth.measure_growth(Setup(None, CPU), settings)["rows"]
    assert seen == [0] and row["capture_s"] == 1.5


def test_growths_synthetic_data_hold_what_they_should(monkeypatch):
    monkeypatch.setattr(growth, "BLOCK", 7)
    table = growth.states(20, GrowthSettings(layers=2, width=4), 0, CPU)
    assert table.shape == (21, 2, 4) and not table[0].any()
    assert torch.equal(table[1:8], table[8:15]) and torch.equal(table[1:7], table[15:21])
    sequences = growth.histories(1000, 50)
    assert sequences.items.min() >= 1 and sequences.items.max() <= 1000
    lengths = sequences.offsets[1:] - sequences.offsets[:-1]
    assert len(lengths) == 50 and lengths.min() >= 5 and lengths.max() <= 13
