"""Settings of the test process, and fixtures that several test files share. What tests import lies in helpers/."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator

from platformdirs import user_cache_path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the program does
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded in tests
os.environ.setdefault(  # the C++ is compiled once for each machine, not for each test run
    "IISAN_FAST_COMPILED",
    str(user_cache_path("iisan-fast", appauthor=False) / "compiled"),
)

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is made: they then run on CPU tensors

from helpers.compiler import compile_library
from helpers.datasets import (
    DATA,
    histories_at_random,
    histories_in_steps,
    make_sequences,
    write_catalogue,
    write_dataset_folder,
)
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, RunConfig, TrainConfig, ViewConfig
from iisan_fast.data.sequences import Sequences, load_dataset
from iisan_fast.kernels.cpu.step_memory import Memory

pytest_plugins = ["helpers.durations"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the C++ before pytest-xdist starts its workers, each of which would compile it."""
    if session.config.getoption("numprocesses", None) and not session.config.option.collectonly:
        compile_library()


@pytest.fixture(autouse=True)
def verbosity_as_before() -> Iterator[None]:
    """Reset what --quiet and --verbose set in this process: the levels of logs, and variables of other libraries."""
    names = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    logging.getLogger("iisan_fast").setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Keep digests in a folder of the tests, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def threads_given_back() -> Iterator[None]:
    """Restore the number of threads of torch after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scientific_folder() -> Path:
    """Return the Scientific dataset of the IISAN paper; tests that need it are skipped where it is absent."""
    folder = DATA / "amazon-scientific"
    if not folder.is_dir():
        pytest.skip(f"needs the Scientific dataset in {folder} (or under IISAN_FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def scientific(scientific_folder: Path) -> Sequences:
    return load_dataset(scientific_folder).sequences


@pytest.fixture
def toy_config(toy_run) -> RunConfig:
    """Return the settings of a small model on the toy run."""
    dataset, cache = toy_run
    model = ModelConfig(embedding_dim=16, bottleneck=8)
    train = TrainConfig(batch_users=16, max_epochs=2)
    return RunConfig(str(dataset), str(cache), ("image", "title"), model=model, train=train)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> tuple[Path, Path]:
    """Return (dataset folder, cache of views `image` and `title`): 60 users, 40 items, histories in fixed steps."""
    root = tmp_path_factory.mktemp("toy")
    sequences = make_sequences(histories_in_steps(60, 40), items=40)
    dataset = write_dataset_folder(root / "toy", sequences)
    cache = fill_store(
        root / "cache", sequences.item_ids, random_table([(2, 16), (2, 16)], 40, torch.float32), ("image", "title")
    )
    return dataset, cache


@pytest.fixture(scope="session")
def encoder_views(tmp_path_factory) -> list[ViewConfig]:
    """Return the settings of two small encoders, of images and of titles: those of the embedded demo."""
    from iisan_fast import demo  # imports transformers, which takes seconds

    home = tmp_path_factory.mktemp("encoders")
    demo.write_image_encoder(home / "image", seed=0)
    demo.write_text_encoder(home / "text", seed=0)
    return [ViewConfig("image", "image", str(home / "image")), ViewConfig("title", "title", str(home / "text"))]


@pytest.fixture(scope="session")
def catalogue_to_copy(tmp_path_factory) -> Path:
    """Return a dataset's folder that no test may change: 70 items, 160 users."""
    return write_catalogue(tmp_path_factory.mktemp("catalogue") / "dataset", histories_at_random(160, 70), 70)


@pytest.fixture
def catalogue(catalogue_to_copy, tmp_path) -> Path:
    """Return a dataset's folder that the test may change: 70 items, 160 users."""
    return shutil.copytree(catalogue_to_copy, tmp_path / "dataset")


@pytest.fixture(scope="session")
def small_catalogue(tmp_path_factory) -> Path:
    """Return a dataset's folder that no test may change: 24 items, 64 users."""
    return write_catalogue(tmp_path_factory.mktemp("small") / "dataset", histories_in_steps(64, 24), 24)


@pytest.fixture
def two_threads_and_nan_in_new_memory(monkeypatch) -> Iterator[None]:
    """Share work among two threads, and fill memory that was not written with NaN."""
    empty = Memory.empty
    threads = torch.get_num_threads()
    monkeypatch.setattr(Memory, "empty", lambda *arguments: empty(*arguments).fill_(float("nan")))
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Callable[[str, str], Path]:
    """Return a function (kind, family) -> folder of that family's tiny model, which is built once."""
    from helpers import encoders  # imports transformers, which takes seconds

    root = tmp_path_factory.mktemp("encoders")
    folders = {}

    def build(kind: str, family: str) -> Path:
        if (kind, family) not in folders:
            torch.manual_seed(len(folders))
            build_model = (encoders.TEXT if kind == "title" else encoders.IMAGE)[family][0]
            style = encoders.TEXT[family][1] if kind == "title" else None
            processor = encoders.IMAGE[family][1] if kind == "image" else None
            folders[kind, family] = encoders.save(build_model(), root / f"{kind}-{family}", processor, style)
        return folders[kind, family]

    return build
