"""What every operator does at its edges, by family; the name of a case stands in the brackets of its test.

A case is run in float32 and in float64, with and without kernels. Its expected values are worked out by hand or by code
that shares nothing with the engine, and the gradient is compared as well, at cotangents that are not all ones.
"""

from __future__ import annotations

import itertools
import math
import threading
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial

import numpy as np
import pytest

import autograd as ag
from autograd import (
    DomainError,
    DtypeError,
    GraphError,
    KernelError,
    ShapeError,
    Tensor,
    assert_close,
    gradcheck,
    gradients,
    use,
)
from autograd.cpu.compile import FLAGS
from autograd.draw import Draw, draw_inputs
from autograd.laws import Case
from autograd.verify import (
    check_gradients,
    check_values,
    compute,
    differentiable,
    differentiate,
    draw_cotangents,
    flat,
    floats,
    listed,
    parsed,
    routes,
    unflat,
)
from autograd.verify import kernels as kernels_of
from minitv.ops import aft_simple, attention, gated
from tests.autograd.operator_checks import awkward_calls, each, marks, specimen, tried
from tests.conftest import full, operators
from tests.minitv import models
from tests.minitv.models import mean_loss

DTYPES = (np.float32, np.float64)
COMPILED = DTYPES if full() else DTYPES[:1]  # the dtypes in which kernels are tried
KERNELS = [op for op in operators() if any(kernel.device == "cpu" for kernel in op.kernels.values())]
NAN, INF, PI = math.nan, math.inf, math.pi
SIZES = (0, 1, 31, 32, 33, 255, 256, 257, 1025)  # around the widths of vectors, blocks and panels


def table(names: str, cases: dict):
    """Parametrise over a dictionary, whose keys are the names of the cases."""
    return pytest.mark.parametrize(names, list(cases.values()), ids=list(cases))


def some(*shape, seed=0) -> np.ndarray:
    """Generic numbers that float32 represents exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def apart(*shape) -> np.ndarray:
    """Numbers at least 0.1 from each other."""
    size = math.prod(shape)
    return (np.random.default_rng(size).permutation(size) * 0.1 + 0.3).reshape(shape)


@contextmanager
def forms():
    with np.errstate(all="ignore"), use(kernel="none"):
        yield


@contextmanager
def kernels():
    with np.errstate(all="ignore"):
        yield


ROUTES = [*itertools.product(DTYPES, (forms,)), *itertools.product(COMPILED, (kernels,))]


def run(function, inputs, cotangent, dtype):
    """The output of a function of Tensors, or its first one, and its gradients at a cotangent, as arrays."""
    tensors = [Tensor(np.asarray(x, dtype), requires_grad=True) for x in inputs]
    output = function(*tensors)
    output = output[0] if isinstance(output, tuple) else output
    seed = np.broadcast_to(np.asarray(cotangent, dtype), output.shape)
    return output.data, [g.data for g in gradients(output, tensors, Tensor(seed))]


def agree(actual, expected, dtype, what, terms):
    """An array, of that dtype, close to what is expected; a zero that is expected is an exact zero."""
    expected = np.asarray(expected, np.float64)
    assert type(actual) is np.ndarray and actual.dtype == dtype, f"{what}: {type(actual).__name__} of {actual.dtype}"
    assert_close(actual, expected, what, terms)
    assert not actual[expected == 0].any(), f"{what}: {actual} where zeros are expected: {expected}"


def expect(function, inputs, value, cotangent=1.0, slopes=None, *, terms=1):
    """Along every route: the value, and the gradient of each input (None: zeros of its shape)."""
    slopes = [np.zeros(np.shape(x)) for x in inputs] if slopes is None else slopes
    for dtype, route in ROUTES:
        with route():
            output, found = run(function, inputs, cotangent, dtype)
        agree(output, value, dtype, "value", terms)
        for i, (gradient, slope) in enumerate(zip(found, slopes, strict=True)):
            agree(gradient, slope, dtype, f"gradient of input {i}", terms)


def refuse(error, words, function, *inputs):
    """Along every route: the exception, whose message begins with the first word and has the others."""
    for dtype, route in ROUTES:
        with route(), pytest.raises(error) as caught:
            function(*(Tensor(np.asarray(x, dtype), requires_grad=True) for x in inputs))
        message = str(caught.value)
        assert message.startswith(f"{words[0]}:") and [w for w in words if w not in message] == [], message


def add_up(gradient, shape) -> np.ndarray:
    """A gradient added up over what broadcasting repeated, element by element."""
    out = np.zeros(shape)
    lead = gradient.ndim - len(shape)
    for index in np.ndindex(gradient.shape):
        out[tuple(0 if n == 1 else i for i, n in zip(index[lead:], shape, strict=True))] += gradient[index]
    return out


# -- broadcasting ------------------------------------------------------------------------------------------------------
PAIRS = [((), ()), ((), (3,)), ((3,), ()), ((1,), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((2, 1, 3), (4, 1)),
         ((1, 1), (2, 3)), ((2, 3), (1, 2, 1)), ((), (0,)), ((1,), (0,)), ((2, 1), (2, 0)), ((0, 3), (1, 1))]
BINARY = {  # the function and its two derivatives
    "add": (ag.add, np.add, lambda x, y: 1 + 0 * (x + y), lambda x, y: 1 + 0 * (x + y)),
    "subtract": (ag.subtract, np.subtract, lambda x, y: 1 + 0 * (x + y), lambda x, y: -1 + 0 * (x + y)),
    "multiply": (ag.multiply, np.multiply, lambda x, y: y + 0 * x, lambda x, y: x + 0 * y),
    "divide": (ag.divide, np.divide, lambda x, y: 1 / y + 0 * x, lambda x, y: -x / y**2),
    "power": (ag.power, np.power, lambda x, y: y * x ** (y - 1), lambda x, y: x**y * np.log(x)),
    "maximum": (ag.maximum, np.maximum, lambda x, y: 1.0 * (x > y), lambda x, y: 1.0 * (y > x)),
    "minimum": (ag.minimum, np.minimum, lambda x, y: 1.0 * (x < y), lambda x, y: 1.0 * (y < x)),
}


@pytest.mark.parametrize("shapes", PAIRS, ids=lambda pair: f"{pair[0]} and {pair[1]}")
@table(("op", "function", "by_x", "by_y"), BINARY)
def test_broadcast_all_pairs(op, function, by_x, by_y, shapes):
    """A size of 1 against 0 included: then the gradient of the larger is zeros, not empty."""
    x, y = (np.exp(some(*shape, seed=i)).astype(np.float32).astype(np.float64) for i, shape in enumerate(shapes))
    g = some(*np.broadcast_shapes(*shapes), seed=2)
    expect(op, [x, y], function(x, y), g, [add_up(g * by_x(x, y), x.shape), add_up(g * by_y(x, y), y.shape)], terms=4)


@pytest.mark.parametrize("shapes", [((2, 1), (1, 3), ()), ((), (3,), (2, 1)), ((2, 3), (), ()), ((3,), (2, 1, 1), (1,)),
                                    ((2, 0), (1,), ()), ((0,), (), (1,)), ((1, 1), (), (2, 3))], ids=str)
def test_the_branches_of_where_broadcast_against_the_condition(shapes):
    condition, x, y = (some(*shape, seed=i) for i, shape in enumerate(shapes))
    condition = condition > -0.2
    g = some(*np.broadcast_shapes(*shapes), seed=3)
    chosen = np.broadcast_to(condition, g.shape)
    expect(lambda x, y: ag.where(condition, x, y), [x, y], np.where(condition, x, y), g,
           [add_up(np.where(chosen, g, 0.0), x.shape), add_up(np.where(chosen, 0.0, g), y.shape)], terms=4)


def test_a_number_as_a_branch_of_where():
    condition, g = np.array([[True], [False]]), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    expect(lambda x: ag.where(condition, x, 0.0), [[[7.0, 8.0, 9.0]]], [[7.0, 8.0, 9.0], [0.0, 0.0, 0.0]], g,
           [[[1.0, 2.0, 3.0]]])


def test_the_branch_of_where_that_is_not_taken_may_hold_anything():
    expect(lambda x, y: ag.where(np.array([True, False]), x, y), [[1.0, NAN], [INF, 2.0]], [1.0, 2.0], [3.0, 5.0],
           [[3.0, 0.0], [0.0, 5.0]])


def test_where_hides_values_but_not_the_slopes_behind_them():
    """As documented: the argument has to be made safe first."""
    x = [-1.0, 4.0]
    expect(lambda x: ag.where(x > 0, ag.sqrt(x), 0.0), [x], [0.0, 2.0], 3.0, [[NAN, 0.75]])
    expect(lambda x: ag.where(x > 0, ag.sqrt(ag.where(x > 0, x, 1.0)), 0.0), [x], [0.0, 2.0], 3.0, [[0.0, 0.75]])


def test_one_gradient_array_reaches_two_parents_and_is_added_to_once_each():
    """add hands the same array to both of its inputs, before and after each of them got others."""
    for late in (False, True):
        def function(x, y, late=late):
            a, b = x * 2.0, y * 3.0
            both = None if late else a + b
            others = [a * 5.0, a * 7.0, b * 11.0]
            both = a + b if late else both
            return others[0] + others[1] + (both + others[2])

        expect(function, [[1.0], [1.0]], [2 * 13.0 + 3 * 12.0], [10.0], [[260.0], [360.0]])


# -- dtypes: what NumPy would widen ------------------------------------------------------------------------------------
@table("call", {
    "x / sqrt(int)": lambda x: x / np.sqrt(4), "sqrt(int) * x": lambda x: np.sqrt(4) * x,
    "x / prod(shape)": lambda x: x / np.prod((2, 2)), "int64 - x": lambda x: np.int64(2) - x,
    "x ** float64": lambda x: x ** np.float64(2), "x @ float64": lambda x: x @ np.ones(2),
    "where": lambda x: ag.where(np.array([True, False]), x, np.float64(0)), "x + bool": lambda x: x + np.True_})
def test_a_numpy_scalar_does_not_widen(call):
    with pytest.raises(DtypeError, match=r"float64|int64|bool"):
        call(Tensor(np.ones(2, np.float32)))


@table("call", {"x * float32": lambda x: x * np.float32(3), "float32 * x": lambda x: np.float32(3) * x,
                "x * int": lambda x: x * 3, "float * x": lambda x: 3.0 * x,
                "x * 0-d": lambda x: x * np.array(3, np.float32)})
def test_numbers_that_do_not_widen(call):
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    y = call(x)
    y.sum().backward()  # the seed is made by the engine
    assert y.dtype == x.grad.dtype == np.float32
    assert y.numpy().tolist() == x.grad.numpy().tolist() == [3.0, 3.0]


ROW = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])
PARAMETERS = {
    "layer_norm eps": (ag.layer_norm, "eps", np.float64(0.1)), "rms_norm eps": (ag.rms_norm, "eps", np.float64(0.1)),
    "group_norm eps": (ag.group_norm, "eps", np.float64(0.1)), "dropout p": (ag.dropout, "p", np.float64(0.5)),
    "clip low": (ag.clip, "low", np.float64(0.1)), "clip high": (ag.clip, "high", np.float64(0.1)),
    "pad value": (lambda x, value: ag.pad(x, ((1, 0), (0, 0)), value), "value", np.float64(0.1)),
    "var ddof": (ag.var, "ddof", np.int64(1)), "std ddof": (ag.std, "ddof", np.int64(1)),
    "sum axis": (ag.sum, "axis", np.int64(1)), "softmax axis": (ag.softmax, "axis", np.int64(0)),
    "roll shift": (ag.roll, "shift", np.int64(2)), "tril offset": (ag.tril, "offset", np.int64(-1)),
    "repeat": (ag.repeat, "repeats", np.int64(2)), "tile": (ag.tile, "repeats", np.int64(2)),
    "rfft n": (ag.rfft, "n", np.int64(5)), "group_norm groups": (ag.group_norm, "groups", np.int64(3)),
    "rfft n with norm": (lambda x, n: ag.rfft(x, n=n, norm="forward"), "n", np.int64(5)),
    "irfft n": (lambda x, n: ag.irfft(ag.rfft(x), n=n), "n", np.int64(5)),
    "attention scale": (lambda x, scale: attention(*[x.reshape(1, 1, 2, 3)] * 3, scale=scale), "scale", 1 / np.sqrt(3)),
    "attention dropout": (lambda x, p: attention(*[x.reshape(1, 1, 2, 3)] * 3, dropout=p), "p", np.float64(0.5)),
}


@table(("function", "name", "number"), PARAMETERS)
def test_a_parameter_may_be_a_numpy_scalar_and_widens_nothing(function, name, number):
    """float64 scalars are what NumPy computes from Python numbers."""
    for dtype, route in ROUTES:
        with route():
            plain = run(lambda x: function(x, **{name: number.item()}), [ROW], 2.0, dtype)
            numpy = run(lambda x: function(x, **{name: number}), [ROW], 2.0, dtype)
        for a, b in zip((plain[0], *plain[1]), (numpy[0], *numpy[1]), strict=True):
            assert a.dtype == b.dtype == dtype and np.array_equal(a, b)


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("integer", INTEGERS, ids=lambda t: t.__name__)
def test_ids_and_labels_of_any_integer_dtype(integer):
    ids = np.array([2, 0, 2], integer)
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    g = np.array([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    for function in (ag.embedding, ag.gather, lambda x, ids: x[ids],
                     lambda x, ids: ag.take_along_axis(x, np.stack([ids, ids], 1), axis=0)):
        expect(lambda x, f=function: f(x, ids), [rows], [[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]], g,
               [[[4.0, 8.0], [0.0, 0.0], [17.0, 34.0]]])
    expect(lambda x, u: ag.scatter_add(x, ids, u), [np.ones((3, 2)), rows], [[4.0, 5.0], [1.0, 1.0], [7.0, 9.0]], g,
           [g, [[16.0, 32.0], [1.0, 2.0], [16.0, 32.0]]])
    expect(lambda x: ag.cross_entropy(x, ids), [np.zeros((3, 4))], math.log(4), 12.0,
           [[[1.0, 1.0, -3.0, 1.0], [-3.0, 1.0, 1.0, 1.0], [1.0, 1.0, -3.0, 1.0]]])


@pytest.mark.parametrize("integer", INTEGERS, ids=lambda t: t.__name__)
def test_an_ignored_label_that_the_dtype_of_the_labels_cannot_hold(integer):
    """-100 among unsigned labels, or 300 among bytes, is no label at all."""
    labels = np.array([0, 1], integer)
    for ignored in (-100, 300):
        expect(lambda x, i=ignored: ag.cross_entropy(x, labels, ignore_index=i), [np.zeros((2, 2))], math.log(2), 4.0,
               [[[-1.0, 1.0], [1.0, -1.0]]])


@pytest.mark.parametrize("integer", [np.uint8, np.uint16, np.uint32, np.uint64], ids=lambda t: t.__name__)
def test_a_difference_of_unsigned_ids_that_wrapped_is_refused(integer):
    with np.errstate(over="ignore"):
        ids = np.array([3], integer) - np.array([5], integer)
    refuse(DomainError, ["embedding", "0 .. 2"], lambda x: ag.embedding(x, ids), np.ones((3, 2)))
    refuse(DomainError, ["cross_entropy", "0 .. 2"], lambda x: ag.cross_entropy(x, ids), np.ones((1, 3)))


# -- kinds of arrays ---------------------------------------------------------------------------------------------------
class Metres(np.ndarray):
    """An array that means more than its numbers."""


SUBCLASSES = {"matrix": lambda x: np.asmatrix(x.reshape(len(x), -1)), "MaskedArray": lambda x: np.ma.array(x, mask=x == x),
              "recarray": lambda x: x.view(np.recarray), "Metres": lambda x: x.view(Metres)}


@pytest.mark.parametrize("kind", SUBCLASSES)
@table(("function", "array"), {
    "a float": (lambda x: ag.exp(x), np.ones(3)),
    "one of two floats": (lambda x: ag.add(Tensor(np.ones(3)), x), np.ones(3)),
    "one of a list": (lambda x: ag.concat([np.ones(3), x]), np.ones(3)),
    "a matrix to multiply": (lambda x: Tensor(np.ones((2, 2))) @ x, np.ones((2, 2))),
    "labels": (lambda x: ag.cross_entropy(np.ones((2, 3)), x), np.zeros(2, int)),
    "ids": (lambda x: ag.embedding(np.ones((2, 3)), x), np.zeros(2, int)),
    "indices": (lambda x: ag.gather(np.ones((2, 3)), x), np.zeros(2, int)),
    "a mask": (lambda x: ag.softmax(np.ones((2, 2)), x), np.ones((2, 2), bool)),
    "a condition": (lambda x: ag.where(x, np.ones(2), 0.0), np.ones(2, bool)),
    "an index": (lambda x: Tensor(np.ones((2, 3)))[x], np.zeros(2, int)),
    "one index of two": (lambda x: Tensor(np.ones((2, 3)))[x, x], np.zeros(2, int)),
    "counts": (lambda x: ag.repeat(np.ones(2), x), np.ones(2, int)),
    "a Tensor": (Tensor, np.ones(3)), "a Tensor of integers": (partial(Tensor, dtype=np.float32), np.ones(3, int)),
    "a seed": (lambda x: (Tensor(np.ones(3), requires_grad=True) * 2.0).backward(x), np.ones(3)),
    "new values": (lambda x: Tensor(np.ones(3)).assign_(x), np.ones(3)),
    "a comparison": (lambda x: Tensor(np.ones(3)) < x, np.ones(3)),
    "an array to convert": (ag.to_numpy, np.ones(3))})
def test_a_subclass_of_an_array_is_refused_by_its_name(function, array, kind):
    for route in (forms, kernels):
        with route(), pytest.raises(DtypeError, match=kind) as caught:
            function(SUBCLASSES[kind](array))
    assert ("without its mask" in str(caught.value)) == (kind == "MaskedArray")


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_mapped_file_is_an_array(mode, tmp_path):
    for dtype in DTYPES:
        np.arange(6, dtype=dtype).tofile(tmp_path / "x")
        np.array([1, 0, 2]).tofile(tmp_path / "ids")
        x, ids = np.memmap(tmp_path / "x", dtype, mode, shape=(3, 2)), np.memmap(tmp_path / "ids", np.int64, mode)
        for route in (forms, kernels):
            with route():
                tensor = Tensor(x, requires_grad=True)
                y = ag.embedding(tensor, ids)
                slope, = gradients(y.sum(), [tensor])
                assert ag.exp(x).data.tolist() == np.exp(np.asarray(x)).tolist()
            assert type(tensor.data) is type(y.data) is np.ndarray and type(ag.to_numpy(x)) is np.ndarray
            assert y.data.tolist() == [[2, 3], [0, 1], [4, 5]] and slope.data.tolist() == [[1, 1]] * 3


# -- elementwise: values, kinks and saturations ------------------------------------------------------------------------
def swish(x):
    return gated(np.ones(x.shape, x.dtype), x, function="swish")


POINTS = {  # (x, y, dy/dx)
    "relu": (ag.relu, [(-2, 0, 0), (-0.0, 0, 0), (0, 0, 0), (3, 3, 1), (INF, INF, 1), (-INF, 0, 0)]),
    "relu_squared": (ag.relu_squared, [(-INF, 0, 0), (-2, 0, 0), (0, 0, 0), (3, 9, 6), (INF, INF, INF)]),
    "absolute": (ag.absolute, [(-2, 2, -1), (0, 0, 0), (-0.0, 0, 0), (2, 2, 1), (-INF, INF, -1)]),
    "clip": (lambda x: ag.clip(x, low=-1, high=2),
             [(-1.5, -1, 0), (-1, -1, 1), (0.5, 0.5, 1), (2, 2, 1), (3, 2, 0), (INF, 2, 0), (-INF, -1, 0)]),
    "clip below": (lambda x: ag.clip(x, low=0.0), [(-1, 0, 0), (0, 0, 1), (9, 9, 1), (INF, INF, 1)]),
    "clip to a point": (lambda x: ag.clip(x, low=1.0, high=1.0), [(0, 1, 0), (1, 1, 1), (2, 1, 0)]),
    "clip to nothing": (ag.clip, [(-INF, -INF, 1), (5, 5, 1)]),
    "sqrt": (ag.sqrt, [(0, 0, INF), (4, 2, 0.25), (INF, INF, 0)]),
    "rsqrt": (ag.rsqrt, [(0, INF, -INF), (4, 0.5, -0.0625), (INF, 0, 0)]),
    "log": (ag.log, [(0, -INF, INF), (1, 0, 1), (INF, INF, 0)]),
    "exp": (ag.exp, [(-1e4, 0, 0), (-INF, 0, 0), (0, 1, 1), (1e4, INF, INF)]),
    "tanh": (ag.tanh, [(-INF, -1, 0), (-1e4, -1, 0), (0, 0, 1), (1e4, 1, 0), (INF, 1, 0)]),
    "erf": (ag.erf, [(-INF, -1, 0), (-1e4, -1, 0), (0, 0, 2 / math.sqrt(PI)), (1e4, 1, 0), (1e30, 1, 0)]),
    "sigmoid": (ag.sigmoid, [(-INF, 0, 0), (-1e4, 0, 0), (0, 0.5, 0.25), (1e4, 1, 0), (INF, 1, 0)]),
    "softplus": (ag.softplus, [(-INF, 0, 0), (-1e4, 0, 0), (0, math.log(2), 0.5), (1e4, 1e4, 1), (INF, INF, 1)]),
    "log of sigmoid": (lambda x: -ag.softplus(-x), [(-1e4, -1e4, 1), (-1000, -1000, 1), (0, -math.log(2), 0.5),
                                                    (1e4, 0, 0)]),
    "silu": (ag.silu, [(-INF, 0, 0), (-1e30, 0, 0), (-1e4, 0, 0), (0, 0, 0.5), (1e4, 1e4, 1), (1e30, 1e30, 1), (INF, INF, 1)]),
    "gated by a swish": (swish, [(-INF, 0, 0), (-1e30, 0, 0), (-1e4, 0, 0), (0, 0, 0.5), (1e4, 1e4, 1), (1e30, 1e30, 1),
                                 (INF, INF, 1)]),
    "gated": (lambda x: gated(np.full(x.shape, 2, x.dtype), x), [(-INF, 0, 0), (-1e4, 0, 0), (0, 1, 0.5), (1e4, 2, 0),
                                                                 (INF, 2, 0)]),
    "gelu": (ag.gelu, [(-INF, 0, 0), (INF, INF, 1),
                       (-1e30, 0, 0), (-1e4, 0, 0), (0, 0, 0.5), (1, 0.841344746068542949, 1.083315470587686298),
                       (-1, -0.158655253931457051, -0.083315470587686298), (1e4, 1e4, 1), (1e30, 1e30, 1)]),
    "gelu_tanh": (ag.gelu_tanh, [(-INF, 0, 0), (INF, INF, 1),
                                 (-1e4, 0, 0), (0, 0, 0.5), (1, 0.841191990608276705, 1.082964083845782555),
                                 (-1, -0.158808009391723295, -0.082964083845782555), (1e4, 1e4, 1)]),
    "gelu_tanh where x * x overflows": (ag.gelu_tanh, [(-1e30, 0, 0), (1e30, 1e30, 1)]),
    "x ** 0": (lambda x: x**0, [(-2, 1, 0), (0, 1, 0), (3, 1, 0), (INF, 1, 0), (-INF, 1, 0), (NAN, 1, 0), (1e-30, 1, 0)]),
    "x ** 1": (lambda x: x**1, [(-2, -2, 1), (0, 0, 1)]),
    "x ** 2": (lambda x: x**2, [(-3, 9, -6), (0, 0, 0)]),
    "x ** 3": (lambda x: x**3, [(-2, -8, 12), (0, 0, 0)]),
    "x ** 0.5": (lambda x: x**0.5, [(0, 0, INF), (4, 2, 0.25)]),
    "x ** -1": (lambda x: x**-1, [(-2, -0.5, -0.25), (0, INF, -INF), (INF, 0, 0)]),
    "0 ** x": (lambda x: 0**x, [(-2, INF, -INF), (-0.5, INF, -INF), (0, 1, 0), (0.5, 0, 0), (2, 0, 0)]),
    "1 ** x": (lambda x: 1**x, [(-INF, 1, 0), (0, 1, 0), (NAN, 1, 0)]),
    "inf ** x": (lambda x: INF**x, [(-1, 0, 0), (0, 1, INF), (1, INF, INF)]),
    "2 ** x": (lambda x: 2**x, [(-1, 0.5, 0.5 * math.log(2)), (0, 1, math.log(2))]),
}


@table(("function", "point"), {f"{name} at {x:g}": (function, (x, y, slope))
                               for name, (function, points) in POINTS.items() for x, y, slope in points})
def test_elementwise_at(function, point):
    x, y, slope = point
    expect(function, [[x]], [y], 3.0, [[3 * slope]], terms=4)
    expect(function, [np.full(37, x)], np.full(37, y), 3.0, [np.full(37, 3 * slope)], terms=4)  # vector and remainder


def slope_of_sigmoid(x):
    e = np.exp(-np.abs(x))
    return e / (1 + e) / (1 + e)


FAR_OUT = [(op, route) for op in (ag.sigmoid, ag.tanh, gated, aft_simple) for route in routes(op) if differentiable(op, route)]


@pytest.mark.parametrize(("op", "route"), [pytest.param(op, route, marks=marks(route), id=f"{op.name}, {route}")
                                           for op, route in FAR_OUT])
def test_a_slope_far_out_is_small_but_not_0(op, route):
    for dtype in tried(op, route):
        x = np.array([[[0.01, 1, 5, 10, 17, 20, 30, 40, -0.01, -1, -5, -10, -17, -20, -30, -40]]], dtype)
        v, k = some(*x.shape).astype(dtype), np.zeros_like(x)
        args, place, exact = {
            "sigmoid": ((x,), 0, slope_of_sigmoid(x)), "tanh": ((x,), 0, 4 * slope_of_sigmoid(2.0 * x)),
            "gated": ((v, x), 1, v * slope_of_sigmoid(x)),
            "aft_simple": ((x, k, v, None, None, None), 0, v * slope_of_sigmoid(x)),
        }[op.name]
        cotangents = [np.ones_like(o) if i == 0 else np.zeros_like(o) for i, o in enumerate(compute(op, route, args, {}))]
        found = differentiate(op, route, args, {}, cotangents)[place]
        np.testing.assert_allclose(found, exact, rtol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("x", [0.0, 1e-3, 1.0, -1.0, 12.0, -12.0], ids=str)
def test_higher_derivatives_of_tanh(x):
    derivatives, y = [], Tensor(np.array(x), requires_grad=True)
    t, slope, value = math.tanh(x), 1 / math.cosh(x) ** 2, ag.tanh(y)
    for _ in range(3):
        (value,) = gradients(value, [y], create_graph=True)
        derivatives.append(value.item())
    np.testing.assert_allclose(derivatives, [slope, -2 * t * slope, -2 * slope * (1 - 3 * t * t)], rtol=1e-12)


@table("function", {name: getattr(ag, name) for name in (
    "relu", "relu_squared", "absolute", "clip", "sqrt", "rsqrt", "log", "exp", "sin", "cos", "tanh", "erf", "sigmoid",
    "softplus", "silu", "gelu", "gelu_tanh", "negative", "identity")})
def test_a_nan_stays_a_nan_and_stays_where_it_is(function):
    x = np.full(37, 0.5)
    x[[0, 20, 36]] = NAN
    for dtype, route in ROUTES:
        with route():
            y, (slope,) = run(function, [x], some(37), dtype)
        assert np.isnan(y).tolist() == np.isnan(x).tolist()
        assert np.isfinite(slope[~np.isnan(x)]).all()


@table(("op", "x", "y", "value", "by_x", "by_y"), {
    "maximum of equals": (ag.maximum, 1, 1, 1, 0.5, 0.5), "minimum of equals": (ag.minimum, 1, 1, 1, 0.5, 0.5),
    "maximum of zeros": (ag.maximum, 0.0, -0.0, 0, 0.5, 0.5), "minimum of zeros": (ag.minimum, 0.0, -0.0, 0, 0.5, 0.5),
    "maximum of infinities": (ag.maximum, INF, INF, INF, 0.5, 0.5), "maximum with -inf": (ag.maximum, -INF, 2, 2, 0, 1),
    "minimum with inf": (ag.minimum, 2, INF, 2, 1, 0), "maximum(1, nan)": (ag.maximum, 1, NAN, NAN, 0, 1),
    "maximum(nan, 1)": (ag.maximum, NAN, 1, NAN, 1, 0), "minimum(1, nan)": (ag.minimum, 1, NAN, NAN, 0, 1),
    "minimum(nan, 1)": (ag.minimum, NAN, 1, NAN, 1, 0),
    "0 ** 0": (ag.power, 0, 0, 1, 0, 0), "0 ** 1": (ag.power, 0, 1, 0, 1, 0), "0 ** 2": (ag.power, 0, 2, 0, 0, 0),
    "2 ** 0": (ag.power, 2, 0, 1, 0, math.log(2)), "0 ** 0.5": (ag.power, 0, 0.5, 0, INF, 0),
    "x / 0": (ag.divide, 1, 0, INF, INF, -INF), "0 / y": (ag.divide, 0, 2, 0, 0.5, 0),
    "a negative base": (ag.power, -2, 3, -8, 12, NAN), "a negative base ** 0": (ag.power, -2, 0, 1, 0, NAN),
    "inf ** 0": (ag.power, INF, 0, 1, 0, INF), "nan ** 0": (ag.power, NAN, 0, 1, 0, NAN),
    "0 ** -1": (ag.power, 0, -1, INF, -INF, -INF), "inf ** -1": (ag.power, INF, -1, 0, 0, 0)})
def test_two_numbers(op, x, y, value, by_x, by_y):
    expect(op, [[x], [y]], [value], 3.0, [[3 * by_x], [3 * by_y]], terms=4)


@table(("power", "second"), {"0": (0, 0.0), "1": (1, 0.0), "2": (2, 2.0), "3": (3, 0.0)})
def test_second_derivative_of_a_power_at_0(power, second):
    x = Tensor([0.0], requires_grad=True)
    first, = gradients((x**power).sum(), [x], create_graph=True)
    assert gradients(first.sum(), [x])[0].numpy().tolist() == [second]


@table(("x", "y"), {f"{x} ** {y}": (x, y) for x in (5.0, 0.3) for y in (0.0, 1.0, -1.0, 2.5)})
def test_second_derivatives_of_a_power_by_its_exponent(x, y):
    """x^y ln x by y and x^(y-1) (1 + y ln x) by x and y, in either order; at y = 0 the second is 1/x."""
    for dtype in DTYPES:
        base, exponent = (Tensor(np.array([v], dtype), requires_grad=True) for v in (x, y))
        slopes = gradients(ag.power(base, exponent), [base, exponent], Tensor(np.ones(1, dtype)), create_graph=True)
        (xx, xy), (yx, yy) = ([g.item() for g in gradients(s.sum(), [base, exponent], retain=True)] for s in slopes)
        mixed = x ** (y - 1) * (1 + y * math.log(x))
        found, expected = np.array([xx, xy, yx, yy], dtype), [y * (y - 1) * x ** (y - 2), mixed, mixed, x**y * math.log(x)**2]
        assert_close(found, np.array(expected), "second derivatives", terms=16)


@pytest.mark.parametrize("x", [0.0, 1e-30, INF, -INF, NAN], ids=str)
def test_no_derivative_of_x_to_the_0_by_x_is_anything_but_0(x):
    for dtype, learned in itertools.product(DTYPES, (False, True)):
        base, exponent = Tensor(np.array([x], dtype), requires_grad=True), Tensor(np.zeros(1, dtype), requires_grad=learned)
        with np.errstate(all="ignore"):
            slope, = gradients(base**exponent, [base], Tensor(np.ones(1, dtype)), create_graph=True)
            assert slope.numpy().tolist() == [0]
            assert learned or gradients(slope.sum(), [base])[0].numpy().tolist() == [0]


def test_an_array_of_integers_is_not_a_power():
    with pytest.raises(DtypeError, match=r"power.*int64"):
        Tensor([2.0]) ** np.array([-1])


def test_the_two_gelus_differ():
    x = np.linspace(-3, 3, 61)
    apart = np.abs(ag.gelu(x).numpy() - ag.gelu_tanh(x).numpy())
    assert 4e-4 < apart.max() < 5e-4


@table("bounds", {"crossed": (2, 1), "crossed by infinities": (INF, -INF)})
def test_bounds_of_clip_that_cross_are_refused(bounds):
    refuse(DomainError, ["clip", "low", "high"], lambda x: ag.clip(x, *bounds), [1.0])


# -- -0.0 --------------------------------------------------------------------------------------------------------------
@table("function", {
    "identity": ag.identity, "reshape": lambda x: ag.reshape(x, (2, 2)), "transpose": lambda x: ag.transpose(x[None]),
    "flip": ag.flip, "roll": ag.roll, "concat": lambda x: ag.concat([x, x]), "stack": lambda x: ag.stack([x, x]),
    "split": lambda x: ag.split(x, 2)[0], "getitem": lambda x: x[[0, 1]], "gather": lambda x: ag.gather(x, [0, 3]),
    "broadcast_to": lambda x: ag.broadcast_to(x, (2, 4)), "repeat": lambda x: ag.repeat(x, 2),
    "tile": lambda x: ag.tile(x, 2), "sort": ag.sort, "where": lambda x: ag.where(np.array(True), x, 1.0),
    "clip": ag.clip, "dropout": lambda x: ag.dropout(x, p=0.0), "astype": lambda x: x.astype(np.float64),
    "embedding": lambda x: ag.embedding(x[:, None], [0, 3]),
    "take_along_axis": lambda x: ag.take_along_axis(x, [1, 2])})
def test_what_only_moves_values_keeps_the_sign_of_zero(function):
    for dtype, route in ROUTES:
        with route():
            y = function(Tensor(np.full(4, -0.0, dtype))).numpy()
        assert y.size and np.signbit(y).all()


# -- axes --------------------------------------------------------------------------------------------------------------
def _norm(x, axis, keepdims=False):
    return np.log(np.sum(np.exp(x), axis, keepdims=keepdims))


CUT = np.random.default_rng(0).random((2, 3, 4)) < 0.7  # a mask
AXES = {  # an operator over any axis, and NumPy code over an axis that is not negative
    **{name: (getattr(ag, name), getattr(np, name))
       for name in ("sum", "mean", "var", "std", "max", "min", "prod", "cumsum", "cumprod", "flip", "sort", "argsort")},
    "logcumsumexp": (ag.logcumsumexp, np.logaddexp.accumulate),
    "norm": (ag.norm, lambda x, axis, keepdims=False: np.sqrt((x * x).sum(axis, keepdims=keepdims))),
    "logsumexp": (ag.logsumexp, _norm),
    "softmax": (ag.softmax, lambda x, axis: np.exp(x) / np.exp(x).sum(axis, keepdims=True)),
    "masked softmax": (lambda x, axis: ag.softmax(x, CUT, axis=axis), lambda x, axis: np.divide(
        np.exp(x) * CUT, (np.exp(x) * CUT).sum(axis, keepdims=True), out=np.zeros_like(x), where=CUT)),
    "log_softmax": (ag.log_softmax, lambda x, axis: x - _norm(x, axis, True)),
    "roll": (lambda x, axis: ag.roll(x, 2, axis), lambda x, axis: np.roll(x, 2, axis)),
    "repeat": (lambda x, axis: ag.repeat(x, 2, axis), lambda x, axis: np.repeat(x, 2, axis)),
    "gather": (lambda x, axis: ag.gather(x, [1, 1, -2], axis=axis), lambda x, axis: np.take(x, [1, 1, -2], axis)),
    "take_along_axis": (lambda x, axis: ag.take_along_axis(x, np.zeros(x.shape, int), axis=axis),
                        lambda x, axis: np.repeat(np.take(x, [0], axis), x.shape[axis], axis)),
    "scatter_add": (lambda x, axis: ag.scatter_add(x, np.zeros(x.shape[axis], int), x, axis=axis),
                    lambda x, axis: x + np.insert(np.zeros_like(np.delete(x, 0, axis)), 0, x.sum(axis), axis)),
    "add_along_axis": (lambda x, axis: ag.add_along_axis(x, np.zeros(x.shape, int), x, axis=axis),
                       lambda x, axis: x + np.insert(np.zeros_like(np.delete(x, 0, axis)), 0, x.sum(axis), axis)),
    "concat": (lambda x, axis: ag.concat([x, x * 2.0], axis=axis), lambda x, axis: np.concatenate([x, x * 2], axis)),
    "split": (lambda x, axis: ag.split(x, [0, x.shape[axis] - 1, 1], axis)[1],
              lambda x, axis: np.delete(x, -1, axis)),
    "swapaxes": (lambda x, axis: ag.swapaxes(x, axis, 0), lambda x, axis: np.swapaxes(x, axis, 0)),
}


@pytest.mark.parametrize("axis", range(-3, 3))
@table(("op", "function"), AXES)
def test_every_axis_from_both_ends(op, function, axis):
    x = apart(2, 3, 4) / 2
    expected = function(x, axis=axis % 3)
    for dtype in DTYPES:
        assert_close(op(x.astype(dtype), axis=axis), expected, terms=16)
    if op is not ag.argsort:
        gradcheck(lambda x: op(x, axis=axis), x)


@pytest.mark.parametrize("axis", [3, -4, 0.5, True], ids=str)
@table("name", {name: name for name in AXES if name != "masked softmax"})
def test_an_axis_that_does_not_exist_is_refused(name, axis):
    op = {"gather": lambda x, axis: ag.gather(x, [0], axis=axis),
          "scatter_add": lambda x, axis: ag.scatter_add(x, [0], x, axis=axis),
          "take_along_axis": lambda x, axis: ag.take_along_axis(x, np.zeros(x.shape, int), axis=axis),
          "add_along_axis": lambda x, axis: ag.add_along_axis(x, np.zeros(x.shape, int), x, axis=axis),
          "split": lambda x, axis: ag.split(x, 1, axis)}.get(name, AXES[name][0])
    refuse(ShapeError, [name, "axis"], lambda x: op(x, axis=axis), np.ones((2, 3, 4)))


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_beyond_the_new_one_is_refused(axis):
    refuse(ShapeError, ["stack", "axis"], lambda x: ag.stack([x, x], axis=axis), np.ones((2, 3)))


REDUCTIONS = {**{name: AXES[name] for name in ("sum", "mean", "var", "std", "max", "min", "prod", "logsumexp", "norm")}}


@pytest.mark.parametrize("keepdims", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize("axis", [None, (), (0,), (0, -1), (-1, 0), (1, -3), (2, 0, 1), (-1, -2, -3), [1, 0]], ids=str)
@table(("op", "function"), REDUCTIONS)
def test_several_axes(op, function, axis, keepdims):
    x = apart(2, 3, 4) / 2
    axes = axis if axis is None else tuple(a % 3 for a in axis)
    expected = function(x, axis=axes, keepdims=keepdims)
    for dtype in DTYPES:
        assert_close(op(x.astype(dtype), axis=axis, keepdims=keepdims), expected, terms=64)
    gradcheck(lambda x: op(x, axis=axis, keepdims=keepdims), x)


@table("op", {name: op for name, (op, _) in REDUCTIONS.items()})
def test_the_result_of_a_reduction_is_an_array(op):
    """NumPy's are scalars."""
    for dtype in DTYPES:
        y = op(np.ones(3, dtype))
        assert type(y.data) is np.ndarray and y.shape == () and y.dtype == dtype
        z = op(np.array(2, dtype), axis=None)
        assert type(z.data) is np.ndarray and z.shape == () and z.dtype == dtype


# -- reductions --------------------------------------------------------------------------------------------------------
@table(("function", "x", "value", "slope"), {
    "max of two equals": (ag.max, [2, 1, 2], 2, [0.5, 0, 0.5]),
    "min of two equals": (ag.min, [1, 2, 1], 1, [0.5, 0, 0.5]),
    "max of all equal": (ag.max, [[3, 3], [3, 3]], 3, [[0.25, 0.25], [0.25, 0.25]]),
    "max of equals in some columns": (lambda x: ag.max(x, 0), [[1, 5], [1, 4], [0, 3]], [1, 5],
                                      [[0.5, 1], [0.5, 0], [0, 0]]),
    "max of zeros": (ag.max, [0.0, -0.0, -1], 0, [0.5, 0.5, 0]),
    "max of a third each": (ag.max, [7, 7, 7], 7, [1 / 3, 1 / 3, 1 / 3]),
    "max with a nan": (ag.max, [1, NAN, 2], NAN, [0, 1, 0]), "min with a nan": (ag.min, [1, NAN, 2], NAN, [0, 1, 0]),
    "max with a nan in one row": (lambda x: ag.max(x, 1), [[1, NAN], [3, 2]], [NAN, 3], [[0, 1], [1, 0]]),
    "max of infinities": (ag.max, [INF, 0, INF], INF, [0.5, 0, 0.5]),
    "max of -inf": (ag.max, [-INF, -INF], -INF, [0.5, 0.5]),
    "prod without a zero": (ag.prod, [2, 3, 4], 24, [12, 8, 6]),
    "prod with one zero": (ag.prod, [2, 0, 4], 0, [0, 8, 0]),
    "prod with two zeros": (ag.prod, [0, 3, 0], 0, [0, 0, 0]), "prod of one zero": (ag.prod, [0], 0, [1]),
    "prod with zeros in some rows": (lambda x: ag.prod(x, 1, True), [[2, 3], [0, 5], [0, 0]], [[6], [0], [0]],
                                     [[3, 2], [5, 0], [0, 0]]),
    "prod over two axes with a zero": (lambda x: ag.prod(x, (2, 0)), [[[2, 0], [1, 2]], [[3, 5], [3, 4]]], [0, 24],
                                       [[[0, 30], [24, 12]], [[0, 0], [8, 6]]]),
    "prod of a number": (ag.prod, 0.0, 0, 1), "prod of infinity": (ag.prod, [INF, 2], INF, [2, INF]),
    "prod of 0 and infinity": (ag.prod, [INF, 0], NAN, [0, INF]),
    "prod with a nan": (lambda x: ag.prod(x, 0), [[NAN, 3], [2, 4]], [NAN, 12], [[2, 4], [NAN, 3]]),
    "prod with two infinities": (lambda x: ag.prod(x, -1), [[INF, -INF, 2], [3, 4, 0.5]], [-INF, 6],
                                 [[-INF, INF, -INF], [2, 1.5, 12]]),
    "std of equals": (ag.std, [0.1, 0.1, 0.1], 0, [0, 0, 0]), "var of equals": (ag.var, [0.1, 0.1, 0.1], 0, [0, 0, 0]),
    "std of equals in one row": (lambda x: ag.std(x, -1), [[7.3, 7.3], [1, 3]], [0, 1], [[0, 0], [-0.5, 0.5]]),
    "std of one": (ag.std, [5], 0, [0]), "var of one": (ag.var, [5], 0, [0]), "std of a number": (ag.std, 5.0, 0, 0),
    "norm of zeros": (lambda x: ag.std(ag.concat([x, -x])), [0, 0], 0, [0, 0]),
    "var about a large mean": (ag.var, [4096.25, 4096.75], 0.0625, [-0.25, 0.25]),
    "norm": (ag.norm, [3, 4], 5, [0.6, 0.8]), "norm of zeros in one row": (
        lambda x: ag.norm(x, -1), [[0, 0], [3, -4]], [0, 5], [[0, 0], [0.6, -0.8]]),
    "norm 0": (ag.norm, [0, 0, 0], 0, [0, 0, 0]), "norm of a number": (ag.norm, -3.0, 3, -1), "norm of 0": (ag.norm, 0.0, 0, 0),
    "norm of tiny": (ag.norm, [3e-30, 4e-30], 5e-30, [0.6, 0.8]), "norm of huge": (ag.norm, [3e30, 4e30], 5e30, [0.6, 0.8]),
    "norm of far apart": (ag.norm, [1e-30, 1e30], 1e30, [1e-60, 1]), "norm with inf": (ag.norm, [1, -INF], INF, [0, -1]),
    "norm with two inf": (ag.norm, [INF, 7, -INF], INF, [math.sqrt(0.5), 0, -math.sqrt(0.5)]),
    "norm with a nan": (ag.norm, [NAN, 1], NAN, [NAN, NAN]), "norm with a nan and inf": (ag.norm, [NAN, INF], NAN, [NAN, NAN]),
    "norm over two axes": (lambda x: ag.norm(x, (0, 2), True), [[[1, 3], [2, 2]], [[1, 5], [-2, 2]]], [[[6], [4]]],
                           [[[1 / 6, 0.5], [0.5, 0.5]], [[1 / 6, 5 / 6], [-0.5, 0.5]]]),
    "sum of magnitudes": (partial(ag.norm, ord=1), [3, 0, -4], 7, [1, 0, -1]),
    "sum of huge magnitudes": (partial(ag.norm, ord=1), [1e30, -INF], INF, [1, -1]),
    "largest magnitude": (partial(ag.norm, ord=INF), [3, -4], 4, [0, -1]),
    "largest magnitude of equals": (partial(ag.norm, ord=INF), [4, 0, -4], 4, [0.5, 0, -0.5]),
    "largest magnitude of zeros": (partial(ag.norm, ord=INF), [0, 0], 0, [0, 0]),
    "largest magnitude with a nan": (partial(ag.norm, ord=INF), [NAN, 1], NAN, [NAN, 0]),
    "mean of a selection of none": (lambda x: x[x.data > 9].mean(), [1, 2], NAN, [0, 0]),
    "sum of a selection of none": (lambda x: x[x.data > 9].sum(), [1, 2], 0, [0, 0]),
    "logsumexp of -inf": (ag.logsumexp, [-INF, -INF], -INF, [0, 0]), "logsumexp of one": (ag.logsumexp, [5], 5, [1]),
    "logsumexp of one -inf": (ag.logsumexp, [-INF], -INF, [0]),
    "logsumexp with -inf": (ag.logsumexp, [-INF, 0, 0], math.log(2), [0, 0.5, 0.5]),
    "logsumexp with inf": (ag.logsumexp, [1, INF, 2], INF, [0, 1, 0]),
    "logsumexp with two inf": (ag.logsumexp, [INF, -INF, INF], INF, [0.5, 0, 0.5]),
    "logsumexp of equals that absorb the log of 2": (ag.logsumexp, [2.0**60, 2.0**60], 2.0**60, [0.5, 0.5]),
    "logsumexp of large": (ag.logsumexp, [1e4, 1e4], 1e4 + math.log(2), [0.5, 0.5]),
    "logsumexp of far apart": (ag.logsumexp, [-1e4, 1e4], 1e4, [0, 1]),
    "logsumexp with a nan": (ag.logsumexp, [[NAN, 1], [0, 0]], [NAN, math.log(2)], [[NAN, NAN], [0.5, 0.5]]),
    "logsumexp of one bad row": (ag.logsumexp, [[-INF, -INF], [0, 0]], [-INF, math.log(2)], [[0, 0], [0.5, 0.5]]),
    "logaddexp(-inf, -inf)": (lambda x: ag.logsumexp(ag.stack([x, x]), axis=0), [-INF], [-INF], [0]),
    "logsumexp of a number": (lambda x: ag.logsumexp(x, axis=None), 3.0, 3, 1)})
def test_reduction(function, x, value, slope):
    expect(function, [x], value, 3.0, [3.0 * np.asarray(slope, float)], terms=4)


@pytest.mark.parametrize("size", [2.0**-120, 2.0**120], ids=["underflows", "overflows"])
@pytest.mark.parametrize("axis", [None, -1, (0, 2), (1, -3)], ids=str)
def test_slopes_of_a_product_that(size, axis):
    """Each is the product of the others, also where that of all is beyond the numbers of the dtype."""
    axes = range(3) if axis is None else [a % 3 for a in np.atleast_1d(axis)]
    order = [a for a in range(3) if a not in axes] + list(axes)
    for dtype in DTYPES:
        factor, x = Fraction(size) ** (1 if dtype is np.float32 else 8), np.where(some(2, 2, 3) < 0, -1.5, 1.25)
        first = x.transpose(order)  # a view
        first[(0,) * (3 - len(axes))].flat[:2] = float(factor)
        expected = np.empty(x.shape)
        for index in np.ndindex(x.shape):
            mates = [i for i in np.ndindex(x.shape) if i != index and all(i[a] == index[a] or a in axes for a in range(3))]
            product = math.prod(Fraction(x[i]) for i in mates)
            expected[index] = float(product) if abs(product) <= np.finfo(dtype).max else INF if product > 0 else -INF
        with np.errstate(all="ignore"):
            _, (slope,) = run(lambda x: ag.prod(x, axis), [x], 1.0, dtype)
        small = np.finfo(dtype).tiny  # below, nothing but 0 or a rounded number is left
        seen = np.isfinite(expected) & (np.abs(expected) >= small)
        assert np.count_nonzero(seen) > 1
        assert np.allclose(slope[seen] / expected[seen], 1, rtol=1e-6 if dtype is np.float32 else 1e-14, atol=0)
        rest = np.abs(slope[~seen]) < 2 * small if size < 1 else slope[~seen] == expected[~seen]
        assert rest.all()


@pytest.mark.parametrize("size", [2.0**-120, 2.0**120], ids=["underflows", "overflows"])
def test_second_derivatives_of_a_product_that(size):
    for dtype in DTYPES:
        factor = size if dtype is np.float32 else size**8
        x = Tensor(np.array([factor, factor, 1.5], dtype), requires_grad=True)
        with np.errstate(all="ignore"):
            slopes, = gradients(ag.prod(x), [x], create_graph=True)
            assert gradients(slopes.sum(), [x])[0].numpy().tolist() == [1.5 + factor, 1.5 + factor, 2 * factor]
@table(("function", "x", "value", "slope"), {
    "cumprod with a zero": (ag.cumprod, [2, 0, 4, 5], [2, 0, 0, 0], [1, 50, 0, 0]),
    "cumprod with two zeros": (ag.cumprod, [2, 0, 4, 0], [2, 0, 0, 0], [1, 10, 0, 0]),
    "cumprod from a zero on": (ag.cumprod, [[0, 3, 5], [2, 3, 5]], [[0, 0, 0], [2, 6, 30]], [[19, 0, 0], [19, 12, 6]]),
    "cumprod with an infinity": (ag.cumprod, [INF, 2], [INF, INF], [3, INF]),
    "cumprod with a nan": (ag.cumprod, [2, NAN, 3], [2, NAN, NAN], [NAN, 8, NAN]),
    "cumprod down to nothing": (ag.cumprod, [1e-30, 1e-30], [1e-30, 1e-60], [1, 1e-30]),
    "cumprod of columns": (lambda x: ag.cumprod(x, 0), [[2, 3], [5, 7]], [[2, 3], [10, 21]], [[6, 8], [2, 3]]),
    "logcumsumexp of -inf": (ag.logcumsumexp, [-INF, -INF], [-INF, -INF], [0, 0]),
    "logcumsumexp with -inf": (ag.logcumsumexp, [-INF, 0, -INF, 0], [-INF, 0, 0, math.log(2)], [0, 2.5, 0, 0.5]),
    "logcumsumexp with inf": (ag.logcumsumexp, [1, INF, 2], [1, INF, INF], [1, 2, 0]),
    "logcumsumexp with two inf": (ag.logcumsumexp, [INF, -INF, INF], [INF, INF, INF], [2.5, 0, 0.5]),
    "logcumsumexp of large": (ag.logcumsumexp, [1e4, 1e4], [1e4, 1e4 + math.log(2)], [1.5, 0.5]),
    "logcumsumexp of equals that absorb the log of 2": (ag.logcumsumexp, [2.0**60] * 2, [2.0**60] * 2, [1.5, 0.5]),
    "logcumsumexp of far apart": (ag.logcumsumexp, [-1e4, 1e4, -1e4], [-1e4, 1e4, 1e4], [1, 2, 0]),
    "logcumsumexp with a nan": (ag.logcumsumexp, [[0, NAN, 0], [0, 0, -INF]], [[0, NAN, NAN], [0, math.log(2), math.log(2)]],
                                [[NAN, NAN, NAN], [2, 1, 0]])})
def test_scan(function, x, value, slope):
    expect(function, [x], value, 3.0, [3.0 * np.asarray(slope, float)], terms=4)


def test_the_gradient_of_cumprod_does_not_divide_what_overflowed():
    x = Tensor(np.array([1e30, 1e30, 1e-30], np.float32), requires_grad=True)
    with np.errstate(over="ignore", invalid="ignore"):
        slope, = gradients(ag.cumprod(x), [x], Tensor(np.array([0, 1, 0], np.float32)))
    assert_close(slope.data[:2], [1e30, 1e30])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_slopes_of_logcumsumexp_are_softmaxes(length, offset):
    """That of y_t is the softmax of x_0 .. x_t, whatever constant is added to x."""
    x, g = np.float64(np.float32(4 * some(2, length) + offset)), some(2, length, seed=1)
    expected = np.zeros_like(x)
    for t in range(length):
        weights = np.exp(x[:, :t + 1] - x[:, :t + 1].max(1, keepdims=True))
        expected[:, :t + 1] += g[:, t:t + 1] * weights / weights.sum(1, keepdims=True)
    expect(ag.logcumsumexp, [x], np.logaddexp.accumulate(x, 1), g, [expected], terms=length)


@pytest.mark.parametrize("ord", [0, 3, -1, "fro", None], ids=str)
def test_an_ord_of_norm_that_is_not_there_is_refused(ord):
    refuse(DomainError, ["norm", "ord", repr(ord), "1, 2, inf"], lambda x: ag.norm(x, ord=ord), np.ones(3))


def test_second_derivative_of_a_product_with_a_zero():
    """x0 x1 x2 at (0, 2, 3): the sum of its slopes is x1 x2 + x0 x2 + x0 x1."""
    x = Tensor([0.0, 2.0, 3.0], requires_grad=True)
    first, = gradients(ag.prod(x), [x], create_graph=True)
    assert first.numpy().tolist() == [6.0, 0.0, 0.0]
    assert gradients(first.sum(), [x])[0].numpy().tolist() == [5.0, 3.0, 2.0]


# -- nothing: axes of size 0 -------------------------------------------------------------------------------------------
EMPTY = {  # a function, the shapes of its inputs, and its value: all gradients are zeros of the inputs' shapes
    "sum": (ag.sum, [(0,)], 0.0), "sum of columns": (lambda x: x.sum(0), [(0, 3)], np.zeros(3)),
    "sum of no column": (lambda x: x.sum(1), [(0, 3)], np.zeros(0)),
    "mean": (ag.mean, [(0,)], NAN), "mean of rows": (lambda x: x.mean(1), [(2, 0)], [NAN, NAN]),
    "mean of no row": (lambda x: x.mean(1), [(0, 2)], np.zeros(0)), "prod": (ag.prod, [(2, 0)], 1.0),
    "prod of rows": (lambda x: x.prod(-1), [(2, 0)], [1.0, 1.0]), "logsumexp": (ag.logsumexp, [(2, 0)], [-INF, -INF]),
    "logsumexp of no row": (ag.logsumexp, [(0, 2)], np.zeros(0)),
    "max of no row": (lambda x: x.max(1), [(0, 2)], np.zeros(0)),
    "min of no row": (lambda x: x.min(1), [(0, 2)], np.zeros(0)),
    "var of no row": (lambda x: x.var(1), [(0, 2)], np.zeros(0)),
    "std of no row": (lambda x: x.std(1), [(0, 2)], np.zeros(0)), "cumsum": (ag.cumsum, [(2, 0)], np.zeros((2, 0))),
    "norm": (ag.norm, [(0,)], 0.0), "norm of rows": (lambda x: ag.norm(x, 1), [(2, 0)], [0.0, 0.0]),
    "largest magnitude of rows": (lambda x: ag.norm(x, 1, ord=INF), [(2, 0)], [0.0, 0.0]),
    "norm of no row": (lambda x: ag.norm(x, 1), [(0, 2)], np.zeros(0)),
    "cumprod": (ag.cumprod, [(2, 0)], np.zeros((2, 0))), "cumprod of no row": (ag.cumprod, [(0, 2)], np.zeros((0, 2))),
    "logcumsumexp": (ag.logcumsumexp, [(2, 0)], np.zeros((2, 0))),
    "logcumsumexp of no row": (ag.logcumsumexp, [(0, 2)], np.zeros((0, 2))),
    "softmax of empty rows": (ag.softmax, [(2, 0)], np.zeros((2, 0))),
    "softmax of no row": (ag.softmax, [(0, 2)], np.zeros((0, 2))),
    "log_softmax of empty rows": (ag.log_softmax, [(2, 0)], np.zeros((2, 0))), "sort": (ag.sort, [(0,)], np.zeros(0)),
    "masked softmax": (lambda x: ag.softmax(x, np.ones((1, 0), bool)), [(2, 0)], np.zeros((2, 0))),
    "flip": (ag.flip, [(0, 2)], np.zeros((0, 2))), "roll": (lambda x: ag.roll(x, 3), [(2, 0)], np.zeros((2, 0))),
    "reshape": (lambda x: x.reshape(0, 5), [(2, 0)], np.zeros((0, 5))),
    "-1": (lambda x: x.reshape(2, -1), [(2, 0)], np.zeros((2, 0))),
    "transpose": (ag.transpose, [(2, 0)], np.zeros((0, 2))), "tile": (lambda x: x.tile(0), [(2, 2)], np.zeros((2, 0))),
    "repeat": (lambda x: x.repeat(0), [(2, 2)], np.zeros((2, 0))),
    "repeat of nothing": (lambda x: x.repeat(3), [(0,)], np.zeros(0)),
    "repeat by no count": (lambda x: x.repeat(()), [(0,)], np.zeros(0)),
    "broadcast_to": (lambda x: x.broadcast_to((2, 0)), [(1,)], np.zeros((2, 0))),
    "tril": (ag.tril, [(0, 3)], np.zeros((0, 3))),
    "pad": (lambda x: ag.pad(x, ((1, 2),)), [(0,)], np.zeros(3)),
    "concat": (lambda x: ag.concat([x, x]), [(0,)], np.zeros(0)),
    "stack": (lambda x: ag.stack([x, x]), [(0,)], np.zeros((2, 0))),
    "split": (lambda x: ag.split(x, 3)[2], [(2, 0)], np.zeros((2, 0))),
    "slice": (lambda x: x[2:1], [(3,)], np.zeros(0)), "no index": (lambda x: x[[]], [(3, 2)], np.zeros((0, 2))),
    "mask": (lambda x: x[np.zeros(3, bool)], [(3, 2)], np.zeros((0, 2))),
    "gather": (lambda x: ag.gather(x, []), [(0, 2)], np.zeros((0, 2))),
    "take_along_axis": (lambda x: ag.take_along_axis(x, np.zeros((2, 0), int)), [(2, 3)], np.zeros((2, 0))),
    "matmul without inner size": (ag.matmul, [(2, 0), (0, 3)], np.zeros((2, 3))),
    "vectors of nothing": (ag.matmul, [(0,), (0,)], 0.0),
    "matmul of no row": (ag.matmul, [(0, 2), (2, 3)], np.zeros((0, 3))),
    "matmul of no batch": (ag.matmul, [(0, 2, 2), (2, 2)], np.zeros((0, 2, 2))),
    "einsum": (lambda x, y: ag.einsum([x, y], equation="ij,jk->ki"), [(2, 0), (0, 3)], np.zeros((3, 2))),
    "trace": (lambda x: ag.einsum([x], equation="ii->"), [(0, 0)], 0.0),
    "einsum of nothing and one": (lambda x, y: ag.einsum([x, y], equation="...i,...i->..."), [(0, 2), (1, 2)], np.zeros(0)),
    "linear without inputs": (ag.linear, [(2, 0), (3, 0)], np.zeros((2, 3))),
    "linear without rows": (ag.linear, [(0, 2), (3, 2), (3,)], np.zeros((0, 3))),
    "linear without outputs": (ag.linear, [(2, 2), (0, 2), (0,)], np.zeros((2, 0))),
    "embedding": (lambda w: ag.embedding(w, np.zeros((2, 0), int)), [(3, 2)], np.zeros((2, 0, 2))),
    "embedding of an empty table": (lambda w: ag.embedding(w, []), [(0, 2)], np.zeros((0, 2))),
    "embedding without columns": (lambda w: ag.embedding(w, [1, 1]), [(3, 0)], np.zeros((2, 0))),
    "layer_norm of no row": (ag.layer_norm, [(0, 3), (3,), (3,)], np.zeros((0, 3))),
    "layer_norm of empty rows": (ag.layer_norm, [(2, 0), (0,), (0,)], np.zeros((2, 0))),
    "rms_norm of no row": (ag.rms_norm, [(2, 0, 3), (3,)], np.zeros((2, 0, 3))),
    "rms_norm of empty rows": (ag.rms_norm, [(2, 0), (0,)], np.zeros((2, 0))),
    "group_norm of no row": (lambda x: ag.group_norm(x, groups=2), [(0, 4)], np.zeros((0, 4))),
    "group_norm of empty rows": (lambda x: ag.group_norm(x, groups=2), [(3, 0)], np.zeros((3, 0))),
    "gelu": (ag.gelu, [(0, 3)], np.zeros((0, 3))), "gelu_tanh": (ag.gelu_tanh, [(0,)], np.zeros(0)),
    "dropout": (lambda x: ag.dropout(x, p=0.5), [(0, 3)], np.zeros((0, 3))),
    "cross_entropy of no row": (lambda x: ag.cross_entropy(x, []), [(0, 3)], 0.0),
    "losses of no row": (lambda x: ag.cross_entropy(x, [], reduction="none", label_smoothing=0.1), [(0, 3)], np.zeros(0)),
    "losses of no class": (lambda x: ag.cross_entropy(x, [9, 9], 9, "none"), [(2, 0)], np.zeros(2)),
    "causal_conv1d of no step": (ag.causal_conv1d, [(2, 0, 3), (3, 2), (3,)], np.zeros((2, 0, 3))),
    "causal_conv1d of no batch": (ag.causal_conv1d, [(0, 2, 3), (3, 2)], np.zeros((0, 2, 3))),
    "causal_conv1d of no channel": (ag.causal_conv1d, [(2, 2, 0), (0, 2)], np.zeros((2, 2, 0))),
    "conv1d of no batch": (ag.conv1d, [(0, 3, 2), (4, 2, 3), (4,)], np.zeros((0, 1, 4))),
    "conv1d of no channel": (ag.conv1d, [(2, 3, 0), (4, 0, 2)], np.zeros((2, 2, 4))),
    "conv1d to no channel": (ag.conv1d, [(2, 3, 2), (0, 2, 2), (0,)], np.zeros((2, 2, 0))),
    "conv1d of padding": (partial(ag.conv1d, padding=1), [(2, 0, 3), (2, 3, 2)], np.zeros((2, 1, 2))),
    "conv2d of no batch": (ag.conv2d, [(0, 3, 4, 2), (4, 2, 3, 2)], np.zeros((0, 1, 3, 4))),
    "conv2d of no column": (partial(ag.conv2d, padding=(0, 1)), [(1, 2, 0, 3), (2, 3, 2, 2)], np.zeros((1, 1, 1, 2))),
    "rfft of no row": (ag.rfft, [(0, 4)], np.zeros((0, 3, 2))),
    "irfft of no row": (ag.irfft, [(0, 3, 2)], np.zeros((0, 4))),
    "rfft of nothing padded": (lambda x: ag.rfft(x, n=4), [(2, 0)], np.zeros((2, 3, 2))),
    "complex_multiply": (ag.complex_multiply, [(0, 2), (0, 2)], np.zeros((0, 2))),
    "attention of no batch": (attention, [(0, 2, 3, 4)] * 3, np.zeros((0, 2, 3, 4))),
    "attention of no head": (attention, [(2, 0, 3, 4)] * 3, np.zeros((2, 0, 3, 4))),
    "attention of no query": (attention, [(1, 2, 0, 4), (1, 2, 3, 4), (1, 2, 3, 4)], np.zeros((1, 2, 0, 4))),
    "attention of no key": (attention, [(1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4)], np.zeros((1, 2, 3, 4))),
    "attention of no step": (attention, [(1, 2, 0, 4)] * 3, np.zeros((1, 2, 0, 4))),
    "attention without values": (attention, [(1, 1, 2, 3), (1, 1, 2, 3), (1, 1, 2, 0)], np.zeros((1, 1, 2, 0))),
    "add": (ag.add, [(0,), ()], np.zeros(0)),
    "where": (lambda x, y: ag.where(np.ones(0, bool), x, y), [(1,), ()], np.zeros(0)),
}


@table(("function", "shapes", "value"), EMPTY)
def test_of_nothing(function, shapes, value):
    expect(function, [some(*shape, seed=i) for i, shape in enumerate(shapes)], value, 3.0)


def test_what_is_next_to_nothing_keeps_its_gradient():
    x, nothing = [[1.0], [2.0]], np.zeros((2, 0))
    expect(lambda x, y: ag.concat([y, x, y], axis=1), [x, nothing], x, [[3.0], [5.0]], [[[3.0], [5.0]], nothing])
    expect(ag.linear, [nothing, np.zeros((3, 0)), [1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]] * 2, 2.0,
           [nothing, np.zeros((3, 0)), [4.0, 4.0, 4.0]])
    expect(lambda x, u: ag.scatter_add(x, [], u), [x, np.zeros((0, 1))], x, 2.0, [[[2.0], [2.0]], np.zeros((0, 1))])


def test_attention_without_channels_is_a_mean():
    """All scores are equal."""
    v, g = some(1, 1, 2, 3), some(1, 1, 2, 3, seed=1)
    expect(lambda q, k, v: attention(q, k, v, causal=False), [np.zeros((1, 1, 2, 0))] * 2 + [v],
           v.mean(2, keepdims=True).repeat(2, 2), g, [np.zeros((1, 1, 2,
                                                                0))] * 2 + [g.mean(2, keepdims=True).repeat(2, 2)])


@table(("error", "words", "function", "shape"), {
    "max": (ShapeError, ["max", "no element", "(0,)"], ag.max, (0,)),
    "min of empty rows": (ShapeError, ["min", "no element", "(2, 0)"], lambda x: x.min(1), (2, 0)),
    "var": (DomainError, ["var", "0 elements", "ddof = 0"], ag.var, (0,)),
    "std of empty columns": (DomainError, ["std", "0 elements", "ddof = 0"], lambda x: x.std(0), (0, 2)),
    "var of one, ddof 1": (DomainError, ["var", "1 elements", "ddof = 1"], lambda x: x.var(ddof=1), (1,)),
    "std of one, ddof 1": (DomainError, ["std", "1 elements", "ddof = 1"], lambda x: x.std(-1, ddof=1), (2, 1)),
    "reshape with -1": (ShapeError, ["reshape", "-1", "ambiguous"], lambda x: x.reshape(0, -1), (0, 2)),
    "rfft": (DomainError, ["rfft", "length", "0"], ag.rfft, (2, 0)),
    "rfft to n = 0": (DomainError, ["rfft", "length", "0"], lambda x: ag.rfft(x, 0), (2, 3)),
    "irfft of one bin": (DomainError, ["irfft", "length", "0"], ag.irfft, (1, 2)),
    "irfft of no bin": (ShapeError, ["irfft", "bin", "(0, 2)"], lambda y: ag.irfft(y, n=4), (0, 2)),
    "gather": (ShapeError, ["gather", "index 0", "size 0"], lambda x: ag.gather(x, [0]), (0, 2)),
    "getitem": (ShapeError, ["getitem", "0", "(0, 2)"], lambda x: x[0], (0, 2)),
    "embedding": (DomainError, ["embedding", "id 0"], lambda w: ag.embedding(w, [0]), (0, 2)),
    "cross_entropy": (DomainError, ["cross_entropy", "label 0"], lambda x: ag.cross_entropy(x, [0]), (1, 0)),
    "causal_conv1d without taps": (ShapeError, ["causal_conv1d", "tap"],
                                   lambda x: ag.causal_conv1d(x, np.ones((3, 0), x.dtype)),
                                   (1, 2, 3))})
def test_what_nothing_cannot_give(error, words, function, shape):
    refuse(error, words, function, np.ones(shape))


def test_a_language_model_takes_no_sequence_and_no_step():
    model = models.build("transformer", 5, np.float32, context=4, layers=1, width=8)
    for route in (forms, kernels):
        for shape in ((0, 3), (2, 0), (0, 0)):
            ids = np.zeros(shape, np.uint8)
            model.zero_grad()
            with route():
                assert model(ids).shape == (*shape, 5)
                loss = mean_loss(model, ids, ids)
                loss.backward()
            assert loss.item() == 0 and loss.dtype == np.float32
            assert not any(p.grad is not None and p.grad.data.any() for p in model.parameters())


# -- softmax and cross_entropy -----------------------------------------------------------------------------------------
E, F = math.exp(-1) / (1 + math.exp(-1)), 1 / (1 + math.exp(-1))  # the softmax of (-1, 0)
LOG2 = math.log(2)


@table(("function", "x", "value", "cotangent", "slope"), {
    "a row of -inf": (ag.softmax, [[-INF, -INF], [-1, 0]], [[0, 0], [E, F]], [[3, 5], [2, 0]],
                      [[0, 0], [2 * E * F, -2 * E * F]]),
    "a row hidden": (lambda x: ag.softmax(x, np.array([[False], [True]])), [[7, 8], [-1, 0]], [[0, 0], [E, F]],
                     [[3, 5], [2, 0]],
                     [[0, 0], [2 * E * F, -2 * E * F]]),
    "a column hidden": (lambda x: ag.softmax(x, np.array([[False, True]]), axis=0), [[7, -1], [8, 0]], [[0, E], [0, F]],
                        [[3, 2], [5, 0]], [[0, 2 * E * F], [0, -2 * E * F]]),
    "nan hidden": (lambda x: ag.softmax(x, np.array([False, True, True])), [NAN, -1, 0], [0, E, F], [9, 2, 0],
                   [0, 2 * E * F, -2 * E * F]),
    "inf hidden": (lambda x: ag.softmax(x, np.array([False, True, True])), [INF, -1, 0], [0, E, F], [9, 2, 0],
                   [0, 2 * E * F, -2 * E * F]),
    "-inf among numbers": (ag.softmax, [-INF, -1, 0], [0, E, F], [9, 2, 0], [0, 2 * E * F, -2 * E * F]),
    "a row with nan": (ag.softmax, [[NAN, 0], [-1, 0]], [[NAN, NAN], [E, F]], [[1, 2], [2, 0]],
                       [[NAN, NAN], [2 * E * F, -2 * E * F]]),
    "a row with inf": (ag.softmax, [[INF, 0], [-1, 0]], [[NAN, NAN], [E, F]], [[1, 2], [2, 0]],
                       [[NAN, NAN], [2 * E * F, -2 * E * F]]),
    "huge": (ag.softmax, [1e4, -1e4, 1e4], [0.5, 0, 0.5], [4, 9, 0], [1, 0, -1]),
    "one": (ag.softmax, [[-1e4], [INF - INF], [3]], [[1], [NAN], [1]], [[3], [3], [3]], [[0], [NAN], [0]]),
    "log, a row of -inf": (ag.log_softmax, [[-INF, -INF], [-1, 0]], [[-INF, -INF], [math.log(E), math.log(F)]],
                           [[3, 5], [2, 0]], [[0, 0], [2 - 2 * E, -2 * F]]),
    "log, a row hidden": (lambda x: ag.log_softmax(x, np.array([[False], [True]])), [[7, NAN], [-1, 0]],
                          [[-INF, -INF], [math.log(E), math.log(F)]], [[3, 5], [2, 0]], [[0, 0], [2 - 2 * E, -2 * F]]),
    "log, nan hidden": (lambda x: ag.log_softmax(x, np.array([False, True, True])), [NAN, -1, 0],
                        [-INF, math.log(E), math.log(F)], [9, 2, 0], [0, 2 - 2 * E, -2 * F]),
    "log, -inf among numbers": (ag.log_softmax, [-INF, -1, 0], [-INF, math.log(E), math.log(F)], [9, 2, 0],
                                [0, 2 - 2 * E, -2 * F]),
    "log, huge": (ag.log_softmax, [1e4, -1e4, 1e4], [-LOG2, -2e4 - LOG2, -LOG2], [1, 2, 4], [1 - 3.5, 2, 4 - 3.5]),
    "log, one": (ag.log_softmax, [[-1e4], [3]], [[0], [0]], [[3], [5]], [[0], [0]])})
def test_softmax(function, x, value, cotangent, slope):
    expect(function, [x], value, cotangent, [slope], terms=4)


@pytest.mark.parametrize("x", [[0.0, -1000.0], [-1000.0, -2000.0, -INF], [1e-300, 0.0]], ids=str)
@pytest.mark.parametrize("op", [ag.softmax, ag.log_softmax, ag.logsumexp, ag.softplus, ag.sigmoid, ag.exp],
                         ids=lambda op: op.name)
def test_nothing_is_raised_where_all_errors_are(op, x):
    for dtype in DTYPES:
        tensor = Tensor(np.array(x, np.float64).astype(dtype), requires_grad=True)
        with np.errstate(all="raise"), use(kernel="none"):
            y = op(tensor)
            y.backward(np.ones_like(y.data))


@pytest.mark.parametrize("op", [ag.softmax, ag.log_softmax], ids=lambda op: op.name)
@table("mask", {"longer": np.ones((2, 4), bool), "with a new axis": np.ones((2, 2, 3), bool)})
def test_a_mask_that_does_not_fit_is_refused(op, mask):
    refuse(ShapeError, [op.name, "mask", str(mask.shape)], lambda x: op(x, mask), np.ones((2, 3)))


@table(("labels", "ignored", "x", "value", "slope"), {
    "one class": ([0, 0], None, [[5], [-5]], 0, [[0], [0]]),
    "all ignored": ([9, 9], 9, [[1, 2], [3, 4]], 0, [[0, 0], [0, 0]]),
    "all ignored, nan": ([9, 9], 9, [[1, NAN], [INF, -INF]], 0, [[0, 0], [0, 0]]),
    "ignored, no class": ([9, 9], 9, np.zeros((2, 0)), 0, np.zeros((2, 0))),
    "one ignored": ([1, -100], -100, [[0, 0], [3, 4]], LOG2, [[0.5, -0.5], [0, 0]]),
    "one ignored, a class": ([1, 0], 0, [[0, 0], [3, 4]], LOG2, [[0.5, -0.5], [0, 0]]),
    "one ignored, nan": ([1, -1], -1, [[0, 0], [NAN, 4]], LOG2, [[0.5, -0.5], [0, 0]]),
    "one ignored, -inf": ([1, -1], -1, [[0, 0], [-INF, -INF]], LOG2, [[0.5, -0.5], [0, 0]]),
    "huge and right": ([0, 1], None, [[1e4, -1e4], [-1e4, 1e4]], 0, [[0, 0], [0, 0]]),
    "huge and wrong": ([1, 0], None, [[1e4, -1e4], [-1e4, 1e4]], 2e4, [[0.5, -0.5], [-0.5, 0.5]]),
    "-inf elsewhere": ([1, 2], None, [[-INF, 0, 0], [-INF, -INF, 7]], LOG2 / 2, [[0, -0.25, 0.25], [0, 0, 0]]),
    "-inf at the label": ([0], None, [[-INF, 0]], INF, [[-1, 1]]),
    "nan in one row": ([0, 1], None, [[NAN, 0], [0, 0]], NAN, [[NAN, NAN], [0.25, -0.25]]),
    "inf in one row": ([0, 1], None, [[INF, 0], [0, 0]], NAN, [[NAN, NAN], [0.25, -0.25]]),
    "two axes": ([[0], [1]], None, [[[0, 0]], [[0, 0]]], LOG2, [[[-0.25, 0.25]], [[0.25, -0.25]]]),
    "no axis": (1, None, [0, 0], LOG2, [0.5, -0.5])})
def test_cross_entropy(labels, ignored, x, value, slope):
    expect(lambda x: ag.cross_entropy(x, np.array(labels), ignore_index=ignored), [x], value, 3.0,
           [3.0 * np.asarray(slope, float)], terms=4)


def each_kernel_route(*ops):
    """Parametrise over the operators' kernels, on this processor, in the emulator and on a GPU."""
    return pytest.mark.parametrize(("op", "route"), [
        pytest.param(op, route, marks=marks(route), id=f"{op.name}, {route}") for op in ops for route in kernels_of(op)])


@each_kernel_route(ag.cross_entropy)
@pytest.mark.parametrize("offset", [0, 4096], ids=str)
@pytest.mark.parametrize("lead", [-9, -1, 0, 1, 6, 9, 15, 30], ids=lambda n: f"label ahead by {n}")
def test_a_small_loss_keeps_its_digits(op, route, lead, offset):
    for dtype, size, label in itertools.product(tried(op, route), (2, 40), (0, 1)):
        logits = np.full((1, size), offset, dtype)
        logits[0, label] += lead
        args, params = (logits, np.array([label])), {"ignore_index": None}
        rest = (size - 1) * math.exp(-lead)  # of all others together, in units of the label
        (loss,), gradient = compute(op, route, args, params), differentiate(op, route, args, params, [np.ones((), dtype)])[0]
        slope = np.full((1, size), rest / (size - 1) / (1 + rest))
        slope[0, label] = -rest / (1 + rest)
        np.testing.assert_allclose(loss, math.log1p(rest), rtol=16 * np.finfo(dtype).eps)
        np.testing.assert_allclose(gradient, slope, rtol=32 * np.finfo(dtype).eps)


@table(("options", "x", "value", "slope"), {
    "sum": ({"reduction": "sum"}, [[0, 0], [0, 0], [3, 4]], 2 * LOG2, [[-0.5, 0.5], [0.5, -0.5], [0, 0]]),
    "none": ({"reduction": "none"}, [[0, 0], [0, 0], [3, NAN]], [LOG2, LOG2, 0], [[-0.5, 0.5], [0.5, -0.5], [0, 0]]),
    "smoothed": ({"label_smoothing": 0.5, "reduction": "none"}, [[0, 2], [5, 5], [0, 0]],
                 [math.log1p(math.exp(2)) - 0.5, LOG2, 0],
                 [[1 / (1 + math.exp(2)) - 0.75, 0.75 - 1 / (1 + math.exp(2))], [0.25, -0.25], [0, 0]]),
    "smoothed to nothing": ({"label_smoothing": 1.0, "reduction": "sum"}, [[0, 0], [7, 7], [1, 2]], 2 * LOG2,
                            [[0, 0], [0, 0], [0, 0]]),
    "smoothed, -inf elsewhere": ({"label_smoothing": 0.5, "reduction": "none"}, [[0, -INF], [0, 0], [0, 0]], [INF, LOG2, 0],
                                 [[0.25, -0.25], [0.25, -0.25], [0, 0]]),
    "smoothed, -inf at the label": ({"label_smoothing": 0.5, "reduction": "none"}, [[-INF, 0], [0, 0], [0, 0]], [INF, LOG2, 0],
                                    [[-0.75, 0.75], [0.25, -0.25], [0, 0]]),
    "smoothed, nan in an ignored row": ({"label_smoothing": 0.5}, [[0, 0], [0, 0], [NAN, INF]], LOG2,
                                        [[-0.125, 0.125], [0.125, -0.125], [0, 0]]),
    "smoothed, nan in one row": ({"label_smoothing": 0.5, "reduction": "none"}, [[NAN, 0], [0, 0], [0, 0]], [NAN, LOG2, 0],
                                 [[NAN, NAN], [0.25, -0.25], [0, 0]])})
def test_reductions_and_smoothing_of_cross_entropy(options, x, value, slope):
    """The labels are 0, 1 and one that is ignored."""
    expect(lambda x: ag.cross_entropy(x, [0, 1, -1], ignore_index=-1, **options), [x], value, 3.0,
           [3.0 * np.asarray(slope, float)], terms=4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_that_are_not_reduced_have_a_gradient_each(smoothing):
    x, labels, g = some(2, 3, 5), np.array([[0, 4, 9], [9, 1, 0]]), some(2, 3, seed=1)
    value, slope = np.zeros((2, 3)), np.zeros((2, 3, 5))
    for b, t in np.ndindex(2, 3):
        if labels[b, t] != 9:
            target = (1 - smoothing) * np.eye(5)[labels[b, t]] + smoothing / 5
            value[b, t] = target @ (_norm(x[b, t], 0) - x[b, t])
            slope[b, t] = g[b, t] * (np.exp(x[b, t]) / np.exp(x[b, t]).sum() - target)
    expect(lambda x: ag.cross_entropy(x, labels, ignore_index=9, reduction="none", label_smoothing=smoothing), [x], value, g,
           [slope], terms=16)
    for reduction, share in (("sum", 1), ("mean", 4)):
        x, total = Tensor(x), value.sum() / share
        assert_close(ag.cross_entropy(x, labels, ignore_index=9, reduction=reduction, label_smoothing=smoothing), total)


@table(("options", "words"), {
    "an unknown reduction": ({"reduction": "max"}, ["reduction 'max'", "mean, sum, none"]),
    "no reduction": ({"reduction": None}, ["reduction None", "mean, sum, none"]),
    **{f"label_smoothing {value}": ({"label_smoothing": value}, [f"label_smoothing {value!r}", "from 0 to 1"])
       for value in (-0.1, 1.5, NAN, "0.1", None)}})
def test_cross_entropy_refuses(options, words):
    refuse(DomainError, ["cross_entropy", *words], lambda x: ag.cross_entropy(x, [0, 1], **options), np.zeros((2, 3)))


@table(("labels", "ignored", "words"), {
    "-1": ([0, -1], None, ["label -1", "0 .. 2"]), "the number of classes": ([3, 0], None, ["label 3", "0 .. 2"]),
    "-1 is not -100": ([0, -1], -100, ["label -1", "ignore_index = -100"]),
    "none is fine": ([7, 0], 1, ["label 7", "ignore_index = 1"])})
def test_a_label_out_of_range_is_refused(labels, ignored, words):
    refuse(DomainError, ["cross_entropy", *words], lambda x: ag.cross_entropy(x, np.array(labels),
                                                                              ignore_index=ignored),
           np.zeros((2, 3)))


# -- norms -------------------------------------------------------------------------------------------------------------
ROOT, UNIT = math.sqrt(1e-5), 1 / math.sqrt(1 + 1e-5)


@table(("function", "x", "value", "cotangent", "slope"), {
    "layer_norm of equals": (ag.layer_norm, [[0.1, 0.1, 0.1, 0.1], [-1, 1, -1, 1]],
                             [[0, 0, 0, 0], [-UNIT, UNIT, -UNIT, UNIT]],
                             [[1, 2, 6, 3], [2, 2, 2, 2]], [[-2 / ROOT, -1 / ROOT, 3 / ROOT, 0], [0, 0, 0, 0]]),
    "layer_norm of large equals": (ag.layer_norm, [1e6 + 0.25] * 3, [0, 0, 0], [1, 2, 6],
                                   [-2 / ROOT, -1 / ROOT, 3 / ROOT]),
    "layer_norm of one": (ag.layer_norm, [[5], [-3]], [[0], [0]], [[3], [5]], [[0], [0]]),
    "layer_norm of a number's row": (ag.layer_norm, [7], [0], 3, [0]),
    "group_norm of equals": (lambda x: ag.group_norm(x, groups=2), [3, 3, -5, -5], [0, 0, 0, 0], [1, 3, 2, 8],
                             [-1 / ROOT, 1 / ROOT, -3 / ROOT, 3 / ROOT]),
    "group_norm, one channel each": (lambda x: ag.group_norm(x, groups=3), [1, 2, 3], [0, 0, 0], [1, 2, 3], [0, 0, 0]),
    "rms_norm of zeros": (ag.rms_norm, [0, 0, 0], [0, 0, 0], [1, 2, 6], [1 / ROOT, 2 / ROOT, 6 / ROOT]),
    "rms_norm of one": (ag.rms_norm, [[0]], [[0]], 3, [[3 / ROOT]]),
    "layer_norm with nan in one row": (ag.layer_norm, [[1, NAN], [2, 2]], [[NAN, NAN], [0, 0]], [[1, 2], [1, 3]],
                                       [[NAN, NAN], [-1 / ROOT, 1 / ROOT]]),
    "rms_norm with nan in one row": (ag.rms_norm, [[1, NAN], [0, 0]], [[NAN, NAN], [0, 0]], [[1, 2], [1, 3]],
                                     [[NAN, NAN], [1 / ROOT, 3 / ROOT]])})
def test_norm(function, x, value, cotangent, slope):
    expect(function, [x], value, cotangent, [slope], terms=4)


def test_a_norm_of_equals_leaves_the_offset():
    x, weight, bias = np.full((2, 4), 0.3), some(4), some(4, seed=1)
    g = some(2, 4, seed=2)
    expect(ag.layer_norm, [x, weight, bias], [bias, bias], g,
           [(g * weight - (g * weight).mean(1, keepdims=True)) / ROOT, np.zeros(4), g.sum(0)], terms=4)


each_norm = pytest.mark.parametrize(("op", "route"), [
    pytest.param(op, route, marks=marks(route), id=f"{op.name}, {route}")
    for op in (ag.layer_norm, ag.group_norm, ag.rms_norm) for route in routes(op)[1:]])


@each_norm
@pytest.mark.parametrize("mean", [1e4, -1e6, 1e7], ids="mean {:g}".format)
def test_a_norm_of_values_far_from_0(op, route, mean):
    for dtype, width, spread in itertools.product(tried(op, route), (2, 16, 100), (1, 300)):
        x = (mean + spread * some(3, width)).astype(dtype)
        x[:, 0] = mean  # first, what all are compared with, and once something far from the others
        x[0, 0] += 1000 * spread
        affine = [some(width, seed=seed).astype(dtype) for seed in (1, 2)]
        args, params = (x, *affine)[: len(op.signature.inputs)], {"eps": 1e-5}
        if op is ag.group_norm:
            params["groups"] = 2 if width > 2 else 1
        check_values(op, route, args, params)
        check_gradients(op, route, args, params, [some(3, width, seed=3).astype(dtype)])


@pytest.mark.parametrize(("op", "route"), [case for case in each_norm.args[1] if case.values[0] is not ag.rms_norm])
def test_a_row_of_one_value_has_gradient_0_after_a_norm(op, route):
    for dtype, groups in itertools.product(tried(op, route), (1, 5) if op is ag.group_norm else (1,)):
        x, weight, g = ((factor * some(40, groups, seed=seed)).astype(dtype) for seed, factor in enumerate((1e4, 1, 3)))
        for affine in ((None, None), (weight[0], weight[1])):
            params = {"eps": 1e-5} | ({"groups": groups} if op is ag.group_norm else {})
            (y,) = compute(op, route, (x, *affine), params)
            gradients = differentiate(op, route, (x, *affine), params, [g])
            assert not gradients[0].any()
            np.testing.assert_array_equal(y, np.broadcast_to(0 if affine[1] is None else affine[1], y.shape))


@pytest.mark.parametrize("groups", [0, 2, 4, -1], ids=str)
def test_groups_that_do_not_divide_are_refused(groups):
    refuse(ShapeError, ["group_norm", "3 channels", f"groups = {groups}"], lambda x: ag.group_norm(x, groups=groups),
           np.ones(3))


# -- operators that move elements --------------------------------------------------------------------------------------
# Each case is a function of a Tensor and the same function of an array, which is applied to the positions 0, 1, 2, ...
# of the elements: y is x at these positions, the gradient is what arrives at each of them. Position -1 is a zero.
MOVES = {
    "transpose by negative axes": ((2, 3, 4), lambda x: ag.transpose(x, (-1, 0, 1)), lambda p: p.transpose(2, 0, 1)),
    "transpose by mixed axes": ((2, 3, 4), lambda x: ag.transpose(x, (1, -1, 0)), lambda p: p.transpose(1, 2, 0)),
    "transpose of a vector": ((3,), ag.transpose, lambda p: p),
    "transpose of a number": ((), ag.transpose, lambda p: p),
    "repeat the last axis": ((2, 3), lambda x: ag.repeat(x, 2, axis=-1), lambda p: p[:, [0, 0, 1, 1, 2, 2]]),
    "repeat the first axis": ((2, 3), lambda x: ag.repeat(x, 3, axis=0), lambda p: p[[0, 0, 0, 1, 1, 1]]),
    "repeat by a list": ((2, 3), lambda x: ag.repeat(x, [2, 0, 1]), lambda p: p[:, [0, 0, 2]]),
    "repeat by an array": ((2, 3), lambda x: ag.repeat(x, np.array([0, 3]), axis=-2), lambda p: p[[1, 1, 1]]),
    "tile of two axes by a number": ((2, 3), lambda x: ag.tile(x, 2), lambda p: p[:, [0, 1, 2, 0, 1, 2]]),
    "tile of one axis by two": ((3,), lambda x: ag.tile(x, (2, 2)), lambda p: np.array([[0, 1, 2, 0, 1, 2]] * 2)),
    "tile of two axes by one": ((2, 3), lambda x: ag.tile(x, (2,)), lambda p: p[:, [0, 1, 2, 0, 1, 2]]),
    "tile of two axes by two": ((2, 2), lambda x: ag.tile(x, (2, 1)), lambda p: p[[0, 1, 0, 1]]),
    "tile by nothing": ((2, 2), lambda x: ag.tile(x, ()), lambda p: p),
    "tile of a number": ((), lambda x: ag.tile(x, 3), lambda p: np.zeros(3, int)),
    "broadcast_to two new axes": ((3,), lambda x: ag.broadcast_to(x, (2, 4, 3)), lambda p: np.stack([[p] * 4] * 2)),
    "broadcast_to, old and new axes": ((2, 1), lambda x: ag.broadcast_to(x, (3, 2, 2)),
                                       lambda p: np.stack([p[:, [0, 0]]] * 3)),
    "broadcast_to of a number": ((), lambda x: ag.broadcast_to(x, (2, 2)), lambda p: np.zeros((2, 2), int)),
    "pad by nothing": ((2, 3), lambda x: ag.pad(x, ((0, 0), (0, 0))), lambda p: p),
    "pad one side": ((3,), lambda x: ag.pad(x, ((2, 0),)), lambda p: np.array([-1, -1, 0, 1, 2])),
    "pad the other side": ((3,), lambda x: ag.pad(x, ((0, 1),)), lambda p: np.array([0, 1, 2, -1])),
    "pad by numbers": ((2,), lambda x: ag.pad(x, (1,)), lambda p: np.array([-1, 0, 1, -1])),
    "pad a number": ((), ag.pad, lambda p: p),
    "flip two axes": ((2, 3), lambda x: ag.flip(x, (-1, 0)), lambda p: p[::-1, ::-1]),
    "flip no axis": ((2, 3), lambda x: ag.flip(x, ()), lambda p: p), "flip a number": ((), ag.flip, lambda p: p),
    "roll two axes": ((2, 3), lambda x: ag.roll(x, (1, -1), (0, -1)), lambda p: np.array([[4, 5, 3], [1, 2, 0]])),
    "roll one axis twice": ((3,), lambda x: ag.roll(x, (1, 1), (0, -1)), lambda p: np.array([1, 2, 0])),
    "roll all around": ((3,), lambda x: ag.roll(x, 300), lambda p: p),
    "roll backwards": ((3,), lambda x: ag.roll(x, -4), lambda p: np.array([1, 2, 0])),
    "concat of itself": ((2, 2), lambda x: ag.concat([x, x, x], axis=-1), lambda p: p[:, [0, 1, 0, 1, 0, 1]]),
    "stack of itself": ((2,), lambda x: ag.stack([x, x], axis=-1), lambda p: np.array([[0, 0], [1, 1]])),
    "stack of numbers": ((), lambda x: ag.stack([x, x]), lambda p: np.zeros(2, int)),
    "split and joined": ((4,), lambda x: ag.concat(ag.split(x, [1, 0, 3])[::-1]), lambda p: np.array([1, 2, 3, 0])),
    "one part of a split": ((2, 3), lambda x: ag.split(x, [1, 2])[1], lambda p: p[:, 1:]),
    "split into one": ((3,), lambda x: ag.split(x, 1)[0], lambda p: p),
    "swapaxes of an axis with itself": ((2, 3), lambda x: ag.swapaxes(x, 0, -2), lambda p: p),
    "tril of a wide matrix": ((2, 4), lambda x: ag.tril(x, 1), lambda p: np.array([[0, 1, -1, -1], [4, 5, 6, -1]])),
    "triu of a wide matrix": ((2, 4), lambda x: ag.triu(x, 1), lambda p: np.array([[-1, 1, 2, 3], [-1, -1, 6, 7]])),
    "tril of a tall matrix": ((3, 2), lambda x: ag.tril(x, -1), lambda p: np.array([[-1, -1], [2, -1], [4, 5]])),
    "triu far away": ((2, 2), lambda x: ag.triu(x, 9), lambda p: np.full((2, 2), -1)),
    "a diagonal beside the main one": ((2, 4), lambda x: x[np.arange(2), np.arange(2) + 1], lambda p: np.array([1, 6])),
    "the diagonal": ((3, 3), lambda x: ag.einsum([x], equation="ii->i"), lambda p: np.array([0, 4, 8])),
    "the diagonal of three": ((2, 2, 2), lambda x: ag.einsum([x], equation="iii->i"), lambda p: np.array([0, 7])),
    "reshape of a transpose": ((2, 3), lambda x: x.T.reshape(-1), lambda p: np.array([0, 3, 1, 4, 2, 5])),
    "reshape to a number": ((1, 1), lambda x: x.reshape(()), lambda p: np.array(0)),
    "sort": ((4,), ag.sort, lambda p: np.argsort(some(4))),
    "sort within rows": ((3, 4), ag.sort, lambda p: np.take_along_axis(p, some(3, 4).argsort(-1), -1)),
    "sort within columns, descending": ((3, 4), lambda x: ag.sort(x, 0, True),
                                        lambda p: np.take_along_axis(p, (-some(3, 4)).argsort(0), 0)),
    "gather by a matrix": ((2, 3), lambda x: ag.gather(x, [[0, 2], [2, 2]], axis=1), lambda p: p[:, [[0, 2], [2, 2]]]),
    "gather by a number": ((2, 3), lambda x: ag.gather(x, -1, axis=-1), lambda p: p[:, 2]),
    "take_along_axis, repeated": ((2, 3), lambda x: ag.take_along_axis(x, np.array([[0, 0, 0, 2], [-1, 1, -1, 1]])),
                                  lambda p: np.array([[0, 0, 0, 2], [5, 4, 5, 4]])),
    "embedding, repeated": ((3, 2), lambda w: ag.embedding(w, [[1, 1], [0, 1]]), lambda p: p[[[1, 1], [0, 1]]]),
    "embedding of a number": ((3, 2), lambda w: ag.embedding(w, 1), lambda p: p[1]),
}
A, B = np.array([0, 1, 1]), np.array([[2], [0]])
KEYS = {  # for an array of shape (2, 3, 4)
    "repeated": [1, 0, 1, 1], "negative": np.array([-1, -2]), "a list": ([0, 1],), "a 0-d array": np.array(1),
    "a NumPy integer": np.int16(-1), "a step of -1": np.s_[::-1], "a step of -2 from the middle": np.s_[:, :, 2::-2],
    "steps of both signs": np.s_[::-1, ::2, ::-3], "...": ..., "... in front": np.s_[..., 1],
    "... in the middle": np.s_[0, ..., ::2],
    "None": None, "None, ..., None": np.s_[None, ..., None], "None between": np.s_[:, None, 0], "nothing": (),
    "a slice of nothing": np.s_[:, 3:1], "a slice beyond the end": np.s_[:, 1:99], "all numbers": (1, 2, 3),
    "an empty array": np.zeros(0, int), "an empty list": [], "an empty matrix": np.zeros((2, 0), int),
    "True": True, "False": False, "a mask": np.array([False, True]), "a mask of a matrix": CUT[..., 0],
    "a mask of all": CUT,
    "a mask of nothing": np.zeros((2, 3), bool), "a mask behind": np.s_[:, :, np.array([True, False, True, True])],
    "a mask and an array": (np.array([True, True]), np.array([2, 2])),
    "a mask and a slice": (np.array([True, False]), np.s_[::2]),
    "arrays that broadcast": (A[:2, None], A), "arrays of three axes": (A, A, B), "a number and an array": (1, A),
    "an array and a number": (A, 0), "arrays around a slice": np.s_[A, :, A], "a number around a slice": np.s_[0, :, A],
    "arrays behind a slice": np.s_[:, A, A], "arrays before a slice": np.s_[A, A, 1:],
    "an array, None, an array": np.s_[A, None, A],
    "a matrix and a slice": np.s_[:, B, ::-1], "arrays and ...": np.s_[A, ..., B], "uint8": np.array([1, 1], np.uint8)}
MOVES |= {f"x[{name}]": ((2, 3, 4), lambda x, key=key: x[key], lambda p, key=key: p[key]) for name, key in KEYS.items()}


@table(("shape", "function", "moved"), MOVES)
def test_move(shape, function, moved):
    x = some(*shape)
    positions = np.asarray(moved(np.arange(x.size).reshape(shape)))
    value = np.append(x.reshape(-1), 0.0)[positions]
    g = some(*positions.shape, seed=1)
    slope = np.zeros(x.size + 1)
    for position, arrived in zip(positions.reshape(-1), g.reshape(-1), strict=True):
        slope[position] += arrived
    expect(function, [x], value, g, [slope[:-1].reshape(shape)], terms=4)


@table(("error", "words", "function"), {
    "an index too large": (ShapeError, ["getitem", "3"], lambda x: x[[0, 3]]),
    "an index too small": (ShapeError, ["getitem", "-4"], lambda x: x[np.array([-4])]),
    "too many indices": (ShapeError, ["getitem", "(3, 2)"], lambda x: x[0, 0, 0]),
    "arrays that do not broadcast": (ShapeError, ["getitem", "(2,)", "(3,)"], lambda x: x[[0, 1], [0, 1, 0]]),
    "a mask of another length": (ShapeError, ["getitem", "(3, 2)"], lambda x: x[np.array([True, False])]),
    "floats": (DtypeError, ["getitem", "float64"], lambda x: x[np.array([0.0])]),
    "a number with a point": (ShapeError, ["getitem"], lambda x: x[1.0]),
    "a Tensor": (DtypeError, ["getitem", "Tensor"], lambda x: x[x]),
    "gather too large": (ShapeError, ["gather", "index 2", "size 2"], lambda x: ag.gather(x, [0, 2], axis=1)),
    "gather too small": (ShapeError, ["gather", "index -4", "size 3"], lambda x: ag.gather(x, [-4])),
    "scatter_add too large": (ShapeError, ["scatter_add", "index 3", "size 3"],
                              lambda x: ag.scatter_add(x, [3, 0, 0], x)),
    "scatter_add of another shape": (ShapeError, ["scatter_add", "(3, 2)", "(2, 2)"],
                                     lambda x: ag.scatter_add(x, [0, 0], x)),
    "take_along_axis too large": (ShapeError, ["take_along_axis", "index 2", "size 2"],
                                  lambda x: ag.take_along_axis(x, np.full((3, 1), 2))),
    "take_along_axis of another shape": (ShapeError, ["take_along_axis", "(2, 1)", "(3, 2)"],
                                         lambda x: ag.take_along_axis(x, np.zeros((2, 1), int))),
    "take_along_axis of fewer axes": (ShapeError, ["take_along_axis", "(3,)", "(3, 2)"],
                                      lambda x: ag.take_along_axis(x, np.zeros(3, int), axis=0)),
    "add_along_axis of another shape": (ShapeError, ["add_along_axis", "(3, 2)", "(3, 1)"],
                                        lambda x: ag.add_along_axis(x, np.zeros((3, 1), int), x)),
    "embedding of -1": (DomainError, ["embedding", "id -1", "0 .. 2"], lambda x: ag.embedding(x, [0, -1])),
    "embedding too large": (DomainError, ["embedding", "id 3", "0 .. 2"], lambda x: ag.embedding(x, [3, 0])),
    "transpose of too few axes": (ShapeError, ["transpose", "permutation", "2 axes"], lambda x: ag.transpose(x, (0,))),
    "transpose of one axis twice": (ShapeError, ["transpose", "permutation", "2 axes"],
                                    lambda x: ag.transpose(x, (1, -1))),
    "reshape to another size": (ShapeError, ["reshape", "6 elements", "(4, 2)"], lambda x: x.reshape(4, 2)),
    "reshape that leaves a rest": (ShapeError, ["reshape", "6 elements"], lambda x: x.reshape(4, -1)),
    "reshape with two -1": (ShapeError, ["reshape", "one -1"], lambda x: x.reshape(-1, -1)),
    "reshape with -2": (ShapeError, ["reshape", "negative"], lambda x: x.reshape(-2, 3)),
    "broadcast_to fewer axes": (ShapeError, ["broadcast_to", "(3, 2)", "(2,)"], lambda x: x.broadcast_to((2,))),
    "broadcast_to another size": (ShapeError, ["broadcast_to", "(3, 2)", "(3, 4)"], lambda x: x.broadcast_to((3, 4))),
    "tile by a negative number": (ShapeError, ["tile", "-1"], lambda x: x.tile(-1)),
    "repeat by a negative number": (DomainError, ["repeat", "-1"], lambda x: x.repeat(-1)),
    "repeat by a fraction": (DomainError, ["repeat", "1.5"], lambda x: x.repeat(1.5)),
    "repeat by too few": (ShapeError, ["repeat", "1 repeats", "size 2"], lambda x: x.repeat([3])),
    "pad by too few": (ShapeError, ["pad", "2 axes"], lambda x: ag.pad(x, ((1, 1),))),
    "pad by a negative width": (ShapeError, ["pad", ">= 0"], lambda x: ag.pad(x, ((0, 0), (0, -1)))),
    "roll by too few": (ShapeError, ["roll", "1 shifts", "2 axes"], lambda x: ag.roll(x, 1, (0, 1))),
    "split with a rest": (ShapeError, ["split", "size 3", "2 equal"], lambda x: ag.split(x, 2, 0)),
    "split into nothing": (ShapeError, ["split", "0 equal"], lambda x: ag.split(x, 0)),
    "split into too much": (ShapeError, ["split", "(1, 2)", "add up to 2"], lambda x: ag.split(x, (1, 2))),
    "split by a negative size": (ShapeError, ["split", "(3, -1)"], lambda x: ag.split(x, (3, -1))),
    "concat of other sizes": (ShapeError, ["concat", "xs[1]", "(2, 3)", "(3, 2)"], lambda x: ag.concat([x, x.T])),
    "concat of other axes": (ShapeError, ["concat", "xs[1]", "(6,)", "(3, 2)"], lambda x: ag.concat([x, x.reshape(6)])),
    "stack of other shapes": (ShapeError, ["stack", "(2, 3)", "(3, 2)"], lambda x: ag.stack([x, x.T])),
    "tril of a vector": (ShapeError, ["tril", "2 axes", "(2,)"], lambda x: ag.tril(x[0])),
    "sort of a number": (ShapeError, ["sort", "axis -1", "0 axes"], lambda x: ag.sort(x[0, 0])),
    "matmul of a number": (ShapeError, ["matmul", "()", "(3, 2)"], lambda x: ag.matmul(x[0, 0], x)),
    "matmul of other sizes": (ShapeError, ["matmul", "(3, 2)"], lambda x: ag.matmul(x, x)),
    "matmul of other batches": (ShapeError, ["matmul", "(2, 3, 2)", "(3, 2, 3)"],
                                lambda x: ag.matmul(ag.stack([x] * 2), ag.stack([x.T] * 3))),
    "einsum of other sizes": (ShapeError, ["einsum", "j is 2 and 3"], lambda x: ag.einsum([x, x], equation="ij,ji->")),
    "einsum of a diagonal of other sizes": (ShapeError, ["einsum", "i is 3 and 2"],
                                            lambda x: ag.einsum([x], equation="ii->")),
    "einsum with too few letters": (ShapeError, ["einsum", "operand 0", "'i'"],
                                    lambda x: ag.einsum([x], equation="i->i")),
    "einsum with too few terms": (ShapeError, ["einsum", "2 operands"], lambda x: ag.einsum([x, x], equation="ij->i")),
    "einsum to an unknown letter": (ShapeError, ["einsum", "'ik'"], lambda x: ag.einsum([x], equation="ij->ik")),
    "einsum to a letter twice": (ShapeError, ["einsum", "'ii'"], lambda x: ag.einsum([x], equation="ij->ii")),
    "einsum with a digit": (ShapeError, ["einsum", "'i1'", "must be letters"], lambda x: ag.einsum([x], equation="i1->i")),
    "einsum with two dots": (ShapeError, ["einsum", "'..i'"], lambda x: ag.einsum([x], equation="..i->i")),
    "einsum with ... twice": (ShapeError, ["einsum", "'...i...'", "at most one"],
                               lambda x: ag.einsum([x], equation="...i...->i")),
    "einsum with ... and too few axes": (ShapeError, ["einsum", "operand 0", "(3, 2)", "3 letters"],
                                         lambda x: ag.einsum([x], equation="...ijk->...")),
    "einsum without ... in the output": (ShapeError, ["einsum", "'i'", "needs '...'"],
                                         lambda x: ag.einsum([x], equation="...i->i")),
    "einsum with ... of other sizes": (ShapeError, ["einsum", "`...` is 3 and 2", "operand 1"],
                                       lambda x: ag.einsum([x, x.T], equation="...i,...j->...")),
    "einsum of a diagonal beside 1": (ShapeError, ["einsum", "i is 3 and 1", "operand 0"],
                                      lambda x: ag.einsum([x[:, :1]], equation="ii->i"))})
def test_move_refused(error, words, function):
    refuse(error, words, function, np.arange(6.0).reshape(3, 2))


def test_scattering_repeated_indices_adds_every_update():
    for dtype, route in ROUTES:
        with route():
            u = np.array([1, 2, 4], dtype)
            assert ag.scatter_add(np.zeros(3, dtype), [0, 0, 1], u).numpy().tolist() == [3, 4, 0]
            assert ag.scatter_add(np.zeros((1, 2), dtype), [[1, 1]], u[None, None, 1:],
                                  axis=1).numpy().tolist() == [[0, 6]]
            assert ag.put_add(u, key=[1, -2, 1], shape=(3,)).numpy().tolist() == [0, 7, 0]
            assert ag.put_add(u[:2], key=np.array([True, False, True]), shape=(3,)).numpy().tolist() == [1, 0, 2]
            assert ag.put_add(u, key=np.s_[1:], shape=(4,)).numpy().tolist() == [0, 1, 2, 4]
            assert ag.add_along_axis(np.ones((1, 2), dtype), [[0, 0, 1]], u[None]).numpy().tolist() == [[4, 5]]


@pytest.mark.parametrize("axis", [0, 1, -1], ids=str)
def test_gathering_and_scattering_are_adjoint_to_the_last_bit(axis):
    """With whole numbers nothing is rounded, so the order of additions does not matter."""
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        x = rng.integers(-9, 9, (3, 4)).astype(dtype)
        ids = rng.integers(-x.shape[axis], x.shape[axis], 7)
        along = rng.integers(-x.shape[axis], x.shape[axis], (3, 7) if axis else (7, 4))
        key = (slice(None), ids) if axis else (ids,)
        zeros = np.zeros_like(x)
        pairs = [(partial(ag.gather, ids=ids, axis=axis), lambda y, z=zeros, i=ids: ag.scatter_add(z, i, y, axis=axis)),
                 (partial(ag.take_along_axis, ids=along, axis=axis),
                  lambda y, z=zeros, i=along: ag.add_along_axis(z, i, y, axis=axis)),
                 (partial(ag.getitem, key=key), partial(ag.put_add, key=key, shape=x.shape))]
        for gather, scatter in pairs:
            taken = gather(x).numpy()
            y = rng.integers(-9, 9, taken.shape).astype(dtype)
            assert np.sum(taken * y) == np.sum(x * scatter(y).numpy())
            for function, at, cotangent, slope in ((gather, x, y, scatter(y)), (scatter, y, x, gather(x))):
                leaf = Tensor(at, requires_grad=True)
                assert np.array_equal(gradients(function(leaf), [leaf], Tensor(cotangent))[0].data, slope.data)


@table(("x", "ascending", "descending"), {
    "equals keep their order": ([2, 1, 2, 1, 2], [1, 3, 0, 2, 4], [0, 2, 4, 1, 3]),
    "nan last": ([NAN, 1, NAN, 0], [3, 1, 0, 2], [1, 3, 0, 2]),
    "infinities": ([INF, NAN, 0, -INF], [3, 2, 0, 1], [0, 2, 3, 1]),
    "zeros of both signs": ([0.0, -0.0, -1, 0.0], [2, 0, 1, 3], [0, 1, 3, 2]), "one": ([5], [0], [0])})
def test_sort(x, ascending, descending):
    x, g = np.array(x, float), np.arange(1.0, len(x) + 1)
    for order, down in ((ascending, False), (descending, True)):
        assert ag.argsort(x, descending=down).tolist() == order
        assert ag.argsort(x[:, None], axis=0, descending=down)[:, 0].tolist() == order
        slope = np.zeros(len(x))
        slope[order] = g
        expect(lambda x, d=down: ag.sort(x, descending=d), [x], x[order], g, [slope])


# -- products ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shapes", [
    ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((5, 2, 3), (3,)), ((3,), (5, 3, 4)), ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (4, 3, 2)), ((1, 2, 3), (5, 3, 1)), ((2, 1), (1, 3)), ((1, 1), (1,)), ((2, 1, 3), (1, 3, 2)),
    ((0, 2, 3), (1, 3, 2)),
    ((2, 0), (3, 0, 2)), ((1,), (0, 1, 2))], ids=lambda pair: f"{pair[0]} @ {pair[1]}")
def test_matmul_of_all_shapes(shapes):
    a, b = (some(*shape, seed=i) for i, shape in enumerate(shapes))
    rows = (a[None] if a.ndim == 1 else a)[..., :, :, None]  # [.. i k 1]
    columns = (b[:, None] if b.ndim == 1 else b)[..., None, :, :]  # [.. 1 k j]
    value = (rows * columns).sum(-2)
    g = some(*value.shape, seed=2)
    found = [add_up(g[..., :, None, :] * other, own.shape).reshape(x.shape)
             for own, other, x in ((rows, columns, a), (columns, rows, b))]
    kept = value.shape[:-2] + value.shape[-2:-1] * (a.ndim > 1) + value.shape[-1:] * (b.ndim > 1)
    expect(ag.matmul, [a, b], value.reshape(kept), g.reshape(kept), found, terms=8)


EINSUMS = {"ii->": [(3, 3)], "ij->": [(2, 3)], "ij->j": [(2, 3)], "ij->ji": [(2, 3)], "iij->j": [(2, 2, 3)],
           "iji->ij": [(2, 3, 2)],
           "iij,jk->ki": [(2, 2, 3), (3, 2)], "i,j->ij": [(2,), (3,)], "ij,kl->il": [(2, 3), (2, 2)],
           "ij,ij->": [(2, 3), (2, 3)],
           "ij,->ij": [(2, 3), ()], ",->": [(), ()], "i,i,i->i": [(3,), (3,), (3,)],
           "ij,jk,kl->li": [(2, 3), (3, 2), (2, 4)],
           "bik,bkj->bij": [(2, 3, 2), (2, 2, 4)], "ij,jk": [(2, 3), (3, 2)], "ba": [(2, 3)], "ii": [(3, 3)],
           "ij,i,j->": [(2, 3), (2,), (3,)], "ab,ab->ba": [(2, 3), (2, 3)], "ii,i->i": [(3, 3), (3,)],
           "i,ij->": [(1,), (1, 1)], "...ij,...jk->...ik": [(2, 3, 3), (3, 4)], "i,i->": [(2,), (1,)],
           "...i": [(2, 3, 2)], "i...,...i": [(2, 3), (3, 2)], "...,...->...": [(2, 1), (1, 3)], "b...,b->...b": [(2, 3), (1,)],
           "...ii->...i": [(3, 2, 2)], "...ij,jk": [(2, 1, 3, 2), (2, 4)], "jj,j->j": [(1, 1), (3,)],
           "ab,bc,...c->...a": [(1, 2), (2, 1), (4, 3)], "ij,...": [(2, 1), (4,)], "i->...i": [(3,)],
           "... i, ... i": [(3, 2, 2), (2, 1)], "...a,...b->...ba": [(1, 2, 3), (4, 1, 2)]}


@table(("equation", "shapes"), {e: (e, s) for e, s in EINSUMS.items()})
def test_einsum(equation, shapes):
    arrays = [some(*shape, seed=i) for i, shape in enumerate(shapes)]
    for dtype, route in ROUTES:
        with route():
            found = ag.einsum([x.astype(dtype) for x in arrays], equation=equation)
        assert_close(found, np.einsum(equation, *arrays), equation, terms=16)
    gradcheck(lambda *xs: ag.einsum(list(xs), equation=equation), *arrays, analytic=True)


@table(("function", "x", "value", "cotangent", "slope"), {
    "einsum(x, x)": (lambda x: ag.einsum([x, x], equation="i,i->"), [1, 2, 3], 14, 2, [4, 8, 12]),
    "outer(x, x)": (lambda x: ag.einsum([x, x], equation="i,j->ij"), [1, 2], [[1, 2], [2, 4]], [[1, 2], [4, 8]],
                    [1 * 1 + 2 * 2 + 1 * 1 + 4 * 2, 4 * 1 + 8 * 2 + 2 * 1 + 8 * 2]),
    "x @ x": (lambda x: x @ x, [1, 2, 3], 14, 2, [4, 8, 12]),
    "x x x": (lambda x: x * x * x, [2, -3], [8, -27], 2, [24, 54]),
    "x / x": (lambda x: x / x, [2, -4], [1, 1], 3, [0, 0]), "x - x": (lambda x: x - x, [2, -4], [0, 0], 3, [0, 0]),
    "x ** x": (lambda x: x**x, [1], [1], 3, [3]), "maximum(x, x)": (lambda x: ag.maximum(x, x), [5], [5], 3, [3]),
    "where(x, x)": (lambda x: ag.where(np.array([True, False]), x, x), [5, 6], [5, 6], [3, 4], [3, 4]),
    "linear(x, x)": (lambda x: ag.linear(x, x), [[1, 2]], [[5]], 3, [[6, 12]]),
    "scatter_add(x, x)": (lambda x: ag.scatter_add(x, [0, 0], x), [1, 2], [4, 2], [3, 5], [6, 8]),
    "attention(x, x, x)": (lambda x: attention(x, x, x), [[[[3, 4]]]], [[[[3, 4]]]], 2, [[[[2, 2]]]])})
def test_one_tensor_as_several_inputs(function, x, value, cotangent, slope):
    expect(function, [x], value, cotangent, [slope], terms=4)


# -- Fourier transforms and convolutions -------------------------------------------------------------------------------
SCALES = {"backward": lambda n: (1.0, 1 / n), "ortho": lambda n: (n**-0.5, n**-0.5), "forward": lambda n: (1 / n, 1.0)}


def rfft_matrix(length, n):
    """[bins, 2, length]: x, cut or padded to n, times the cosines and sines."""
    bins, t = np.arange(n // 2 + 1)[:, None], np.arange(length)
    angle = 2 * PI * bins * t / n
    return np.where(t < n, np.stack([np.cos(angle), -np.sin(angle)], 1), 0.0)


def irfft_matrix(bins, n):
    """[n, bins, 2]: each bin and its conjugate, except bin 0 and n / 2, which are real."""
    out = np.zeros((n, bins, 2))
    for k in range(min(bins, n // 2 + 1)):
        angle = 2 * PI * k * np.arange(n) / n
        alone = k == 0 or 2 * k == n
        out[:, k, 0] = np.cos(angle) * (1 if alone else 2)
        out[:, k, 1] = 0 if alone else -2 * np.sin(angle)
    return out


@pytest.mark.parametrize("norm", SCALES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7])
def test_rfft_of_every_length(length, norm):
    x = some(2, length)
    for n in (None, 1, 2, 3, 4, 7, 8, 9):
        size = length if n is None else n
        matrix = rfft_matrix(length, size) * SCALES[norm](size)[0]
        value = np.einsum("kpt,bt->bkp", matrix, x)
        g = some(*value.shape, seed=n or 0)
        for call in (lambda x, n=n: ag.rfft(x, n=n, norm=norm), lambda x, n=n: ag.rfft(x, n, norm)):
            found, (slope,) = run(call, [x], g, np.float64)
            assert_close(found, value, f"n = {n}", terms=16)
            assert_close(slope, np.einsum("kpt,bkp->bt", matrix, g), f"n = {n}", terms=16)


@pytest.mark.parametrize("norm", SCALES)
@pytest.mark.parametrize("bins", [1, 2, 3, 4])
def test_irfft_of_every_length(bins, norm):
    y = some(2, bins, 2)
    for n in (None, 1, 2, 3, 4, 5, 8, 9):
        size = 2 * (bins - 1) if n is None else n
        if size < 1:
            continue
        matrix = irfft_matrix(bins, size) * SCALES[norm](size)[1]
        g = some(2, size, seed=n or 0)
        for call in (lambda y, n=n: ag.irfft(y, n=n, norm=norm), lambda y, n=n: ag.irfft(y, n, norm)):
            found, (slope,) = run(call, [y], g, np.float64)
            assert_close(found, np.einsum("tkp,bkp->bt", matrix, y), f"n = {n}", terms=16)
            assert_close(slope, np.einsum("tkp,bt->bkp", matrix, g), f"n = {n}", terms=16)


def test_irfft_without_a_length_gives_an_even_one():
    x = np.arange(5.0)
    assert ag.irfft(ag.rfft(x)).shape == (4,)
    assert_close(ag.irfft(ag.rfft(x), n=5), x)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_imaginary_parts_of_the_first_and_the_last_bin_have_no_gradient(n):
    y, g = some(n // 2 + 1, 2), some(n, seed=1)
    _, (slope,) = run(lambda y: ag.irfft(y, n=n), [y], g, np.float64)
    assert slope[0, 1] == 0 and (n % 2 or slope[-1, 1] == 0)
    assert np.count_nonzero(slope[:, 1]) == (n - 1) // 2


def test_an_unknown_norm_is_refused():
    refuse(DomainError, ["rfft", "backward, ortho, forward", "'none'"], lambda x: ag.rfft(x, norm="none"), np.ones(3))
    refuse(DomainError, ["irfft", "backward, ortho, forward", "'none'"], lambda x: ag.irfft(x, n=3, norm="none"),
           np.ones((2, 2)))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_convolution_is_the_direct_sum(length, width):
    """By transforms padded against wrapping around, and directly; the filter may be longer than the sequence."""
    x, w, g = some(length), some(width, seed=1), some(length, seed=2)
    value, by_x, by_w = np.zeros(length), np.zeros(length), np.zeros(width)
    for t in range(length):
        for j in range(min(t + 1, width)):
            value[t] += w[j] * x[t - j]
            by_x[t - j] += w[j] * g[t]
            by_w[j] += x[t - j] * g[t]

    def transformed(x, w):
        n = length + width - 1
        return ag.irfft(ag.complex_multiply(ag.rfft(x, n=n), ag.rfft(w, n=n)), n=n)[:length]

    def direct(x, w):
        return ag.causal_conv1d(x.reshape(1, length, 1), ag.flip(w).reshape(1, width)).reshape(length)

    for function in (transformed, direct):
        for dtype, route in ROUTES:
            with route():
                found, slopes = run(function, [x, w], g, dtype)
            scale = np.abs([*value, *by_x, *by_w, 1]).max()  # of all, because sums may cancel in one of them
            for a, b in zip((found, *slopes), (value, by_x, by_w), strict=True):
                assert a.dtype == dtype
                assert_close(np.append(a, scale).astype(dtype), np.append(b, scale), terms=length * width)


@pytest.mark.parametrize("form", ["columns", "taps"])
@table(("call", "x", "weight", "value", "slopes"), {
    "stride 2": (partial(ag.conv1d, stride=2), [1, 2, 3, 4, 5], [1, 10], [21, 43], ([1, 10, 1, 10, 0], [4, 6])),
    "stride beyond the filter": (partial(ag.conv1d, stride=3), [1, 2, 3, 4, 5], [1, 10], [21, 54], ([1, 10, 0, 1, 10], [5, 7])),
    "padding": (partial(ag.conv1d, padding=1), [1, 2], [1, 10, 100], [210, 21], ([11, 110], [1, 3, 2])),
    "padding beyond the filter": (partial(ag.conv1d, padding=2), [5], [3], [0, 0, 15, 0, 0], ([3], [5])),
    "dilation": (partial(ag.conv1d, dilation=2), [1, 2, 3, 4], [1, 10], [31, 42], ([1, 1, 10, 10], [3, 7])),
    "all three": (partial(ag.conv1d, stride=2, padding=2, dilation=3), [1, 2, 3, 4], [1, 10], [20, 41, 3],
                  ([1, 10, 1, 10], [4, 6])),
    "two axes": (partial(ag.conv2d, stride=(1, 2), padding=(1, 0)), [[1, 2, 3, 4]], [[1, 10], [100, 1000]],
                 [[2100, 4300], [21, 43]], ([[101, 1010, 101, 1010]], [[4, 6], [4, 6]])),
    "two axes, dilated": (partial(ag.conv2d, dilation=(2, 1)), [[1, 2], [3, 4], [5, 6]], [[1], [10]], [[51, 62]],
                          ([[1, 1], [0, 0], [10, 10]], [[3], [11]]))})
def test_convolution_by_hand(call, x, weight, value, slopes, form):
    def one_channel(x, weight):
        with use(call.func, form=form):
            y = call(x.reshape(1, *x.shape, 1), weight.reshape(1, 1, *weight.shape))
        return y.reshape(y.shape[1:-1])

    expect(one_channel, [x, weight], value, 1.0, slopes)


def test_a_convolution_of_groups_is_one_for_each():
    x, weight, bias, g = some(2, 5, 6), some(4, 3, 2, seed=1), some(4, seed=2), some(2, 3, 4, seed=3)

    def apart(x, weight, bias):
        return ag.concat([ag.conv1d(x[..., :3], weight[:2], bias[:2], stride=2, padding=1),
                          ag.conv1d(x[..., 3:], weight[2:], bias[2:], stride=2, padding=1)], axis=-1)

    value, slopes = run(apart, [x, weight, bias], g, np.float64)
    expect(partial(ag.conv1d, stride=2, padding=1, groups=2), [x, weight, bias], value, g, slopes, terms=30)


def test_as_many_groups_as_channels_are_causal_conv1d():
    """Padded by the past that the filter sees, and cut."""
    x, weight, bias, g = some(2, 5, 3), some(3, 4, seed=1), some(3, seed=2), some(2, 5, 3, seed=3)
    value, slopes = run(ag.causal_conv1d, [x, weight, bias], g, np.float64)
    expect(lambda x, w, b: ag.conv1d(x, w.reshape(3, 1, 4), b, padding=3, groups=3)[:, :5], [x, weight, bias], value, g, slopes,
           terms=20)


@table(("error", "words", "call"), {
    "a filter that is too long": (ShapeError, ["conv1d", "(4, 2, 3)", "spans 5", "2 + 2 · 1"],
                                  lambda x: ag.conv1d(x[:, :2, 0], x[:1].reshape(-1)[:24].reshape(4, 2, 3), dilation=2,
                                                      padding=1)),
    "too long on one axis": (ShapeError, ["conv2d", "spans 3", "2 + 2 · 0"],
                             lambda x: ag.conv2d(x[:, :, :2], np.ones((1, 2, 1, 3), x.dtype))),
    "no tap": (ShapeError, ["conv2d", "tap", "(1, 2, 0, 3)"], lambda x: ag.conv2d(x, np.ones((1, 2, 0, 3), x.dtype))),
    "other channels": (ShapeError, ["conv2d", "2 channels", "groups = 1", "(1, 3, 1, 1)"],
                       lambda x: ag.conv2d(x, np.ones((1, 3, 1, 1), x.dtype))),
    "groups of other sizes": (ShapeError, ["conv2d", "2 channels", "groups = 2", "(2, 2, 1, 1)"],
                              lambda x: ag.conv2d(x, np.ones((2, 2, 1, 1), x.dtype), groups=2)),
    "groups that do not divide the outputs": (ShapeError, ["conv2d", "groups = 2", "(3, 1, 1, 1)"],
                                              lambda x: ag.conv2d(x, np.ones((3, 1, 1, 1), x.dtype), groups=2)),
    **{f"{name} {value}": (DomainError, ["conv2d", f"{name} {value!r}", "an integer >= "],
                           lambda x, name=name, value=value: ag.conv2d(x, np.ones((2, 2, 1, 1), x.dtype), **{name: value}))
       for name, value in (("stride", 0), ("stride", 1.5), ("stride", (1, 2, 3)), ("padding", -1), ("padding", True),
                           ("padding", "same"), ("dilation", (1, 0)), ("groups", 0), ("groups", (1, 1)))},
    "two strides for one axis": (DomainError, ["conv1d", "stride (1, 2)", "allowed: an integer >= 1"],
                                 lambda x: ag.conv1d(x[:, :, 0], np.ones((2, 2, 1), x.dtype), stride=(1, 2)))})
def test_a_convolution_refuses(error, words, call):
    refuse(error, words, call, np.ones((2, 4, 5, 2)))


# -- attention ---------------------------------------------------------------------------------------------------------
def attended(q, k, v, g, seen):
    """The values and the three gradients of attention at a cotangent, from whole matrices; ``seen`` [.., T, S]."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = np.where(seen, scale * q @ np.swapaxes(k, -1, -2), -np.inf)
    top = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    slope = g @ np.swapaxes(v, -1, -2)
    slope = scale * weights * (slope - (slope * weights).sum(-1, keepdims=True))
    turned = np.swapaxes(slope, -1, -2), np.swapaxes(weights, -1, -2)
    return weights @ v, [slope @ k, turned[0] @ q, turned[1] @ g]


def expect_attention(q, k, v, seen, call=attention):
    g = some(*q.shape[:3], v.shape[-1], seed=9)
    value, slopes = attended(q, k, v, g, seen)
    for dtype, route in ROUTES:
        with route():
            found, gradients_ = run(call, [q, k, v], g, dtype)
        for a, b, what in zip((found, *gradients_), (value, *slopes), ("y", "q", "k", "v"), strict=True):
            scale = np.abs(b).max(initial=1)
            assert a.dtype == dtype
            assert_close(np.append(a, scale).astype(dtype), np.append(b, scale), what,
                         terms=max(q.shape[2], k.shape[2]))


def below(queries, keys):
    return np.arange(keys) <= np.arange(queries)[:, None] + keys - queries


LENGTHS = [(1, 1), (1, 33), (31, 31), (32, 32), (33, 33), (33, 1), (40, 33), (3, 128), (33, 129), (129, 128), (5, 257)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pair: f"{pair[0]} queries, {pair[1]} keys")
def test_attention_around_the_sizes_of_tiles(lengths):
    """With fewer keys than queries the first ones see nothing."""
    queries, keys = lengths
    q, k, v = some(1, 2, queries, 3), some(1, 2, keys, 3, seed=1), some(1, 2, keys, 2, seed=2)
    expect_attention(q, k, v, below(queries, keys))
    expect_attention(q, k, v, np.ones((queries, keys), bool), lambda q, k, v: attention(q, k, v, causal=False))


@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (32, 32), (33, 31), (65, 64)], ids=str)
def test_attention_around_the_widths_of_panels(widths):
    q, k, v = some(2, 1, 4, widths[0]), some(2, 1, 5, widths[0], seed=1), some(2, 1, 5, widths[1], seed=2)
    expect_attention(q, k, v, below(4, 5))


@table("shape", {"S": (6,), "1 S": (1, 6), "T 1": (5, 1), "T S": (5, 6), "H 1 1": (3, 1, 1), "B 1 1 S": (2, 1, 1, 6),
                 "B 1 T 1": (2, 1, 5, 1), "B H T S": (2, 3, 5, 6), "1": (1,), "none": ()})
def test_masks_of_attention_broadcast(shape):
    q, k, v = some(2, 3, 5, 2), some(2, 3, 6, 2, seed=1), some(2, 3, 6, 2, seed=2)
    mask = np.asarray(some(*shape, seed=3) > -0.5)
    expect_attention(q, k, v, below(5, 6) & mask, lambda q, k, v: attention(q, k, v, mask))
    expect_attention(q, k, v, np.broadcast_to(mask, (2, 3, 5, 6)), lambda q, k,
                     v: attention(q, k, v, mask, causal=False))


def test_attention_of_one_step_is_its_value():
    q, v, g = some(2, 3, 1, 4), some(2, 3, 1, 5, seed=1), some(2, 3, 1, 5, seed=2)
    expect(attention, [q, 1e4 * q, v], v, g, [0 * q, 0 * q, g], terms=4)


def test_queries_that_see_nothing_give_zeros_and_leave_the_others_alone():
    q, k, v = some(2, 1, 4, 2), some(2, 1, 4, 2, seed=1), some(2, 1, 4, 3, seed=2)
    g = some(2, 1, 4, 3, seed=9)
    seen = np.ones((2, 1, 4, 4), bool)
    seen[0, 0, 2] = seen[1] = False
    value, slopes = attended(q, k, v, g, seen)
    for a in (value[0, 0, 2], value[1], slopes[0][0, 0, 2], slopes[0][1], slopes[1][1], slopes[2][1]):
        a[...] = 0  # to be met exactly
    expect(lambda q, k, v: attention(q, k, v, seen, causal=False), [q, k, v], value, g, slopes, terms=16)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30], ids=str)
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("route", [forms, kernels], ids=lambda f: f.__name__)
def test_what_attention_hides_may_hold_anything(route, where, bad):
    """Keys that no query sees."""
    q, k, v = some(1, 1, 4, 2), some(1, 1, 4, 2, seed=1), some(1, 1, 4, 3, seed=2)
    g = some(1, 1, 4, 3, seed=9)
    mask = np.array([True, False, True, True])
    value, slopes = attended(q, k, v, g, below(4, 4) & mask)
    spoilt = [q, k.copy(), v.copy()]
    spoilt[1 if where == "keys" else 2][:, :, 1] = bad
    for dtype in [dtype for dtype, along in ROUTES if along is route]:
        with route():
            found, gradients_ = run(lambda q, k, v: attention(q, k, v, mask), spoilt, g, dtype)
        for a, b in zip((found, *gradients_), (value, *slopes), strict=True):
            assert_close(a, b, terms=16)


# -- what comes later --------------------------------------------------------------------------------------------------
# That earlier outputs do not see later inputs, even where these are no numbers, are laws; here are the gradients.
CAUSAL = {op: [law for law in op.laws if str(law).startswith("causal")] for op in operators()}
CAUSAL = {op: laws for op, laws in CAUSAL.items() if len(laws) == 2}  # with numbers, and with what is no number


def before_and_after(op, law, draw):
    """Inputs of a drawn call, the same with others after a position, parameters and cotangents; None for a short sequence."""
    args, params = draw_inputs(op, draw)
    calls = []

    def definition(args, params):
        calls.append(args)
        return compute(op, "definition", args, params)

    law.check(Case(op, args, params, definition), draw)
    return (*calls, params, draw_cotangents(op, args, params, draw)) if calls else None


def earlier(gradients, before, after):
    """Of each gradient, what belongs to numbers that are the same before and after."""
    return {i: g[before[i] == after[i]] for i, g in gradients.items()}


@cache
def without_later_positions(op, numbers):
    """The inputs whose gradients at earlier positions do not depend on what comes later: q of attention, but not k."""
    found = set(floats(op, specimen(op)[0]))
    for seed in range(60):
        call = before_and_after(op, numbers, Draw.seeded(seed))
        if call:
            before, after, params, cotangents = call
            old, new = (earlier(differentiate(op, f"form {next(iter(op.forms))}", args, params, cotangents), before, after)
                        for args in (before, after))
            found -= {i for i in old if not np.allclose(new[i], old[i], rtol=1e-9, atol=1e-12)}
    return found


@pytest.mark.full
@each("op, route", ((op, route) for op in CAUSAL for route in routes(op)
                     if differentiable(op, route) and CAUSAL[op][1].holds_for(route)),
      group=lambda op, route: op)
def test_a_gradient_that_no_later_position_enters_does_not_see_what_is_no_number_there(op, route):
    numbers, no_numbers = CAUSAL[op]
    independent, taken, checked = without_later_positions(op, numbers), tried(op, route), False
    for seed in range(12 if parsed(route)[2] == "emulator" else 40):
        with np.errstate(all="ignore"):
            call = before_and_after(op, no_numbers, Draw.seeded(seed, taken[seed % len(taken)]))
        if call is None:
            continue
        before, after, params, cotangents = call
        try:
            old, new = (earlier(differentiate(op, route, args, params, cotangents), before, after) for args in (before, after))
        except KernelError:  # it declines such numbers
            continue
        for i in independent & set(old):
            assert_close(new[i], old[i], f"seed {seed}: gradient of {op.signature.inputs[i].name}", terms=64)
            checked = True
    assert checked or not independent


LONG = {  # over several tiles, panels and chunks
    "attention": ((2, "B H T K", "B H T K", "B H T V"), {}),
    "retention": ((2, "B H T K", "B H T K", "B H T V", "H"), {"normalization": "paper"}),
    "aft_simple": ((1, "B T V", "B T V", "B T V"), {}), "aft_full": ((1, "B T V", "B T V", "B T V", "T T"), {}),
    "aft_local": ((1, "B T V", "B T V", "B T V", "T W"), {}), "aft_conv": ((1, "B T V", "B T H", "B T V", "H W"), {}),
    "favor": ((2, "B H T K", "B H T K", "B H T V", "F K", None, "B H F V", "B H F"), {}),
    "favor, relu": ((2, "B H T K", "B H T K", "B H T V", "F K", None, "B H F V", "B H F"), {"features": "relu"}),
}


@pytest.mark.parametrize(("name", "route"), [pytest.param(name, route, marks=marks(route)) for name in LONG
                                             for route in ("kernel cpu", "kernel cuda on emulator")])
def test_a_long_sequence_sees_nothing_of_what_comes_later(name, route):
    (axis, *shapes), params = LONG[name]
    op, sizes = ag.REGISTRY[name.partition(",")[0]], {"B": 2, "H": 2, "T": 150, "K": 40, "V": 36, "W": 5, "F": 40}
    if parsed(route)[2] == "emulator":
        sizes.update(B=1, T=75)
    args = [shape and some(*(sizes[letter] for letter in shape.split()), seed=i).astype(np.float32)
            for i, shape in enumerate(shapes)]
    if name == "retention":
        args[3] = np.array([0.9, 0.99], np.float32)
    args += [None] * (len(op.signature.inputs) - len(args))

    def earlier_numbers(args, cut):
        outputs = compute(op, route, args, params)
        seeds = [np.ones_like(outputs[0]), *(np.zeros_like(x) for x in outputs[1:])]
        return [np.moveaxis(x, axis, 0)[:cut] for x in (outputs[0], differentiate(op, route, args, params, seeds)[0])]

    for cut, bad in ((1, NAN), (31, 3e38), (40, NAN), (65, 3e38), (70, NAN)):  # products of 3e38 overflow
        spoilt = [np.moveaxis(x.copy(), axis, 0) for x in args[:3]]
        for x in spoilt:
            x[cut:] = bad
        try:
            found = earlier_numbers([*(np.moveaxis(x, 0, axis) for x in spoilt), *args[3:]], cut)
        except KernelError:  # it declines such numbers
            assert bad == 3e38
            continue
        for old, new in zip(earlier_numbers(args, cut), found, strict=True):
            assert_close(new, old, f"{name} before {cut}", terms=256)


def test_huge_scores_choose_one_key():
    q, k = np.full((1, 1, 2, 1), 1e4), np.array([[[[1.0], [-1.0], [1e4]]]])
    v, g = some(1, 1, 3, 2), some(1, 1, 2, 2, seed=1)
    slope = np.zeros((1, 1, 3, 2))
    slope[0, 0, 2] = g.sum((0, 1, 2))
    expect(lambda q, k, v: attention(q, k, v, causal=False), [q, k, v], v[:, :, [2, 2]], g, [0 * q, 0 * k, slope],
           terms=4)


@table(("error", "words", "options"), {
    "mask": (ShapeError, ["mask", "(3,)", "(1, 1, 2, 2)"], {"mask": np.ones(3, bool)}),
    "mask with another axis": (ShapeError, ["mask", "(2, 1, 1, 1, 1)"], {"mask": np.ones((2, 1, 1, 1, 1), bool)}),
    "mask that repeats queries": (ShapeError, ["mask", "(3, 1, 1, 1)"], {"mask": np.ones((3, 1, 1, 1), bool)}),
    "additive mask": (DtypeError, ["mask", "boolean"], {"mask": np.full((2, 2), -1e9)}),
    "dropout above 1": (DomainError, ["dropout", "[0, 1]", "1.5"], {"dropout": 1.5}),
    "dropout below 0": (DomainError, ["dropout", "[0, 1]", "-0.1"], {"dropout": -0.1}),
    "dropout nan": (DomainError, ["dropout", "[0, 1]", "nan"], {"dropout": NAN})})
def test_attention_refuses(error, words, options):
    refuse(error, ["attention", *words], lambda x: attention(x, x, x, **options), np.ones((1, 1, 2, 2)))


# -- dropout -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 3, 4, 5, 37])
def test_dropout_at_0_is_the_identity_and_at_1_gives_zeros(size):
    x, g = np.append(some(size - 1), 2.0), some(size, seed=1)
    expect(lambda x: ag.dropout(x, p=0.0, seed=5), [x], x, g, [g])
    spoilt = np.where(x > 0, INF, x)
    spoilt[-1] = NAN
    expect(lambda x: ag.dropout(x, p=1.0, seed=5), [spoilt], np.zeros(size), g, [np.zeros(size)])
    expect(lambda x: attention(x, x, x, dropout=1.0), [x[None, None, :, None]], np.zeros((1, 1, size, 1)), 3.0)


@pytest.mark.parametrize("p", [-0.1, 1.1, NAN, INF], ids=str)
def test_a_probability_out_of_range_is_refused(p):
    refuse(DomainError, ["dropout", "[0, 1]", str(p)], lambda x: ag.dropout(x, p=p), np.ones(3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids=str)
def test_dropout_keeps_the_mean(p):
    """Within five standard deviations; the cotangent goes through the same mask."""
    n = 20_000
    for dtype, route in ROUTES:
        with route():
            y, (slope,) = run(lambda x: ag.dropout(x, p=p, seed=3), [np.ones(n)], 3.0, dtype)
        assert abs(y.astype(float).mean() - 1) < 5 * math.sqrt(p / (1 - p) / n)
        assert_close(slope, 3 * y)
        assert set(np.unique(y)) == {0, dtype(1 / (1 - p))}


def test_dropout_of_attention_keeps_the_mean():
    """Equal scores: each query's output is the share of kept keys, over 1 - p."""
    zeros, ones = np.zeros((2, 4, 50, 1)), np.ones((2, 4, 50, 1))
    for dtype, route in ROUTES:
        with route():
            y, (_, _, slope) = run(lambda q, k, v: attention(q, k, v, causal=False, dropout=0.5, seed=1),
                                   [zeros, zeros, ones], 1.0, dtype)
        assert abs(y.astype(float).mean() - 1) < 5 / math.sqrt(2 * 4 * 50 * 50)
        assert slope.sum(dtype=float) == pytest.approx(y.sum(dtype=float), rel=1e-6)
        assert len(np.unique(y.round(3))) > 5


# -- adamw -------------------------------------------------------------------------------------------------------------
def _adamw(dtype, param, grad, m, v, **settings):
    return [a.tolist() for a in ag.adamw(*(np.array(x, dtype) for x in (param, grad, m, v)), **settings)]


def test_adamw_without_gradients_divides_nothing_by_nothing():
    for dtype, route in ROUTES:
        with route():
            assert _adamw(dtype, [1, -2], [0, 0], [0, 0], [0, 0]) == [[1, -2], [0, 0], [0, 0]]
            assert _adamw(dtype, [], [], [], []) == [[], [], []]
            decayed = _adamw(dtype, [1, -2, 4], [0] * 3, [0] * 3, [0] * 3, lr=0.5, weight_decay=0.5, decayed=2)
            assert decayed == [[0.75, -1.5, 4], [0, 0, 0], [0, 0, 0]]


def test_a_nan_of_adamw_stays_where_it_is():
    for dtype, route in ROUTES:
        with route():
            spoilt = _adamw(dtype, [1] * 37, [1] * 18 + [NAN] + [1] * 18, [0] * 37, [0] * 37)
            clean = _adamw(dtype, [1] * 37, [1] * 37, [0] * 37, [0] * 37)
        for a, b in zip(spoilt, clean, strict=True):
            assert np.isnan(a).nonzero()[0].tolist() == [18]
            assert a[:18] + a[19:] == b[:18] + b[19:]


@table(("settings", "words"), {"step 0": ({"step": 0}, ["step"]), "decayed -1": ({"decayed": -1}, ["decayed", "-1"]),
                               "decayed too large": ({"decayed": 4}, ["decayed <= 3", "4"])})
def test_adamw_refuses(settings, words):
    refuse(DomainError, ["adamw", *words], lambda x: ag.adamw(x, x, x, x, **settings), np.ones(3))


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay", "scale"])
def test_settings_of_adamw_may_be_numpy_scalars_and_widen_nothing(name):
    arrays = [some(5), some(5, seed=1), some(5, seed=2), np.ones(5)]
    for dtype, route in ROUTES:
        with route():
            plain, numpy = (ag.adamw(*(a.astype(dtype) for a in arrays), decayed=3, **{name: number})
                            for number in (0.25, np.float64(0.25)))
        for a, b in zip(plain, numpy, strict=True):
            assert a.dtype == b.dtype == dtype and np.array_equal(a, b)


# -- what is changed after a call --------------------------------------------------------------------------------------
TWO = np.array([[True, False, True], [True, True, False]])
CHANGED = {  # a function of x[2, 3] and an argument, that argument, and what it is overwritten with before backward
    "ids of embedding": (ag.embedding, np.array([0, 0]), [1, 0]),
    "ids of take_along_axis": (ag.take_along_axis, np.array([[0], [1]]), [[2], [2]]),
    "ids of scatter_add": (lambda x, i: ag.scatter_add(np.zeros((2, 3), x.dtype), i, x), np.array([0, 0]), [1, 0]),
    "ids of add_along_axis": (lambda x, i: ag.add_along_axis(0.0 * x, i, x), np.array([[0, 0, 1]] * 2),
                              [[2, 1, 0]] * 2),
    "labels of cross_entropy": (ag.cross_entropy, np.array([0, 2]), [1, 1]),
    "mask of softmax": (ag.softmax, TWO.copy(), ~TWO), "mask of log_softmax": (
        lambda x, m: ag.where(m.copy(), ag.log_softmax(x, m), 0.0), TWO.copy(), ~TWO),
    "mask of attention": (lambda x, m: attention(*[x.reshape(1, 1, 2, 3)] * 3, m, causal=False)[0], TWO[:, :2].copy(),
                          [[0, 1], [1, 0]]),
    "a list as an index": (lambda x, key: x[key], [0, 0], [1, 0]),
    "a list in an index": (lambda x, key: ag.getitem(x, key=(slice(None), key)), [0, 0], [1, 2]),
    "key of put_add": (lambda x, key: ag.put_add(x, key=key, shape=(3, 3)), np.array([0, 0]), [1, 2]),
    "counts of repeat": (ag.repeat, np.array([1, 2, 1]), [2, 1, 1]),
    "a list of counts": (ag.repeat, [1, 2, 1], [2, 1, 1]),
    "sizes of split": (lambda x, sizes: ag.split(x, sizes)[0], [1, 1, 1], [0, 1, 2]),
    "axes of transpose": (ag.transpose, [1, 0], [0, 1]), "axes of sum": (lambda x, axes: x.sum(axes, True), [0], [1]),
    "axes of flip": (ag.flip, [0], [1]), "shape of reshape": (ag.reshape, [3, 2], [6, 1]),
    "shifts of roll": (lambda x, shift: ag.roll(x, shift, (0, 1)), [1, 1], [0, 2]),
    "widths of pad": (ag.pad, [[1, 0], [0, 1]], [[0, 1], [1, 0]]), "tile": (ag.tile, [1, 2], [2, 1]),
    "the list of concat": (lambda x, parts: ag.concat([x * float(p) for p in parts]), [1, 2], [2, 1])}


@table(("function", "argument", "other"), CHANGED)
def test_an_argument_that_is_changed_after_the_call_changes_no_gradient(function, argument, other):
    kind = np.array if isinstance(argument, np.ndarray) else list
    changed = kind(other) if kind is list else np.array(other, argument.dtype)
    for dtype, route in ROUTES:
        found, shapes = [], []
        for start, end in ((argument, argument), (argument, changed), (changed, changed)):
            x, given = Tensor(ROW.astype(dtype), requires_grad=True), kind(start)
            with route():
                y = function(x, given)
                given[:] = end
                found.append(gradients(y, [x], Tensor(some(*y.shape).astype(dtype)))[0].data)
            shapes.append(y.shape)
        assert np.array_equal(found[0], found[1])
        assert shapes[0] != shapes[2] or not np.array_equal(found[0], found[2]), "the case proves nothing"


@table("function", {
    "identity": ag.identity, "reshape": lambda x: x.reshape(3, 2), "transpose": ag.transpose, "T": lambda x: x.T,
    "swapaxes": lambda x: ag.swapaxes(x, 0, 1), "broadcast_to": lambda x: x.broadcast_to((4, 2, 3)), "flip": ag.flip,
    "split": lambda x: ag.split(x, 3)[1], "split, kept": lambda x: ag.split(x, 1)[0], "a slice": lambda x: x[:, 1:],
    "...": lambda x: x[...], "None": lambda x: x[None], "a row": lambda x: x[0], "one element": lambda x: x[0, 1],
    "tile": lambda x: x.tile(1), "tile to new axes": lambda x: x.tile((2, 1, 1)), "repeat": lambda x: x.repeat(1),
    "concat of one": lambda x: ag.concat([x]), "stack of one": lambda x: ag.stack([x]),
    "pad by 0": lambda x: ag.pad(x, (0, 0)),
    "roll by 0": lambda x: x.roll(0), "einsum": lambda x: ag.einsum([x], equation="ij->ji"), "clip": ag.clip,
    "einsum of nothing": lambda x: ag.einsum([x], equation="ij->ij"), "dropout": ag.dropout,
    "iteration": lambda x: next(iter(x)),
    "sum of nothing": lambda x: x.sum(()), "max of nothing": lambda x: x.max(()), "tril": lambda x: ag.tril(x, 5),
    "astype": lambda x: x.astype(np.float64), "sort": lambda x: ag.sort(x, 0), "relu": ag.relu,
    "where": lambda x: ag.where(np.array(True), x, 0.0), "gather": lambda x: ag.gather(x, [0, 1])})
def test_an_update_of_x_in_place_is_noticed_by_what_shares_its_memory(function):
    """Or it changes nothing: never a gradient at the new values of what was computed from the old ones."""
    x = Tensor(np.arange(1.0, 7.0).reshape(2, 3), requires_grad=True)
    y = function(x)
    before, shared = y.numpy().copy(), np.shares_memory(y.data, x.data)
    z = (y * y).sum()
    x.assign_(np.zeros((2, 3)))
    try:
        slope, = gradients(z, [y])
    except GraphError as error:
        assert "updated in place" in str(error)
    else:
        assert not shared and np.array_equal(slope.data, 2 * before)


# -- kernels -----------------------------------------------------------------------------------------------------------
def each_kernel(function):
    return pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)(function)


def drawn(op, dtype, count=12):
    """Inputs and cotangents for several calls of an operator."""
    for seed in range(count):
        draw = Draw.seeded(seed, dtype)
        args, params = draw_inputs(op, draw)
        yield args, params, draw_cotangents(op, args, params, draw)


def computed(op, args, params, cotangents) -> list[bytes]:
    """The bits of all outputs and gradients of a kernel."""
    with use(op, kernel="cpu"), np.errstate(all="ignore"):
        values = flat(op, args)
        places = floats(op, args)
        for i in places:
            values[i] = Tensor.wrap(values[i], requires_grad=op.differentiable)
        outputs = listed(op(*unflat(op, values), **params))
        arrays = [o.data if isinstance(o, Tensor) else o for o in outputs]
        if op.differentiable:
            pairs = [(o, Tensor.wrap(c)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
            found = gradients([o for o, _ in pairs], [values[i] for i in places], [c for _, c in pairs])
            arrays = [*arrays, *(g.data for g in found)]
    return [np.ascontiguousarray(a).tobytes() for a in arrays]


def banded(x, filler):
    """A copy of an array in the middle of memory that is filled with something else."""
    if x is None:
        return None
    whole = np.full(x.size + 256, filler[x.dtype.kind], x.dtype)
    whole[128:128 + x.size] = x.reshape(-1)
    return whole[128:128 + x.size].reshape(x.shape)


@each_kernel
def test_a_kernel_reads_nothing_beside_its_arrays(op):
    """What lies before and after them is NaN once, and huge once: times 0, the one shows and the other does not."""
    fillers = [{"f": 0.0, "i": 0, "b": False}, {"f": NAN, "i": -1, "b": True}, {"f": 1e30, "i": 2**31, "b": True}]
    for dtype in COMPILED:
        for args, params, cotangents in drawn(op, dtype):
            bits = [computed(op, unflat(op, [banded(x, f) for x in flat(op, args)]), params,
                             [banded(c, f) for c in cotangents])
                    for f in fillers]
            assert bits[0] == bits[1] == bits[2]


@each_kernel
def test_a_kernel_writes_every_element_of_what_it_allocates(op, monkeypatch):
    """Fresh memory holds NaN here, instead of what happens to be there."""
    def spoilt(make):
        def poisoned(*args, **kwargs):
            array = make(*args, **kwargs)
            array.fill({"f": NAN, "b": True}.get(array.dtype.kind, 77))
            return array
        return poisoned

    for dtype in COMPILED:
        for args, params, cotangents in list(drawn(op, dtype)):
            clean = computed(op, args, params, cotangents)  # and compiled
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", spoilt(np.empty))
                patch.setattr(np, "empty_like", spoilt(np.empty_like))
                assert np.isnan(np.empty(3)).all() and np.isnan(np.empty_like(np.ones(1))).all()
                assert computed(op, args, params, cotangents) == clean


@each_kernel
def test_a_kernel_in_several_threads_gives_the_same_bits(op):
    cases = [case for dtype in COMPILED for case in drawn(op, dtype, 6)]
    expected = [computed(op, *case) for case in cases]
    found, start = [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(5):
            found.append([computed(op, *case) for case in cases])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(bits == expected for bits in found)


def test_kernels_keep_nan_and_infinities_and_have_no_races():
    assert not {"nnan", "ninf", "fast"} & set(FLAGS["fastmath"]) and not FLAGS.get("parallel")


@each_kernel
def test_a_kernel_of_another_device_is_not_replaced_by_this_one(op):
    args, params, _ = next(drawn(op, np.float32))
    with pytest.raises(KernelError, match=rf"{op.name}.*'cuda"), use(op, kernel="cuda"):
        op(*args, **params)


@pytest.mark.full
@each("op, route, size", ((op, str(k), size) for op in KERNELS for k in op.kernels.values() if k.device == "cpu"
                          for size in SIZES), group=lambda op, route, size: op)
def test_kernel_around_the_sizes_of_vectors(op, route, size):
    for dtype in COMPILED:
        for args, params, cotangents in awkward_calls(op, route, size, 2, dtype, 24_000):
            check_values(op, route, args, params, reference=f"form {next(iter(op.forms))}")
            if differentiable(op, route):
                check_gradients(op, route, args, params, cotangents, reference=f"form {next(iter(op.forms))}")
