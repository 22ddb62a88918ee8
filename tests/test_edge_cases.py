"""What every operator does at its edges, by family; the name of a case stands in the brackets of its test.

A case is run in float32 and in float64, with and without kernels. Its expected values are worked out by hand or by code
that shares nothing with the engine, and the gradient is compared as well, at cotangents that are not all ones.
"""

from __future__ import annotations

import itertools
import math
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import operators
from operator_checks import check_gradients, check_values, draw_cotangents, flat, floats, listed, unflat

import autograd as ag
from autograd import (
    DomainError,
    DtypeError,
    GraphError,
    ShapeError,
    Tensor,
    assert_close,
    gradcheck,
    gradients,
    use,
)
from autograd.draw import Draw, draw_inputs
from autograd.random import Random
from minitv.mixers.transformer import TransformerOptions
from minitv.models.lm import LanguageModel
from minitv.ops import attention
from minitv.options import ModelOptions

DTYPES = (np.float32, np.float64)
KERNELS = [op for op in operators() if "cpu" in op.kernels]
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


ROUTES = list(itertools.product(DTYPES, (forms, kernels)))


def run(function, inputs, cotangent, dtype):
    """The output of a function of Tensors and its gradients at a cotangent, as arrays."""
    tensors = [Tensor(np.asarray(x, dtype), requires_grad=True) for x in inputs]
    output = function(*tensors)
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
                "x * int": lambda x: x * 3, "float * x": lambda x: 3.0 * x, "x * 0-d": lambda x: x * np.array(3, np.float32)})
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


# -- elementwise: values, kinks and saturations ------------------------------------------------------------------------
POINTS = {  # (x, y, dy/dx)
    "relu": (ag.relu, [(-2, 0, 0), (-0.0, 0, 0), (0, 0, 0), (3, 3, 1), (INF, INF, 1), (-INF, 0, 0)]),
    "relu_squared": (ag.relu_squared, [(-2, 0, 0), (0, 0, 0), (3, 9, 6)]),
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
    "log of sigmoid": (lambda x: -ag.softplus(-x), [(-1e4, -1e4, 1), (-1000, -1000, 1), (0, -math.log(2), 0.5), (1e4, 0, 0)]),
    "silu": (ag.silu, [(-1e30, 0, 0), (-1e4, 0, 0), (0, 0, 0.5), (1e4, 1e4, 1), (1e30, 1e30, 1)]),
    "gelu": (ag.gelu, [(-1e30, 0, 0), (-1e4, 0, 0), (0, 0, 0.5), (1, 0.841344746068542949, 1.083315470587686298),
                       (-1, -0.158655253931457051, -0.083315470587686298), (1e4, 1e4, 1), (1e30, 1e30, 1)]),
    "gelu_tanh": (ag.gelu_tanh, [(-1e4, 0, 0), (0, 0, 0.5), (1, 0.841191990608276705, 1.082964083845782555),
                                 (-1, -0.158808009391723295, -0.082964083845782555), (1e4, 1e4, 1)]),
    "gelu_tanh where x * x overflows": (ag.gelu_tanh, [(-1e30, 0, 0), (1e30, 1e30, 1)]),
    "x ** 0": (lambda x: x**0, [(-2, 1, 0), (0, 1, 0), (3, 1, 0)]),
    "x ** 1": (lambda x: x**1, [(-2, -2, 1), (0, 0, 1)]),
    "x ** 2": (lambda x: x**2, [(-3, 9, -6), (0, 0, 0)]),
    "x ** 3": (lambda x: x**3, [(-2, -8, 12), (0, 0, 0)]),
    "x ** 0.5": (lambda x: x**0.5, [(0, 0, INF), (4, 2, 0.25)]),
    "x ** -1": (lambda x: x**-1, [(-2, -0.5, -0.25), (0, INF, -INF)]),
    "0 ** x": (lambda x: 0**x, [(0, 1, 0), (0.5, 0, 0), (2, 0, 0)]),
    "2 ** x": (lambda x: 2**x, [(-1, 0.5, 0.5 * math.log(2)), (0, 1, math.log(2))]),
}


@table(("function", "point"), {f"{name} at {x:g}": (function, (x, y, slope))
                               for name, (function, points) in POINTS.items() for x, y, slope in points})
def test_elementwise_at(function, point):
    x, y, slope = point
    expect(function, [[x]], [y], 3.0, [[3 * slope]], terms=4)
    expect(function, [np.full(37, x)], np.full(37, y), 3.0, [np.full(37, 3 * slope)], terms=4)  # vector and remainder


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
    "a negative base": (ag.power, -2, 3, -8, 12, NAN)})
def test_two_numbers(op, x, y, value, by_x, by_y):
    expect(op, [[x], [y]], [value], 3.0, [[3 * by_x], [3 * by_y]], terms=4)


@table(("power", "second"), {"0": (0, 0.0), "1": (1, 0.0), "2": (2, 2.0), "3": (3, 0.0)})
def test_second_derivative_of_a_power_at_0(power, second):
    x = Tensor([0.0], requires_grad=True)
    first, = gradients((x**power).sum(), [x], create_graph=True)
    assert gradients(first.sum(), [x])[0].numpy().tolist() == [second]


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
    "embedding": lambda x: ag.embedding(x[:, None], [0, 3]), "take_along_axis": lambda x: ag.take_along_axis(x, [1, 2])})
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
       for name in ("sum", "mean", "var", "std", "max", "min", "prod", "cumsum", "flip", "sort", "argsort")},
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


REDUCTIONS = {**{name: AXES[name] for name in ("sum", "mean", "var", "std", "max", "min", "prod", "logsumexp")}}


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
    "max of two equals": (ag.max, [2, 1, 2], 2, [0.5, 0, 0.5]), "min of two equals": (ag.min, [1, 2, 1], 1, [0.5, 0, 0.5]),
    "max of all equal": (ag.max, [[3, 3], [3, 3]], 3, [[0.25, 0.25], [0.25, 0.25]]),
    "max of equals in some columns": (lambda x: ag.max(x, 0), [[1, 5], [1, 4], [0, 3]], [1, 5], [[0.5, 1], [0.5, 0], [0, 0]]),
    "max of zeros": (ag.max, [0.0, -0.0, -1], 0, [0.5, 0.5, 0]),
    "max of a third each": (ag.max, [7, 7, 7], 7, [1 / 3, 1 / 3, 1 / 3]),
    "max with a nan": (ag.max, [1, NAN, 2], NAN, [0, 1, 0]), "min with a nan": (ag.min, [1, NAN, 2], NAN, [0, 1, 0]),
    "max with a nan in one row": (lambda x: ag.max(x, 1), [[1, NAN], [3, 2]], [NAN, 3], [[0, 1], [1, 0]]),
    "max of infinities": (ag.max, [INF, 0, INF], INF, [0.5, 0, 0.5]), "max of -inf": (ag.max, [-INF, -INF], -INF, [0.5, 0.5]),
    "prod without a zero": (ag.prod, [2, 3, 4], 24, [12, 8, 6]), "prod with one zero": (ag.prod, [2, 0, 4], 0, [0, 8, 0]),
    "prod with two zeros": (ag.prod, [0, 3, 0], 0, [0, 0, 0]), "prod of one zero": (ag.prod, [0], 0, [1]),
    "prod with zeros in some rows": (lambda x: ag.prod(x, 1, True), [[2, 3], [0, 5], [0, 0]], [[6], [0], [0]],
                                     [[3, 2], [5, 0], [0, 0]]),
    "prod over two axes with a zero": (lambda x: ag.prod(x, (2, 0)), [[[2, 0], [1, 2]], [[3, 5], [3, 4]]], [0, 24],
                                       [[[0, 30], [24, 12]], [[0, 0], [8, 6]]]),
    "prod of a number": (ag.prod, 0.0, 0, 1),
    "std of equals": (ag.std, [0.1, 0.1, 0.1], 0, [0, 0, 0]), "var of equals": (ag.var, [0.1, 0.1, 0.1], 0, [0, 0, 0]),
    "std of equals in one row": (lambda x: ag.std(x, -1), [[7.3, 7.3], [1, 3]], [0, 1], [[0, 0], [-0.5, 0.5]]),
    "std of one": (ag.std, [5], 0, [0]), "var of one": (ag.var, [5], 0, [0]), "std of a number": (ag.std, 5.0, 0, 0),
    "norm of zeros": (lambda x: ag.std(ag.concat([x, -x])), [0, 0], 0, [0, 0]),
    "var about a large mean": (ag.var, [4096.25, 4096.75], 0.0625, [-0.25, 0.25]),
    "mean of a selection of none": (lambda x: x[x.data > 9].mean(), [1, 2], NAN, [0, 0]),
    "sum of a selection of none": (lambda x: x[x.data > 9].sum(), [1, 2], 0, [0, 0]),
    "logsumexp of -inf": (ag.logsumexp, [-INF, -INF], -INF, [0, 0]), "logsumexp of one": (ag.logsumexp, [5], 5, [1]),
    "logsumexp of one -inf": (ag.logsumexp, [-INF], -INF, [0]),
    "logsumexp with -inf": (ag.logsumexp, [-INF, 0, 0], math.log(2), [0, 0.5, 0.5]),
    "logsumexp with inf": (ag.logsumexp, [1, INF, 2], INF, [0, 1, 0]),
    "logsumexp with two inf": (ag.logsumexp, [INF, -INF, INF], INF, [0.5, 0, 0.5]),
    "logsumexp of large": (ag.logsumexp, [1e4, 1e4], 1e4 + math.log(2), [0.5, 0.5]),
    "logsumexp of far apart": (ag.logsumexp, [-1e4, 1e4], 1e4, [0, 1]),
    "logsumexp with a nan": (ag.logsumexp, [[NAN, 1], [0, 0]], [NAN, math.log(2)], [[NAN, NAN], [0.5, 0.5]]),
    "logsumexp of one bad row": (ag.logsumexp, [[-INF, -INF], [0, 0]], [-INF, math.log(2)], [[0, 0], [0.5, 0.5]]),
    "logaddexp(-inf, -inf)": (lambda x: ag.logsumexp(ag.stack([x, x]), axis=0), [-INF], [-INF], [0]),
    "logsumexp of a number": (lambda x: ag.logsumexp(x, axis=None), 3.0, 3, 1)})
def test_reduction(function, x, value, slope):
    expect(function, [x], value, 3.0, [3.0 * np.asarray(slope, float)], terms=4)


def test_second_derivative_of_a_product_with_a_zero():
    """x0 x1 x2 at (0, 2, 3): the sum of its slopes is x1 x2 + x0 x2 + x0 x1."""
    x = Tensor([0.0, 2.0, 3.0], requires_grad=True)
    first, = gradients(ag.prod(x), [x], create_graph=True)
    assert first.numpy().tolist() == [6.0, 0.0, 0.0]
    assert gradients(first.sum(), [x])[0].numpy().tolist() == [5.0, 3.0, 2.0]


# -- nothing: axes of size 0 -------------------------------------------------------------------------------------------
ROPE = some(2, 3)
EMPTY = {  # a function, the shapes of its inputs, and its value: all gradients are zeros of the inputs' shapes
    "sum": (ag.sum, [(0,)], 0.0), "sum of columns": (lambda x: x.sum(0), [(0, 3)], np.zeros(3)),
    "sum of no column": (lambda x: x.sum(1), [(0, 3)], np.zeros(0)),
    "mean": (ag.mean, [(0,)], NAN), "mean of rows": (lambda x: x.mean(1), [(2, 0)], [NAN, NAN]),
    "mean of no row": (lambda x: x.mean(1), [(0, 2)], np.zeros(0)), "prod": (ag.prod, [(2, 0)], 1.0),
    "prod of rows": (lambda x: x.prod(-1), [(2, 0)], [1.0, 1.0]), "logsumexp": (ag.logsumexp, [(2, 0)], [-INF, -INF]),
    "logsumexp of no row": (ag.logsumexp, [(0, 2)], np.zeros(0)), "max of no row": (lambda x: x.max(1), [(0, 2)], np.zeros(0)),
    "min of no row": (lambda x: x.min(1), [(0, 2)], np.zeros(0)), "var of no row": (lambda x: x.var(1), [(0, 2)], np.zeros(0)),
    "std of no row": (lambda x: x.std(1), [(0, 2)], np.zeros(0)), "cumsum": (ag.cumsum, [(2, 0)], np.zeros((2, 0))),
    "softmax of empty rows": (ag.softmax, [(2, 0)], np.zeros((2, 0))), "softmax of no row": (ag.softmax, [(0, 2)], np.zeros((0, 2))),
    "log_softmax of empty rows": (ag.log_softmax, [(2, 0)], np.zeros((2, 0))), "sort": (ag.sort, [(0,)], np.zeros(0)),
    "masked softmax": (lambda x: ag.softmax(x, np.ones((1, 0), bool)), [(2, 0)], np.zeros((2, 0))),
    "flip": (ag.flip, [(0, 2)], np.zeros((0, 2))), "roll": (lambda x: ag.roll(x, 3), [(2, 0)], np.zeros((2, 0))),
    "reshape": (lambda x: x.reshape(0, 5), [(2, 0)], np.zeros((0, 5))), "-1": (lambda x: x.reshape(2, -1), [(2, 0)], np.zeros((2, 0))),
    "transpose": (ag.transpose, [(2, 0)], np.zeros((0, 2))), "tile": (lambda x: x.tile(0), [(2, 2)], np.zeros((2, 0))),
    "repeat": (lambda x: x.repeat(0), [(2, 2)], np.zeros((2, 0))), "repeat of nothing": (lambda x: x.repeat(3), [(0,)], np.zeros(0)),
    "repeat by no count": (lambda x: x.repeat(()), [(0,)], np.zeros(0)),
    "broadcast_to": (lambda x: x.broadcast_to((2, 0)), [(1,)], np.zeros((2, 0))), "tril": (ag.tril, [(0, 3)], np.zeros((0, 3))),
    "pad": (lambda x: ag.pad(x, ((1, 2),)), [(0,)], np.zeros(3)), "concat": (lambda x: ag.concat([x, x]), [(0,)], np.zeros(0)),
    "stack": (lambda x: ag.stack([x, x]), [(0,)], np.zeros((2, 0))), "split": (lambda x: ag.split(x, 3)[2], [(2, 0)], np.zeros((2, 0))),
    "slice": (lambda x: x[2:1], [(3,)], np.zeros(0)), "no index": (lambda x: x[[]], [(3, 2)], np.zeros((0, 2))),
    "mask": (lambda x: x[np.zeros(3, bool)], [(3, 2)], np.zeros((0, 2))), "gather": (lambda x: ag.gather(x, []), [(0, 2)], np.zeros((0, 2))),
    "take_along_axis": (lambda x: ag.take_along_axis(x, np.zeros((2, 0), int)), [(2, 3)], np.zeros((2, 0))),
    "matmul without inner size": (ag.matmul, [(2, 0), (0, 3)], np.zeros((2, 3))),
    "vectors of nothing": (ag.matmul, [(0,), (0,)], 0.0), "matmul of no row": (ag.matmul, [(0, 2), (2, 3)], np.zeros((0, 3))),
    "matmul of no batch": (ag.matmul, [(0, 2, 2), (2, 2)], np.zeros((0, 2, 2))),
    "einsum": (lambda x, y: ag.einsum([x, y], equation="ij,jk->ki"), [(2, 0), (0, 3)], np.zeros((3, 2))),
    "trace": (lambda x: ag.einsum([x], equation="ii->"), [(0, 0)], 0.0),
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
    "causal_conv1d of no step": (ag.causal_conv1d, [(2, 0, 3), (3, 2), (3,)], np.zeros((2, 0, 3))),
    "causal_conv1d of no batch": (ag.causal_conv1d, [(0, 2, 3), (3, 2)], np.zeros((0, 2, 3))),
    "causal_conv1d of no channel": (ag.causal_conv1d, [(2, 2, 0), (0, 2)], np.zeros((2, 2, 0))),
    "rfft of no row": (ag.rfft, [(0, 4)], np.zeros((0, 3, 2))), "irfft of no row": (ag.irfft, [(0, 3, 2)], np.zeros((0, 4))),
    "rfft of nothing padded": (lambda x: ag.rfft(x, n=4), [(2, 0)], np.zeros((2, 3, 2))),
    "complex_multiply": (ag.complex_multiply, [(0, 2), (0, 2)], np.zeros((0, 2))),
    "attention of no batch": (attention, [(0, 2, 3, 4)] * 3, np.zeros((0, 2, 3, 4))),
    "attention of no head": (attention, [(2, 0, 3, 4)] * 3, np.zeros((2, 0, 3, 4))),
    "attention of no query": (attention, [(1, 2, 0, 4), (1, 2, 3, 4), (1, 2, 3, 4)], np.zeros((1, 2, 0, 4))),
    "attention of no key": (attention, [(1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4)], np.zeros((1, 2, 3, 4))),
    "attention of no step": (attention, [(1, 2, 0, 4)] * 3, np.zeros((1, 2, 0, 4))),
    "attention without values": (attention, [(1, 1, 2, 3), (1, 1, 2, 3), (1, 1, 2, 0)], np.zeros((1, 1, 2, 0))),
    "add": (ag.add, [(0,), ()], np.zeros(0)), "where": (lambda x, y: ag.where(np.ones(0, bool), x, y), [(1,), ()], np.zeros(0)),
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
    v = some(1, 1, 2, 3)  # without channels all scores are equal
    g = some(1, 1, 2, 3, seed=1)
    expect(lambda q, k, v: attention(q, k, v, causal=False), [np.zeros((1, 1, 2, 0))] * 2 + [v],
           v.mean(2, keepdims=True).repeat(2, 2), g, [np.zeros((1, 1, 2, 0))] * 2 + [g.mean(2, keepdims=True).repeat(2, 2)])


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
    "causal_conv1d without taps": (ShapeError, ["causal_conv1d", "tap"], lambda x: ag.causal_conv1d(x, np.ones((3, 0), x.dtype)),
                                   (1, 2, 3))})
def test_what_nothing_cannot_give(error, words, function, shape):
    refuse(error, words, function, np.ones(shape))


def test_a_language_model_takes_no_sequence_and_no_step():
    model = LanguageModel("transformer", ModelOptions(context=4, layers=1, width=8), TransformerOptions(), 5, Random(0))
    for dtype, route in ROUTES:
        for shape in ((0, 3), (2, 0), (0, 0)):
            ids = np.zeros(shape, np.uint8)
            model.zero_grad()
            with route():
                assert model(ids).shape == (*shape, 5)
                loss = model.loss(ids, ids)
                loss.backward()
            assert loss.item() == 0 and loss.dtype == np.float32
            assert not any(p.grad is not None and p.grad.data.any() for p in model.parameters())


# -- softmax and cross_entropy -----------------------------------------------------------------------------------------
E, F = math.exp(-1) / (1 + math.exp(-1)), 1 / (1 + math.exp(-1))  # the softmax of (-1, 0)
LOG2 = math.log(2)


@table(("function", "x", "value", "cotangent", "slope"), {
    "a row of -inf": (ag.softmax, [[-INF, -INF], [-1, 0]], [[0, 0], [E, F]], [[3, 5], [2, 0]], [[0, 0], [2 * E * F, -2 * E * F]]),
    "a row hidden": (lambda x: ag.softmax(x, np.array([[False], [True]])), [[7, 8], [-1, 0]], [[0, 0], [E, F]], [[3, 5], [2, 0]],
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


@table(("labels", "ignored", "words"), {
    "-1": ([0, -1], None, ["label -1", "0 .. 2"]), "the number of classes": ([3, 0], None, ["label 3", "0 .. 2"]),
    "-1 is not -100": ([0, -1], -100, ["label -1", "ignore_index = -100"]),
    "none is fine": ([7, 0], 1, ["label 7", "ignore_index = 1"])})
def test_a_label_out_of_range_is_refused(labels, ignored, words):
    refuse(DomainError, ["cross_entropy", *words], lambda x: ag.cross_entropy(x, np.array(labels), ignore_index=ignored),
           np.zeros((2, 3)))


# -- norms -------------------------------------------------------------------------------------------------------------
ROOT = math.sqrt(1e-5)


@table(("function", "x", "value", "cotangent", "slope"), {
    "layer_norm of equals": (ag.layer_norm, [[0.1, 0.1, 0.1], [-1, 0, 1]],
                             [[0, 0, 0], [-1 / math.sqrt(2 / 3 + 1e-5), 0, 1 / math.sqrt(2 / 3 + 1e-5)]],
                             [[1, 2, 6], [2, 2, 2]], [[-2 / ROOT, -1 / ROOT, 3 / ROOT], [0, 0, 0]]),
    "layer_norm of large equals": (ag.layer_norm, [1e6 + 0.25] * 3, [0, 0, 0], [1, 2, 6], [-2 / ROOT, -1 / ROOT, 3 / ROOT]),
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


@pytest.mark.parametrize("groups", [0, 2, 4, -1], ids=str)
def test_groups_that_do_not_divide_are_refused(groups):
    refuse(ShapeError, ["group_norm", "3 channels", f"groups = {groups}"], lambda x: ag.group_norm(x, groups=groups), np.ones(3))
