"""Paths as people and scripts give them: ~, links, FIFOs, devices, bytes that are no text."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import iisan_fast as library
from helpers.command_line import iisan_fast, refused
from iisan_fast.captioning.caption_images import Frames
from iisan_fast.config import ViewConfig
from iisan_fast.data.images.image_folder import ImageFolder
from iisan_fast.data.items import read_items
from iisan_fast.errors import InputError
from iisan_fast.files import expanded_path, locked, whole_file, whole_folder, write_atomically
from iisan_fast.setting_sources import as_path
from iisan_fast.states import Store

FAST = ("--epochs", 1, "--batch-users", 16, "--embedding-dim", 16, "--bottleneck", 8)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return a home folder; the working folder is another one, where no folder named ~ may appear."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    yield home
    assert [path.name for path in work.iterdir() if path.name.startswith("~")] == []


def test_tilde_is_the_home_folder_in_every_path_of_a_run(toy_run, home):
    dataset, cache = toy_run
    shutil.copytree(dataset, home / "d")
    shutil.copytree(cache, home / "c")
    result = iisan_fast("train", "~/d", "--cache=~/c", "--out=~/x/run", *FAST, "--json")
    assert result.returncode == 0, result.stderr
    config = json.loads((home / "x" / "run" / "config.json").read_text())
    assert (config["dataset"], config["cache"]) == (str(home / "d"), str(home / "c"))
    assert iisan_fast("evaluate", "~/x/run", "--json").returncode == 0
    assert iisan_fast("train", "--resume=~/x/run", "--json").returncode == 0
    plan = iisan_fast("train", "~/d", "--set", "cache=~/c", *FAST, "--dry-run", "--json")
    assert plan.returncode == 0, plan.stderr
    settings = {"dataset": "~/d", "cache": "~/c"}
    assert library.train(config=settings, out="~/y", dry_run=True)["files"]["folder"] == str(home / "y")


def test_tilde_is_the_home_folder_for_encoders(home):
    assert ViewConfig("title", "title", "~/bert").encoder == str(home / "bert")
    assert ViewConfig("title", "title", "google/bert").encoder == "google/bert"
    message = refused("extract", "d", "--cache", "c", "--view", "source=title encoder=~/bert")
    assert "d: no such folder" in message


def test_a_home_that_is_not_there_is_an_error(home):
    for path in ("~nobody-of-this-name/x", Path("~nobody-of-this-name")):
        with pytest.raises(InputError, match="there is no home folder for ~nobody-of-this-name; write ./~nobody"):
            expanded_path(path)
    assert "there is no home folder" in refused("stats", "~nobody-of-this-name/d")
    assert expanded_path("./~x") == Path("~x") and expanded_path("a~b") == Path("a~b")


def test_a_path_with_a_zero_byte_is_an_error():
    with pytest.raises(InputError, match="out: expected a path, found 'a.x00b', which holds a zero byte"):
        as_path("out", "a\0b")


def irregular(kind: str, path: Path) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    return path


@pytest.mark.parametrize("kind", ["FIFO", "device", "link"])
def test_what_is_no_file_is_named_by_whoever_would_read_it(toy_run, tmp_path, kind):
    covers, frames, texts = tmp_path / "images", tmp_path / "frames" / "i1", tmp_path / "d"
    for folder in (covers, frames.parent, frames, texts):
        folder.mkdir()
    (texts / "items.tsv").write_text("i1\tone\n")
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\nu1\ti1\n")
    (tmp_path / "x.csv").write_text("user,item,timestamp\nu1,i1,1\n")
    for file in (covers / "i1.png", frames / "1.jpg", texts / "captions.tsv", tmp_path / "x.item", tmp_path / "lock"):
        irregular(kind, file)
    with pytest.raises(InputError, match=f"captions.tsv: expected .*{kind}"):
        read_items(texts)
    with pytest.raises((InputError, OSError), match="i1.png: expected|i1.png'"):
        ImageFolder(covers).content("i1")
    with pytest.raises(InputError, match=f"1.jpg: expected .*{kind}"):
        Frames(frames.parent, 1).read("i1")
    with pytest.raises(InputError, match=f"lock: expected .*{'FIFO' if kind == 'FIFO' else 'link'}"):
        locked(tmp_path / "lock", "busy").__enter__()
    assert "x.item: expected " in refused("import", "recbole", tmp_path / "x.inter", tmp_path / "o")
    copying = ("--covers", covers, "--copy-covers")
    assert "i1.png" in refused("import", "csv", tmp_path / "x.csv", tmp_path / "o", *copying)
    assert not (tmp_path / "o").exists()


def test_a_link_that_leads_nowhere_is_named(toy_run, tmp_path):
    (tmp_path / "items.tsv").write_text("i1\tone\n")
    (tmp_path / "captions.tsv").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"captions.tsv: a link to nowhere, which is not there"):
        read_items(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "i1.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"i1.png: cannot be read \(No such file"):
        ImageFolder(tmp_path / "images").content("i1")


@pytest.mark.parametrize("target", ["loop", "nowhere"])
def test_a_folder_behind_a_link_that_leads_to_none_is_refused(toy_run, tmp_path, target):
    dataset, cache = toy_run
    link = tmp_path / "loop"
    link.symlink_to(target)
    settings = ("--cache", cache, *FAST)
    said = [
        refused("train", link, *settings),
        refused("train", dataset, *settings, "--cache", link),
        refused("train", dataset, *settings, "--out", link),
    ]
    assert all("loop: " in message or "nowhere: " in message for message in said)
    assert all("leads to" in message for message in said) or target == "nowhere"
    with pytest.raises(InputError, match="a link that leads to none"):
        Store(link, writable=True)


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link"])
def test_a_file_is_never_put_in_place_of_something_else(tmp_path, kind):
    path = irregular(kind, tmp_path / "out")
    before = path.lstat()
    with pytest.raises(InputError, match=f"^{path}: expected .* {kind}"):
        write_atomically(path, b"x")
    after = path.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["FIFO", "device", "link"])
@pytest.mark.parametrize("command", [("bench", "evaluate"), ("bench", "train")])
def test_out_refuses_what_is_no_file_before_any_work(tmp_path, kind, command):
    path = irregular(kind, tmp_path / "out")
    assert f"{path}: expected " in refused(*command, tmp_path, "--out", path)


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, whole):
    path = tmp_path / "out"
    for number, where in ((28, None), (122, None), (27, "inside")):
        with pytest.raises(OSError) as raised, whole(path) as temporary:
            raise OSError(number, "no room", None if where is None else str(temporary / where))
        assert raised.value.filename == str(path)
        assert list(tmp_path.iterdir()) == []
    of_rust = ValueError("File out of specification: No space left (os error 28)")  # as polars reports it
    for error in (
        OSError("No space left (os error 28)"),
        of_rust,
        OSError(28, "no room", "source", None, str(temporary / "x")),
    ):
        with pytest.raises(OSError) as raised, whole(path):
            raise error
        assert (raised.value.filename, raised.value.errno) == (str(path), 28)


def test_folders_may_have_any_name(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.chdir(tmp_path)
    folder = "-run/new\nline/esc\x1b[31m/ü漢/ "
    shutil.copytree(dataset, tmp_path / folder)
    result = iisan_fast("stats", "--", folder)
    assert result.returncode == 0 and "\x1b" not in result.stdout
    assert iisan_fast("stats", "--json", "--", folder).returncode == 0
    run = Path("r") / folder
    result = iisan_fast("train", "--cache", cache, "--out", run, *FAST, "--", folder)
    assert (result.returncode, "\x1b" in result.stdout + result.stderr) == (0, False), result.stderr
    assert iisan_fast("evaluate", run).returncode == 0


def test_a_path_that_is_no_utf_8_is_refused_before_any_work(toy_run, tmp_path):
    dataset, cache = toy_run
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    shutil.copytree(dataset, folder)
    assert iisan_fast("stats", folder).returncode == 0
    for arguments in (("train", folder, "--cache", cache), ("train", dataset, "--cache", cache, "--out", folder / "r")):
        message = refused(*arguments, *FAST)
        assert "expected a path in UTF-8, found" in message and r"\udcff\udcfe" in message
