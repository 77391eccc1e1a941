"""Check several views of one encoder: it runs once for all, and each view gets the states that it gets alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.datasets import make_sequences, write_dataset_folder
from helpers.extractions import entries, interrupt, run, write_varied_items
from helpers.fake_encoders import FakeBackbone
from iisan_fast.config import ViewConfig
from iisan_fast.encoders.loading import load_backbones
from iisan_fast.errors import InputError
from iisan_fast.states import extraction

TITLE = ViewConfig("title", "title", "an encoder")
AGAIN = replace(TITLE, name="again")


@pytest.fixture
def large(tmp_path) -> Path:
    return write_varied_items(tmp_path / "large")


@pytest.fixture
def root(tmp_path) -> Path:
    """Write a dataset of six items."""
    return write_dataset_folder(tmp_path / "d", make_sequences([[1, 2, 3, 4, 5, 6]]))


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """Return a list that collects the texts that are tokenized for views that share a model."""
    texts: list[str] = []
    model = object()

    def load(views, *_, shared):
        return [FakeBackbone(view, texts, model=model if shared else None) for view in views]

    monkeypatch.setattr(extraction, "load_backbones", load)
    return texts


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """Return a list that collects the class of the model at each forward of an encoder that is loaded later."""
    classes: list[str] = []

    def load(*arguments, **options):
        backbones = load_backbones(*arguments, **options)
        for model in dict.fromkeys(backbone.model for backbone in backbones):
            model.register_forward_pre_hook(lambda model, _inputs: classes.append(type(model).__name__))
        return backbones

    monkeypatch.setattr(extraction, "load_backbones", load)
    return classes


@pytest.fixture
def pooled(encoder_views) -> list[ViewConfig]:
    """Return two views of each encoder, with different poolings and layers; views of one encoder are not neighbours."""
    image, title = (replace(view, pooling="cls") for view in encoder_views)
    mean_views = [replace(view, name=f"mean {view.name}", pooling="mean", layers=(1, 2)) for view in (image, title)]
    return [title, image, *mean_views]


def test_views_of_one_encoder_run_it_once_and_get_the_states_that_they_get_alone(large, tmp_path, pooled, forwards):
    for view in pooled:
        run(large, tmp_path / "alone", view, missing_images="blank")
    assert forwards == ["BertModel"] * 10 + ["ViTModel"] * 20 + ["BertModel"] * 10
    forwards.clear()
    counts = run(large, tmp_path / "together", *pooled, missing_images="blank")
    assert counts == [(40, 0), (40, 2), (40, 2), (40, 0)]
    assert forwards == ["BertModel"] * 10 + ["ViTModel"] * 10
    assert entries(tmp_path / "together") == entries(tmp_path / "alone")
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("alone", "together")]
    assert manifests[0] == manifests[1] and list(json.loads(manifests[0])["views"]) == [view.name for view in pooled]


def test_a_view_that_is_added_later_is_encoded_alone(large, tmp_path, pooled, forwards):
    title, *_, mean = pooled
    run(large, tmp_path / "together", title, mean)
    run(large, tmp_path / "later", title)
    forwards.clear()
    assert run(large, tmp_path / "later", title, mean) == [(0, 0), (40, 0)]
    assert len(forwards) == 10
    assert entries(tmp_path / "later") == entries(tmp_path / "together")


def test_views_that_were_stopped_together_go_on_together(large, tmp_path, pooled, forwards):
    title, *_, mean = pooled
    run(large, tmp_path / "whole", title, mean)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run(large, tmp_path / "stopped", title, mean)
    forwards.clear()
    assert run(large, tmp_path / "stopped", title, mean) == [(28, 0), (28, 0)]
    assert len(forwards) == 7
    assert entries(tmp_path / "stopped") == entries(tmp_path / "whole")


def test_a_stopped_view_goes_on_beside_one_that_is_complete(large, tmp_path, pooled, forwards):
    title, *_, mean = pooled
    run(large, tmp_path / "whole", title, mean)
    run(large, tmp_path / "stopped", mean)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        run(large, tmp_path / "stopped", title, mean)
    forwards.clear()
    assert run(large, tmp_path / "stopped", title, mean) == [(28, 0), (0, 0)]
    assert len(forwards) == 7
    assert entries(tmp_path / "stopped") == entries(tmp_path / "whole")


def test_views_tokenize_what_they_share_once_under_one_progress_bar(root, tmp_path, texts, monkeypatch):
    labels = []
    bar = extraction.progress_bar
    monkeypatch.setattr(extraction, "progress_bar", lambda label, *rest: labels.append(label) or bar(label, *rest))
    assert run(root, tmp_path / "c", TITLE, AGAIN) == [(6, 0), (6, 0)]
    assert len(texts) == 6 and labels == ["encoding title, again"]


def test_an_item_whose_states_are_not_finite_in_one_view_is_stored_in_none(root, tmp_path, texts, monkeypatch):
    encode = FakeBackbone.encode

    def one_is_not_finite(self, inputs):
        states = encode(self, inputs)
        if self.view is AGAIN:
            states[inputs["sums"] == sum(b"title of i2")] = torch.nan
        return states

    monkeypatch.setattr(FakeBackbone, "encode", one_is_not_finite)
    with pytest.raises(InputError, match="view 'again', item 'i2': hidden states are not finite"):
        run(root, tmp_path / "c", TITLE, AGAIN)
    assert len(entries(tmp_path / "c")) == 10
    monkeypatch.setattr(FakeBackbone, "encode", encode)
    assert run(root, tmp_path / "c", TITLE, AGAIN) == [(1, 0), (1, 0)]
