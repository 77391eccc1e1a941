"""Publishing: what a published folder holds and what it does not, and that it ranks as the run does, bit for bit."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import yaml

import iisan_fast
from helpers.run_folders import flip_bit, write_recorded
from iisan_fast import IISAN, InputError
from iisan_fast.config import RunConfig, UncachedConfig, ViewConfig
from iisan_fast.serving.publishing import model_card
from iisan_fast.training import RunFolder
from iisan_fast.training.published_run import neutral_config

HISTORIES = [["i1", "i2", "i3"], ["i149"], []]
FILES = {"README.md", "checksums.json", "config.json", "items.npz", "neighbours.safetensors", "test.json", "views.json"}


@pytest.fixture(scope="module")
def model(run_with_terms, tmp_path_factory) -> IISAN:
    """Return the model of a run whose views name an encoder's folder."""
    root = tmp_path_factory.mktemp("private")
    run = shutil.copytree(run_with_terms, root / "run")
    views = json.loads((run / "views.json").read_text())
    encoder = {"encoder": str(root / "minilm"), "pooling": "mean", "weights": 8 * "c0ffee00"}
    write_recorded(run, "views.json", {name: {**view, **encoder} for name, view in views.items()})
    return IISAN.load(run, device="cpu")


@pytest.fixture(scope="module")
def published(model, tmp_path_factory) -> Path:
    """Return a folder that no test may change."""
    folder = tmp_path_factory.mktemp("published") / "model"
    model.save_pretrained(folder)
    return folder


def content(folder: Path) -> bytes:
    """Return all bytes of a published folder, those of arrays as they are in memory."""
    parts = [path.read_bytes() for path in folder.iterdir()]
    for path in folder.glob("*.npz"):
        parts += [array.tobytes() for array in np.load(path).values()]
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            parts.append(json.dumps(file.metadata()).encode())
            parts += [file.get_tensor(name).tobytes() for name in file.keys()]  # noqa: SIM118
    return b"\0".join(parts)


def scored(lists: list) -> list[list[tuple[str, float]]]:
    return [[(entry.item_id, entry.score) for entry in ranked] for ranked in lists]


def test_a_published_folder_ranks_as_the_run_does(model, published):
    fetched = IISAN.from_pretrained(str(published), device="cpu")
    assert scored(fetched.recommend(HISTORIES, k=20)) == scored(model.recommend(HISTORIES, k=20))
    assert fetched.recommend(HISTORIES)[0][0].title is None
    assert fetched.figures == model.figures and fetched.figures["scoring"]["cooccurrence"] == 2.0


def test_nothing_private_is_published(shop, model, published):
    assert {path.name for path in published.iterdir()} == {*FILES, "best.safetensors"}
    everything = content(published)
    user_ids = iisan_fast.load(model.run, device="cpu").sequences.user_ids
    titles = iisan_fast.load_dataset(shop[0]).titles
    assert b"i149" in everything and len(user_ids) > 50 and len(titles) > 100
    for private in (
        *titles,
        *("".join(part) for part in zip(user_ids[10:], user_ids[11:], user_ids[12:])),  # as packed in sequences.npz
        str(shop[0].parent),
        str(model.run.parent),
    ):
        assert private.encode() not in everything, private
    assert b"/tmp" not in everything and str(Path.home()).encode() not in everything


def test_the_bytes_that_are_searched_hold_what_is_there(model, tmp_path):
    """Check the search itself: titles, users and histories are there if they are asked for."""
    model.save_pretrained(tmp_path / "all", include_titles=True, include_histories=True)
    everything = content(tmp_path / "all")
    assert b"title of i7" in everything and b"u10u11u12" in everything
    whole = IISAN.from_pretrained(tmp_path / "all", device="cpu")
    assert whole.recommend(HISTORIES) == model.recommend(HISTORIES)
    assert iisan_fast.evaluate(tmp_path / "all", device="cpu")["test"] == model.figures["test"]
    assert "- `sequences.npz`: the users' ids" in (tmp_path / "all" / "README.md").read_text()


def test_verify_accepts_a_published_folder_and_finds_damage(published, tmp_path):
    assert iisan_fast.verify(published).damage == []
    copy = shutil.copytree(published, tmp_path / "copy")
    flip_bit(copy / "items.npz", 200)
    (copy / "best.safetensors").unlink()
    assert [damage.where for damage in iisan_fast.verify(copy).damage] == ["items.npz", "best.safetensors"]


def test_what_needs_histories_says_that_they_were_left_out(published):
    for needs_histories in (iisan_fast.evaluate, iisan_fast.load):
        with pytest.raises(InputError, match="was published without the histories that this needs"):
            needs_histories(published, device="cpu")


def test_a_published_folder_is_published_again_as_it_is(published, tmp_path):
    IISAN.load(published, device="cpu").save_pretrained(tmp_path / "model")
    for name in FILES:
        assert (tmp_path / "model" / name).read_bytes() == (published / name).read_bytes(), name


def test_a_run_without_training_is_published(neighbours_run, tmp_path):
    model = IISAN.load(neighbours_run, device="cpu")
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    assert iisan_fast.verify(tmp_path / "model").damage == []
    fetched = IISAN.from_pretrained(tmp_path / "model", device="cpu")
    assert scored(fetched.recommend(HISTORIES)) == scored(model.recommend(HISTORIES))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Nothing is trained, so no epoch was chosen." in card and "best.safetensors" not in card


@pytest.mark.parametrize(
    ("method", "words"), [("iisan", "They were frozen"), ("lora", "what was trained of them is in `best.safetensors`")]
)
def test_the_card_says_whether_the_encoders_were_trained(published, method, words):
    run = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(method=method)), views=RunFolder(published).views
    )
    assert words in model_card._encoders(run)


def test_the_lines_of_the_card_are_python_for_every_id():
    run = SimpleNamespace(items=SimpleNamespace(item_ids=['a"b', "c\\d"]))
    code = model_card._loading(run, "ann/shop").removeprefix("```python\n").removesuffix("\n```")
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert {"ann/shop", *run.items.item_ids} <= {*constants}


def test_paths_become_names_and_hub_names_stay(tmp_path):
    (tmp_path / "minilm").mkdir()
    views = [
        ViewConfig("title", "title", str(tmp_path / "minilm"), options={"cache_dir": str(tmp_path)}),
        ViewConfig("image", "image", "google/vit-base-patch16-224"),
    ]
    places = {"dataset": str(tmp_path / "secret" / "shop"), "init": "secret/runs/first"}
    neutral = neutral_config(RunConfig(**places, uncached=UncachedConfig(views)))
    first, second = neutral.uncached.views
    assert (neutral.dataset, first.encoder, second.encoder) == ("shop", "./minilm", "google/vit-base-patch16-224")
    assert neutral.init == "first"
    assert first.options == {"cache_dir": tmp_path.name}


def test_the_model_card(model, published, tmp_path):
    _, header, text = (published / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["library_name"] == "iisan-fast" and "license" not in values
    (result,) = values["model-index"][0]["results"]
    figures = {metric["type"]: metric["value"] for metric in result["metrics"]}
    masked = model.figures["test"]["masked"]
    assert figures == {name: pytest.approx(masked[name], abs=1e-6) for name in ("hr@10", "ndcg@10", "mrr")}
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 7]
    table = {(row[0].strip("| "), row[1]): row[3] for row in rows}
    for name, key in (("this model (`iisan`)", "test"), ("`popularity`", "popularity"), ("`neighbours`", "neighbours")):
        part = model.figures[key]["masked"]
        assert table[name, "all"] == f"{100 * part['hr@10']:.2f}"
        assert table[name, "warm"] == f"{100 * part['warm']['hr@10']:.2f}"
    assert "cooccurrence 2, similarity 6, cold_bias -0.5" in text and "leave-one-out" in text
    assert f"| title | title | `./minilm` | mean | 0, 1 | `{8 * 'c0ffee00'}` |" in text
    assert "of a rare pair, that at least one user took both" in text
    model.save_pretrained(tmp_path / "licensed", license="apache-2.0")
    assert "license: apache-2.0\n" in (tmp_path / "licensed" / "README.md").read_text()


def test_push_and_fetch_without_a_network(model, published, tmp_path, monkeypatch):
    """Check both ways with a folder in place of the hub."""
    from huggingface_hub import HfApi, hub_mixin

    hub = tmp_path / "hub"
    uploads = []

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, **options):
        shutil.copytree(folder_path, hub / repo_id)
        uploads.append((commit_message, revision))
        return f"https://hub/{repo_id}/commit/1"

    def hf_hub_download(repo_id, filename, revision, **options):
        return str(hub / repo_id / filename)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    address = model.push_to_hub("ann/shop", private=True, branch="first", commit_message="Shop")
    assert address == "https://hub/ann/shop/commit/1" and uploads == [("Shop", "first")]
    for name in FILES - {"README.md"}:
        assert (hub / "ann" / "shop" / name).read_bytes() == (published / name).read_bytes(), name
    assert 'IISAN.from_pretrained("ann/shop")' in (hub / "ann" / "shop" / "README.md").read_text()
    monkeypatch.setattr(hub_mixin, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr("iisan_fast.serving.publishing.hub.snapshot_download", lambda name, **options: str(hub / name))
    fetched = IISAN.from_pretrained("ann/shop", device="cpu", revision="first")
    assert scored(fetched.recommend(HISTORIES)) == scored(model.recommend(HISTORIES))


def test_mistakes_get_one_line_and_leave_nothing_behind(model, run_with_terms, tmp_path):
    damaged = shutil.copytree(run_with_terms, tmp_path / "damaged")
    flip_bit(damaged / "items.npz", 200)
    untested = shutil.copytree(run_with_terms, tmp_path / "untested")
    (untested / "test.json").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    for message, call in (
        ("exists already", lambda: model.save_pretrained(tmp_path)),
        ("folder: expected a path", lambda: model.save_pretrained(3)),
        ("license: expected a name on the hub", lambda: model.save_pretrained(tmp_path / "new", license=3)),
        ("include_titles: expected True", lambda: model.save_pretrained(tmp_path / "new", include_titles="no")),
        ("include_histories: expected True", lambda: model.push_to_hub("ann/shop", include_histories="no")),
        ("repo_id: Repo id must be", lambda: model.push_to_hub("a/b/c")),
        ("neither a folder nor a model that the hub gives", lambda: IISAN.from_pretrained("nobody/nothing")),
        ("neither a folder nor a model that the hub gives", lambda: IISAN.from_pretrained("a/b/c/d")),
        ("name: expected a path", lambda: IISAN.from_pretrained(3)),
        ("not a run folder (no config.json)", lambda: IISAN.from_pretrained(tmp_path)),
        ("items.npz: damaged", lambda: IISAN.from_pretrained(damaged)),
        ("test.json", lambda: IISAN.load(untested).save_pretrained(tmp_path / "new")),
        ("not fitted yet", lambda: IISAN().push_to_hub("ann/shop")),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
