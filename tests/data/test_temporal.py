"""The temporal split: by hand, beside a slow reference, every bad times.tsv refused, through training and commands."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.command_line import iisan_fast, refused
from helpers.datasets import make_sequences, write_dataset_folder
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.config import EvaluationConfig, ModelConfig, ProtocolConfig, RunConfig, TrainConfig
from iisan_fast.data.batches import epoch_batches
from iisan_fast.data.epoch_plan import steps_per_epoch
from iisan_fast.data.saved_sequences import load_sequences
from iisan_fast.data.sequences import load_dataset, statistics
from iisan_fast.errors import InputError
from iisan_fast.evaluation.metrics import evaluate, popularity_baseline
from iisan_fast.training.best_run import evaluate_run
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
SMALL = ProtocolConfig(min_interactions=4, max_inputs=2, split="temporal", validation_from=0.4, test_from=0.7)
BY_HAND = {  # moments 50 and 80
    "short": ("a a a", "10 10 99"),  # counts for nothing, not even for the moments
    "whole": ("a b c d e f g h", "10 20 30 40 50 60 80 90"),
    "trained": ("h a b c", "10 20 30 40"),
    "validated": ("a b c d", "30 40 50 60"),
    "new": ("d e f g", "50 60 80 80"),  # the first interaction is no target, but it is history
    "late": ("x x x x", "80 80 90 90"),
    "one": ("b a c c", "40 80 90 90"),
    "between": ("y y y y", "50 60 60 70"),
}
Users = dict[str, tuple[list[str], list[int]]]


def write(root: Path, users: dict[str, tuple[str, str]]) -> Path:
    root.mkdir(exist_ok=True)
    items = sorted({item for history, _ in users.values() for item in history.split()})
    (root / "items.tsv").write_text("".join(f"{item}\ttitle of {item}\n" for item in items))
    for column, name in enumerate(("users", "times")):
        (root / f"{name}.tsv").write_text("".join(f"{user}\t{texts[column]}\n" for user, texts in users.items()))
    return root


@pytest.fixture
def by_hand(tmp_path) -> Path:
    return write(tmp_path / "by-hand", BY_HAND)


def test_by_hand(by_hand):
    sequences = load_dataset(by_hand, SMALL).sequences
    assert sequences.user_ids == ["whole", "trained", "validated", "new", "one"]
    assert "".join(sequences.item_ids) == "abcdefg"  # h, x and y stand only in what is cut off
    letters = [
        "".join(sequences.item_ids[i - 1] for i in part) for part in np.split(sequences.items, sequences.offsets)
    ]
    assert letters[1:-1] == ["bcdefg", "abc", "abc", "def", "ba"]
    offsets, trained = sequences.training
    assert offsets.tolist() == [0, 3, 6, 8, 8, 9] and trained.tolist() == [2, 3, 4, 1, 2, 3, 1, 2, 2]
    assert sequences.training_users.tolist() == [0, 1, 2] and sequences.epoch_interactions == 8
    validation, test = sequences.split("validation"), sequences.split("test")
    assert validation.users.tolist() == [0, 2] and validation.targets.tolist() == [5, 3]
    assert validation.inputs.tolist() == [[3, 4], [1, 2]]
    assert test.users.tolist() == [0, 3, 4] and test.targets.tolist() == [7, 6, 1]
    assert test.inputs.tolist() == [[5, 6], [4, 5], [0, 2]]
    assert test.history.tolist() == [[2, 3, 4, 5, 6], [0, 0, 0, 4, 5], [0, 0, 0, 0, 2]]
    counts = statistics(sequences)
    assert (counts["users"], counts["training_users"], counts["training_interactions"]) == (5, 3, 9)
    assert (counts["validation_targets"], counts["test_targets"]) == (2, 3)
    assert counts["padding_share"] == pytest.approx(1 - 8 / 9)
    assert counts["cold_targets_share"] == pytest.approx(2 / 3)


def reference(users: Users, protocol: ProtocolConfig) -> dict[str, dict] | None:
    """Return {user: {"kept": items, "trained": items, "targets": {split: …}}}, or None if the split is refused."""
    users = {user: both for user, both in users.items() if len(both[0]) >= protocol.min_interactions}
    times = sorted(time for _, moments in users.values() for time in moments)
    first, second = (
        times[math.ceil(share * (len(times) - 1))] for share in (protocol.validation_from, protocol.test_from)
    )
    users_kept = {}
    for user, (items, moments) in users.items():
        begin = max(0, sum(time < first for time in moments) - protocol.max_inputs - 1)
        targets = {}
        for name, start, end in (("validation", first, second), ("test", second, math.inf)):
            inside = [place for place, time in enumerate(moments) if start <= time < end]
            if inside and inside[0] > 0:
                targets[name] = (moments[inside[0]], items[begin : inside[0]], items[inside[0]], inside[0])
        trained = [item for item, time in list(zip(items, moments))[begin:] if time < first]
        end = max([target[-1] + 1 for target in targets.values()], default=begin + len(trained))
        if targets or len(trained) >= 2:
            users_kept[user] = {"kept": items[begin:end], "trained": trained, "targets": targets}
    complete = all(any(name in user["targets"] for user in users_kept.values()) for name in ("validation", "test"))
    return (
        users_kept
        if first < second and complete and any(len(user["trained"]) >= 2 for user in users_kept.values())
        else None
    )


moments = st.lists(st.integers(0, 30), min_size=3, max_size=14).map(sorted)


@settings(max_examples=150, deadline=None)
@given(
    st.data(), st.lists(moments, min_size=2, max_size=9), st.integers(1, 4), st.sampled_from([(0.5, 0.7), (0.8, 0.9)])
)
def test_equals_a_slow_reference(data, times, max_inputs, shares):
    if max(map(len, times)) < 4:
        times[0] = times[0] + [30]
    users = {
        f"u{number}": (
            data.draw(st.lists(st.sampled_from("abcdef"), min_size=len(user_times), max_size=len(user_times))),
            user_times,
        )
        for number, user_times in enumerate(times)
    }
    protocol = ProtocolConfig(4, max_inputs, split="temporal", validation_from=shares[0], test_from=shares[1])
    expected = reference(users, protocol)
    with TemporaryDirectory() as folder:
        texts = {user: (" ".join(items), " ".join(map(str, user_times))) for user, (items, user_times) in users.items()}
        root = write(Path(folder), texts)
        with nullcontext() if expected else pytest.raises(InputError, match="validation_from, test_from: split at"):
            sequences = load_dataset(root, protocol).sequences
    if not expected:
        return
    assert sequences.user_ids == list(expected)
    assert sequences.item_ids == sorted({item for user in expected.values() for item in user["kept"]})

    def names(numbers: np.ndarray) -> list[str]:
        return [sequences.item_ids[number - 1] for number in numbers if number]

    offsets, trained = sequences.training
    for number, user in enumerate(expected.values()):
        assert names(sequences.items[slice(*sequences.offsets[number : number + 2])]) == user["kept"]
        assert names(trained[slice(*offsets[number : number + 2])]) == user["trained"]
    assert sequences.training_users.tolist() == [
        n for n, user in enumerate(expected.values()) if len(user["trained"]) > 1
    ]
    latest = max(
        (
            time
            for user, (_, user_times) in users.items()
            if user in expected
            for time in user_times[: len(expected[user]["trained"])]
        ),
    )
    for name in ("validation", "test"):
        split = sequences.split(name)
        with_target = {
            user: user_reference["targets"][name]
            for user, user_reference in expected.items()
            if name in user_reference["targets"]
        }
        assert [sequences.user_ids[user] for user in split.users] == list(with_target)
        for row, (time, before, target, place) in enumerate(with_target.values()):
            assert latest < time and place > 0
            assert names(split.targets[row : row + 1]) == [target]
            assert names(split.history[row]) == before and not split.history[row, : -len(before)].any()
            assert names(split.inputs[row]) == before[-max_inputs:] and split.inputs.shape[1] == max_inputs
            assert split.reachable[row] == (target not in before)


def test_ranks_mask_the_whole_history(by_hand):
    sequences = load_dataset(by_hand, SMALL).sequences
    vectors = torch.arange(7.0, 0, -1)[:, None]  # a before b before c and so on
    report = evaluate(torch.ones(3, 1), vectors, sequences, "test", EvaluationConfig((1, 2, 7)))
    assert report["users"] == 3 and report["unreachable"] == 0
    assert report["unmasked"]["mrr"] == pytest.approx((1 / 7 + 1 / 6 + 1) / 3)
    assert report["masked"]["mrr"] == pytest.approx((1 / 2 + 1 / 4 + 1) / 3)
    assert popularity_baseline(sequences, "validation", EvaluationConfig())["users"] == 2


def test_an_epoch_visits_the_training_users_alone(by_hand):
    sequences = load_dataset(by_hand, SMALL).sequences
    batches = list(epoch_batches(sequences, 2, seed=0, epoch=1))
    assert sorted(user for batch in batches for user in batch.users.tolist()) == [0, 1, 2]
    assert [batch.step for batch in batches] == [2, 3] and steps_per_epoch(sequences, 2) == 2
    assert sum(int(batch.multiplicity.sum()) for batch in batches) == sequences.epoch_interactions


def test_save_and_load_round_trip(by_hand, tmp_path):
    sequences = load_dataset(by_hand, SMALL).sequences
    sequences.save(tmp_path / "s.npz")
    loaded = load_sequences(tmp_path / "s.npz")
    assert loaded.training_ends.tolist() == sequences.training_ends.tolist()
    assert {name: ends.tolist() for name, ends in loaded.targets.items()} == {
        "validation": [3, -1, 11, -1, -1],
        "test": [5, -1, -1, 14, 16],
    }


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("u1\t1 2 3 4\n", "ends before user 'u2'"),
        (
            "u1\t1 2 3 4\nu2\t1 2 3 4\nu3\t1 2 3 4\n",
            "line 3: expected the end of the file, as in users.tsv, found user 'u3'",
        ),
        ("u2\t1 2 3 4\nu1\t1 2 3 4\n", "line 1: expected user 'u1', as in users.tsv, found user 'u2'"),
        ("u1\t1 2 3 4\nu2\t1 2 3\n", "line 2: expected 4 times, one an interaction, found 3"),
        ("u1\t1 2 3 x\nu2\t1 2 3 4\n", "line 1: expected whole numbers"),
        ("u1\t1 2  3 4\nu2\t1 2 3 4\n", "line 1: expected whole numbers"),
        ("u1\t1 2 3 4.5\nu2\t1 2 3 4\n", "line 1: expected whole numbers"),
        ("u1\t1 2 3 1_0\nu2\t1 2 3 4\n", "one space between, found '1_0'"),
        ("u1\t1 2 3 \u0664\nu2\t1 2 3 4\n", "one space between, found '\u0664'"),
        (f"u1\t1 2 3 {'9' * 5000}\nu2\t1 2 3 4\n", "64 bits, one space between, found one with more digits"),
        (f"u1\t1 2 3 {10**30}\nu2\t1 2 3 4\n", "line 1: expected whole numbers"),
        ("u1\t1 2 3 4\nu2\t1 3 2 4\n", "line 2: expected times in order, found 2 after 3"),
        ("u1\t1 2 3 4\n\n", "line 2: empty line"),
        ("", "empty"),
    ],
)
def test_bad_times_name_the_line(tmp_path, times, message):
    root = write(tmp_path / "d", {user: ("a b c d", "") for user in ("u1", "u2")})
    (root / "times.tsv").write_text(times)
    with pytest.raises(InputError) as error:
        load_dataset(root, SMALL)
    assert message in str(error.value) and "times.tsv" in str(error.value) and "\n" not in str(error.value)
    load_dataset(root, ProtocolConfig(min_interactions=4))  # which does not look at them


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["1 1 1 1", "1 1 1 1"], "split at the times 1 and 1, which are one"),
        (["1 2 2 3", "2 2 2 3"], "leaves nothing for training"),
        (["1 1 1 1", "2 2 3 3"], "leaves nothing for validation"),
        (["1 1 1 1 2 2", "3 3 3 3"], "leaves nothing for test"),
    ],
)
def test_a_part_without_anything_is_refused(tmp_path, times, message):
    users = {f"u{n}": (" ".join("a" * len(user_times.split())), user_times) for n, user_times in enumerate(times)}
    protocol = dataclasses.replace(SMALL, validation_from=0.5, test_from=0.75)
    with pytest.raises(InputError, match="validation_from, test_from: split at") as error:
        load_dataset(write(tmp_path / "d", users), protocol)
    assert message in str(error.value)


def test_without_times_it_says_what_writes_them(by_hand):
    (by_hand / "times.tsv").unlink()
    with pytest.raises(InputError, match="times.tsv: no such file.*import writes it where the source has timestamps"):
        load_dataset(by_hand, SMALL)


@pytest.fixture
def timed(tmp_path) -> Path:
    """Write a dataset's folder with times: 60 users, 40 items, histories that go round in steps."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 60)
    histories = [[(start + 3 * i) % 40 + 1 for i in range(n)] for start, n in zip(rng.integers(0, 40, 60), lengths)]
    root = write_dataset_folder(tmp_path / "timed", make_sequences(histories, items=40))
    times = [np.sort(rng.integers(0, 1000, n)) for n in lengths]
    lines = (f"u{user}\t{' '.join(map(str, user_times))}\n" for user, user_times in enumerate(times))
    (root / "times.tsv").write_text("".join(lines))
    return root


def test_a_run_trains_resumes_and_is_evaluated_again(timed, tmp_path):
    config = RunConfig(
        dataset=str(timed),
        protocol=ProtocolConfig(split="temporal"),
        model=ModelConfig(method="id", embedding_dim=16),
        train=TrainConfig(batch_users=16, max_epochs=3),
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(config, whole, CPU)

    class Stop(Exception):
        pass

    def stop(line: dict) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(config, stopped, CPU, stop)
    assert resume(stopped, CPU) == result
    assert evaluate_run(whole, "test", EvaluationConfig(), CPU)["test"] == result["test"]
    assert result["test"]["users"] == len(RunFolder.open(whole).sequences.split("test").users) < 60


def test_the_command_line(timed, tmp_path):
    temporal = ("--split", "temporal", "--validation-from", 0.7, "--test-from", 0.85)
    left, by_time = (json.loads(iisan_fast("stats", timed, *more, "--json").stdout) for more in ((), temporal))
    assert left["test_targets"] == left["users"] == 60 and 0 < by_time["test_targets"] < 60
    out = ("--out", tmp_path / "run")
    arguments = ("--method", "id", "--epochs", 1, "--embedding-dim", 16, *out)
    assert iisan_fast("train", timed, *temporal, *arguments, "--max-inputs", 5).returncode == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["protocol"] == {
        "min_interactions": 5,
        "missing_captions": "error",
        "max_inputs": 5,
        "unescape_titles": True,
        "split": "temporal",
        "validation_from": 0.7,
        "test_from": 0.85,
    }
    assert "leave out --split" in refused("train", "--resume", tmp_path / "run", "--split", "temporal")


def test_the_command_line_refuses(timed, tmp_path):
    cache = tmp_path / "cache"
    items = [f"i{number}" for number in range(1, 39)]
    fill_store(cache, items, random_table([(2, 16)], len(items), torch.float32), ("title",))
    message = refused("train", timed, "--cache", cache, "--split", "temporal", "--out", tmp_path / "run")
    assert "lacks 2 of 40 items (i39, i40); run iisan-fast extract with the same split" in message
    assert "temporal split; give a dataset" in refused("train", "--split", "temporal", "--out", tmp_path / "run")
    assert "leave-one-out takes no shares" in refused("stats", timed, "--test-from", 0.95)
    for shares in ((0.9, 0.8), (0, 0.5), (0.5, 1), (float("nan"), 0.5)):
        options = ("--split", "temporal", "--validation-from", shares[0], "--test-from", shares[1])
        assert "expected ascending shares between 0 and 1" in refused("stats", timed, *options)
    assert "--split" in refused("stats", timed, "--split", "random")
    (timed / "times.tsv").unlink()
    assert "iisan-fast import writes it where" in refused("stats", timed, "--split", "temporal")
    assert not (tmp_path / "run").exists()
