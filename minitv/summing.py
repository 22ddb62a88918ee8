"""Sums over the micro-batches of a step in a fixed order, however many threads and ranks there are.

The order is a binary tree over the numbers of the micro-batches, and so it depends on how many there are alone:

    0 ... 5  =  (0 ... 3) + (4 5)       the left part is the largest power of two that leaves something to the right
    0 ... 3  =  (0 1) + (2 3)

A node is a range (start, stop). Each rank has a share of the micro-batches, a range too; it adds up the nodes that lie inside,
each as soon as both parts of it are there, and what is left is added up together, every rank a part of the numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from autograd.device import namespace
from autograd.ranks import Communicator, pieces

Node = tuple[int, int]

BUCKET = 2**23  # bytes of a gradient that ranks exchange at once: a part of it stays in the cache while it is added up


def halves(node: Node) -> tuple[Node, Node]:
    """The two parts of a node of several micro-batches."""
    start, stop = node
    middle = start + (1 << (stop - start - 1).bit_length() - 1)
    return (start, middle), (middle, stop)


def share(count: int, rank: int, ranks: int) -> range:
    """The micro-batches of a rank, of so many in all."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


class Plan:
    """How the micro-batches of a step are added up, by the number of them and the ranks that share them.

    ``tops[r]`` are the nodes that rank r adds up on its own. The root is not one of them if it has parts: the last addition is
    made together with what is computed from the sum.
    """

    def __init__(self, count: int, ranks: int = 1):
        self.count, self.ranks = count, ranks
        self.tops = [list(self._tops((0, count), share(count, rank, ranks))) for rank in range(ranks)]

    def _tops(self, node: Node, mine: range) -> Iterator[Node]:
        start, stop = node
        if not mine or stop <= mine.start or start >= mine.stop:
            return
        if stop - start == 1 or (node != (0, self.count) and mine.start <= start and stop <= mine.stop):
            yield node
        else:
            for half in halves(node):
                yield from self._tops(half, mine)

    @cached_property
    def parents(self) -> dict[Node, Node]:
        """The node that a node is a part of, below those of ``tops``."""
        found: dict[Node, Node] = {}
        unseen = [node for tops in self.tops for node in tops]
        while unseen:
            node = unseen.pop()
            if node[1] - node[0] > 1:
                found.update(dict.fromkeys(halves(node), node))
                unseen += halves(node)
        return found

    @cached_property
    def buffers(self) -> list[int]:
        """How many buffers each rank needs that takes its micro-batches in order, one after the other."""
        return [self._most(rank) for rank in range(self.ranks)]

    def _most(self, rank: int) -> int:
        sums: set[Node] = set()
        found = 0
        for number in share(self.count, rank, self.ranks):
            node = (number, number + 1)
            found = max(found, len(sums) + 1)
            while (parent := self.parents.get(node)) is not None and halves(parent)[1] == node:
                sums.remove(halves(parent)[0])
                node = parent
            sums.add(node)
        return found

    def fold(self, values: dict[Node, Any]) -> tuple[Any, list[tuple[Any, Any]]]:
        """Where the sum of all ``tops`` comes to stand, and the additions (left, right) that make it, left += right."""
        pairs: list[tuple[Any, Any]] = []

        def visit(node: Node) -> Any:
            if node in values:
                return values[node]
            left, right = map(visit, halves(node))
            pairs.append((left, right))
            return left

        return visit((0, self.count)), pairs


@lru_cache(64)
def plan(count: int, ranks: int = 1) -> Plan:
    """The Plan of so many micro-batches, made once: steps ask for the same ones."""
    return Plan(count, ranks)


class Gradients:
    """The gradients of one step: workers ``take`` a buffer for a micro-batch and ``put`` it back when it is full.

    ``free`` are buffers that nobody uses; ``make`` makes one more, and ``add(left, right)`` adds one to another.
    """

    def __init__(self, plan: Plan, free: list[Any], make: Callable[[], Any], add: Callable[[Any, Any], None]):
        self.plan, self._free, self._make, self._add = plan, free, make, add
        self._lock = threading.Lock()
        self.sums: dict[Node, Any] = {}  # that are not added to others yet

    def take(self) -> Any:
        """A buffer for a gradient."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._make()

    def put(self, number: int, buffer: Any) -> None:
        """The gradient of a micro-batch is there: add up every node that it completes."""
        node, parents = (number, number + 1), self.plan.parents
        while True:
            with self._lock:
                self.sums[node] = buffer
                if node not in parents:
                    return
                left, right = halves(parents[node])
                if left not in self.sums or right not in self.sums:
                    return
                one, other = self.sums.pop(left), self.sums.pop(right)
            self._add(one, other)
            with self._lock:
                self._free.append(other)
            node, buffer = parents[node], one

    def finish(self, ranks: Communicator) -> tuple[Any, list[tuple[Any, Any]]]:
        """The buffer of the sum over all ranks, and the additions that are still to be made for it; frees all buffers."""
        if ranks.size == 1:
            total, pairs = self.plan.fold(self.sums)
        else:
            total, pairs = next(iter(self.sums.values()), None) or self.take(), []
            self._exchange(ranks, total)
        self._free += [buffer for buffer in self.sums.values() if buffer is not total] + [total]
        return total, pairs

    def _exchange(self, ranks: Communicator, total: Any) -> None:
        """total = the sum over all ranks: of each bucket every rank gets a part from all, adds it up, and gives it to all."""
        tops = self.plan.tops
        mine = [pieces(self.sums[node].flat, BUCKET) for node in tops[ranks.rank]]
        for number, bucket in enumerate(pieces(total.flat, BUCKET)):
            edges = [bucket.size * i // ranks.size for i in range(ranks.size + 1)]
            parts = [slice(*edges[i:i + 2]) for i in range(ranks.size)]
            length = edges[ranks.rank + 1] - edges[ranks.rank]
            values = {node: namespace(bucket).empty(length, bucket.dtype) for nodes in tops for node in nodes}
            for turn in range(max(map(len, tops))):
                outgoing = [mine[turn][number][part] if turn < len(mine) else None for part in parts]
                ranks.exchange(outgoing, [values[nodes[turn]] if turn < len(nodes) else None for nodes in tops])
            result, additions = self.plan.fold(values)
            for left, right in additions:
                left += right
            ranks.exchange([result] * ranks.size, [bucket[part] for part in parts])
