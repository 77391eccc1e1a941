"""Check uncached reading: the inputs are the same in every place, and states and training are those of a cache."""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.recommenders import side_recommender
from iisan_fast.config import ExtractionConfig, ModelConfig, ViewConfig
from iisan_fast.data.batches import epoch_batches, padded_shape
from iisan_fast.data.sequences import Dataset, load_dataset
from iisan_fast.encoders.base import Backbone
from iisan_fast.encoders.image import ImageBackbone
from iisan_fast.errors import InputError
from iisan_fast.states.extraction import extract
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.input_table import EncodedTable, open_inputs
from iisan_fast.states.item_source import Chunks, ItemSource
from iisan_fast.states.loader import prepared_batches
from iisan_fast.training.training_step import TrainingStep

CPU = torch.device("cpu")
ITEMS = 70
HOMES = ("device", "pinned", "mapped")

pytestmark = pytest.mark.slow
each_home = pytest.mark.parametrize("placement", HOMES)


@pytest.fixture
def views(encoder_views) -> list[ViewConfig]:
    return encoder_views


@pytest.fixture
def root(catalogue) -> Path:
    return catalogue


@pytest.fixture
def dataset(root) -> Dataset:
    return load_dataset(root)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("images", "batches"))]


def numbers(*items: int) -> Tensor:
    return torch.tensor(items, dtype=torch.int64)


def in_order(chunks: Chunks, name: str, width: int = 0) -> Tensor:
    """Return one input of all parts, padded to a width, in the order of the items."""
    parts = [part[name] for part in chunks.parts]
    if width:
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    merged = torch.cat(parts)
    return merged if chunks.order is None else merged[chunks.order]


def read(chunks: Chunks) -> Tensor:
    """Return a view's main input, in the order of the items."""
    return in_order(chunks, "input_ids", 32) if "input_ids" in chunks.parts[0] else in_order(chunks, "pixel_values")


def said(caplog, module: str = "states.input_table") -> list[str]:
    """Return the messages that the module logged."""
    return [record.message for record in caplog.records if record.name == f"iisan_fast.{module}"]


# Contents


@each_home
@pytest.mark.parametrize("part_items", [1, 4, 100])
def test_encoders_read_what_their_processors_make(dataset, views, placement, part_items):
    chosen = [7, 3, 60, 3, 70, 1, 22]
    with closing(open_inputs(dataset, views, CPU, placement, part_items=part_items)) as contents:
        image, title = contents.read(numbers(*chosen))
        read = [backbone.prepare for backbone in contents.backbones]
    names = [dataset.sequences.item_ids[item - 1] for item in chosen]
    pictures = [Image.open(dataset.root / "images" / f"{name}.png") for name in names]
    assert torch.equal(in_order(image, "pixel_values"), read[0](pictures)["pixel_values"])
    expected = read[1]([dataset.titles[item - 1] for item in chosen])
    for name, whole in expected.items():
        ordered = in_order(title, name, whole.shape[1])
        assert ordered.dtype == whole.dtype and torch.equal(ordered, whole)


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (8, [4, 4]), (9, [3, 3, 3]), (10, [3, 3, 4])])
def test_parts_are_as_few_and_as_equal_as_can_be_and_texts_fall_in_length(dataset, views, count, sizes):
    with closing(open_inputs(dataset, views, CPU, part_items=4)) as contents:
        chunks_by_view = contents.read(torch.arange(1, count + 1))
    for chunks in chunks_by_view:
        assert [len(next(iter(part.values()))) for part in chunks.parts] == sizes
    lengths = [part["attention_mask"].sum(dim=1) for part in chunks_by_view[1].parts]
    assert [part["input_ids"].shape[1] for part in chunks_by_view[1].parts] == [
        int(part_lengths.max()) for part_lengths in lengths
    ]
    assert torch.cat([*lengths, numbers()]).diff().le(0).all()


def test_every_home_gives_identical_inputs(dataset, views):
    items = [numbers(5, 9, 1, 44, 0, 0), torch.arange(1, ITEMS + 1), numbers(0), numbers(2)]
    inputs_by_home = []
    for placement in HOMES:
        with closing(open_inputs(dataset, views, CPU, placement, part_items=8)) as contents:
            inputs_by_home.append([contents.read(numbers_of_batch) for numbers_of_batch in items])
            gathered = contents.gather(numbers(5, 9))
            assert [tensor.dtype for tensor in gathered.tensors[:-1]] == [torch.uint8] * (placement != "device")
            assert gathered.tensors[-1].dtype == torch.int32
    for resident, *gathered_inputs in zip(*inputs_by_home):
        for expected, *chunks_by_home in zip(resident, *gathered_inputs):
            for chunks in chunks_by_home:
                assert len(chunks.parts) == len(expected.parts)
                for part, gathered_part in zip(expected.parts, chunks.parts):
                    assert part.keys() == gathered_part.keys() and all(
                        torch.equal(part[name], gathered_part[name]) for name in part
                    )
                assert expected.order is chunks.order is None or torch.equal(expected.order, chunks.order)


@each_home
def test_workers_fill_the_same_table(dataset, views, placement):
    images_by_workers = []
    for workers in (0, 1):
        with closing(open_inputs(dataset, views[:1], CPU, placement, workers=workers)) as contents:
            images_by_workers.append(in_order(contents.read(torch.arange(1, ITEMS + 1))[0], "pixel_values"))
    assert torch.equal(*images_by_workers)


def test_captions_and_two_views_of_one_source_are_read_as_titles_are(root, views):
    (root / "captions.tsv").write_text("".join(f"i{n}\tcaption of {n}\n" for n in range(1, ITEMS + 1)))
    captioned = ViewConfig("caption", "caption", views[1].encoder)
    with closing(open_inputs(load_dataset(root), [captioned, views[1]], CPU)) as contents:
        caption, title = contents.read(numbers(4, 2))
    assert caption.order is not None and title.parts[0]["input_ids"].shape[0] == 2


def test_where_images_lie_is_said_and_of_texts_alone_nothing(dataset, views, monkeypatch, caplog):
    monkeypatch.setattr("iisan_fast.states.placement.free_memory", lambda device: 1 << 30)
    with caplog.at_level(logging.INFO, logger="iisan_fast.states.placement"):
        open_inputs(dataset, views[1:], CPU).close()
        assert not said(caplog, "states.placement")
        open_inputs(dataset, views, CPU).close()
        monkeypatch.setattr("iisan_fast.states.placement.free_memory", lambda device: 1000)
        open_inputs(dataset, views, CPU).close()
    assert said(caplog, "states.placement") == [
        "image table: 1 MiB, on cpu (1.0 GiB free on cpu)",
        "image table: 1 MiB, in the dataset's files, decoded ahead (0 MiB free on cpu)",
    ]
    with pytest.raises(InputError, match="table: pinned needs 1 MiB, found 0 MiB free"):
        open_inputs(dataset, views, CPU, "pinned")


def test_images_without_a_byte_form_are_decoded_whenever_they_are_read(dataset, views, monkeypatch, caplog):
    with closing(open_inputs(dataset, views, CPU, "device")) as contents:
        expected = in_order(contents.read(numbers(3, 8))[0], "pixel_values")
    monkeypatch.setattr(ImageBackbone, "byte_form", lambda self: None)
    with caplog.at_level(logging.INFO, logger="iisan_fast.states.input_table"):
        contents = open_inputs(dataset, views, CPU, "device")
    with closing(contents):
        assert contents.gather(numbers(3, 8)).tensors[0].dtype == torch.float32
        assert torch.equal(in_order(contents.read(numbers(3, 8))[0], "pixel_values"), expected)
    assert said(caplog) == ["view 'image': its images cannot be kept as bytes, so each reading decodes them"]


# Content that is missing


def spoil(root: Path) -> None:
    (root / "images" / "i3.png").unlink()
    (root / "images" / "i9.png").write_bytes(b"no image")


@each_home
def test_bad_images_are_all_named_before_anything_is_read(root, views, placement):
    spoil(root)
    with pytest.raises(InputError) as error:
        open_inputs(load_dataset(root), views[::-1], CPU, placement)
    assert str(error.value).startswith("view 'image': 2 of 70 items cannot be read: i3 (no image), i9 (not an image of")
    assert str(error.value).endswith("missing_images: blank fills them")


def test_blanks_fill_bad_images_in_every_home(root, views, caplog):
    spoil(root)
    dataset = load_dataset(root)
    images_by_home = []
    for placement in HOMES:
        with (
            caplog.at_level(logging.INFO, logger="iisan_fast.states.input_table"),
            closing(open_inputs(dataset, views, CPU, placement, missing_images="blank")) as contents,
        ):
            images_by_home.append(in_order(contents.read(numbers(3, 9))[0], "pixel_values"))
    assert (
        images_by_home[0].eq(1).all()
        and torch.equal(images_by_home[0], images_by_home[1])
        and torch.equal(images_by_home[0], images_by_home[2])
    )
    assert said(caplog) == ["view 'image': 2 of 70 images are blank"] * 2


def test_what_a_dataset_lacks_is_named(root, dataset, views):
    with pytest.raises(InputError, match="missing_images: expected one of error, blank, found 'skip'"):
        open_inputs(dataset, views, CPU, missing_images="skip")
    with pytest.raises(InputError, match="captions.tsv: view 'caption' needs captions, found none"):
        open_inputs(dataset, [ViewConfig("caption", "caption", views[1].encoder)], CPU)
    (root / "captions.tsv").write_text("i1\tone\n")
    with pytest.raises(InputError, match=r"view 'caption': 69 of 70 items cannot be read: i2 \(no text\)"):
        open_inputs(load_dataset(root), [ViewConfig("caption", "caption", views[1].encoder)], CPU)


# States


def open_encoded(
    dataset: Dataset, views: list[ViewConfig], placement: str = "device", dtype: torch.dtype | None = None
) -> EncodedTable:
    return EncodedTable(open_inputs(dataset, views, CPU, placement, part_items=16), torch.bfloat16, dtype)


def in_ulps(states: Tensor, expected: Tensor) -> Tensor:
    """Return how many bfloat16 numbers apart the values are."""
    places = [
        torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in (states.view(torch.int16), expected.view(torch.int16))
    ]
    return (places[0].int() - places[1].int()).abs()


@each_home
def test_states_are_the_stores(dataset, views, tmp_path, placement):
    """States differ by at most one number of the store's dtype.

    The last bits of a matrix product depend on its number of rows, so a value between two numbers may be rounded to
    either.
    """
    extract(dataset, views, tmp_path / "cache", CPU, ExtractionConfig(batch_size=16))
    names = [view.name for view in views]
    stored = load_table(tmp_path / "cache", names, dataset.sequences.item_ids, CPU, "device")
    with closing(open_encoded(dataset, views, placement)) as encoded:
        assert encoded.shapes == stored.shapes and encoded.rows == stored.rows == ITEMS + 1
        for items in (torch.arange(1, ITEMS + 1), numbers(9, 2, 70, 2), numbers(5)):
            for view_states, whole in zip(encoded.read(items), stored.views, strict=True):
                assert view_states.rows is None and view_states.table.dtype == torch.bfloat16
                apart = in_ulps(view_states.table, whole[items])
                assert apart.max() <= 1 and apart.count_nonzero() <= 1e-3 * apart.numel()


def test_states_are_rounded_to_the_stores_dtype_before_they_take_another(dataset, views):
    with closing(open_encoded(dataset, views, dtype=torch.float32)) as encoded:
        for states, _ in encoded.read(numbers(1, 2, 3)):
            assert states.dtype == torch.float32 and torch.equal(states, states.bfloat16().float())
            assert not states.is_inference() and not states.requires_grad


def test_padding_is_zero_and_is_not_encoded(dataset, views, monkeypatch):
    counts = []
    encode = Backbone.encode_views

    def counted(self, backbones, inputs) -> list[Tensor]:
        counts.append(len(next(iter(inputs.values()))))
        return encode(self, backbones, inputs)

    with closing(open_encoded(dataset, views)) as encoded:
        whole = encoded.read(numbers(8, 4, 6))
        monkeypatch.setattr(Backbone, "encode_views", counted)
        padded = encoded.read(numbers(8, 4, 6, 0, 0))
        assert counts == [3, 3]
        for unpadded, (states, _) in zip(whole, padded):
            assert torch.equal(states[:3], unpadded.table) and states.shape[0] == 5 and not states[3:].any()
        for items in (numbers(0, 0), numbers()):
            assert all(len(states) == len(items) and not states.any() for states, _ in encoded.read(items))
        assert counts == [3, 3]


def test_views_of_one_encoder_share_its_inputs_and_its_forward(dataset, views):
    image, title = views
    pooled = [title, image, replace(title, name="mean", pooling="mean", layers=(1, 2))]
    items = numbers(8, 4, 66, 0)
    expected = []
    for view in pooled:
        with closing(open_encoded(dataset, [view])) as encoded:
            expected += encoded.read(items)
    classes: list[str] = []
    with closing(open_encoded(dataset, pooled)) as encoded:
        title_model, image_model, mean_model = (backbone.model for backbone in encoded.inputs.backbones)
        assert title_model is mean_model
        for model in (title_model, image_model):
            model.register_forward_pre_hook(lambda model, _inputs: classes.append(type(model).__name__))
        assert len(encoded.gather(items).tensors) == 1  # only the titles, because the device holds the images
        states = encoded.read(items)
        assert classes == ["BertModel", "ViTModel"]
        assert [len(inputs) for inputs in encoded.inputs.largest(2)] == [2, 1, 2]
    for (shared, _), (alone, _) in zip(states, expected, strict=True):
        assert torch.equal(shared, alone) and shared[:3].any()


def test_encoders_to_be_trained_share_nothing(dataset, views):
    both = [views[1], replace(views[1], name="mean", pooling="mean")]
    with closing(open_inputs(dataset, both, CPU, trained=True)) as contents:
        first, second = (backbone.model for backbone in contents.backbones)
        assert not {*first.parameters()} & {*second.parameters()}
        assert len(contents.gather(numbers(1, 2)).tensors) == 2


def batches(source: ItemSource, dataset: Dataset, padded: bool = False):
    sequences = dataset.sequences
    shape = padded_shape(sequences, 16) if padded else None
    for epoch in range(2):
        yield from prepared_batches(epoch_batches(sequences, 16, 0, epoch), source, CPU, shape)


@each_home
@pytest.mark.parametrize("padded", [False, True])
def test_the_loader_gives_a_batchs_states(dataset, views, placement, padded):
    with closing(open_encoded(dataset, views, placement)) as encoded:
        for count, prepared in enumerate(batches(encoded, dataset, padded), start=1):
            for (states, rows), (expected, _) in zip(prepared.item_inputs, encoded.read(prepared.batch.distinct)):
                assert rows is None and torch.equal(states, expected)
            if count == 3:
                break


def test_the_loader_gives_a_batchs_contents(dataset, views):
    with closing(open_inputs(dataset, views, CPU, "mapped", part_items=16)) as contents:
        prepared = next(batches(contents, dataset))
        again = contents.read(prepared.batch.distinct)
    assert all(torch.equal(*both) for both in zip(map(read, prepared.item_inputs), map(read, again)))


def test_an_image_that_changes_while_it_is_in_use_stops_the_run(root, dataset, views):
    ids = dataset.sequences.item_ids
    files = {file.stem: file for file in (root / "images").iterdir()}
    item = next(number for number, item_id in enumerate(ids, start=1) if item_id in files)
    file = files[ids[item - 1]]
    with closing(open_inputs(dataset, views, CPU, "mapped")) as contents:
        first = read(contents.read(numbers(item))[0])
        content = file.read_bytes()
        Image.new("RGB", (9, 9), "red").save(file)
        with pytest.raises(
            InputError, match=f"images: the image of item {ids[item - 1]!r} has changed while it was in"
        ):
            contents.read(numbers(item))
        file.write_bytes(content)
        assert torch.equal(read(contents.read(numbers(item))[0]), first)


def test_uncached_training_follows_cached(dataset, views, tmp_path):
    extract(dataset, views, tmp_path / "cache", CPU)
    names = [view.name for view in views]
    sequences = dataset.sequences
    stored = load_table(tmp_path / "cache", names, sequences.item_ids, CPU)
    losses, weights = [], []
    with closing(open_encoded(dataset, views, "mapped")) as encoded:
        for source in (stored, encoded):
            config = ModelConfig(embedding_dim=16, bottleneck=8)
            popularity = np.maximum(sequences.popularity, 1e-4)
            model = side_recommender(source.shapes, config, sequences.max_inputs, popularity, seed=1).train()
            step = TrainingStep(model, dict.fromkeys(model.parameter_groups(), 1e-3), CPU)
            losses.append([step(taken.batch, taken.item_inputs).item() for taken in batches(source, dataset)])
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    cached, uncached = losses
    assert len(cached) == 20 and cached[-1] < cached[0] - 0.1
    assert uncached == pytest.approx(cached, rel=1e-4)
    assert (weights[0] - weights[1]).norm() < 1e-2 * weights[0].norm()


def test_what_is_open_is_closed_with_the_table(dataset, views):
    encoded = open_encoded(dataset, views, "mapped")
    encoded.read(numbers(1, 2))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("images")]
    encoded.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        encoded.gather(numbers(1))


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each_home
def test_on_a_gpu_contents_are_read_without_waiting_and_states_are_near_a_cpus(dataset, views, placement):
    device = torch.device("cuda")
    items = torch.arange(1, 60)
    whole = [ViewConfig(view.name, view.source, view.encoder, encoder_dtype="float32") for view in views]
    with closing(open_encoded(dataset, whole)) as encoded:
        inputs, expected = encoded.inputs.read(items), encoded.read(items)
    contents = open_inputs(dataset, whole, device, placement, part_items=16)
    with closing(EncodedTable(contents, torch.bfloat16)) as encoded:
        gathered = contents.gather(items)
        assert all(tensor.is_pinned() for tensor in gathered.tensors)
        moved = gathered._replace(tensors=[tensor.to(device, non_blocking=True) for tensor in gathered.tensors])
        numbers_there = items.to(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gpu_inputs = contents.read(numbers_there, moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(
            torch.equal(on_gpu.cpu(), on_cpu) for on_gpu, on_cpu in zip(map(read, gpu_inputs), map(read, inputs))
        )
        for on_gpu, on_cpu in zip(encoded.read(items), expected):
            torch.testing.assert_close(on_gpu.table.float().cpu(), on_cpu.table.float(), rtol=2e-2, atol=2e-2)
