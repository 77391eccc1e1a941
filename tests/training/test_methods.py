"""Check every method with one trainer: losses fall, frozen weights stay, runs resume exactly, parts change nothing."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.run_folders import assert_same_run
from iisan_fast import demo
from iisan_fast.config import (
    LEARNING_RATES,
    SIDE_METHODS,
    STATE_METHODS,
    TUNING_METHODS,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.base import Backbone
from iisan_fast.encoders.random_encoders import write_bert
from iisan_fast.errors import InputError, Stopped
from iisan_fast.precision import resolve_precision
from iisan_fast.states.extraction import extract
from iisan_fast.training import memory_budget as memory
from iisan_fast.training.best_run import evaluate_run
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.item_sources import open_source
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ITEMS = 24  # of the small catalogue
RATES = {"encoders": 1e-3, "adapters": 3e-3, "gates": 3e-3, "heads": 3e-3, "sequence_encoder": 3e-3}


def run_config(
    dataset: Path, method: str, views: list[ViewConfig] | None, cache: Path | None = None, epochs: int = 3, **encoding
) -> RunConfig:
    """Return the configuration of a small model; its encoders run in every step unless there is a cache."""
    sizes = {"bottleneck": 8} if method in (*SIDE_METHODS, "adapter") else {}
    model = ModelConfig(method, embedding_dim=16, **sizes)
    rates = {} if method == "id" else {group: RATES[group] for group in _groups(method)}
    optimisation = TrainConfig(batch_users=40, max_epochs=epochs, learning_rates=rates)
    names = tuple(view.name for view in views or ())
    uncached = UncachedConfig(tuple(views), **encoding) if views and cache is None else None
    return RunConfig(str(dataset), cache and str(cache), names, uncached, model=model, train=optimisation)


def _groups(method: str) -> list[str]:
    return list(
        RunConfig("d", None, (), None if method == "id" else ONE, model=ModelConfig(method)).train.learning_rates
    )


OTHER_METHODS = ("adapter", "bitfit", "iisan", "frozen")
ONE = UncachedConfig((ViewConfig("title", "title", "e"),))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in RunFolder(folder).metrics.read_text().splitlines()]


def views_of(method: str, encoder_views: list[ViewConfig], count: int) -> list[ViewConfig] | None:
    return None if method == "id" else encoder_views[2 - count :]


@pytest.mark.parametrize(
    ("method", "count"),
    [
        *(pytest.param(method, 2, id=f"{method}-both views") for method in LEARNING_RATES),
        *(pytest.param(method, 1, id=f"{method}-titles") for method in SIDE_METHODS),
        *(pytest.param(method, 1, id=f"{method}-titles", marks=pytest.mark.long) for method in TUNING_METHODS),
        pytest.param("frozen", 1, id="frozen-titles", marks=pytest.mark.long),
    ],
)
def test_every_method_learns_and_is_evaluated_from_its_folder(method, count, encoder_views, small_catalogue, tmp_path):
    config = run_config(small_catalogue, method, views_of(method, encoder_views, count), epochs=6)
    result = train(config, tmp_path / "run", CPU)
    epoch_losses = losses(tmp_path / "run")
    assert epoch_losses[-1] < epoch_losses[0]
    assert evaluate_run(tmp_path / "run", "test", EvaluationConfig(), CPU)["test"] == result["test"]
    tensors, _ = load_checkpoint(RunFolder(tmp_path / "run").last)
    weights = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model."))
    assert weights == result["trainable_parameters"]  # no frozen weight in a checkpoint


@contextmanager
def open_trainer(config: RunConfig):
    dataset = load_dataset(Path(config.dataset))
    precision = resolve_precision(config, CPU)
    with open_source(config, dataset, CPU, "auto", precision) as (source, _):
        yield Trainer(config, dataset.sequences, source, CPU, precision)


def take(trainer: Trainer, steps: int) -> list[float]:
    """Take the first steps, and return their losses."""
    trainer.model.train()
    step_losses: list[float] = []
    for epoch in range(steps):
        with closing(trainer.batches(epoch)) as batches:
            for prepared in batches:
                step_losses.append(float(trainer.take(prepared)))
                if len(step_losses) == steps:
                    return step_losses
    return step_losses


@pytest.mark.parametrize("method", [method for method in LEARNING_RATES if method != "id"])
def test_frozen_weights_stay_as_they_are_bit_for_bit(method, encoder_views, small_catalogue):
    with open_trainer(run_config(small_catalogue, method, encoder_views)) as trainer:
        contents = trainer.source if method in TUNING_METHODS else trainer.source.inputs
        encoders = [backbone.model for backbone in contents.backbones]
        before = [{name: weight.clone() for name, weight in encoder.named_parameters()} for encoder in encoders]
        take(trainer, 3)
        changed = 0
        for encoder, old in zip(encoders, before):
            for name, weight in encoder.named_parameters():
                assert weight.requires_grad or torch.equal(weight, old[name]), name
                changed += not torch.equal(weight, old[name])
        assert (changed > 0) == (method in TUNING_METHODS)


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_parts_and_checkpointing_change_no_loss(method, encoder_views, small_catalogue):
    whole = run_config(small_catalogue, method, encoder_views)
    with open_trainer(whole) as trainer:
        expected = take(trainer, 2)
        assert trainer.memory.encoding.items_at_once == ITEMS and not trainer.memory.encoding.recompute
    for change in ({"items_at_once": 9}, {"items_at_once": 9, "checkpointing": True}):
        with open_trainer(replace(whole, uncached=replace(whole.uncached, **change))) as trainer:
            assert trainer.memory.encoding.recompute and trainer.source.part_items == 9
            assert take(trainer, 2) == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_is_split(encoder_views, small_catalogue, monkeypatch, caplog):
    config = run_config(small_catalogue, "full", encoder_views)
    caplog.set_level("INFO")
    with open_trainer(config) as trainer:
        whole = trainer.memory.encoding
        trained = sum(weight.nbytes for weight in trainer.model.parameters() if weight.requires_grad)
    monkeypatch.setattr(memory, "usable_memory", lambda device: 3 * trained + whole.estimate // 3)
    with open_trainer(config) as trainer:
        assert trainer.memory.encoding.recompute and 1 <= trainer.memory.encoding.items_at_once < ITEMS
        assert trainer.memory.encoding.estimate < whole.estimate / 3 < trainer.memory.encoding.estimate * 3
    assert "each part twice" in caplog.messages[-1]
    monkeypatch.setattr(memory, "usable_memory", lambda device: 500)
    with pytest.raises(InputError, match="one item's activations take"), open_trainer(config):
        pass


@pytest.mark.parametrize("method", STATE_METHODS)
def test_uncached_training_is_the_cached_one(method, encoder_views, small_catalogue, tmp_path):
    extract(load_dataset(small_catalogue), encoder_views, tmp_path / "cache", CPU)
    cached = train(run_config(small_catalogue, method, encoder_views, tmp_path / "cache"), tmp_path / "cached", CPU)
    uncached = train(run_config(small_catalogue, method, encoder_views), tmp_path / "uncached", CPU)
    assert losses(tmp_path / "uncached") == pytest.approx(losses(tmp_path / "cached"), rel=1e-3)
    assert uncached["trainable_parameters"] == cached["trainable_parameters"]


ABLATIONS = {
    "no gates": {"gates": False},
    "no inter tower": {"inter": False},
    "no intra towers": {"intra": False},
    "PHM": {"sanb": "phm"},
    "low rank": {"sanb": "low-rank"},
    "GELU": {"activation": "gelu"},
    **{f"{groups} blocks": {"layer_groups": groups} for groups in (2, 3, 4, 6)},
}


@pytest.fixture(scope="module")
def all_layers(encoder_views) -> list[ViewConfig]:
    return [replace(view, layers=tuple(range(7))) for view in encoder_views]


@pytest.fixture(scope="module")
def cache(all_layers, small_catalogue, tmp_path_factory) -> Path:
    """Extract the states of every layer into a cache."""
    path = tmp_path_factory.mktemp("states") / "cache"
    extract(load_dataset(small_catalogue), all_layers, path, CPU)
    return path


@pytest.fixture(scope="module")
def plain_loss(all_layers, small_catalogue, cache, tmp_path_factory) -> float:
    """Return the loss of the first epoch without an ablation."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(run_config(small_catalogue, "iisan", all_layers, cache, epochs=1), run, CPU)
    return losses(run)[0]


@pytest.mark.parametrize("change", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation_learns(change, all_layers, small_catalogue, cache, plain_loss, tmp_path):
    config = run_config(small_catalogue, "iisan", all_layers, cache, epochs=6)
    config = replace(config, model=replace(config.model, **change))
    result = train(config, tmp_path / "run", CPU)
    epoch_losses = losses(tmp_path / "run")
    assert epoch_losses[-1] < epoch_losses[0]
    assert epoch_losses[0] != plain_loss or change == {"layer_groups": 6}
    layers = change.get("layer_groups", 6) + 1
    if "layer_groups" in change:
        tower = layers * (2 * 64 * 8 + 8 + 64 + 1)
        heads = 3 * (64 * 65 + 65 * 16) + (48 + 1) * 16
        sequence_encoder = 10 * 16 + 2 * 16 + 2 * (4 * 16 * 16 + 2 * 16 + 17 * 64 + 65 * 16 + 2 * 16)
        assert result["trainable_parameters"] == 3 * tower + heads + sequence_encoder


@pytest.fixture(scope="module")
def twelve_blocks(tmp_path_factory) -> ViewConfig:
    """Extract titles through a BERT of twelve blocks, as in the paper."""
    folder = tmp_path_factory.mktemp("deep")
    words = [*demo.BRANDS, *demo.MATERIALS]
    shape = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 48}
    write_bert(folder, {"max_position_embeddings": 64, **shape}, words, seed=0)
    return ViewConfig("title", "title", str(folder))


@pytest.mark.parametrize("groups", [2, 3, 4, 6, 12])
def test_every_layerdrop_set_of_twelve_blocks_learns(groups, twelve_blocks, small_catalogue, tmp_path):
    config = run_config(small_catalogue, "iisan", [twelve_blocks], epochs=6)
    result = train(replace(config, model=replace(config.model, layer_groups=groups)), tmp_path / "run", CPU)
    epoch_losses = losses(tmp_path / "run")
    views = RunFolder(tmp_path / "run").views
    assert epoch_losses[-1] < epoch_losses[0]
    assert views["title"]["layers"] == [0, *range(12 // groups, 13, 12 // groups)]
    tower = (groups + 1) * (2 * 32 * 8 + 8 + 32 + 1)
    heads = 32 * 33 + 33 * 16 + 17 * 16
    sequence_encoder = 10 * 16 + 2 * 16 + 2 * (4 * 16 * 16 + 2 * 16 + 17 * 64 + 65 * 16 + 2 * 16)
    assert result["trainable_parameters"] == tower + heads + sequence_encoder


@pytest.mark.parametrize("method", ["full", "lora", "iisan", "id"])
def test_a_stopped_run_goes_on_exactly(method, encoder_views, small_catalogue, tmp_path):
    config = run_config(small_catalogue, method, views_of(method, encoder_views, 2), epochs=2)
    whole = train(config, tmp_path / "whole", CPU)

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", CPU, on_epoch=stop)
    assert resume(tmp_path / "stopped", CPU) == whole
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.long) for m in ("full", *OTHER_METHODS))]
)
def test_a_run_stopped_within_an_epoch_goes_on_exactly(method, encoder_views, small_catalogue, tmp_path, monkeypatch):
    parts = {"items_at_once": 5} if method in TUNING_METHODS else {}
    config = run_config(small_catalogue, method, encoder_views, epochs=2, **parts)
    config = replace(config, train=replace(config.train, batch_users=16, checkpoint_every=3))
    figures = train(config, tmp_path / "whole", CPU)
    take = Trainer.take

    def signalled(self, prepared):
        if prepared.batch.step in (1, 5):  # of four in an epoch
            signal.raise_signal(signal.SIGTERM)
        return take(self, prepared)

    monkeypatch.setattr(Trainer, "take", signalled)
    with pytest.raises(Stopped, match="step 2 of epoch 1 is saved"):
        train(config, tmp_path / "run", CPU)
    with pytest.raises(Stopped, match="step 2 of epoch 2 is saved"):
        resume(tmp_path / "run", CPU)
    monkeypatch.undo()
    assert resume(tmp_path / "run", CPU) == figures
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "iisan"])
def test_encoders_may_have_moved_but_not_changed(method, encoder_views, small_catalogue, tmp_path):
    config = run_config(small_catalogue, method, encoder_views, epochs=1)
    train(config, tmp_path / "run", CPU)
    train(replace(config, train=replace(config.train, max_epochs=2)), tmp_path / "whole", CPU)
    moved = {f"{kind}_encoder": str(tmp_path / kind) for kind in ("image", "text")}
    for view, folder in zip(encoder_views, moved.values()):
        shutil.copytree(view.encoder, folder)
    weights = tmp_path / "text" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="view 'title' has changed since the run began: weights .* there, .* now"):
        resume(tmp_path / "run", CPU, changes=RunChanges(max_epochs=2, **moved))
    assert RunFolder(tmp_path / "run").config.train.max_epochs == 1
    weights.write_bytes(content)
    resume(tmp_path / "run", CPU, changes=RunChanges(max_epochs=2, **moved))
    recorded = RunFolder(tmp_path / "run").config
    assert [view.encoder for view in recorded.uncached.views] == list(moved.values())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_titles(encoder_views, small_catalogue, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    dataset = shutil.copytree(small_catalogue, tmp_path / "dataset")
    with pytest.raises(KeyboardInterrupt):
        train(run_config(dataset, "iisan", encoder_views), tmp_path / "run", CPU, on_epoch=stop)
    items = dataset / "items.tsv"
    items.write_text(items.read_text().replace("\t", "\tother ", 1))
    with pytest.raises(
        InputError, match="view 'title' has changed since the run began: contents .* there, .* now; restore it"
    ):
        resume(tmp_path / "run", CPU)


@pytest.mark.parametrize("groups", [2, 6])
def test_layer_groups_choose_the_layers_of_encoders_that_run(groups, encoder_views, small_catalogue):
    config = run_config(small_catalogue, "iisan", encoder_views)
    config = replace(config, model=replace(config.model, layer_groups=groups))
    with open_trainer(config) as trainer:
        assert trainer.source.shapes == [(groups + 1, 64)] * 2
        take(trainer, 1)


@pytest.mark.parametrize(
    ("beyond", "message"),
    [
        ({"layer_groups": 7}, "text: layer_groups: expected 1 to 6, the encoder's blocks, found 7"),
        ({"layers": (0, 7)}, "text: layers: expected ascending numbers within 0..6, found 0,7"),
        ({"layers": (2, 0)}, "text: layers: expected ascending numbers within 0..6, found 2,0"),
    ],
)
def test_layers_that_an_encoder_has_not_are_refused_before_any_weights_are_read(
    beyond, message, encoder_views, small_catalogue, tmp_path
):
    """No weights are read, not even those of the first view, whose encoder has the layers."""
    image, title = encoder_views
    config = run_config(small_catalogue, "iisan-versa", [image, replace(title, **beyond)])
    weights = Path(image.encoder) / "model.safetensors"
    aside = weights.rename(tmp_path / "aside")
    try:
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "run", CPU)
        with pytest.raises(InputError, match=message):
            extract(load_dataset(small_catalogue), [image, replace(title, **beyond)], tmp_path / "cache", CPU)
    finally:
        aside.rename(weights)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("the C++ kernels lack memory for this batch"),
    ],
    ids=["CUDA", "CPU", "C++"],
)
def test_the_lack_of_memory_is_told_with_the_batch_and_what_to_lower(
    error, encoder_views, small_catalogue, monkeypatch
):
    with open_trainer(run_config(small_catalogue, "full", encoder_views)) as trainer:

        def fail(*_):
            raise error

        monkeypatch.setattr(trainer.model, "loss", fail)
        message = "not enough memory on cpu for batches of 40 users and up to 24 items, whose activations take up to"
        with pytest.raises(InputError, match=message) as caught:
            take(trainer, 1)
    assert "items_at_once" in str(caught.value)


@pytest.mark.parametrize("call", [1, 6], ids=["in a batch", "in validation"])
def test_the_lack_of_memory_is_told_where_frozen_encoders_run(
    call, encoder_views, small_catalogue, tmp_path, monkeypatch
):
    calls = []
    encode = Backbone.encode_views

    def fail(*arguments):
        calls.append(1)
        if len(calls) >= call:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return encode(*arguments)

    monkeypatch.setattr(Backbone, "encode_views", fail)
    message = "run: stopped in epoch 1: not enough memory on cpu for batches of 40 users .* whose states take up to"
    with pytest.raises(InputError, match=message):
        train(run_config(small_catalogue, "iisan", encoder_views), tmp_path / "run", CPU)


def test_a_run_goes_on_in_the_same_parts_whatever_memory_is_free(encoder_views, small_catalogue, tmp_path, monkeypatch):
    config = run_config(small_catalogue, "lora", encoder_views, epochs=2)
    whole = train(config, tmp_path / "whole", CPU)

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", CPU, on_epoch=stop)
    assert RunFolder(tmp_path / "stopped").config.uncached.items_at_once == ITEMS
    monkeypatch.setattr(memory, "usable_memory", lambda device: 500)
    assert resume(tmp_path / "stopped", CPU) == whole
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_frozen_encoders_give_their_final_state_or_are_refused(encoder_views, small_catalogue, tmp_path):
    views = [replace(view, layers=(0, 2)) for view in encoder_views]
    extract(load_dataset(small_catalogue), views, tmp_path / "cache", CPU)
    with pytest.raises(InputError, match="frozen reads the encoder's final state, layer 6; view 'image' of the cache"):
        train(run_config(small_catalogue, "frozen", views, tmp_path / "cache"), tmp_path / "run", CPU)


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("method", [pytest.param(method, marks=on_a_gpu) for method in LEARNING_RATES])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_every_method_trains_on_a_gpu_as_on_a_cpu(method, precision, encoder_views, small_catalogue, tmp_path):
    encoders = [replace(view, encoder_dtype="float32") for view in encoder_views]
    config = run_config(small_catalogue, method, views_of(method, encoders, 2))
    train(config, tmp_path / "cpu", CPU)
    config = replace(config, train=replace(config.train, precision=precision))
    train(config, tmp_path / "gpu", torch.device("cuda"))
    tolerance = 1e-3 if precision == "float32" else 3e-2
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


@pytest.mark.parametrize("method", [pytest.param(method, marks=on_a_gpu) for method in TUNING_METHODS])
def test_parts_in_bfloat16_on_a_gpu_follow_the_whole(method, encoder_views, small_catalogue, tmp_path):
    whole = run_config(small_catalogue, method, encoder_views)
    train(whole, tmp_path / "whole", torch.device("cuda"))
    parts = replace(whole, uncached=replace(whole.uncached, items_at_once=9, checkpointing=True))
    train(parts, tmp_path / "parts", torch.device("cuda"))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)
