"""Run the tests of the C++ with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

They find reads and writes outside of a tensor, uses after it is freed, and undefined behaviour. The first one stops the
run with a report. Without optimisation it takes about ten minutes on two cores, half of it for compiling.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O0 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
RUNTIMES = ("libasan.so", "libstdc++.so")  # in the process before torch, and before the sanitizer looks for exceptions
TESTS = (
    *("tests/ops/test_entries_cpu.py", "tests/ops/test_workers_cpu.py", "tests/ops/test_sums.py"),
    *(f"tests/ops/test_{op}_cpu.py" for op in ("fold_heads", "inbatch_cross_entropy", "sequence_encoder")),
    *(
        "tests/ops/test_side_towers_cpu.py",
        "tests/ops/test_wrong_arguments_cpu.py",
        "tests/training/test_fused_step.py",
        "tests/training/test_optimizer.py",
    ),
)
COMPILE = """
import sys
from helpers.compiler import compile_library
from iisan_fast import kernels
compile_library()
sys.exit(kernels.why_no_library() or 0)
"""


def compiler() -> str:
    """Return the value of CXX for a compiler with the sanitizers, which runs without their runtimes itself."""
    return f"sh -c 'unset LD_PRELOAD; exec c++ \"$@\" {FLAGS}' c++"


def runtimes() -> str:
    """Return the value of LD_PRELOAD for a Python that loads what this compiler makes."""
    ask = ["c++", *(f"-print-file-name={name}" for name in RUNTIMES)]
    paths = [subprocess.run([ask[0], word], capture_output=True, text=True, check=True).stdout for word in ask[1:]]
    return " ".join(path.strip() for path in paths)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables with which Python uses the sanitizers; folder: where the compiled library stays."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "CXX": compiler(),
        "IISAN_FAST_COMPILED": str(folder),
        "LD_PRELOAD": runtimes(),
        "PYTHONPATH": str(ROOT / "tests"),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main() -> int:
    """Compile the C++ and run its tests; return the exit status."""
    variables = environment(ROOT / "build" / "sanitized")
    pytest = ["-m", "pytest", "-q", "--capture=no", "-p", "no:cacheprovider", "-m", "not long", *TESTS, *sys.argv[1:]]
    for arguments in (["-c", COMPILE], pytest):
        if status := subprocess.run([sys.executable, *arguments], env=variables, cwd=ROOT).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
