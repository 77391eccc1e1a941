"""Interactions that an import leaves out: low ratings, duplicates, small users and items; and splits that are given."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import random
from collections import Counter

import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, imported_csv, refused, table, write
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import ImportOptions, TableOptions
from iisan_fast.data.imports.writing import history_order
from iisan_fast.errors import InputError

RATED = "user,item,timestamp,rating\nu,a,1,5\nu,b,2,3.5\nv,a,3,4\nv,b,4,2\n"


def lines(path) -> dict[str, str]:
    """Return {first field: the rest} of the lines of a file."""
    return dict(line.split("\t") for line in path.read_text().splitlines())


def test_low_ratings_are_left_out_and_counted(tmp_path):
    source = write(tmp_path / "in.csv", RATED)
    counts = import_files(source, tmp_path / "out", TableOptions(min_rating=4))
    assert lines(tmp_path / "out" / "users.tsv") == {"u": "a", "v": "a"} and [*table(tmp_path / "out")] == ["a"]
    assert (counts.rows, counts.low_rated_interactions, counts.interactions) == (4, 2, 2)
    for name in ("overall", "Stars", "score"):
        write(source, RATED.replace("rating", name))
        assert import_files(source, tmp_path / name, TableOptions(min_rating=3.5)).interactions == 3
    write(source, RATED.replace("rating", "mark"))
    options = TableOptions(min_rating=4)
    refused(
        lambda: import_files(source, tmp_path / "new", options), tmp_path, "no column of ratings", "--rating-column"
    )
    import_files(source, tmp_path / "named", TableOptions(min_rating=4, rating_column="mark"))
    options = TableOptions(min_rating=4, rating_column="marks")
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, "no column 'marks'")
    options = TableOptions(min_rating=6)
    write(source, RATED)
    refused(
        lambda: import_files(source, tmp_path / "new", options), tmp_path, "no interaction has a rating of 6 or more"
    )
    with pytest.raises(InputError, match="rating_column: needs the least rating"):
        TableOptions(rating_column="rating")
    with pytest.raises(InputError, match="min_rating: expected a number, found nan"):
        TableOptions(min_rating=float("nan"))


def test_a_rating_that_is_no_number_is_a_bad_row(tmp_path):
    source = write(tmp_path / "in.csv", RATED + "w,a,1,good\nw,a,1,\nw,a,1,nan\nw,a,1,inf\n")
    options = TableOptions(min_rating=4)
    words = ("line 6: rating: expected a number, found 'good'",)
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, *words)
    counts = import_files(source, tmp_path / "out", TableOptions(min_rating=4, bad_rows="skip"))
    assert (counts.bad_rows["bad rating"].places, counts.rows, counts.low_rated_interactions) == ([6, 7, 8, 9], 8, 2)
    import_files(source, tmp_path / "unread")  # ratings are read for their least alone
    frame = pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "timestamp": [1, 2]})
    frame.with_columns(rating=pl.Series([4.1, 4.0], dtype=pl.Float32)).write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "float32", TableOptions(min_rating=4.1))
    assert lines(tmp_path / "float32" / "users.tsv") == {"u": "a"}


@pytest.mark.parametrize(
    ("which", "items", "times", "left_out"),
    [("keep", "a b a b a", "1 1 2 2 3", 0), ("first", "a b", "1 1", 3), ("last", "b a", "2 3", 3)],
)
def test_duplicates_by_time(tmp_path, which, items, times, left_out):
    source = write(tmp_path / "in.csv", HEADER + "u,a,3\nu,a,1\nu,b,1\nu,a,2\nu,b,2\n")
    counts = import_files(source, tmp_path / "out", TableOptions(duplicates=which))
    assert lines(tmp_path / "out" / "users.tsv") == {"u": items}
    assert lines(tmp_path / "out" / "times.tsv") == {"u": times}
    assert (counts.duplicate_interactions, counts.interactions) == (left_out, 5 - left_out)


def test_a_core_is_taken_until_it_is_stable(tmp_path):
    """Leave out item c, which has one interaction; then user w, whom it leaves with one; then item d."""
    rows = ("u,a", "u,b", "v,a", "v,b", "w,c", "w,d", "v,d")
    source = write(tmp_path / "in.csv", "user,item\n" + "\n".join(rows) + "\n")
    counts = import_files(source, tmp_path / "out", TableOptions(user_core=2, item_core=2))
    assert lines(tmp_path / "out" / "users.tsv") == {"u": "a b", "v": "a b"}
    assert [*table(tmp_path / "out")] == ["a", "b"]
    assert (counts.core_interactions, counts.interactions, counts.users, counts.items) == (3, 4, 2, 2)
    assert import_files(source, tmp_path / "users", TableOptions(user_core=3)).users == 1
    options = TableOptions(user_core=2, item_core=3)
    words = ("user_core 2, item_core 3: no interaction is left; choose lower ones",)
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, *words)
    with pytest.raises(InputError, match="item_core: expected a whole number from 1 up, found 0"):
        ImportOptions(item_core=0)


def filtered(rows: list[tuple[str, str, int, int]], options: TableOptions) -> dict[str, list[tuple[str, int]]]:
    """Return the histories, items with times, that are left of rows of user, item, time and rating."""
    left = [row for row in rows if options.min_rating is None or row[3] >= options.min_rating]
    left.sort(key=lambda row: row[2])
    if options.duplicates != "keep":
        chosen = {}
        for place, row in enumerate(left):
            if options.duplicates == "last" or row[:2] not in chosen:
                chosen[row[:2]] = place
        left = [left[place] for place in sorted(chosen.values())]
    while True:
        users, items = Counter(row[0] for row in left), Counter(row[1] for row in left)
        rest = [row for row in left if users[row[0]] >= options.user_core and items[row[1]] >= options.item_core]
        if len(rest) == len(left):
            break
        left = rest
    histories: dict[str, list[tuple[str, int]]] = {}
    for user, item, time, _ in left:
        histories.setdefault(user, []).append((item, time))
    return histories


@pytest.mark.parametrize("seed", range(12))
def test_filters_are_those_of_loops(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(history_order, "ROWS_AT_ONCE", draw.choice([1, 7, 1000]))
    rows = [
        (f"u{draw.randrange(6)}", f"i{draw.randrange(8)}", draw.randrange(9), draw.randrange(1, 6))
        for _ in range(draw.choice([20, 60]))
    ]
    text = "".join(f"{user},{item},{time},{rating}\n" for user, item, time, rating in rows)
    source = write(tmp_path / "in.csv", "user,item,timestamp,rating\n" + text)
    options = TableOptions(
        duplicates=draw.choice(["keep", "first", "last"]),
        min_rating=draw.choice([None, 2, 3]),
        user_core=draw.randrange(1, 4),
        item_core=draw.randrange(1, 4),
    )
    expected = filtered(rows, options)
    if not expected:
        refused(lambda: import_files(source, tmp_path / "out", options), tmp_path, "no interaction")
        return
    counts = import_files(source, tmp_path / "out", options)
    users = lines(tmp_path / "out" / "users.tsv")
    assert users == {user: " ".join(item for item, _ in history) for user, history in expected.items()}
    times = lines(tmp_path / "out" / "times.tsv")
    assert times == {user: " ".join(str(time) for _, time in history) for user, history in expected.items()}
    order = list(dict.fromkeys(row[0] for row in rows if options.min_rating is None or row[3] >= options.min_rating))
    assert list(users) == [user for user in order if user in expected]
    left_out = (counts.low_rated_interactions, counts.duplicate_interactions, counts.core_interactions)
    assert counts.interactions + sum(left_out) == len(rows) == counts.rows
    assert {*table(tmp_path / "out")} == {item for history in expected.values() for item, _ in history}


PARTED = (
    "user,item,timestamp,split\nu,d,4,test\nu,a,1,train\nv,e,9,2\nu,c,3,Valid\nu,b,2,0\nv,f,1,training\nu,e,5,test\n"
)


def test_a_split_column_gives_the_part_of_each_interaction(tmp_path):
    out = imported_csv(tmp_path, PARTED)
    assert (out / "users.tsv").read_text() == "u\ta b c d e\nv\tf e\n"
    assert (out / "splits.tsv").read_text() == "u\t2 1 2\nv\t1 0 1\n"
    assert (out / "times.tsv").read_text() == "u\t1 2 3 4 5\nv\t1 9\n"
    source = write(tmp_path / "in.csv", PARTED.replace("Valid", "later").replace("split", "fold"))
    options = TableOptions(split_column="fold")
    words = ("line 5: part: expected training (train, 0), validation (valid, val, dev, 1) or test (2), found 'later'",)
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, *words)
    counts = import_files(source, tmp_path / "skipped", TableOptions(split_column="fold", bad_rows="skip"))
    assert counts.bad_rows["bad part"].places == [5]
    assert (tmp_path / "skipped" / "splits.tsv").read_text() == "u\t2 0 2\nv\t1 0 1\n"
    frame = pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "split": [2.0, 0.0]})
    frame.write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "numbers")
    assert (tmp_path / "numbers" / "users.tsv").read_text() == "u\tb a\n"
    write(source, "user,item,split\nu,a,2.0\nu,b,0.0\n")
    import_files(source, tmp_path / "texts")
    assert (tmp_path / "texts" / "splits.tsv").read_text() == "u\t1 0 1\n"


def test_three_files_give_the_parts(tmp_path):
    for name, content in (("train", "u,b,2\nu,a,1\n"), ("valid", "v,c,5\nu,c,3\n"), ("test", "u,d,4\n")):
        write(tmp_path / f"{name}.csv", HEADER + content)
    options = TableOptions(validation=tmp_path / "valid.csv", test=tmp_path / "test.csv")
    counts = import_files(tmp_path / "train.csv", tmp_path / "out", options)
    assert (tmp_path / "out" / "users.tsv").read_text() == "u\ta b c d\nv\tc\n"
    assert (tmp_path / "out" / "splits.tsv").read_text() == "u\t2 1 1\nv\t0 1 0\n"
    assert (counts.rows, counts.interactions) == (5, 5)
    options = TableOptions(validation=tmp_path / "valid.csv", test=tmp_path / "test.csv", user_core=2)
    import_files(tmp_path / "train.csv", tmp_path / "core", options)
    assert (tmp_path / "core" / "splits.tsv").read_text() == "u\t2 1 1\n"
    with pytest.raises(InputError, match="split_column: the files of validation and test say the parts"):
        TableOptions(test=tmp_path / "test.csv", split_column="split")


def test_a_split_against_the_order_of_time_has_no_times(tmp_path, caplog):
    out = imported_csv(tmp_path, PARTED.replace("u,a,1,train", "u,a,7,train"))
    assert (out / "users.tsv").read_text() == "u\tb a c d e\nv\tf e\n"
    assert (out / "splits.tsv").read_text() == "u\t2 1 2\nv\t1 0 1\n" and not (out / "times.tsv").exists()
    assert "times.tsv is left out: 1 users, such as u," in caplog.text


def test_sources_have_times_and_parts_all_or_none(tmp_path):
    first, second = write(tmp_path / "1.csv", HEADER + "u,a,1\n"), write(tmp_path / "2.csv", "user,item\nu,a\n")
    words = ("2.csv: has no timestamps, and", "1.csv has; give both or neither")
    refused(lambda: import_files([first, second], tmp_path / "out"), tmp_path, *words)
    write(second, "user,item,timestamp,split\nu,a,1,test\n")
    words = ("1.csv: has no parts, and", "2.csv has; give both or neither")
    refused(lambda: import_files([first, second], tmp_path / "out"), tmp_path, *words)


def test_bad_rows_of_several_sources_are_told_apart(tmp_path):
    for name in ("1", "2"):
        write(tmp_path / f"{name}.csv", HEADER + "u,a,x\n" * int(name) + "u,a,1\n")
    counts = import_files([tmp_path / "1.csv", tmp_path / "2.csv"], tmp_path / "out", TableOptions(bad_rows="skip"))
    assert counts.rows == 5
    assert {kind: bad.places for kind, bad in counts.bad_rows.items()} == {
        "1.csv: bad timestamp": [2],
        "2.csv: bad timestamp": [2, 3],
    }


def test_the_first_of_two_titles_is_taken(tmp_path, caplog):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\nu,b,2\n")
    items = write(tmp_path / "items.csv", "item,title\na, A  one\nb,B\na,A one\na,A two\nz,Z\nz,Y\n\n")
    counts = import_files(source, tmp_path / "out", TableOptions(items=items))
    assert table(tmp_path / "out") == {"a": "A one", "b": "B"} and counts.items_with_two_titles == 1
    assert (
        "items with several titles: 1, of which the first title is taken; item 'a' has 'A one' and 'A two'"
        in caplog.text
    )


def test_a_table_without_titles_leaves_the_ids(tmp_path, caplog):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\nu,b,2\n")
    items = write(tmp_path / "items.csv", "item,brand\na,A\nb,B\n")
    counts = import_files(source, tmp_path / "out", TableOptions(items=items))
    assert table(tmp_path / "out") == {"a": "a", "b": "b"} and counts.items_without_title == 2
    (warning,) = caplog.messages
    assert "no title for 2 of 2 items (a, b): their ids stand for it" in warning and "no column 'title'" in warning
    options = TableOptions(items=items, title_column="title")
    refused(lambda: import_files(source, tmp_path / "new", options), tmp_path, "no column 'title'")
    options = TableOptions(items=items, missing_titles="error")
    refused(
        lambda: import_files(source, tmp_path / "new", options), tmp_path, "no title for 2 of 2", "no column 'title'"
    )


def test_titles_that_are_numbers(tmp_path):
    source = write(tmp_path / "in.csv", HEADER + "u,a,1\nu,b,2\n")
    pl.DataFrame({"item": ["a", "b"], "title": [1984, 2001]}).write_parquet(tmp_path / "items.parquet")
    import_files(source, tmp_path / "out", TableOptions(items=tmp_path / "items.parquet"))
    assert table(tmp_path / "out") == {"a": "1984", "b": "2001"}
