"""Run the stages one after the other, each in a process with a time limit, and write down each result as it ends.

Only the standard library is imported here: what fails to import fails within a stage, and the next one goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

BUDGET = 480.0  # seconds for all stages together
LEAST_TIME = 10.0  # seconds; with less of the budget left no stage is started
LAST_WORDS = 5.0  # seconds of a stage's limit: it is interrupted then, so that pytest says why tests failed
FILE_LIMIT = 16 << 20  # bytes; every result file is smaller
RESULTS, LOG = "results.json", "log.txt"
OTHER_FILES = ("profile.txt", "trace-captured.json.gz", "trace-eager.json.gz")  # of the stage "epochs"
NOT_MEASURED = "not measured"
ERROR_LINES = 5  # of a failed stage's log, which its result repeats


@dataclass(frozen=True)
class Stage:
    """A part of the measurement."""

    name: str
    limit: float  # seconds
    measures: str


STAGES = (
    Stage("versions", 30, "driver, GPU, torch, triton, transformers, Python, commit"),
    Stage("step", 90, "a training step, eager and captured: its loss and gradients against the reference in fp64"),
    Stage("epochs", 120, "captured epochs, captures apart, peak memory, a profile by kernel"),
    Stage("ops", 90, "loss and side network at 8,192 users, by replays of a graph"),
    Stage("evaluation", 60, "all users over the whole catalogue"),
    Stage("step-tests", 120, "the GPU tests of the training step"),
    Stage("kernel-tests", 90, "a part of the kernels' GPU tests"),
    Stage("extraction", 90, "ViT-B/16 and BERT-base of random weights over the catalogue: items a second"),
    Stage("dense", 60, "the released code's step beside the captured one"),
    Stage(
        "ranks", 180, "training on 1, 2, 4 … GPUs by torchrun, if there are several: the losses of one, and its time"
    ),
)


@dataclass(frozen=True)
class Measurement:
    """A call of the script: the stages, their dataset, and the folder of their results."""

    dataset: Path
    out: Path
    stages: tuple[Stage, ...]
    budget: float = BUDGET
    commit: str | None = None  # None: as git says
    dry_run: bool = False


def run(measurement: Measurement) -> int:
    """Run the stages of a measurement and return the exit code: 0 where all of them are done, else 1."""
    measurement.out.mkdir(parents=True, exist_ok=True)
    for name in (LOG, *OTHER_FILES):
        (measurement.out / name).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = [
        {"stage": stage.name, "measures": stage.measures, "status": NOT_MEASURED} for stage in measurement.stages
    ]
    ends = time.monotonic() + measurement.budget
    write_results(measurement, rows)
    for stage, row in zip(measurement.stages, rows):
        left = ends - time.monotonic()
        if left < LEAST_TIME:
            row["reason"] = f"{max(left, 0):.0f} s of the budget of {measurement.budget:.0f} s were left"
        else:
            row |= run_stage(stage, measurement, min(stage.limit, left))
        write_results(measurement, rows)
        print(f"{stage.name}: {row['status']}{summary(row)}", flush=True)
    for note in limit_files(measurement.out):
        print(note)
    return 0 if all(row["status"] == "done" for row in rows) else 1


def run_stage(stage: Stage, measurement: Measurement, limit: float) -> dict[str, Any]:
    """Run one stage in a process group of its own and return its row: status, seconds, result or error."""
    started = time.monotonic()
    with TemporaryDirectory(prefix="on-gpu-") as folder, (measurement.out / LOG).open("a") as log:
        print(f"\n==== {stage.name}, at most {limit:.0f} s", file=log, flush=True)
        begins = log.tell()
        result = Path(folder) / "result.json"
        code = wait_for(command(stage, measurement, result), log, limit)
        row: dict[str, Any] = {"seconds": time.monotonic() - started, "limit_s": limit}
        # A stage saves its result again and again, so one that was stopped has some of it.
        row["result"] = json.loads(result.read_text()) if result.exists() else NOT_MEASURED
    if code is None:
        return {"status": "stopped", "reason": f"its time limit of {limit:.0f} s", **row}
    if code:
        return {
            "status": "failed",
            "reason": f"exit code {code}",
            "error": last_lines(measurement.out / LOG, begins),
            **row,
        }
    return {"status": "done", **row}


def command(stage: Stage, measurement: Measurement, result: Path) -> list[str]:
    """Return the command that runs a stage and saves its result."""
    options = ["--dry-run"] * measurement.dry_run + (["--commit", measurement.commit] if measurement.commit else [])
    paths = ["--dataset", str(measurement.dataset), "--out", str(measurement.out), "--result", str(result)]
    return [sys.executable, "-m", "iisan_fast.benchmarks.on_gpu.stages", stage.name, *paths, *options]


def wait_for(words: list[str], log: TextIO, limit: float) -> int | None:
    """Run a command into the log and return its exit code; None where it was stopped at its limit.

    All that it started and left running is stopped with it, also where this process is interrupted.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(limit - LAST_WORDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return None
    finally:
        with suppress(ProcessLookupError):  # where all of the group have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_results(measurement: Measurement, rows: list[dict[str, Any]]) -> None:
    """Write results.json anew; whoever reads it meanwhile finds the old one or the new one."""
    whole = {
        "dataset": measurement.dataset.name,
        "dry_run": measurement.dry_run,
        "budget_s": measurement.budget,
        "stages": rows,
    }
    temporary = measurement.out / f".{RESULTS}"
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(measurement.out / RESULTS)


def summary(row: dict[str, Any]) -> str:
    """Return the text printed after a stage's status: its seconds, a reason, lines of an error, a headline.

    row: the stage's row in results.json; `seconds`, `reason`, `error` and `result` may be absent.
    """
    seconds = f" in {row['seconds']:.0f} s" if "seconds" in row else ""
    reason = f" ({row['reason']})" if "reason" in row else ""
    result = row.get("result")
    headline = result.get("headline", "") if isinstance(result, dict) else ""
    return "\n    ".join([seconds + reason, *row.get("error", []), *([headline] if headline else [])])


def last_lines(path: Path, begins: int) -> list[str]:
    """Return the last lines of a log, from a position on."""
    with path.open() as file:
        file.seek(begins)
        return file.read().strip().splitlines()[-ERROR_LINES:]


def limit_files(out: Path, limit: int = FILE_LIMIT) -> list[str]:
    """Cut a log and remove a profile that is too large; return what was done, a line each."""
    notes = []
    for name in (LOG, *OTHER_FILES):
        path = out / name
        if not path.exists() or path.stat().st_size < limit:
            continue
        if name == LOG:
            path.write_bytes(path.read_bytes()[-limit // 2 :])
            notes.append(f"{name}: only its end was kept, it had more than {limit:,} bytes")
        else:
            path.unlink()
            notes.append(f"{name}: removed, it had more than {limit:,} bytes")
    assert (out / RESULTS).stat().st_size < limit, f"{RESULTS}: expected fewer than {limit:,} bytes"
    return notes
