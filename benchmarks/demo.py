"""The embedded demo as a user meets it: `iisan-fast train` in a folder of its own, its figures and its time.

python -m iisan_fast.benchmarks.demo
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..training import environment

RESULT = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    program = Path(sys.executable).with_name("iisan-fast")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [program, "train", "--json"]
        printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        seconds = time.perf_counter() - started
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "command": "python -m iisan_fast.benchmarks.demo",
        "commit": commit,
        "environment": environment(torch.device("cpu")),
        "seconds": seconds,
        **json.loads(printed),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{seconds:.0f} s, HR@10 {result['test']['masked']['hr@10']:.4f}")


if __name__ == "__main__":
    main()
