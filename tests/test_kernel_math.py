"""exp, tanh, erf and erfc inside kernels: errors in ulp, edges, packed code; and where compiled kernels are kept."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import scipy.special
from conftest import operators
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import compute, differentiate, draw_cotangents, specimen

import autograd
import autograd.ops
import minitv.ops
from autograd.cpu import compile as compiler
from autograd.cpu import math as kernel_math
from autograd.draw import Draw

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
    kernel = numba.njit(**compiler.FLAGS)(function)
    kernel.compile(tuple(getattr(numba.types, t) if isinstance(t, str) else t for t in types))
    (code,) = kernel.inspect_asm().values()
    return code


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
INNER = {"attention/_softmax": (ROW, numba.int64, ROW, ROW, ROW, ROW), "gated/_swish": 3 * (ROW,),
         "gated/_swish_backward": 5 * (ROW,)}
ONCE_A_ROW = {"cross_entropy/_forward": {"logf", "log1pf"}}  # the logarithm of the row's sum


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
    assert {("gelu/_gelu", 1), ("gelu/_gelu_tanh", 1), ("cross_entropy/_forward", 1), ("attention/_softmax", 1),
            ("attention/_softmax", 2), ("attention/_backward", 1)} <= set(SITES)


@reads_assembly
@pytest.mark.parametrize(("name", "site"), SITES, ids=str)
def test_every_call_in_the_kernels_of_operators_is_packed(name, site):
    # One call at a time: a packed instruction of another loop proves nothing.
    code = assembly(one_call(HOT[name], site)[0], argument_types(name))
    assert libm_calls(code) <= ONCE_A_ROW.get(name, set())
    assert FLOOR.findall(code).count("s") >= 1
    assert ARITHMETIC.findall(code).count("s") >= 6


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
    return tmp_path / "place"


def directory():
    return compiler.cache_directory.__wrapped__()  # it remembers its first answer


def kernel_sources():
    """The modules with kernels, and what they import from the packages: its code and constants are compiled in."""
    found, modules = set(), [*ROOT.glob("autograd/**/*.py"), *ROOT.glob("minitv/**/*.py")]
    for path in modules:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                base = path.parents[node.level - 1] if node.level else ROOT
                imported.add(base.joinpath(*node.module.split(".")).with_suffix(".py"))
        if ROOT / "autograd" / "cpu" / "compile.py" in imported:
            found |= {path} | imported & set(modules)
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages, to be changed."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("autograd", "minitv"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_the_sources_of_kernels_are_found():
    assert {"autograd/cpu/compile.py", "autograd/cpu/math.py", "autograd/cpu/philox.py", "autograd/ops/gelu/cpu.py",
            "minitv/ops/attention/cpu.py"} <= set(kernel_sources())


@pytest.mark.parametrize("source", kernel_sources())
def test_a_change_of_a_kernel_source_changes_the_folder(source, copy, monkeypatch, place):
    monkeypatch.setattr(compiler, "__file__", str(copy / "autograd" / "cpu" / "compile.py"))
    before, text = directory(), (copy / source).read_bytes()
    (copy / source).write_bytes(text + b"#")
    changed = directory()
    (copy / source).write_bytes(text)
    assert changed != before
    assert changed.parent == before.parent == place / "minitv"
    assert directory() == before


@pytest.mark.parametrize(("owner", "name"), [(numba, "__version__"), (numba.config, "CPU_NAME"),
                                             (numba.config, "CPU_FEATURES")], ids=str)
def test_another_compiler_or_cpu_changes_the_folder(owner, name, monkeypatch, place):
    before = directory()
    monkeypatch.setattr(owner, name, "another")
    assert directory() != before


def test_without_numba_cache_dir_the_user_cache_is_taken_and_then_the_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert directory().parent == tmp_path / "user" / "minitv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path))
    assert directory().parent == tmp_path / ".cache" / "minitv"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made in a file
    assert directory().parent == tmp_path / "minitv"


def test_a_read_only_place_works_without_a_cache(monkeypatch, place):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # permissions do not stop root
    works_without_a_cache(monkeypatch)


def test_a_place_that_cannot_hold_a_folder_works_without_a_cache(monkeypatch, place):
    place.touch()
    works_without_a_cache(monkeypatch)
    assert place.read_bytes() == b""


def works_without_a_cache(monkeypatch):
    monkeypatch.setattr(compiler, "cache_directory", compiler.cache_directory.__wrapped__)
    assert compiler.cache_directory() is None
    assert not compiler.cached()

    @compiler.cpu_kernel
    def twice(x):
        return x + x

    assert twice(21) == 42
    assert twice.stats.cache_path is None


def test_cached_says_whether_a_kernel_was_compiled(monkeypatch, place):
    monkeypatch.setattr(compiler, "cache_directory", compiler.cache_directory.__wrapped__)
    assert not compiler.cached()

    @compiler.cpu_kernel
    def twice(x):
        return x + x

    assert not compiler.cached()  # declared, as at the import of an operator, but not compiled
    assert twice(21) == 42
    assert compiler.cached()


def test_kernels_are_kept_in_numba_cache_dir_and_found_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "place"),
                   "XDG_CACHE_HOME": str(tmp_path / "user")}

    def run():
        command = [sys.executable, script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert run() == "42 0 True\n"
    kept = [path.relative_to(tmp_path / "place").parts for path in tmp_path.rglob("*.nb[ic]")]
    assert len(kept) == 2  # an index and the code
    assert {parts[0] for parts in kept} == {"minitv"}
    assert run() == "42 1 True\n"
    assert not (tmp_path / "user").exists()


SCRIPT = """
import numba
from autograd.cpu.compile import cpu_kernel

place = numba.config.CACHE_DIR

@cpu_kernel
def twice(x):
    return x + x

print(twice(21), sum(twice.stats.cache_hits.values()), numba.config.CACHE_DIR == place)
"""
