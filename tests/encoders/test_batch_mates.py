"""Check that a state does not depend on what shares a batch, also for encoders that let padding in."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf

from helpers.encoders import BERT, TITLES, pictures, save, texts_one_by_one, view
from iisan_fast.encoders.batch_mates import EQUAL_LENGTHS, SINGLE, by_length, run_groups
from iisan_fast.encoders.loading import load_backbone

# Of families that take no attention mask, or let padding in near the end of a text.
LEAKING = {
    "fnet": lambda: hf.FNetModel(hf.FNetConfig(**{**BERT, "max_position_embeddings": 64}, tpu_short_seq_length=64)),
    "convbert": lambda: hf.ConvBertModel(hf.ConvBertConfig(**BERT, embedding_size=32, conv_kernel_size=5)),
}


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """Return a function that builds the folder of a leaking encoder once."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            torch.manual_seed(0)
            folders[family] = save(LEAKING[family](), tmp_path_factory.mktemp("leaking") / family, None, "cls")
        return folders[family]

    return folder


@pytest.mark.parametrize(("family", "dtype"), [("fnet", "float32"), ("convbert", "float32"), ("convbert", "bfloat16")])
def test_padding_that_leaks_is_left_out(leaking, family, dtype, caplog):
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(view(leaking(family), max_tokens=12, encoder_dtype=dtype))
    assert backbone.batches == backbone.describe()["batches"] == EQUAL_LENGTHS
    said = "padding changes its hidden states, so it encodes texts of equal length at a time"
    assert [record.getMessage() for record in caplog.records if said in record.getMessage()]
    texts = [*TITLES, "w20 w21", "w3", *TITLES]
    inputs = backbone.prepare(texts)
    expected = texts_one_by_one(leaking(family), texts, backbone.pooling, (0, 2, 4), getattr(torch, dtype))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for states in (backbone.encode(inputs), backbone.encode_whole(inputs)):
        assert (states.float() - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def test_a_leaking_encoder_trains_on_the_gradients_of_single_texts(leaking):
    backbone = load_backbone(view(leaking("fnet"), max_tokens=12, pooling="mean"))
    backbone.model.requires_grad_(True)

    def gradients(batches: list[list[str]]) -> list[torch.Tensor]:
        backbone.model.zero_grad()
        states = torch.cat([backbone.final(backbone.prepare(texts)) for texts in batches])
        (states * torch.arange(1.0, 1 + len(states))[:, None]).sin().sum().backward()
        return [p.grad.clone() for p in backbone.model.parameters() if p.grad is not None]

    for together, alone in zip(gradients([TITLES]), gradients([[title] for title in TITLES]), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


class NeighbourModel(hf.BertModel):
    """A BERT that adds the mean of a batch to each state, as an encoder of shared capacity might."""

    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        mean = output.last_hidden_state.mean(dim=(0, 1))
        states = output.last_hidden_state + mean
        output["last_hidden_state"] = states
        if output.hidden_states is not None:
            output["hidden_states"] = (*output.hidden_states[:-1], states)
        return output


def test_items_that_change_each_other_are_encoded_one_by_one(built, monkeypatch):
    monkeypatch.setattr("iisan_fast.encoders.hugging_face.model_class", lambda config: NeighbourModel)
    backbone = load_backbone(view(built("title", "bert"), max_tokens=12))
    assert backbone.batches == backbone.describe()["batches"] == SINGLE
    alone = torch.cat([backbone.encode(backbone.prepare([title])) for title in TITLES])
    torch.testing.assert_close(backbone.encode(backbone.prepare(TITLES)), alone, rtol=1e-5, atol=1e-5)


def test_images_that_change_each_other_are_encoded_one_by_one(built, monkeypatch):
    """As batch norm does in training mode."""
    forward = hf.ViTModel.forward

    def centred(model, pixel_values, **options):
        return forward(model, pixel_values - pixel_values.mean(dim=0), **options)

    monkeypatch.setattr(hf.ViTModel, "forward", centred)
    backbone = load_backbone(view(built("image", "vit"), "image"))
    assert backbone.batches == SINGLE
    inputs = backbone.prepare(pictures())
    alone = torch.cat([backbone.encode({"pixel_values": image[None]}) for image in inputs["pixel_values"]])
    torch.testing.assert_close(backbone.encode(inputs), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [3, 4])
def test_the_shortest_texts_can_be_probed(leaking, max_tokens):
    assert load_backbone(view(leaking("fnet"), max_tokens=max_tokens)).batches == EQUAL_LENGTHS


def test_groups_hold_every_row_once_and_results_keep_their_order():
    groups = by_length([2, 5, 2, 1, 5])
    assert groups == [[1, 4], [0, 2], [3]]
    (doubled, copied) = run_groups(groups, lambda rows: [rows * 2, rows[:, None]])
    assert doubled.tolist() == [0, 2, 4, 6, 8] and copied.flatten().tolist() == [0, 1, 2, 3, 4]
