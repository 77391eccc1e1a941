"""A graph's nodes are counted by kind, from a driver that is played here."""

from __future__ import annotations

import pytest

from iisan_fast.benchmarks.graph_nodes import node_kinds

ADDRESS = 0x7F00_0000_1234


class Driver:
    """Answers for one graph, whose nodes stand at addresses beyond 32 bits."""

    def __init__(self, kinds: list[int], error: int = 0) -> None:
        self.kinds = kinds
        self.error = error

    def cuGraphGetNodes(self, graph, nodes, count) -> int:  # noqa: N802
        assert graph.value == ADDRESS
        count._obj.value = len(self.kinds)
        if nodes is not None:
            for index in range(len(self.kinds)):
                nodes[index] = ADDRESS + index
        return self.error

    def cuGraphNodeGetType(self, node, kind) -> int:  # noqa: N802
        kind._obj.value = self.kinds[node.value - ADDRESS]
        return 0


def test_nodes_are_counted_by_kind():
    assert node_kinds(ADDRESS, Driver([0, 0, 2, 1, 0, 99])) == {"kernel": 3, "memset": 1, "copy": 1, "kind 99": 1}
    assert not node_kinds(ADDRESS, Driver([]))


def test_an_error_of_the_driver_is_raised():
    with pytest.raises(RuntimeError, match="error 3"):
        node_kinds(ADDRESS, Driver([0], error=3))
