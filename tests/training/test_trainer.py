"""Check runs: they learn, repeat bit for bit, resume exactly after a kill, stop early, and refuse a loss of NaN."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.run_folders import write_recorded
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig, TrainConfig
from iisan_fast.data.epoch_plan import steps_per_epoch
from iisan_fast.errors import InputError
from iisan_fast.kernels import FORM_VARIABLE
from iisan_fast.states.entries import content_digest
from iisan_fast.states.store import Store
from iisan_fast.training.best_run import evaluate_run
from iisan_fast.training.checkpoints import load_checkpoint, save_checkpoint
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.run_progress import Progress
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer
from iisan_fast.training.training_loop import TrainingLoop
from iisan_fast.training.training_step import CapturedStep

CPU = torch.device("cpu")
FAST = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}


def with_train(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.fixture
def config(toy_config) -> RunConfig:
    return with_train(toy_config, max_epochs=4, learning_rates=FAST)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    timed = ("train_seconds", "validation_seconds", "items_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines(run)]


def test_a_run_learns_and_leaves_a_self_sufficient_folder(tmp_path, config):
    seen = []
    result = train(with_train(config, max_epochs=30), tmp_path / "run", CPU, seen.append)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert seen == lines(tmp_path / "run") and losses[-1] < 0.5 * losses[0]
    assert result["test"]["masked"]["hr@10"] > 2 * result["popularity"]["masked"]["hr@10"]
    names = {"config.json", "environment.json", "views.json", "sequences.npz", "metrics.jsonl"}
    names |= {"best.safetensors", "last.safetensors", "previous.safetensors", "test.json", "lock", "checksums.json"}
    names |= {"items.npz", "neighbours.safetensors"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["torch"] == torch.__version__
    again = evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU)
    assert again["test"] == result["test"] and again["popularity"] == result["popularity"]


@needs_compiler
def test_a_side_network_trains_fused_and_another_model_says_why_not(tmp_path, config, caplog, monkeypatch):
    config = with_train(config, max_epochs=1)
    caplog.set_level("INFO")
    train(config, tmp_path / "fused", CPU)
    assert "training by autograd" not in caplog.text
    monkeypatch.setenv(FORM_VARIABLE, "reference")
    train(config, tmp_path / "reference", CPU)
    monkeypatch.delenv(FORM_VARIABLE)
    phm = dataclasses.replace(config, model=dataclasses.replace(config.model, sanb="phm"))
    train(phm, tmp_path / "phm", CPU)
    reasons = [record.message for record in caplog.records if record.message.startswith("training by autograd: ")]
    assert [reason.removeprefix("training by autograd: ") for reason in reasons] == [
        "IISAN_FAST_FORM names reference",
        "its towers' weights are products of others",
    ]
    fused, reference = (lines(tmp_path / name)[0]["loss"] for name in ("fused", "reference"))
    assert fused == pytest.approx(reference, rel=1e-5)


def test_evaluation_needs_nothing_but_the_run_folder(tmp_path, config):
    train(config, tmp_path / "run", CPU)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    saved = json.loads((moved / "config.json").read_text())
    saved.update(dataset="/gone", cache="/gone")
    (moved / "config.json").write_text(json.dumps(saved))
    report = evaluate_run(moved, "validation", EvaluationConfig((1, 20)), CPU)["validation"]
    best = max(lines(moved), key=lambda line: line["validation"]["masked"]["hr@10"])
    assert report["masked"]["mrr"] == best["validation"]["masked"]["mrr"]
    assert {"hr@1", "ndcg@20"} <= report["masked"].keys()


def test_the_same_seed_repeats_bit_for_bit_and_another_differs(tmp_path, config):
    train(config, tmp_path / "a", CPU)
    train(config, tmp_path / "b", CPU)
    train(with_train(config, seed=1), tmp_path / "c", CPU)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b") != untimed(tmp_path / "c")
    first, second = (load_checkpoint(tmp_path / name / "best.safetensors")[0] for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch_users", [16, 10_000_000])
def test_a_run_by_captured_steps_is_the_same_but_for_rounding(tmp_path, config, batch_users, monkeypatch):
    """A stand-in replaces the graph. Batches are padded to at most the number of users."""
    config, original, shapes = with_train(config, batch_users=batch_users), Trainer.__init__, []
    train(config, tmp_path / "plain", CPU)

    def captured(self, *arguments) -> None:
        original(self, *arguments)
        self.captured = CapturedStep(self.step, capture=lambda run: run)

    def noted(self, prepared) -> torch.Tensor:
        shapes.append(prepared.batch.shape)
        return self.captured(prepared.batch, prepared.item_inputs)

    monkeypatch.setattr(Trainer, "__init__", captured)
    monkeypatch.setattr(Trainer, "take", noted)
    train(config, tmp_path / "captured", CPU)
    plain, padded = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "captured"))
    assert padded == pytest.approx(plain, rel=1e-4)
    assert {shape.users for shape in shapes} == {min(batch_users, 60) + 1}
    assert len(shapes) == 4 * -(-60 // batch_users)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["between epochs", "between the best and the last checkpoint", "before the metrics"])
def test_a_killed_run_resumes_exactly(tmp_path, config, moment, monkeypatch):
    whole = train(config, tmp_path / "whole", CPU)
    kill_in_epoch(monkeypatch, 3, moment)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", CPU)
    monkeypatch.undo()
    assert resume(tmp_path / "killed", CPU) == whole
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    for name in ("best.safetensors", "last.safetensors"):
        ours, theirs = (load_checkpoint(tmp_path / run / name)[0] for run in ("killed", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = 4 * steps_per_epoch(RunFolder.open(tmp_path / "whole").sequences, config.train.batch_users)
    for name in (key.removeprefix("model.") for key in theirs if key.startswith("model.")):
        assert theirs[f"adam.step.{name}"] == steps and theirs[f"adam.exp_avg_sq.{name}"].any()


def test_another_rounding_is_told_on_resume(tmp_path, config, monkeypatch, caplog):
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", CPU)
    monkeypatch.undo()
    path = tmp_path / "run" / "environment.json"
    began = json.loads(path.read_text())
    assert began["kernels"] in ("cpu", "reference") and began["processor_name"]
    write_recorded(tmp_path / "run", path.name, {**began, "kernels": "abacus", "python": "2.7"})
    with caplog.at_level("WARNING"):
        resume(tmp_path / "run", CPU)
    message = f"{tmp_path / 'run'}: kernels abacus then, {began['kernels']} now; results will differ in rounding"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{message} from those of a run that was not stopped"]


def test_a_run_resumes_exactly_with_its_table_elsewhere(tmp_path, config, monkeypatch):
    whole = train(config, tmp_path / "whole", CPU)
    kill_in_epoch(monkeypatch, 3, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", CPU, placement="pinned")
    monkeypatch.undo()
    assert resume(tmp_path / "killed", CPU, placement="mapped") == whole
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def kill_in_epoch(monkeypatch, epoch: int, moment: str) -> None:
    target, name = {
        "between epochs": (TrainingLoop, "_epoch"),
        "between the best and the last checkpoint": (RunFolder, "save_last"),
        "before the metrics": (RunFolder, "write_metrics"),
    }[moment]
    original = getattr(target, name)
    calls = []

    def counted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == epoch:
            raise Killed
        return original(*arguments, **keywords)

    monkeypatch.setattr(target, name, counted)


def test_resuming_a_finished_run_only_says_its_figures(tmp_path, config):
    result = train(config, tmp_path / "run", CPU)
    before = (tmp_path / "run" / "last.safetensors").stat().st_mtime_ns
    assert resume(tmp_path / "run", CPU) == result
    assert (tmp_path / "run" / "last.safetensors").stat().st_mtime_ns == before


def test_resuming_with_other_states_is_refused(tmp_path, config, monkeypatch):
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", CPU)
    monkeypatch.undo()
    views = json.loads((tmp_path / "run" / "views.json").read_text())
    views["image"]["weights"] = "of another encoder"
    write_recorded(tmp_path / "run", "views.json", views)
    with pytest.raises(InputError, match="has changed since the run began: .* restore it"):
        resume(tmp_path / "run", CPU)


@pytest.mark.parametrize(("epochs_since", "finished"), [(10, False), (11, True)])
def test_early_stop_is_the_first_epoch_after_more_than_ten_without_a_better_one(epochs_since, finished):
    assert Progress(epoch=20 + epochs_since, best_epoch=20).finished(TrainConfig()) is finished


def test_the_best_epoch_is_the_one_that_is_tested(tmp_path, config):
    result = train(with_train(config, max_epochs=6), tmp_path / "run", CPU)
    rates = [line["validation"]["masked"]["hr@10"] for line in lines(tmp_path / "run")]
    assert result["best_epoch"] == rates.index(max(rates)) + 1
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1]["epoch"] == result["best_epoch"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, config, monkeypatch):
    original = Trainer.take

    def poisoned(self, prepared):
        if prepared.batch.step == 9:  # the second batch of the third epoch
            with torch.no_grad():
                self.model.item_encoder.heads.fusion.bias.fill_(float("nan"))
        return original(self, prepared)

    monkeypatch.setattr(Trainer, "take", poisoned)
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run", CPU)
    assert "stopped in epoch 3: step 10: the loss is nan" in str(error.value)
    assert "the checkpoint of epoch 2 is kept" in str(error.value) and "\n" not in str(error.value)
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert state["epoch"] == 2 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert len(lines(tmp_path / "run")) == 2 and not (tmp_path / "run" / "test.json").exists()


def test_a_folder_that_holds_a_run_is_refused_untouched(tmp_path, config):
    train(config, tmp_path / "run", CPU)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="already holds a run; resume it"):
        train(config, tmp_path / "run", CPU)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("change", [{"cache": "/nowhere"}, {"dataset": "/nowhere"}, {"views": ("image", "absent")}])
def test_bad_input_writes_nothing(tmp_path, config, change):
    with pytest.raises(InputError):
        train(dataclasses.replace(config, **change), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_the_mask_decides_what_leads(tmp_path, config):
    unmasked = dataclasses.replace(config, evaluation=EvaluationConfig(mask_history=False))
    result = train(unmasked, tmp_path / "run", CPU)
    rates = [line["validation"]["unmasked"]["hr@10"] for line in lines(tmp_path / "run")]
    assert result["best_epoch"] == rates.index(max(rates)) + 1


def test_a_damaged_checkpoint_is_named(tmp_path, config):
    train(config, tmp_path / "run", CPU)
    path = tmp_path / "run" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="best.safetensors: not a checkpoint"):
        evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU)


def test_titles_changed_since_extraction_are_noticed(tmp_path, config):
    dataset = shutil.copytree(config.dataset, tmp_path / "dataset")
    items = dataset / "items.tsv"
    items.write_text(items.read_text().replace("title of i7\n", "another title\n"))
    with pytest.raises(
        InputError, match=r"view 'image': the titles of 1 items are not those .* \(i7\); run iisan-fast"
    ):
        train(dataclasses.replace(config, dataset=str(dataset)), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_cache_filled_anew_is_noticed_on_resume(tmp_path, config, monkeypatch):
    cache = shutil.copytree(config.cache, tmp_path / "cache")
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(dataclasses.replace(config, cache=str(cache)), tmp_path / "run", CPU)
    monkeypatch.undo()
    with Store(cache, writable=True) as store:
        store.write("image", ["i7"], [content_digest(b"another title")], torch.zeros(1, 2, 16))
    with pytest.raises(InputError, match="has changed since the run began: .* restore it"):
        resume(tmp_path / "run", CPU)


@pytest.mark.parametrize("name", ["config.json", "sequences.npz", "best.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x93garbage", b'{"a": 3}'])
def test_a_damaged_run_folder_is_named(tmp_path, config, name, content):
    train(with_train(config, max_epochs=1), tmp_path / "run", CPU)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU)


@pytest.mark.parametrize("content", [b"", b"\x93garbage", b'{"a": 3}'])
def test_damaged_descriptions_of_views_are_named_on_resume(tmp_path, config, content, monkeypatch):
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", CPU)
    monkeypatch.undo()
    (tmp_path / "run" / "views.json").write_bytes(content)
    with pytest.raises(InputError, match="views.json"):
        resume(tmp_path / "run", CPU)


def test_the_weights_of_another_model_are_refused(tmp_path, config):
    train(with_train(config, max_epochs=1), tmp_path / "a", CPU)
    wider = dataclasses.replace(config, model=ModelConfig(embedding_dim=32, bottleneck=8))
    train(with_train(wider, max_epochs=1), tmp_path / "b", CPU)
    shutil.copy(tmp_path / "b" / "best.safetensors", tmp_path / "a")
    with pytest.raises(InputError, match="best.safetensors: the weights of another model"):
        evaluate_run(tmp_path / "a", "test", EvaluationConfig(), CPU)


@pytest.mark.parametrize("damage", ["moments of one number", "the best checkpoint in its place"])
def test_a_last_checkpoint_that_does_not_fit_is_refused_on_resume(tmp_path, config, damage, monkeypatch):
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", CPU)
    monkeypatch.undo()
    last = tmp_path / "run" / "last.safetensors"
    tensors, state = load_checkpoint(last)
    if damage == "moments of one number":
        shortened = {name: torch.zeros(1) for name in tensors if name.startswith("adam.exp_avg")}
        save_checkpoint(last, tensors | shortened, state)
    else:
        shutil.copy(tmp_path / "run" / "best.safetensors", last)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    message = "the optimizer.s state of another model" if "moments" in damage else "expected the state best_epoch"
    with pytest.raises(InputError, match=rf"last\.safetensors: {message}"):
        resume(tmp_path / "run", CPU)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_state_of_a_checkpoint_is_a_runs_progress_or_refused():
    state = {"epoch": 2, "best_epoch": 1, "best_hr": 0.5, "lines": [{}, {}]}
    assert Progress.of(state, Path("last.safetensors")) == Progress(2, 1, 0.5, [{}, {}])
    for wrong_state in ({"epoch": 2}, {**state, "seen": 3}):
        with pytest.raises(InputError, match=r"last\.safetensors: expected the state best_epoch, .*, found epoch"):
            Progress.of(wrong_state, Path("last.safetensors"))


def test_what_a_kill_left_of_a_new_file_is_removed_and_nothing_else(tmp_path, config, monkeypatch):
    kill_in_epoch(monkeypatch, 2, "between epochs")
    with pytest.raises(Killed):
        train(config, tmp_path / "run", CPU)
    monkeypatch.undo()
    run = tmp_path / "run"
    names = {".env.local.backup", ".last.safetensors.backup-2", ".config.json.original", ".metrics.jsonl.k2j3_0ab"}
    for name in names:
        (run / name).write_text("a user's")
    folder = run / ".last.safetensors.folder_1"
    folder.mkdir()
    for name in ("last.safetensors", "best.safetensors", "metrics.jsonl", "test.json"):
        (run / f".{name}.iisan-fast-k2j3_0ab").mkdir()
    resume(run, CPU)
    assert {path.name for path in run.glob(".*")} == names | {folder.name}
