"""The pickles of the released research project's image LMDB, read without ever calling what a pickle names.

Admitted are plain values and `__main__.LMDB_Image` objects, written by protocols 3 to 5 (what the project's own
writer uses); every other pickle is refused before any of it runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

# No opcode here calls anything: objects are made bare (NEWOBJ) and take their state (BUILD) as StoredImage allows.
ADMITTED_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD",
))  # fmt: skip


class StoredImage:
    """Stands in for the project's LMDB_Image: four attributes of checked types, nothing that could act."""

    TYPES = {"channels": int, "size": tuple, "image": bytes, "id": str}

    channels: int
    size: tuple[int, int]  # height, width
    image: bytes
    id: str

    def __setstate__(self, state: Any) -> None:
        types = {name: type(value) for name, value in state.items()} if type(state) is dict else type(state)
        if types != self.TYPES or [type(length) for length in state["size"]] != [int, int]:
            raise pickle.UnpicklingError("its attributes are not channels, size, image and id of the right types")
        vars(self).update(state)


def unpickle(value: bytes) -> Any:
    """The plain values and `StoredImage`s of a pickle. Raises UnpicklingError for anything else."""
    try:
        for opcode, argument, _ in pickletools.genops(value):
            if opcode.name not in ADMITTED_OPCODES:
                raise pickle.UnpicklingError(f"it uses {opcode.name}")
            # The memo is allocated up to its highest slot, and an honest pickle fills the slots in order.
            if opcode.name == "LONG_BINPUT" and argument > len(value):
                raise pickle.UnpicklingError(f"its memo slot {argument} is absurd")
        return _Unpickler(io.BytesIO(value)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes lead pickle into nearly any exception
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("__main__", "LMDB_Image"):
            raise pickle.UnpicklingError(f"it names {module!r} {name!r}")
        return StoredImage
