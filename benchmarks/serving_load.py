"""Measure the service examples/serve.py under load: requests a second and their times, on this machine alone.

    python -m iisan_fast.benchmarks.serving_load EXPORTED --requests 2000 --clients 4

EXPORTED is a folder that `iisan-fast export` wrote. Each client sends one request after the other, over loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch

from ..errors import InputError
from .harness import folder_argument, run_script, script_parser, write_result
from .machine import origin

COMMAND = "python -m iisan_fast.benchmarks.serving_load"
SERVICE = Path(__file__).resolve().parent.parent / "examples" / "serve.py"
LIBRARIES = ("fastapi", "uvicorn", "onnxruntime", "httpx")
WARM_UP = 50  # requests before those that count
STARTS_WITHIN = 300  # seconds
LONGEST_HISTORY = 20
NOTES = {
    "requests": "one history of 1 to 20 random items each, ten items asked for; clients and service share the cores; "
    "each request is answered in one thread",
    "milliseconds": "from the call of a client to the end of its answer, over loopback, by kept connections",
    "start_seconds": "until the service answers: imports, checks of all files, tables and index",
}


class Answered(NamedTuple):
    """One request."""

    seconds: float
    status: int  # of HTTP; 0 if there was no answer


def main() -> None:
    """Measure the service over the folder that the command line names, and print the result."""
    parser = script_parser(COMMAND, __doc__)
    parser.add_argument("exported", type=folder_argument, help="a folder that iisan-fast export wrote")
    parser.add_argument("--requests", type=_number, default=2000, help="in all (%(default)s)")
    parser.add_argument("--clients", type=_number, default=4, help="at the same time (%(default)s)")
    arguments = parser.parse_args()
    result = measure(arguments.exported, arguments.requests, arguments.clients)
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        write_result(arguments.out, result)


def measure(exported: Path, requests: int, clients: int) -> dict[str, Any]:
    """Return the figures of the service over a folder, and where they come from.

    Raises InputError if the folder holds no export, or if the service does not start.
    """
    if not (exported / "export.json").is_file():
        raise InputError(f"{exported}: expected a folder of iisan-fast export, found no export.json")
    manifest = json.loads((exported / "export.json").read_text())
    bodies = request_bodies(exported, requests + WARM_UP)
    started = time.perf_counter()
    with served(exported) as address:
        start_seconds = time.perf_counter() - started
        send(address, bodies[:WARM_UP], clients)
        started = time.perf_counter()
        answers = send(address, bodies[WARM_UP:], clients)
        seconds = time.perf_counter() - started
    index = manifest["index"] or {"kind": None, "measured": None}
    return {
        "command": f"{COMMAND} EXPORTED --requests={requests} --clients={clients}",
        **origin("exported", torch.device("cpu")),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "notes": NOTES,
        "method": manifest["method"],
        "items": manifest["items"],
        "columns": manifest["columns"],
        "weights": manifest["weights"],
        "index": index["kind"],
        "recall": index["measured"],
        "requests": requests,
        "clients": clients,
        "start_seconds": start_seconds,
        **figures(answers, seconds),
    }


def figures(answers: list[Answered], seconds: float) -> dict[str, Any]:
    """Return the figures of requests that took `seconds` in all. Times are of those that were answered well."""
    times = [1000 * answer.seconds for answer in answers if answer.status == 200]
    quantiles = np.percentile(times, [50, 90, 99, 100]).tolist() if times else [None] * 4
    return {
        "requests_per_second": len(times) / seconds,
        "milliseconds": dict(zip(("p50", "p90", "p99", "largest"), quantiles)),
        "errors": len(answers) - len(times),
    }


def request_bodies(exported: Path, count: int) -> list[dict[str, Any]]:
    """Return the bodies of requests, each with a random history of an exported folder's items."""
    lines = (exported / "items.jsonl").read_text(encoding="utf-8").split("\n")
    item_ids = np.array([json.loads(line)["item_id"] for line in lines if line], dtype=object)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, LONGEST_HISTORY + 1, count)
    return [{"histories": [generator.choice(item_ids, length).tolist()], "k": 10} for length in lengths]


@contextmanager
def served(exported: Path) -> Iterator[str]:
    """Run the service over a folder on a free port of this machine, and yield its address.

    Raises InputError if it does not start; it ends with the block.
    """
    if not SERVICE.is_file():
        raise InputError(f"{SERVICE}: no such file; run the benchmark in a checkout")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(SERVICE), str(exported), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # requests run in parallel already
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _wait(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def _wait(process: subprocess.Popen[str], address: str) -> None:
    """Wait until a service answers. Raises InputError, with its message, if it ends or takes too long."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(f"the service did not start: {process.communicate()[1].strip()}")
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise InputError(f"the service did not start within {STARTS_WITHIN} s")


def send(address: str, bodies: list[dict[str, Any]], clients: int) -> list[Answered]:
    """Send requests by several clients at the same time, and return all answers."""

    def by_one(part: list[dict[str, Any]]) -> list[Answered]:
        with httpx.Client(base_url=address, timeout=60) as client:
            return [_answered(client, body) for body in part]

    with ThreadPoolExecutor(clients) as pool:
        parts = pool.map(by_one, [bodies[client::clients] for client in range(clients)])
        return [answer for part in parts for answer in part]


def _answered(client: httpx.Client, body: dict[str, Any]) -> Answered:
    """Send one request and return its time and status."""
    started = time.perf_counter()
    try:
        status = client.post("/recommend", json=body).status_code
    except httpx.HTTPError:
        status = 0
    return Answered(time.perf_counter() - started, status)


def _number(text: str) -> int:
    """Return a number from 1 of the command line. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return int(text)


if __name__ == "__main__":
    run_script(main)
