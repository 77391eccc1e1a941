"""The commands recommend and evaluate on several ranks: rank 0 writes and prints what one process does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.rank_processes import run_on_ranks
from helpers.ranking_calls import command, commands
from iisan_fast.serving import recommendation

pytest.importorskip("polars")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ON_CPU = ["--device", "cpu", "--quiet"]


@pytest.fixture
def users(tmp_path) -> Path:
    """Return a file of two users, fewer than there are ranks; one has no history."""
    file = tmp_path / "users.jsonl"
    rows = [{"user_id": "a", "history": ["i3", "i7"]}, {"user_id": "b", "history": []}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def unfolded(text: str) -> str:
    """Return a text without white space, so that long paths in tables are whole."""
    return "".join(text.split())


def test_rank_0_writes_the_bytes_of_one_process(run_with_terms, users, tmp_path, monkeypatch):
    def calls(folder: Path) -> list[list[str]]:
        folder.mkdir()
        recommend = ["recommend", str(run_with_terms), *ON_CPU]
        return [
            [*recommend, "--out", f"{folder / 'best.jsonl'}"],
            [*recommend, "--out", f"{folder / 'best.csv'}", "--top-k", "3", "--keep-history", "--deny", "i1,i2"],
            [*recommend, "--out", f"{folder / 'best.parquet'}", "--json"],
            [*recommend, "--out", f"{folder / 'few.jsonl'}", "--users", str(users)],
            [*recommend, "--top-k", "149"],
            [*recommend, "--history", "i3,i7,i12"],
            [*recommend, "--history", "i3,i7,i12", "--json"],
            ["evaluate", str(run_with_terms), *ON_CPU, "--fit-terms", "--json"],
            ["evaluate", str(run_with_terms), *ON_CPU, "--split", "validation", "--k", "5"],
        ]

    monkeypatch.setattr(recommendation, "USERS_AT_ONCE", 7)
    of_one, of_many = tmp_path / "one", tmp_path / "many"
    expected = [command(words) for words in calls(of_one)]
    first, *others = run_on_ranks(3, commands, calls(of_many), 7)
    assert [error for _, error in first] == [""] * len(expected)
    for (printed, _), (of_one_process, _) in zip(first, expected):
        assert unfolded(printed).replace(str(of_many), str(of_one)) == unfolded(of_one_process) != ""
    assert others == [[("", "")] * len(expected)] * 2
    files = sorted(file.name for file in of_one.iterdir())
    assert files == sorted(file.name for file in of_many.iterdir()) != []
    for name in files:
        assert (of_one / name).read_bytes() == (of_many / name).read_bytes(), name


def test_all_ranks_refuse_bad_input(run_with_terms, tmp_path):
    damaged = shutil.copytree(run_with_terms, tmp_path / "damaged")
    content = (damaged / "best.safetensors").read_bytes()
    (damaged / "best.safetensors").write_bytes(content[:-100])
    calls = [
        ["evaluate", str(damaged), *ON_CPU],
        ["recommend", str(damaged), *ON_CPU],
        ["recommend", str(run_with_terms), *ON_CPU, "--top-k", "150"],
        ["recommend", str(run_with_terms), *ON_CPU, "--out", str(tmp_path / "missing" / "best.csv")],
    ]
    expected = [command(words) for words in calls]
    assert run_on_ranks(2, commands, calls, 7) == [expected] * 2
    assert [out for out, _ in expected] == [""] * len(calls)
    for (_, message), part in zip(expected, ("best.safetensors: ", "best.safetensors: ", "k: expected", "--out: ")):
        assert part in message


def test_ranks_refuse_to_rank_by_different_runs(run_with_terms, plain_run, tmp_path):
    for rank, run in enumerate((run_with_terms, plain_run)):
        (tmp_path / f"run-{rank}").symlink_to(run)
    calls = [[name, str(tmp_path / "run-{rank}"), *ON_CPU] for name in ("evaluate", "recommend")]
    ((of_evaluate, of_recommend),) = {tuple(results) for results in run_on_ranks(2, commands, calls, 7)}
    for out, message in (of_evaluate, of_recommend):
        assert out == "" and message.startswith("rank 1 on ") and "differs from rank 0: run." in message


@pytest.mark.long
def test_torchrun_recommends_and_evaluates(run_with_terms, tmp_path):
    for name in ("one.csv", "two.csv"):
        launcher = [] if name == "one.csv" else TORCHRUN
        words = ["recommend", str(run_with_terms), "--device", "cpu", "--out", str(tmp_path / name)]
        program([*launcher, "-m", "iisan_fast", *words])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes() != b""
    evaluate = ["-m", "iisan_fast", "evaluate", str(run_with_terms), "--device", "cpu", "--json"]
    assert json.loads(program([*TORCHRUN, *evaluate])) == json.loads(program(evaluate))


def program(words: list[str]) -> str:
    """Return the standard output of Python with these words. Raises CalledProcessError if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
