"""What a model mixes: the matrix M[t, s] by which position t of an output is made of position s of the values.

Every mixer is linear in its values, whatever else it computes from the text. So nothing about a variant needs to be known:

    trace     one forward pass is watched; each call of an operator stays, with what went in and what came out
    value     the input in which an operator is linear (the law linear_in) and which has a position for each row: its axes end
              with T or S, the letters of positions, and a letter of channels, and an output has the channels too
    root      where the value comes from, as far up as calls are linear and give one tensor: often what a projection gives
    path      what is computed of the root by calls that are linear in it, up to a call that mixes channels or is not linear
    sink      the last tensor of the path
    M[t, s]   what the sink has at position t, where the root is 1 in all channels at position s and 0 elsewhere, less what it
              has for a root of zeros. All that does not come from the root on the path stays as it was

So softmax weights, decays, filters, buckets, gates, running means and several calls that are merged come out as one matrix. An
operator that weighs each channel by itself gives a matrix for each channel; channels with equal matrices, as those of a head,
share one. Whether a sink is no more than M times the root is checked with the values of the pass and with random ones: what
mixes channels as well has no such matrix, and is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from autograd import Op, Tensor, no_grad
from autograd.errors import AutogradError
from autograd.random import Random
from autograd.state import watch

from ..nn import Linear, Module, Parameter

POSITIONS = ("T", "S")  # the letters of positions in signatures
TOLERANCE = 1e-8  # of what is checked in float64, relative to the largest number
ROUNDING = 1e-14  # weights that are smaller, relative to the largest of their channel, are 0
LARGEST = 2**26  # numbers that all channels of a matrix may have while they are computed


@dataclass(eq=False)
class Call:
    """A call of an operator in a forward pass: inputs in the order of the signature, parameters by name, and outputs."""

    place: int  # in the pass
    op: Op
    inputs: list[Any]
    params: dict[str, Any]
    outputs: tuple[Any, ...]

    def arguments(self) -> Sequence[Any]:
        """The declared argument of each input."""
        return self.op.arguments(self.inputs)

    def named(self, name: str) -> Any:
        """An input by its name."""
        return self.inputs[self.op.places[name]]

    def again(self, values: dict[int, Tensor]) -> tuple[Any, ...]:
        """The outputs where some tensors, by their identity, are others."""
        inputs = [values.get(id(x), x) for x in self.inputs]
        result = self.op(*([inputs] if self.op.variadic else inputs), **self.params)
        return result if isinstance(result, tuple) else (result,)


def record(run: Callable[[], Any]) -> list[Call]:
    """The calls of operators while ``run()`` runs, without those that forms make."""
    calls: list[Call] = []

    def see(op: Op, args: tuple, kwargs: dict, result: Any) -> None:
        inputs, _, params, _ = op.accept(args, kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        calls.append(Call(len(calls), op, list(inputs), dict(zip(op.params, params, strict=True)), outputs))

    with no_grad(), watch(see):
        run()
    return calls


@dataclass
class Path:
    """A way of values: from the root through calls that are linear in it to the sink."""

    root: Tensor
    sink: Tensor
    calls: list[Call]
    into: str = ""  # the parameter that the sink meets next

    def replay(self, root: Tensor) -> np.ndarray:
        """The sink, of another root."""
        values = {id(self.root): root}
        for call in self.calls:
            for old, new in zip(call.outputs, call.again(values), strict=True):
                if isinstance(old, Tensor):
                    values[id(old)] = new
        return _flat(values[id(self.sink)].data)

    @cached_property
    def blank(self) -> np.ndarray:
        """The sink of a root of zeros, [B T C]."""
        return self.replay(Tensor(np.zeros_like(self.root.data)))

    def of(self, root: np.ndarray) -> np.ndarray:
        """What a root changes in the sink, [B T C]."""
        return self.replay(Tensor(root)) - self.blank

    def matrices(self) -> Matrices | None:
        """M of the path; None where the sink is not M times the root."""
        root = self.root.data
        size, (batch, length, channels) = root.shape[-2], self.blank.shape
        if size * length * channels * batch > LARGEST:
            return None
        each = np.empty((channels, batch, length, size))  # [C B T S]
        for s in range(size):
            unit = np.zeros_like(root)
            unit[..., s, :] = 1
            each[..., s] = np.moveaxis(self.of(unit), 2, 0)
        each[np.abs(each) < ROUNDING * np.abs(each).max(axis=(1, 2, 3), keepdims=True, initial=0)] = 0
        return self._checked(each)

    def _checked(self, each: np.ndarray) -> Matrices | None:
        """Channel c of the sink is M_c times one channel of the root: which one, random factors tell."""
        root, random = self.root.data, Random(0)
        values = _flat(root)  # [B S C']
        factors = 1 + random.split(0).uniform((values.shape[2],), np.float64)  # [C']
        course = random.split(1).normal((1, root.shape[-2], 1), np.float64)
        alone = each @ course[0, :, 0]  # [C B T]
        both = np.moveaxis(self.of(_unflat(np.broadcast_to(course * factors, values.shape), root.shape)), 2, 0)  # [C B T]
        seen = (alone * alone).sum(axis=(1, 2))
        ratio = np.divide((alone * both).sum(axis=(1, 2)), seen, out=np.ones(len(seen)), where=seen > 0)
        sources = np.abs(ratio[:, None] - factors).argmin(axis=1)  # [C]
        expected = np.einsum("cbts,bsc->btc", each, values[:, :, sources])
        actual = _flat(self.sink.data) - self.blank
        error = float(np.abs(expected - actual).max(initial=0) / max(np.abs(actual).max(initial=0), 1e-300))
        worst = np.abs(alone * factors[sources][:, None, None] - both).max(initial=0)
        if worst > TOLERANCE * max(np.abs(both).max(initial=0), 1) or (error > TOLERANCE and np.abs(actual).max() > 1e-12):
            return None
        return Matrices.of(each, sources, error if np.abs(actual).max(initial=0) > 1e-12 else 0.0)


@dataclass
class Matrices:
    """The different matrices M [N T S] of a path, and the channels of the sink that each belongs to."""

    values: np.ndarray
    channels: list[list[int]]
    blocks: int  # sequences side by side, such as patches
    error: float  # of M times the values of the pass, relative to the sink
    heads: bool  # whether each belongs to the same number of channels, more than one

    @classmethod
    def of(cls, each: np.ndarray, sources: np.ndarray, error: float) -> Matrices:
        """Those of all channels [C B T S]; neighbours that are equal become one, and several sequences one block matrix."""
        groups: list[list[int]] = []
        for c, matrix in enumerate(each):
            if groups and np.allclose(each[groups[-1][0]], matrix, rtol=1e-9, atol=1e-12):
                groups[-1].append(c)
            else:
                groups.append([c])
        values = np.stack([_blocks(each[group[0]]) for group in groups])
        sizes = Counter(map(len, groups))
        return cls(values, groups, each.shape[1], error, len(sizes) == 1 and len(groups[0]) > 1)

    def same(self, other: Matrices) -> bool:
        """Whether the numbers are the same."""
        return self.values.shape == other.values.shape and np.allclose(self.values, other.values, rtol=1e-7, atol=1e-10)

    @property
    def diagonal(self) -> bool:
        """Whether each position makes itself alone."""
        rows, columns = self.values.shape[1:]
        return rows == columns and not (self.values * (1 - np.eye(rows))).any()

    def name(self, i: int) -> str:
        """How matrix i is called."""
        if len(self.channels) == 1:
            return "all channels"
        return f"head {i + 1}" if self.heads else _channels(self.channels[i])


@dataclass
class Mixing:
    """The matrices of a path, or of one call on it; ``place`` is that of the module in the model."""

    place: str
    title: str
    call: Call  # the first on the path that mixes positions
    path: Path
    matrices: Matrices
    whole: bool  # whether the path is the mixer's, and not that of one call


def mixings(calls: list[Call], model: Module) -> list[Mixing]:
    """All that a forward pass of a model mixes, in its order."""
    graph = _Graph(calls, model)
    with no_grad():
        found = graph.found(lambda call: [call.named(name) for name in values_of(call)])
        found = found or graph.found(_apparent)  # of a model whose operators do not say what they mix
        found += graph.joined(found)
    return sorted(found, key=lambda one: (one.call.place, not one.whole))


def without_matrix(calls: list[Call], found: list[Mixing]) -> list[str]:
    """The operators that mix positions in some calls of which no matrix was found."""
    shown = {id(call) for one in found for call in one.path.calls}
    return list(dict.fromkeys(call.op.name for call in calls if values_of(call) and id(call) not in shown))


def values_of(call: Call) -> list[str]:
    """The inputs of a call in which it is linear and whose positions it mixes."""
    arguments = {a.name: a for a in call.op.signature.inputs}
    outputs = call.op.signature.outputs[0].dims
    return [law.linear for law in call.op.laws if law.linear and (dims := arguments[law.linear].dims) and len(dims) > 2
            and dims[-2] in POSITIONS and dims[-1] in outputs and isinstance(call.named(law.linear), Tensor)]


class _Graph:
    """The calls of a pass as a graph, and where the parameters of the model stand in it."""

    def __init__(self, calls: list[Call], model: Module):
        self.calls = calls
        self.makers = {id(y): call for call in calls for y in call.outputs if isinstance(y, Tensor)}
        self.names = {id(p): name for name, p in model._arrays()}
        self.owners = _owners(model)
        self.readers: dict[int, list[Call]] = {}
        for call in calls:
            for x in call.inputs:
                if isinstance(x, Tensor):
                    self.readers.setdefault(id(x), []).append(call)

    def found(self, values: Callable[[Call], Sequence[Tensor]]) -> list[Mixing]:
        """The matrices of all paths on which a call mixes the positions of its ``values(call)``."""
        shown: list[Mixing] = []
        inside: set[int] = set()  # tensors that lie on a path already
        for call in self.calls:
            for value in values(call):
                if id(value) in inside:
                    continue
                for root in self.roots(value):
                    paths = [(path, made) for path in self.paths(root) if (made := path.matrices()) is not None]
                    if any(call in path.calls for path, _ in paths):
                        break
                else:
                    continue
                for path, made in paths:
                    inside |= {id(x) for c in path.calls for x in (*c.inputs, *c.outputs) if isinstance(x, Tensor)}
                    if mixers := [c for c in path.calls if values(c)]:
                        shown += self.shown(mixers, path, made)
        return shown

    def roots(self, value: Tensor) -> list[Tensor]:
        """Where a value may come from: the farthest tensor first, the value itself last."""
        chain = [value]
        while (maker := self.makers.get(id(chain[-1]))) is not None:
            floats = [x for x in maker.inputs if isinstance(x, Tensor) and not isinstance(x, Parameter)]
            tensors = sum(isinstance(y, Tensor) for y in maker.outputs)
            product = maker.op.name == "multiply" and len(floats) > 0  # whose second factor is the gate of the first
            if tensors != 1 or not (product or len(floats) == 1) or floats[0].ndim < 2:
                break
            if not linear_in(maker, {id(floats[0])}, Random(0)):
                break
            chain.append(floats[0])
        return chain[::-1]

    def paths(self, root: Tensor) -> list[Path]:
        """From a root to all its sinks in the block of layers that it belongs to."""
        moved, calls, sinks, last = {id(root)}, [], {}, None
        first = min((call.place for call in self.readers.get(id(root), ())), default=len(self.calls))
        block = None
        for call in self.calls[first:]:
            keys = {self.block(name) for name in self.parameters(call)} - {None}
            block = block or next(iter(keys), None)
            if block is not None and keys - {block}:
                break  # another block begins
            touched = {id(x) for x in call.inputs if isinstance(x, Tensor)} & moved
            if not touched:
                continue
            if not linear_in(call, touched, Random(1)):
                for key in touched - {id(root)}:
                    sinks.setdefault(key, call)
                continue
            calls.append(call)
            for y in _varying(call, touched):
                moved.add(id(y))
                last = y
        tensors = {id(y): y for call in calls for y in call.outputs if isinstance(y, Tensor)}
        if not sinks and last is not None:
            sinks = {id(last): None}
        return [Path(root, tensors[key], _needed(calls, tensors[key]), self.meets(end)) for key, end in sinks.items()
                if tensors[key].ndim > 1]

    def shown(self, mixers: list[Call], path: Path, matrices: Matrices) -> Iterator[Mixing]:
        """The matrices of a path, and those of its calls that mix, where they differ from them."""
        call = mixers[0]
        parts: list[Mixing] = []
        for c in mixers:
            for name in values_of(c):
                one = Path(c.named(name), c.outputs[0], [c])
                made = one.matrices()
                if made is not None and not made.diagonal and not made.same(matrices):
                    suffix = f" of {name}" if len(values_of(c)) > 1 else ""
                    parts.append(Mixing(self.place(c), f"{c.op.name}{suffix} alone", c, one, made, False))
        title = " + ".join(dict.fromkeys([call.op.name, *(c.op.name for c in mixers if parts)]))
        others = [c.op for c in path.calls if c not in mixers]
        if parts and any(other.name == "multiply" or any(law.linear for law in other.laws) for other in others):
            title += ", gated"
        siblings = sum(1 for c in self.readers.get(id(path.root), ()) if c.op is call.op)
        if siblings > 1 and path.into:
            title += f" before {path.into.rpartition('.')[2] if not path.into.endswith('weight') else path.into.split('.')[-2]}"
        yield Mixing(self.place(call), title, call, path, matrices, True)
        yield from parts
        for c in mixers:
            for law in c.op.laws:
                if law.exact is not None:
                    yield from self.exactly(c, law.exact)

    def exactly(self, call: Call, function: Callable) -> Iterator[Mixing]:
        """The matrices of what an operator says it is an estimate of."""
        values = dict(zip(call.op.places, [*call.inputs, *call.params.values()], strict=True))
        for exact in record(lambda: function(**values))[-1:]:
            exact.place = call.place
            path = Path(exact.named(values_of(exact)[0]), exact.outputs[0], [exact])
            if (made := path.matrices()) is not None:
                yield Mixing(self.place(call), f"{exact.op.name}, which {call.op.name} estimates", exact, path, made, False)

    def joined(self, found: list[Mixing]) -> Iterator[Mixing]:
        """What is mixed twice with nothing but a projection in between: the product of both matrices.

        The first one must be the same for all channels, so that it does not matter that the projection mixes them.
        """
        ends = {id(one.path.sink): one for one in found if one.whole}
        for two in [one for one in found if one.whole]:
            maker = self.makers.get(id(two.path.root))
            while maker is not None and maker.op.view:  # heads are cut out
                maker = next((self.makers.get(id(x)) for x in maker.inputs), None)
            one = next((ends[id(x)] for x in maker.inputs if id(x) in ends), None) if maker is not None else None
            if one is None or len(one.matrices.channels) > 1 or two.matrices.values.shape[2] != one.matrices.values.shape[1]:
                continue
            product = replace(two.matrices, values=two.matrices.values @ one.matrices.values[0],
                              error=max(one.matrices.error, two.matrices.error))
            yield Mixing(two.place, f"{two.title} after {one.title}", two.call, two.path, product, True)

    # -- where a call stands in the model
    def parameters(self, call: Call) -> list[str]:
        """The names of the parameters and buffers that it reads."""
        return [self.names[id(x)] for x in call.inputs if id(x) in self.names]

    def meets(self, call: Call | None) -> str:
        """The first parameter of a call."""
        return next(iter(self.parameters(call)), "") if call is not None else ""

    @staticmethod
    def block(name: str) -> str | None:
        """The layer that a parameter belongs to: its name up to the first number, as blocks.0; None where it has none."""
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbers[0] + 1]) if numbers else None

    def place(self, call: Call) -> str:
        """The module that a call belongs to: the one that has its parameters, or those of the calls that lead to it."""
        if own := [self.owners[name] for name in self.parameters(call)]:
            return own[0]
        seen, queue, nearest = set(), [call], []
        while queue:
            current = queue.pop()
            if current.place in seen:
                continue
            seen.add(current.place)
            if names := self.parameters(current):
                nearest.append((current.place, self.owners[names[0]]))
            else:
                queue += [self.makers[id(x)] for x in current.inputs if id(x) in self.makers]
        if not nearest:
            return ""
        latest = max(nearest)[1]  # or the module around it, if that, too, is near
        return min((place for _, place in nearest if f"{latest}.".startswith(f"{place}.")), key=len)


def _apparent(call: Call) -> list[Tensor]:
    """The inputs whose positions a call mixes although its operator does not say so, as cumsum or a product with weights."""
    op, y = call.op, call.outputs[0]
    if op.view or op.variadic or op.signature.elementwise or not isinstance(y, Tensor):
        return []
    return [x for x in call.inputs if isinstance(x, Tensor) and not isinstance(x, Parameter) and x.ndim == y.ndim > 2
            and x.shape[-1] == y.shape[-1] and linear_in(call, {id(x)}, Random(3))
            and (made := Path(x, y, [call]).matrices()) is not None and not made.diagonal]


def linear_in(call: Call, keys: set[int], random: Random) -> bool:
    """Whether the outputs are linear in some of the tensors, given the others, and no sum runs over their channels."""
    places = [i for i, x in enumerate(call.inputs) if id(x) in keys]
    arguments = call.arguments()
    for i in places:
        channel = arguments[i].dims[-1] if arguments[i].dims else "*"
        if channel not in ("*", "...") and not any(channel in y.dims or "*" in y.dims for y in call.op.signature.outputs):
            return False
    one = {id(call.inputs[i]): call.inputs[i].data for i in places}
    two = {key: random.split(n).normal(x.shape, np.float64).astype(x.dtype) for n, (key, x) in enumerate(one.items())}
    sums = [{key: Tensor(a * one[key] + b * two[key]) for key in one} for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    try:
        with np.errstate(all="ignore"):
            results = [call.again(values) for values in sums]
    except (AutogradError, FloatingPointError):
        return False
    for both, first, second, none in zip(*results, strict=True):
        if not isinstance(both, Tensor):
            if not np.array_equal(both, none):
                return False
            continue
        both, first, second, none = (x.data for x in (both, first, second, none))
        wrong = np.abs(_less(both, first) - _less(second, none)).max(initial=0)
        size = max(np.abs(_less(x, none)).max(initial=0) for x in (both, first, second))
        if not wrong <= TOLERANCE * max(size, 1e-6):
            return False
    return True


def _varying(call: Call, keys: set[int]) -> list[Tensor]:
    """The outputs that change with some of the inputs."""
    values = {id(x): Tensor(Random(2).split(i).normal(x.shape, np.float64).astype(x.dtype))
              for i, x in enumerate(call.inputs) if id(x) in keys}
    return [old for old, new in zip(call.outputs, call.again(values), strict=True)
            if isinstance(old, Tensor) and not np.array_equal(old.data, new.data)]


def _needed(calls: list[Call], sink: Tensor) -> list[Call]:
    """Those of the calls on whose outputs the sink depends."""
    wanted, kept = {id(sink)}, []
    for call in reversed(calls):
        if any(id(y) in wanted for y in call.outputs):
            kept.append(call)
            wanted |= {id(x) for x in call.inputs if isinstance(x, Tensor)}
    return kept[::-1]


def _owners(model: Module) -> dict[str, str]:
    """The place of the module that each parameter belongs to; that of a linear layer belongs to the module around it."""
    owners: dict[str, str] = {}
    for place, module in model._walk():
        if isinstance(module, Module):
            owner = place.rpartition(".")[0] if isinstance(module, Linear) else place
            owners |= {f"{place}.{name}".lstrip("."): owner for name, value in module.members() if isinstance(value, Tensor)}
    return owners


def _less(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b, and 0 where both are the same infinity."""
    return np.subtract(a, b, out=np.zeros_like(a), where=a != b)


def _flat(x: np.ndarray) -> np.ndarray:
    """[.. T K] as [B T C]: the heads of an array [B H T K] side by side."""
    if x.ndim == 2:
        x = x[None]
    x = np.moveaxis(x, -2, 1)  # [B T .. K]
    return x.reshape(*x.shape[:2], -1)


def _unflat(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What ``_flat`` undoes: [B T C] in a shape [.. T K]."""
    full = shape if len(shape) > 2 else (1, *shape)
    moved = (full[0], full[-2], *full[1:-2], full[-1])
    return np.moveaxis(x.reshape(moved), 1, -2).reshape(shape).copy()


def _blocks(matrix: np.ndarray) -> np.ndarray:
    """[B T S] as one matrix [B·T B·S] with a block for each sequence."""
    batch, rows, columns = matrix.shape
    if batch == 1:
        return matrix[0]
    whole = np.zeros((batch, rows, batch, columns))
    whole[np.arange(batch), :, np.arange(batch)] = matrix
    return whole.reshape(batch * rows, batch * columns)


def _channels(group: list[int]) -> str:
    return f"channel {group[0] + 1}" if len(group) == 1 else f"channels {group[0] + 1} to {group[-1] + 1}"
