"""bfloat16 products against a model of their rounding: bits, errors, every layout, gradients, refusals, the machine code.

All that concerns products is tried with the instructions of AVX512-BF16 and with those of AMX, where there are both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import DtypeError, KernelError, Tensor, gradients, use
from autograd.cpu import amx, bf16, choice, team
from autograd.cpu import compile as compiler
from autograd.cpu.choice import Choice
from autograd.ops import linear
from autograd.reversible import reversible
from autograd.state import PRODUCTS, products
from tests.autograd.test_gemm import LAYOUTS, Guarded, nothing_outside_is_read
from tests.autograd.test_team import fine

U = 2.0**-24  # what rounding to float32 changes at most, in relation to the number
TINY = 2.0**-126  # the smallest number that is not flushed to zero

CHOSEN = bf16.chosen  # which `way` replaces

here = pytest.mark.usefixtures("way")
tiles = pytest.mark.skipif(bool(bf16.missing() or amx.missing()), reason=str(bf16.missing() or amx.missing()))


@pytest.fixture(scope="module", params=[bf16.AVX, bf16.AMX])
def way(request):
    """The instructions that compute all products."""
    if reason := bf16.missing() or (amx.missing() if request.param == bf16.AMX else None):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "chosen", lambda: Choice(request.param, "for a test"))
        yield request.param


def rounded(x):
    """To the nearest bfloat16, then to even; what is below TINY is zero. Computed with integers."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    up = np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), up)
    return np.where(np.isnan(x), np.float32(np.nan), up).astype(np.float32)


def assert_is_the_product(got, a, b, *more):
    """The product of the rounded factors and what is added to it, to the rounding of so many additions."""
    a, b, K = rounded(a).astype(float), rounded(b).astype(float), a.shape[1] + 2
    size, more = np.abs(a) @ np.abs(b) + sum(map(np.abs, more)), sum(x.astype(float) for x in more)
    assert np.all(np.abs(got - (a @ b + more)) <= K * U / (1 - K * U) * size + K * TINY)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def check(sizes, layouts, accumulate, with_bias, seed):
    M, K, N = sizes
    a, b, c, bias = normal(seed, (M, K), (K, N), (M, N), (1, N))
    x, y, z = Guarded(a, layouts[0]), Guarded(b, layouts[1]), Guarded(c if accumulate else np.nan * c, layouts[2])
    extra = Guarded(bias, "rows")
    assert bf16.product(x.view, y.view, z.view, accumulate, bias=extra.view[0] if with_bias else None) is z.view
    assert_is_the_product(z.view, a, b, *[c] * accumulate, *[bias] * with_bias)
    assert z.unchanged(outside_only=True) and x.unchanged() and y.unchanged() and extra.unchanged()


layout, size = st.sampled_from(LAYOUTS), st.integers(0, 70)


@here
@given(sizes=st.tuples(size, size, size), layouts=st.tuples(layout, layout, layout), accumulate=st.booleans(),
       with_bias=st.booleans(), seed=st.integers(0, 2**16))
def test_any_size_and_layout(sizes, layouts, accumulate, with_bias, seed):
    check(sizes, layouts, accumulate, with_bias, seed)


@here
@pytest.mark.parametrize("layouts", [("rows", "columns"), ("rows", "rows"), ("columns", "rows"), ("columns", "columns")],
                         ids="-".join)
@pytest.mark.parametrize("sizes", [(128, 128, 65), (131, 513, 129), (257, 1550, 31), (9, 3, 771), (300, 1, 400)], ids=str)
def test_blocks(sizes, layouts):
    """Sizes beyond one block of k, of columns and of rows, each with something left over."""
    for accumulate, with_bias in ((False, False), (True, False), (False, True)):
        check(sizes, (*layouts, "rows"), accumulate, with_bias, seed=0)


def in_pairs(x, y, K):
    """Two products after the other are added to a sum, the odd one first."""
    total = np.float32(0)
    for even in range(0, K, 2):
        for k in (even + 1, even):
            total = total + x[:, k : k + 1] * y[k]  # the product of two bfloat16 is exact in float32
    return total


def in_tiles(x, y, K):
    """The 16 even products of 32, one after the other, and the odd ones for themselves; both sums are added to the total."""
    total = np.float32(0)
    for start in range(0, K, 32):
        even, odd = (sum((x[:, k : k + 1] * y[k] for k in range(start + first, start + 32, 2) if k < K), np.float32(0))
                     for first in (0, 1))
        total = total + (even + odd)
    return total


SUMS = {bf16.AVX: in_pairs, bf16.AMX: in_tiles}


@here
@pytest.mark.parametrize("K", [1, 2, 7, 128, bf16.DEPTH])
def test_bits(K, way):
    """The order of sums of float32, each of which is rounded to the nearest: that of the instructions."""
    a, b = normal(K, (5, K), (K, 19))
    total = SUMS[way](np.pad(rounded(a), ((0, 0), (0, 31))), np.pad(rounded(b), ((0, 31), (0, 0))), K)
    for left in LAYOUTS:
        for right in LAYOUTS:
            got = bf16.product(Guarded(a, left).view, Guarded(b, right).view)
            np.testing.assert_array_equal(got.view(np.uint32), total.view(np.uint32))


@here
def test_how_factors_are_rounded():
    """Halfway to the even one, beyond the largest to infinity, below 2^-126 to zero; NaN stays NaN."""
    one = np.ones((1, 1), np.float32)
    cases = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23, -1 - 2**-8 - 2**-23, 3.4e38, -3.4e38, np.inf, np.nan, TINY,
                      TINY / 2, -TINY / 2, 0, -0.0, 1.99999], np.float32)
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, -1 - 2**-7, np.inf, -np.inf, np.inf, np.nan, TINY, 0, 0, 0, 0, 2], np.float32)
    np.testing.assert_array_equal(rounded(cases), expected)
    np.testing.assert_array_equal(bf16.product(cases[:, None], one)[:, 0], expected)
    np.testing.assert_array_equal(bf16.product(one, cases[None])[0], expected)


@here
def test_what_is_too_small_counts_as_zero():
    """A product below 2^-126, and a sum below it of two products that are not."""
    a = np.array([[2.0**-70, 0, 0], [1.5, 0, -1], [1.5, 0, -0.5]], np.float32)
    b = np.array([[2.0**-70, TINY], [0, 0], [0, TINY]], np.float32)
    np.testing.assert_array_equal(bf16.product(a, b), [[0, 0], [1.5 * 2.0**-70, 0], [1.5 * 2.0**-70, TINY]])


@here
@pytest.mark.parametrize("K", [20, 21])
def test_nan_and_infinity(K):
    """They reach the numbers that they reach in NumPy, and no others: 0 * inf is NaN, 1 * inf is inf."""
    a, b = np.ones((19, K), np.float32), np.ones((K, 53), np.float32)
    a[3, K - 1], a[5, 0], a[18, 7] = np.nan, 0, np.inf
    b[0, 4], b[7, 52], b[K - 1, 6] = np.inf, -np.inf, np.inf
    with np.errstate(invalid="ignore"):
        expected = a @ b
    for left in ("rows", "columns"):
        for right in ("rows", "columns"):
            np.testing.assert_array_equal(bf16.product(Guarded(a, left).view, Guarded(b, right).view), expected)


@here
def test_threads_agree():
    given = [normal(m, (m, 200), (200, 70)) for m in range(60, 76)]
    alone = [bf16.product(a, b) for a, b in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(np.array_equal, pool.map(lambda pair: bf16.product(*pair), given), alone))


@here
@pytest.mark.parametrize("sizes", [(700, 40, 90), (40, 3000, 60), (60, 50, 700)], ids=str)
def test_parts_of_a_product(sizes, monkeypatch):
    """Cut by rows, by the terms of its sums or by columns, as a team cuts it: each part in bfloat16."""
    M, K, N = sizes
    a, b, bias, there = normal(0, (M, K), (K, N), (N,), (M, N))
    calls, compiled = [], bf16._compiled()
    monkeypatch.setattr(bf16, "_compiled", lambda: lambda *call: calls.append(call) or compiled(*call))
    monkeypatch.setattr(team, "spans", fine)
    with team.Team(2):
        assert_is_the_product(bf16.product(a, b, bias=bias), a, b, bias)
        assert len(calls) > 1
        assert_is_the_product(bf16.product(a, b, there.copy(), True), a, b, there)


@here
def test_arrays_of_any_kind():
    """`out` may be an operand or overlap with one; what lies otherwise is copied, never computed in float32."""
    a, b = normal(0, (96, 96), (96, 96))
    expected = bf16.product(a, b)
    kinds = (lambda x: np.repeat(x, 2, axis=1)[:, ::2], lambda x: x[:, ::-1].copy()[:, ::-1], lambda x: x[::-1].copy()[::-1],
             lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape))
    for change in kinds:
        np.testing.assert_array_equal(bf16.product(change(a), b), expected)
        np.testing.assert_array_equal(bf16.product(a, change(b)), expected)
        out = change(np.zeros_like(a)) if change is not kinds[-1] else np.zeros((97, 96), np.float32)[1:]
        np.testing.assert_array_equal(bf16.product(a, b, out), expected)
        np.testing.assert_array_equal(bf16.product(a, b, out, True, bias=np.ones(96, np.float32)), 2 * expected + 1)
    np.testing.assert_array_equal(bf16.product(np.broadcast_to(a[0], a.shape), b), np.tile(bf16.product(a[:1], b), (96, 1)))
    memory = np.zeros((98, 96), np.float32)
    memory[:96] = a
    np.testing.assert_array_equal(bf16.product(memory[:96], b, memory[2:]), expected)
    c = a.copy()
    assert bf16.product(c, b, c) is c
    np.testing.assert_array_equal(c, expected)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        bf16.product(a, b, out)
    with pytest.raises(ValueError, match=r"got \[\(96, 96\), \(95, 96\)"):
        bf16.product(a, b[1:])


@here
@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory with mprotect")
def test_nothing_outside_is_read(way):
    nothing_outside_is_read("bf16", way)


@pytest.mark.full
@pytest.mark.skipif(bf16.missing() is not None, reason=str(bf16.missing()))
def test_inner_loops_are_packed_and_stay_in_registers(monkeypatch):
    """Each tile's loop has one instruction for each vector of the tile, and none of its vectors is on the stack. Each loop of
    AMX has four products for four loads.
    """
    monkeypatch.setattr(compiler, "cache_directory", lambda: None)  # which does not keep assembly
    (code,) = bf16._compiled.__wrapped__().inspect_asm().values()
    counts, amx_counts = [], []
    for loop in re.findall(r"^(\.L\w+):((?:(?!^\.L)[^\n]*\n)*?)\s+j\w+\s+\1\b", code, flags=re.M):
        if multiplied := re.findall(r"\bvdpbf16ps\b.*%zmm", loop[1]):
            counts.append(len(multiplied))
            assert not re.search(r"%rsp\)[^\n]*%zmm|%zmm[^\n]*%rsp\)", loop[1])
        if "tdpbf16ps" in loop[1]:
            amx_counts.append((loop[1].count("tdpbf16ps"), loop[1].count("tileloadd")))
    assert set(counts) == {vectors * bf16.ROWS for vectors in (1, 2, 3)}
    assert set(amx_counts) == {(4, 4)}


# -- the switch --------------------------------------------------------------------------------------------------------
def layer(seed=0, dtype=np.float32):
    return [Tensor(x.astype(dtype), requires_grad=True) for x in normal(seed, (3, 7, 20), (33, 20), (33,))]


@here
def test_linear_and_its_gradients():
    """Each is the product of rounded factors, also where backward runs outside; the gradient of a bias is a sum of float32."""
    x, weight, bias = layer()
    seed = Tensor(normal(1, (3, 7, 33))[0])
    with products("bf16"):
        y = linear(x, weight, bias)
    plain = linear(x, weight, bias)
    gx, gweight, gbias = (g.data for g in gradients(y, [x, weight, bias], seed))
    rows, g = x.data.reshape(21, 20), seed.data.reshape(21, 33)
    assert_is_the_product(y.data.reshape(21, 33), rows, weight.data.T, bias.data)
    assert_is_the_product(gx.reshape(21, 20), g, weight.data)
    assert_is_the_product(gweight, g.T, rows)
    np.testing.assert_array_equal(gbias, np.add.reduce(g, axis=0))
    assert 1e-4 < np.abs(y.data - plain.data).max() < 0.1
    assert y.data.dtype == gx.dtype == gweight.dtype == np.float32
    with products("bf16"):  # what was computed before keeps its own
        got = gradients(plain, [x, weight], seed)
    for found, expected in zip(got, gradients(linear(x, weight, bias), [x, weight], seed), strict=True):
        np.testing.assert_array_equal(found.data, expected.data)


@here
def test_the_switch_holds_in_a_copied_context_and_the_innermost_wins():
    x, weight, _ = layer()

    def compute():
        return linear(x, weight).data

    plain = compute()
    with ThreadPoolExecutor(1) as pool, products("bf16"):
        inside = compute()
        np.testing.assert_array_equal(pool.submit(copy_context().run, compute).result(), inside)
        np.testing.assert_array_equal(pool.submit(compute).result(), plain)
        with products("float32"):
            np.testing.assert_array_equal(compute(), plain)
    np.testing.assert_array_equal(compute(), plain)
    assert not np.array_equal(inside, plain)


@here
def test_a_reversible_chain_computes_again_in_the_same_products():
    weights = [Tensor(x / 4, requires_grad=True) for x in normal(0, (8, 8), (8, 8))]
    x0, x1 = (Tensor(x, requires_grad=True) for x in normal(1, (5, 8), (5, 8)))

    def grads(within):
        with products("bf16"):
            steps = [(lambda x, w=w: linear(x, w), [w]) for w in weights]
            y = reversible(steps, x0, x1)
            total = (y[0] * y[0] + y[1]).sum()
            if within:
                return [g.data for g in gradients(total, [x0, x1, *weights])]
        return [g.data for g in gradients(total, [x0, x1, *weights])]

    for inside, outside in zip(grads(True), grads(False), strict=True):
        np.testing.assert_array_equal(inside, outside)


def test_what_is_refused(monkeypatch):
    """No product is computed in another precision than what was asked for."""
    x, weight, bias = layer()
    with pytest.raises(ValueError, match=r"products: 'float16' is unknown, allowed: float32, tf32, bf16"):
        products("float16")
    with products("tf32"), pytest.raises(KernelError, match=r"'tf32'.*on the CPU, allowed there: 'float32', 'bf16'"):
        linear(x, weight, bias)
    with products("bf16"), pytest.raises(KernelError, match="by its kernels, not by the form composed"):
        with use("linear", form="composed"):
            linear(x, weight, bias)
    monkeypatch.setattr(bf16, "missing", lambda: "this processor is old")
    with products("bf16"), pytest.raises(KernelError, match=r"'bf16'\): this processor is old, allowed: products\('float32'\)"):
        linear(x, weight, bias)
    assert PRODUCTS[0] == "float32" and linear(x, weight, bias).shape == (3, 7, 33)


@here
def test_float64_is_refused():
    x, weight, bias = layer(dtype=np.float64)
    with products("bf16"), pytest.raises(DtypeError, match=r"'bf16'\): the arrays are float64, .*allowed: float32"):
        linear(x, weight, bias)


@pytest.mark.parametrize("has, bits, compiled, said", [
    (True, 512, "+avx512f,+avx512bf16", None), (True, 512, None, None), (False, 512, None, "this processor has no AVX512-BF16"),
    (True, 512, "+avx512f,-avx512bf16", "NUMBA_CPU_FEATURES leaves out"), (True, 256, None, "NUMBA_CPU_FEATURES leaves out"),
])
def test_the_processor_decides(monkeypatch, has, bits, compiled, said):
    monkeypatch.setattr(bf16.llvm, "get_host_cpu_features", lambda: {"avx512bf16": has})
    monkeypatch.setattr(bf16.numba.config, "CPU_FEATURES", compiled)
    monkeypatch.setattr(bf16, "BITS", bits)
    monkeypatch.setattr(bf16, "unavailable", lambda: None)
    reason = bf16.missing.__wrapped__()
    assert reason is None if said is None else reason.startswith(said)
    monkeypatch.setattr(bf16, "unavailable", lambda: "switched off")
    assert bf16.missing.__wrapped__() == "switched off"


# -- AMX ---------------------------------------------------------------------------------------------------------------
def in_a_process(program, **environment):
    """What a program prints, in which ``product`` is that of bf16 and ``a`` and ``b`` are factors."""
    start = """
        import ctypes, os, threading
        import numpy as np
        from autograd.cpu import amx, bf16
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((70, 90), np.float32), rng.standard_normal((90, 50), np.float32)
    """
    source = textwrap.dedent(start) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment})
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.splitlines()


@tiles
def test_threads_that_were_there_before_and_processes_that_are_forked_may_use_tiles():
    """Linux permits tiles to all threads of a process, and to its children."""
    assert in_a_process("""
        found, asked = [], threading.Event()
        def later():
            asked.wait()
            found.append(bf16.product(a, b))
        thread = threading.Thread(target=later)
        thread.start()
        assert amx.missing() is None
        bf16.chosen = lambda: bf16.Choice(bf16.AMX, "for a test")
        asked.set()
        expected = bf16.product(a, b)
        thread.join()
        child = os.fork()
        if not child:
            os._exit(not np.array_equal(bf16.product(a, b), expected))
        print(np.array_equal(found[0], expected), os.waitpid(child, 0)[1], np.array_equal(bf16.product(a, b), expected))
    """) == ["True 0 True"]


@tiles
def test_without_permission_the_other_instructions_compute():
    """Linux permits no tiles to a process with a stack for signals that is too small to keep them."""
    found = in_a_process("""
        class Stack(ctypes.Structure):
            _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
        memory = ctypes.create_string_buffer(4096)
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
        print(bf16.chosen())
        print(bf16.explained())
        print(np.abs(bf16.product(a, b) - a @ b).max() < 0.5)
    """)
    reason = "the system does not permit AMX to this process"
    assert found == [str(Choice(bf16.AVX, reason)),
                     f"products in training steps with --matmul bf16, by AVX512-BF16 ({reason})", "True"]


@tiles
def test_features_that_are_left_out_are_not_used():
    features = ",".join(feature for feature in compiler.numba.config.CPU_FEATURES.split(",") if "amx" not in feature)
    found = in_a_process("""
        print(bf16.chosen())
        print(np.abs(bf16.product(a, b) - a @ b).max() < 0.5)
    """, NUMBA_CPU_NAME=compiler.numba.config.CPU_NAME, NUMBA_CPU_FEATURES=features)
    assert found == [str(Choice(bf16.AVX, "NUMBA_CPU_FEATURES leaves out AMX, which this processor has")), "True"]


@pytest.mark.parametrize("has, compiled, system, said", [
    ("amx-tile amx-bf16", "+avx512f,+amx-tile,+amx-bf16", "linux", None), ("amx-tile amx-bf16", None, "linux", None),
    ("amx-tile", None, "linux", "this processor has no AMX"), ("", None, "linux", "this processor has no AMX"),
    ("amx-tile amx-bf16", "+avx512f,+amx-tile,-amx-bf16", "linux", "NUMBA_CPU_FEATURES leaves out AMX"),
    ("amx-tile amx-bf16", None, "win32", "the system does not permit AMX"),
])
def test_who_may_use_tiles(monkeypatch, has, compiled, system, said):
    monkeypatch.setattr(amx.llvm, "get_host_cpu_features", lambda: dict.fromkeys(has.split(), True))
    monkeypatch.setattr(amx.numba.config, "CPU_FEATURES", compiled)
    monkeypatch.setattr(amx.sys, "platform", system)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: 0))
    reason = amx.missing.__wrapped__()
    assert reason is None if said is None else reason.startswith(said)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda _: SimpleNamespace(syscall=lambda *_: -1))
    assert amx.missing.__wrapped__()


def test_the_choice_is_measured_and_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(bf16, "missing", lambda: None)
    monkeypatch.setattr(amx, "missing", lambda: None)
    monkeypatch.setattr(choice, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(bf16, "_ways", lambda: {bf16.AMX: [lambda: None], bf16.AVX: [lambda: sum(range(10_000))]})
    monkeypatch.setattr(bf16, "chosen", CHOSEN)
    assert bf16.explained().endswith("by AVX512-BF16 or AMX, between which the first such step chooses")
    assert CHOSEN.__wrapped__().way == bf16.AMX
    assert re.search(r"by AMX \(measured here: 0\.\d\d of the time of AVX512-BF16\)$", bf16.explained())
