"""Small sources of imports, written by hand; their imports need polars."""

from __future__ import annotations

from pathlib import Path

import pytest

from iisan_fast.data.imports.flat import import_files
from iisan_fast.data.imports.options import TableOptions
from iisan_fast.errors import InputError

UNORDERED = (
    "u2,b,30\nu1,a,20\nu2,a,10\nu1,c,10\nu1,b,20\nu2,a,10\n"  # some timestamps are equal, and one row stands twice
)
USERS = "u2\ta a b\nu1\tc a b\n"
TIMES = "u2\t10 10 30\nu1\t10 20 20\n"
HEADER = "user,item,timestamp\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def microlens(root: Path, pairs: str | bytes = UNORDERED, titles: str | None = "a,A\nb,B\nc,C\n") -> Path:
    root.mkdir()
    write(root / "MicroLens-50k_pairs.csv", pairs)
    if titles is not None:
        write(root / "MicroLens-50k_title_en.csv", titles)
    return root


def table(folder: Path) -> dict[str, str]:
    """Return {first field: the rest} of the lines of items.tsv."""
    return dict(line.split("\t") for line in (folder / "items.tsv").read_text().splitlines())


def imported_csv(tmp_path: Path, content: str | bytes, **options) -> Path:
    import_files(write(tmp_path / "in.csv", content), tmp_path / "out", TableOptions(**options))
    return tmp_path / "out"


def refused(action, tmp_path: Path, *words: str) -> None:
    """Check that the action raises one line with all these words, and leaves nothing new in tmp_path."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(tmp_path.iterdir()) == before
