"""The tape: nodes with slots, an iterative backward that releases as it goes, and no reference cycles.

A node points to its parents (nodes, or leaf tensors) and holds what its gradient needs, never the tensors it made.
Nodes are numbered as they are recorded and visited from the newest to the oldest, which is a topological order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

from .device import namespace, unscalar
from .errors import GraphError, NonFiniteError, ShapeError
from .shapes import broadcast_axes
from .state import STATE, _Switch, enable_grad, no_grad

_number = itertools.count()


class Node:
    """One recorded call of an operator.

    ``parents`` has one entry per input: a ``(Node, output index)`` pair, a leaf tensor, or None where no gradient goes.
    ``differentiate(node, grads, create_graph)`` returns one gradient (a Tensor or None) per input.
    """

    __slots__ = ("differentiate", "number", "op", "outputs", "parents", "retained", "saved", "shapes", "versions")

    def __init__(self, op, parents, differentiate, saved, shapes, outputs, versions):
        self.op = op
        self.parents = parents
        self.differentiate = differentiate
        self.saved = saved
        self.shapes = shapes  # of the inputs
        self.outputs = outputs  # (shape, dtype) of each output
        self.versions = versions  # (cell, version at recording, argument name or None for an output) of what was saved
        self.number = next(_number)
        self.retained = None  # output index -> weak reference to a tensor that wants its gradient

    def check_versions(self):
        """Raise if an array that backward needs was updated in place after it was recorded."""
        for cell, version, argument in self.versions:
            if cell[0] != version:
                what = "its output" if argument is None else f"argument {argument!r}"
                raise GraphError(
                    f"{self.op.name}: {what} was updated in place after this call was recorded, so its gradient would "
                    "be wrong: run backward() before the update, or use a copy"
                )

    def release(self):
        """Drop what backward needed; a second backward then raises."""
        self.saved = self.parents = self.versions = None


def undo_broadcast(grad, shape: tuple[int, ...]):
    """Sum a gradient over the axes along which broadcasting repeated the input: the adjoint of broadcasting."""
    if grad.shape == shape:
        return grad
    from .ops import reduce
    from .ops import shape as shape_ops

    axes = broadcast_axes(shape, grad.shape)
    return shape_ops.reshape(reduce.sum(grad, axis=axes), shape)


class _Sum:
    """The gradients that reached one output, added up; only arrays allocated here are written to."""

    __slots__ = ("owned", "value")

    def __init__(self):
        self.value, self.owned = None, False

    def add(self, grad, create_graph: bool):
        if self.value is None:
            self.value = grad
        elif create_graph:
            self.value = self.value + grad
        elif self.owned:
            self.value.data += grad.data
        else:
            self.value, self.owned = type(grad).wrap(unscalar(self.value.data + grad.data)), True


def run_backward(
    outputs: Sequence,
    seeds: Sequence,
    *,
    retain: bool = False,
    create_graph: bool = False,
    sink: Callable | None = None,
    targets: Sequence | None = None,
) -> list:
    """Send ``seeds`` back from ``outputs``.

        deliver the seeds to the nodes that made the outputs
        while nodes are pending:
            take the newest one: all that used its outputs has been visited, so their gradients are complete
            differentiate it: one gradient per input
            deliver each to the node that made the input, or to the leaf

    Leaf gradients go to ``sink(leaf, gradient)`` as soon as each contribution is known, or, without a sink, are
    added to ``leaf.grad`` when everything has succeeded. With ``targets`` nothing is stored, nothing that does not
    lead to one of them is visited, and their gradients are returned (None where nothing arrived).
    """
    pending: dict[int, tuple[Node, list[_Sum]]] = {}
    leaves: dict[int, tuple[object, _Sum]] = {}
    retained: list[tuple[object, object]] = []
    heap: list[int] = []
    found: list = [None] * len(targets or ())
    wanted: dict[object, list[int]] = {}
    for position, target in enumerate(targets or ()):
        wanted.setdefault(_key(target), []).append(position)
    useful = None if targets is None else _leading_to(wanted, outputs)

    def deliver(parent, grad):
        if type(parent) is tuple:
            node, index = parent
            if useful is not None and node.number not in useful and (node.number, index) not in wanted:
                return
            entry = pending.get(node.number)
            if entry is None:
                entry = pending[node.number] = (node, [_Sum() for _ in node.outputs])
                heappush(heap, -node.number)
            entry[1][index].add(grad, create_graph)
        elif useful is not None and id(parent) not in wanted:
            return
        elif sink is not None:
            sink(parent, grad)
        else:
            entry = leaves.get(id(parent))
            if entry is None:
                entry = leaves[id(parent)] = (parent, _Sum())
            entry[1].add(grad, create_graph)

    checking = STATE.checking
    # What a gradient is made of is not checked: a bad one is reported as that of the operator, below.
    with enable_grad() if create_graph else no_grad(), _Switch("checking", False):
        for output, seed in zip(outputs, seeds, strict=True):
            deliver((output.node, output.index) if output.node is not None else output, seed)
        while heap:
            node, sums = pending.pop(-heappop(heap))
            if useful is not None:
                for index, total in enumerate(sums):
                    for position in wanted.get((node.number, index), ()):
                        found[position] = total.value
                if node.number not in useful:
                    continue
            if node.retained is not None:
                for index, reference in node.retained.items():
                    if (tensor := reference()) is not None and sums[index].value is not None:
                        retained.append((tensor, sums[index].value))
            if node.saved is None:
                raise GraphError(
                    f"backward reached {node.op.name}, whose graph was already released by an earlier backward: "
                    "pass retain=True to the first one"
                )
            if node.versions:
                node.check_versions()
            parents = node.parents
            arrived = next(total.value for total in sums if total.value is not None)
            grads = [total.value if total.value is not None else _zeros(arrived, *like)
                     for total, like in zip(sums, node.outputs, strict=True)]
            results = node.differentiate(node, grads, create_graph)
            if len(results) != len(parents):
                raise GraphError(f"{node.op.name}: its gradient has {len(results)} values for {len(parents)} inputs")
            for parent, grad, shape in zip(parents, results, node.shapes, strict=True):
                if parent is None or grad is None:
                    continue
                if grad.shape != shape:
                    try:
                        grad = undo_broadcast(grad, shape)
                    except (IndexError, ValueError):
                        raise ShapeError(
                            f"gradient of {node.op.name}: shape {grad.shape} for an input of shape {shape}"
                        ) from None
                if checking:
                    require_finite(grad.data, f"the gradient of {node.op.name}")
                deliver(parent, grad)
            if not (retain or create_graph):
                node.release()
    if targets is not None:
        for key, (_, total) in leaves.items():
            for position in wanted.get(key, ()):
                found[position] = total.value
        return found
    for leaf, total in leaves.values():
        leaf.accumulate(total.value)
    for tensor, value in retained:
        tensor.accumulate(value)
    return []


def _key(tensor):
    """What a target is found by: the place in the graph where its gradient arrives."""
    return id(tensor) if tensor.node is None else (tensor.node.number, tensor.index)


def _leading_to(wanted, outputs) -> set[int]:
    """The numbers of the nodes between the wanted tensors and the outputs."""
    nodes = {o.node.number: o.node for o in outputs if o.node is not None}
    unseen = list(nodes.values())
    while unseen:
        for parent in unseen.pop().parents or ():
            if type(parent) is tuple and parent[0].number not in nodes:
                nodes[parent[0].number] = parent[0]
                unseen.append(parent[0])
    useful: set[int] = set()
    for number in sorted(nodes):  # parents before the nodes that use them
        if nodes[number].parents is None and any(type(key) is int or key[0] != number for key in wanted):
            useful.add(number)  # released: what lay below is not known any more, so that visiting it has to raise
        for parent in nodes[number].parents or ():
            if type(parent) is tuple:
                hit = parent[0].number in useful or (parent[0].number, parent[1]) in wanted
            else:
                hit = id(parent) in wanted
            if hit:
                useful.add(number)
                break
    return useful


def _zeros(like, shape, dtype):
    return type(like).wrap(namespace(like.data).zeros(shape, dtype))


def require_finite(array, where: str, *, empty: bool = False):
    """Raise NonFiniteError naming ``where`` if the array has a NaN or an infinity; what may be ``empty``, other than -∞."""
    if array.dtype.kind not in "fc":
        return
    finite = np.isfinite(array) if isinstance(array, np.ndarray) else namespace(array).isfinite(array)
    if empty:
        finite |= array == -np.inf
    if not bool(finite.all()):
        bad = int(array.size - finite.sum())
        raise NonFiniteError(f"{where}: {bad} of {array.size} values are NaN or infinite (shape {array.shape})")
