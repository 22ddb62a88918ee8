"""Laws: statements about an operator that hold for every input, declared beside it and enumerated by tests.

A law has a name and ``check(case, draw)``, which raises AssertionError when it does not hold. A *case* is a call of the
operator along one route, by name:

    case.q, case["q"]                  an input (None if absent) or a parameter
    case().y, case().state             the outputs of this call, as arrays
    case(decay=1.0, mask=None).y       those of the call with other inputs or parameters
    case.anew(decay=1.0).y             the same without the state that an earlier call handed on
    case.defined_by(aft_full).y        what another operator's definition says of it
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .errors import KernelError, ShapeError
from .metric import assert_close


class Outputs(tuple):
    """The arrays that a call gives, in order and by the names of the signature."""

    def __new__(cls, op, arrays):
        outputs, names = super().__new__(cls, arrays), [a.name for a in op.signature.outputs]
        vars(outputs).update(zip(names, outputs if len(names) == len(outputs) else [tuple(outputs)], strict=True))
        return outputs  # by way of ``vars``, an output may be called count or index, as a tuple's methods are

    def __getattr__(self, name: str):
        raise AttributeError(f"no output {name!r}, there are {', '.join(vars(self))}")


class Case:
    """A call of ``op``: its inputs and parameters by name, and ``compute(args, params)``, which gives the outputs."""

    def __init__(self, op, args, params, compute: Callable):
        self.op, self._compute = op, compute
        self._names = [a.name for a in op.signature.inputs]
        self._values = dict(zip(self._names, args, strict=True)) | {**op.params, **params}

    def __getitem__(self, name: str):
        if name not in self._values:
            raise AttributeError(f"{self.op.name}: nothing is called {name!r}, there are {', '.join(self._values)}")
        return self._values[name]

    def __getattr__(self, name: str):
        if name.startswith("_"):  # asked for by copy, before there are values
            raise AttributeError(name)
        return self[name]

    def __call__(self, **changes) -> Outputs:
        """The outputs of the call with these inputs and parameters instead; a number becomes an array of the input's shape."""
        values = {**self._values, **{name: self._shaped(name, value) for name, value in changes.items()}}
        args = tuple(values.pop(name) for name in self._names)
        return Outputs(self.op, self._compute(args, values))

    def anew(self, **changes) -> Outputs:
        """The outputs of the call with these changes, and without a state from an earlier call."""
        return self(**{**dict.fromkeys(self.op.signature.states), **changes})

    def defined_by(self, other, **changes) -> Outputs:
        """What the definition of another operator gives for the inputs and parameters that have the same names, without a
        state from an earlier call, and for these others.
        """
        shared = {name: value for name, value in self._values.items()
                  if name in other.places and name not in other.signature.states}
        with np.errstate(all="ignore"):
            result = other.definition(**{**shared, **changes})
        return Outputs(other, result if isinstance(result, tuple) else (result,))

    def definition(self, **changes) -> Outputs:
        """What the definition makes, in float64, of the call with these inputs and parameters instead."""
        values = {name: _each(_widened, x) for name, x in {**self._values, **changes}.items()}
        result = self.op.definition(**{name: values[name] for name in (*self._names, *self.op.params)})  # not tuning numbers
        return Outputs(self.op, result if isinstance(result, tuple) else (result,))

    def _shaped(self, name: str, value):
        before = self[name]  # an unknown name raises
        if name in self._names and isinstance(before, np.ndarray) and isinstance(value, int | float):
            return np.full_like(before, value)
        return value

    def has(self, values: dict) -> bool:
        """Whether inputs and parameters are what a law asks for."""
        return all(self[name] is value for name, value in values.items())

    def present(self, names: str) -> dict[str, np.ndarray]:
        """The named inputs, but for those that are absent."""
        return {name: self[name] for name in names.split() if self[name] is not None}

    def inputs(self, letter: str) -> dict[str, tuple[np.ndarray, int]]:
        """The inputs that have an axis of this letter, and that axis."""
        places = {a.name: axis(a, letter) for a in self.op.signature.inputs if letter in a.dims}
        if not places:
            raise ShapeError(f"{self.op.name}: no input has an axis {letter}: {self.op.signature}")
        return {name: (x, places[name]) for name, x in self.present(" ".join(places)).items()}


def _each(function: Callable, x):
    """A function of an array, or of each of a variadic operator's list."""
    return list(map(function, x)) if isinstance(x, list) else function(x)


def _widened(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


@dataclass(frozen=True)
class Edge:
    """An identity: ``general`` becomes ``special`` if it is restricted as ``when`` says. Both are names of operators or of
    variants, or words for something that is neither, such as "Fourier transform".
    """

    general: str
    special: str
    when: str


@dataclass(frozen=True)
class Law:
    """One statement and how to test it."""

    name: str
    check: Callable
    except_for: tuple[str, ...] = ()  # forms, and kernels or their candidates, whose algorithm cannot keep it
    linear: str | None = None  # the input in which the outputs are linear, where that is the statement
    exact: Callable | None = None  # what the operator estimates, where that is the statement: another one, called by names
    edge: Edge | None = None  # of an identity

    def __str__(self) -> str:
        return self.name

    def holds_for(self, route: str) -> bool:
        """Whether it is a statement about this route, "form <name>" or "kernel <name>"."""
        return not set(self.except_for) & set(route.split())


def axis(argument, letter: str) -> int:
    """Where an argument of a signature has a letter, counted from the end."""
    return argument.dims.index(letter) - len(argument.dims)


def causal(inputs: str, letter: str = "T", except_for: tuple[str, ...] = (), inexact: tuple[str, ...] = (),
           **conditions) -> tuple[Law, ...]:
    """Output at position t does not depend on the named inputs after t, in calls with these ``conditions``.

    An input along another axis is ``name:letter``; its last position belongs to the last of ``letter``. These are two laws:
    later inputs may be other numbers; and they may be NaN or infinite, which 0 times them would show, but not for the forms
    and kernels that ``except_for`` names. For those that ``inexact`` names, which add up all positions so that the later ones
    cancel, a third law stands in place of the first: earlier outputs change by rounding alone, relative to the largest output.
    """
    places = [(name, symbol or letter) for name, _, symbol in (part.partition(":") for part in inputs.split())]

    def check(case, draw, values, to_rounding=False):
        if not case.has(conditions):
            return
        x, at = case.inputs(letter)[places[0][0]]
        length = x.shape[at]
        if length < 2:
            return
        cut, changes = draw.integer(1, length - 1), {}
        for name, symbol in places:
            x, at = case.inputs(symbol)[name]
            changed = np.moveaxis(changes.get(name, x).copy(), at, 0)
            first = max(len(changed) - (length - cut), 0)
            changed[first:] = values(*changed[first:].shape)
            changes[name] = np.moveaxis(changed, 0, at)
        for argument, old, new in zip(case.op.signature.outputs, case(), case(**changes), strict=True):
            if letter in argument.dims:  # else a state, after everything
                at = axis(argument, letter)
                earlier = [np.moveaxis(y, at, 0)[:cut] for y in (new, old)]
                if to_rounding:
                    largest = max(np.abs(y).max(initial=0) for y in (old, new))
                    earlier = [np.append(y, largest).astype(y.dtype) for y in earlier]
                assert_close(*earlier, f"{case.op.name}: {argument.name} before position {cut} depends on later inputs")

    def numbers(case, draw):
        check(case, draw, draw.floats)

    def rounded(case, draw):
        check(case, draw, draw.floats, to_rounding=True)

    def no_numbers(case, draw):
        with contextlib.suppress(KernelError):  # a kernel that declines such numbers leaks nothing
            check(case, draw, lambda *shape: np.full(shape, draw.choice((np.nan, np.inf, -np.inf))))

    name = f"causal in {inputs} over {letter}"
    laws = Law(name, numbers, inexact), Law(f"{name}, where what comes later is no number", no_numbers, except_for)
    return (*laws, Law(f"{name}, to rounding", rounded)) if inexact else laws


def independent(letters: str, **fixed) -> Law:
    """Each index of the named axes is computed on its own: selecting one before or after is the same.

    ``fixed`` replaces inputs and parameters that tie the axes together on purpose, such as ``mask=None``.
    """

    def check(case, draw):
        for letter in letters.split():
            places = {name: place for name, place in case.inputs(letter).items() if name not in fixed}
            size = {x.shape[at] for x, at in places.values()}.pop()
            if size == 0:
                continue
            pick = draw.integer(0, size - 1)
            alone = case(**fixed, **{name: np.take(x, [pick], axis=at) for name, (x, at) in places.items()})
            for argument, one, many in zip(case.op.signature.outputs, alone, case(**fixed), strict=True):
                expected = np.take(many, [pick], axis=axis(argument, letter)) if letter in argument.dims else many
                assert_close(one, expected, f"{case.op.name}: {letter} = {pick} depends on the others")

    return Law(f"independent over {letters}", check)


def linear_in(name: str) -> Law:
    """f(.., a u + w, ..) = a f(.., u, ..) + f(.., w, ..) - f(.., 0, ..): affine in the named input."""

    def check(case, draw):
        u = case[name]
        w, scale = draw.floats(*u.shape), 0.5
        calls = [case(**{name: x}) for x in (u * u.dtype.type(scale) + w, u, w, np.zeros_like(u))]
        for both, one, other, none in zip(*calls, strict=True):
            change = np.subtract(one, none, out=np.zeros_like(one), where=one != none)  # where both are infinite, 0
            assert_close(both, scale * change + other, f"{case.op.name} is not linear in {name}", terms=8)

    return Law(f"linear in {name}", check, linear=name)


def streams(letter: str = "T", **conditions) -> Law:
    """Two segments, the state after the first carried into the second, give what one pass gives.

    The law is about calls with these inputs and parameters: the ``conditions``.
    """

    def check(case, draw):
        if not case.has(conditions):
            return
        places, outputs, states = case.inputs(letter), case.op.signature.outputs, case.op.signature.states
        cut = draw.integer(0, {x.shape[at] for x, at in places.values()}.pop())

        def segment(part, state):
            return case(**state, **{name: np.moveaxis(np.moveaxis(x, at, 0)[part], 0, at) for name, (x, at) in places.items()})

        first = segment(slice(0, cut), {})
        second = segment(slice(cut, None), {a.name: y for a, y in zip(outputs, first, strict=True) if a.name in states})
        for argument, whole, one, two in zip(outputs, case(), first, second, strict=True):
            joined = np.concatenate([one, two], axis=axis(argument, letter)) if letter in argument.dims else two
            assert_close(joined, whole, f"{case.op.name}: {argument.name} depends on the cut at {cut}", terms=64)

    return Law(f"streams over {letter}", check)


def shift_invariant(inputs: str, what: str | None = None, *, moves: str = "", but_for: str = "", large: bool = True,
                    step: float = 2.0**-8, except_for: tuple[str, ...] = (), **fixed) -> Law:
    """A constant added to all named inputs, which ``what`` describes, changes no output but adds itself to those of ``moves``.
    The law says nothing about the outputs ``but_for``.

    Float inputs are rounded to multiples of ``step``, so that nothing is lost when a large constant is added: what differs
    then is a fault. Sums of inputs lose nothing either; products need a larger step. ``fixed`` replaces inputs and parameters.
    """
    what = what or inputs

    def check(case, draw):
        def rounded(x):
            return np.rint(x / x.dtype.type(step)) * x.dtype.type(step)

        names = " ".join(a.name for a in case.op.signature.inputs if a.kind == "float" and a.name not in fixed)
        arguments = {**fixed, **{name: rounded(x) for name, x in case.present(names).items()}}
        constant = draw.dtype.type((2.0**13 if draw.dtype.itemsize == 4 else 2.0**40) if large else 3)
        shifted = {name: arguments[name] + constant for name in inputs.split() if arguments.get(name) is not None}
        for argument, old, new in zip(case.op.signature.outputs, case(**arguments), case(**arguments | shifted), strict=True):
            if argument.name in but_for.split():
                continue
            assert_close(new, old + constant if argument.name in moves.split() else old,
                         f"{case.op.name}: {argument.name} changes when {constant:g} is added to {what}", terms=64)

    return Law(f"a {'large ' * large}constant added to {what} changes nothing", check, except_for)


def non_finite(*values: float) -> Law:
    """Of NaN, ∞ and -∞ (or the ``values``) among its float inputs, a route makes what the definition makes of them."""
    values = values or (math.nan, math.inf, -math.inf)

    def check(case, draw):
        generator, chosen = draw.generator(), draw.choice([*values, None])  # None: a mixture

        def spoiled(x):
            new = generator.choice(values, x.shape) if chosen is None else chosen
            return np.where(generator.random(x.shape) < 0.2, new, x).astype(x.dtype)

        changes = {a.name: _each(spoiled, getattr(case, a.name)) for a in case.op.signature.inputs
                   if a.kind == "float" and getattr(case, a.name) is not None and draw.integer(0, 3)}
        outputs = case(**changes)
        with np.errstate(all="ignore"):
            expected = case.definition(**changes)
        for argument, output, right in zip(case.op.signature.outputs * len(outputs), outputs, expected, strict=False):
            assert_close(output, right, f"{case.op.name}: {argument.name} is not the definition's where values are not finite",
                         terms=64)

    return Law("what is not finite comes out as the definition has it", check)


def identity(name: str, statement: Callable) -> Law:
    """A named identity: ``statement(case, draw)`` raises AssertionError when it fails."""
    return Law(name, statement)


def law(op, name: str) -> Callable:
    """Declare a named identity of ``op`` below its algorithm: ``statement(case, draw)`` raises AssertionError when it fails."""
    return _declared(op, partial(identity, name))


def becomes(op, other: str, when: str, *, exact: Callable | None = None) -> Callable:
    """Declare an identity: restricted as ``when`` says, ``op`` is another operator, or what these words mean.

    Of an estimate, ``exact`` takes the inputs and parameters by name and calls the operator that is estimated; it gives None
    where there is none.
    """
    name = f"becomes {other} if {when}"
    return _declared(op, lambda statement: Law(name, statement, edge=Edge(op.name, other, when), exact=exact))


def special_case(op, other: str, when: str) -> Callable:
    """Declare the identity from its other end: ``op`` is what another operator becomes."""
    name = f"is what {other} becomes if {when}"
    return _declared(op, lambda statement: Law(name, statement, edge=Edge(other, op.name, when)))


def _declared(op, make: Callable[[Callable], Law]) -> Callable:
    def declare(statement: Callable) -> Callable:
        op.laws += (make(statement),)
        return statement

    return declare
