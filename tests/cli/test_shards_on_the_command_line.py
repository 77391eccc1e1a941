"""Check `extract --shard` and `extract --merge`: what they print, and what they refuse in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import iisan_fast as package
from helpers.command_line import iisan_fast, refused
from helpers.datasets import histories_at_random, write_catalogue
from helpers.extractions import entries
from helpers.stores import fill_shards
from helpers.tables import random_table
from iisan_fast.config import ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.states.manifest import read_manifest
from iisan_fast.states.store import Store

IDS = [f"i{number}" for number in range(1, 9)]
SECONDS = 240


@pytest.fixture
def shards(tmp_path) -> Path:
    """Return a cache in two shards."""
    return fill_shards(tmp_path / "c", IDS, random_table([(2, 4)], len(IDS)), ("title",), 2)


def test_shards_are_merged_and_counted(shards):
    result = iisan_fast("extract", "--cache", shards, "--merge", "--json", "-q")
    assert result.returncode == 0 and not result.stderr
    assert json.loads(result.stdout) == {
        "cache": str(shards),
        "shards": 2,
        "entries": len(IDS),
        "entry_bytes": len(IDS) * (16 + 2 * 4 * 4 + 8),
    }
    assert len(entries(shards)) == len(IDS)
    assert f"{shards}: the cache has no shards" in refused("extract", "--cache", shards, "--merge")


def test_a_merge_prints_a_table(shards):
    result = iisan_fast("extract", "--cache", shards, "--merge")
    words = result.stdout.replace("│", " ").split()
    assert words[words.index("shards") + 1] == "2" and words[words.index("entries") + 1] == "8"


def test_what_merge_and_shard_cannot_do_is_one_line(shards, tmp_path):
    merge = ("extract", "--cache", shards, "--merge")
    assert "--merge: expected --cache" in refused("extract", "--merge")
    beside = refused(*merge, tmp_path, "--shard", "1/2")
    assert "--merge: merges the shards of --cache; leave out --shard, DATASET" in beside
    assert "not a cache of hidden states" in refused("extract", "--cache", tmp_path / "none", "--merge")
    text = ("extract", tmp_path, "--cache", shards, "--text-encoder", "x", "--shard")
    for shard in ("0/2", "3/2", "2", "a/b"):
        expected = f"shard: expected K/N, with K from 1 to N and N at most 1000, as 2/4; found '{shard}'"
        assert expected in refused(*text, shard)
    with pytest.raises(InputError, match="shard: expected text as K/N, found 2"):
        package.extract(tmp_path, shards, text_encoder="x", shard=2)


@pytest.fixture(scope="module")
def title(encoder_views) -> ViewConfig:
    """Return the settings of the text encoder."""
    return next(view for view in encoder_views if view.source == "title")


def test_a_shard_is_filled_alone(catalogue, title, tmp_path):
    cache = ("--cache", tmp_path / "c")
    command = ("extract", catalogue, *cache, "--text-encoder", title.encoder, "--json")
    second = json.loads(iisan_fast(*command, "--shard", "2/2").stdout)[0]
    assert "shard 1 of 2 is missing; iisan-fast extract" in refused("train", catalogue, *cache)
    planned = json.loads(iisan_fast(*command, "--shard", "1/2", "--dry-run").stdout)[0]
    first = json.loads(iisan_fast(*command, "--shard", "1/2").stdout)[0]
    whole = json.loads(iisan_fast(*command).stdout)[0]
    assert first == {**planned, "blank": 0}
    assert (whole["items"], whole["encoded"]) == (first["items"] + second["items"], 0)
    assert all(count["items"] == count["encoded"] > 0 for count in (first, second))


def by_torchrun(ranks: int, *words: object) -> list[str]:
    """Return the words of a command line that runs a command on ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "iisan_fast", *map(str, words)]


@pytest.mark.long
def test_torchrun_fills_shards(catalogue, title, tmp_path):
    encoder = ("--text-encoder", title.encoder, "--json")
    counts = []
    for _ in range(2):
        command = by_torchrun(3, "extract", catalogue, "--cache", tmp_path / "c", *encoder)
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert result.returncode == 0, result.stderr
        counts.append(json.loads(result.stdout))  # rank 0 alone prints
    item_ids = package.load_dataset(catalogue).sequences.item_ids
    iisan_fast("extract", catalogue, "--cache", tmp_path / "one", *encoder)
    with Store(tmp_path / "c") as store, Store(tmp_path / "one") as whole:
        (view,) = store.views
        assert [count["encoded"] for (count,) in counts] == [len(item_ids), 0]
        assert store.contents(view, item_ids) == whole.contents(view, item_ids)
        shape = len(store.view(view)["layers"]), store.view(view)["width"]
        states = [torch.empty(len(item_ids), *shape, dtype=torch.bfloat16) for _ in range(2)]
        for reader, into in zip((store, whole), states):
            reader.read(view, item_ids, into)
    # Batches of other items: the last bits of a state may differ.
    torch.testing.assert_close(*states, rtol=2**-7, atol=1e-3)


@pytest.mark.long
def test_a_killed_rank_ends_the_job_and_its_shard_is_finished_alone(tmp_path, encoder_views):
    image = next(view for view in encoder_views if view.source == "image")
    root = write_catalogue(tmp_path / "d", histories_at_random(300, 1500), 1500)
    cache = tmp_path / "c"
    command = ("extract", root, "--cache", cache, "--image-encoder", image.encoder, "--batch-size", "1", "--json")
    with subprocess.Popen(by_torchrun(2, *command), stderr=subprocess.PIPE, text=True) as job:
        second = cache / "shards" / "2-of-2"
        end = time.monotonic() + SECONDS
        while not (second / "states.lmdb").exists() and time.monotonic() < end:
            time.sleep(0.1)
        killed = time.monotonic()
        os.kill(ranks_of(job.pid)[-1], signal.SIGKILL)
        _, errors = job.communicate(timeout=SECONDS)
        assert job.returncode != 0 and time.monotonic() - killed < 60
        assert errors.count("error: rank 1 on") == 1 and "is lost" in errors
    assert read_manifest(second)["unfinished"] is True
    assert "is unfinished; iisan-fast extract" in refused("extract", "--cache", cache, "--merge")
    for shard in ("1/2", "2/2"):
        assert iisan_fast(*command, "--shard", shard).returncode == 0
    assert iisan_fast("extract", "--cache", cache, "--merge").returncode == 0
    assert json.loads(iisan_fast(*command).stdout)[0]["encoded"] == 0


def ranks_of(launcher: int) -> list[int]:
    """Return the process numbers of the ranks that a launcher has started, in the order of the ranks."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
            number = next((value[5:] for value in variables if value.startswith(b"RANK=")), None)
            if parent == launcher and number is not None:
                ranks[int(number)] = int(folder.name)
    return [ranks[rank] for rank in sorted(ranks)]
