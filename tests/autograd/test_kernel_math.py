"""exp, tanh, erf and erfc inside kernels: errors in ulp, edges, packed code; and where compiled kernels are kept."""

from __future__ import annotations

import ast
import dis
import errno
import gc
import importlib
import inspect
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import autograd
import autograd.ops
import minitv.ops
from autograd import private
from autograd.cpu import compile as compiler
from autograd.cpu import disk
from autograd.cpu import math as kernel_math
from autograd.draw import Draw
from autograd.errors import KernelError
from autograd.random import Random
from autograd.verify import compute, differentiate, draw_cotangents
from tests.autograd.operator_checks import flat, specimen
from tests.conftest import operators

NAMES = ("exp", "tanh", "erf", "erfc")
DTYPES = (np.float32, np.float64)
SPLITS = (0.375, 0.625, 0.75)  # where a function passes from one formula to another
ZERO = {np.float32: -86.5, np.float64: -708.0}  # exp is exactly 0 from here down
OVERFLOW = {np.float32: 88.72283905206835, np.float64: 709.7827128933841}  # ln of 2^128 and of 2^1024

each_function = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def uncached(function):
    """A kernel that is not kept on disk, so that it never comes from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "cache_directory", lambda: None)
        return compiler.cpu_kernel(function)


@cache
def compiled(name):
    """A kernel that applies one function to an array."""
    function = getattr(kernel_math, name)

    @uncached
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return loop


def apply(name, x):
    y = np.full_like(x, 7)
    compiled(name)(x, y)
    return y


# -- accuracy ----------------------------------------------------------------------------------------------------------
def allowed(name, x):
    """The largest error, in ulp of the exact value. In erfc the rounding of -x^2, about x^2 ulp, goes through exp."""
    if name == "erfc":
        return np.where(x > 0, 6 + 2 * np.clip(x, 0, 30, dtype=np.float64) ** 2, 3.0)
    return np.full(x.shape, {"exp": 1.5, "tanh": 1.5, "erf": 3.0}[name])


def ulp(values, dtype):
    """The distance of the floats around each value, in float64; never below the smallest subnormal number's."""
    info = np.finfo(dtype)
    exponent = np.frexp(np.asarray(values, np.float64))[1] - 1 - info.nmant
    return np.ldexp(1.0, np.maximum(exponent, info.minexp - info.nmant))


def series_erf(x):
    """erf x = 2/sqrt(pi) e^(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ...): for x > 0 all terms are positive."""
    term = total = x
    n = 1
    while abs(term) > abs(total) * Decimal("1e-48"):
        n += 2
        term *= 2 * x * x / n
        total += term
    return 2 * total * (-x * x).exp() / ROOT_PI


def fraction_erfc(x):
    """erfc x = e^(-x^2) / sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...)))), for x > 2."""
    denominator = x
    for k in range(int(3200 / float(x) ** 2) + 20, 0, -1):
        denominator = x + Decimal(k) / 2 / denominator
    return (-x * x).exp() / (denominator * ROOT_PI)


ROOT_PI = Decimal("1.77245385090551602729816748334114518279754945612238712821380778985291")


def exact(name, value):
    """The function of a float with 50 digits, of which at least 40 hold."""
    x = Decimal(max(min(value, 1000.0), -1000.0))
    with localcontext() as context:
        context.prec = 50
        if name == "exp":
            return x.exp()
        if name == "tanh":
            e = (2 * x).exp()
            return (e - 1) / (e + 1) if abs(x) > Decimal("1e-5") else x - x**3 / 3 + 2 * x**5 / 15 - 17 * x**7 / 315
        far = abs(x) > Decimal("2.5")
        if name == "erf":
            return (1 - fraction_erfc(abs(x))).copy_sign(x) if far else series_erf(x) if x else x
        if far:
            return fraction_erfc(x) if x > 0 else 2 - fraction_erfc(-x)
        return 1 - (series_erf(x) if x else x)


def errors(name, x, y):
    """|y - f(x)| in ulp of f(x); infinity counts as the power of two past the largest float, to be its neighbour.

    erfc's values below the smallest normal number count in units of that number.
    """
    tiny, top = np.finfo(x.dtype).tiny, Decimal(2) ** np.finfo(x.dtype).maxexp
    if x.dtype == np.float32:
        reference = {"exp": np.exp, "tanh": np.tanh, "erf": scipy.special.erf, "erfc": scipy.special.erfc}[name]
        with np.errstate(over="ignore", under="ignore"):
            value = np.minimum(reference(x.astype(np.float64)), float(top))
        gap = np.abs(np.minimum(y, float(top), dtype=np.float64) - value)
        units = ulp(value, np.float32)
        return gap / (np.where(value < tiny, tiny, units) if name == "erfc" else units)
    found = []
    for argument, result in zip(x.tolist(), y.tolist(), strict=True):
        value = min(exact(name, argument), top)
        gap = abs((top if result == math.inf else Decimal(result)) - value)
        unit = tiny if name == "erfc" and value < tiny else ulp(min(value, sys.float_info.max), np.float64)
        found.append(float(gap / Decimal(float(unit))))
    return np.array(found)


def check_errors(name, x, y):
    if not x.size:
        return
    assert not np.isnan(y).any()
    excess = errors(name, x, y) / allowed(name, x)
    worst = int(np.argmax(excess))
    assert excess[worst] <= 1, (f"{name}({x[worst]!r}) = {y[worst]!r} is {excess[worst]:.2f} times the allowed "
                                f"{allowed(name, x)[worst]:.2f} ulp off; {np.sum(excess > 1)} of {x.size} fail")


def neighbours(points, dtype, count):
    """Each point with the `count` floats before and after it."""
    integers = np.dtype(f"i{np.dtype(dtype).itemsize}")
    steps = np.arange(-count, count + 1, dtype=integers)
    return (np.array(points, dtype).view(integers)[:, None] + steps).view(dtype)


def edges(name, dtype):
    """Where one formula, or one power of two in exp, takes over from another."""
    points = [s * p for p in (*SPLITS, 1.0, 2.0) for s in (1, -1)]
    if name == "exp":
        return [*points, *(k * math.log(2) / 2 for k in range(-125, 126, 2))]
    return points


@each_function
def test_the_error_in_float32_is_within_the_stated_ulp(name):
    bits = np.arange(0, 0x7F800000, 4099, dtype=np.uint32)
    every_magnitude = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    x = np.concatenate([every_magnitude, np.linspace(-100, 100, 400_001, dtype=np.float32),
                        neighbours(edges(name, np.float32), np.float32, 300).ravel()])
    x = x[x > ZERO[np.float32]] if name == "exp" else x
    check_errors(name, x, apply(name, x))


@each_function
def test_the_error_in_float64_is_within_the_stated_ulp(name):
    generator = np.random.default_rng(0)
    low, high = {"exp": (-708, 709.782), "tanh": (-20, 20), "erf": (-6, 6), "erfc": (-6, 28)}[name]
    x = np.concatenate([generator.uniform(low, high, 1500), generator.uniform(-1, 1, 500),
                        10 ** generator.uniform(-320, 0, 100),
                        neighbours(edges(name, np.float64), np.float64, 3).ravel()])
    check_errors(name, x, apply(name, x))


@each_function
@each_dtype
@given(data=st.data())
def test_the_error_holds_for_any_floats_in_arrays_of_any_length(name, dtype, data):
    # Lengths on both sides of a vector's: whole vectors and the rest of a loop are different code.
    width = 8 * np.dtype(dtype).itemsize
    floats = st.floats(-110, 110, width=width) | st.floats(allow_nan=False, allow_infinity=False, width=width)
    x = np.array(data.draw(st.lists(floats, min_size=1, max_size=40)), dtype)
    y = apply(name, x)
    zero = (x <= ZERO[dtype]) & (name == "exp")
    assert not y[zero].any()
    check_errors(name, x[~zero], y[~zero])


# -- edges -------------------------------------------------------------------------------------------------------------
@each_function
@each_dtype
def test_at_zero_infinity_and_nan(name, dtype):
    # At least a vector's length of each value, and one more.
    at = {v: np.unique(apply(name, np.full(17, v, dtype))) for v in (0.0, -0.0, math.inf, -math.inf, math.nan)}
    zero, lowest, highest = {"exp": (1, 0, math.inf), "tanh": (0, -1, 1), "erf": (0, -1, 1), "erfc": (1, 2, 0)}[name]
    assert at[0.0] == zero  # these are `==` of floats: the sign of a zero is free
    assert at[-math.inf] == lowest
    assert at[math.inf] == highest
    assert np.isnan(at[math.nan]).all()


@each_function
@each_dtype
def test_nan_does_not_spread_to_its_neighbours(name, dtype):
    x = np.linspace(-3, 3, 37, dtype=dtype)
    holes = x.copy()
    holes[::5] = math.nan
    y = apply(name, holes)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(holes))
    np.testing.assert_array_equal(np.delete(y, np.s_[::5]), np.delete(apply(name, x), np.s_[::5]))


@each_dtype
def test_exp_is_exactly_zero_below_the_stated_argument_and_normal_above(dtype):
    below, above = np.nextafter(dtype(ZERO[dtype]), dtype([-math.inf, math.inf]))
    far = np.array([-1e4, -np.finfo(dtype).max, -math.inf, 1.001 * ZERO[dtype]], dtype)
    assert not apply("exp", np.append(far, below)).any()
    x = np.linspace(above, above + dtype(1), 1001, dtype=dtype)
    lost = x[apply("exp", x) < np.finfo(dtype).tiny]
    assert not lost.size, f"exp is 0 or subnormal from {lost.min()} to {lost.max()}"


@each_dtype
def test_exp_overflows_to_infinity_where_the_format_ends(dtype):
    last = dtype(OVERFLOW[dtype])
    x = neighbours([last], dtype, 3)[0]
    y = apply("exp", x)
    assert np.isfinite(y[0])
    assert y[-1] == math.inf
    check_errors("exp", x, y)
    np.testing.assert_array_equal(apply("exp", np.array([last + 1, 1e4, np.finfo(dtype).max], dtype)), math.inf)


@pytest.mark.parametrize("name", ["tanh", "erf"])
@each_dtype
@given(data=st.data())
def test_tanh_and_erf_are_odd_to_the_bit(name, dtype, data):
    width = 8 * np.dtype(dtype).itemsize
    x = np.array(data.draw(st.lists(st.floats(-10, 10, width=width) | st.floats(width=width), min_size=1, max_size=40)),
                 dtype)
    np.testing.assert_array_equal(apply(name, -x), -apply(name, x))


@pytest.mark.parametrize(("name", "low", "high"),
                         [("exp", 0, math.inf), ("tanh", -1, 1), ("erf", -1, 1), ("erfc", 0, 2)], ids=NAMES)
@each_dtype
def test_results_stay_in_the_range_of_the_function(name, low, high, dtype):
    y = apply(name, np.linspace(-800, 800, 100_001, dtype=dtype))
    assert y.min() == low
    assert y.max() <= high


@each_function
@each_dtype
def test_between_neighbouring_floats_no_function_turns_back_by_more_than_an_ulp(name, dtype):
    starts = np.concatenate([np.linspace(-20, 20, 400), np.geomspace(1e-30, 1e-2, 40), edges(name, dtype)])
    x = neighbours(starts, dtype, 250)
    y = np.array([apply(name, row) for row in x]).astype(np.float64)
    forward = np.where(x[:, :1] < 0, -1, 1) * (-1 if name == "erfc" else 1)  # bits of negative floats count down
    falls = -np.diff(y, axis=1) * forward / ulp(y[:, :-1], dtype)
    assert falls.max() <= 1


@each_function
@each_dtype
def test_a_step_larger_than_the_errors_is_monotonic(name, dtype):
    low, high = {"exp": (ZERO[dtype] + 1, OVERFLOW[dtype]), "tanh": (-3, 3), "erf": (-2, 2), "erfc": (-2, 3)}[name]
    y = apply(name, np.linspace(low, high, 5001, dtype=dtype)[:-1])
    assert ((np.diff(y) < 0) if name == "erfc" else (np.diff(y) > 0)).all()


def test_outside_kernels_the_functions_raise():
    for name in NAMES:
        with pytest.raises(TypeError, match=rf"autograd\.cpu\.math\.{name} is for use inside kernels"):
            getattr(kernel_math, name)(1.0)


@each_function
def test_an_integer_argument_does_not_compile(name):
    with pytest.raises(numba.TypingError, match="No implementation of function"):
        compiled(name)(np.arange(3), np.zeros(3))


# -- machine code ------------------------------------------------------------------------------------------------------
LIBM = re.compile(r"(?:__)?(?:exp|exp2|expm1|tanh|erf|erfc|log|log2|log1p|pow)f?(?:_finite)?")
WIDE = r"p([sd])\s.*%[yz]mm"  # a packed instruction on 256-bit or 512-bit registers
ARITHMETIC = re.compile(r"^\s*v(?:fn?m(?:add|sub)\d+|mul|add|sub|div)" + WIDE, re.MULTILINE)
FLOOR = re.compile(r"^\s*v(?:round|rndscale)" + WIDE, re.MULTILINE)  # only exp rounds down, once a call
CALLED = re.compile(r"(?:movabsq\s+\$|callq?\s+|jmp\s+)([A-Za-z_]\w*)")  # a far call takes the address first

reads_assembly = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not llvm.get_host_cpu_features().get("avx2")
    or "NUMBA_CPU_NAME" in os.environ,
    reason="reads the assembly of an x86-64 CPU with AVX2, compiled for that CPU")


def libm_calls(code):
    return {symbol for symbol in CALLED.findall(code) if LIBM.fullmatch(symbol)}


def assembly(function, types):
    """A function's assembly for argument types or their names, compiled here: Numba has none for what it read from disk."""
    kernel = numba.njit(**compiler.FLAGS, pipeline_class=compiler.KernelCompiler)(function)
    kernel.compile(tuple(getattr(numba.types, t) if isinstance(t, str) else t for t in types))
    (code,) = kernel.inspect_asm().values()
    return code


def test_what_a_kernel_calls_is_compiled_as_part_of_it(monkeypatch):
    monkeypatch.setattr(compiler, "cache_directory", lambda: None)  # what is read from disk is not compiled

    @compiler.inner
    def root(x):
        if x < 0:
            raise ValueError("negative")
        return math.sqrt(x)

    @compiler.cpu_kernel
    def kernel(x):
        return root(x)

    assert kernel(4.0) == 2
    with pytest.raises(ValueError, match="negative"):
        kernel(-1.0)
    (part,) = root.overloads.values()
    assert part.library.get_pointer_to_function(part.fndesc.llvm_func_name) == 0  # no machine code of its own
    assert gc.isenabled()


class OneCall(ast.NodeTransformer):
    """Leaves one of the calls of exp, tanh, erf and erfc in a function, and replaces the others by their argument."""

    def __init__(self, scope, site):
        self.scope, self.site, self.calls = scope, site, 0

    def visit_Call(self, node):
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or self.scope.get(node.func.id) not in FUNCTIONS:
            return node
        self.calls += 1
        return node if self.calls == self.site else node.args[0]


FUNCTIONS = [getattr(kernel_math, name) for name in NAMES]


def one_call(kernel, site):
    """A kernel's function with only one of those calls, and how many there were."""
    function = kernel.py_func
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []
    transformer, scope = OneCall(function.__globals__, site), dict(function.__globals__)
    exec(compile(transformer.visit(tree), function.__code__.co_filename, "exec"), scope)
    return scope[function.__name__], transformer.calls


def hot_kernels():
    """The operators' kernels that call exp, tanh, erf or erfc, by "operator/kernel".

    Without helpers that are inlined, which have no loop of their own: for the kernels around wkv's see test_wkv.
    """
    found = {}
    for package in (autograd.ops, minitv.ops):
        for path in sorted(Path(package.__path__[0]).glob("*/cpu.py")):
            module = importlib.import_module(f"{package.__name__}.{path.parent.name}.cpu")
            for name, kernel in vars(module).items():
                declared_here = getattr(kernel, "__module__", "") == module.__name__ and hasattr(kernel, "py_func")
                if declared_here and not kernel.targetoptions.get("forceinline") and one_call(kernel, 0)[1]:
                    found[f"{path.parent.name}/{name}"] = kernel
    return found


HOT = hot_kernels()
SITES = [(name, site + 1) for name, kernel in HOT.items() for site in range(one_call(kernel, 0)[1])]
ROW = numba.float32[::1]
# The types of a kernel that only another kernel calls, or not for every parameter; the others' are found by running operators.
INNER = {"attention/_softmax": (ROW, numba.int64, ROW, ROW, ROW, ROW), "gated/swish_row": 3 * (ROW,),
         "gated/_swish_backward": 5 * (ROW,), "favor/_exp_keys": (ROW, ROW, numba.int64), "favor/_factors": 3 * (ROW,),
         "lsh_attention/_softmax": (ROW, ROW, numba.boolean, numba.int64, *4 * (ROW,)),
         "favor/_weigh": (*3 * (ROW,), numba.int64, numba.int64, numba.float32),
         "favor/_pairs": (*4 * (ROW,), numba.int64, *3 * (ROW,), *5 * (numba.int64,)),
         "favor/_add_pairs": (*5 * (ROW,), numba.int64, ROW, *3 * (numba.int64,)),
         "ctc_loss/_frame": (ROW, numba.float64[::1], numba.int64[::1], numba.float64[::1])}
IN_FLOAT64 = {"ctc_loss/_frame"}  # whatever they are called with
# The logarithm of a row's sum, the weight of a row's sink, and the logarithms of one token's features.
ONCE_A_ROW = {"cross_entropy/_forward": {"logf", "log1pf"}, "attention/step": {"expf", "logf"},
              "favor/_step": {"logf", "log1pf"}}


def runs(op, route, args, params):
    """Whether a route takes these inputs, and none of them is empty."""
    if not all(x is None or x.size for x in flat(op, args)):
        return False
    try:
        compute(op, route, args, params)
    except KernelError:
        return False
    return True


def argument_types(name):
    """The types with which the operator calls its kernel on float32 arrays."""
    if name in INNER:
        return INNER[name]
    module = HOT[name].py_func.__module__
    for op in operators():
        if "cpu" in op.kernels and op.kernels["cpu"].module == module:
            args, params = specimen(op, dtype=np.float32)
            compute(op, "kernel cpu", args, params)
            differentiate(op, "kernel cpu", args, params, draw_cotangents(op, args, params, Draw.seeded(0, np.float32)))
        if "cpu step" in op.kernels and op.kernels["cpu step"].module == module:
            specimen(op, partial(runs, op, "kernel cpu step"), dtype=np.float32)
    return next(types for types in HOT[name].signatures if "float32" in str(types))


@reads_assembly
@each_function
@each_dtype
def test_a_loop_over_an_array_is_packed_and_calls_no_libm(name, dtype):
    row = numba.from_dtype(np.dtype(dtype))[::1]
    code = assembly(compiled(name).py_func, (row, row))
    suffix, terms = {np.float32: ("s", 6), np.float64: ("d", 12)}[dtype]  # the degree of the polynomial in exp
    assert libm_calls(code) == set()
    assert ARITHMETIC.findall(code).count(suffix) >= terms
    assert set(ARITHMETIC.findall(code)) == {suffix}  # float32 is not widened to float64
    assert FLOOR.findall(code).count(suffix) >= 1


@reads_assembly
def test_the_assembly_shows_scalar_calls_of_libm():
    def loop(x, y):
        for i in range(x.size):
            y[i] = math.exp(x[i]) * math.tanh(x[i]) * math.erf(x[i])

    code = assembly(loop, (ROW, ROW))
    assert libm_calls(code) == {"expf", "tanhf", "erff"}
    assert FLOOR.findall(code) == []


def test_the_calls_in_the_kernels_are_found():
    assert {("gelu/gelu_row", 1), ("gelu/gelu_tanh_row", 1), ("cross_entropy/_forward", 1), ("attention/_softmax", 1),
            ("attention/_softmax", 2), ("attention/_backward", 1)} <= set(SITES)


@pytest.mark.full
@reads_assembly
@pytest.mark.parametrize(("name", "site"), SITES, ids=str)
def test_every_call_in_the_kernels_of_operators_is_packed(name, site):
    # One call at a time: a packed instruction of another loop proves nothing.
    code = assembly(one_call(HOT[name], site)[0], argument_types(name))
    kind = "d" if name in IN_FLOAT64 else "s"
    assert libm_calls(code) <= ONCE_A_ROW.get(name, set())
    assert FLOOR.findall(code).count(kind) >= 1
    assert ARITHMETIC.findall(code).count(kind) >= 6


@each_dtype
def test_erfcx(dtype):
    x = np.concatenate([np.linspace(0, 12, 200_001), np.geomspace(1e-30, 1e30, 50_001), [0.0]]).astype(dtype)
    y = apply("erfcx", x)
    exact = scipy.special.erfcx(x.astype(np.float64))  # itself within a few ulp of float64
    assert np.abs(y / exact - 1).max() <= (4 if dtype == np.float32 else 8) * np.finfo(dtype).eps
    assert y[-1] == 1 and np.isnan(apply("erfcx", np.array([np.nan], dtype))).all()


# -- compilation -------------------------------------------------------------------------------------------------------
def test_a_compilation_is_announced_once_and_only_within():
    said = []
    first, second, third = (numba.njit(lambda x: x + 1) for _ in range(3))
    with compiler.at_compilation(lambda: said.append("compiling")):
        assert not said
        first(1)
        second(1)
        first(1)
    third(1)
    assert said == ["compiling"]


# -- flags -------------------------------------------------------------------------------------------------------------
def test_the_flags_keep_nan_and_infinity():
    functions = [value for value in vars(kernel_math).values() if hasattr(value, "targetoptions")]
    for flags in (compiler.FLAGS, *(kernel.targetoptions for kernel in (*HOT.values(), *functions))):
        assert isinstance(flags["fastmath"], set)
        assert not flags["fastmath"] & {"nnan", "ninf", "fast"}
        assert not flags["fastmath"] & {"arcp", "afn"}  # estimates in packed loops only: the same numbers, other results


def test_the_compiled_instructions_assume_neither_finite_numbers_nor_reassociation():
    kernel = numba.njit(**compiler.FLAGS)(compiled("exp").py_func)
    kernel.compile((ROW, ROW))
    (code,) = kernel.inspect_llvm().values()
    operations = re.findall(r"= (f(?:add|sub|mul|div|cmp)) ([a-z ]*)", code)
    assert {operation for operation, _ in operations} >= {"fadd", "fmul", "fcmp"}
    for _, flags in operations:
        assert not {"nnan", "ninf", "fast", "reassoc"} & set(flags.split())


def test_sums_of_an_exact_helper_are_not_regrouped_and_a_kernel_s_own_are():
    def difference(a, b, c):
        return (a - b) + c

    def kernel(x, y):
        for i in range(x.size):
            y[i] = helper(x[i], y[i], x[i])

    for exact in (True, False):
        helper = compiler.inline(exact=exact)(difference)
        compiled = numba.njit(**compiler.FLAGS)(kernel)
        compiled.compile((ROW, ROW))
        (code,) = compiled.inspect_llvm().values()
        sums = [flags.split() for flags in re.findall(r"= f(?:add|sub) ([a-z ]*)", code)]
        assert sums and all(("reassoc" in flags) != exact and "contract" in flags for flags in sums)
    assert compiler.inline(difference).targetoptions["fastmath"] == compiler.FLAGS["fastmath"]


def test_a_function_for_kernels_is_compiled_once_for_constants_and_variables_and_refuses_python():
    def add(x, y):
        return x + y

    def both(n):
        return function(function(n, 1), function(2, n))

    for constants, versions in ((False, 1), (True, 3)):
        function = compiler.inner(constants=constants)(add)
        assert numba.njit(**compiler.FLAGS)(both)(5) == 13
        assert len(function.overloads) == versions
        with pytest.raises(TypeError, match="add is for use inside kernels"):
            function(1, 2)


def test_a_kernel_sees_nan_and_infinity():
    @uncached
    def count(x):
        nans = infinities = 0
        for v in x:
            nans += v != v
            infinities += v == math.inf
        return nans, infinities

    assert count(np.array([1, math.nan, math.inf, -math.inf, math.nan], np.float32)) == (2, 1)


# -- the cache ---------------------------------------------------------------------------------------------------------
ROOT = Path(autograd.__file__).resolve().parent.parent


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Where NUMBA_CACHE_DIR points: Numba reads the variable when it is imported."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "place"))
    fresh(monkeypatch)
    return tmp_path / "place"


def fresh(monkeypatch):
    """As at the start of a process: no folder has been chosen, nothing has been said."""
    monkeypatch.setattr(disk.Kept, "writing", True)
    monkeypatch.setattr(disk, "say", cache(disk.say.__wrapped__))
    chosen_anew = disk.cache_directory.__wrapped__
    for module in (disk, compiler):
        monkeypatch.setattr(module, "cache_directory", chosen_anew)


@cache
def kernel_sources():
    """The modules in which something is compiled."""
    words, found = {"cpu_kernel", "inner", "inline", "vectorized", "overload", "intrinsic", "numba.njit"}, []
    for path in (*ROOT.glob("autograd/**/*.py"), *ROOT.glob("minitv/**/*.py")):
        text = path.read_text("utf-8")
        if not any(f"@{word}" in text for word in words):
            continue
        nodes = ast.walk(ast.parse(text))
        decorators = [ast.unparse(d).partition("(")[0] for n in nodes for d in getattr(n, "decorator_list", ())]
        if words & set(decorators):
            found.append(path.relative_to(ROOT).as_posix())
    return sorted(found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages, to be changed."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("autograd", "minitv"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_the_sources_of_kernels_are_found():
    assert {"autograd/cpu/math.py", "autograd/cpu/philox.py", "autograd/ops/gelu/cpu.py",
            "minitv/ops/attention/cpu.py"} <= set(kernel_sources())


@pytest.mark.parametrize("source", ["autograd/cpu/compile.py", "autograd/cpu/disk.py", *kernel_sources()])
def test_a_change_of_a_kernel_source_changes_the_folder(source, copy, monkeypatch, place):
    monkeypatch.setattr(disk, "__file__", str(copy / "autograd" / "cpu" / "disk.py"))
    before, text = disk.cache_directory(), (copy / source).read_bytes()
    (copy / source).write_bytes(text + b"#")
    changed = disk.cache_directory()
    (copy / source).write_bytes(text)
    assert changed != before
    assert changed.parent == before.parent == place / "minitv"
    assert disk.cache_directory() == before


@pytest.mark.parametrize(("owner", "name"), [(numba, "__version__"), (numba.config, "CPU_NAME"),
                                             (numba.config, "CPU_FEATURES")], ids=str)
def test_another_compiler_or_cpu_changes_the_folder(owner, name, monkeypatch, place):
    before = disk.cache_directory()
    monkeypatch.setattr(owner, name, "another")
    assert disk.cache_directory() != before


# -- the cache: values that are compiled in ----------------------------------------------------------------------------
def numbers_in(function):
    """The global numbers that a function reads, by name."""
    codes = [function.__code__]
    for code in codes:
        codes += [part for part in code.co_consts if inspect.iscode(part)]
    names = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return {name for name in names if isinstance(function.__globals__.get(name), int | float | np.generic)}


def test_every_number_that_a_kernel_reads_is_part_of_its_name_on_disk(monkeypatch):
    found = set()
    for source in kernel_sources():
        module = importlib.import_module(source.removesuffix(".py").replace("/", "."))
        for name, kernel in vars(module).items():
            if getattr(kernel, "__module__", "") != module.__name__ or not hasattr(kernel, "py_func"):
                continue
            before = disk.compiled_in(kernel.py_func)
            for number in numbers_in(kernel.py_func):
                with monkeypatch.context() as patch:
                    patch.setattr(module, number, 12345)
                    assert disk.compiled_in(kernel.py_func) != before, f"{module.__name__}.{name} does not depend on {number}"
                found.add(f"{module.__name__}.{number}")
            assert disk.compiled_in(kernel.py_func) == before
    assert {"minitv.ops.wkv.cpu.EMPTY", "minitv.ops.retention.cpu.PAPER", "autograd.cpu.philox._M0"} <= found


PAGE = "import numpy as np\nN = 1\nPAIR = (5, 6)\nARRAY = np.arange(300)\n"
HELPER = """
from autograd.cpu.compile import cpu_kernel, inline
from page import N

@inline
def helper(x):
    return x + N

@inline
def raised(x, by=N):
    return x + by

def maker(n):
    @inline
    def made(x):
        return x + n
    return made

made, FACTOR = maker(N), 7 * N
"""
READS = {
    "a number": ("from page import N", "x + N"),
    "a tuple": ("from page import PAIR", "x + PAIR[0]"),
    "an array": ("from page import ARRAY", "x + ARRAY[299]"),
    "an attribute of a module": ("import page", "x + page.N"),
    "a number that a module hands on": ("from helpers import N", "x + N"),
    "a number made of another": ("from helpers import FACTOR", "x + FACTOR"),
    "a helper's number": ("from helpers import helper", "helper(x)"),
    "a helper's default": ("from helpers import raised", "raised(x)"),
    "a helper's enclosing variable": ("from helpers import made", "made(x)"),
    "the last of many numbers": ("\n".join(f"A{i} = 0" for i in range(600)) + "\nfrom page import N",
                                 " + ".join(("x", *(f"A{i}" for i in range(600)), "N"))),
}


@pytest.fixture
def kernel_of(monkeypatch, tmp_path):
    """A kernel in a module of its own, beside a page with constants and a module with helpers."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(page, imports, expression):
        for name, text in (("page", page), ("helpers", HELPER),
                           ("kernels", f"from autograd.cpu.compile import cpu_kernel\n{imports}\n"
                                       f"@cpu_kernel\ndef kernel(x):\n    return {expression}\n")):
            (tmp_path / f"{name}.py").write_text(text, "utf-8")
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return importlib.import_module("kernels").kernel

    yield make
    for name in ("page", "helpers", "kernels"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("way", READS)
def test_a_kernel_is_compiled_anew_when_a_value_that_it_reads_has_changed(way, kernel_of, place):
    changed = PAGE.replace("N = 1", "N = 2").replace("(5,", "(6,") + "ARRAY[299] += 1\n"
    runs = [kernel_of(page, *READS[way]) for page in (PAGE, changed, PAGE + "# a comment", changed)]
    first, second, third, fourth = [int(kernel(10)) for kernel in runs]
    assert second - first == (7 if way == "a number made of another" else 1)
    assert (third, fourth) == (first, second)
    assert [sum(kernel.stats.cache_hits.values()) for kernel in runs] == [0, 0, 1, 1]


def test_a_recompiled_kernel_has_the_values_of_now(kernel_of, place):
    kernel = kernel_of(PAGE, *READS["a number"])
    assert kernel(10) == 11
    sys.modules["kernels"].N = 5
    assert kernel(10) == 11
    kernel.recompile()
    assert kernel(10) == 15


def test_named_tuples_with_other_fields_are_other_types(kernel_of, place):
    page = "from typing import NamedTuple\nclass Two(NamedTuple):\n    a: float\n    b: float\n"
    for text, result in ((page, 3.0), (page.replace("a:", "c:").replace("b:", "a:"), 4.0)):
        kernel = kernel_of(text.replace("c:", "b:"), "import page", "x.a")
        assert kernel(sys.modules["page"].Two(3.0, 4.0)) == result


# -- the cache: where kernels lie --------------------------------------------------------------------------------------
def test_without_numba_cache_dir_the_user_cache_is_taken_and_then_the_temporary_folder(monkeypatch, tmp_path, place):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert disk.cache_directory().parent == tmp_path / "user" / "minitv"
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path))
    for no_place in ("", "relative", "~/user"):
        monkeypatch.setenv("XDG_CACHE_HOME", no_place)
        assert disk.cache_directory().parent == tmp_path / ".cache" / "minitv"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made in a file
    assert disk.cache_directory().parent == tmp_path / OWN_TEMPORARY


OWN_TEMPORARY = f"minitv-{os.getuid()}" if hasattr(os, "getuid") else "minitv"


@pytest.mark.parametrize("given", ["", "~/place", "~nobody-of-this-name/place"])
def test_a_home_that_does_not_exist_makes_no_folder_called_tilde(given, monkeypatch, tmp_path, place, capsys):
    monkeypatch.setattr(numba.config, "CACHE_DIR", given)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without HOME and without an entry
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = disk.cache_directory()
    if given:
        assert folder is None and "this user has no home" in capsys.readouterr().err
    else:
        assert folder.parent == tmp_path / OWN_TEMPORARY
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]


def test_a_home_in_numba_cache_dir_is_found(monkeypatch, tmp_path, place):
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "~/kernels")
    assert disk.cache_directory().parent == tmp_path / "kernels" / "minitv"


def test_a_read_only_place_works_without_a_cache(monkeypatch, place, capsys):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # permissions do not stop root
    works_without_a_cache(capsys, os.strerror(errno.EROFS))


def test_a_place_that_cannot_hold_a_folder_works_without_a_cache(place, capsys):
    place.touch()
    works_without_a_cache(capsys, os.strerror(errno.EEXIST))
    assert place.read_bytes() == b""


def works_without_a_cache(capsys, reason):
    assert disk.cache_directory() is None
    assert not disk.cached()

    @compiler.cpu_kernel
    def twice(x):
        return x + x

    assert twice(21) == 42
    assert twice.stats.cache_path is None
    (line,) = capsys.readouterr().err.splitlines()  # although it was asked three times
    assert line.startswith("kernel cache: no folder will do, every run compiles: ") and line.endswith(f": {reason}")


def test_cached_says_whether_a_kernel_was_compiled(place):
    assert not disk.cached()
    kernel = compiler.cpu_kernel(twice)
    assert not disk.cached()  # declared, as at the import of an operator, but not compiled
    assert kernel(21) == 42
    assert disk.cached()


def twice(x):
    return x + x


def test_threads_that_declare_kernels_at_the_same_time_keep_them_in_one_folder(place):
    def declare(_):
        kernel = compiler.cpu_kernel(twice)
        return disk.cache_directory(), Path(kernel.stats.cache_path), Path(numba.config.CACHE_DIR)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(declare, range(64)))
    folder = disk.cache_directory()
    assert found == {(folder, folder, place)}
    assert folder.parent == place / "minitv"


def test_kernels_are_kept_in_numba_cache_dir_and_found_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "place"),
                   "XDG_CACHE_HOME": str(tmp_path / "user")}

    def run():
        command = [sys.executable, script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert run() == "42 0\n"
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file() and path != script]
    assert kept.parent.parent == tmp_path / "place" / "minitv" and kept.name.startswith("__main__.twice-")
    assert run() == "42 1\n"
    assert not (tmp_path / "user").exists()


SCRIPT = """
from autograd.cpu.compile import cpu_kernel

@cpu_kernel
def twice(x):
    return x + x

print(twice(21), sum(twice.stats.cache_hits.values()))
"""


class Rows(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    scale: float


def test_arrays_that_may_be_written_to_and_others_share_one_version(place):
    """Any other combination would be compiled once more, a few seconds each for a long kernel."""
    @compiler.cpu_kernel
    def total(rows, z, out):
        out[0] = rows.scale * (rows.x.sum() + rows.y.sum()) + z[0].sum()

    free, fixed, out = np.arange(3.0), np.arange(3.0), np.empty(1)
    fixed.flags.writeable = False
    for x, y, z in itertools.product((free, fixed), repeat=3):
        for _ in range(2):
            total(Rows(x, y, 2.0), (z,), out)
            assert out[0] == 15.0
        total.version(Rows(x, y, 2.0), (z,), out)(Rows(x, y, 3.0), (z,), out)
        assert out[0] == 21.0
    assert len(total.overloads) == 1 and sum(total.stats.cache_misses.values()) == 1
    assert total(Rows(np.arange(3, dtype=np.float32), fixed, 2.0), (fixed,), out) is None and len(total.overloads) == 2


# -- the cache: what can be wrong with files ---------------------------------------------------------------------------
def hits():
    """How often `twice`, declared anew, comes from disk."""
    kernel = compiler.cpu_kernel(twice)
    assert kernel(21) == 42
    return sum(kernel.stats.cache_hits.values())


def kept(place):
    (path,) = place.rglob("*.nbc")
    return path


DAMAGES = {"empty": lambda data: b"", "cut": lambda data: data[:1000], "cut in the hash": lambda data: data[:20],
           "zeros": lambda data: bytes(len(data)), "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
           "longer": lambda data: data + b"0", "another file": lambda data: b"GIF89a" + data}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again_and_replaced(damage, place, capsys):
    assert hits() == 0
    path = kept(place)
    data = path.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    assert hits() == 0
    assert capsys.readouterr().err == f"kernel cache: {path.parent}: a damaged file is compiled again\n"
    assert hits() == 1
    path.write_bytes(b"")
    assert hits() == 0
    assert capsys.readouterr().err == ""  # it has been said


def test_a_file_under_the_name_of_another_is_damaged(place):
    assert hits() == 0
    path = kept(place)
    other = path.with_name("other.nbc")
    path.rename(other)
    compiler.cpu_kernel(lambda x: x)(21)
    (mine,) = set(path.parent.iterdir()) - {other}
    shutil.copy(other, mine)
    kernel = compiler.cpu_kernel(lambda x: x)
    assert kernel(21) == 21


posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners and modes of this kind")


@posix
@pytest.mark.parametrize("by", ["group", "everybody", "owner"])
def test_a_file_that_others_could_write_is_not_read(by, place, monkeypatch, capsys):
    assert hits() == 0
    path = kept(place)
    assert path.stat().st_mode & 0o777 == 0o600
    if by == "owner":
        monkeypatch.setattr(private, "claim", lambda path: None)  # the folder is looked at in another test
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    else:
        path.chmod(0o620 if by == "group" else 0o602)
    monkeypatch.setattr(disk.pickle, "loads", lambda data: pytest.fail("the file was read"))
    assert hits() == 0
    assert capsys.readouterr().err == f"kernel cache: {path.parent}: a file that others could write is compiled again\n"
    assert path.stat().st_mode & 0o777 == 0o600


@posix
def test_a_folder_of_another_user_is_not_used(place, monkeypatch, capsys):
    assert hits() == 0
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    assert disk.cache_directory() is None
    assert capsys.readouterr().err.endswith("belongs to another user\n")
    assert hits() == 0


@posix
def test_a_link_of_another_user_is_not_followed(place, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    place.mkdir()
    (place / "minitv").symlink_to(tmp_path / "mine")
    assert disk.cache_directory() is not None
    look = os.lstat

    def of_another(path):
        status = list(look(path))
        status[4] += Path(path).is_symlink()  # the owner
        return os.stat_result(status)

    monkeypatch.setattr(os, "lstat", of_another)
    assert disk.cache_directory() is None


@posix
def test_folders_are_this_users_alone_whatever_the_umask(place):
    before = os.umask(0)
    try:
        folder = disk.cache_directory()
        assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]
        folder.parent.chmod(0o775)  # as older versions made it
        folder.chmod(0o777)
        assert disk.cache_directory() == folder
        assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o755, 0o755]
    finally:
        os.umask(before)


@pytest.mark.parametrize("where", ["mkstemp", "write", "replace"])
def test_a_full_disk_ends_nothing(where, place, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(**_):
        return os.open("/dev/full", os.O_WRONLY), str(place / "temporary")

    if where == "write":
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full")
        monkeypatch.setattr(tempfile, "mkstemp", full)
    else:
        monkeypatch.setattr(*((tempfile, "mkstemp") if where == "mkstemp" else (os, "replace")), refuse)
    assert hits() == hits() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"kernel cache: {disk.cache_directory()}: {os.strerror(errno.ENOSPC)}; "
                    "what is not kept yet will be compiled again by the next run")
    assert not [path for path in place.rglob("*") if path.is_file()]


# -- without a compiler ------------------------------------------------------------------------------------------------
def test_what_uses_kernels_without_being_an_operator_works_without_a_compiler():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["Numba's compiler is switched off by NUMBA_DISABLE_JIT", str(expected_draws()), "12.0",
                                         "Decoder"]
    assert not compiler.unavailable()


def expected_draws():
    random = Random(5)
    return random.uniform((2**17,), np.float64)[-1], random.words(2**17)[-1]


WITHOUT_COMPILER = """
import numpy as np
from autograd.cpu import compile, gemm
from autograd.random import Random
from minitv.decode import decoder
from minitv.variants import load

print(compile.unavailable())
gemm.prepare()
random = Random(5)
print((random.uniform((2**17,), np.float64)[-1], random.words(2**17)[-1]))
ones = np.ones((2, 3), np.float32)
print(2 * gemm.product(ones, ones.T).sum() / 2)
model = load("transformer").configure(layers=1, width=8, context=4, heads=2).build(5)
print(type(decoder(model)).__name__)
"""
