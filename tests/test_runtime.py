"""The process is set up by prepare() and by the verbs themselves, before a product is made; an import sets nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iisan_fast import runtime
from iisan_fast.config import EvaluationConfig, ModelConfig, RunConfig, TrainConfig, UncachedConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.runtime import CUBLAS_VARIABLE
from iisan_fast.states.extraction import extract
from iisan_fast.training.best_run import evaluate_run, load
from iisan_fast.training.resume_run import resume
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_linear"}


class Settings(TorchDispatchMode):
    """Record the environment's cuBLAS setting at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.at_products: list[str | None] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            self.at_products.append(os.environ.get(CUBLAS_VARIABLE))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def unset(monkeypatch) -> Callable[[], None]:
    """Return a function that deletes the variable; the test's end restores its value."""
    monkeypatch.setenv(CUBLAS_VARIABLE, "")

    def forget() -> None:
        os.environ.pop(CUBLAS_VARIABLE, None)

    forget()
    return forget


@pytest.fixture
def config(catalogue, encoder_views) -> RunConfig:
    """Prepare a run that trains its text encoder; to learn its memory, it multiplies before the first step."""
    views: list[ViewConfig] = encoder_views[1:]
    model = ModelConfig("full", embedding_dim=16)
    optimisation = TrainConfig(batch_users=80, max_epochs=2)
    return RunConfig(str(catalogue), uncached=UncachedConfig(tuple(views)), model=model, train=optimisation)


def assert_set_before_products(work: Callable[[], Any]) -> None:
    with Settings() as settings:
        work()
    assert settings.at_products and set(settings.at_products) == {":4096:8"}


def test_the_workspace_is_set_before_the_first_product_of_an_extraction(unset, config, tmp_path, threads_given_back):
    torch.set_num_threads(1)  # products run in this thread, where the mode sees them
    dataset = load_dataset(Path(config.dataset))
    assert_set_before_products(lambda: extract(dataset, list(config.uncached.views), tmp_path / "cache", CPU))


def test_the_workspace_is_set_before_the_first_product_of_a_run(unset, config, tmp_path, threads_given_back):
    torch.set_num_threads(1)

    def stop(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def begin() -> None:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", CPU, on_epoch=stop)

    assert_set_before_products(begin)
    unset()
    assert_set_before_products(lambda: resume(tmp_path / "run", CPU))
    unset()
    load(tmp_path / "run", CPU)
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    unset()
    assert_set_before_products(lambda: evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU))


def test_what_the_environment_holds_already_stays(unset, monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    runtime.fix_cublas_workspace()
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"


@pytest.mark.slow
def test_an_import_sets_nothing_and_prepare_sets_openmp_and_cublas():
    program = (
        "import os; before = dict(os.environ)\n"
        "import iisan_fast.training.trainer, iisan_fast.states.extraction, iisan_fast.runtime as runtime\n"
        "changed = {name for name in os.environ if os.environ[name] != before.get(name)}\n"
        "runtime.prepare()\n"
        "prepared = {name for name in os.environ if os.environ[name] != before.get(name)}\n"
        "print(sorted(changed), sorted(prepared))"
    )
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_NUM_THREADS", CUBLAS_VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] ['CUBLAS_WORKSPACE_CONFIG', 'GOMP_SPINCOUNT', 'OPENBLAS_NUM_THREADS']"
