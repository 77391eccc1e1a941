"""Flip one bit of a file of a cache or of a run, use the file, and see whether anyone notices.

A flip is found where the program refuses the file in one line, or says that it did without it. It is harmless where
all results are those of the undamaged file. Else it is silent, and a fault. After a found flip in a cache, `verify` has
to name it, and the next extraction has to make the cache whole again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ... import api
from .children import NO_FAULT, Ending, run_child
from .kills import largest_difference
from .sample import Sample, extract, result_of, train

CACHE_FILES = ("states.lmdb/data.mdb", "manifest.json")
RUN_FILES = ("config.json", "views.json", "environment.json", "sequences.npz", "metrics.jsonl", "test.json")
RUN_FILES += ("neighbours.safetensors",)
CHECKPOINTS = ("best.safetensors", "last.safetensors", "previous.safetensors")
ROUNDING = 0.01  # the relative difference of states of bfloat16 that were encoded in other batches
WEIGHTS = {"states.lmdb/data.mdb": 6, "best.safetensors": 3, "last.safetensors": 4, "sequences.npz": 2}  # else 1

Outcome = dict[str, Any]  # "kind" (the file), "seed", "bit", "use", "outcome" and, for a fault, "message"


def flip_once(sample: Sample, seed: int) -> Outcome:
    """Flip the bit that a seed draws in a copy of the sample, use what it is in, and return what happened."""
    generator = np.random.default_rng(seed)
    files = (*CACHE_FILES, *RUN_FILES, *CHECKPOINTS)
    shares = np.array([WEIGHTS.get(name, 1) for name in files], dtype=float)
    name = str(generator.choice(files, p=shares / shares.sum()))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        in_cache = name in CACHE_FILES
        shutil.copytree(sample.cache if in_cache else sample.run, folder)
        bit = _flip(folder / name, generator)
        trial = _in_cache if in_cache else _in_run
        outcome = trial(sample, folder, name, generator)
    return {"kind": name, "seed": seed, "bit": bit, **outcome}


def _flip(file: Path, generator: np.random.Generator) -> int:
    """Flip a random bit of a file, in place, and return its number."""
    content = bytearray(file.read_bytes())
    bit = int(generator.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return bit


def _in_cache(sample: Sample, cache: Path, name: str, generator: np.random.Generator) -> Outcome:
    """Train from a damaged cache. A found flip has to be named by `verify` and repaired by the next extraction."""
    run = cache.parent / "run"
    ending = run_child(lambda: train(sample.dataset, cache, run))
    used = _judged(ending, lambda: result_of(run), sample.expected)
    if used["outcome"] != "refused":
        return {"use": "train", **used}
    verified = run_child(lambda: _damage_of(cache))
    if verified.kind not in NO_FAULT or verified.value == 0:
        return {
            "use": "verify",
            "outcome": "silent" if verified.value == 0 else verified.kind,
            "message": used["message"],
        }
    again = run_child(lambda: extract(sample.dataset, cache, sample.views))
    if again.kind == "refused":  # the whole cache has to be made again, as the message says
        return {"use": "train", "outcome": "refused", "message": again.message}
    if again.kind != "done":
        return {"use": "extract", "outcome": again.kind, "message": again.message}
    compared = run_child(lambda: largest_difference(sample.dataset, cache, sample.cache))
    if compared.kind != "done" or compared.value > ROUNDING:
        return {"use": "extract", "outcome": "silent", "message": f"repaired wrongly: {compared}"}
    return {"use": "train and extract", "outcome": "repaired"}


def _in_run(sample: Sample, run: Path, name: str, generator: np.random.Generator) -> Outcome:
    """Evaluate a damaged run, or go on with it, by what the file is for."""
    use = "evaluate" if name in ("best.safetensors", "sequences.npz") and generator.integers(2) else "resume"
    if use == "evaluate":
        figures = run_child(lambda: api.evaluate(sample.run, device="cpu")).value
        evaluated = run_child(lambda: api.evaluate(run, device="cpu"))
        return {"use": use, **_judged(evaluated, lambda: evaluated.value, figures)}
    if name == "previous.safetensors":  # it is read where the last checkpoint is damaged or missing
        (run / "last.safetensors").write_bytes(b"damaged")
    if name != "test.json":
        (run / "test.json").unlink()
    ending = run_child(lambda: api.resume(run, device="cpu"))
    return {"use": use, **_judged(ending, lambda: result_of(run), sample.expected)}


def _damage_of(path: Path) -> int:
    """Return how many damaged parts `verify` names; 1 if it refuses the whole folder."""
    from ...errors import InputError

    try:
        return len(api.verify(path).damage)
    except InputError:
        return 1


def _judged(ending: Ending, result: Callable[[], Any], expected: Any) -> Outcome:
    """Return "refused", "said" (it went on, and said so), "harmless", or the fault."""
    if ending.kind != "done":
        return {"outcome": ending.kind, "message": ending.message}
    read = run_child(result)
    if read.kind == "done" and json.dumps(read.value) == json.dumps(expected):
        return {"outcome": "said" if ending.warnings else "harmless", "message": "; ".join(ending.warnings)}
    if read.kind == "refused":
        return {"outcome": "refused", "message": read.message}
    message = read.message or "the results differ, and nothing was said"
    if read.kind == "done" and ending.warnings:
        return {"outcome": "said", "message": "; ".join(ending.warnings)}
    return {"outcome": "silent" if read.kind == "done" else read.kind, "message": message}
