"""Check that damaged files of a run are found and named, that checkpoints stand in for each other, and `verify_run`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from helpers.run_folders import flip_bit, untimed
from iisan_fast.config import EvaluationConfig, RunConfig
from iisan_fast.errors import InputError
from iisan_fast.training import checkpoints, run_folder
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.checkpoints import load_checkpoint, save_checkpoint
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.run_verification import verify_run
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
TENSORS = {
    "model.weight": torch.arange(6.0).reshape(2, 3),
    "model.bias": torch.tensor([1.5, -2.5]),
    "adam.step.weight": torch.tensor(7.0),
    "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "numbers": torch.tensor([1, 2, 3]),
}
STATE = {"epoch": 3, "best_hr": 0.25, "lines": [{"loss": 1.0}, {"loss": 0.5}, {"loss": 0.25}]}


class Killed(BaseException):
    pass


# A checkpoint's file


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, STATE)
    return path


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_checkpoint_comes_back_and_two_of_the_same_content_are_one_file(tmp_path, checkpoint):
    tensors, state = load_checkpoint(checkpoint)
    assert state == STATE and tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    save_checkpoint(tmp_path / "again", tensors, state)
    assert (tmp_path / "again").read_bytes() == checkpoint.read_bytes()


def test_each_flipped_bit_of_each_tensor_is_found_and_its_tensor_named(checkpoint):
    whole = checkpoint.read_bytes()
    header = json.loads(whole[8 : header_bytes(checkpoint)])
    start = header_bytes(checkpoint)
    for name in TENSORS:
        begin, end = header[name]["data_offsets"]
        for byte in range(begin, end):
            checkpoint.write_bytes(whole)
            flip_bit(checkpoint, start + byte, byte % 8)
            with pytest.raises(
                InputError, match=f"last.safetensors: damaged: tensor '{name}': its checksum does not fit; restore"
            ):
                load_checkpoint(checkpoint)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.long)])
def test_each_flipped_bit_of_the_header_is_found_or_changes_nothing(checkpoint, step):
    whole = checkpoint.read_bytes()
    unchanged = 0
    for byte in range(0, header_bytes(checkpoint), step):
        checkpoint.write_bytes(whole)
        flip_bit(checkpoint, byte, (byte * 5) % 8)
        try:
            tensors, state = load_checkpoint(checkpoint)
        except InputError as error:
            assert "last.safetensors" in str(error) and "\n" not in str(error)
        else:  # the name "checksums" was hit, or the case of a letter in \\u00XX, …
            unchanged += 1
            assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
                name: tensor.tolist() for name, tensor in TENSORS.items()
            }
            assert {name: state[name] for name in STATE} == STATE
    assert unchanged < 40


@pytest.mark.parametrize("change", ["swapped", "missing", "renamed", "other dtype", "other shape", "another's state"])
def test_changed_tensors_under_old_checksums_are_found(checkpoint, change):
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    tensors = dict(TENSORS)
    if change == "swapped":
        tensors["half"], tensors["other"] = tensors["half"].flip(0), tensors.pop("numbers")
    elif change == "missing":
        del tensors["model.bias"]
    elif change == "renamed":
        tensors["model.bios"] = tensors.pop("model.bias")
    elif change == "other dtype":
        tensors["model.bias"] = tensors["model.bias"].view(torch.int32)
    elif change == "other shape":
        tensors["model.weight"] = tensors["model.weight"].reshape(3, 2)
    else:
        metadata = {"state": metadata["state"].replace('"epoch": 3', '"epoch": 2')}
    save_file(tensors, checkpoint, metadata=metadata)
    with pytest.raises(InputError, match=r"last\.safetensors: damaged: .*; restore the file from a copy"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [0, 3, 8, 0.3, 0.7, 0.999])
def test_a_short_checkpoint_is_found(checkpoint, share):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: share if isinstance(share, int) else int(share * len(whole))])
    with pytest.raises(InputError, match=r"last\.safetensors: not a checkpoint of this program, or damaged"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "state",
    [
        "null",
        "3",
        '"text"',
        "[]",
        "{}",
        "{",
        "",
        "[" * 100_000,
        '{"epoch": ' + "1" * 5000 + "}",
        '{"epoch": NaN}',
        '{"epoch": "2"}',
        '{"epoch": 2.0}',
        '{"epoch": -1}',
        '{"epoch": 1, "checksums": null}',
        '{"epoch": 1, "checksums": 3}',
        '{"epoch": 1, "checksums": {"state": [], "tensors": []}}',
        '{"epoch": 1, "epoch": 2}',
    ],
)
def test_a_state_of_the_wrong_kind_is_one_line(tmp_path, state):
    path = tmp_path / "best.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"state": state})
    if state == '{"epoch": 1, "checksums": null}':  # as without checksums
        assert load_checkpoint(path)[1] == {"epoch": 1}
        return
    with pytest.raises(InputError, match=r"best\.safetensors: .*restore the file from a copy") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_found_in_a_file_without_checksums(tmp_path):
    path = tmp_path / "best.safetensors"
    save_file({"weight": torch.tensor([1.0, float("nan")])}, path, metadata={"state": '{"epoch": 1}'})
    with pytest.raises(InputError, match="tensor 'weight': expected finite numbers"):
        load_checkpoint(path)


def test_files_without_metadata_folders_and_fifos_are_named(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("plain", "folder", "fifo", "none"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)


# The last checkpoint and the one before it


@pytest.fixture
def saved(tmp_path) -> RunFolder:
    """Return a folder with two checkpoints, of epochs 1 and 2."""
    folder = RunFolder(tmp_path)
    for epoch in (1, 2):
        folder.save_last(TENSORS, {"epoch": epoch})
    return folder


def test_the_checkpoint_before_the_last_stands_in_for_a_damaged_one_and_is_not_lost(saved, caplog):
    assert saved.load_last()[1:] == ({"epoch": 2}, saved.last)
    flip_bit(saved.last, -3)
    for _ in range(2):
        assert saved.load_last()[1:] == ({"epoch": 1}, saved.previous)
    assert "last.safetensors: damaged: tensor" in caplog.text
    assert "goes on from the checkpoint before it, previous.safetensors" in caplog.text
    saved.save_last(TENSORS, {"epoch": 2})  # the damaged file does not take the place of the good one
    assert load_checkpoint(saved.previous)[1] == {"epoch": 1} and load_checkpoint(saved.last)[1] == {"epoch": 2}


def test_a_state_that_is_not_a_runs_is_damage_too(saved):
    def refuse_two(state: dict, path: Path) -> None:
        if state["epoch"] == 2:
            raise InputError(f"{path}: not of this run")

    assert saved.load_last(refuse_two)[1] == {"epoch": 1}
    saved.previous.unlink()
    with pytest.raises(InputError, match="not of this run"):
        saved.load_last(refuse_two)


def test_two_damaged_checkpoints_are_both_named(saved):
    flip_bit(saved.last, -3)
    flip_bit(saved.previous, -3)
    with pytest.raises(InputError, match=r"last\.safetensors: damaged.*; .*previous\.safetensors: damaged"):
        saved.load_last()


@pytest.mark.parametrize("moment", range(16))
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(saved, moment, monkeypatch):
    """Each call that changes a file or the folder is a moment."""
    calls = []

    def counted(function):
        def call(*arguments, **named):
            calls.append(function)
            if len(calls) == moment + 1:
                raise Killed
            return function(*arguments, **named)

        return call

    for owner, name in (
        (Path, "replace"),
        (Path, "chmod"),
        (os, "fsync"),
        (os, "link"),
        (shutil, "rmtree"),
        (run_folder, "write_tensors"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    with contextlib.suppress(Killed):
        saved.save_last(TENSORS, {"epoch": 3})
    monkeypatch.undo()
    epoch = RunFolder(saved.path).load_last()[1]["epoch"]
    assert epoch in (2, 3) and (epoch == 3 or len(calls) > moment)


def test_the_last_checkpoint_is_always_there_and_stays_readable_while_it_is_replaced(saved, monkeypatch):
    missing = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        missing.append(not saved.last.exists())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    saved.save_last(TENSORS, {"epoch": 3})
    assert missing == [False, False] and load_checkpoint(saved.previous)[1] == {"epoch": 2}


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(saved, monkeypatch):
    read_once = checkpoints._read_once
    reads = []

    def replaced_meanwhile(path: Path):
        content = read_once(path)
        reads.append(path)
        if len(reads) == 1:
            saved.save_last(TENSORS, {"epoch": 3})
        return content

    monkeypatch.setattr(checkpoints, "_read_once", replaced_meanwhile)
    assert load_checkpoint(saved.last)[1] == {"epoch": 3} and len(reads) == 2


def test_a_file_system_without_hard_links_keeps_the_checkpoint_before_the_last(saved, monkeypatch):
    def no_links(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    saved.save_last(TENSORS, {"epoch": 3})
    assert [load_checkpoint(path)[1]["epoch"] for path in (saved.last, saved.previous)] == [3, 2]


def test_a_save_that_fails_keeps_both_checkpoints(saved, monkeypatch):
    def full(*arguments, **named):
        raise safetensors.SafetensorError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left" }')

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for save in (saved.save_last, saved.save_best):
        with pytest.raises(OSError, match="No space left on device") as error:
            save(TENSORS, {"epoch": 3})
        assert error.value.errno == 28 and error.value.filename.endswith(".safetensors")
    assert [load_checkpoint(path)[1]["epoch"] for path in (saved.last, saved.previous)] == [2, 1]
    assert {path.name for path in saved.path.iterdir()} == {"last.safetensors", "previous.safetensors"}


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_run) -> Path:
    """Return the folder of a run of three epochs, which is not to be changed."""
    from iisan_fast.config import ModelConfig, TrainConfig

    rates = {"adapters": 1e-2, "gates": 1e-2, "heads": 1e-2, "sequence_encoder": 1e-2}
    settings = TrainConfig(batch_users=16, max_epochs=3, learning_rates=rates)
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    config = RunConfig(str(toy_run[0]), str(toy_run[1]), ("image", "title"), model=model, train=settings)
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config, run, CPU)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stopped(run) -> Path:
    """Return the copy of a run that was stopped before its test."""
    (run / "test.json").unlink()
    return run


def figures(run: Path) -> dict:
    return json.loads((run / "test.json").read_text())


def test_a_run_with_a_damaged_last_checkpoint_ends_as_it_would_have(finished, stopped, caplog):
    flip_bit(stopped / "last.safetensors", -1003)
    assert resume(stopped, CPU) == figures(finished)
    assert "goes on from the checkpoint before it" in caplog.text
    assert untimed(stopped) == untimed(finished)
    for name in ("best.safetensors", "last.safetensors", "previous.safetensors"):
        ours, theirs = (load_checkpoint(folder / name)[0] for folder in (stopped, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_damaged_best_checkpoint_is_made_again_from_one_of_its_epoch(finished, stopped, caplog):
    best = load_checkpoint(stopped / "best.safetensors")[1]["epoch"]
    assert best in (2, 3)  # which the last and the previous checkpoint are of
    flip_bit(stopped / "best.safetensors", -1003)
    assert resume(stopped, CPU) == figures(finished)
    assert "best.safetensors: damaged" in caplog.text and "it is made again from" in caplog.text
    ours, theirs = (load_checkpoint(folder / "best.safetensors") for folder in (stopped, finished))
    assert ours[1] == theirs[1] and all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])


def test_a_lost_best_checkpoint_stops_a_run_before_it_trains(stopped, monkeypatch):
    state = load_checkpoint(stopped / "last.safetensors")[1]
    best = state["best_epoch"]
    flip_bit(stopped / "best.safetensors", -1003)
    for name in ("last.safetensors", "previous.safetensors"):  # of other epochs than the best
        tensors, state = load_checkpoint(stopped / name)
        state["best_epoch"] = 1
        save_checkpoint(stopped / name, tensors, state)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(
        InputError, match=r"best\.safetensors: damaged: .* no other checkpoint holds the weights of epoch 1"
    ):
        resume(stopped, CPU)
    assert best != 1 and {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_damaged_test_figures_are_made_again(finished, run, caplog):
    path = run / "test.json"
    text = path.read_text()
    path.write_text(text.replace('"epochs": 3', '"epochs": 2'))
    assert resume(run, CPU) == figures(finished)
    assert path.read_text() == text and "test.json: damaged: its checksum does not fit; restore" in caplog.text
    (run / "checksums.json").unlink()
    path.write_text("{}")
    assert resume(run, CPU) == figures(finished) and path.read_text() == text


@pytest.mark.parametrize("name", ["views.json", "sequences.npz"])
def test_each_flipped_byte_of_a_small_file_is_found(run, name):
    path = run / name
    whole = path.read_bytes()
    for byte in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole)
        flip_bit(path, byte, byte % 8)
        with pytest.raises(
            InputError, match=rf"{name}: damaged: its checksum does not fit; restore the file from a copy"
        ):
            _ = RunFolder.open(run).views, RunFolder.open(run).sequences


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_while_settings_and_figures_change_leaves_no_checksum_that_does_not_fit(run, moment, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    config.pop("format")  # as a run of format 1, whose environment.json is written again
    environment = json.loads((run / "environment.json").read_text()) | {"kernels": "native"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "checksums.json").unlink()
    assert verify_run(run).damage == []
    written = []

    def replace(path: Path, target: Path) -> Path:
        if len(written) == moment:
            raise Killed
        written.append(target.name)
        return Path(os.replace(path, target) or target)

    folder = RunFolder.open(run)
    longer = dataclasses.replace(folder.config, train=dataclasses.replace(folder.config.train, max_epochs=5))
    monkeypatch.setattr(Path, "replace", replace)
    with contextlib.suppress(Killed):
        folder.change_config(longer)
        folder.write_test({**folder.figures, "epochs": 5})
    monkeypatch.undo()
    assert len(written) == moment
    opened = RunFolder.open(run)
    assert opened.config.train.max_epochs == (5 if "config.json" in written else 3)
    assert opened.environment["kernels"] == "cpu" and opened.figures["epochs"] == (5 if "test.json" in written else 3)
    assert verify_run(run).damage == []


@pytest.mark.parametrize("recorded", [True, False])
def test_views_of_other_names_are_one_line(stopped, recorded):
    path = stopped / "views.json"
    path.write_text(path.read_text().replace('"title": {', '"tItle": {'))
    if not recorded:
        (stopped / "checksums.json").unlink()
    message = (
        "its checksum does not fit" if recorded else "expected the views image, title, found image, tItle; restore"
    )
    with pytest.raises(InputError, match=rf"views\.json: .*{message}"):
        resume(stopped, CPU)


@pytest.mark.parametrize("under_way", [{"rows": 0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_an_epoch_without_losses_or_time_is_one_line(stopped, under_way):
    for name in ("last.safetensors", "previous.safetensors"):
        tensors, state = load_checkpoint(stopped / name)
        steps = {"steps": 4, "slots": 9, "loss": 1.0, "rows": 9, "seconds": 1.0}
        state["under_way"] |= steps | under_way
        save_checkpoint(stopped / name, tensors, state)
    with pytest.raises(InputError, match=r"last\.safetensors: expected .*; restore the file from a copy"):
        resume(stopped, CPU)


def resume_with_the_same_settings(run: Path) -> None:
    """Resume a finished run with a setting that changes nothing."""
    resume(run, CPU, changes=RunChanges(max_epochs=RunFolder.open(run).config.train.max_epochs))


@pytest.mark.parametrize("use", [lambda run: resume(run, CPU), resume_with_the_same_settings, verify_run])
def test_a_temporary_folder_of_a_killed_write_is_removed_from_a_finished_run(run, use):
    (run / ".test.json.iisan-fast-abcd1234").mkdir()
    (run / ".test.json.mine").mkdir()
    use(run)
    assert [path.name for path in run.glob(".*")] == [".test.json.mine"]


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "metrics.jsonl", "test.json"])
def test_a_new_run_is_not_mixed_with_the_remains_of_another(run, toy_config, name):
    for path in run.iterdir():
        if path.name != name:
            path.unlink()
    with pytest.raises(InputError, match=rf"run: holds {name} of another run; choose another folder"):
        train(toy_config, run, CPU)
    assert [path.name for path in run.iterdir()] == [name]


def test_a_damaged_environment_may_be_removed(stopped):
    flip_bit(stopped / "environment.json", 40)
    with pytest.raises(InputError, match="environment.json: damaged: .* or remove it to go on without it"):
        resume(stopped, CPU)
    (stopped / "environment.json").unlink()
    resume(stopped, CPU)


def edit(run: Path, change) -> None:
    path = run / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "seed", 1),
        ("model", "dropout", 0.3),
        ("evaluation", "mask_history", False),
        ("protocol", "max_inputs", 9),
    ],
)
def test_a_changed_setting_that_results_depend_on_is_named(stopped, section, name, value):
    before = json.loads((stopped / "config.json").read_text())[section][name]
    edit(stopped, lambda settings: settings[section].update({name: value}))
    message = (
        rf"config\.json: {section}\.{name}: expected {json.dumps(before)}, .*, found {json.dumps(value)}; restore it"
    )
    for read in (lambda: resume(stopped, CPU), lambda: load(stopped, CPU)):
        with pytest.raises(InputError, match=message):
            read()


def test_settings_that_may_change_are_told(stopped, caplog):
    edit(stopped, lambda settings: settings["train"].update(max_epochs=4))
    assert resume(stopped, CPU)["epochs"] == 4
    assert "config.json: changed since it was written: train.max_epochs 3 then, 4 now" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x93", b"{}", b"[]", b'{"settings": {}, "files": {}, "checksum": "00"}'])
def test_damaged_checksums_are_named_with_the_remedy(run, content):
    (run / "checksums.json").write_bytes(content)
    with pytest.raises(InputError, match="checksums.json: .*remove it, and `iisan-fast verify .*` makes it again"):
        evaluate_run(run, "test", EvaluationConfig(), CPU)
    assert [damage.where for damage in verify_run(run).damage] == ["checksums.json"]
    (run / "checksums.json").unlink()
    assert verify_run(run).damage == [] and verify_run(run).added == 0
    RunFolder.open(run)


def test_reading_needs_neither_a_lock_nor_a_folder_that_can_be_written(run):
    (run / "lock").unlink()
    with RunFolder(run).hold():
        evaluate_run(run, "test", EvaluationConfig(), CPU)
        assert verify_run(run).damage == []
    os.chmod(run, 0o500)
    try:
        evaluate_run(run, "test", EvaluationConfig(), CPU)
    finally:
        os.chmod(run, 0o700)


# verify


def test_a_whole_run_has_no_damage_and_verify_changes_nothing(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    verified = verify_run(run)
    assert (verified.kind, verified.path, verified.damage, verified.added) == ("run", run, [], 0)
    tensors = sum(len(load_checkpoint(run / f"{name}.safetensors")[0]) for name in ("best", "last", "previous"))
    assert verified.checked == tensors + 8  # config, environment, views, sequences, items, neighbours, metrics, test
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_verify_names_each_damaged_part(run):
    for name, byte in (("best", -5), ("last", -5), ("last", -2000)):
        flip_bit(run / f"{name}.safetensors", byte)
    (run / "previous.safetensors").write_bytes(b"short")
    edit(run, lambda settings: settings["train"].update(seed=4))
    for name in ("views.json", "environment.json", "test.json", "sequences.npz"):
        flip_bit(run / name, 30)
    damage = verify_run(run).damage
    where = sorted(part.where.partition(":")[0] for part in damage)
    assert where == sorted(
        ["best.safetensors", "config.json", "environment.json", *["last.safetensors"] * 2, "previous.safetensors"]
        + ["sequences.npz", "test.json", "views.json"]
    )
    assert all(part.problem and part.remedy and "\n" not in part.problem + part.remedy for part in damage)
    assert sum("tensor '" in part.where for part in damage) == 3


def test_verify_finds_what_is_missing_and_other_metrics(run):
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "best.safetensors").unlink()
    (run / "views.json").unlink()
    assert sorted(part.where for part in verify_run(run).damage) == ["best.safetensors", "metrics.jsonl", "views.json"]
    (run / "last.safetensors").unlink()
    assert "last.safetensors" in [part.where for part in verify_run(run).damage]
    with pytest.raises(InputError, match="not a run folder"):
        verify_run(run.parent)


def test_verify_waits_for_no_fifo(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert [part.where for part in verify_run(run).damage] == ["metrics.jsonl"]


def without_checksums(run: Path) -> None:
    """Take the checksums out of a run, as an older version writes it."""
    (run / "checksums.json").unlink()
    for name in ("best", "last", "previous"):
        path = run / f"{name}.safetensors"
        tensors, state = load_checkpoint(path)
        save_file(tensors, path, metadata={"state": json.dumps(state)})


def test_verify_adds_checksums_to_a_run_without_and_nothing_else_changes(run, caplog):
    whole = {path.name: path.read_bytes() for path in run.iterdir()}
    without_checksums(run)
    evaluate_run(run, "test", EvaluationConfig(), CPU)
    assert [record.getMessage() for record in caplog.records if "checksums" in record.getMessage()] == [
        f"{run}: has no checksums, so damage may stay unseen; `iisan-fast verify {run}` adds them"
    ]
    counted = verify_run(run, add=False)
    assert counted.added == 0 and not (run / "checksums.json").exists()
    assert counted.checked == 8  # config, environment, views, sequences, items, neighbours, metrics, test
    verified = verify_run(run)
    assert verified.damage == [] and verified.added == counted.unchecked > 20 and verified.unchecked == 0
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.suffix == ".safetensors"} == {
        name: content for name, content in whole.items() if name.endswith(".safetensors")
    }
    assert json.loads((run / "checksums.json").read_text())["files"] == json.loads(whole["checksums.json"])["files"]
    caplog.clear()
    evaluate_run(run, "test", EvaluationConfig(), CPU)
    assert not caplog.records and verify_run(run).added == 0
    flip_bit(run / "best.safetensors", -7)
    with pytest.raises(InputError, match="its checksum does not fit"):
        load(run, CPU)


# One writer


HOLDS = """
import sys, time
from pathlib import Path
from iisan_fast.files import locked

with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_another_process_trains_in_is_refused_and_unchanged(run, tmp_path, toy_config):
    new = tmp_path / "new"
    new.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(new / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            InputError, match="new: another process trains in this folder, or changes .*; wait for it to end, or choose"
        ):
            train(toy_config, new, CPU)
        assert [path.name for path in new.iterdir()] == ["lock"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    train(toy_config, new, CPU)  # the lock ends with its process


def test_a_resume_of_a_run_that_is_trained_is_refused_unchanged(stopped):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with RunFolder.open(stopped, writable=True):
        for write in (lambda: resume(stopped, CPU), lambda: RunFolder.open(stopped, writable=True)):
            with pytest.raises(InputError, match="another process trains in this folder"):
                write()
        assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    RunFolder.open(stopped, writable=True).close()


def test_numbered_folders_are_made_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder(None, "name") for _ in range(3)]
    assert {folder.path for folder in folders} == {Path("runs/name-1")} and not list(tmp_path.iterdir())
    for folder in folders:
        folder.claim()
    assert [folder.path for folder in folders] == [Path(f"runs/name-{number}") for number in (1, 2, 3)]
    for folder in folders:
        folder.close()


def test_a_folder_that_is_removed_while_a_run_is_trained_is_one_line(tmp_path, toy_config):
    with pytest.raises(
        InputError, match="stopped in epoch 2: .*: No such file or directory; the checkpoint of epoch 1"
    ):
        train(toy_config, tmp_path / "run", CPU, lambda line: shutil.rmtree(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
