"""The GPU script without a GPU: its stages in a dry run, limits of time and size, and what its machine lacks."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks import machine, op_rows
from iisan_fast.benchmarks.on_gpu import common, gpu_tests, profiles, runner, stages
from iisan_fast.benchmarks.on_gpu.runner import NOT_MEASURED, Measurement, Stage
from iisan_fast.benchmarks.on_gpu.settings import DRY_RUN, Settings
from iisan_fast.errors import InputError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
STAGES = {stage.name: stage for stage in runner.STAGES}
# Packages that may be imported when tests are collected: the project requires them, or the script's head names them.
ON_THE_MACHINE = {"click", "lmdb", "numpy", "PIL", "rich", "safetensors", "torch", "transformers", "triton"}
ON_THE_MACHINE |= {"hypothesis", "pytest", "setuptools"} | {"huggingface_hub", "tokenizers", "yaml"}  # transformers'
ON_THE_MACHINE |= {"filelock", "markdown_it", "platformdirs", "scipy"}  # required by the project, or by rich
ON_THE_MACHINE |= {"helpers", "iisan_fast"}


@pytest.fixture
def dataset(tmp_path) -> Path:
    histories = [[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(24)]
    return write_dataset_folder(tmp_path / "toy", make_sequences(histories, items=40))


# The runner, with commands of a line of Python for stages


@pytest.fixture
def run_lines(tmp_path, monkeypatch):
    """Return a function that runs stages of a line of Python each and returns (exit code, rows by stage)."""

    def run(lines: dict[str, str], limit: float = 60, budget: float = 480) -> tuple[int, dict[str, dict[str, Any]]]:
        def command(stage: Stage, measurement: Measurement, result: Path) -> list[str]:
            names = f"result, out = {str(result)!r}, {str(measurement.out)!r}"
            return [sys.executable, "-c", f"import json, os, sys, time; {names}\n{lines[stage.name]}"]

        monkeypatch.setattr(runner, "command", command)
        chosen = tuple(Stage(name, limit, "something") for name in lines)
        code = runner.run(Measurement(tmp_path / "toy", tmp_path, chosen, budget))
        return code, {row["stage"]: row for row in results(tmp_path)["stages"]}

    return run


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / runner.RESULTS).read_text())


SAVES = "open(result, 'w').write(json.dumps({'figure': 7}))"


def test_a_stage_that_fails_says_why_and_the_next_goes_on(run_lines, capsys):
    code, rows = run_lines({"broken": "sys.exit('no such kernel')", "sound": SAVES})
    assert code == 1
    assert rows["broken"]["status"] == "failed" and rows["broken"]["error"] == ["no such kernel"]
    assert rows["broken"]["result"] == NOT_MEASURED
    assert rows["sound"]["status"] == "done" and rows["sound"]["result"] == {"figure": 7}
    assert "no such kernel" in capsys.readouterr().out
    assert run_lines({"sound": SAVES})[0] == 0


def test_results_are_there_as_each_stage_ends(run_lines):
    """The second stage copies what it finds into its own result."""
    copies = "open(result, 'w').write(open(out + '/results.json').read())"
    _, rows = run_lines({"first": SAVES, "second": copies})
    first, second = rows["second"]["result"]["stages"]
    assert first["status"] == "done" and first["result"] == {"figure": 7}
    assert second["status"] == NOT_MEASURED


@pytest.mark.slow
def test_a_stage_is_interrupted_before_it_is_stopped(run_lines, monkeypatch):
    monkeypatch.setattr(runner, "LAST_WORDS", 20.0)
    _, rows = run_lines({"slow": f"try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    {SAVES}"}, limit=22)
    assert rows["slow"]["status"] == "stopped" and rows["slow"]["result"] == {"figure": 7}


@pytest.mark.slow
def test_a_stage_beyond_its_limit_is_stopped_with_what_it_started_and_leaves_what_it_saved(
    run_lines, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "LAST_WORDS", 0.5)
    child = "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    tells = "open(out + '/child', 'w').write(str(child.pid))"
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    code, rows = run_lines({"slow": f"{deaf}; {SAVES}; {child}; {tells}; time.sleep(600)", "next": SAVES}, limit=3)
    assert code == 1 and rows["slow"]["status"] == "stopped" and rows["slow"]["result"] == {"figure": 7}
    assert "its time limit of 3 s" in rows["slow"]["reason"] and rows["next"]["status"] == "done"
    assert not is_running(int((tmp_path / "child").read_text()))


def is_running(process: int) -> bool:
    """Tell whether a process still runs; one that has ended but is not waited for does not."""
    for _ in range(50):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_no_stage_starts_once_the_budget_is_spent(run_lines, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_TIME", 1.0)
    monkeypatch.setattr(runner, "LAST_WORDS", 0.5)
    code, rows = run_lines({"first": f"{SAVES}; time.sleep(600)", "second": SAVES}, budget=2)
    assert code == 1 and rows["first"]["status"] == "stopped" and rows["first"]["limit_s"] <= 2
    assert rows["second"] == {
        "stage": "second",
        "measures": "something",
        "status": NOT_MEASURED,
        "reason": "0 s of the budget of 2 s were left",
    }


def test_files_stay_within_their_limit(tmp_path):
    (tmp_path / runner.RESULTS).write_text("{}")
    (tmp_path / runner.LOG).write_text("begin" + "x" * 995 + "end")
    for name, size in zip(runner.OTHER_FILES, (999, 1000, 5)):
        (tmp_path / name).write_bytes(bytes(size))
    notes = runner.limit_files(tmp_path, limit=1000)
    assert [note.split(":")[0] for note in notes] == [runner.LOG, "trace-captured.json.gz"]
    assert (tmp_path / runner.LOG).read_text().endswith("end") and (tmp_path / runner.LOG).stat().st_size == 500
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {runner.RESULTS, runner.LOG, *runner.OTHER_FILES} - {"trace-captured.json.gz"}
    )
    assert len({runner.RESULTS, runner.LOG, *runner.OTHER_FILES}) <= 8 and runner.FILE_LIMIT == 16 << 20


def test_the_whole_fits_eight_minutes_and_the_first_two_stages_two():
    assert runner.BUDGET == 480
    names = [*STAGES]
    assert names[:2] == ["versions", "step"] and STAGES["versions"].limit + STAGES["step"].limit <= 120
    assert names == [*stages.MODULES]


# The stages, on a CPU


def measure(stage: str, dataset: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Run one stage's dry run in this process and return its result."""
    settings = Settings(stage, dataset, tmp_path, "abc", **DRY_RUN | changes)
    stages.measure(settings, tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
def test_the_step_agrees_with_the_reference(dataset, tmp_path):
    result = measure("step", dataset, tmp_path)
    assert [row["form"] for row in result["forms"]] == ["eager float32", "captured float32", "reference ops, float32"]
    for row in result["forms"]:
        assert row["status"] == "agrees" and 0 < row["gradient_error"] < 1e-5 and row["loss_error"] < 1e-6
        assert len(row["next_losses"]) == 2  # of an epoch of three steps
    assert result["origin"]["environment"]["device"] == "cpu" and result["origin"]["commit"]
    assert 0 < result["counted"]["launches"] <= 30 and result["counted"]["graph_nodes"] == NOT_MEASURED


def test_a_step_that_leaves_the_reference_or_does_not_run_fails_the_stage(dataset, tmp_path, monkeypatch):
    from iisan_fast.benchmarks.on_gpu import step

    differentiated = step.differentiated
    seen = []

    def second_is_off_and_third_raises(model, loss):
        seen.append(loss)
        if len(seen) == 4:
            raise RuntimeError("no such device")
        result = differentiated(model, loss)
        result.gradients["sequence_encoder.position"] *= 1.1 if len(seen) == 3 else 1
        return result

    monkeypatch.setattr(step, "differentiated", second_is_off_and_third_raises)
    with pytest.raises(SystemExit, match="captured float32, reference ops, float32"):
        measure("step", dataset, tmp_path)
    rows = json.loads((tmp_path / "result.json").read_text())["forms"]
    assert [row["status"] for row in rows] == ["agrees", "leaves the reference", "fails"]
    assert rows[1]["worst"] == {"sequence_encoder.position": pytest.approx(0.1, rel=1e-3)}
    assert rows[2]["reason"] == "RuntimeError: no such device"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (NOT_MEASURED, ""),
        ({"kernel": 22, "memset": 1, "empty": 3}, ""),
        ({"kernel": 24}, "expected 23 launches as counted without a GPU, found 24 in the graph: 24 kernel"),
    ],
)
def test_a_graph_with_other_launches_than_counted_is_named(nodes, expected):
    from iisan_fast.benchmarks.on_gpu import launch_check

    assert launch_check.disagreement({"launches": 23, "graph_nodes": nodes}) == expected


def test_a_step_whose_graph_has_other_launches_fails_the_stage(dataset, tmp_path, monkeypatch):
    from iisan_fast.benchmarks.on_gpu import step

    monkeypatch.setattr(step, "forms_of", lambda settings: {})
    monkeypatch.setattr(step, "compare_launches", lambda *_: {"launches": 23, "graph_nodes": {"kernel": 25}})
    with pytest.raises(SystemExit, match="step: expected 23 launches"):
        measure("step", dataset, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["counted"]["graph_nodes"] == {"kernel": 25}


def test_epochs_are_timed_once_their_shapes_are_captured_and_profiled(dataset, tmp_path):
    result = measure("epochs", dataset, tmp_path)
    (row,) = result["forms"].values()
    assert row["capture_s"] > 0 and len(row["epoch_s"]) == DRY_RUN["epochs"]
    assert row["mean_loss"] > 0 and row["peak_cuda_bytes"] == row["step_on_device_ms"] == NOT_MEASURED
    for name in ("captured", "eager"):
        profile = result["profiles"][name]
        assert profile["launches_a_step"] > 10 and profile["busy_us_a_step"] > 0 and profile["kernels"]
        assert (tmp_path / f"trace-{name}.json.gz").stat().st_size > 1000
    table = (tmp_path / "profile.txt").read_text()
    assert "captured, 2 steps" in table and "eager, 3 steps" in table and "aten::" in table


@pytest.mark.slow
def test_ops_evaluation_and_the_dense_form_are_measured(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(op_rows, "CPU_SECONDS", 0.001)
    rows = measure("ops", dataset, tmp_path, many_users=8192)["rows"]  # more than there are
    assert {(row["op"], row["users"]) for row in rows} == {
        (op, users) for op in ("loss", "side-network", "target-rank") for users in (24, 8)
    }
    assert all(row["status"] == op_rows.MEASURED and row["timed"] for row in rows)
    evaluation = measure("evaluation", dataset, tmp_path)
    assert evaluation["users"] == 24 and evaluation["catalogue"] == 40
    assert all(row["evaluation"]["p50_s"] > 0 for row in evaluation["forms"])
    dense, captured = measure("dense", dataset, tmp_path)["forms"]
    assert dense["ratio"] == 1 and dense["largest_loss_difference"] == 0 < captured["ratio"]
    assert captured["largest_loss_difference"] < 1e-5


@pytest.mark.slow
def test_extraction_is_measured_from_memory_and_whole(dataset, tmp_path):
    rows = measure("extraction", dataset, tmp_path)["rows"]
    assert [(row["form"], row["source"]) for row in rows] == [
        (form, source) for form in ("from memory", "fast") for source in ("image", "title")
    ]
    assert [row["items"] for row in rows] == [8, 8, 40, 40]
    assert all(row["items_per_second"] == row["items"] / row["seconds"] > 0 for row in rows)
    assert {row["peak_cuda_bytes"] for row in rows} == {NOT_MEASURED}


def test_the_headline_adds_up_the_times_of_both_encoders():
    from iisan_fast.benchmarks.on_gpu import extraction

    rows = [
        extraction.row_of("fast", "image", extraction.Measured(2.0, None, 7, items=100)),
        extraction.row_of("fast", "title", extraction.Measured(1.0, None, 7, items=100)),
    ]
    assert extraction.headline(rows) == "fast: 33 items a second, image and title"


def test_versions_say_what_is_not_measured(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: None)  # as in a copy without .git
    result = measure("versions", dataset, tmp_path)
    assert result["gpu"] == NOT_MEASURED and result["packages"]["pytest"] == pytest.__version__
    assert result["headline"].startswith("device cpu, torch 2.") and result["origin"]["commit"] == "abc"


def test_a_copy_without_git_has_no_commit_unless_one_is_given(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: None)
    settings = Settings("versions", dataset, tmp_path, commit=None, **DRY_RUN)
    assert common.origin_of(settings)["commit"] == NOT_MEASURED
    assert common.origin_of(replace(settings, commit="abc"))["commit"] == "abc"


def test_kernels_are_added_up_by_name():
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        )

    kernels, span = profiles.by_kernel([event("a", 0, 2), event("b", 3, 13), event("a", 14, 18)], steps=2)
    assert kernels == [("b", 0.5, 5.0), ("a", 1.0, 3.0)] and span == 18


# The tests that a GPU runs


PYTEST_LINES = """\
tests/ops/test_loss_gpu.py::test_loss[a b] PASSED [ 20%]
tests/ops/test_loss_gpu.py::test_rank[(1, 2)] FAILED [ 40%]
tests/ops/test_loss_gpu.py::test_other SKIPPED (needs a second GPU) [ 60%]
tests/ops/test_loss_gpu.py::test_fixture ERROR [ 80%]
FAILED tests/ops/test_loss_gpu.py::test_rank[(1, 2)] - AssertionError: 3 != 4
ERROR tests/ops/test_loss_gpu.py::test_fixture - RuntimeError: out of memory
============= 5/20 tests collected (15 deselected) in 0.10s =============
""".splitlines(keepends=True)


def test_pytests_lines_are_counted_as_they_come():
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    seen = [result["passed"] + result["failed"] + result["skipped"] for _ in gpu_tests.counted(PYTEST_LINES, result)]
    assert seen[:4] == [1, 2, 3, 4]
    assert (result["passed"], result["failed"], result["skipped"], result["collected"]) == (1, 2, 1, 5)
    assert result["failures"] == {
        "tests/ops/test_loss_gpu.py::test_rank[(1, 2)]": "AssertionError: 3 != 4",
        "tests/ops/test_loss_gpu.py::test_fixture": "RuntimeError: out of memory",
    }
    assert result["headline"] == "1 passed, 2 failed, 1 skipped, 5 collected"


@pytest.mark.slow
def test_a_stage_of_tests_runs_pytest_and_fails_with_it(dataset, tmp_path, monkeypatch):
    file = tmp_path / "test_of_two.py"
    file.write_text("def test_good():\n    pass\n\ndef test_bad():\n    assert 3 == 4\n")
    monkeypatch.setattr(gpu_tests, "selection", lambda settings: [str(file)])
    with pytest.raises(SystemExit, match="exit code 1: 1 passed, 1 failed"):
        measure("step-tests", dataset, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["passed"], result["failed"]) == (1, 1)
    ((test, reason),) = result["failures"].items()
    assert test.endswith("test_of_two.py::test_bad") and reason == "assert 3 == 4"


@pytest.mark.parametrize("stage", ["step-tests", "kernel-tests"])
def test_the_chosen_tests_are_there_and_need_a_gpu(stage, dataset, tmp_path):
    words = gpu_tests.selection(Settings(stage, dataset, tmp_path, None))
    files = [Path(word) for word in words if word.endswith(".py")]
    assert files and all("pytest.mark.gpu" in file.read_text() for file in files)
    if stage == "kernel-tests":
        chosen = words[words.index("-k") + 1].split(" or ")
        names = [line.split("(")[0] for file in files for line in file.read_text().splitlines() if "def test_" in line]
        assert all(any(word in name for name in names) for word in chosen), chosen


def test_collecting_the_tests_needs_only_what_a_gpu_machine_has():
    """Packages that it may lack (polars, torchmetrics, …) are imported by pytest.importorskip, or within a test."""
    missing = {}
    beside = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}  # a program's folder is on its path
    for path in (ROOT / "tests").rglob("*.py"):
        statements = ast.parse(path.read_text()).body
        names = [alias.name for one in statements if isinstance(one, ast.Import) for alias in one.names]
        names += [one.module or "" for one in statements if isinstance(one, ast.ImportFrom)]
        roots = {name.partition(".")[0] for name in names} - ON_THE_MACHINE - beside - sys.stdlib_module_names
        if roots:
            missing[path.name] = roots
    assert not missing


# The script


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(words, capture_output=True, text=True, timeout=runner.BUDGET + 60, env=environment)


@pytest.mark.slow
def test_the_script_runs_the_chosen_stages(dataset, tmp_path):
    ended = script(dataset, tmp_path / "out", "--dry-run", "--stages", "versions")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = results(tmp_path / "out")["stages"]
    assert row["stage"] == "versions" and row["status"] == "done" and "versions: done" in ended.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {runner.RESULTS, runner.LOG}


@pytest.mark.long
def test_a_dry_run_goes_through_all_stages(dataset, tmp_path):
    ended = script(dataset, tmp_path / "out", "--dry-run")
    rows = results(tmp_path / "out")["stages"]
    assert [row["stage"] for row in rows] == [*STAGES]
    assert ended.returncode == 0 and {row["status"] for row in rows} == {"done"}, ended.stdout + ended.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {runner.RESULTS, runner.LOG, *runner.OTHER_FILES} and len(written) <= 8


def test_bad_input_gets_one_line(dataset, tmp_path):
    for arguments, message in (
        ((dataset,), "usage: on_gpu.sh DATASET OUT"),
        ((tmp_path / "nowhere", tmp_path / "out"), "expected a dataset folder, found nothing at"),
        ((tmp_path, tmp_path / "out"), f"expected items.tsv and users.tsv in {tmp_path}"),
        ((dataset, tmp_path / "out", "--stages", "step,stop"), "--stages: expected some of versions,step,"),
    ):
        ended = script(*arguments)
        assert not (tmp_path / "out").exists()
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1, ended


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_machine_without_a_gpu_is_named(dataset, tmp_path):
    with pytest.raises(InputError, match="device: this machine has 0 CUDA devices"):
        common.device_of(Settings("step", dataset, tmp_path, None))


@pytest.mark.parametrize("target", ["gpu", "gpu-benchmarks"])
def test_make_installs_nothing_from_a_registry(target):
    words = ["make", "--dry-run", target, "DATASET=data", "OUT=out", "PYTHON=some-python"]
    # Below `make test` a second make prints the folder that it enters, and takes the first one's variables.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert " pip " not in ended.stdout and "venv" not in ended.stdout
    first = "PYTHON=some-python benchmarks/on_gpu.sh data out" if target == "gpu" else "mkdir -p runs out"
    assert ended.stdout.splitlines()[0] == first and ended.stdout.count("some-python") >= 1
