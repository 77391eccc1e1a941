"""Fixtures that several test files share: real data where it is at hand, small stores and tables made on the spot."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the program does
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded in tests

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is made: they then run on CPU tensors

from iisan_fast.config import ModelConfig, RunConfig, TrainConfig, ViewConfig
from iisan_fast.data.sequences import Sequences, load_dataset
from iisan_fast.kernels.cpu.step_memory import Memory
from iisan_fast.models.recommender import Recommender
from iisan_fast.models.side_network import SideItemEncoder
from iisan_fast.states.feature_table import FeatureTable
from iisan_fast.states.store import Store, content_digest

DATA = Path(os.environ.get("IISAN_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def threads_given_back() -> Iterator[None]:
    """Torch's number of threads may be changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scientific_folder() -> Path:
    """The Scientific dataset of the IISAN paper; tests that need it are skipped where it is absent."""
    folder = DATA / "amazon-scientific"
    if not folder.is_dir():
        pytest.skip(f"needs the Scientific dataset in {folder} (or under IISAN_FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def scientific(scientific_folder: Path) -> Sequences:
    return load_dataset(scientific_folder).sequences


def random_table(shapes: list[tuple[int, int]], items: int, dtype=torch.float64, seed: int = 0) -> FeatureTable:
    """A feature table of random states; row 0 is zeros, as in any table."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(items + 1, *shape, generator=generator, dtype=dtype) for shape in shapes]
    for view in views:
        view[0] = 0
    return FeatureTable(tuple(views))


def side_recommender(
    shapes: list[tuple[int, int]], config: ModelConfig, max_inputs: int, popularity: np.ndarray, seed: int
) -> Recommender:
    """IISAN over views of the given shapes (K, D)."""
    return Recommender(functools.partial(SideItemEncoder, shapes, config), config, max_inputs, popularity, seed)


def make_sequences(histories: list[list[int]], items: int | None = None, max_inputs: int = 10) -> Sequences:
    """Sequences of hand-written histories of item numbers."""
    flat = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    offsets = np.cumsum([0, *map(len, histories)])
    count = items or int(flat.max())
    return Sequences(
        [f"u{i}" for i in range(len(histories))], [f"i{i}" for i in range(1, count + 1)], offsets, flat, max_inputs
    )


def view_description(layers: int, width: int, /, **changes) -> dict:
    """What a store's manifest says of a view, as extraction would write it."""
    return {
        "source": "title",
        "unescaped": True,
        "layers": list(range(layers)),
        "depth": layers,
        "width": width,
        "dtype": "float32",
        **changes,
    }


def fill_store(path: Path, item_ids: list[str], table: FeatureTable, names: tuple[str, ...], **changes) -> Path:
    """A store holding the table's states under the given view names, in float32; `changes` to their description."""
    with Store(path, writable=True) as store:
        store.add_views({name: view_description(*shape, **changes) for name, shape in zip(names, table.shapes)})
        for name, view in zip(names, table.views):
            digests = [content_digest(f"title of {item_id}".encode()) for item_id in item_ids]
            store.write(name, item_ids, digests, view[1:].float())
    return path


def write_dataset_folder(root: Path, sequences: Sequences) -> Path:
    """items.tsv and users.tsv of made-up sequences."""
    root.mkdir(parents=True, exist_ok=True)
    titles = "".join(f"{item_id}\ttitle of {item_id}\n" for item_id in sequences.item_ids)
    (root / "items.tsv").write_text(titles)
    histories = np.split(sequences.items, sequences.offsets[1:-1])
    lines = (
        f"{user_id}\t{' '.join(sequences.item_ids[item - 1] for item in history)}\n"
        for user_id, history in zip(sequences.user_ids, histories)
    )
    (root / "users.tsv").write_text("".join(lines))
    return root


@pytest.fixture
def toy_config(toy_run) -> RunConfig:
    """A small model on the toy run."""
    dataset, cache = toy_run
    model, train = ModelConfig(embedding_dim=16, bottleneck=8), TrainConfig(batch_users=16, max_epochs=2)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=train)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> tuple[Path, Path]:
    """(dataset folder, cache with views `image` and `title`): 60 users, 40 items, histories that go round in steps."""
    root = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 40, 60), rng.integers(5, 14, 60)
    histories = [[(start + 3 * i) % 40 + 1 for i in range(length)] for start, length in zip(starts, lengths)]
    sequences = make_sequences(histories, items=40)
    dataset = write_dataset_folder(root / "toy", sequences)
    cache = fill_store(
        root / "cache", sequences.item_ids, random_table([(2, 16), (2, 16)], 40, torch.float32), ("image", "title")
    )
    return dataset, cache


@pytest.fixture(scope="session")
def encoder_views(tmp_path_factory) -> list[ViewConfig]:
    """Two small encoders, for images and for titles: the embedded demo's."""
    from iisan_fast import demo  # imports transformers, which takes seconds

    home = tmp_path_factory.mktemp("encoders")
    demo.write_image_encoder(home / "image", seed=0)
    demo.write_text_encoder(home / "text", seed=0)
    return [ViewConfig("image", "image", str(home / "image")), ViewConfig("title", "title", str(home / "text"))]


@pytest.fixture
def catalogue(tmp_path) -> Path:
    """A dataset's folder: 70 items, titles of one to twenty words and images of noise in all sizes; 160 users."""
    from iisan_fast import demo

    items, generator = 70, np.random.default_rng(0)
    histories = [generator.integers(1, items + 1, length).tolist() for length in generator.integers(5, 14, 160)]
    histories[0] = list(range(1, 14))
    root = write_dataset_folder(tmp_path / "dataset", make_sequences(histories, items))
    words = [*demo.BRANDS, *demo.MATERIALS]
    titles = [" ".join(generator.choice(words, size=generator.integers(1, 21))) for _ in range(items)]
    (root / "items.tsv").write_text("".join(f"i{n}\t{title}\n" for n, title in enumerate(titles, start=1)))
    (root / "images").mkdir()
    for n in range(1, items + 1):
        size = int(generator.integers(9, 90)), int(generator.integers(9, 90)), 3
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(root / "images" / f"i{n}.png")
    return root


@pytest.fixture
def two_threads_and_nan_in_new_memory(monkeypatch) -> Iterator[None]:
    """Work is shared out, and what nobody wrote to is seen."""
    empty, threads = Memory.empty, torch.get_num_threads()
    monkeypatch.setattr(Memory, "empty", lambda *arguments: empty(*arguments).fill_(float("nan")))
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
