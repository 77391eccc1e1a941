"""Run one stage in this process and save its result again and again while it runs.

python -m iisan_fast.benchmarks.on_gpu.stages NAME …
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from ...runtime import prepare_program
from .settings import DRY_RUN, Save, Settings

MODULES = {
    "versions": "versions",
    "step": "step",
    "epochs": "epochs",
    "ops": "ops",
    "evaluation": "evaluation",
    "step-tests": "gpu_tests",
    "kernel-tests": "gpu_tests",
    "extraction": "extraction",
    "dense": "dense",
    "ranks": "ranks",
}  # by stage: the module here whose `measure` runs it


def main() -> None:
    """Run the stage that the command line names."""
    options = argparse.ArgumentParser()
    options.add_argument("stage", choices=MODULES)
    for name in ("dataset", "out", "result"):
        options.add_argument(f"--{name}", type=Path, required=True)
    options.add_argument("--commit")
    options.add_argument("--dry-run", action="store_true")
    chosen = options.parse_args()
    prepare_program()  # before torch is imported; the log then says which form of each op ran
    sizes: dict[str, Any] = DRY_RUN if chosen.dry_run else {}
    settings = Settings(chosen.stage, chosen.dataset, chosen.out, chosen.commit, **sizes)
    measure(settings, chosen.result)


def measure(settings: Settings, path: Path) -> None:
    """Run a stage, which saves its result to a file as it goes. Raises what the stage raises."""
    from .common import origin_of  # imports torch

    save = saver(path, origin_of(settings))
    importlib.import_module(f".{MODULES[settings.stage]}", __package__).measure(settings, save)


def saver(path: Path, origin: dict[str, Any]) -> Save:
    """Return what writes a result and its origin to a file; a process that is stopped leaves the result before it."""

    def save(result: dict[str, Any]) -> None:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(result | {"origin": origin}))
        temporary.replace(path)

    return save


if __name__ == "__main__":
    main()
