"""Times of imports: numbers with fractions, dates of any zone and form, no times, and none in some rows."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import datetime
import logging
import random
from fractions import Fraction

import pytest

pl = pytest.importorskip("polars")

from helpers.import_sources import HEADER, imported_csv, refused, write
from iisan_fast.data.imports.families.recbole import import_recbole
from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.data.imports.rows.decimal_times import read_numbers
from iisan_fast.data.imports.rows.interaction_columns import looks_like_time
from iisan_fast.data.imports.rows.iso_times import read_iso
from iisan_fast.data.imports.rows.times import TimeReader
from iisan_fast.data.imports.text import delimited
from iisan_fast.errors import InputError

DAY = 86_400_000_000  # microseconds
DAY_2018 = 17_794 * DAY  # 2018-09-20


def history(folder) -> str:
    return (folder / "users.tsv").read_text()


def times(folder) -> str:
    return (folder / "times.tsv").read_text()


def rows(*values: str) -> str:
    """Return a CSV file of one user whose items are the letters from a on."""
    return HEADER + "".join(f"u,{chr(97 + index)},{value}\n" for index, value in enumerate(values))


@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
@pytest.mark.parametrize(
    ("values", "items", "expected"),
    [
        (["3", "1", "2.0"], "b c a", "1 2 3"),
        (["1600000000.25", "1600000000", "1600000000.125"], "b c a", "{0}000000 {0}125000 {0}250000"),
        (["1600000000", "1600000000.5e0", "-0.5", "0.0000001"], "c d a b", "-500000000 100 {0}000000000 {0}500000000"),
        (["2e-3", "0.0010", "1"], "b a c", "1000 2000 1000000"),
        (["2018-09-21", "2018-09-20", "2018/9/22"], "b a c", f"{DAY_2018} {DAY_2018 + DAY} {DAY_2018 + 2 * DAY}"),
        (["2018-09-20 00:00:02", "2018-09-20T00:00:01"], "b a", f"{DAY_2018 + 10**6} {DAY_2018 + 2 * 10**6}"),
        (["2018-09-20 00:00:00.5", "2018-09-20"], "b a", f"{DAY_2018} {DAY_2018 + 500_000}"),
        (["2018-09-20T02:00:00+02:00", "2018-09-19T23:00Z"], "b a", f"{DAY_2018 - 3600 * 10**6} {DAY_2018}"),
        (["2018-09-20 00:00:00 UTC", "2018-09-19 19:00:01-0500"], "a b", f"{DAY_2018} {DAY_2018 + 10**6}"),
        (["2018-09-20 00:00:00.0000002", "2018-09-20 00:00:00"], "b a", f"{DAY_2018}000 {DAY_2018}200"),
    ],
)
def test_times_are_read_in_order(tmp_path, monkeypatch, values, items, expected, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    out = imported_csv(tmp_path, rows(*values))
    assert history(out) == f"u\t{items}\n"
    assert times(out) == f"u\t{expected.format(1_600_000_000)}\n"


@pytest.mark.parametrize("seed", range(5))
def test_numbers_keep_order_and_equality_exactly(seed):
    """Compare with fractions, over batches of one import whose scale grows."""
    draw = random.Random(seed)
    most = draw.choice([0, 6, 9])
    texts = []
    for _ in range(300):
        decimals = draw.randrange(most + 1)
        digits = "".join(draw.choice("019") for _ in range(decimals))
        exponent = draw.choice(["", "", "", "e0", "e1", "E+2", "e-0"])
        texts.append(f"{draw.choice(['', '+', '-'])}{draw.randrange(2 * 10**6)}{'.' * bool(digits)}{digits}{exponent}")
    reader = TimeReader()
    read = [(reader.read(pl.Series(texts[start : start + 50])), reader.scale) for start in range(0, 300, 50)]
    values = [value * 10 ** (reader.scale - scale) for batch, scale in read for value in batch]
    assert values == [
        Fraction(text.replace("+", "", 1) if text[0] == "+" else text) * 10**reader.scale for text in texts
    ]
    floats = pl.Series([float(text) for text in texts])
    numbers, scale = read_numbers(floats)
    assert numbers.to_list() == [Fraction(repr(number)) * 10**scale for number in floats]


@pytest.mark.parametrize("seed", range(3))
def test_dates_are_those_of_python(seed):
    draw = random.Random(seed)
    moments = [
        datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=draw.randrange(-(6 * 10**16), 2 * 10**17))
        for _ in range(200)
    ]
    texts = []
    for moment in moments:
        zone = datetime.timezone(datetime.timedelta(minutes=draw.randrange(-14 * 60, 14 * 60)))
        texts.append(moment.replace(tzinfo=datetime.timezone.utc).astimezone(zone).isoformat(draw.choice("T ")))
    read, scale = read_iso(pl.Series(texts))
    epoch = datetime.datetime(1970, 1, 1)
    assert scale == 6
    assert read.to_list() == [(moment - epoch) // datetime.timedelta(microseconds=1) for moment in moments]


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        ("%m %d, %Y", ["09 21, 2018", "9 2, 2018"], f"{DAY_2018 - 18 * DAY} {DAY_2018 + DAY}"),
        ("%d.%m.%Y %H:%M", ["20.09.2018 00:01", "20.09.2018 00:00"], f"{DAY_2018} {DAY_2018 + 60 * 10**6}"),
        (
            "%a %b %d %H:%M:%S %z %Y",
            ["Thu Sep 20 02:00:01 +0200 2018", "Thu Sep 20 00:00:00 +0000 2018"],
            f"{DAY_2018} {DAY_2018 + 10**6}",
        ),
        ("%Y%m%d", ["20180921", "20180920"], f"{DAY_2018} {DAY_2018 + DAY}"),
        (
            "%Y-%m-%dT%H:%M:%S.%f%z",
            ["2018-09-20T00:00:00.25Z", "2018-09-20T00:00:00.0Z"],
            f"{DAY_2018} {DAY_2018 + 250_000}",
        ),
    ],
)
def test_a_format_reads_other_dates(tmp_path, form, values, expected):
    out = imported_csv(tmp_path, rows(*(f'"{value}"' for value in values)), timestamp_format=form)
    assert (history(out), times(out)) == ("u\tb a\n", f"u\t{expected}\n")


def test_dates_of_another_form_name_the_option(tmp_path):
    source = write(tmp_path / "in.csv", rows('"09 20, 2018"'))
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "line 2: timestamp", "--timestamp-format")
    options = TableOptions(timestamp_format="%d.%m.%Y")
    words = ("line 2: timestamp: expected a date and time of the form '%d.%m.%Y', found '09 20, 2018'",)
    refused(lambda: import_files(source, tmp_path / "out", options), tmp_path, *words)
    options = TableOptions(timestamp_format="%H %q")
    refused(
        lambda: import_files(source, tmp_path / "out", options), tmp_path, "timestamp_format: '%H %q' cannot be used"
    )


def test_parquet_dates_are_the_moments_of_csv(tmp_path):
    texts = ["2018-09-20T02:00:00.5+02:00", "2018-09-19T23:00:00.25Z"]
    out = imported_csv(tmp_path, rows(*texts))
    moments = pl.Series("timestamp", [datetime.datetime.fromisoformat(text.replace("Z", "+00:00")) for text in texts])
    for index, column in enumerate(
        (
            moments,
            moments.dt.convert_time_zone("Asia/Tokyo"),
            moments.dt.replace_time_zone(None),
            moments.cast(pl.Datetime("ms", "UTC")),
            moments.cast(pl.Datetime("ns", "UTC")),
            pl.Series("timestamp", texts),
        )
    ):
        frame = pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "timestamp": column})
        frame.write_parquet(tmp_path / "in.parquet")
        import_files(tmp_path / "in.parquet", tmp_path / f"out{index}")
        assert (history(tmp_path / f"out{index}"), times(tmp_path / f"out{index}")) == (history(out), times(out))
    days = pl.Series("timestamp", [datetime.date(2018, 9, 21), datetime.date(2018, 9, 20)])
    pl.DataFrame({"user": ["u", "u"], "item": ["a", "b"], "timestamp": days}).write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "days")
    assert times(tmp_path / "days") == f"u\t{DAY_2018} {DAY_2018 + DAY}\n"


def test_rows_without_a_time_are_a_kind_of_bad_rows(tmp_path):
    blank = ["", "null", "NULL", r"\N", "NaN", "None", "nan"]
    for first, other in (("5", "2018-09-20"), ("2018-09-20", "5")):
        source = write(tmp_path / "in.csv", rows(*blank, first, other, "x"))
        refused(
            lambda source=source: import_files(source, tmp_path / "out"),
            tmp_path,
            "line 2: timestamp: expected a time, found nothing",
        )
        counts = import_files(source, tmp_path / first, TableOptions(bad_rows="skip"))
        assert history(tmp_path / first) == "u\th\n"
        places = {kind: (bad.count, bad.places) for kind, bad in counts.bad_rows.items()}
        assert places == {"no timestamp": (7, [2, 3, 4, 5, 6]), "bad timestamp": (2, [10, 11])}
    write(tmp_path / "in.csv", rows("5", "2018-09-20"))
    words = ("line 3: timestamp: expected a number", "as other times are numbers, found '2018-09-20'")
    refused(lambda: import_files(tmp_path / "in.csv", tmp_path / "new"), tmp_path, *words)


def test_times_that_64_bits_do_not_hold_are_named(tmp_path):
    source = write(tmp_path / "in.csv", rows("0.5", str(2**53)))
    refused(lambda: import_files(source, tmp_path / "out"), tmp_path, "line 3: timestamp: expected a number of at most")
    first = write(tmp_path / "first.csv", rows("1", str(2**53)))
    words = (f"times: {2**53} does not fit into 64 bits as microseconds",)
    refused(lambda: import_files([first, write(source, rows("0.5"))], tmp_path / "out"), tmp_path, *words)


def test_the_unit_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="iisan_fast")
    for values, words in (
        (["1", "2"], None),
        (["1.5", "2"], "all are multiplied by 1,000,000 (seconds become microseconds)"),
        (["2018-09-20"], "times: microseconds since 1970 (UTC)"),
    ):
        caplog.clear()
        import_files(write(tmp_path / "in.csv", rows(*values)), tmp_path / values[0])
        assert words in caplog.text if words else "times" not in caplog.text


def test_the_order_of_the_file_counts_without_times(tmp_path, caplog):
    write(tmp_path / "in.csv", "user,item\nu,c\nv,a\nu,a\nu,b\n")
    import_files(tmp_path / "in.csv", tmp_path / "csv")
    assert "no column of times, so that the order of its rows counts" in caplog.text
    write(tmp_path / "in.inter", "user_id:token\titem_id:token\nu\tc\nv\ta\nu\ta\nu\tb\n")
    import_recbole(tmp_path / "in.inter", tmp_path / "recbole")
    pl.read_csv(tmp_path / "in.csv").write_parquet(tmp_path / "in.parquet")
    import_files(tmp_path / "in.parquet", tmp_path / "parquet")
    for name in ("csv", "recbole", "parquet"):
        assert history(tmp_path / name) == "u\tc a b\nv\ta\n" and not (tmp_path / name / "times.tsv").exists()
    write(tmp_path / "in.csv", "user,item,t_dat\nu,c,3\nu,a,2\n")
    words = ("no column 'timestamp', but t_dat may hold times", "--timestamp-column t_dat", "--timestamp-column -")
    refused(lambda: import_files(tmp_path / "in.csv", tmp_path / "out"), tmp_path, *words)
    caplog.clear()
    import_files(tmp_path / "in.csv", tmp_path / "ordered", TableOptions(timestamp_column="-"))
    assert history(tmp_path / "ordered") == "u\tc a\n" and "no column of times" not in caplog.text
    options = TableOptions(timestamp_column="when")
    refused(lambda: import_files(tmp_path / "in.csv", tmp_path / "out", options), tmp_path, "no column 'when'")
    import_files(tmp_path / "in.csv", tmp_path / "named", TableOptions(timestamp_column="t_dat"))
    assert (history(tmp_path / "named"), times(tmp_path / "named")) == ("u\ta c\n", "u\t2 3\n")


def test_several_sources_come_in_order(tmp_path):
    for name, content in (("1", "user,item\nu,a\nv,b\n"), ("2", "user,item\nv,a\nu,c\n")):
        write(tmp_path / f"{name}.csv", content)
    import_files([tmp_path / "2.csv", tmp_path / "1.csv"], tmp_path / "out")
    assert history(tmp_path / "out") == "v\ta b\nu\tc a\n"


def test_names_that_look_like_times():
    for name in ("time", "unixReviewTime", "t_dat", "date", "ts", "event_time", "eventdate", "timestamp_ms", "Date"):
        assert looks_like_time(name), name
    for name in (
        "watching_times",
        "watch_time",
        "playtime_forever",
        "candidate",
        "date_of_birth",
        "timeSpent",
        "rating",
        "update",
        "t",
        "click",
    ):
        assert not looks_like_time(name), name


def test_a_row_a_user_has_lists_of_times(tmp_path):
    frame = pl.DataFrame({"user": ["u", "v"], "item": [["a", "b", "c"], ["c"]], "timestamp": [[3.5, 1.0, 2.0], [7.0]]})
    frame.write_parquet(tmp_path / "in.parquet")
    counts = import_files(tmp_path / "in.parquet", tmp_path / "out")
    assert (history(tmp_path / "out"), counts.rows, counts.interactions) == ("u\tb c a\nv\tc\n", 2, 4)
    assert times(tmp_path / "out") == "u\t1000000 2000000 3500000\nv\t7000000\n"
    frame.with_columns(pl.Series("timestamp", [[1.0], [7.0]])).write_parquet(tmp_path / "in.parquet")
    words = ("row 1: timestamp: expected a list as long as the items', 3, found 1",)
    refused(lambda: import_files(tmp_path / "in.parquet", tmp_path / "new"), tmp_path, *words)
    source = write(tmp_path / "in.csv", "user,item,timestamp\nu,a|b||c,3|1|2\nv,c|a,5\n")
    import_files(source, tmp_path / "split", TableOptions(item_separator="|"))
    assert history(tmp_path / "split") == "u\tb c a\nv\tc a\n"


def test_dates_of_every_kind_of_error():
    for text in ("2018-02-30", "2018-13-01", "2018-09-20 25:00", "2018-09-20 10:00 CET", "20-09-2018", "noon"):
        assert read_iso(pl.Series([text]))[0].to_list() == [None], text
    with pytest.raises(InputError, match="timestamp_format"):
        TimeReader().read(pl.Series(["1"]), "%H %q")
