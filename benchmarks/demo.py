"""Run `iisan-fast train` on the embedded demo in an empty folder; record its figures and its time.

python -m iisan_fast.benchmarks.demo [--out FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

import torch

from .harness import DEMO, script_parser, write_result
from .machine import origin

COMMAND = "python -m iisan_fast.benchmarks.demo"


def main() -> None:
    """Run the demo and print its figures."""
    parser = script_parser(COMMAND, __doc__)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "iisan_fast", "train", "--json"]
        printed = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds = time.perf_counter() - started
    result = {"command": COMMAND, **origin(DEMO, torch.device("cpu")), "seconds": seconds, **json.loads(printed)}
    if arguments.out is not None:
        write_result(arguments.out, result)
    rates = (f"{name} {result[name]['masked']['hr@10']:.4f}" for name in ("test", "popularity", "neighbours"))
    print(f"{seconds:.0f} s, HR@10: {', '.join(rates)}")


if __name__ == "__main__":
    main()
