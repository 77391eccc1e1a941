"""Check hidden states that are read one by one: they equal Hugging Face's, and only one is in memory at a time."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from helpers.encoders import BERT, IMAGE, LLM, TEXT, TITLES, pictures, save, view
from iisan_fast.benchmarks.encoders import encoder_parameters
from iisan_fast.encoders import base
from iisan_fast.encoders.base import Backbone
from iisan_fast.encoders.block_layers import transformer_blocks
from iisan_fast.encoders.hidden_state_hooks import find_places, keeps_nothing, reading
from iisan_fast.encoders.hugging_face import count_parameters
from iisan_fast.encoders.loading import load_backbone, load_backbones

ALL = (0, 1, 2, 3, 4)
FAMILIES = [("title", family) for family in TEXT] + [("image", family) for family in IMAGE]


@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_states_are_the_very_ones_that_are_reported(built, source, family, caplog):
    for dtype in ("float32", "bfloat16"):
        backbone = load_backbone(view(built(source, family), source, layers=ALL, encoder_dtype=dtype))
        inputs = backbone.prepare(TITLES if source == "title" else pictures())
        assert torch.equal(backbone.encode(inputs), backbone.encode_whole(inputs))
    assert "cannot be read one by one" not in caplog.text


@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_cores_that_share_the_rows_find_the_same_states(built, source, family, threads_given_back):
    backbone = load_backbone(view(built(source, family), source, layers=ALL))
    inputs = backbone.prepare(TITLES if source == "title" else pictures())
    order = torch.randint(len(next(iter(inputs.values()))), (100,), generator=torch.Generator().manual_seed(0))
    inputs = {name: tensor[order] for name, tensor in inputs.items()}
    at_work: set[int] = set()
    backbone.model.register_forward_pre_hook(lambda *_: at_work.add(threading.get_ident()))
    for threads in (3, 2):
        torch.set_num_threads(threads)
        for _ in range(2):
            torch.testing.assert_close(backbone.encode(inputs), backbone.encode_whole(inputs), rtol=1e-5, atol=1e-5)
    assert len(at_work - {threading.get_ident()}) >= 2


@pytest.mark.parametrize(("source", "family"), FAMILIES)
def test_parameters_are_counted_without_reading_a_weight(built, tmp_path, source, family):
    """If an encoder has two towers, only the one that reads the view's source is counted."""
    model = load_backbone(view(built(source, family), source)).model
    folder = shutil.copytree(built(source, family), tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    tower_parameters = count_parameters(str(folder), "image" if source == "image" else "text")
    assert tower_parameters == sum(parameter.numel() for parameter in model.parameters())
    if source == "image" and family == "clip":
        views = [view(folder, "title"), view(folder, "image")]
        assert encoder_parameters(views) == count_parameters(str(folder), "text") + tower_parameters


def test_one_block_called_for_every_layer_gives_a_state_at_each_call(tmp_path):
    model = hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16))
    backbone = load_backbone(view(save(model, tmp_path / "albert", None, "cls"), layers=ALL))
    inputs = backbone.prepare(TITLES)
    assert torch.equal(backbone.encode(inputs), backbone.encode_whole(inputs))


def most_alive(backbone: Backbone, encode) -> int:
    """Return the most blocks' states that are in memory, at the start of any block, while a batch is encoded."""
    alive: list[weakref.ref] = []
    counts = []

    def begins(_block: nn.Module, _args: tuple) -> None:
        counts.append(sum(state() is not None for state in alive))

    def ends(_block: nn.Module, _args: tuple, state: Tensor) -> None:
        alive.append(weakref.ref(state))

    for block in transformer_blocks(backbone.model).values():
        block.register_forward_pre_hook(begins)
        block.register_forward_hook(ends)
    encode(backbone.prepare(TITLES))
    assert len(counts) == 12
    return max(counts)


def test_no_state_outlives_the_block_that_reads_it(tmp_path):
    folder = save(hf.LlamaModel(hf.LlamaConfig(**LLM | {"num_hidden_layers": 12})), tmp_path / "llama", None, "bare")
    backbone = load_backbone(view(folder, layers=tuple(range(13))))
    assert most_alive(backbone, backbone.encode) == 1
    both = load_backbones([view(folder), view(folder, pooling="last")], shared=True)
    assert most_alive(both[0], lambda inputs: both[0].encode_views(both, inputs)) == 1
    backbone = load_backbone(view(folder))
    assert most_alive(backbone, backbone._hidden_states) == 11  # all states, as Hugging Face reports them


@pytest.mark.parametrize(
    ("source", "family"), [("title", "llama"), ("title", "bert"), ("title", "clip"), ("image", "vit")]
)
def test_outputs_that_a_checkpoint_asks_for_are_not_made(built, tmp_path, source, family):
    """The configuration of many published encoders asks for outputs that would all stay in memory."""
    folder = shutil.copytree(built(source, family), tmp_path / "asking")
    config = json.loads((folder / "config.json").read_text())
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    for part in (config, config.get("text_config", {})):
        part |= asked
    (folder / "config.json").write_text(json.dumps(config))
    backbone, plain = load_backbone(view(folder, source)), load_backbone(view(built(source, family), source))
    inputs = backbone.prepare(TITLES if source == "title" else pictures())
    assert backbone._run(inputs).keys() == plain._run(inputs).keys()
    assert "hidden_states" not in backbone._run(inputs) and "attentions" not in backbone._run(inputs)
    assert torch.equal(backbone.encode(inputs), plain.encode(inputs))


def test_states_made_out_of_reach_are_all_kept(built, monkeypatch, caplog):
    expected = load_backbone(view(built("title", "llama"))).encode
    monkeypatch.setattr(base, "find_places", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(view(built("title", "llama")))
    assert "its hidden states cannot be read one by one; batches keep all layers in memory" in caplog.text
    inputs = backbone.prepare(TITLES)
    assert torch.equal(backbone.encode(inputs), expected(inputs))
    last = backbone.for_view(view(built("title", "llama"), layers=(4,)))
    both = backbone.encode_views([last, backbone], inputs)
    assert torch.equal(both[0], expected(inputs)[:, -1:]) and torch.equal(both[1], expected(inputs))


def test_encoding_leaves_no_hooks(built):
    backbone = load_backbone(view(built("title", "bert")))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.model.modules()]
    backbone.encode(backbone.prepare(TITLES))
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.model.modules()]
    assert after == before


class Scaled(nn.Module):
    """A model whose block reads a state that no module computes, and that computes another one outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(input=3 * x) + 1


def test_places_are_before_and_behind_modules():
    model = Scaled()
    x = torch.randn(2, 3)
    inside = [3 * x, model.block(3 * x)]
    places = find_places(model, lambda: model(x), [*inside, inside[1] + 1])
    assert [place.module for place in places] == [model.block, model.block, model]
    assert [place.is_input for place in places] == [True, False, False]
    with reading(places[:2]) as read:
        taken = read(lambda: model(x), [lambda state: state.sum(dim=1), lambda state: state[0]])
    assert torch.equal(taken[0], inside[0].sum(dim=1)) and torch.equal(taken[1], inside[1][0])
    with reading([places[1], places[0], places[1]]) as read:
        taken = read(lambda: model(x), [torch.clone, torch.clone, lambda state: -state])
    assert torch.equal(taken[0], inside[1]) and torch.equal(taken[1], inside[0]) and torch.equal(taken[2], -inside[1])
    assert not model.block._forward_hooks and not model.block._forward_pre_hooks
    assert find_places(model, lambda: model(x), [inside[1] + 2]) is None
    assert find_places(model, lambda: model(x), inside[::-1]) is None


class Remembers(Scaled):
    """A model that stores something of a batch in an attribute."""

    def __init__(self, left: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.left = left
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.left(x)
        return super().forward(x)


def test_a_model_that_keeps_something_of_a_batch_is_told():
    constant = torch.zeros(3)

    def runs(model: nn.Module) -> list[Callable[[], Tensor]]:
        return [lambda: model(torch.ones(1, 3)), lambda: model(torch.ones(2, 3))]

    for left, nothing in ((len, False), (torch.clone, False), (lambda x: constant, True), (lambda x: 1000 + 1, True)):
        model = Remembers(left)
        assert keeps_nothing(model, runs(model)) == nothing
    model = Scaled()
    model.register_buffer("state", constant)
    assert keeps_nothing(model, runs(model))
    model.register_forward_hook(lambda module, *_: setattr(module, "state", torch.zeros(3)))
    assert not keeps_nothing(model, runs(model))


def test_an_encoder_that_keeps_a_batchs_states_takes_batches_whole(tmp_path, threads_given_back):
    config = hf.RecurrentGemmaConfig(
        **{**LLM, "num_hidden_layers": 3},
        lru_width=32,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
    )
    model = hf.RecurrentGemmaModel(config)
    backbone = load_backbone(view(save(model, tmp_path / "recurrent", None, "bos"), pooling="mean"))
    inputs = backbone.prepare([TITLES[i % len(TITLES)] for i in range(41)])
    torch.set_num_threads(2)
    for _ in range(3):
        assert torch.equal(backbone.encode(inputs), backbone.encode_whole(inputs))


def test_threads_read_what_they_run_themselves():
    """All threads are inside the model at the same time, and each runs it twice."""
    model = Scaled()
    together = threading.Barrier(4, timeout=60)
    x = torch.ones(2, 3)
    places = find_places(model, lambda: model(x), [3 * x, model.block(3 * x)])

    def meet(*_: object) -> None:
        together.wait()

    model.block.register_forward_pre_hook(meet)

    def states(number: int) -> list[list[torch.Tensor]]:
        return [read(lambda: model(number * x), [lambda state: state + number] * 2) for _ in range(2)]

    with reading(places) as read, ThreadPoolExecutor(4) as pool:
        states_by_thread = list(pool.map(states, range(4)))
    for number, both in enumerate(states_by_thread):
        for block_input, block_output in both:
            inside = 3.0 * number * x
            assert torch.equal(block_input, inside + number) and torch.equal(
                block_output, model.block.forward(inside) + number
            )
