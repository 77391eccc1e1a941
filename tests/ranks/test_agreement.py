"""Ranks with other code, data or settings, and more ranks than rows: one line, on all ranks."""

from __future__ import annotations

import socket

import pytest

from helpers.rank_calls import disagreements, errors_of_other_work
from helpers.rank_processes import run_on_ranks
from iisan_fast.ranks import ALONE, refuse_disagreement
from iisan_fast.ranks.agreement import code_digest

DIGEST = "0123456789abcdef" * 4
SETTINGS = {"dataset": DIGEST, "train": {"seed": 1, "learning_rates": {"side": 1e-3}}}
REMEDY = "start all ranks with the same code, data and settings"


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([SETTINGS] * 3, ""),
        (
            [SETTINGS, SETTINGS, {**SETTINGS, "train": {"seed": 2}}],
            "train.seed is 2 there, 1 here, train.learning_rates.side is missing there, 0.001 here",
        ),
        (
            [SETTINGS, {**SETTINGS, "dataset": "f" * 64}, {}],
            'dataset is "ffffffffffffffff... there, "0123456789abcdef... here',
        ),
        ([{}, {"cache": True}, {}], "cache is true there, missing here"),
    ],
)
def test_the_first_rank_that_differs_is_named_on_all(values, what):
    first = next((rank for rank in range(3) if values[rank] != values[0]), None)
    message = f"rank {first} on {socket.gethostname()} differs from rank 0: {what}; {REMEDY}" if what else ""
    for report in run_on_ranks(3, disagreements, values):
        assert report["values"] == message
        assert report["3"] == ""
        assert report["2"] == "items: expected at least one for each of 3 ranks, found 2; start fewer"


def test_ranks_that_do_other_work_are_refused(tmp_path):
    differences = [
        ("evaluate", "train"),
        ("train, dry run", "train"),
        ("train, demo", "train"),
        ("resume, changed", "resume"),
        ("resume", "extract"),
    ]
    messages = [
        f'rank 1 on {socket.gethostname()} differs from rank 0: work is "{there}" there, "{here}" here; {REMEDY}'
        for there, here in differences
    ]
    assert run_on_ranks(2, errors_of_other_work, tmp_path) == [messages, messages]


def test_one_process_agrees_with_itself():
    refuse_disagreement(ALONE, {"anything": object()})


def test_the_digest_of_the_code_follows_its_files(monkeypatch, tmp_path):
    from iisan_fast.ranks import agreement

    (tmp_path / "kernels").mkdir()
    (tmp_path / "iisan_fast" / "ranks").mkdir(parents=True)
    source = tmp_path / "iisan_fast" / "a.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "iisan_fast" / "ranks" / "agreement.py"))
    digests = []
    for name, text in (("a.py", "a = 1\n"), ("a.py", "a = 2\n"), ("b.cpp", ""), ("b.txt", "not code")):
        (tmp_path / "iisan_fast" / name).write_text(text)
        code_digest.cache_clear()
        digests.append(code_digest())
    code_digest.cache_clear()
    assert len(set(digests)) == 3 and digests[2] == digests[3]
