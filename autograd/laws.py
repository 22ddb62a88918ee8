"""Laws: statements about an operator that hold for every input, declared beside it and enumerated by tests.

A law has a name and ``check(op, args, params, run, draw)``, which raises AssertionError when it does not hold. ``run``
is a function from the operator's arrays to a tuple of output arrays: the definition, a form or a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .check import assert_close


@dataclass(frozen=True)
class Law:
    """One statement and how to test it."""

    name: str
    check: Callable

    def __str__(self) -> str:
        return self.name


def _axis(argument, letter):
    return argument.dims.index(letter) - len(argument.dims)


def _has(op, args, params, given) -> bool:
    """Whether inputs and parameters of a call are what a law asks for."""
    values = dict(zip((a.name for a in op.signature.inputs), args, strict=True)) | params
    return all(values[name] is value for name, value in given.items())


def causal(inputs: str, letter: str = "T", **given) -> Law:
    """Output at position t does not depend on the named inputs after t, in calls with the ``given`` inputs and parameters."""

    def check(op, args, params, run, draw):
        if not _has(op, args, params, given):
            return
        names = inputs.split()
        args = list(args)
        position = next(i for i, a in enumerate(op.signature.inputs) if a.name in names)
        length = args[position].shape[_axis(op.signature.inputs[position], letter)]
        if length < 2:
            return
        cut = draw.integer(1, length - 1)
        before = run(tuple(args), params)
        for i, argument in enumerate(op.signature.inputs):
            if argument.name in names:
                axis = _axis(argument, letter)
                changed = np.moveaxis(args[i].copy(), axis, 0)
                changed[cut:] = draw.floats(*changed[cut:].shape)
                args[i] = np.moveaxis(changed, 0, axis)
        after = run(tuple(args), params)
        for argument, old, new in zip(op.signature.outputs, before, after, strict=True):
            if letter not in argument.dims:  # a state, after everything
                continue
            axis = _axis(argument, letter)
            assert_close(np.moveaxis(new, axis, 0)[:cut], np.moveaxis(old, axis, 0)[:cut],
                         f"{op.name}: {argument.name} before position {cut} depends on later inputs")

    return Law(f"causal in {inputs} over {letter}", check)


def independent(letters: str, **fixed) -> Law:
    """Each index of the named axes is computed on its own: selecting one before or after is the same.

    ``fixed`` replaces inputs and parameters that tie the axes together on purpose, such as ``mask=None``.
    """

    def check(op, args, params, run, draw):
        names = [a.name for a in op.signature.inputs]
        args = tuple(fixed.get(n, x) for n, x in zip(names, args, strict=True))
        params = {**params, **{k: v for k, v in fixed.items() if k not in names}}
        for letter in letters.split():
            sizes = {a.shape[_axis(arg, letter)] for arg, a in zip(op.signature.inputs, args, strict=True)
                     if a is not None and letter in arg.dims}
            size = sizes.pop()
            if size == 0:
                continue
            pick = draw.integer(0, size - 1)

            def select(argument, array, letter=letter, pick=pick):
                if array is None or letter not in argument.dims:
                    return array
                return np.take(array, [pick], axis=_axis(argument, letter))

            alone = run(tuple(map(select, op.signature.inputs, args)), params)
            together = run(args, params)
            for argument, one, many in zip(op.signature.outputs, alone, together, strict=True):
                assert_close(one, select(argument, many), f"{op.name}: {letter} = {pick} depends on the others")

    return Law(f"independent over {letters}", check)


def linear_in(name: str) -> Law:
    """f(.., a u + w, ..) = a f(.., u, ..) + f(.., w, ..) - f(.., 0, ..): affine in the named input."""

    def check(op, args, params, run, draw):
        position = [a.name for a in op.signature.inputs].index(name)
        u, w, scale = args[position], draw.floats(*args[position].shape), 0.5

        def at(value):
            return run((*args[:position], value, *args[position + 1:]), params)

        for both, one, other, none in zip(at(u * u.dtype.type(scale) + w), at(u), at(w), at(np.zeros_like(u)),
                                          strict=True):
            change = np.subtract(one, none, out=np.zeros_like(one), where=one != none)  # where both are infinite, 0
            assert_close(both, scale * change + other, f"{op.name} is not linear in {name}", terms=8)

    return Law(f"linear in {name}", check)


def streams(letter: str = "T", **given) -> Law:
    """Two segments, the state after the first carried into the second, give what one pass gives.

    The law is about calls with the ``given`` inputs and parameters.
    """

    def check(op, args, params, run, draw):
        if not _has(op, args, params, given):
            return
        inputs, outputs, states = op.signature.inputs, op.signature.outputs, op.signature.states
        lengths = {x.shape[_axis(a, letter)] for a, x in zip(inputs, args, strict=True) if x is not None and letter in a.dims}
        cut = draw.integer(0, lengths.pop())

        def segment(part, state):
            return run(tuple(state.get(a.name, x) if x is None or letter not in a.dims
                             else np.moveaxis(np.moveaxis(x, _axis(a, letter), 0)[part], 0, _axis(a, letter))
                             for a, x in zip(inputs, args, strict=True)), params)

        first = segment(slice(0, cut), {})
        second = segment(slice(cut, None), {a.name: y for a, y in zip(outputs, first, strict=True) if a.name in states})
        for argument, whole, one, two in zip(outputs, run(args, params), first, second, strict=True):
            joined = np.concatenate([one, two], axis=_axis(argument, letter)) if letter in argument.dims else two
            assert_close(joined, whole, f"{op.name}: {argument.name} depends on the cut at {cut}", terms=64)

    return Law(f"streams over {letter}", check)


def shift_invariant(inputs: str, moves: str = "", *, step: float = 2.0**-8, **fixed) -> Law:
    """A large constant added to all the named inputs changes no output, and adds itself to those that ``moves`` names.

    Float inputs are rounded to multiples of ``step``, so that nothing is lost when the constant is added: what differs then
    is a fault. Sums of inputs lose nothing either; products need a larger step. ``fixed`` is that of ``independent``.
    """

    def check(op, args, params, run, draw):
        names = [a.name for a in op.signature.inputs]
        args = [fixed.get(n, x) for n, x in zip(names, args, strict=True)]
        args = [x if x is None or x.dtype.kind != "f" else np.rint(x / x.dtype.type(step)) * x.dtype.type(step) for x in args]
        params = {**params, **{k: v for k, v in fixed.items() if k not in names}}
        constant = draw.dtype.type(2.0**13 if draw.dtype.itemsize == 4 else 2.0**40)
        moved = tuple(x if x is None or n not in inputs.split() else x + constant for n, x in zip(names, args, strict=True))
        before, after = run(tuple(args), params), run(moved, params)
        for argument, old, new in zip(op.signature.outputs, before, after, strict=True):
            assert_close(new, old + constant if argument.name in moves.split() else old,
                         f"{op.name}: {argument.name} changes when {constant:g} is added to {inputs}", terms=64)

    return Law(f"unchanged by a constant added to {inputs}", check)


def identity(name: str, statement: Callable) -> Law:
    """A named identity: ``statement(args, params, run, draw)`` raises AssertionError when it fails."""
    return Law(name, lambda op, args, params, run, draw: statement(args, params, run, draw))
