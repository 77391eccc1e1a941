"""Check that a revision chooses the snapshot of a hub name, in a local Hugging Face cache of two commits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import constants

from helpers.common_encoders import BERT
from helpers.encoders import TITLES, refusal, save, tokenizer, view
from iisan_fast.config import ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError
from iisan_fast.settings import take_views
from iisan_fast.states.extraction import extract
from iisan_fast.states.recorded_encoders import EncoderPlaces, _view_configs
from iisan_fast.states.recorded_views import refuse_other_encoders
from iisan_fast.states.store import Store

NAME = "owner/tiny"
COMMITS = {"main": "a" * 40, "second": "b" * 40}  # by branch


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Make a cache with two commits, whose weights and tokenizers differ, and return its folder."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "models--owner--tiny"
    (repository / "refs" / "tags").mkdir(parents=True)
    for seed, (branch, commit) in enumerate(COMMITS.items()):
        torch.manual_seed(seed)
        folder = save(hf.BertModel(hf.BertConfig(**BERT)), repository / "snapshots" / commit, None, "cls")
        if branch == "second":
            tokenizer("clip").save_pretrained(folder)
        (repository / "refs" / branch).write_text(commit)
    (repository / "refs" / "tags" / "v2").write_text(COMMITS["second"])
    return root


@pytest.fixture(autouse=True)
def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def encoded(encoder: Path | str, **changes) -> torch.Tensor:
    backbone = load_backbone(view(encoder, pooling="mean", **changes))
    return backbone.encode(backbone.prepare(TITLES))


@pytest.mark.parametrize(("revision", "branch"), [(None, "main"), ("second", "second"), (COMMITS["second"], "second")])
def test_a_revision_chooses_config_tokenizer_and_weights(hub, revision, branch):
    folder = hub / "models--owner--tiny" / "snapshots" / COMMITS[branch]
    assert torch.equal(encoded(NAME, revision=revision), encoded(folder))
    described = load_backbone(view(NAME, revision=revision)).describe()
    assert described["commit"] == COMMITS[branch] and described.get("revision") == revision
    plain = load_backbone(view(folder)).describe()
    assert described["weights"] == plain["weights"] and described["processor"] == plain["processor"]
    assert "commit" not in plain


def test_a_revision_that_is_not_there_is_named():
    message = refusal(NAME, revision="third")
    assert message.startswith("owner/tiny: revision 'third' is neither in the local cache nor on the hub (")


def test_a_folder_has_no_revision(hub):
    folder = hub / "models--owner--tiny" / "snapshots" / COMMITS["main"]
    assert refusal(folder, revision="main") == (
        f"{folder}: revision: a folder has none, found 'main'; leave it out, or give the name on the hub"
    )


@pytest.mark.parametrize("revision", ["", "a b", "a\nb"])
def test_what_is_no_revision_is_refused(revision):
    with pytest.raises(InputError, match="revision: expected a branch, tag or commit"):
        ViewConfig("v", "title", NAME, revision=revision)


def test_a_revision_among_the_options_names_the_setting():
    with pytest.raises(InputError, match=r"options.revision: is a setting of its own; give --revision, in Python"):
        ViewConfig("v", "title", NAME, options={"revision": "second"})


def test_the_revision_of_one_encoder_goes_before_that_of_both():
    both = {"image_encoder": "i", "text_encoder": "t", "revision": "r"}
    assert [chosen.revision for chosen in take_views(dict(both))] == ["r", "r"]
    assert [chosen.revision for chosen in take_views({**both, "image_revision": "s"})] == ["s", "r"]
    with pytest.raises(InputError, match="image_revision: needs image_encoder"):
        take_views({"text_encoder": "t", "image_revision": "s"})


def test_a_cache_records_the_commit_and_knows_the_revision(catalogue, tmp_path):
    data = load_dataset(catalogue)
    chosen = view(NAME, revision="second", pooling="mean")
    extract(data, [chosen], tmp_path / "cache", torch.device("cpu"))
    with Store(tmp_path / "cache") as store:
        recorded = dict(store.view("v"))
    assert (recorded["revision"], recorded["commit"]) == ("second", COMMITS["second"])
    for same in (None, "second", COMMITS["second"]):
        refuse_other_encoders(tmp_path / "cache", [replace(chosen, revision=same)])
    with pytest.raises(InputError, match="'v' was made with other settings: revision second there, main now"):
        refuse_other_encoders(tmp_path / "cache", [replace(chosen, revision="main")])
    with pytest.raises(InputError, match="was made with other settings: processor .* weights"):
        extract(data, [replace(chosen, revision=None, pooling="mean")], tmp_path / "cache", torch.device("cpu"))
    (again,) = _view_configs({"v": recorded}, EncoderPlaces())
    assert (again.encoder, again.revision) == (NAME, COMMITS["second"])
    (moved,) = _view_configs({"v": recorded}, EncoderPlaces(text="owner/other"))
    assert (moved.encoder, moved.revision) == ("owner/other", None)
