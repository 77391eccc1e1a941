"""The machine of a benchmark: its versions, its commit, and its CUDA launches."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..config import ProtocolConfig
from ..data import Sequences, load_dataset
from ..errors import InputError
from ..training import environment
from .peak_memory import PeakMemory
from .tables import NOT_MEASURED

LIBRARIES = ("triton", "liger-kernel", "cut-cross-entropy")
NOT_INSTALLED = "not installed"


def named_sequences(dataset: Path | None) -> tuple[str, Sequences]:
    """Return a dataset's name and histories; those of the embedded demo for None."""
    if dataset is None:
        return "demo", demo_sequences()
    return dataset.resolve().name, load_dataset(dataset).sequences


def demo_sequences() -> Sequences:
    """Return the embedded demo's histories as the protocol gives them, without drawing its images."""
    from .. import demo  # imports transformers, which takes seconds

    generator = np.random.default_rng(0)
    histories = demo.make_histories(demo.make_products(generator), generator)
    catalogue, numbers = np.unique(np.concatenate(histories), return_inverse=True)
    return Sequences(
        user_ids=[f"user{index:04d}" for index in range(len(histories))],
        item_ids=[f"item{index:04d}" for index in catalogue],
        offsets=np.cumsum([0, *map(len, histories)]),
        items=numbers + 1,
        max_inputs=ProtocolConfig().max_inputs,
    )


def origin(name: str, device: torch.device) -> dict[str, Any]:
    """Return the dataset's name, the commit, the machine and the versions."""
    return {"dataset": name, "commit": commit(), "environment": versions(device)}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide how kernels are compiled."""
    return {name: metadata.version(name) for name in ("torch", "triton")}


def versions(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions, those of libraries beside the kernels included."""
    libraries = {}
    for library in LIBRARIES:
        try:
            libraries[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            libraries[library] = NOT_INSTALLED
    libraries |= {"cuda": torch.version.cuda, "float32_matmul_precision": torch.get_float32_matmul_precision()}
    if device.type == "cpu":  # finding out compiles the C++, which no figure of a GPU needs
        libraries["native"] = kernels.why_no_library() or kernels.compiler_version()
    return environment(device) | libraries


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the commit that a folder is checked out at, with "-dirty" if files differ; None outside a checkout."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def last_commit(file: Path) -> str:
    """Return the last commit of a file. Raises InputError if the file is not committed as it is."""
    changes = _git(file.parent, "status", "--porcelain", "--", file.name)
    committed = _git(file.parent, "log", "-1", "--format=%H", "--", file.name)
    if changes or not committed:
        reason = f"it changed ({changes})" if committed and changes else "no commit of it"
        raise InputError(
            f"{file}: expected a file that is committed as it is, found {reason}; commit it, then run again"
        )
    return committed


def _git(folder: Path, *words: str) -> str | None:
    """Return a git command's output, run in a folder; None if it fails, as outside a checkout."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one, which timers and profilers watch."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def count_launches(call: Callable[[], Any]) -> int | None:
    """Return the number of CUDA kernels that one call launches, or None if the profiler saw none.

    Copies and fills by the driver do not count.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return (
        sum(
            event.device_type == DeviceType.CUDA
            and not event.name.startswith(("Memcpy", "Memset"))
            and not getattr(event, "is_user_annotation", False)
            for event in profiler.events()
        )
        or None
    )


def peak_figures(memory: PeakMemory, device: torch.device) -> dict[str, int | str]:
    """Return the peak of the processes' memory and that of CUDA memory, in bytes or NOT_MEASURED."""
    return {"peak_pss_bytes": memory.bytes or NOT_MEASURED, "peak_cuda_bytes": cuda_peak(device)}


def cuda_peak(device: torch.device) -> int | str:
    """Return the most bytes that torch has held on a CUDA device, or NOT_MEASURED on another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else NOT_MEASURED


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
