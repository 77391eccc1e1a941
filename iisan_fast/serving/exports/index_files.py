"""Write and open an approximate index of inner products (HNSW): it finds items whose scores may be the highest."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError, check_choice

KINDS = {"faiss": "faiss", "usearch": "usearch"}  # extra, and the library that it installs
NEIGHBOURS = 32  # links of an item in the graph
BUILD_CANDIDATES = 200  # items that are compared for the links of a new one
SEARCH_CANDIDATES = 512  # items that a search compares


class IndexedVectors(NamedTuple):
    """The joined vectors of the items that may be recommended."""

    rows: np.ndarray  # int64 [M]: item number i has row i - 1
    vectors: np.ndarray  # float32 [M, D]


# Takes queries float32 [R, D] and a count, and returns rows int64 [R, count], -1 behind the last one.
Search = Callable[[np.ndarray, int], np.ndarray]


def index_file(kind: str) -> str:
    """Return the name of an index's file."""
    return f"index.{kind}"


def refuse_missing_library(kind: str) -> None:
    """Raise InputError if there is no such kind of index, or if its library is not installed."""
    check_choice("index", kind, KINDS)
    if find_spec(KINDS[kind]) is None:
        raise InputError(f"index: {kind} is not installed; pip install 'iisan-fast[{kind}]'")


def write_index(kind: str, indexed: IndexedVectors, folder: Path) -> None:
    """Build an index and write its file into a folder. Its library must be installed."""
    path = str(folder / index_file(kind))
    if kind == "faiss":
        import faiss

        graph = faiss.IndexHNSWFlat(indexed.vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILD_CANDIDATES
        graph.hnsw.efSearch = SEARCH_CANDIDATES
        index = faiss.IndexIDMap(graph)
        index.add_with_ids(indexed.vectors, indexed.rows)
        faiss.write_index(index, path)
    else:
        from usearch.index import Index

        index = Index(
            ndim=indexed.vectors.shape[1],
            metric="ip",
            dtype="f32",
            connectivity=NEIGHBOURS,
            expansion_add=BUILD_CANDIDATES,
        )
        index.add(indexed.rows.astype(np.uint64), indexed.vectors)
        index.save(path)


def open_index(kind: str, indexed: IndexedVectors, folder: Path) -> Search:
    """Open an index in a folder, and return its search. Its library must be installed.

    Raises InputError if the index is missing or damaged, or if it does not fit the vectors.
    """
    path = folder / index_file(kind)
    if not path.is_file():
        raise InputError(f"{path}: no such index; export again")
    try:
        search, items, dimension = (_faiss if kind == "faiss" else _usearch)(path)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no index of {kind} ({error}); export again") from None
    if (items, dimension) != indexed.vectors.shape:
        expected = "{} items of dimension {}".format(*indexed.vectors.shape)
        raise InputError(f"{path}: expected {expected}, found {items} of dimension {dimension}; export again")
    return search


def _faiss(path: Path) -> tuple[Search, int, int]:
    """Return the search, the number of items and the dimension of a FAISS index. Raises RuntimeError for no index."""
    import faiss

    index = faiss.read_index(str(path))
    return lambda queries, count: index.search(queries, count)[1], index.ntotal, index.d


def _usearch(path: Path) -> tuple[Search, int, int]:
    """Return the search, the number of items and the dimension of a USearch index. Raises RuntimeError for no index."""
    from usearch.index import Index

    index = Index.restore(str(path), expansion_search=SEARCH_CANDIDATES)
    if index is None:
        raise RuntimeError("it cannot be read")

    def search(queries: np.ndarray, count: int) -> np.ndarray:
        matches = index.search(queries, count)
        keys = np.atleast_2d(matches.keys).astype(np.int64)
        counts = np.atleast_1d(matches.counts)
        keys[np.arange(keys.shape[1]) >= counts[:, None]] = -1
        return keys

    return search, len(index), index.ndim
