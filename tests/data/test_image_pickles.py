"""The unpickler of the released image LMDB: reads what the project wrote, runs nothing of what an attacker wrote."""

from __future__ import annotations

import builtins
import copyreg
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.data.images.image_pickles import StoredImage, unpickle

FIELDS = {"channels": 3, "size": (1, 2), "image": b"abcdef", "id": "x"}
PROTOCOLS = (2, 3, 4, 5)


class Call:
    """Pickles into a call of function(*arguments)."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> type:
    """Define the released project's class, as its script does in __main__."""
    released_class = type("LMDB_Image", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "LMDB_Image", released_class, raising=False)
    return released_class


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """Return the path of a file that exists once a pickle was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def make(released_class: type, **changes: Any) -> Any:
    image = released_class()
    vars(image).update(FIELDS | changes)
    return image


@pytest.mark.parametrize("protocol", (3, 4, 5))
def test_what_the_project_writes_is_read(released: type, protocol: int) -> None:
    stored = unpickle(pickle.dumps(make(released, image=bytes(6)), protocol))
    assert type(stored) is StoredImage
    assert vars(stored) == FIELDS | {"image": bytes(6)}
    keys = [f"{i}".encode() for i in range(3000)]
    assert unpickle(pickle.dumps(keys, protocol)) == keys
    assert unpickle(pickle.dumps(70_000, protocol)) == 70_000


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["root", "list", "image", "id", "size", "extra"])
@pytest.mark.parametrize("function", ["system", "eval", "open"])
def test_a_call_is_never_executed(released: type, trap: Path, protocol: int, where: str, function: str) -> None:
    call = {
        "system": Call(os.system, f"touch {trap}"),
        "eval": Call(builtins.eval, f"open({str(trap)!r}, 'w')"),
        "open": Call(builtins.open, str(trap), "w"),
    }[function]
    payload = {"root": call, "list": [b"a", call]}.get(where)
    if payload is None:
        payload = make(released, **{where: (call, 1) if where == "size" else call})
    with pytest.raises(pickle.UnpicklingError):
        unpickle(pickle.dumps(payload, protocol))


def test_the_payloads_would_execute_in_an_ordinary_unpickler(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {executed}")))
    assert executed.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_admitted_class_is_not_called(released: type, protocol: int) -> None:
    for payload in (Call(released), Call(released, "argument"), Call(getattr, released, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="it uses (REDUCE|TUPLE1|GLOBAL twice|STACK_GLOBAL twice)"):
            unpickle(pickle.dumps(payload, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_persistent_ids_are_refused(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "pickle"

    class Persistent(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return "x" if value == "by reference" else None

    with path.open("wb") as file:
        Persistent(file, protocol).dump(["by reference"])
    with pytest.raises(pickle.UnpicklingError, match="BINPERSID"):
        unpickle(path.read_bytes())


def test_extension_codes_are_refused_even_when_cached(trap: Path) -> None:
    copyreg.add_extension("posix", "system", 240)
    try:
        payload = b"\x80\x02\x82\xf0" + b"U" + bytes([len(f"touch {trap}")]) + f"touch {trap}".encode() + b"\x85R."
        pickle.loads(b"\x80\x02\x82\xf0.")  # fills the cache that skips find_class
        with pytest.raises(pickle.UnpicklingError, match="EXT1"):
            unpickle(payload)
    finally:
        copyreg.remove_extension("posix", "system", 240)


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0: GLOBAL, STRING, REDUCE
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL of another name
        b"\x80\x04\x8c\x08__main__\x8c\x13LMDB_Image.__init__\x93.",  # an attribute of the admitted one
        b"\x80\x04\x8c\x0aLMDB_Image\x8c\x08__main__\x93.",  # module and name exchanged
        b"\x80\x02c__main__\nLMDB_Image\n)}\x92.",  # NEWOBJ_EX
        b"\x80\x02c__main__\nLMDB_Image\nN}X\x01\x00\x00\x00aK\x01s\x86b.",  # BUILD on the class, to change it
        b"\x80\x02c__main__\nLMDB_Image\n}X\x08\x00\x00\x00channelsK\x01sb.",  # the same with a plain state
        b"\x80\x02c__main__\nLMDB_Image\n)\x81}b.",  # an object with an empty state
        b"\x80\x02c__main__\nLMDB_Image\nK\x01\x85\x81.",  # an object with arguments
        b"\x80\x04K\x01r\xff\xff\xff\x7f.",  # a memo slot that would allocate 16 GiB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",  # bytes longer than memory
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",  # a frame longer than the pickle
        b"\x80\x63K\x01.",  # protocol 99
        b"\x80\x04}K\x01" + b"\x85" * 1_000_000 + b"K\x01s.",  # a tuple a million deep as a key
        b"\x80\x04" + b"K\x01" * 10_001 + b"\x86" * 10_000 + b".",  # the same of pairs, freed at once
        b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",  # lists a million deep
        b"\x80\x04" + b"}" * 100 + b"K\x01" * 100 + b"u." * 100,
        b"\x80\x04K\x01K\x02\x86\x94" + b"h\x00h\x00\x86\x94" * 60 + b".",  # pairs of pairs: 2^60 numbers
        b"\x80\x04(" + b"K\x01" * 1000 + b"t\x94}(" + b"h\x00" * 1000 + b"tK\x01s.",  # a tuple of 1000 tuples as a key
        b"\x80\x04K\x01r\x02\x00\x00\x00.",  # a memo slot beyond those in order
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00x.",  # text longer than memory
        b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",  # a number of 255 bytes
        b"\x80\x04",  # nothing
        b"\x80\x04.",  # an empty stack
        b"\x80\x04}]K\x01s.",  # a list as a dictionary's key
        b"",
        b"an image, perhaps",
    ],
)
def test_crafted_pickles_are_refused_and_leave_no_trace(payload: bytes) -> None:
    before = dict(vars(StoredImage))
    with pytest.raises(pickle.UnpicklingError):
        unpickle(payload)
    assert dict(vars(StoredImage)) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": True},
        {"channels": 3.0},
        {"size": [1, 2]},
        {"size": (1,)},
        {"size": (1, "2")},
        {"size": (1, 2, 3)},
        {"image": "abcdef"},
        {"image": None},
        {"id": 7},
        {"more": 1},
    ],
)
def test_attributes_of_the_wrong_type_are_refused(released: type, changes: dict[str, Any]) -> None:
    with pytest.raises(pickle.UnpicklingError):
        unpickle(pickle.dumps(make(released, **changes), 4))


def test_a_missing_attribute_is_refused(released: type) -> None:
    image = make(released)
    del image.id
    with pytest.raises(pickle.UnpicklingError, match="attributes"):
        unpickle(pickle.dumps(image))


def test_hostile_pickles_in_a_process_that_they_could_end() -> None:
    """Deep values end a process by its stack only as they are hashed or freed, so the end of the process counts too."""
    script = """
import pickle
from iisan_fast.data.images.image_pickles import unpickle
for value in (b"}K\\x01" + b"\\x85" * 10**6 + b"K\\x01s.", b"]" * 10**6 + b"a" * (10**6 - 1) + b"."):
    try:
        unpickle(b"\\x80\\x04" + value)
    except pickle.UnpicklingError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["it uses TUPLE1", "it uses EMPTY_LIST twice"]


@given(st.binary(max_size=60))
def test_arbitrary_bytes_give_plain_values_or_an_error(value: bytes) -> None:
    try:
        loaded = unpickle(b"\x80\x04" + value)
    except pickle.UnpicklingError:
        return
    assert type(loaded) in (int, str, bytes, tuple, list, dict, StoredImage, type)


@given(st.data())
def test_a_damaged_image_pickle_never_escapes(data: st.DataObject) -> None:
    value = bytearray(
        b"\x80\x04\x8c\x08__main__\x94\x8c\nLMDB_Image\x94\x93\x94)\x81\x94}\x94(\x8c\x08channels\x94K\x03"
        b"\x8c\x04size\x94K\x01K\x02\x86\x94\x8c\x05image\x94C\x06abcdef\x94\x8c\x02id\x94\x8c\x01x\x94ub."
    )
    assert vars(unpickle(bytes(value))) == FIELDS
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = unpickle(bytes(value))
    except pickle.UnpicklingError:
        return
    assert type(loaded) in (int, str, bytes, tuple, list, dict, StoredImage, type)
