"""Check encoders of both kinds: they are frozen and described, need hidden states, and give the selected layers."""

from __future__ import annotations

import json
import shutil
import types
from dataclasses import replace

import pytest
import torch
import transformers as hf

from helpers.encoders import (
    BERT,
    TITLES,
    differing,
    pictures,
    refusal,
    save,
    save_as,
    tokenizer,
    view,
)
from iisan_fast.encoders.loading import load_backbone, load_backbones, views_by_model
from iisan_fast.errors import InputError


@pytest.mark.parametrize("reported", [{"hidden_states": None}, {}], ids=["none", "no such output"])
def test_an_encoder_without_hidden_states_is_refused(built, monkeypatch, reported):
    forward = hf.BertModel.forward

    def silent(self, **inputs):
        inputs.pop("output_hidden_states", None)
        state = forward(self, **inputs).last_hidden_state
        return types.SimpleNamespace(last_hidden_state=state, **reported)

    monkeypatch.setattr(hf.BertModel, "forward", silent)
    assert refusal(built("title", "bert")).endswith("BertModel reports no hidden states")


def test_the_encoder_is_frozen_and_its_dropout_off(built):
    backbone = load_backbone(view(built("title", "bert"), encoder_dtype="auto"))
    assert backbone.dtype == torch.float32
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    first, second = (backbone.encode(backbone.prepare(TITLES)) for _ in range(2))
    assert torch.equal(first, second) and first.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("kind", "family"), [("title", "bert"), ("title", "llama"), ("image", "vit")])
def test_on_a_gpu_states_are_bfloat16_and_close_to_the_cpus(built, kind, family):
    folder = built(kind, family)
    contents = TITLES if kind == "title" else pictures()
    exact = load_backbone(view(folder, kind))
    quick = load_backbone(view(folder, kind, encoder_dtype="auto"), "cuda")
    states = quick.encode(quick.prepare(contents))
    assert states.dtype == torch.bfloat16 and states.device.type == "cuda"
    expected = exact.encode(exact.prepare(contents))
    assert (states.float().cpu() - expected).abs().max() <= 5e-2 * max(1, expected.abs().max())


def test_kept_layers_are_the_ones_asked_for(built):
    folder = built("title", "bert")
    whole = load_backbone(view(folder, layers=(0, 1, 2, 3, 4)))
    part = load_backbone(view(folder, layers=(1, 4)))
    inputs = whole.prepare(TITLES)
    assert torch.equal(part.encode(inputs), whole.encode(inputs)[:, [1, 4]])


@pytest.mark.parametrize(("source", "family"), [("title", "bert"), ("image", "vit")])
def test_views_of_one_encoder_share_a_forward_and_describe_themselves_as_alone(built, source, family):
    first = view(built(source, family), source, pooling="cls", layers=(0, 1, 4))
    views = [first, replace(first, name="w", pooling="mean"), replace(first, name="x", layers=None, layer_groups=2)]
    shared, alone = load_backbones(views, shared=True), load_backbones(views)
    assert views_by_model(shared) == [[0, 1, 2]] and views_by_model(alone) == [[0], [1], [2]]
    assert [backbone.describe() for backbone in shared] == [backbone.describe() for backbone in alone]
    assert [backbone.view for backbone in shared] == views
    inputs = shared[0].prepare(TITLES if source == "title" else pictures())
    expected = [backbone.encode(inputs) for backbone in alone]
    calls: list[object] = []
    shared[0].model.register_forward_pre_hook(lambda *_: calls.append(1))
    for backbones in (shared, shared[::-1], shared[1:]):
        states_by_view = shared[0].encode_views(backbones, inputs)
        positions = [shared.index(backbone) for backbone in backbones]
        assert all(
            torch.equal(states, expected[position]) for states, position in zip(states_by_view, positions, strict=True)
        )
    assert len(calls) == 3
    assert all(torch.equal(backbone.encode(inputs), states) for backbone, states in zip(shared, expected))


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 9}, {"encoder_dtype": "bfloat16"}, {"source": "caption"}, {"options": {"force_download": False}}],
)
def test_views_that_read_or_compute_otherwise_have_a_model_each(built, change):
    first = view(built("title", "bert"))
    assert views_by_model(load_backbones([first, replace(first, **change), first], shared=True)) == [[0, 2], [1]]


def test_a_view_of_a_shared_encoder_is_refused_as_alone(built):
    first = view(built("image", "siglip"), "image")
    for change in ({"pooling": "cls"}, {"layers": (0, 9)}):
        refused = replace(first, **change)
        with pytest.raises(InputError) as alone:
            load_backbone(refused)
        with pytest.raises(InputError) as shared:
            load_backbone(first).for_view(refused)
        assert str(shared.value) == str(alone.value)


def test_heads_of_a_checkpoint_are_left_aside(built, tmp_path):
    model = hf.BertForMaskedLM(hf.BertConfig(**BERT))
    folder = save(model, tmp_path / "bert", None, "cls")
    backbone = load_backbone(view(folder))
    inputs = backbone.prepare(TITLES)
    with torch.inference_mode():
        expected = model.eval().bert(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone.encode(inputs)[:, -1], expected)


def test_descriptions_tell_weights_and_preprocessing_apart(built, tmp_path):
    folder = built("title", "bert")
    described = load_backbone(view(folder)).describe()
    assert json.loads(json.dumps(described)) == described
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_backbone(view(moved)).describe() == described | {"encoder": str(moved)}
    model = hf.BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    changed = save_as(model, tmp_path / "weights", "cls")
    assert differing(load_backbone(view(changed)).describe(), described) == {"encoder", "weights"}
    with_other_tokens = shutil.copytree(folder, tmp_path / "tokens")
    tokenizer("clip").save_pretrained(with_other_tokens)
    assert {"encoder", "processor"} <= differing(load_backbone(view(with_other_tokens)).describe(), described)
    assert differing(load_backbone(view(folder, max_tokens=9)).describe(), described) == {"max_tokens"}
