"""Messages of errors: their length is bounded, whatever stands in the data that they quote."""

from __future__ import annotations

import pytest

from iisan_fast.errors import LONGEST_MESSAGE, InputError


@pytest.mark.parametrize("length", [0, 1, LONGEST_MESSAGE])
def test_a_message_stays_as_it_is(length):
    assert str(InputError("x" * length)) == "x" * length


def test_the_middle_of_a_long_message_is_left_out():
    message = str(InputError(f"items.tsv line 3: item {'y' * 5_000_000!r} is unknown; remove it"))
    assert len(message) < LONGEST_MESSAGE + 50
    assert message.startswith("items.tsv line 3: item 'yyy") and message.endswith("yyy' is unknown; remove it")
    left_out = int(message.split(" … ")[1].removesuffix(" characters").replace(",", ""))
    assert left_out + LONGEST_MESSAGE == 5_000_000 + len("items.tsv line 3: item '' is unknown; remove it")
