"""Extraction beside a plain reference: time, items a second, peak memory, and the difference of the states.

Every measurement is a new process, so that none finds memory or workers of another; the forms take turns. Each form
fills an empty cache: it loads the encoder, checks all contents, encodes and stores them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import demo
from ..config import ExtractionConfig, ViewConfig
from ..data import Dataset, ImageFolder, ImageLmdb, Sequences, load_dataset, open_images
from ..encoders import Backbone, ModelInputs, load_backbone
from ..errors import InputError
from ..progress import progress_bar
from ..states import GROUP_ITEMS, Store, content_digest, extract, open_sources, view_inputs
from ..workers import batched, worker_count
from .harness import Setup
from .machine import on
from .peak_memory import PeakMemory
from .processes import in_a_process
from .settings import ExtractSettings, refuse_more
from .stopwatch import quantiles
from .tables import NOT_MEASURED

FROM_MEMORY = "from memory"
NOTES = {
    "plain": "catalogue order, texts padded to max_tokens, images read one after the other in the main process, the "
    "encoder asked for all hidden states of a batch, a transaction a batch",
    "fast": "iisan-fast extract",
    FROM_MEMORY: "the fast path's encoder alone, on inputs that were decoded or tokenized before, in its batches and "
    "order; states go to the host in the store's dtype, many batches at a time. The first items alone, where the "
    "inputs of all take more than 2 GiB",
    "both": "each round is a process of its own and goes from an empty cache to a full one: it loads the encoder, "
    "checks all contents, encodes and stores them; imports are not counted in its time. Peak: the largest sum of "
    "proportional set sizes over all its processes, over all rounds",
}
TOLERANCES = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}  # relative: a step of what the states lie in
INPUT_BYTES = 2 << 30  # of inputs that are encoded from memory
COARSE_ENCODER = 2e-2  # relative, for an encoder that computes in less than float32: padding changes its rounding


@dataclass(frozen=True)
class ExtractionJob:
    """The items, the view and the options of an extraction into an empty cache."""

    dataset: Dataset
    view: ViewConfig
    device: torch.device
    dtype: str
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """The figures of one run of one form."""

    seconds: float
    peak_pss_bytes: int | None  # of all its processes
    peak_cuda_bytes: int | None
    items: int


def compare_extraction(setup: Setup, settings: ExtractSettings) -> dict[str, Any]:
    """Measure both forms. Raises InputError where their states differ, and for all that extraction refuses."""
    with TemporaryDirectory(prefix="iisan-fast-") as folder:
        job = make_job(setup.dataset, settings, setup.device, Path(folder))
        caches = {form: Path(folder) / form for form in FORMS}
        runs = measure(job, caches, settings.rounds)
        with Store(caches["fast"]) as store:
            description = store.view(job.view.name)
        states = [read_states(caches[form], job, description) for form in FORMS]
    plain, fast = (summary(form, runs[form]) for form in FORMS)
    return {
        "settings": asdict(settings) | {"encoder": _short(settings.encoder), "workers": job.workers},
        "items": len(job.dataset.sequences.item_ids),
        "view": {key: description[key] for key in ("pooling", "layers", "width", "encoder_dtype")},
        "notes": NOTES,
        **agreement(*states, description),
        "forms": [plain, fast, summary(FROM_MEMORY, runs[FROM_MEMORY])],
        "ratio": plain["p50_s"] / fast["p50_s"],
    }


def make_job(dataset: Path | None, settings: ExtractSettings, device: torch.device, folder: Path) -> ExtractionJob:
    """Return the items and the view to measure; files of the demo are written into the folder."""
    encoder = settings.encoder
    if dataset is None:
        dataset, views = demo.write_demo(folder)
        encoder = encoder or next(view.encoder for view in views if view.source == settings.source)
    elif encoder is None:
        write = demo.write_image_encoder if settings.source == "image" else demo.write_text_encoder
        write(folder / "encoder", seed=0)
        encoder = str(folder / "encoder")
    data = sample(load_dataset(dataset), settings.items)
    view = ViewConfig(settings.source, settings.source, encoder, max_tokens=settings.max_tokens)
    workers = worker_count(settings.workers, len(data.titles), device) if settings.source == "image" else 0
    return ExtractionJob(data, view, device, settings.dtype, settings.batch_size, workers)


def sample(dataset: Dataset, items: int | None) -> Dataset:
    """Return the dataset with that many items, spread evenly over its catalogue, and without histories.

    Raises InputError for more items than there are.
    """
    total = len(dataset.titles)
    if items is not None:
        refuse_more("--items", items, total, f"the items of {dataset.root.name}")
    rows = np.linspace(0, total - 1, items or total).round().astype(int)
    return replace(
        dataset,
        titles=[dataset.titles[row] for row in rows],
        captions=[dataset.captions[row] for row in rows],
        sequences=Sequences(
            user_ids=[],
            item_ids=[dataset.sequences.item_ids[row] for row in rows],
            offsets=np.zeros(1, dtype=np.int64),
            items=np.zeros(0, dtype=np.int64),
            max_inputs=dataset.sequences.max_inputs,
        ),
    )


def plain(job: ExtractionJob, cache: Path) -> None:
    """Extract the states without any means of the fast form: see NOTES."""
    backbone = load_backbone(job.view, job.device)
    batches = (_image_batches if job.view.source == "image" else _title_batches)(job, backbone)
    shape = {"layers": list(backbone.layers), "depth": backbone.depth, "width": backbone.width}
    with Store(cache, writable=True) as store:
        store.add_views({job.view.name: {"source": job.view.source, "unescaped": True, "dtype": job.dtype, **shape}})
        for item_ids, digests, inputs in batches:
            states = backbone.encode_whole(inputs).to(getattr(torch, job.dtype))
            store.write(job.view.name, item_ids, digests, states)


def fast(job: ExtractionJob, cache: Path) -> None:
    """Extract the states as `iisan-fast extract` does."""
    config = ExtractionConfig(dtype=job.dtype, batch_size=job.batch_size, workers=job.workers)
    extract(job.dataset, [job.view], cache, job.device, config)


FORMS: dict[str, Callable[[ExtractionJob, Path], None]] = {"plain": plain, "fast": fast}
PlainBatch = tuple[list[str], list[bytes], ModelInputs]  # item ids, digests, and what the encoder takes


def _title_batches(job: ExtractionJob, backbone: Backbone) -> Iterator[PlainBatch]:
    """Yield batches of titles as a plain loop makes them: in catalogue order, padded to max_tokens."""
    item_ids = job.dataset.sequences.item_ids
    titles = job.dataset.titles
    width = job.view.max_tokens
    for start in range(0, len(titles), job.batch_size):
        part = titles[start : start + job.batch_size]
        ids = torch.full((len(part), width), backbone.processor.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        tokens = backbone.processor(part, truncation=True, max_length=width).input_ids
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = torch.tensor(numbers)
            mask[row, : len(numbers)] = 1
        digests = [content_digest(title.encode()) for title in part]
        yield item_ids[start : start + job.batch_size], digests, {"input_ids": ids, "attention_mask": mask}


def _image_batches(job: ExtractionJob, backbone: Backbone) -> Iterator[PlainBatch]:
    """Yield batches of images as a plain loop makes them: read and decoded one by one, in catalogue order."""
    item_ids = job.dataset.sequences.item_ids
    with open_images(job.dataset.root) as images:
        for item_id in item_ids:  # all are checked before one is encoded, as extraction does
            images.decode(_content(images, item_id))
        for start in range(0, len(item_ids), job.batch_size):
            part = item_ids[start : start + job.batch_size]
            contents = [_content(images, item_id) for item_id in part]
            pixels = [backbone.prepare([images.decode(content)])["pixel_values"] for content in contents]
            yield part, [content_digest(content) for content in contents], {"pixel_values": torch.cat(pixels)}


def _content(images: ImageFolder | ImageLmdb, item_id: str) -> bytes:
    """Return the bytes of an item's image. Raises InputError if it has none."""
    content = images.content(item_id)
    if content is None:
        raise InputError(f"{images.path}: item {item_id!r}: no image")
    return content


def measure(job: ExtractionJob, caches: dict[str, Path], rounds: int) -> dict[str, list[Measured]]:
    """Run every form once a round, in turns; each cache stays as the form's last run filled it.

    Raises what the forms raise, and InputError if a measured process ends early.
    """
    runs: dict[str, list[Measured]] = {form: [] for form in (*caches, FROM_MEMORY)}
    with progress_bar("benchmark", rounds * len(runs), "runs") as advance:
        for _ in range(rounds):
            for form, cache in caches.items():
                shutil.rmtree(cache, ignore_errors=True)
                runs[form].append(in_a_process(run_once, form, job, cache))
                advance(1, form)
            runs[FROM_MEMORY].append(in_a_process(run_from_memory, job))
            advance(1, FROM_MEMORY)
    return runs


def run_once(form: str, job: ExtractionJob, cache: Path) -> Measured:
    """Run a form in this process, after transformers has imported the encoder's family."""
    load_backbone(job.view, job.device)
    return _measured(job.device, lambda: FORMS[form](job, cache), len(job.dataset.titles))


def run_from_memory(job: ExtractionJob) -> Measured:
    """Encode, in this process, inputs that are already decoded or tokenized."""
    backbone = load_backbone(job.view, job.device)
    dtype = getattr(torch, job.dtype)
    with ExitStack() as stack:
        images = stack.enter_context(open_sources(job.dataset, [job.view], "error"))
        contents = view_inputs(backbone, job.dataset, images, "error")
        rows = contents.arrange(list(range(len(job.dataset.titles))))
        inputs = []
        items = 0
        size = 0
        for part in batched(rows, job.batch_size):
            batch = contents.batch(part)
            size += sum(tensor.nbytes for tensor in batch.inputs.values())
            if inputs and size > INPUT_BYTES:
                break
            pin = job.device.type == "cuda"
            inputs.append({name: tensor.pin_memory() if pin else tensor for name, tensor in batch.inputs.items()})
            items += len(part)

    def encode() -> None:
        for group in batched(inputs, max(1, GROUP_ITEMS // job.batch_size)):
            torch.cat([backbone.encode(batch_inputs).to(dtype) for batch_inputs in group]).cpu()

    backbone.encode(inputs[0])  # warms up
    return _measured(job.device, encode, items)


def _measured(device: torch.device, run: Callable[[], None], items: int) -> Measured:
    """Run a function once and return its seconds and its peak memory on the host and on a GPU."""
    cuda = device.type == "cuda"
    with on(device), PeakMemory() as memory:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    return Measured(seconds, memory.bytes, torch.cuda.max_memory_allocated(device) if cuda else None, items)


def summary(form: str, runs: list[Measured]) -> dict[str, Any]:
    """Return a form's figures over its runs; memory that the machine does not report is NOT_MEASURED."""
    seconds = [run.seconds for run in runs]
    items = runs[0].items
    times = quantiles(seconds, "s")
    return {
        "form": form,
        "items": items,
        "seconds": seconds,
        **times,
        "items_per_second": items / times["p50_s"],
        "peak_pss_bytes": _largest([run.peak_pss_bytes for run in runs]),
        "peak_cuda_bytes": _largest([run.peak_cuda_bytes for run in runs]),
    }


def agreement(plain_states: Tensor, fast_states: Tensor, description: dict[str, Any]) -> dict[str, float]:
    """Return the largest difference of the states [N, K, D] of two forms, relative to the largest state, and its limit.

    Raises InputError if the difference exceeds the limit.
    """
    difference = float((plain_states - fast_states).abs().max() / plain_states.abs().max())
    tolerance = TOLERANCES[description["dtype"]]
    if description["encoder_dtype"] != "float32":
        tolerance = max(tolerance, COARSE_ENCODER)
    if not difference <= tolerance:
        raise InputError(f"the two forms' states differ by {difference:.1e} of the largest, expected {tolerance:.1e}")
    return {"largest_difference": difference, "tolerance": tolerance}


def read_states(cache: Path, job: ExtractionJob, description: dict[str, Any]) -> Tensor:
    """Read every item's states from a cache: float32 [N, K, D]."""
    item_ids = job.dataset.sequences.item_ids
    states = torch.empty(
        len(item_ids), len(description["layers"]), description["width"], dtype=getattr(torch, job.dtype)
    )
    with Store(cache) as store:
        store.read(job.view.name, item_ids, states)
    return states.float()


def _short(encoder: str | None) -> str | None:
    """Return a hub name, or the last two parts of a folder."""
    return encoder and "/".join(Path(encoder).parts[-2:])


def _largest(figures: list[int | None]) -> int | str:
    """Return the largest figure, or "not measured" if one of them is None."""
    return NOT_MEASURED if None in figures else max(figures)
