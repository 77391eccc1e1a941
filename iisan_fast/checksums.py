"""Compute checksums, by which changed bytes in files are found: XXH3 of 64 bits.

They are made for speed and find damage by chance. They are no protection against a change on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64, xxh3_64_digest, xxh3_64_intdigest

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_BYTES = 8
BYTES_AT_ONCE = 16 << 20  # of a file, in memory
# The two halves of `checksum`, for a loop in which its call would take a tenth of the time: the seed that stands for a
# name, and the checksum of a content under a seed.
name_seed = xxh3_64_intdigest
seeded_checksum = xxh3_64_digest


def checksum(content: bytes | bytearray | memoryview, name: bytes = b"") -> bytes:
    """Return the checksum, 8 bytes, of a content under its name.

    name: it counts as well, so that contents that have changed places are found.
    """
    return seeded_checksum(content, name_seed(name))


def file_checksum(path: Path, name: bytes = b"") -> bytes:
    """Return the checksum of a file's content under a name, as `checksum` does, without the whole file in memory.

    Raises OSError if it cannot be read.
    """
    state = xxh3_64(seed=name_seed(name))
    with path.open("rb") as file:
        while content := file.read(BYTES_AT_ONCE):
            state.update(content)
    return state.digest()


def tensor_checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the checksum (hex) of each tensor by its name: of its bytes, name, dtype and shape.

    tensors: on the CPU and contiguous, of any dtype.
    """
    return {
        name: checksum(_bytes(tensor), f"{name} {_form(tensor)}".encode()).hex() for name, tensor in tensors.items()
    }


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    import torch  # takes seconds, which reading a dataset does without

    if not tensor.numel():  # torch gives an empty tensor strides that no view takes
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _form(tensor: Tensor) -> str:
    """Return the dtype and shape of a tensor as text."""
    return f"{tensor.dtype} {list(tensor.shape)}"
