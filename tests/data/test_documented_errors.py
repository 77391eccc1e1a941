"""The errors that docs/datasets.md quotes are those that the mistakes give."""

from __future__ import annotations

from pathlib import Path

import pytest

from iisan_fast.config import ProtocolConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
WHOLE = {
    "items.tsv": "B0001\tSteel ruler\nB0002\tGloves\n",
    "users.tsv": "u1\tB0001 B0002 B0001 B0002 B0001\n",
    "times.tsv": "u1\t1 2 3 4 5\n",
}
SPLITS = {"times.tsv": "temporal", "splits.tsv": "given"}  # that reads a file
MISTAKES = {  # a file and its wrong content
    "no tab": ("items.tsv", "B0001\tSteel ruler\nB0002\n"),
    "twice": ("items.tsv", "B0001\tSteel ruler\nB0001\tGloves\n"),
    "control character": ("items.tsv", "B\x1b1\tSteel ruler\n"),
    "space": ("items.tsv", "B 1\tSteel ruler\n"),
    "Latin-1": ("items.tsv", "B0001\tÅngström\n"),
    "unknown item": ("users.tsv", "u1\tB0001 B9 B0001 B0001 B0001\n"),
    "two spaces": ("users.tsv", "u1\tB0001  B0002 B0001 B0002 B0001\n"),
    "short": ("users.tsv", "u1\tB0001 B0002 B0001 B0002\n"),
    "caption": ("captions.tsv", "B9\tA ruler.\n"),
    "times": ("times.tsv", "u1\t1 2 3 4\n"),
    "splits": ("splits.tsv", "u1\t2 1 1\n"),
}


def test_the_page_lists_as_many_errors_as_are_tried():
    quoted = [line for line in PAGE.partition("## Errors")[2].partition("## ")[0].splitlines() if line.count("|") == 3]
    assert len(quoted) - 2 == len(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_quoted_error_is_the_one_that_is_raised(tmp_path, mistake):
    file, content = MISTAKES[mistake]
    for name, text in {**WHOLE, file: content}.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        load_dataset(tmp_path, ProtocolConfig(split=SPLITS.get(file, "leave-one-out")))
    assert f"| `{str(error.value).removeprefix(f'{tmp_path}/')}` |" in PAGE
