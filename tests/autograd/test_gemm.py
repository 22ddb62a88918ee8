"""Matrix products: errors against float64, every layout, nothing read or written outside, threads, and the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd.cpu import compile as compiler
from autograd.cpu import gemm, panels

LAYOUTS = ("rows", "columns", "wide rows", "wide columns")
EPS = np.finfo(np.float32).eps

pytestmark = pytest.mark.skipif(not gemm.AVAILABLE, reason="this processor has no AVX2 and FMA: NumPy computes all products")


def forbidden():
    raise AssertionError("NumPy computed a product that the kernel should have")


@pytest.fixture(scope="module", params=["widest", "256 bits"])
def kernel(request):
    """A copy of the module, for the processor's vectors or for AVX2's, that leaves no product but empty ones to NumPy."""
    if request.param == "256 bits" and not compiler.WIDE_VECTORS:
        pytest.skip("these are the widest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "WIDE_VECTORS", compiler.WIDE_VECTORS and request.param == "widest")
        patch.setattr(compiler, "cache_directory", lambda: None)  # it does not know the widths apart, nor keep assembly
        spec = importlib.util.spec_from_file_location("autograd.cpu.gemm_for_tests", gemm.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module._compiled()
    module.suits, numpy = lambda M, K, N: min(M, K, N) > 0, module._numpy
    module._numpy = lambda a, b, out, *rest: numpy(a, b, out, *rest) if 0 in (*a.shape, *b.shape) else forbidden()
    return module


class Guarded:
    """A matrix as a view into a larger array that is NaN everywhere else."""

    def __init__(self, values, layout):
        self.shape, self.layout = values.shape, layout
        rows, columns = self.sizes = values.shape[:: -1 if "columns" in layout else 1]
        self.pitch = columns + 5 * ("wide" in layout)
        self.memory = np.full((rows + 2) * self.pitch + 74, np.nan, np.float32)
        self.view = self.within(self.memory)
        self.view[...] = values
        self.before = self.memory.copy()

    def within(self, memory):
        rows, columns = self.sizes
        matrix = memory[37 : 37 + rows * self.pitch].reshape(rows, self.pitch)[:, :columns]
        return matrix.T if "columns" in self.layout else matrix

    def unchanged(self, outside_only=False):
        if outside_only:
            self.within(self.before)[...] = self.view
        return np.array_equal(self.memory.view(np.uint32), self.before.view(np.uint32))


def check(module, sizes, layouts, accumulate, with_bias, seed):
    M, K, N = sizes
    rng = np.random.default_rng(seed)
    a, b, c, bias = (rng.standard_normal(shape, np.float32) for shape in ((M, K), (K, N), (M, N), (1, N)))
    x, y, z = Guarded(a, layouts[0]), Guarded(b, layouts[1]), Guarded(c if accumulate else np.nan * c, layouts[2])
    extra = Guarded(bias, "rows")
    result = module.product(x.view, y.view, z.view, accumulate, bias=extra.view[0] if with_bias else None)
    exact, size = a.astype(float) @ b, np.abs(a).astype(float) @ np.abs(b)
    for term, present in ((c, accumulate), (bias, with_bias)):
        exact, size = exact + present * term.astype(float), size + present * np.abs(term)
    assert result is z.view
    assert np.all(np.abs(z.view - exact) <= 2 * EPS * np.sqrt(K + 1) * size)
    assert z.unchanged(outside_only=True)
    assert x.unchanged() and y.unchanged() and extra.unchanged()


layout = st.sampled_from(LAYOUTS)
size = st.integers(0, 70)


@given(sizes=st.tuples(size, size, size), layouts=st.tuples(layout, layout, st.sampled_from(["rows", "wide rows"])),
       accumulate=st.booleans(), with_bias=st.booleans(), seed=st.integers(0, 2**16))
def test_any_size_and_layout(kernel, sizes, layouts, accumulate, with_bias, seed):
    check(kernel, sizes, layouts, accumulate, with_bias, seed)


FORWARD, BACKWARD_X, BACKWARD_W = ("rows", "columns"), ("rows", "rows"), ("columns", "rows")


@pytest.mark.parametrize("layouts", [FORWARD, BACKWARD_X, BACKWARD_W, ("columns", "columns")], ids="-".join)
@pytest.mark.parametrize("sizes", [(128, 128, 65), (131, 513, 129), (257, 1030, 31), (9, 3, 771), (300, 1, 400)], ids=str)
def test_blocks(kernel, sizes, layouts):
    """Sizes beyond one block of k, of columns and of rows, each with something left over."""
    for accumulate, with_bias in ((False, False), (True, False), (False, True)):
        check(kernel, sizes, (*layouts, "rows"), accumulate, with_bias, seed=0)


@pytest.mark.parametrize("layouts", [FORWARD, BACKWARD_W], ids="-".join)
def test_nan_and_infinity(kernel, layouts):
    """They reach the numbers that they reach in NumPy, and no others: 0 * inf is NaN, 1 * inf is inf."""
    a, b = np.ones((19, 21), np.float32), np.ones((21, 53), np.float32)
    a[3, 20], a[5, 0], a[18, 7] = np.nan, 0, np.inf
    b[0, 4], b[7, 52] = np.inf, -np.inf
    got = kernel.product(Guarded(a, layouts[0]).view, Guarded(b, layouts[1]).view)
    expected = np.full((19, 53), 21.0)
    expected[5] = 20
    expected[:, 4], expected[:, 52], expected[18] = np.inf, -np.inf, np.inf
    expected[3], expected[5, 4], expected[18, 52] = np.nan, np.nan, -np.inf
    np.testing.assert_array_equal(got, expected)


def test_threads_agree(kernel):
    """Each thread has its own scratch memory, and the order of a sum depends on nothing but the shape."""
    rng = np.random.default_rng(0)
    given = [(rng.standard_normal((m, 200), np.float32), rng.standard_normal((200, 70), np.float32)) for m in range(60, 76)]
    alone = [kernel.product(a, b) for a, b in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda pair: kernel.product(*pair), given))
            assert all(map(np.array_equal, together, alone))


def test_layout_and_alignment_do_not_matter(kernel):
    """The same sums in the same order for every alignment."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 33), np.float32), rng.standard_normal((33, 50), np.float32)
    expected = kernel.product(a, b)
    for x in LAYOUTS:
        for y in LAYOUTS:
            np.testing.assert_array_equal(kernel.product(Guarded(a, x).view, Guarded(b, y).view), expected)


@pytest.fixture
def large(monkeypatch):
    """Two matrices, of which nothing but their layout and dtype sends a product to NumPy."""
    monkeypatch.setattr(gemm, "suits", lambda M, K, N: True)
    rng = np.random.default_rng(0)
    return rng.standard_normal((96, 96), np.float32), rng.standard_normal((96, 96), np.float32)


UNSUITABLE = {
    "float64": lambda x: x.astype(np.float64),
    "integers": lambda x: (4 * x).astype(np.int32),
    "other byte order": lambda x: x.astype(">f4"),
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed columns": lambda x: x[:, ::-1],
    "one row repeated": lambda x: np.broadcast_to(x[0], x.shape),
    "not aligned": lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    "read only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "upside down": lambda x: x[::-1],
}


@pytest.mark.parametrize("change", UNSUITABLE.values(), ids=UNSUITABLE.keys())
@pytest.mark.parametrize("first", [True, False], ids=["a", "b"])
def test_other_arrays(large, change, first):
    """Whoever computes it, the product is right; the type of a new `out` is NumPy's."""
    a, b = (change(large[0]), large[1]) if first else (large[0], change(large[1]))
    for x, y in ((a, b), (b.T, a.T)):
        got = gemm.product(x, y)
        assert got.dtype == np.result_type(a, b)
        np.testing.assert_allclose(got, x.astype(float) @ y.astype(float), rtol=0, atol=2e-4)


def test_out_that_shares_memory(large):
    """`out` may be an operand, overlap with one or have any layout, and so may the bias: it is as if they did not."""
    exact = large[0].astype(float) @ large[1]
    a = large[0].copy()
    np.testing.assert_allclose(gemm.product(a, large[1], a), exact, atol=2e-4)
    b = large[1].copy()
    np.testing.assert_allclose(gemm.product(large[0], b.T, b), large[0].astype(float) @ large[1].T, atol=2e-4)
    for place, target in ((slice(0, 96), slice(2, 98)), (slice(2, 98), slice(0, 96)), (slice(0, 96), slice(97, 1, -1)),
                          (slice(97, 1, -1), slice(0, 96))):
        memory = np.zeros((98, 96), np.float32)
        memory[place] = large[0]
        np.testing.assert_allclose(gemm.product(memory[place], large[1], memory[target]), exact, atol=2e-4)
    a, memory = np.tile(large[0], 8), np.tile(large[1], (9, 1))  # `out` is begun before all of `b` was read
    np.testing.assert_allclose(gemm.product(a, memory[:768], memory[700:796]), 8 * exact, atol=2e-3)
    bias = np.repeat(large[0][0], 2)[::2]
    for out in (np.zeros((96, 96), np.float32).T, np.zeros((96, 192), np.float32)[:, ::2], np.zeros((96, 96))):
        np.testing.assert_allclose(gemm.product(*large, out), exact, atol=2e-4)
        np.testing.assert_allclose(gemm.product(*large, out, True, bias=bias), 2 * exact + bias, atol=4e-4)
    np.testing.assert_allclose(gemm.product(*large, bias=bias), exact + bias, atol=2e-4)


def test_accumulating_and_bias_without_the_kernel():
    a, b = np.array([[1.0, 2.0]]), np.array([[3.0], [5.0]])
    out = np.array([[100.0]])
    assert gemm.product(a, b, out, bias=np.array([0.5])) == [[13.5]]
    assert gemm.product(a, b, out, accumulate=True, bias=np.array([0.5])) == [[27.0]]
    assert out == [[27.0]]


def test_wrong_arguments(large):
    a, b = large
    with pytest.raises(ValueError, match=r"got \[\(96, 96\), \(95, 96\)"):
        gemm.product(a, b[1:])
    with pytest.raises(ValueError, match=r"\(96, 96\), \(95, 96\)\]"):
        gemm.product(a, b, np.empty((95, 96), np.float32))
    with pytest.raises(ValueError, match=r"\(96, 96\), \(1,\)\]"):
        gemm.product(a, b, bias=np.ones(1, np.float32))
    with pytest.raises(ValueError, match="needs an out"):
        gemm.product(a, b, accumulate=True)
    out = np.empty((96, 96), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        gemm.product(a, b, out)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory with mprotect")
def test_nothing_outside_is_read():
    nothing_outside_is_read("gemm")


def nothing_outside_is_read(module, way=""):
    """Operands that end, and operands that begin, where memory that may not be touched begins or ends; ``way`` of bf16."""
    program = textwrap.dedent("""
        import ctypes, itertools, mmap
        import numpy as np
        from autograd.cpu import amx, bf16, gemm
        from autograd.cpu.choice import Choice
        gemm.suits, gemm._numpy = lambda *_: True, None
        amx.missing()  # which asks for tiles
        bf16.chosen = lambda: Choice("WAY", "for a test")
        kept = []
        def at_edge(values, transposed, last):
            pages = mmap.mmap(-1, 5 * mmap.PAGESIZE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
            for page in (0, 4):
                assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
            start = 4 * mmap.PAGESIZE - values.nbytes if last else mmap.PAGESIZE
            matrix = np.frombuffer(pages, np.float32, values.size, start)
            matrix = matrix.reshape(values.shape[::-1]).T if transposed else matrix.reshape(values.shape)
            matrix[...] = values
            kept.append(pages)
            return matrix
        for M, K, N in ((1, 1, 1), (8, 16, 48), (13, 37, 53), (9, 37, 48), (50, 60, 40)):
            a, b = np.arange(M * K, dtype="f").reshape(M, K) % 7, np.arange(K * N, dtype="f").reshape(K, N) % 5
            for ta, tb, last, accumulate in itertools.product((False, True), repeat=4):
                out = at_edge(np.ones((M, N), "f"), False, last)
                bias = at_edge(np.ones((1, N), "f"), False, last)[0]
                MODULE.product(at_edge(a, ta, last), at_edge(b, tb, last), out, accumulate, bias=bias)
                assert np.array_equal(out, a @ b + 1 + accumulate)
        print("done", len(kept))
    """).replace("MODULE", module).replace("WAY", way)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0 and done.stdout.startswith("done"), done.stderr[-2000:]


def test_inner_loops_are_packed_and_stay_in_registers(kernel):
    """Each tile's loop over k has one multiply-add for each vector of the tile, and none of its vectors is on the stack."""
    (code,) = kernel._compiled().inspect_asm().values()
    register = "zmm" if kernel.LANES == 16 else "ymm"
    counts = []
    for loop in re.findall(r"^(\.L\w+):((?:(?!^\.L)[^\n]*\n)*?)\s+j\w+\s+\1\b", code, flags=re.M):
        multiplied = re.findall(rf"\bvfmadd\d+ps\b.*%{register}", loop[1])
        if multiplied:
            counts.append(len(multiplied))
            assert not re.search(rf"%rsp\)[^\n]*%{register}|%{register}[^\n]*%rsp\)", loop[1])
    assert set(counts) == {vectors * kernel.ROWS for vectors in (1, 2, 3)}


def test_panels_multiply_in_tiles_of_256_bits(kernel, monkeypatch):
    """The products of attention and of chunks, whose rows of 32 numbers are two tiles wide here."""
    if kernel.LANES == 16:
        pytest.skip("the tests of attention run these")
    monkeypatch.setattr("autograd.cpu.gemm", kernel)
    monkeypatch.setitem(sys.modules, "autograd.cpu.gemm", kernel)
    spec = importlib.util.spec_from_file_location("autograd.cpu.panels_for_tests", panels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TILES
    add = module.add_product

    @numba.njit(**compiler.FLAGS)
    def run(out, a, b, rows, depth, columns):
        add(out, rows, a, rows, b, depth, rows, depth, columns, True)

    def paneled(matrix):
        rows, columns = matrix.shape
        wide = np.pad(matrix, ((0, 0), (0, -columns % 32)))
        return wide.reshape(rows, -1, 32).transpose(1, 0, 2).ravel().copy()

    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((16, 40), (40, 45), (16, 45)))
    out = paneled(c)
    run(out, paneled(a), paneled(b), 16, 40, 45)
    np.testing.assert_allclose(out, paneled(c + a.astype(float) @ b), rtol=0, atol=1e-5)
    (code,) = run.inspect_asm().values()
    assert re.search(r"\bvfmadd\d+ps\b.*%ymm", code)
