"""The table of launch configurations is complete, and every entry compiles within the limits of its GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from iisan_fast.benchmarks import machine_code
from iisan_fast.kernels import AddedScores, as_architecture, recording
from iisan_fast.kernels.gpu import configurations, target_rank

ROOT = Path(__file__).parents[2]
KILOBYTES = {80: 163, 89: 99, 90: 227}  # of shared memory, by architecture
# Bytes that a thread may spill. The tables are made for Triton 3.6, which the machines with GPUs have; its successors'
# assembler may fill the registers otherwise.
SPILLED_BYTES = 0 if triton.__version__.startswith("3.6.") else 32


@pytest.mark.parametrize(
    ("dtype", "architectures", "options"),
    [
        pytest.param("bfloat16", (90,), [], marks=pytest.mark.slow),
        pytest.param("bfloat16", (80, 89), [], marks=pytest.mark.long),
        pytest.param("float32", (80, 89, 90), [], marks=pytest.mark.long),
        pytest.param("bfloat16", (90,), ["--other-forms"], marks=pytest.mark.long),
    ],
)
def test_every_kernel_compiles_ahead_of_time_within_a_gpus_means(dtype, architectures, options):
    """Check that shared memory fits and no register is spilled. sm_89 has the default configuration."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ahead_of_time.py"), "--dtype", dtype]
    command += [*options, "--architecture", *map(str, architectures)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    seen = {(line["kernel"], line["architecture"], line["size"]) for line in lines}
    sizes = {name: {size for _, size in entries} for name, entries in configurations.CONFIGURATIONS.items()}
    of_dtype = {configurations.ANY_SIZE} | ({"fp32"} if dtype == "float32" else {"small", "large", "wide"})
    expected = set()
    for name in sizes:
        expected |= set(product([name], architectures, sizes[name] & of_dtype))
    assert seen == expected
    for line in lines:
        if line["spilled"]:
            warnings.warn(f"Triton {triton.__version__} spills registers: {line}", stacklevel=1)
        assert line["shared"] <= KILOBYTES[line["architecture"]] * 1024, line
        assert line["spilled"] <= SPILLED_BYTES, line


def test_the_table_of_configurations_is_whole():
    for name, entries in configurations.CONFIGURATIONS.items():
        sizes = configurations.SIZES if name.startswith("side_") else configurations.ROW_SIZES
        if name.startswith("fold_"):
            sizes = configurations.WEIGHT_SIZES
        if ("default", configurations.ANY_SIZE) in entries:
            sizes = (configurations.ANY_SIZE,)
            assert {size for _, size in entries} == {*sizes}, name
        assert {("default", size) for size in sizes} <= entries.keys(), name
        tiles = {frozenset(entry.blocks) for entry in entries.values()}
        assert len(tiles) == 1, f"{name}: entries name different tiles"


@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("users", "d", "dtype"), [(65, 64, "bfloat16"), (8191, 64, "float16"), (8191, 192, "float32")])
def test_both_kernels_of_the_rank_multiply_alike(users, d, dtype, architecture):
    """Check that all products have one shape and start from zero: a sum within a product would be rounded once less."""
    dtype = getattr(torch, dtype)
    launched = []
    with recording(launched.append), as_architecture(f"sm_{architecture}"):
        zeros = torch.zeros(users, dtype=torch.int64)
        added = AddedScores(torch.arange(users + 1), zeros, torch.zeros(users, dtype=dtype))
        queries, items = (torch.zeros(count, d, dtype=dtype) for count in (users, 12_901))
        target_rank.target_rank(queries, items, zeros, zeros[:, None], added=added)
    products = []
    for reading in machine_code.readings([machine_code.specialization(one, architecture) for one in launched]):
        dots = re.findall(r"tt\.dot (%[^,]+), (%[^,]+), (%\S+).*: (.+) loc", reading.ir)
        assert dots and all(start.startswith(("%cst", "%scores")) for *_, start, _ in dots)
        products.append(sorted(shape for *_, shape in dots))
    assert len(products) == 2 and products[0] == products[1]
