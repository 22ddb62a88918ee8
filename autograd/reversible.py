"""Reversible chains: what a layer read is computed again while gradients go back, instead of being kept.

    x_{k+1} = x_{k-1} + f_k(x_k)          k = 1 ... n, from x_0 and x_1

The last pair gives all others, because x_{k-1} = x_{k+1} - f_k(x_k). So the tape keeps one pair, however long the chain is, and
backward runs a tape of one f_k at a time:

    y = f_k(x_k), recorded;   x_{k-1} = x_{k+1} - y;   gradient of x_k += f_k'(x_k)ᵀ g;   gradient of x_{k-1} += g

Here g is the gradient of x_{k+1}. With f = F, G, F, G, ... this is y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1) of RevNet (Gomez et
al. 2017, arXiv 1707.04585) and of Reformer (Kitaev et al. 2020, arXiv 2001.04451). Every f_k is computed twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import SimpleNamespace

from .device import namespace
from .errors import GraphError
from .node import Node, Sum, place_of, walk
from .state import Switch, no_grad, products, switches
from .tensor import Tensor

_replaying = ContextVar("a reversible chain is computed again", default=False)
replaying = _replaying.get  # whether what runs here has run before: side effects must not happen twice
_notes: ContextVar[tuple[deque, bool] | None] = ContextVar("what this function of a chain noted, whether to read", default=None)

Step = tuple[Callable[[Tensor], Tensor], Sequence[Tensor]]


def noted(make: Callable):
    """``make()``; where a function of a chain runs again, what it gave the first time, in the order of the calls.

    For choices that rounding may turn: x_k comes back with a small error, and an argmax or a sort of it may not. They must be
    the same in backward. A function that a chain inside another one calls makes them anew.
    """
    notes = _notes.get()
    if notes is None:
        return make()
    kept, reading = notes
    if reading:
        return kept.popleft()
    kept.append(make())
    return kept[-1]


def reversible(steps: Sequence[Step], x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The last two of x_{k+1} = x_{k-1} + f_k(x_k) for steps (f_k, its parameters), in the memory of one step.

    All x_k have one dtype, and shapes that can be added. ``f_k`` must compute the same when it is called again: randomness is a
    value, see Random, and what rounding could turn is ``noted``. Its parameters are leaves, and it uses no other tensor that
    requires a gradient: GraphError in backward. There is no second derivative.
    """
    chain, nodes = _Chain([f for f, _ in steps]), []
    for k, (_, parameters) in enumerate(steps, 1):
        with no_grad():
            data = x0.data + chain.run(k, x1, False).data
        inputs, node = [x0, x1, *parameters], None
        if switches().recording and any(t.requires_grad for t in inputs):
            parents = [place_of(t) if t.requires_grad else None for t in inputs]
            node = Node(_OP, _RULE, parents, (chain, k, parameters), [t.shape for t in inputs], [(data.shape, data.dtype)],
                        [(t.version, t.version[0], "parameters") for t in parameters])
            nodes.append(node)
        x0, x1 = x1, Tensor.wrap(data, node=node)
    chain.last = chain.at = (len(steps), x0.data, x1.data)
    for node in nodes:
        node.versions += [(t.version, t.version[0], None) for t in (x0, x1)]
    return x0, x1


def recomputed(f: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """f(x), whose inside is computed again in backward instead of being kept: a chain of one step, from 0 and x."""
    nothing = Tensor.wrap(namespace(x.data).zeros((), x.dtype))
    return reversible([(f, parameters)], nothing, x)[1]


class _Chain:
    """The last pair of a chain, and the one that backward has come to: (k, x_k, x_{k+1})."""

    def __init__(self, functions: list[Callable]):
        self.functions = functions
        self.notes: list[deque] = [deque() for _ in functions]
        self.uses, self.products = switches().uses, switches().products
        self.last = self.at = None

    def run(self, k: int, x: Tensor, again: bool) -> Tensor:
        """f_k(x), which notes its choices, or reads them where it runs again."""
        token = _notes.set((deque(self.notes[k - 1]) if again else self.notes[k - 1], again))
        try:
            return self.functions[k - 1](x)
        finally:
            _notes.reset(token)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Functions compute here what they computed before, by the forms, kernels and products that were asked for then."""
        token = _replaying.set(True)
        try:
            with ExitStack() as entered:
                for request in (*self.uses, products(self.products)):
                    entered.enter_context(request)
                yield
        finally:
            _replaying.reset(token)

    def pair(self, k: int):
        """x_k and x_{k+1}; usually backward has just come to them."""
        at, a, b = self.at if self.at[0] >= k else self.last
        while at > k:
            at, a, b = at - 1, b - self.run(at, Tensor.wrap(a), True).data, a
        return a, b


class _Rule:
    """What a node of a chain does in backward."""

    def __str__(self) -> str:
        return "recomputation"

    def differentiate(self, node, saved, grads, create_graph):
        """Gradients of x_{k-1}, x_k and the parameters, by a tape of f_k."""
        if create_graph:
            raise GraphError("reversible: there is no second derivative; add the functions up without it")
        chain, k, parameters = saved
        with chain.again():
            a, b = chain.pair(k)
            x = Tensor.wrap(a, requires_grad=True)
            sums = {id(t): Sum() for t in (x, *parameters)}

            def receive(place, gradient):
                if type(place) is not tuple:
                    if id(place) not in sums:
                        raise GraphError(f"reversible: function {k} uses a tensor of shape {place.shape} that requires a "
                                         "gradient and is none of its parameters")
                    sums[id(place)].add(gradient)

            with Switch(recording=True):
                y = chain.run(k, x, True)
            if y.requires_grad:
                walk([(place_of(y), grads[0])], receive)
        chain.at = (k - 1, b - y.data, a)
        return [grads[0], *(total.value for total in sums.values())]


_OP, _RULE = SimpleNamespace(name="reversible"), _Rule()
