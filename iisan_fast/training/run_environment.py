"""Describe the machine and the versions that a run's results depend on."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, kernels

RANKS = "ranks"  # the entry of their number
RUN_LIBRARIES = ("transformers", "lmdb", "numpy", "safetensors")
DECIDES_ROUNDING = (
    "torch",
    "device",
    "kernels",
    RANKS,
)  # the entries of an environment that change the rounding of results
ON_A_CPU = ("threads", "processor", "compiler")  # such entries for a CPU


def environment(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """Return the machine, the versions and the form of the ops that results depend on, as JSON values.

    ranks: their number.
    """
    on_gpu = device.type == "cuda"
    form = kernels.form_on(device)
    return {
        "iisan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build's tag
        **{name: metadata.version(name) for name in RUN_LIBRARIES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # the widest instructions that torch uses on it
        "processor_name": _processor_name(),
        "kernels": form,
        "compiler": kernels.compiler_version() if form == "cpu" else None,
        RANKS: ranks,
    }


def recorded_ranks(recorded: Mapping[str, Any]) -> int:
    """Return the number of ranks in a recorded environment; those of earlier versions were alone."""
    return recorded.get(RANKS, 1)


def rounding_changes(recorded: Mapping[str, Any], device: torch.device, ranks: int = 1) -> list[str]:
    """Return a phrase for each change since an environment was recorded that makes results differ in rounding.

    ranks: their number now.
    """
    recorded = {**recorded, RANKS: recorded_ranks(recorded)}
    current = environment(device, ranks)
    names = DECIDES_ROUNDING + (ON_A_CPU if device.type == "cpu" else ())
    return [
        f"{name} {recorded[name]} then, {current[name]} now"
        for name in names
        if name in recorded and recorded[name] != current[name]
    ]


def _processor_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return name[1] if name else platform.processor()
