"""The tape: nodes with slots, an iterative backward that releases as it goes, and no reference cycles.

A node points to its parents and holds what its gradient needs, never the tensors it made. Nodes are numbered as they are
recorded and visited from the newest to the oldest, which is a topological order. A *place* is where a gradient arrives: a
leaf tensor, or ``(node, index)`` for one output of a node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

import numpy as np

from .cpu.process import free_in_forks
from .device import namespace, unscalar
from .errors import GraphError, NonFiniteError, ShapeError
from .state import Switch, switches

_number = itertools.count()
_claiming = free_in_forks()


class Node:
    """One recorded call of an operator.

    ``rule`` is the form or the kernel that computed it; ``rule.differentiate(node, saved, grads, create_graph)`` returns one
    gradient (a Tensor or None) for each of ``parents``, the places of the float inputs (None where no gradient goes).
    """

    __slots__ = ("number", "op", "outputs", "parents", "retained", "rule", "saved", "shapes", "versions")

    def __init__(self, op, rule, parents, saved, shapes, outputs, versions):
        self.op = op
        self.rule = rule
        self.parents = parents
        self.saved = saved
        self.shapes = shapes  # of the inputs that parents stand for
        self.outputs = outputs  # (shape, dtype) of each output
        self.versions = versions  # (cell, version at recording, argument name or None for an output) of what was saved
        self.number = next(_number)
        self.retained = None  # output index -> weak reference to a tensor that wants its gradient

    def differentiate(self, grads: list, create_graph: bool, retain: bool) -> list:
        """One gradient for each parent, in the parent's shape; without ``retain`` the node gives what it saved away."""
        for cell, version, argument in self.versions or ():
            if cell[0] != version:
                what = "its output" if argument is None else f"argument {argument!r}"
                raise GraphError(
                    f"{self.op.name}: {what} was updated in place after this call was recorded, so its gradient would "
                    "be wrong: run backward() before the update, or use a copy"
                )
        with _claiming:  # of two threads, one gets it
            saved = self.saved
            if not retain:
                self.saved = None
        if saved is None:
            raise GraphError(
                f"backward reached {self.op.name}, whose graph was already released by an earlier backward: "
                "pass retain=True to the first one"
            )
        try:
            try:
                results = self.rule.differentiate(self, saved, grads, create_graph)
            except FloatingPointError:  # see Op.__call__
                with np.errstate(under="ignore"):
                    results = self.rule.differentiate(self, saved, grads, create_graph)
        except BaseException:
            self.saved = saved
            raise
        if len(results) != len(self.parents):
            raise GraphError(f"{self.op.name}, {self.rule}: its gradient has {len(results)} values, one is wanted for each of "
                             f"{', '.join(self.op.floats)}")
        return [None if g is None or parent is None else g if g.data.shape == shape else self._fitted(g, shape)
                for parent, g, shape in zip(self.parents, results, self.shapes, strict=True)]

    def _fitted(self, grad, shape):
        try:
            return grad.sum_to(shape)  # undoes the broadcast of an input
        except ShapeError:
            raise ShapeError(
                f"gradient of {self.op.name}, {self.rule}: shape {grad.shape} for an input of shape {shape}") from None


class Sum:
    """Gradients that reached one place, added up; only arrays allocated here are written to."""

    __slots__ = ("_owned", "value")

    def __init__(self):
        self.value, self._owned = None, False

    def add(self, grad, create_graph: bool = False) -> None:
        """Add a Tensor; with ``create_graph`` the sum is differentiable."""
        if self.value is None:
            self.value = grad
        elif create_graph:
            self.value = self.value + grad
        elif self._owned:
            self.value.data += grad.data
        else:
            self.value, self._owned = type(grad).wrap(unscalar(self.value.data + grad.data)), True


def walk(starts: Iterable, receive: Callable, *, retain: bool = False, create_graph: bool = False, targets=None) -> None:
    """Send gradients back from ``starts``, pairs of a place and a seed.

        deliver each seed to its place
        while nodes are pending:
            take the newest one: all that used its outputs has been visited, so their gradients are complete
            differentiate it: one gradient per parent
            deliver each to its place

    ``receive(place, gradient)`` is called for each contribution to a leaf, and once for each output of a node whose gradients
    somebody wants: one with ``retained``, or any with ``targets``. Those are a set of keys of places: nothing is visited that
    does not lead to one of them.
    """
    starts = list(starts)
    visited, opened = (None, None) if targets is None else _paths(starts, targets)
    pending: dict[int, tuple[Node, list[Sum]]] = {}
    heap: list[int] = []

    def deliver(place, grad):
        if type(place) is not tuple:
            receive(place, grad)
        elif visited is None or place[0].number in visited:
            node, index = place
            entry = pending.get(node.number)
            if entry is None:
                entry = pending[node.number] = (node, [Sum() for _ in node.outputs])
                heappush(heap, -node.number)
            entry[1][index].add(grad, create_graph)

    checking = switches().checking
    # What a gradient is made of is not checked: a bad one is reported as that of the operator.
    with Switch(recording=create_graph, checking=False):
        for place, seed in starts:
            deliver(place, seed)
        while heap:
            node, sums = pending.pop(-heappop(heap))
            grads = [total.value for total in sums]
            if targets is not None or node.retained:
                for index, grad in enumerate(grads):
                    if grad is not None:
                        receive((node, index), grad)
            if opened is not None and node.number not in opened:
                continue
            results = node.differentiate(grads, create_graph, retain or create_graph)
            for place, grad in zip(node.parents, results, strict=True):
                if grad is not None:
                    if checking:
                        require_finite(grad.data, f"the gradient of {node.op.name}")
                    deliver(place, grad)
            if not (retain or create_graph):
                node.parents = node.versions = None  # with ``saved``, all that it held


def place_of(tensor):
    """Where the gradient of a tensor arrives."""
    return tensor if tensor.node is None else (tensor.node, tensor.index)


def key(place):
    """A place as a key of dictionaries."""
    return (place[0].number, place[1]) if type(place) is tuple else id(place)


def _paths(starts, targets) -> tuple[set[int], set[int]]:
    """The numbers of the nodes to visit on the way to the targets, and of those to differentiate."""
    nodes = {place[0].number: place[0] for place, _ in starts if type(place) is tuple}
    unseen = list(nodes.values())
    while unseen:
        for place in unseen.pop().parents or ():
            if type(place) is tuple and place[0].number not in nodes:
                nodes[place[0].number] = place[0]
                unseen.append(place[0])
    ends = {target[0] for target in targets if type(target) is tuple}
    opened: set[int] = set()
    for number in sorted(nodes):  # parents before the nodes that use them
        parents = nodes[number].parents
        if parents is None:  # released: what lay below is not known any more, so that visiting it has to raise
            leads = targets != {t for t in targets if type(t) is tuple and t[0] == number}
        else:
            leads = any(key(p) in targets or (type(p) is tuple and p[0].number in opened) for p in parents if p is not None)
        if leads:
            opened.add(number)
    return opened | ends & nodes.keys(), opened


def zeros(like, shape, dtype):
    """A Tensor of zeros on the device of another one."""
    return type(like).wrap(namespace(like.data).zeros(shape, dtype))


def require_finite(array, where: str, *, empty: bool = False) -> None:
    """Raise NonFiniteError naming ``where`` if the array has a NaN or an infinity; what may be ``empty``, other than -∞."""
    if array.dtype.kind not in "fc":
        return
    finite = np.isfinite(array) if isinstance(array, np.ndarray) else namespace(array).isfinite(array)
    if empty:
        finite |= array == -np.inf
    if not bool(finite.all()):
        bad = int(array.size - finite.sum())
        raise NonFiniteError(f"{where}: {bad} of {array.size} values are NaN or infinite (shape {array.shape})")
