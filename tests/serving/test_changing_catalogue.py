"""Adding, updating and removing items: what is refused, what stays, and what is found later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.growing_runs import CPU, NEW, TRAINED, trained_run, write_growing_data
from iisan_fast import IISAN, demo
from iisan_fast.config import EvaluationConfig
from iisan_fast.errors import InputError
from iisan_fast.serving.growing.changing_catalogue import add_items, remove_items, update_items
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import recommend
from iisan_fast.serving.trained_model import TrainedModel
from iisan_fast.states.recorded_encoders import EncoderPlaces
from iisan_fast.training.best_run import evaluate_run
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.run_verification import verify_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_growing_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return a run over titles, which no test changes."""
    root = tmp_path_factory.mktemp("trained")
    return trained_run(data, root, data.views("title"), **{"model.method": "iisan"})


@pytest.fixture(scope="module")
def grown(data, trained, tmp_path_factory):
    """Return the run with all new items, which no test changes."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("grown") / "run")
    add_items(run, rows(data, *data.new_ids()), device=CPU)
    return run


@pytest.fixture
def run(grown, tmp_path):
    return shutil.copytree(grown, tmp_path / "run")


def rows(data, *item_ids: str) -> list[dict[str, str]]:
    """Return items as a table of Python."""
    return [dict(zip(("item_id", "title"), line.split("\t"))) for line in data.lines(*item_ids).splitlines()]


def contents(run) -> dict[str, bytes]:
    """Return the content of each file of a run but the lock, which a writer makes."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"}


def refusal(change, run, *arguments, **named) -> str:
    """Return the one line that refuses a change, which changes no file."""
    before = contents(run)
    with pytest.raises(InputError) as error:
        change(run, *arguments, device=CPU, **named)
    assert contents(run) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def best_items(run, history: list[int], k: int) -> list[int]:
    histories = UserHistories(["u"], np.array([0, len(history)]), np.array(history))
    (ranked,) = recommend(TrainedModel.load(run, CPU), histories, k)
    return ranked.items[0].tolist()


def test_items_of_the_catalogue_are_not_added_again(data, run):
    message = refusal(add_items, run, rows(data, "i1", "i2", "i41", "i42"))
    assert "expected new items, found 4 that the catalogue has already (i1, i2, i41 and 1 more)" in message


def test_items_that_the_catalogue_lacks_are_not_updated_or_removed(run):
    for change, items in (
        (update_items, [{"item_id": i, "title": "x"} for i in "abcd"]),
        (remove_items, list("abcd")),
    ):
        assert "ids of the run's 48 items, found 4 unknown (a, b, c and 1 more)" in refusal(change, run, items)
    assert "would be removed" in refusal(remove_items, run, [f"i{n}" for n in range(1, TRAINED + NEW + 1)])


def test_removed_items_are_not_recommended_and_may_stand_in_histories(data, run, caplog):
    history = [1, TRAINED + 2]
    before = best_items(run, history, 5)
    changed = remove_items(run, [f"i{before[0]}", f"i{TRAINED + 2}"], device=CPU)
    assert (changed.removed, changed.items) == (2, TRAINED + NEW - 2)
    assert best_items(run, history, 4) == before[1:]
    assert TRAINED + 2 not in best_items(run, [1], TRAINED + NEW - 3)

    again = remove_items(run, [f"i{before[0]}", "i3"], device=CPU)
    assert again.removed == 1 and f"found 1 removed already (i{before[0]})" in caplog.text
    assert remove_items(run, ["i3"], device=CPU).removed == 0
    assert "found 1 removed (i3)" in refusal(update_items, run, rows(data, "i3"))


def test_a_removed_item_is_added_again_under_its_number(data, run):
    remove_items(run, ["i42", "i1"], device=CPU)
    titles = [{"item_id": "i42", "title": "Amberly steel tent"}, {"item_id": "z", "title": "x"}, *rows(data, "i1")]
    changed = add_items(run, titles, device=CPU)
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert (changed.added, changed.items) == (3, TRAINED + NEW + 1)
    assert not catalogue.is_removed.any()
    assert catalogue.item_ids[41] == "i42" and catalogue.item_ids[-1] == "z" and len(catalogue.item_ids) == 49
    assert catalogue.titles[41] == "Amberly steel tent" and catalogue.titles[-1] == "x"


def test_entities_are_replaced_as_the_protocol_has_it(run):
    add_items(run, [{"item_id": "a", "title": "steel &amp; oak"}, {"item_id": "b", "title": "steel & oak"}], device=CPU)
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert catalogue.titles[-2:] == ["steel & oak"] * 2
    assert (catalogue.coordinates[-1] - catalogue.coordinates[-2]).abs().max() < 1e-4
    assert (catalogue.vectors[-1] - catalogue.vectors[-2]).abs().max() < 1e-5


def test_the_figures_of_the_training_stay(trained, run):
    for split in ("validation", "test"):
        figures = evaluate_run(run, split, EvaluationConfig(), CPU)
        assert figures == evaluate_run(trained, split, EvaluationConfig(), CPU)


def test_a_run_that_another_process_writes_is_refused(data, run):
    with RunFolder.open(run, writable=True):
        for change, items in ((add_items, [{"item_id": "a", "title": "x"}]), (remove_items, ["i1"])):
            assert "another process trains in this folder, or changes its catalogue" in refusal(change, run, items)
    assert remove_items(run, ["i1"], device=CPU).removed == 1


def test_verify_finds_damage(run):
    assert not verify_run(run).damage
    catalogue = RunFolder(run).catalogue
    content = bytearray(catalogue.read_bytes())
    content[-5] ^= 1
    catalogue.write_bytes(content)
    (damage,) = verify_run(run).damage
    assert damage.where.startswith("catalogue.safetensors: tensor") and "remove it and change" in damage.remedy
    with pytest.raises(InputError, match="catalogue.safetensors: damaged"):
        TrainedModel.load(run, CPU)
    catalogue.unlink()
    assert TrainedModel.load(run, CPU).catalogue.available == TRAINED


def test_items_of_earlier_weights_are_encoded_again(data, trained, run, tmp_path):
    folder = RunFolder.open(run)
    remove_items(run, ["i41"], device=CPU)
    tensors, state = folder.load_best()
    tensors["item_vectors"] = tensors["item_vectors"] * 2
    tensors |= {name: tensor * 1.5 for name, tensor in tensors.items() if name.startswith("model.item_encoder.")}
    folder.save_best(tensors, {**state, "epoch": state["epoch"] + 1})

    with pytest.raises(InputError, match=r"trained on since .*best epoch 1 there, 2 now.*all of these 8 items encodes"):
        TrainedModel.load(run, CPU)
    for change, items in ((add_items, [{"item_id": "a", "title": "x"}]), (remove_items, ["i1"])):
        assert "trained on since" in refusal(change, run, items)
    incomplete = rows(data, "i1", "i41", "i42", "i43")
    assert "and 5 are missing (i44, i45, i46 and 2 more)" in refusal(update_items, run, incomplete)
    changed = update_items(run, rows(data, "i1", *data.new_ids()), device=CPU)
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert changed.updated == NEW + 1 and catalogue.is_removed.nonzero()[0].tolist() == [40]
    fresh = shutil.copytree(trained, tmp_path / "fresh")
    shutil.copy(folder.best, fresh)
    expected = add_items(fresh, rows(data, *data.new_ids()), device=CPU).model.catalogue
    assert (catalogue.vectors[TRAINED:] - expected.vectors[TRAINED:]).abs().max() < 1e-5


def test_an_encoder_that_has_moved_is_given_anew(data, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    new = rows(data, "i41")
    moved = shutil.copytree(data.text, tmp_path / "moved")
    other = tmp_path / "other"
    demo.write_text_encoder(other, 5)
    hidden = data.text.rename(data.text.with_name("hidden"))
    try:
        assert f"{data.text}, is not there; give its place of now by --text-encoder" in refusal(add_items, run, new)
        message = refusal(add_items, run, new, encoders=EncoderPlaces(text=str(other)))
        assert f"text_encoder: {other}: its weights are not those" in message
        message = refusal(add_items, run, new, encoders=EncoderPlaces(text=str(tmp_path / "none")))
        assert "none: no such folder" in message
        message = refusal(add_items, run, new, encoders=EncoderPlaces(image=str(data.image)))
        assert "image_encoder: the run has no view of this kind; leave it out" in message
        shutil.copytree(other, data.text)
        assert "not the encoder with which view 'title' was made: weights" in refusal(add_items, run, new)
        assert add_items(run, new, device=CPU, encoders=EncoderPlaces(text=str(moved))).added == 1
    finally:
        shutil.rmtree(data.text, ignore_errors=True)
        hidden.rename(data.text)


def test_code_of_an_encoder_runs_only_if_it_is_asked_for(data, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder.open(run)
    views = folder.views
    folder._write_json("views.json", {"title": {**views["title"], "trust_remote_code": True, "code": "abc"}})
    message = refusal(add_items, run, rows(data, "i41"))
    assert "ask to run code that comes with" in message and "give --trust-remote-code" in message
    message = refusal(add_items, run, rows(data, "i41"), encoders=EncoderPlaces(trusted=True))
    assert "not the encoder with which view 'title' was made: code" in message


def test_images_are_asked_for_checked_and_listed(data, tmp_path):
    run = trained_run(data, tmp_path, data.views("image"), **{"model.method": "frozen"})
    new = rows(data, *data.new_ids())
    assert "the run reads images, found none; give their folder by --images" in refusal(add_items, run, new)
    images = tmp_path / "images"
    shutil.copytree(data.whole / "images", images)
    for name in ("i41", "i42"):
        (images / f"{name}.png").unlink()
    (images / "i43.png").write_bytes(b"damaged")
    message = refusal(add_items, run, new, images)
    assert "3 of 8 items cannot be read: i41 (no image), i42 (no image), i43 (not an image" in message
    assert add_items(run, new, images, device=CPU, missing_images="blank").added == NEW
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert torch.equal(catalogue.vectors[TRAINED], catalogue.vectors[TRAINED + 1])  # both are blank
    assert not torch.equal(catalogue.vectors[TRAINED], catalogue.vectors[TRAINED + 3])


def test_images_for_a_run_without_are_refused(data, run):
    assert "reads no images; leave --images out" in refusal(
        add_items, run, [{"item_id": "a", "title": "x"}], data.whole / "images"
    )


def test_captions_are_read_from_the_column(data, tmp_path):
    captions = "".join(f"i{n}\tsteel tent {n}\n" for n in range(1, TRAINED + 1))
    (data.dataset / "captions.tsv").write_text(captions)
    try:
        view = replace(data.views("title")[0], name="caption", source="caption")
        run = trained_run(data, tmp_path, [view], **{"model.method": "frozen"})
    finally:
        (data.dataset / "captions.tsv").unlink()
    new = rows(data, "i41", "i42")
    assert "reads captions, and 2 of 2 items have none (i41, i42); give them in the column" in refusal(
        add_items, run, new
    )
    add_items(run, [{**row, "caption": "oak tent"} for row in new], device=CPU)
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert torch.equal(catalogue.vectors[TRAINED], catalogue.vectors[TRAINED + 1])


def test_methods_without_contents_are_refused(data, tmp_path):
    run = trained_run(data, tmp_path, [], **{"model.method": "id", "uncached": True})
    assert "the method id learns a vector for each item number" in refusal(
        add_items, run, [{"item_id": "a", "title": "x"}]
    )
    assert remove_items(run, ["i1"], device=CPU).items == TRAINED - 1


def test_the_method_neighbours_ranks_new_items_by_similarity(data, trained, tmp_path):
    run = trained_run(data, tmp_path, data.views("title"), **{"model.method": "neighbours"})
    add_items(run, rows(data, *data.new_ids()), device=CPU)
    catalogue = TrainedModel.load(run, CPU).catalogue
    assert torch.allclose(catalogue.vectors[TRAINED:], torch.full((NEW, 1), 0.3 * float(np.log(0.5))))
    assert (catalogue.coordinates[TRAINED:].norm(dim=1) - 1).abs().max() < 1e-5
    assert set(best_items(run, [1], TRAINED + NEW - 1)) == set(range(2, TRAINED + NEW + 1))


def test_a_published_run_names_the_option_for_the_place_of_its_encoder(data, trained, tmp_path):
    published = tmp_path / "published"
    IISAN.load(trained, device="cpu").save_pretrained(published)
    message = refusal(add_items, published, rows(data, *data.new_ids()))
    assert "is not there; give its place of now by --text-encoder, in Python text_encoder=" in message


def test_a_run_of_an_earlier_version_without_its_cache_takes_no_items(data, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("neighbours.safetensors", "checksums.json"):
        (run / name).unlink()
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "cache": str(tmp_path / "gone")}))
    message = refusal(add_items, run, rows(data, *data.new_ids()))
    assert f"no coordinates of similarity for its items; `iisan-fast train --resume {run}` makes them" in message
