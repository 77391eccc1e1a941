"""Imports of public datasets: files that are missing or something else, and what lies beside the interactions."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import shlex

import pytest

pytest.importorskip("polars")

from PIL import Image

from helpers.import_sources import refused, table, write
from iisan_fast.cli import main
from iisan_fast.cli.views import parsed_view
from iisan_fast.data.imports.families.amazon import import_amazon
from iisan_fast.data.imports.families.iisan import import_iisan
from iisan_fast.data.imports.families.mmrec import import_mmrec
from iisan_fast.data.imports.families.movielens import import_movielens
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions

USER = "AGKHLEW2SOWHNMFQIJGBECAF7INQ"
HEADER = "user_id,parent_asin,rating,timestamp"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [("ml-1m.zip", "is an archive; unpack it"), ("movies.dat", "with one of ratings.csv, ratings.dat, u.data")],
)
def test_movielens_names_what_it_expects(tmp_path, folder, name, words):
    write(folder / name, "1::2\n")
    refused(lambda: import_movielens(folder / name, tmp_path / "out"), tmp_path, name, words)
    refused(lambda: import_movielens(folder / "none", tmp_path / "out"), tmp_path, "none: no such file or folder")


def test_movielens_is_found_in_the_folder_of_its_archive(tmp_path, folder):
    (folder / "ml-1m").mkdir()
    write(folder / "ml-1m" / "ratings.dat", "1::20::2::9\n1::10::5::8\n1::30::4::7\n")
    import_movielens(folder, tmp_path / "out", TableOptions(min_rating=4))
    assert (tmp_path / "out" / "users.tsv").read_text() == "1\t30 10\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"meta_Toys.jsonl": '{"parent_asin": "B1"}\n'}, ["meta_Toys.jsonl: holds products"]),
        ({"Toys.csv": "1,2,5.0,30\n"}, ["Toys.csv: expected a header with user_id or reviewerID, or rows"]),
        ({"Toys.csv": "B000000001,B000000002,5.0,30\n"}, ["or rows of user, item, rating and time"]),
        ({"Toys.csv": "A1XXXXXXXXXXXX,B000000002,5.0\n"}, ["or rows of user, item, rating and time"]),
        ({"Toys.valid.csv": f"{HEADER}\nu,a,5,1\n"}, ["Toys.valid.csv: the training part of the split is missing"]),
        (
            {"Toys.train.csv": f"{HEADER}\nu,a,5,1\n", "Toys.test.csv": f"{HEADER}\n", "Other.test.csv": f"{HEADER}\n"},
            ["expected NAME.train.csv", "found Other.test.csv, Toys.test.csv, Toys.train.csv"],
        ),
        ({"Toys.jsonl": '{"user_id": "u", "asin_": "a", "timestamp": 1}\n'}, ["expected a column parent_asin or asin"]),
        ({"notes.txt": ""}, ["expected files of Amazon's reviews in it"]),
        (
            {
                "Toys.csv": f"{HEADER}\nu,a,5,1\n",
                "meta_A.jsonl": '{"parent_asin": "a", "title": "A"}\n',
                "meta_B.jsonl": '{"parent_asin": "a", "title": "B"}\n',
            },
            ["found meta_A.jsonl, meta_B.jsonl", "--items"],
        ),
    ],
)
def test_amazon_names_what_it_expects(tmp_path, folder, files, words):
    for name, content in files.items():
        write(folder / name, content)
    refused(lambda: import_amazon(folder, tmp_path / "out"), tmp_path, *words)


def test_amazon_ratings_take_the_name_of_items_from_the_products(tmp_path, folder):
    write(folder / "Toys.csv", f"{USER},B000000002,5.0,2\n{USER},B000000001,1.0,1\n")
    for name in ("asin", "parent_asin"):
        items = write(folder / f"{name}.jsonl", f'{{"{name}": "B000000001", "title": "Comb"}}\n')
        import_amazon(folder / "Toys.csv", tmp_path / name, TableOptions(items=items))
        assert table(tmp_path / name) == {"B000000002": "B000000002", "B000000001": "Comb"}
        assert (tmp_path / name / "users.tsv").read_text() == f"{USER}\tB000000001 B000000002\n"


def test_histories_of_amazon_stand_in_for_a_training_part_that_is_missing(tmp_path, folder):
    write(folder / "Toys.valid.csv", f"{HEADER},history\nu,c,5,3,a b\n")
    write(folder / "Toys.test.csv", f"{HEADER},history\nu,d,5,4,a b c\n")
    import_amazon(folder, tmp_path / "out")
    assert (tmp_path / "out" / "users.tsv").read_text() == "u\ta b c d\n"
    assert (tmp_path / "out" / "splits.tsv").read_text() == "u\t2 1 1\n"


def test_mmrec_prints_its_features_as_views(tmp_path, folder, capsys):
    write(folder / "b.inter", "userID\titemID\tx_label\n0\t1\t0\n0\t2\t1\n")
    write(folder / "meta-b.csv", 'itemID,asin,title\n1,B1,"A, b"\n2,B2,C\n')
    for name in ("audio", "image", "text"):  # a run takes two
        write(folder / f"{name}_feat.npy", "")
    with pytest.raises(SystemExit) as ended:
        main(["import", "mmrec", str(folder), str(tmp_path / "out")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed.partition("with its features: ")[2])
    options = ["--method", "iisan-versa", "--split", "given"]  # features of unequal width, and a split by x_label
    assert words[:7] == ["iisan-fast", "train", str(tmp_path / "out"), *options]
    views = [parsed_view(text) for text in words[8::2]]
    assert [(view.name, view.path, view.first_id) for view in views] == [
        (name, str(folder / f"{name}_feat.npy"), 0) for name in ("image", "text")
    ]
    assert table(tmp_path / "out") == {"1": "A, b", "2": "C"}
    assert f"next: iisan-fast stats {tmp_path}/out --split given\n" in printed


def test_mmrec_sends_files_of_recbole_to_recbole(tmp_path, folder):
    write(folder / "b.inter", "user_id:token\titem_id:token\nu\ta\n")
    refused(lambda: import_mmrec(folder, tmp_path / "out"), tmp_path, "b.inter: has a header with types", "recbole")


def test_images_of_iisan_lie_in_its_folder_or_above_it(tmp_path, folder):
    scientific = folder / "Scientific"
    scientific.mkdir()
    write(scientific / "Industrial_and_Scientific_items.tsv", "B1\tRuler\n")
    write(scientific / "am_Industrial_and_Scientific_users_10K.tsv", "A1\tB1 B1\n")
    for place in (folder / "am_image_mi", folder / "am_image_is", scientific / "am_image_other"):
        place.mkdir()
        Image.new("RGB", (2, 2)).save(place / "B1.jpg")
        import_iisan(scientific, tmp_path / place.name)
        images = tmp_path / place.name / "images"
        assert images.resolve() == place if place.name != "am_image_mi" else not images.exists()
    (scientific / "Industrial_and_Scientific_items.tsv").unlink()
    refused(lambda: import_iisan(scientific, tmp_path / "new"), tmp_path, "expected *_items.tsv in it, found none")


@pytest.mark.parametrize(
    ("text", "users"),
    [("u a b\nv b\n", "u\ta b\nv\tb\n"), ("u  a b \r\nv b\r\n\r\n", "u\ta b\nv\tb\n"), ("u a b\nu c", "u\ta b c\n")],
)
def test_lines_of_a_user_and_items(tmp_path, text, users):
    options = TableOptions(columns=("user", "item"), separator=" ", item_separator=" ")
    import_files(write(tmp_path / "in.txt", text), tmp_path / "out", options)
    assert (tmp_path / "out" / "users.tsv").read_text() == users


def test_lines_without_items_or_of_another_encoding_are_refused_or_left_out(tmp_path):
    source = write(tmp_path / "in.txt", b"u a\nv\n\nw \xff\nu b\n")
    names = {"columns": ("user", "item"), "separator": "space", "item_separator": " "}
    refused(lambda: import_files(source, tmp_path / "out", TableOptions(**names)), tmp_path, "in.txt line 3", "empty")
    counts = import_files(source, tmp_path / "out", TableOptions(**names, bad_rows="skip"))
    assert (tmp_path / "out" / "users.tsv").read_text() == "u\ta b\n"
    assert {name: kind.places for name, kind in counts.bad_rows.items()} == {
        "empty line": [3],
        "not UTF-8": [4],
        "bad item": [2],
    }


def test_a_path_alone_is_no_import(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["import", "csv", "ratings.csv"])
    assert ended.value.code == 2
    assert "expected SOURCE... and DESTINATION" in capsys.readouterr().err
