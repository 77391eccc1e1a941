"""Check a run's page: its figures, its users, escaping, and runs that lack what the page shows."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import iisan_fast
from helpers.datasets import histories_in_steps, make_sequences, write_dataset_folder
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import InputError
from iisan_fast.config import ModelConfig, RunConfig
from iisan_fast.evaluation import target_ranks
from iisan_fast.serving.growing.changing_catalogue import remove_items
from iisan_fast.serving.report.page import show
from iisan_fast.serving.report.page_charts import _read_layers
from iisan_fast.serving.report.page_users import drawn_rows
from iisan_fast.serving.report.thumbnails import thumbnails
from iisan_fast.training.best_run import load
from iisan_fast.training.published_run import write_published
from iisan_fast.training.run_folder import RunFolder

CPU = torch.device("cpu")
FORMAT_1 = Path(__file__).parents[1] / "format_1"
VOID = {"meta", "br", "img", "link", "hr", "input"}
NASTY = {
    "i1": '<script>alert("1")</script>',
    "i2": "</style></title><img src=x onerror=alert(1)>",
    "i3": "'\"><b>bold</b> & {{ 7 * 7 }} {% raw %}",
    "i4": "\u202eevil\u202c שלום עולם",
    "i5": "bell \x07 null-like \x01 line\u2028end",
    "i6": "👩\u200d🔬 emoji 🎁",
    "i7": "&lt;script&gt;alert(2)&lt;/script&gt;",
    "i8": "long " * 400,
}


class Page(HTMLParser):
    """A parsed page, which has to be well formed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.figures: list[float] = []
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), "an attribute twice"
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append((tag, values))
        if tag == "data":
            self.figures.append(float(values["value"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if data.strip():
            names = [values.get("id") or values.get("class") or tag for tag, values in self.open]
            self.texts.append((names, " ".join(data.split())))

    @property
    def text(self) -> str:
        return " ".join(text for names, text in self.texts if "style" not in names)

    def texts_of(self, name: str) -> list[str]:
        return [text for names, text in self.texts if name in names]

    def section(self, name: str) -> str:
        start = self.source.index(f'<section id="{name}">')
        return self.source[start : self.source.index("</section>", start)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Return a dataset like that of the toy run, with titles that attack a page, and with some images."""
    root = tmp_path_factory.mktemp("shown")
    sequences = make_sequences(histories_in_steps(60, 40), items=40)
    folder = write_dataset_folder(root / "<b>shop", sequences)
    titles = {item_id: NASTY.get(item_id, f"title of {item_id}") for item_id in sequences.item_ids}
    (folder / "items.tsv").write_text("".join(f"{item_id}\t{title}\n" for item_id, title in titles.items()))
    (folder / "images").mkdir()
    for number in range(1, 31):
        Image.new("RGB", (40 + number, 60), (8 * number, 99, 40)).save(folder / "images" / f"i{number}.png")
    (folder / "images" / "i9.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("page") / "run"
    item_ids = [f"i{number}" for number in range(1, 41)]
    table = random_table([(2, 16), (2, 16)], 40, torch.float32)
    cache = fill_store(folder.parent / "cache", item_ids, table, ("image", "title"), source="image")
    settings = {"embedding_dim": 16, "bottleneck": 8, "batch_users": 16, "max_epochs": 3, "dropout": 0.2}
    iisan_fast.train(dataset, cache, out=folder, device="cpu", unescape_titles=False, **settings)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy of the run, which the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory) -> Page:
    """Return the page of all users of the run."""
    written = show(trained, tmp_path_factory.mktemp("out") / "page.html", users=60, device="cpu")
    assert written.users == 60 and written.pictures == 29 and written.split == "test"
    assert written.size == written.path.stat().st_size < 3_000_000
    return Page(written.path)


def figures_of(run: Path) -> dict:
    return json.loads((run / "test.json").read_text())


def numbers_in(source: str) -> list[float]:
    return [float(part.split('"')[0]) for part in source.split('<data value="')[1:]]


def test_the_figures_are_those_of_test_json(trained, page):
    figures = figures_of(trained)
    methods = [figures[name]["masked"] for name in ("test", "popularity", "neighbours")]
    expected = [figure for method in methods for figure in (method["hr@10"], method["ndcg@10"])]
    assert numbers_in(page.section("accuracy")) == expected[:2] + expected
    by_part = []
    for method in methods:
        by_part += [method[part][metric] for metric in ("hr@10", "ndcg@10") for part in ("warm", "cold")]
    assert len(by_part) == 12
    assert numbers_in(page.section("cold")) == [figure for figure in by_part if figure is not None]
    assert f"{100 * expected[0]:.2f}" in page.texts_of("fact")


def test_the_rule_stands_beside_the_figures(page):
    rule = page.section("accuracy")
    assert "against the full catalogue of 40 items, not against a sample" in rule
    assert "Items of the user&#39;s history are left out" in rule or "Items of the user's history are left out" in rule
    assert "half count as ranked above it" in rule


def test_groups_hold_all_users_and_average_to_the_total(trained, page):
    hit_rate = figures_of(trained)["test"]["masked"]["hr@10"]
    ndcg = figures_of(trained)["test"]["masked"]["ndcg@10"]
    total, *_ = numbers_in(page.section("groups"))
    assert total == pytest.approx(hit_rate, abs=1e-12)
    tables = page.section("groups").split("<tbody>")[1:]
    assert len(tables) == 2
    for table in tables:
        rows = [row for row in table.split("</tbody>")[0].split("<tr>") if "<td>" in row]
        users = [int(row.split("<td>")[1].split("</td>")[0].replace(",", "")) for row in rows]
        values = [numbers_in(row) for row in rows]
        assert sum(users) == 60 and len(rows) > 1
        assert np.average([value[0] for value in values], weights=users) == pytest.approx(hit_rate)
        assert np.average([value[1] for value in values], weights=users) == pytest.approx(ndcg)


def test_curves_and_the_best_epoch_are_drawn(trained, page):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    curves = page.section("curves")
    for line in lines:
        assert f"loss, epoch {line['epoch']}: {line['loss']:.4g}<" in curves
        assert f"HR@10, epoch {line['epoch']}: {100 * line['validation']['masked']['hr@10']:.4g}<" in curves
    assert curves.count(f">best: {figures_of(trained)['best_epoch']}<") == 2


def test_gates_are_sigmoids_of_the_parameters(trained, page):
    tensors, _ = RunFolder.open(trained).load_best()
    gates = page.section("gates")
    for tower in ("first", "second", "inter"):
        values = 1 / (1 + np.exp(-tensors[f"model.item_encoder.side_network.{tower}.gate"].numpy() / 0.1))
        assert f"Tower {tower}" in gates
        for value in values:
            assert f": gate {value:.3f}<" in gates
    assert "over image and title" in gates


def test_settings_beside_their_defaults(page):
    rows = page.section("settings").split("</table>")[0]
    changed = [row.split("</td>")[0].rpartition(">")[2] for row in rows.split("<tr>")[2:]]
    names = [
        "protocol.unescape_titles",
        "model.embedding_dim",
        "model.bottleneck",
        "model.dropout",
        "train.batch_users",
    ]
    names = [*names, "train.max_epochs"]
    assert [name for name in changed if name] == names
    assert "Dropout probability of the sequence encoder." in rows
    assert '"max_inputs": 10' in page.text


def test_users_have_their_history_their_top_ten_and_their_rank(trained, page):
    best = load(trained, CPU)
    split = best.sequences.split("test")
    scores = best.scores("test")
    ranks, _ = target_ranks(scores.queries, scores.vectors, split, best.config.evaluation)
    cards = page.section("users").split('<article class="user">')[1:]
    assert len(cards) == 60
    dense = (scores.queries @ scores.vectors.T).numpy()
    for row, card in enumerate(cards):
        history = split.items[split.ends[row] - split.lengths[row] : split.ends[row]]
        shown = [part.split('"')[0] for part in card.split('class="title" title="')[1:]]
        order = [number for number in np.argsort(-dense[row], kind="stable") + 1 if number not in history][:10]
        expected = [f"i{number}" for number in (*history, *order)]
        target = split.targets[row]
        if target in order:
            assert shown == expected and f"hit at place {order.index(target) + 1}" in card
        else:
            assert shown == [*expected, f"i{target}"]
            rank = f"target at rank {ranks[row]:g} of 40" if np.isfinite(ranks[row]) else "never ranked"
            assert rank in card
        assert card.count('<li class="item target">') == 1


def test_the_draw_is_decided_by_the_seed(trained, tmp_path):
    written = show(trained, tmp_path / "page.html", users=5, seed=7, pictures=False, device="cpu")
    user_ids = [text for names, text in Page(written.path).texts if names[-2:] == ["h3", "bdi"]]
    assert user_ids == [f"u{row}" for row in drawn_rows(60, 5, 7)] and written.pictures == 0
    rows = drawn_rows(1000, 20, 0)
    assert len({*rows}) == 20 and rows.tolist() == sorted(rows) and rows.max() < 1000
    assert (rows == drawn_rows(1000, 20, 0)).all() and (rows != drawn_rows(1000, 20, 1)).any()
    assert drawn_rows(3, 20, 0).tolist() == [0, 1, 2]


def test_the_page_is_self_contained(page):
    assert "://" not in page.source
    assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    for _, values in page.tags:
        assert not [name for name in values if name.startswith("on")]
        assert all(values.get(name, "#").startswith("#") for name in ("href", "src"))
    uris = page.source.split("url(")[1:]
    assert len(uris) == 29 and all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
    (policy,) = (values["content"] for tag, values in page.tags if values.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_titles_are_data(page):
    titles = page.texts_of("title")
    assert NASTY["i1"] in titles and NASTY["i2"] in titles and NASTY["i3"] in titles and NASTY["i6"] in titles
    assert "<script>alert(2)</script>" in titles
    assert "\\u202eevil\\u202c שלום עולם" in titles
    assert "bell \\x07 null-like \\x01 line end" in titles
    assert not {"script", "b>bold"} & {tag for tag, _ in page.tags}
    assert all(len(title) <= 241 for title in titles)
    assert "iisan on <b>shop" in page.text.replace("  ", " ") and "<b>shop" not in page.source


def test_items_without_a_picture_have_letters_and_a_note(page):
    assert "(i9: not an image of JPEG, PNG, WebP, GIF, BMP or another format that Pillow reads)" in page.text
    assert "TI" in page.texts_of("tile")


def test_the_default_place_is_in_the_run(run):
    written = show(run, users=1, device="cpu")
    assert written.path == run / "report.html" and written.path.exists()
    assert RunFolder.open(run).figures == figures_of(run)


def test_a_published_run_has_no_users(trained, tmp_path):
    write_published(trained, tmp_path, include_titles=False, include_histories=False)
    written = show(tmp_path, device="cpu")
    page = Page(written.path)
    assert written.users == 0 and "published without histories" in page.section("groups")
    assert numbers_in(page.section("accuracy"))[0] == figures_of(trained)["test"]["masked"]["hr@10"]
    assert "Tower inter" in page.section("gates") and "were not recorded" in page.section("environment")
    assert 'id="users"' not in page.source and 'id="curves"' not in page.source


def test_a_run_published_with_histories_but_without_titles_shows_ids(trained, tmp_path):
    write_published(trained, tmp_path, include_titles=False, include_histories=True)
    page = Page(show(tmp_path, users=2, device="cpu").path)
    titles = {text for names, text in page.texts if names[-2:] == ["title", "bdi"]}
    assert "Items are shown by their ids" in page.text and titles <= {f"i{number}" for number in range(1, 41)}


@pytest.mark.parametrize(("groups", "expected"), [(None, [0, 2, 4, 6]), (1, [0, 6]), (3, [0, 2, 4, 6])])
def test_layers_are_those_that_the_model_reads(groups, expected):
    config = RunConfig("dataset", "cache", ("title",), model=ModelConfig(layer_groups=groups, method="iisan-versa"))
    assert _read_layers(config, "title", {"layers": [0, 2, 4, 6], "depth": 7}) == expected
    assert _read_layers(config, "title", {}) == []


def test_a_run_that_trains_nothing_has_neither_curves_nor_gates(dataset, tmp_path):
    result = iisan_fast.train(dataset, method="neighbours", out=tmp_path / "run", device="cpu")
    page = Page(show(tmp_path / "run", users=3, device="cpu").path)
    assert 'id="curves"' not in page.source and "This model has no gates" in page.section("gates")
    assert "Nothing is trained" in page.text
    assert numbers_in(page.section("groups"))[0] == pytest.approx(result["test"]["masked"]["hr@10"])


def test_an_untested_run_of_an_earlier_version_shows_validation_targets_and_ids(tmp_path):
    run = Path(shutil.copytree(FORMAT_1 / "run", tmp_path / "run"))
    written = show(run, users=4, device="cpu")
    page = Page(written.path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["validation"]["masked"]["hr@10"])
    assert written.split == "validation" and "not tested yet" in page.text
    assert numbers_in(page.section("accuracy"))[0] == pytest.approx(best["validation"]["masked"]["hr@10"])
    assert numbers_in(page.section("groups"))[0] == pytest.approx(best["validation"]["masked"]["hr@10"])
    assert "Items are shown by their ids" in page.text and "No pictures: the dataset" in page.text
    assert "i1" in page.texts_of("title") or "i10" in page.texts_of("title")


def test_titles_of_an_earlier_version_come_from_its_dataset(tmp_path):
    run = Path(shutil.copytree(FORMAT_1 / "run", tmp_path / "run"))
    page = Page(show(run, dataset=FORMAT_1 / "dataset", users=2, device="cpu").path)
    assert "The titles are those of the dataset." in page.text
    table = dict(line.split("\t") for line in (FORMAT_1 / "dataset" / "items.tsv").read_text().splitlines())
    assert set(page.texts_of("title")) & set(table.values())


def test_a_catalogue_that_has_changed_is_shown_as_it_was_trained(run, tmp_path):
    before = Page(show(run, tmp_path / "before.html", users=3, device="cpu").path)
    remove_items(run, ["i5", "i6", "i7", "i8"], device=CPU)
    after = Page(show(run, tmp_path / "after.html", users=3, device="cpu").path)
    note = "The catalogue has changed since the training; this page ranks the items of the training."
    assert note in after.text and note not in before.text
    assert after.text.replace(note, "").split() == before.text.split()


def test_figures_of_an_earlier_end_are_not_shown_as_those_of_the_best_checkpoint(run):
    folder = RunFolder.open(run)
    tensors, state = folder.load_best()
    folder.save_best(tensors, {**state, "epoch": state["epoch"] + 1})
    assert show(run, users=0, device="cpu").split == "validation"


def test_a_dataset_that_is_gone_is_said_in_one_line(run, tmp_path):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dataset": str(tmp_path / "gone")}))
    page = Page(show(run, users=2, device="cpu").path)
    (note,) = (text for names, text in page.texts if names[-2:] == ["users", "note"])
    assert note == f"No pictures: the dataset's folder {tmp_path / 'gone'} is not there; name it with --dataset."


def test_pictures_get_smaller_until_they_fit(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for item_id in ("a", "b"):
        Image.fromarray(generator.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(
            tmp_path / f"images/{item_id}.png"
        )

    def total(most_bytes: int) -> int:
        pictures = thumbnails(tmp_path, ["a", "b"], most_bytes)
        assert pictures.uris.keys() == {"a", "b"} and not pictures.note
        return sum(len(uri) for uri in pictures.uris.values()) * 3 // 4

    largest = total(100_000)
    assert total(largest // 2) < largest // 2 and total(largest // 5) < largest // 5
    assert thumbnails(tmp_path, ["a", "b"], 100).uris == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"users": -1}, "users: expected a number from 0 to 100, found -1"),
        ({"users": 101}, "users: expected a number from 0 to 100"),
        ({"seed": -3}, "seed: expected a whole number from 0"),
        ({"out": Path("page.txt")}, "out: expected a file that ends in .html or .htm"),
        ({"out": Path("no-folder/page.html")}, "out: expected a file in a folder that exists"),
        ({"dataset": Path("no-folder")}, "dataset: expected a folder, found no-folder"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(trained, arguments, expected):
    with pytest.raises(InputError, match=f"^{expected}"):
        show(trained, **{"users": 1, "device": "cpu", **arguments})


def test_runs_that_cannot_be_shown_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        show(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "loss": 1.0}\n')
    with pytest.raises(InputError, match="metrics.jsonl line 4: expected an epoch, its loss and validation figures"):
        show(run)
    (run / "best.safetensors").unlink()
    with pytest.raises(InputError, match="best.safetensors"):
        show(run)
    assert not (run / "report.html").exists()
