"""Random programs on tensors against a scalar engine of a few lines: values, gradients, released graphs, freed memory.

The scalar engine writes every number on one tape together with its partial derivatives, and runs backward over it.
It takes over the engine's values after comparing them, so rounding does not add up over a long program, and it adds up
magnitudes beside gradients: a gradient may be wrong by 1e-10 of the sum of the magnitudes of its terms.
"""

from __future__ import annotations

import gc
import math
import operator
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import autograd as ag
from autograd import GraphError, Tensor, gradients, no_grad
from autograd.state import switches

UNARY = {  # the operator, f, f'
    "negative": (operator.neg, lambda a: -a, lambda a: -1.0),
    "sin": (ag.sin, math.sin, math.cos),
    "tanh": (ag.tanh, math.tanh, lambda a: 1 / math.cosh(a) ** 2),
    "exp": (ag.exp, math.exp, math.exp),
}
BINARY = {  # the operator, f, both partial derivatives
    "add": (operator.add, lambda a, b: a + b, lambda a, b: (1.0, 1.0)),
    "subtract": (operator.sub, lambda a, b: a - b, lambda a, b: (1.0, -1.0)),
    "multiply": (operator.mul, lambda a, b: a * b, lambda a, b: (b, a)),
    "divide": (operator.truediv, lambda a, b: a / b, lambda a, b: (1 / b, -a / b**2)),
}


class Tape:
    """The scalar engine: values, and for each the earlier places it depends on with the partial derivatives."""

    def __init__(self):
        self.values: list[float] = []
        self.links: list[list[tuple[int, float]]] = []

    def write(self, value: float, links=()) -> int:
        self.values.append(value)
        self.links.append(list(links))
        return len(self.values) - 1

    def backward(self, seeds: dict[int, float]) -> tuple[list[float], list[float]]:
        """The derivative of Σ seed · value with respect to every place, and the sum of its terms' magnitudes."""
        total, size = [0.0] * len(self.values), [0.0] * len(self.values)
        for place, seed in seeds.items():
            total[place] += seed
            size[place] += abs(seed)
        for place in reversed(range(len(self.values))):
            for source, partial in self.links[place]:
                total[source] += total[place] * partial
                size[source] += size[place] * abs(partial)
        return total, size


@dataclass(eq=False)
class Call:
    """A recorded call: several outputs may belong to it."""

    parents: list[Entry]
    number: int
    released: bool = False


@dataclass(eq=False)
class Entry:
    """A tensor of the program and its places on the tape."""

    tensor: Tensor
    places: list[int]
    call: Call | None = None  # None for leaves and constants
    grad: list[tuple[float, float]] | None = field(default=None)  # what .grad should hold: total and size

    @property
    def vector(self) -> bool:
        return self.tensor.ndim == 1


pick = st.integers(0, 10**6)
number = st.floats(-2.0, 2.0, allow_subnormal=False)


class Programs(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        gc.disable()
        self.tape, self.entries, self.leaves, self.numbers, self.made = Tape(), [], [], count(), []

    def teardown(self):
        self.entries.clear()
        self.leaves.clear()
        gc.enable()
        if sys.exc_info()[0] is None:  # a failure's traceback holds tensors
            assert all(reference() is None for reference in self.made), "reference counts alone did not free a tensor"
            assert switches().recording and switches().depth == 0

    # -- the program's tensors -----------------------------------------------------------------------------------------
    def take(self, index: int) -> Entry:
        return self.entries[index % len(self.entries)]

    def add(self, tensor: Tensor, places, call=None) -> Entry:
        entry = Entry(tensor, places, call)
        self.made.append(weakref.ref(tensor))
        self.entries.append(entry)
        return entry

    def record(self, tensors, results, parents, constant=False) -> list[Entry]:
        """Compare the tensors with (value, links) for each element, and add them as the outputs of one call."""
        parents = [] if constant else [p for p in parents if p.tensor.requires_grad]
        call = Call(parents, next(self.numbers)) if parents else None
        entries = []
        for tensor, result in zip(tensors, results, strict=True):
            assert tensor.requires_grad == (call is not None) and tensor.is_leaf == (call is None)
            places = []
            for found, (value, links) in zip(tensor.numpy().reshape(-1).tolist(), result, strict=True):
                assert abs(found - value) <= 1e-10 * abs(value) + 1e-13, (tensor, value)
                places.append(self.tape.write(found, links if call else ()))
            entries.append(self.add(tensor, places, call))
        return entries

    def apply_unary(self, x: Entry, name: str, constant=False) -> None:
        function, value, slope = UNARY[name]
        result = [(value(a), [(p, slope(a))]) for p in x.places for a in (self.tape.values[p],)]
        with no_grad() if constant else nullcontext():
            tensor = function(x.tensor)
        self.record([tensor], [result], [x], constant)

    # -- rules that build ----------------------------------------------------------------------------------------------
    @initialize(values=st.lists(number, min_size=1, max_size=3))
    def first_leaf(self, values):
        self.leaf(values, True)

    @rule(values=number | st.lists(number, max_size=3), requires_grad=st.sampled_from([True, True, False]))
    def leaf(self, values, requires_grad):
        tensor = Tensor(np.array(values, np.float64), requires_grad=requires_grad)
        entry = self.add(tensor, [self.tape.write(v) for v in np.atleast_1d(values).tolist()])
        if requires_grad:
            self.leaves.append(entry)

    @rule(index=pick, name=st.sampled_from(sorted(UNARY)), constant=st.booleans())
    def unary(self, index, name, constant):
        x = self.take(index)
        if name in ("exp", "tanh") and any(abs(self.tape.values[p]) > 3 for p in x.places):
            name = "sin"  # e^x grows, and the slope of tanh is a difference of nearly equal numbers
        self.apply_unary(x, name, constant and index % 3 == 0)

    @rule(left=pick, right=pick | number, swap=st.booleans(), name=st.sampled_from(sorted(BINARY)),
          constant=st.booleans())
    def binary(self, left, right, swap, name, constant):
        """Two tensors, or a tensor and a number, on either side; within no_grad now and then."""
        x = self.take(left)
        if isinstance(right, float):
            y = Entry(right, [self.tape.write(right)])
            parents, shape = [x], x.tensor.shape
        else:
            y = self.take(right)
            sizes = len(x.places), len(y.places)
            if x.vector and y.vector and sizes[0] != sizes[1] and 1 not in sizes:
                y = self.sum(y)
            parents, shape = [x, y], np.broadcast_shapes(x.tensor.shape, y.tensor.shape)
        a, b = (y, x) if swap else (x, y)
        if name == "divide" and any(abs(self.tape.values[p]) < 0.2 for p in b.places):
            name = "multiply"
        function, value, slopes = BINARY[name]
        result = []
        for k in range(math.prod(shape)):
            p, q = (e.places[k if len(e.places) > 1 else 0] for e in (a, b))
            at = self.tape.values[p], self.tape.values[q]
            result.append((value(*at), list(zip((p, q), slopes(*at), strict=True))))
        if any(abs(v) > 100 for v, _ in result):
            self.apply_unary(x, "sin")
            return
        constant = constant and left % 3 == 0
        with no_grad() if constant else nullcontext():
            tensor = function(a.tensor, b.tensor)
        assert tensor.shape == shape
        self.record([tensor], [result], parents, constant)

    @rule(index=pick, which=pick)
    def index(self, index, which):
        x = self.take(index)
        size = len(x.places)
        keys = [(), Ellipsis]
        if x.vector:
            keys = [slice(None, None, -1), slice(0, 2), slice(1, 1), slice(None)]
        if x.vector and size:
            keys += [which % size, -1, [0, -1, 0], np.array([size - 1, 0]), np.arange(size) % 2 == 0]
        key = keys[which % len(keys)]
        places = np.reshape(np.array(x.places, int), x.tensor.shape)[key]
        result = [(self.tape.values[p], [(p, 1.0)]) for p in np.atleast_1d(places).tolist()]
        tensor = x.tensor[key]
        assert tensor.shape == np.shape(places)
        self.record([tensor], [result], [x])

    @rule(index=pick)
    def total(self, index):
        self.sum(self.take(index))

    def sum(self, x: Entry) -> Entry:
        value = math.fsum(self.tape.values[p] for p in x.places)
        return self.record([x.tensor.sum()], [[(value, [(p, 1.0) for p in x.places])]], [x])[0]

    @rule(left=pick, right=pick)
    def join(self, left, right):
        parts = [self.take(left), self.take(right)]
        if sum(len(e.places) for e in parts) > 6:
            return
        tensor = ag.concat([e.tensor if e.vector else e.tensor[None] for e in parts])
        self.record([tensor], [[(self.tape.values[p], [(p, 1.0)]) for e in parts for p in e.places]], parts)

    @rule(index=pick, which=pick)
    def split(self, index, which):
        x = self.take(index)
        if not x.vector:
            return
        cut = which % (len(x.places) + 1)
        pieces = ag.split(x.tensor, sizes=(cut, len(x.places) - cut))
        results = [[(self.tape.values[p], [(p, 1.0)]) for p in half] for half in (x.places[:cut], x.places[cut:])]
        self.record(pieces, results, [x])

    @rule(index=pick)
    def detach(self, index):
        x = self.take(index)
        self.add(x.tensor.detach(), [self.tape.write(self.tape.values[p]) for p in x.places])

    @rule(index=pick)
    def drop(self, index):
        if len(self.entries) > 1:
            self.entries.pop(index % len(self.entries))

    # -- rules that differentiate --------------------------------------------------------------------------------------
    def reached(self, starts) -> tuple[list[Call], list[Entry]]:
        """The recorded calls that backward visits, newest first, and the leaves."""
        calls, leaves, stack = {}, {}, [e for e in starts if e.tensor.requires_grad]
        while stack:
            entry = stack.pop()
            if entry.call is None:
                leaves[id(entry)] = entry
            elif entry.call.number not in calls:
                calls[entry.call.number] = entry.call
                stack += entry.call.parents
        return [calls[n] for n in sorted(calls, reverse=True)], list(leaves.values())

    def seeds(self, entry: Entry, scale: float) -> tuple[Tensor, dict[int, float]]:
        seeds = [scale * (k + 1) for k in range(len(entry.places))]
        return Tensor(np.reshape(seeds, entry.tensor.shape)), dict(zip(entry.places, seeds, strict=True))

    @rule(index=pick, scale=st.sampled_from([1.0, -0.7]), retain=st.booleans())
    def backward(self, index, scale, retain):
        x = self.take(index)
        seed, seeds = self.seeds(x, scale)
        calls, leaves = self.reached([x])
        spent = next((i for i, call in enumerate(calls) if call.released), None)
        try:
            x.tensor.backward(seed, retain=retain)
            refusal = None
        except GraphError as error:
            refusal = str(error)
        for call in calls[:spent]:
            call.released |= not retain
        if not x.tensor.requires_grad:
            assert "requires a gradient" in refusal
        elif spent is not None:
            assert "already released" in refusal
        else:
            assert refusal is None
            total, size = self.tape.backward(seeds)
            for leaf in leaves:
                old = leaf.grad or [(0.0, 0.0)] * len(leaf.places)
                leaf.grad = [(v + total[p], s + size[p]) for (v, s), p in zip(old, leaf.places, strict=True)]

    @rule(output=pick, inputs=st.lists(pick, min_size=1, max_size=3), scale=st.sampled_from([1.0, -0.7]),
          create_graph=st.booleans())
    def gradients(self, output, inputs, scale, create_graph):
        """Of any tensor with respect to any others, leaves or not."""
        y = self.take(output)
        xs = list({id(x): x for x in map(self.take, inputs)}.values())
        calls, _ = self.reached([y])
        if any(call.released for call in calls):
            return
        seed, seeds = self.seeds(y, scale)
        found = gradients(y.tensor, [x.tensor for x in xs], seed, create_graph=create_graph, retain=True)
        total, size = self.tape.backward(seeds)
        for x, gradient in zip(xs, found, strict=True):
            connected = x.tensor.requires_grad and y.tensor.requires_grad
            self.compare(gradient, [(total[p], size[p]) if connected else (0.0, 0.0) for p in x.places], x)

    @rule()
    def zero_grad(self):
        for leaf in self.leaves:
            leaf.tensor.grad = leaf.grad = None

    # -- what must hold ------------------------------------------------------------------------------------------------
    def compare(self, gradient, expected, entry):
        assert gradient.shape == entry.tensor.shape and gradient.dtype == np.float64
        for found, (value, size) in zip(gradient.numpy().reshape(-1).tolist(), expected, strict=True):
            assert abs(found - value) <= 1e-10 * size, (found, value)

    @invariant()
    def gradients_of_leaves_agree(self):
        for leaf in self.leaves:
            assert (leaf.tensor.grad is None) == (leaf.grad is None)
            if leaf.grad is not None:
                self.compare(leaf.tensor.grad, leaf.grad, leaf)


TestPrograms = Programs.TestCase
