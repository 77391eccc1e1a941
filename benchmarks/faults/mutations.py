"""Change the bytes of files at random and read them: each reader accepts a file, or refuses it in one line."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ... import api
from ...setting_sources import base_settings
from ...settings import run_config
from ...states import Store
from .children import Ending, run_children
from .sample import Sample

MOST_BYTES = 1 << 30  # by which reading a file of some kilobytes may let the memory grow
MOST_SECONDS = 60.0
LONGEST_LINE = 1600  # characters of a message
AT_ONCE = 40  # mutations whose files exist at the same time
INSERTED = (
    *(b"\0", b"\x1b[2J", b'"', b"\t", b"\n", b"\r", b",", b" ", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"{}", b"[" * 100_000, b'{"a":' * 5000, b"\n" * 3000),
    *(b"x" * 200_000, b"&" * 3000, b"*a" * 50, b"!!python/object:os.system", b"\x80\x04K\x01" + b"\x85" * 50_000),
)
NUMBERS = (b"-1", b"0", b"4294967296", b"9223372036854775807", b"18446744073709551616", b"1e308", b"0.5", b"true")

Outcome = dict[str, Any]  # "kind" (the reader), "seed", "outcome" and, for a fault, "message"


@dataclass(frozen=True)
class Reader:
    """A reader of a file, and the file in a copy of the sample's folders."""

    name: str
    folder: str  # "dataset", "cache", "run", "encoder" or "import": what is copied
    file: str  # in that folder
    read: Callable[[Path, Sample], Any]  # takes the copied folder


def mutate(sample: Sample, seeds: range) -> Iterator[Outcome]:
    """Yield, for each seed, how a reader took a file that was changed as the seed draws.

    Raises RuntimeError if a reader refuses its unchanged file.
    """
    with TemporaryDirectory() as temporary:
        sources = _sources(sample, Path(temporary) / "sources")
        _check_readers(sample, sources, Path(temporary) / "unchanged")
        for start in range(0, len(seeds), AT_ONCE):
            drawn = seeds[start : start + AT_ONCE]
            works = []
            for seed in drawn:
                reader = READERS[seed % len(READERS)]
                folder = Path(temporary) / str(seed)
                shutil.copytree(sources[reader.folder], folder)
                file = folder / reader.file
                file.write_bytes(changed(file.read_bytes(), np.random.default_rng(seed)))
                works.append(_reading(reader, folder, sample))
            for seed, ending in zip(drawn, run_children(works, limit=MOST_SECONDS)):
                yield {"kind": READERS[seed % len(READERS)].name, "seed": seed, **_judged(ending)}
                shutil.rmtree(Path(temporary) / str(seed))


def _check_readers(sample: Sample, sources: Mapping[str, Path], folder: Path) -> None:
    """Raise RuntimeError unless each reader accepts its unchanged file: else its refusals would say nothing."""
    works = []
    for number, reader in enumerate(READERS):
        shutil.copytree(sources[reader.folder], folder / str(number))
        works.append(_reading(reader, folder / str(number), sample))
    for reader, ending in zip(READERS, run_children(works)):
        if ending.kind != "done":
            raise RuntimeError(f"{reader.name}: unchanged, but {ending.kind}: {ending.message}")


def changed(content: bytes, generator: np.random.Generator) -> bytes:
    """Return bytes with one to three random changes."""
    for _ in range(generator.integers(1, 4)):
        content = CHANGES[generator.integers(len(CHANGES))](content, generator)
    return content


def _flip(content: bytes, generator: np.random.Generator) -> bytes:
    """Flip one bit."""
    if not content:
        return content
    bit = int(generator.integers(8 * len(content)))
    new = bytearray(content)
    new[bit // 8] ^= 1 << bit % 8
    return bytes(new)


def _overwrite(content: bytes, generator: np.random.Generator) -> bytes:
    """Overwrite a few bytes by random ones."""
    start, _ = _range(content, generator)
    noise = generator.bytes(int(generator.integers(1, 9)))
    return content[:start] + noise + content[start + len(noise) :]


def _delete(content: bytes, generator: np.random.Generator) -> bytes:
    """Delete a range."""
    start, end = _range(content, generator)
    return content[:start] + content[end:]


def _repeat(content: bytes, generator: np.random.Generator) -> bytes:
    """Repeat a range."""
    start, end = _range(content, generator)
    return content[:end] + content[start:end] + content[end:]


def _truncate(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut the end off."""
    return content[: _range(content, generator)[0]]


def _insert(content: bytes, generator: np.random.Generator) -> bytes:
    """Insert bytes that readers find hard."""
    start, _ = _range(content, generator)
    return content[:start] + INSERTED[generator.integers(len(INSERTED))] + content[start:]


def _renumber(content: bytes, generator: np.random.Generator) -> bytes:
    """Replace a number in the text by an extreme one."""
    numbers = list(re.finditer(rb"\d+", content))
    if not numbers:
        return content
    number = numbers[generator.integers(len(numbers))]
    return content[: number.start()] + NUMBERS[generator.integers(len(NUMBERS))] + content[number.end() :]


CHANGES = (_flip, _overwrite, _delete, _repeat, _truncate, _insert, _renumber)


def _range(content: bytes, generator: np.random.Generator) -> tuple[int, int]:
    """Return the two ends of a random range of bytes."""
    start, end = sorted(int(position) for position in generator.integers(0, len(content) + 1, 2))
    return start, end


def _reading(reader: Reader, folder: Path, sample: Sample) -> Callable[[], None]:
    """Return the call that reads a changed file and drops the result."""

    def work() -> None:
        reader.read(folder, sample)

    return work


def _judged(ending: Ending) -> Outcome:
    """Return "accepted", "refused", or the fault, with the seconds and the growth of the memory."""
    cost = {"seconds": ending.seconds, "grown_bytes": ending.grown_bytes}
    if ending.grown_bytes > MOST_BYTES:
        return {**cost, "outcome": "memory", "message": f"the memory grew by {ending.grown_bytes} bytes"}
    if ending.kind == "refused" and ("\n" in ending.message or len(ending.message) > LONGEST_LINE):
        return {**cost, "outcome": "message", "message": f"not one line of {LONGEST_LINE}: {ending.message[:300]}"}
    return {**cost, "outcome": "accepted" if ending.kind == "done" else ending.kind, "message": ending.message}


def _sources(sample: Sample, folder: Path) -> dict[str, Path]:
    """Return the folders that readers get copies of; those of imports and settings are written into `folder`."""
    imports = folder / "import"
    imports.mkdir(parents=True)
    rows = [f"u{number // 6},i{number * 7 % 11},{1600000000 + number}" for number in range(60)]
    table = "user,item,timestamp\n" + "".join(f"{row}\n" for row in rows)
    (imports / "ratings.csv").write_text(table)
    (imports / "ratings.csv.gz").write_bytes(gzip.compress(table.encode(), mtime=0))
    names = (f'"a ""big"", red\nthing {number}"' for number in range(60))
    quoted = "".join(f"{name},{row}\n" for name, row in zip(names, rows))
    (imports / "quoted.csv").write_text("name,user,item,timestamp\n" + quoted)
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (imports / "ratings.inter").write_text(header + "".join(row.replace(",", "\t") + "\n" for row in rows))
    (imports / "settings.yaml").write_text(f"dataset: {sample.dataset}\ncache: {sample.cache}\n{SETTINGS_YAML}")
    shutil.copy(sample.run / "config.json", imports / "config.json")
    dataset = folder / "dataset"
    shutil.copytree(sample.dataset, dataset)
    users = (dataset / "users.tsv").read_text().splitlines()
    times = (f"{line.split()[0]}\t{' '.join(str(1000 + i) for i in range(len(line.split()) - 1))}\n" for line in users)
    (dataset / "times.tsv").write_text("".join(times))
    parts = (f"{line.split()[0]}\t{len(line.split()) - 4} 1 2\n" for line in users)
    (dataset / "splits.tsv").write_text("".join(parts))
    items = (dataset / "items.tsv").read_text().splitlines()
    (dataset / "captions.tsv").write_text("".join(f"{line.split()[0]}\ta picture of a thing\n" for line in items))
    encoder = Path(sample.views[1].encoder)
    return {"import": imports, "dataset": dataset, "cache": sample.cache, "run": sample.run, "encoder": encoder}


SETTINGS_YAML = """\
model:
  method: iisan
  dropout: 0.1
train:
  max_epochs: 3
  learning_rates: {adapters: 1e-3}
evaluation:
  ks: [5, 10]
"""


def _read_cache(folder: Path, sample: Sample) -> None:
    """Read all states of a cache."""
    import torch

    item_ids = api.load_dataset(sample.dataset).sequences.item_ids
    with Store(folder) as store:
        for name, view in store.views.items():
            shape = len(item_ids), len(view["layers"]), view["width"]
            store.read(name, item_ids, torch.empty(shape, dtype=getattr(torch, view["dtype"])))


def _read_settings(folder: Path, name: str) -> None:
    """Read a file of settings and resolve it into a configuration of a run."""
    run_config({}, base_settings(folder / name))


def _extract(folder: Path, sample: Sample) -> None:
    """Check a dataset's contents as an extraction does."""
    api.extract(folder, folder.parent / f"{folder.name}-cache", views=sample.views, workers=0, dry_run=True)


def _encode(folder: Path, sample: Sample) -> None:
    """Load an encoder as an extraction does."""
    text = {"text_encoder": str(folder), "dry_run": True}
    api.extract(sample.dataset, folder.parent / f"{folder.name}-cache", **text)


READERS = (
    Reader("items.tsv", "dataset", "items.tsv", lambda folder, sample: api.load_dataset(folder)),
    Reader("users.tsv", "dataset", "users.tsv", lambda folder, sample: api.load_dataset(folder)),
    Reader("times.tsv", "dataset", "times.tsv", lambda folder, sample: api.load_dataset(folder, split="temporal")),
    Reader("splits.tsv", "dataset", "splits.tsv", lambda folder, sample: api.load_dataset(folder, split="given")),
    Reader("captions.tsv", "dataset", "captions.tsv", lambda folder, sample: api.load_dataset(folder)),
    Reader("CSV", "import", "ratings.csv", lambda folder, sample: _import_csv(folder, "ratings.csv")),
    Reader("CSV, gzip", "import", "ratings.csv.gz", lambda folder, sample: _import_csv(folder, "ratings.csv.gz")),
    Reader("CSV, quoted", "import", "quoted.csv", lambda folder, sample: _import_csv(folder, "quoted.csv")),
    Reader("RecBole", "import", "ratings.inter", lambda folder, sample: _import_recbole(folder)),
    Reader("YAML settings", "import", "settings.yaml", lambda folder, sample: _read_settings(folder, "settings.yaml")),
    Reader("JSON settings", "import", "config.json", lambda folder, sample: _read_settings(folder, "config.json")),
    Reader("manifest.json", "cache", "manifest.json", _read_cache),
    Reader("states.lmdb", "cache", "states.lmdb/data.mdb", _read_cache),
    Reader("config.json", "run", "config.json", lambda folder, sample: api.load(folder, device="cpu")),
    Reader("sequences.npz", "run", "sequences.npz", lambda folder, sample: api.load(folder, device="cpu")),
    Reader("best.safetensors", "run", "best.safetensors", lambda folder, sample: api.load(folder, device="cpu")),
    Reader("views.json", "run", "views.json", lambda folder, sample: _resume(folder)),
    Reader("metrics.jsonl", "run", "metrics.jsonl", lambda folder, sample: _resume(folder)),
    Reader("last.safetensors", "run", "last.safetensors", lambda folder, sample: _resume(folder)),
    Reader("test.json", "run", "test.json", lambda folder, sample: api.resume(folder, device="cpu")),
    Reader("an image", "dataset", "images/item0003.png", _extract),
    Reader("encoder's config.json", "encoder", "config.json", _encode),
    Reader("encoder's weights", "encoder", "model.safetensors", _encode),
    Reader("tokenizer.json", "encoder", "tokenizer.json", _encode),
)


def _import_csv(folder: Path, name: str) -> None:
    """Import a CSV file."""
    from ...data import TableOptions, import_files  # imports polars, which not every installation has

    import_files(folder / name, folder / "imported", TableOptions())


def _import_recbole(folder: Path) -> None:
    """Import a RecBole file."""
    from ...data import TableOptions, import_recbole

    import_recbole(folder / "ratings.inter", folder / "imported", TableOptions())


def _resume(folder: Path) -> None:
    """Test a run again from its checkpoints."""
    (folder / "test.json").unlink()
    api.resume(folder, device="cpu")
