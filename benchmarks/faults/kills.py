"""Kill training, extraction and `verify` at random moments, go on, and compare the results with undisturbed ones."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ... import api
from ...states import Store
from .children import Ending, Kill, run_child
from .sample import EPOCHS, Sample, extract, result_of, train

CHECKPOINTS = (None, 1, 3)  # values of checkpoint_every, in steps; None: none within an epoch
MOST_KILLS = 3  # of one run, before it may end
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Outcome = dict[str, Any]  # "kind", "seed", "kills" and, for a fault, "message"


def kill_once(sample: Sample, seed: int) -> Outcome:
    """Kill the kind of work that a seed draws, up to MOST_KILLS times, let it end, and compare what it made."""
    generator = np.random.default_rng(seed)
    trial = KINDS[seed % len(KINDS)]
    with TemporaryDirectory() as folder:
        return {"kind": trial.__name__, "seed": seed, **trial(sample, Path(folder), generator)}


def training(sample: Sample, folder: Path, generator: np.random.Generator) -> Outcome:
    """Kill a training, and resume it until it has ended."""
    run = folder / "run"
    every = CHECKPOINTS[generator.integers(len(CHECKPOINTS))]

    def work() -> None:
        if (run / "config.json").exists():
            api.resume(run, device="cpu", checkpoint_every=every)
        else:
            train(sample.dataset, sample.cache, run, checkpoint_every=every)

    ending, kills = _killed(work, sample.seconds, generator)
    return _judged(ending, kills, lambda: result_of(run), sample.expected) | _leftovers(run, sample.run)


def longer_training(sample: Sample, folder: Path, generator: np.random.Generator) -> Outcome:
    """Train for one epoch, then let the finished run go on to all epochs, and kill it meanwhile."""
    run = folder / "run"
    first = run_child(lambda: train(sample.dataset, sample.cache, run, max_epochs=1))
    if first.kind != "done":
        return _judged(first, 0, lambda: None, None)
    ending, kills = _killed(lambda: api.resume(run, device="cpu", epochs=EPOCHS), sample.seconds, generator)
    return _judged(ending, kills, lambda: result_of(run), sample.expected) | _leftovers(run, sample.run)


def extraction(sample: Sample, folder: Path, generator: np.random.Generator) -> Outcome:
    """Kill an extraction, and repeat it until it has ended."""
    cache = folder / "cache"
    ending, kills = _killed(lambda: extract(sample.dataset, cache, sample.views), 0.5, generator)
    expected = run_child(lambda: digest_of_cache(sample.dataset, sample.cache)).value
    return _judged(ending, kills, lambda: digest_of_cache(sample.dataset, cache), expected)


KINDS = (training, training, extraction, training, longer_training)


def largest_difference(dataset: Path, cache: Path, other: Path) -> float:
    """Return the largest distance of a state from that in another cache, over the latter's length.

    It is infinite if the content digests or the views differ.
    """
    item_ids = api.load_dataset(dataset).sequences.item_ids
    largest = 0.0
    with Store(cache) as store, Store(other) as other_store:
        for name, view in store.views.items():
            shape = len(item_ids), len(view["layers"]), view["width"]
            states, expected = (torch.empty(shape, dtype=getattr(torch, view["dtype"])) for _ in range(2))
            store.read(name, item_ids, states)
            other_store.read(name, item_ids, expected)
            distances = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
            largest = max(largest, float(distances.max()))
            if store.contents(name, item_ids) != other_store.contents(name, item_ids):
                return math.inf
        return largest if store.views == other_store.views else math.inf


def digest_of_cache(dataset: Path, cache: Path) -> str:
    """Return a digest of a dataset's states and content digests in a cache, and of the views' descriptions."""
    item_ids = api.load_dataset(dataset).sequences.item_ids
    with Store(cache) as store:
        digest = hashlib.sha256(repr(store.views).encode())
        for name, view in store.views.items():
            shape = len(item_ids), len(view["layers"]), view["width"]
            states = torch.empty(shape, dtype=getattr(torch, view["dtype"]))
            store.read(name, item_ids, states)
            digest.update(states.view(torch.uint8).numpy().tobytes() + store.contents(name, item_ids).encode())
    return digest.hexdigest()


def _killed(work: Callable[[], Any], seconds: float, generator: np.random.Generator) -> tuple[Ending, int]:
    """Start the work, kill it up to MOST_KILLS times within so many seconds of its start, and let it end.

    Returns how the last start ended, and the number of kills that stopped the work.
    """
    kills = 0
    for _ in range(MOST_KILLS):
        kill = Kill(float(generator.uniform(0, seconds)), int(generator.choice(SIGNALS)))
        ending = run_child(work, kill)
        if ending.kind not in ("killed", "stopped"):
            return ending, kills
        kills += 1
    return run_child(work), kills


def _judged(ending: Ending, kills: int, result: Callable[[], Any], expected: Any) -> Outcome:
    """Return the outcome of a trial: "equal", or the fault."""
    if ending.kind == "done":
        read = run_child(result)
        if read.kind == "done" and read.value == expected:
            return {"kills": kills, "outcome": "equal"}
        message = read.message or "the result differs from that of an undisturbed run"
        return {"kills": kills, "outcome": "silent" if read.kind == "done" else read.kind, "message": message}
    return {"kills": kills, "outcome": ending.kind, "message": ending.message}


def _leftovers(run: Path, undisturbed: Path) -> Outcome:
    """Return a fault if a run folder holds files that an undisturbed one does not; nothing otherwise."""
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    extra = sorted(names - {path.name for path in undisturbed.iterdir()})
    return {"outcome": "leftovers", "message": f"left in the run folder: {', '.join(extra)}"} if extra else {}
