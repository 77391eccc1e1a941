"""Check what `iisan-fast verify` prints for a cache, sound, old and damaged, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lmdb
import pytest

from helpers.command_line import iisan_fast, refused
from helpers.extractions import entries
from helpers.stores import fill_store
from helpers.tables import random_table

FORMAT_1 = Path(__file__).parents[1] / "format_1" / "cache"


@pytest.fixture
def cache(tmp_path) -> Path:
    """Fill a cache with a view of three items."""
    return fill_store(tmp_path / "cache", ["i1", "i2", "i3"], random_table([(2, 4)], 3), ("title",))


def damage(cache: Path) -> None:
    """Overwrite the last byte of the second entry."""
    value = entries(cache)[b"title\0i2"]
    with lmdb.open(str(cache / "states.lmdb"), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.put(b"title\0i2", value[:-1] + bytes([value[-1] ^ 1]))


def counts(stdout: str) -> dict[str, str]:
    """Return the printed table."""
    rows = [line.strip("│ ").split("│") for line in stdout.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


def test_a_sound_cache_is_counted(cache):
    result = iisan_fast("verify", cache)
    assert (result.returncode, result.stderr) == (0, "")
    assert counts(result.stdout) == {"checked": "4", "damaged": "0"}


def test_each_damaged_entry_has_a_line_and_the_exit_code_is_2(cache):
    damage(cache)
    result = iisan_fast("verify", cache, "--quiet")
    assert result.returncode == 2 and counts(result.stdout) == {"checked": "4", "damaged": "1"}
    assert result.stderr == (
        "damaged: states.lmdb: view 'title', item 'i2': the checksum of its states does not fit; "
        "iisan-fast extract encodes it again\n"
    )


def test_json_holds_the_counts_and_the_damage(cache):
    damage(cache)
    result = iisan_fast("verify", cache, "--json")
    values = json.loads(result.stdout)
    (found,) = values.pop("damage")
    assert values == {"path": str(cache), "kind": "cache", "checked": 4, "added": 0, "unchecked": 0}
    assert result.returncode == 2 and found["where"] == "states.lmdb: view 'title', item 'i2'"


def test_checksums_are_added_unless_it_only_checks(tmp_path):
    old = Path(shutil.copytree(FORMAT_1, tmp_path / "old"))
    before = entries(old)
    count = f"{len(before)}"
    assert counts(iisan_fast("verify", old, "--check-only").stdout) == {
        "checked": "1",
        "without checksum": count,
        "damaged": "0",
    }
    assert entries(old) == before
    assert counts(iisan_fast("verify", old).stdout) == {"checked": "1", "checksums added": count, "damaged": "0"}
    assert counts(iisan_fast("verify", old).stdout) == {"checked": f"{1 + len(before)}", "damaged": "0"}


def test_a_folder_of_neither_kind_is_one_line(tmp_path, cache):
    assert "expected a cache (manifest.json) or a run (config.json), found neither" in refused("verify", tmp_path)
    assert "found neither" in refused("verify", tmp_path / "missing")
    (cache / "states.lmdb" / "data.mdb").write_bytes(b"damaged")
    assert "not an LMDB" in refused("verify", cache)
