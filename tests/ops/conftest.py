"""Fixtures of the ops' tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from iisan_fast import kernels


@pytest.fixture
def on_a_gpu(monkeypatch) -> Iterator[None]:
    """Free the GPU's memory, name no form in the environment and do not interpret kernels."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "run the GPU tests without TRITON_INTERPRET=1"
    monkeypatch.delenv(kernels.FORM_VARIABLE, raising=False)
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Make torch.empty return NaN (and the largest integers), so that numbers that a kernel does not write show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
