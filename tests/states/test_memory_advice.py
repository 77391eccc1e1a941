"""Check that a cache's file is read ahead while most of it is read, and page by page otherwise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.states import store as stores
from iisan_fast.states.feature_table import load_table
from iisan_fast.states.state_reader import JoinedStates
from iisan_fast.states.store import Store

IDS = [f"i{i}" for i in range(1, 12)]
CPU = torch.device("cpu")
RANDOM = "rr"  # of VmFlags: read page by page

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told")


@pytest.fixture
def cache(tmp_path) -> Path:
    return fill_store(tmp_path / "cache", IDS, random_table([(2, 4)], len(IDS), torch.float32), ("a",))


@pytest.fixture
def seen(cache, monkeypatch) -> list[bool]:
    """Return a list that takes, for each entry that a store looks up, whether its file is read page by page."""
    looked_up: list[bool] = []
    key_of = stores.entry_key

    def entry_key(view: str, item_id: str) -> bytes:
        looked_up.append(RANDOM in flags(cache))
        return key_of(view, item_id)

    monkeypatch.setattr(stores, "entry_key", entry_key)
    return looked_up


def flags(cache: Path) -> list[str]:
    """Return the flags of the memory map of a cache's file."""
    inode = str((cache / "states.lmdb" / "data.mdb").stat().st_ino)
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (of_file,) = [text for text in maps if text and text.split(maxsplit=5)[4] == inode]
    return re.search(r"VmFlags: (.*)", of_file)[1].split()


def test_single_entries_are_read_page_by_page(cache, seen):
    with Store(cache) as store:
        store.read("a", IDS[:2], torch.empty(2, 2, 4))
    assert seen == [True, True]


@pytest.mark.parametrize("joined", [False, True])
def test_whole_catalogues_are_read_ahead(cache, seen, joined):
    store = Store(cache)
    reader = JoinedStates(store, {}) if joined else store
    reader.check("a", IDS)
    assert seen == [False] * len(IDS) and RANDOM in flags(cache)
    seen.clear()
    reader.contents("a", IDS)
    assert seen == [False] * len(IDS) and RANDOM in flags(cache)
    seen.clear()
    load_table(reader, ["a"], IDS, CPU, "device")
    assert seen == [False] * len(IDS)


def test_a_mapped_table_reads_its_rows_page_by_page(cache, seen):
    table = load_table(cache, ["a"], IDS, CPU, "mapped")
    seen.clear()
    table.gather(torch.tensor([3, 1]))
    assert seen == [True, True]
    table.close()
