"""The embedded demo: reproducible to the byte, valid as a dataset, and predictable from content and nothing else."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from helpers.run_folders import hit_rates
from iisan_fast import demo
from iisan_fast.config import RunConfig, ViewConfig
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.sequences import Dataset, load_dataset, statistics
from iisan_fast.setting_fields import from_dict
from iisan_fast.states.extraction import extract
from iisan_fast.training.start_run import train


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ViewConfig]]:
    return demo.write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_demo(tmp_path_factory.mktemp("shuffled"), shuffle_content=True)[0]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@functools.cache
def contents(folder: Path) -> list[tuple[int, int]]:
    """Return (material, colour) of every item of the catalogue, from its title and its picture."""
    dataset = load_dataset(folder)
    base = np.array([65536, 256, 1])
    colours = np.array(list(demo.COLOURS.values())) @ base
    pairs = []
    with open_images(folder) as images:
        for item_id, title in zip(dataset.sequences.item_ids, dataset.titles):
            pixels = np.asarray(images.decode(images.content(item_id))) @ base
            shown = [np.count_nonzero(pixels == colour) for colour in colours]
            pairs.append((demo.MATERIALS.index(title.split()[1]), int(np.argmax(shown))))
    return pairs


def followed(folder: Path) -> float:
    """Return the share of steps to the next material and the next colour."""
    sequences = load_dataset(folder).sequences
    pairs = np.array(contents(folder))
    history = pairs[sequences.items - 1]
    steps = (history[1:] - history[:-1]) % (len(demo.MATERIALS), len(demo.COLOURS))
    within = np.ones(len(steps), dtype=bool)
    within[sequences.offsets[1:-1] - 1] = False
    return float((steps[within] == 1).all(axis=1).mean())


@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes(written: tuple[Path, list[ViewConfig]], tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    demo.write_demo(tmp_path)
    assert tree(tmp_path) == tree(written[0].parent)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_another_seed_writes_another_demo(written: tuple[Path, list[ViewConfig]], tmp_path: Path) -> None:
    demo.write_demo(tmp_path, seed=1)
    here, there = tree(tmp_path), tree(written[0].parent)
    assert here.keys() == there.keys()
    weights = [name for name in here if name.endswith(".safetensors")]
    for name in ("dataset/items.tsv", "dataset/users.tsv", "dataset/images/item0000.png", *weights):
        assert here[name] != there[name]


def test_a_full_disk_names_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_dataset", fail)
    with pytest.raises(OSError, match="No space left on device") as raised:
        demo.write_demo(tmp_path / "demo")
    assert raised.value.filename == str(tmp_path / "demo")


def test_it_is_a_dataset_of_the_protocol(written: tuple[Path, list[ViewConfig]]) -> None:
    dataset = load_dataset(written[0])
    counts = statistics(dataset.sequences)
    assert counts["users"] == demo.USERS
    assert 0.95 * demo.ITEMS < counts["items"] <= demo.ITEMS
    assert counts["interactions_per_item"] < 7
    assert counts["unreachable_targets_share"] < 0.01
    lengths = np.diff(dataset.sequences.offsets)
    assert (lengths.min(), lengths.max()) == demo.HISTORY_LENGTHS


def test_every_item_has_a_drawing(written: tuple[Path, list[ViewConfig]]) -> None:
    sequences = load_dataset(written[0]).sequences
    with open_images(written[0]) as images:
        pictures = [images.decode(images.content(item_id)) for item_id in sequences.item_ids]
    assert {picture.size for picture in pictures} == {(demo.IMAGE_SIZE, demo.IMAGE_SIZE)}
    assert len({picture.tobytes() for picture in pictures}) > 0.9 * len(pictures)


def test_every_attribute_of_a_picture_is_seen() -> None:
    product = demo.Product(*[0] * 7, size=20, left=32, top=32)
    pictures = {demo.draw(product).tobytes()}
    for name, values in (("colour", demo.COLOURS), ("kind", demo.KINDS), ("pattern", demo.PATTERNS)):
        pictures |= {demo.draw(replace(product, **{name: index})).tobytes() for index in range(1, len(values))}
    assert len(pictures) == 1 + sum(len(values) - 1 for values in (demo.COLOURS, demo.KINDS, demo.PATTERNS))
    assert demo.draw(product).tobytes() == demo.draw(replace(product, material=3, brand=2, occasion=1)).tobytes()


def test_titles_use_all_words_but_colours_and_patterns(written: tuple[Path, list[ViewConfig]]) -> None:
    words = {word for title in load_dataset(written[0]).titles for word in title.lower().split()}
    assert words == {"for", *demo.BRANDS, *demo.MATERIALS, *demo.KINDS, *demo.OCCASIONS}
    assert not words & {*demo.COLOURS, *demo.PATTERNS}


def test_shuffling_deals_titles_and_pictures_out_together(
    written: tuple[Path, list[ViewConfig]], shuffled: Path
) -> None:
    def dealt(folder: Path) -> list[tuple[str, bytes]]:
        lines = (folder / "items.tsv").read_text().splitlines()
        fields = [line.split("\t") for line in lines]
        return [(title, (folder / "images" / f"{item_id}.png").read_bytes()) for item_id, title in fields]

    assert (shuffled / "users.tsv").read_bytes() == (written[0] / "users.tsv").read_bytes()
    assert sorted(dealt(shuffled)) == sorted(dealt(written[0]))
    assert sum(here == there for here, there in zip(dealt(shuffled), dealt(written[0]))) < 0.02 * demo.ITEMS


def test_content_predicts_the_next_item_unless_shuffled(written: tuple[Path, list[ViewConfig]], shuffled: Path) -> None:
    assert followed(written[0]) > 0.65
    assert followed(shuffled) < 0.03


def test_settings_are_a_run_configuration() -> None:
    config = from_dict(RunConfig, {"dataset": "d", "cache": "c", "views": ["image", "title"], **demo.settings()})
    assert config.train.max_epochs == 30


def test_text_encoder_knows_every_word(written: tuple[Path, list[ViewConfig]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written[1][1].encoder)
    ids = tokenizer(load_dataset(written[0]).titles)["input_ids"]
    assert tokenizer.unk_token_id not in {token for title in ids for token in title}
    assert max(map(len, ids)) <= written[1][1].max_tokens


@pytest.mark.parametrize("view", [0, 1])
def test_encoders_load_as_written(written: tuple[Path, list[ViewConfig]], view: int) -> None:
    folder = written[1][view].encoder
    model, info = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    matrices = [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]
    assert all(abs(float(matrix.std()) * matrix[0].numel() ** 0.5 - 1) < 0.2 for matrix in matrices[-10:])


def _titles(dataset: Dataset, encoder: str) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    return model(**tokenizer(dataset.titles, padding=True, return_tensors="pt")).last_hidden_state[:, 0]


def _pictures(dataset: Dataset, encoder: str) -> torch.Tensor:
    model = AutoModel.from_pretrained(encoder)
    with open_images(dataset.root) as images:
        ids = dataset.sequences.item_ids
        pixels = np.stack([np.asarray(images.decode(images.content(item_id))) for item_id in ids])
    return model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state[:, 0]


@pytest.mark.slow
@torch.inference_mode()
def test_each_view_tells_its_own_attribute_only(written: tuple[Path, list[ViewConfig]]) -> None:
    """Fit a linear probe on half of the catalogue: it reads material off titles and colour off pictures."""
    dataset = load_dataset(written[0])
    (image, title) = (view.encoder for view in written[1])
    material, colour = torch.tensor(contents(written[0])).T

    def readable(states: torch.Tensor, labels: torch.Tensor) -> float:
        states = torch.cat([states, torch.ones(len(states), 1)], dim=1).double()
        half = len(states) // 2
        one_hot = torch.nn.functional.one_hot(labels[:half]).double()
        ridge = states[:half].T @ states[:half] + 1e-3 * torch.eye(states.shape[1])
        weights = torch.linalg.solve(ridge, states[:half].T @ one_hot)
        return float(((states[half:] @ weights).argmax(dim=1) == labels[half:]).double().mean())

    titles = _titles(dataset, title)
    pictures = _pictures(dataset, image)
    assert readable(titles, material) > 0.95
    assert readable(titles, colour) < 0.2
    assert readable(pictures, colour) > 0.85
    assert readable(pictures, material) < 0.15


@pytest.mark.long
def test_the_demo_is_learned_from_nothing_but_its_content(
    shuffled: Path, written: tuple[Path, list[ViewConfig]], tmp_path: Path
) -> None:
    """Shuffle the content among the items: the training of test_packaging.py is then about as good as popularity."""
    _, views = written
    extract(load_dataset(shuffled), views, tmp_path / "states", torch.device("cpu"))
    settings = {
        "dataset": str(shuffled),
        "cache": str(tmp_path / "states"),
        "views": ["image", "title"],
        **demo.settings(),
    }
    config = from_dict(RunConfig, settings)
    model, popularity = hit_rates(train(config, tmp_path / "shuffled", torch.device("cpu")))
    # "About": the same run gave 1.3 to 1.5 times it with other numbers of threads, against 23 times with its content;
    # 28 hits among 1,600 users are known to a fifth.
    assert model <= 2 * popularity
