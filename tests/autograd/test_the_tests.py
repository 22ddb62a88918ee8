"""Tests of the tests: an error planted in any operator must be noticed by the checks that test_operators.py makes."""

from __future__ import annotations

import numpy as np
import pytest

from autograd import REGISTRY, Op, Tensor, distance, to_numpy
from autograd.device import beside
from autograd.draw import Draw, draw_inputs
from autograd.laws import Case
from autograd.ops import reshape, transpose, where
from autograd.verify import (
    check_derivative,
    check_gradients,
    check_values,
    compute,
    declared,
    differentiable,
    differentiate,
    draw_call,
    draw_cotangents,
    flat,
    forms,
    kernels,
    numbers,
    refuses,
)
from tests.autograd.operator_checks import each, tried
from tests.conftest import operators

pytestmark = pytest.mark.full

OPERATORS = operators()
DIFFERENTIABLE = [op for op in OPERATORS if op.differentiable]
VISIBLE = 2e-4  # a planted error counts where it changes a result by this much, relative to the largest value


# -- wrong gradients: functions of the right one -----------------------------------------------------------------------
def scaled(g: Tensor):
    return g * 1.001


def transposed(g: Tensor):
    """The elements in Fortran order under the same shape; those of a vector reversed."""
    if sum(n > 1 for n in g.shape) > 1:
        return reshape(transpose(g), shape=g.shape)
    return reshape(reshape(g, shape=(-1,))[::-1], shape=g.shape) if g.size else g


def with_a_hole(g: Tensor):
    """The largest element was never written."""
    return where(_largest(g.data), 0.0, g)


def skipped(g: Tensor):
    return None


def _largest(array):
    mask = np.zeros(array.shape, bool)
    if array.size:
        mask.flat[np.argmax(np.abs(array))] = True
    return mask


def _passing(change) -> Op:
    """An operator that returns its input, whose gradient is ``change`` of the right one."""
    def passing(x):
        return x

    op = Op(passing, "x[...] -> y[...]")
    del REGISTRY["passing"]
    op.primitive(lambda x: x)
    op.vjp(lambda g: change(g))
    return op


def plant_gradient(monkeypatch, op, route, change, position) -> None:
    """Make the gradient of one input wrong."""
    target = declared(op, route)
    place = position if op.variadic else positions(op).index(position)  # among the inputs with a gradient

    def changed(results):
        return [change(g) if i == place and g is not None else g for i, g in enumerate(results)]

    if route.startswith("kernel"):
        backward = target._get("backward")

        def wrong(values):
            arrived = next(g for g in values[2:] if g is not None)
            wrapped = [None if g is None else Tensor.wrap(to_numpy(g)) for g in backward(values)]
            return tuple(None if g is None else beside(g.data, arrived) for g in changed(wrapped))

        monkeypatch.setitem(target._loaded, "backward", wrong)
    elif target.primitive:
        vjp = target.vjp

        def wrong(**values):
            result = vjp(**values)
            return changed(result if isinstance(result, tuple | list) else [result])

        monkeypatch.setattr(target, "vjp", wrong)
    else:
        call, passing = target._call, _passing(change)

        def wrong(values):
            inputs = values[0] if op.variadic else values
            inputs = [passing(x) if i == position else x for i, x in enumerate(inputs)]
            return call([inputs, *values[1:]] if op.variadic else inputs)

        monkeypatch.setattr(target, "_call", wrong)


def plant_value(monkeypatch, op, route) -> None:
    """Leave the largest element of each output unwritten."""
    target = declared(op, route)

    def holed(result):
        if isinstance(result, tuple):
            return tuple(map(holed, result))
        data = to_numpy(result)
        finite = np.where(np.isfinite(data), data, 0)
        data = np.where(_largest(finite), 0, data).astype(data.dtype)
        return Tensor.wrap(data) if isinstance(result, Tensor) else beside(data, result)

    if route.startswith("kernel"):
        forward = target._get("forward")

        def wrong(values):
            outputs, saved = forward(values)
            return holed(outputs), saved

        monkeypatch.setitem(target._loaded, "forward", wrong)
    else:
        call = target._call
        monkeypatch.setattr(target, "_call", lambda values: holed(call(values)))


# -- each is noticed ---------------------------------------------------------------------------------------------------
def calls(op, route, count=200):
    """Seeded calls of a dtype that the route takes; without an absent input, unless the route takes no such call."""
    for complete in (True, False):
        taken = False
        for seed in range(count):
            draw = Draw.seeded(seed, tried(op, route)[-1])
            args, params = draw_call(op, route, draw)
            absent = any(x is None for x in flat(op, args))
            empty = not any(flat(op, args)[i].size for i in numbers(op, args))
            if not (complete and absent) and not empty and not refuses(op, route, args, params):
                taken = True
                yield draw, args, params
        if taken:
            return


def differ(results, others) -> bool:
    return any(distance(a, b) > VISIBLE for a, b in zip(results, others, strict=True))


def positions(op):
    """The inputs that have a gradient; two elements of a variadic operator's list."""
    return [0, 1] if op.variadic else [i for i, a in enumerate(op.signature.inputs) if a.kind == "float"]


GRADIENTS = [(op, route, change, position) for op in DIFFERENTIABLE for route in forms(op) + kernels(op)
             if differentiable(op, route)
             for change in (scaled, transposed, with_a_hole, skipped) for position in positions(op)]
VALUES = [(op, route) for op in OPERATORS for route in forms(op) + kernels(op)]
LAWS = [(op, law) for op in OPERATORS for law in op.laws]


@each("op, route, change, position", GRADIENTS, group=lambda op, *_: op)
def test_a_wrong_gradient_is_noticed(op, route, change, position, monkeypatch):
    for draw, args, params in calls(op, route):
        if position >= len(flat(op, args)):
            continue
        cotangents = draw_cotangents(op, args, params, draw)
        right = differentiate(op, route, args, params, cotangents)[position]
        with monkeypatch.context() as patch:
            plant_gradient(patch, op, route, change, position)
            wrong = differentiate(op, route, args, params, cotangents)[position]
            if not differ([wrong], [right]):
                continue  # for example a gradient whose elements are all equal, transposed
            try:
                if route.startswith("kernel"):
                    check_gradients(op, route, args, params, cotangents)
                else:
                    check_derivative(op, route, args, params)
            except AssertionError as error:
                assert "gradient" in str(error)
                return
            # In float32 the error of a gradient that is small for its units hides in their rounding.
            assert tried(op, route)[-1] is np.float32, f"{op.name}: not noticed"
    pytest.fail(f"no draw of {op.name} shows the error")


@each("op, route", VALUES, group=lambda op, route: op)
def test_an_unwritten_element_is_noticed(op, route, monkeypatch):
    for _, args, params in calls(op, route):
        right = compute(op, route, args, params)
        with monkeypatch.context() as patch:
            plant_value(patch, op, route)
            if not differ(compute(op, route, args, params), right):
                continue
            with pytest.raises(AssertionError):
                check_values(op, route, args, params)
        return
    pytest.fail(f"no draw of {op.name} shows the error")


@each("op, law", LAWS)
def test_a_broken_law_is_noticed(op, law):
    """Outputs to which a square of all inputs, weighted by position, is added obey no law."""
    def broken(args, params):
        excess = sum(float(np.sum(flat(op, args)[i].ravel() ** 2 * np.arange(1, flat(op, args)[i].size + 1)))
                     for i in numbers(op, args))
        with np.errstate(invalid="ignore"):  # -∞, the key of what never was, and its square
            return tuple((o + excess).astype(o.dtype) for o in compute(op, "definition", args, params))

    for seed in range(100):
        draw = Draw.seeded(seed)
        args, params = draw_inputs(op, draw)
        try:
            law.check(Case(op, args, params, broken), draw)
        except Exception:  # of whatever kind: an index that was changed may be out of range
            return
    pytest.fail(f"no draw of {op.name} shows the error")


def test_a_case_is_a_call_by_name():
    op = REGISTRY["retention"]
    args = [np.full(shape, 2.0, np.float32) for shape in ((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 1), (1,), (1, 1, 2, 1))]
    case = Case(op, (*args, None, None), {}, lambda args, params: compute(op, "definition", args, params))
    y, state, _, count = compute(op, "definition", (args[0], args[1], args[2], np.ones(1, np.float32), None, None, None), {})
    changed = case.anew(decay=1.0)  # a number is an array of the input's shape and dtype
    assert case.normalization == "none" and case.z is None and list(case.present("state z")) == ["state"]
    assert changed.y.dtype == np.float32 and np.array_equal(changed.y, y) and np.array_equal(changed.state, state)
    assert changed.count is changed[3] and np.array_equal(changed.count, count)  # though a tuple has a method of this name
    assert not np.array_equal(case(decay=1.0).y, y)
    with pytest.raises(AttributeError, match="no output 'n', there are y, state, z, count"):
        _ = changed.n
    with pytest.raises(AttributeError, match="nothing is called 'gamma'"):
        case(gamma=1.0)
    linear = Case(REGISTRY["bidirectional_wkv"], tuple(np.ones(s) for s in ((1, 3, 1), (1, 3, 1), 1, 1)), {}, None)
    assert np.allclose(linear.defined_by(REGISTRY["wkv"], v=linear.k * 5).y, 5)


def test_a_written_input_is_noticed(monkeypatch):
    op = REGISTRY["exp"]

    def wrong(x):
        y = np.exp(x)
        x += 1
        return y

    monkeypatch.setattr(op.forms["array"], "_call", lambda values: wrong(values[0]))
    with pytest.raises(AssertionError, match="wrote to its input x"):
        check_values(op, "form array", (np.ones(3),), {})


@pytest.mark.parametrize("wrong", [lambda x: np.exp(x).astype(np.float64), lambda x: np.exp(x)[None]],
                         ids=["widened", "with another shape"])
def test_a_wrong_dtype_or_shape_is_noticed(wrong, monkeypatch):
    op = REGISTRY["exp"]
    monkeypatch.setattr(op.forms["array"], "_call", lambda values: wrong(values[0]))
    with pytest.raises(AssertionError):
        check_values(op, "form array", (np.ones(3, np.float32),), {})
