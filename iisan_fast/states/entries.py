"""Lay out an item's entry in a store: a digest of the item's content, the states, and a checksum of both.

Entries of caches of format 1 may lack the checksum; their length tells.
"""

from __future__ import annotations

import struct
from hashlib import blake2b, sha256
from typing import Any

import torch

from ..checksums import CHECKSUM_BYTES, checksum

DIGEST_BYTES = 16
RECORDED = struct.Struct(f"{CHECKSUM_BYTES}s")  # an entry's checksum, read faster than by a slice
MAX_KEY_BYTES = 511  # LMDB's limit


def content_digest(content: bytes) -> bytes:
    """Return the digest of an item's content that a store keeps with its states: BLAKE2b, 16 bytes."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def entry_bytes(description: dict[str, Any]) -> int:
    """Return the bytes of one item's entry in a store, the checksum included. description: of the view."""
    return DIGEST_BYTES + states_bytes(description) + CHECKSUM_BYTES


def states_bytes(description: dict[str, Any]) -> int:
    """Return the bytes of one item's states. description: of the view."""
    return len(description["layers"]) * description["width"] * getattr(torch, description["dtype"]).itemsize


def entry_key(view: str, item_id: str) -> bytes:
    """Return the key of an item's entry. A long key is replaced by its hash, because LMDB limits the length."""
    key = f"{view}\0{item_id}".encode()
    return key if len(key) <= MAX_KEY_BYTES else f"{view}\0\0".encode() + sha256(key).digest()


def key_names(key: bytes) -> tuple[str, str]:
    """Return the view's name and the item id in a key, as text for messages; a hash as hex."""
    view, _, item = key.partition(b"\0")
    item_text = item[1:].hex() if item.startswith(b"\0") else item.decode(errors="backslashreplace")
    return view.decode(errors="backslashreplace"), item_text


def with_checksum(key: bytes, content: bytes) -> bytes:
    """Return an entry: its content, a digest and states, followed by the checksum of the content under the key."""
    return content + checksum(content, key)


def fits(key: bytes, entry: memoryview, size: int) -> bool:
    """Return True if an entry has `size` bytes, the checksum included, and its checksum fits the key and content."""
    end = size - CHECKSUM_BYTES
    return len(entry) == size and checksum(entry[:end], key) == RECORDED.unpack_from(entry, end)[0]


def entry_problem(entry: memoryview, size: int) -> str:
    """Return why an entry that does not fit cannot be used. size: of an entry of its view, the checksum included."""
    if len(entry) == size:
        return "the checksum of its states does not fit"
    expected = size - DIGEST_BYTES - CHECKSUM_BYTES
    return f"expected {expected} bytes of states, found {max(0, len(entry) - DIGEST_BYTES - CHECKSUM_BYTES)}"
