"""Read the pickles of the image LMDBs of IISAN and of MicroLens without calling anything that they name.

Plain values and `__main__.LMDB_Image` objects are admitted, in pickle protocols 3 to 5, which the projects write. Every
other pickle is refused before any of it runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

# No opcode here calls anything: NEWOBJ makes an empty object, and BUILD sets its state as StoredImage allows.
ADMITTED_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "APPEND", "APPENDS", "SETITEMS",
))  # fmt: skip
# Each of these may stand once, as an image or a list of keys needs it. So values do not nest deep, and no value that
# repeats another many times can be made: hashing or freeing it could exhaust the stack, the memory or the time.
ADMITTED_ONCE = frozenset((
    "EMPTY_TUPLE", "TUPLE2", "EMPTY_LIST", "EMPTY_DICT", "SETITEM", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD",
))  # fmt: skip


class StoredImage:
    """The projects' LMDB_Image as data: attributes of checked types, no behaviour.

    IISAN's has all four attributes. MicroLens' has `image` alone, of floats.
    """

    FORMS = ({"channels": int, "size": tuple, "image": bytes, "id": str}, {"image": bytes})

    image: bytes
    channels: int | None = None
    size: tuple[int, int] | None = None  # height, width
    id: str | None = None

    def __setstate__(self, state: Any) -> None:
        """Take the attributes. Raises UnpicklingError if one is missing, unknown or of another type."""
        types = {name: type(value) for name, value in state.items()} if type(state) is dict else type(state)
        if types not in self.FORMS or [type(length) for length in state.get("size", (0, 0))] != [int, int]:
            raise pickle.UnpicklingError("its attributes are not channels, size, image and id of the right types")
        vars(self).update(state)


def unpickle(value: bytes) -> Any:
    """Return what a pickle holds: plain values and `StoredImage`s. Raises UnpicklingError for anything else."""
    try:
        _check_opcodes(value)
        return _Unpickler(io.BytesIO(value)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes lead pickle into nearly any exception
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


def _check_opcodes(value: bytes) -> None:
    """Raise UnpicklingError for a pickle with other opcodes than admitted. Nothing in it is made for that.

    Raises ValueError, as pickletools does, for bytes that are no pickle.
    """
    used = set()
    memoized = 0
    for opcode, argument, _ in pickletools.genops(value):
        name = opcode.name
        if name in ADMITTED_ONCE and name not in used:
            used.add(name)
        elif name not in ADMITTED_OPCODES:
            raise pickle.UnpicklingError(f"it uses {name}{' twice' if name in used else ''}")
        # The memo is allocated up to its highest slot. A pickle that Python wrote fills the slots in order.
        if name == "LONG_BINPUT" and argument > memoized:
            raise pickle.UnpicklingError(f"its memo slot {argument} is absurd")
        memoized += name in ("MEMOIZE", "BINPUT", "LONG_BINPUT")


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows one class, StoredImage, under the name that the projects gave it."""

    def find_class(self, module: str, name: str) -> type:
        """Return StoredImage. Raises UnpicklingError for any other name."""
        if (module, name) != ("__main__", "LMDB_Image"):
            raise pickle.UnpicklingError(f"it names {module!r} {name!r}")
        return StoredImage
