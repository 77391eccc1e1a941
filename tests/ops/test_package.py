"""The package is loaded once, under its own name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


FROM_THE_ROOT = """
import transformers
from transformers.utils import is_kernels_available
import kernels
assert not is_kernels_available() and not hasattr(kernels, "side_tower")
try:
    import kernels.reference
except ImportError:
    print("absent")
import iisan_fast.kernels
assert iisan_fast.kernels.side_tower
"""


@pytest.mark.slow
def test_the_kernels_folder_is_no_package_of_its_own():
    """In the repository root, `import kernels` finds this folder; transformers must take the package for missing."""
    result = subprocess.run([sys.executable, "-c", FROM_THE_ROOT], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "absent", result.stderr


@pytest.mark.slow
def test_a_checkout_works_without_the_editable_install():
    """Python started in the repository root, without the editable install's hooks, finds kernels and cli."""
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    script = "import iisan_fast.cli, iisan_fast.kernels; print(iisan_fast.kernels.__file__)"
    command = [sys.executable, "-S", "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), result.stderr
