"""The machine and the versions that all other figures were made with."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from ..machine import NOT_INSTALLED
from ..tables import NOT_MEASURED
from .common import device_of, origin_of
from .settings import Save, Settings

PACKAGES = ("lmdb", "xxhash", "pytest", "hypothesis", "xformers", "peft", "setuptools")
QUERIED = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory")


def measure(settings: Settings, save: Save) -> None:
    """Save what the GPU and its driver say, and versions beside those that every result has."""
    device = device_of(settings)
    origin = origin_of(settings)
    names = ("device", "torch", "triton", "transformers", "python")
    words = [f"{name} {origin['environment'][name]}" for name in names]
    save(
        {
            "gpu": properties(device) if device.type == "cuda" else NOT_MEASURED,
            "nvidia_smi": smi_query(),
            "packages": {name: version(name) for name in PACKAGES},
            "headline": ", ".join([*words, f"commit {origin['commit']}"]),
        }
    )


def version(package: str) -> str:
    """Return a package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def properties(device: torch.device) -> dict[str, Any]:
    """Return what torch says of a GPU."""
    gpu = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "l2_bytes": getattr(gpu, "L2_cache_size", NOT_MEASURED),
        "cudnn": torch.backends.cudnn.version(),
    }


def smi_query() -> dict[str, str] | str:
    """Return what the driver's tool says of the first GPU."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return NOT_MEASURED
    words = [tool, f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if answer.returncode:
        return f"{NOT_MEASURED}: {answer.stdout.strip() or answer.stderr.strip()}"
    values = answer.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERIED, values, strict=True))
