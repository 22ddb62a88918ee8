"""The emulator of CUDA kernels: planted errors are reported as what they are, and no barrier of our kernels is superfluous."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import autograd
import minitv
from autograd import KernelError
from autograd.cuda.source import _module, _prepared, manifest, signatures
from autograd.ops.adamw.gpu import sum_gradients
from autograd.verify import compute, differentiable, differentiate
from tests.autograd import emulator, fake_cupy
from tests.autograd.operator_checks import awkward_calls
from tests.conftest import operators

OPERATORS = operators()
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(emulator.missing), reason=str(emulator.missing))]

# One block of 64 threads (or more blocks) with 64 numbers in x, 64 in y and n = 48.
OPENING = ('extern "C" __global__ void __launch_bounds__({threads}) planted(const float* __restrict__ x, float* y, int n) '
           "{{ int t = threadIdx.x; ")
SHARED = "__shared__ float s[64]; "


def launch(body, *, grid=1, threads=64, seed=0, mode="check"):
    """Run a kernel with this body; returns y."""
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    text = OPENING.format(threads=threads) + body + "\n}\n"
    emulator.Module(text, (), mode, seed).get_function("planted")((grid,), (threads,), (x, y, np.int32(48)))
    return y


PLANTED = {
    "no barrier": (SHARED + "s[t] = x[t]; y[t] = s[63 - t];", "nobody wrote|race"),
    "no barrier before writing again": (
        SHARED + "for (int r = 0; r < 2; r++) { s[t] = x[t] + r; __syncthreads(); y[t] = s[(t + 33) % 64]; }",
        "race: read at kernel.cu:1 against an unordered write at kernel.cu:1"),
    "shared memory that nobody wrote": (
        "__shared__ float s[65]; s[t] = x[t]; __syncthreads(); y[t] = s[t + 1];", "nobody wrote"),
    "divergent barrier": (
        "if (t < 32) { __syncthreads();\n y[t] = 1; } else { __syncthreads(); y[t] = x[t]; }",
        "divergent barrier: some threads wait at line 1, others at line 2"),
    "return before a barrier": (
        "if (t >= n) return; y[t] = x[t]; __syncthreads();", "48 of 64 threads: the others have returned"),
    "read out of bounds": ("y[t] = x[t + 1];", "out-of-bounds read of 4 bytes at kernel.cu:1"),
    "read far out of bounds": ("y[t] = x[t] + x[-30];", "out-of-bounds read"),
    "write out of bounds": ("y[t + 2] = x[t];", "out-of-bounds write"),
    "shared memory underrun": (
        SHARED + "float* p = s; p[t] = x[t]; __syncthreads(); y[t] = p[t - n];", "out-of-bounds read"),
    "shared memory overrun": ("__shared__ float s[60]; s[t] = x[t]; y[t] = s[t];", "array index out of bounds at kernel.cu:1"),
    "shared memory overrun by a pointer": (
        "__shared__ float s[60]; float* p = s; p[t] = x[t]; y[t] = p[t];", "out-of-bounds write"),
    "another thread's local array": (
        "__shared__ float* p; float a[4] = {x[t], 1, 2, 3}; if (t == 0) p = a; __syncthreads(); y[t] = p[n & 3];",
        "another thread's local memory"),
    "overflow": ("int big = 1 << 20; y[t] = x[t] + big * (n * 1000 + t);", r"signed overflow in \*"),
    "division by zero": ("y[t] = n / t;", "division by zero"),
    "a shift by too much": ("y[t] = n << (t + 10);", "shift by too much"),
    "a sum without atomics": ("y[0] += x[t];", "race"),
    "an atomic read plainly": ("atomicAdd(y, x[t]); if (t == 3) y[1] = y[0];", "race"),
    "a shuffle orders no memory": (
        SHARED + "s[t] = x[t]; __shfl_xor_sync(0xffffffffu, t, 1); y[t] = s[t ^ 1];", "race|nobody wrote"),
    "a lane outside its mask": ("y[t] = __shfl_xor_sync(0xffffu, x[t], 1);", "not in mask"),
    "a shuffle in half a warp": (
        "if (t & 1) y[t] = __shfl_xor_sync(0xffffffffu, x[t], 2);", "names lane 0, which has returned"),
    "a mask that names lanes elsewhere": (
        "if (t < 16) y[t] = __shfl_xor_sync(0xffffffffu, x[t], 1); __syncthreads();", "deadlock"),
    "a misaligned vector": (
        "float4 v = *(const float4*)(x + 1); y[t] = v.x + v.y * v.z * v.w;", "misaligned"),
    "assert": ("assert(t < 5);", r"assert\(t < 5\) failed at line 1"),
}
PLANTED_BETWEEN_BLOCKS = {
    "blocks write one element": ("y[t] = blockIdx.x;", "race: write .* another block's"),
    "a block reads another's output": (
        "y[blockIdx.x * 32 + t] = t < 1 && blockIdx.x ? y[0] : 1.f;", "race: read .* another block's"),
}


@pytest.mark.parametrize(("body", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_reported(body, words):
    with pytest.raises(KernelError, match=words):
        launch(body)


@pytest.mark.parametrize(("body", "words"), PLANTED_BETWEEN_BLOCKS.values(), ids=PLANTED_BETWEEN_BLOCKS)
def test_a_planted_error_between_blocks_is_reported(body, words):
    with pytest.raises(KernelError, match=words):
        launch(body, grid=2, threads=32)


RIGHT = {
    "barrier": (SHARED + "s[t] = x[t]; __syncthreads(); y[t] = s[63 - t];", lambda t: 63 - t),
    "warp barrier": (SHARED + "s[t] = x[t]; __syncwarp(); y[t] = s[t ^ 1];", lambda t: t ^ 1),
    "atomics": ("atomicAdd(y, x[t]); __syncthreads(); if (t == 3) y[1] = y[0]; if (t > 1) y[t] = t;",
                lambda t: np.where(t < 2, 2016, t)),
    "shuffles": ("y[t] = __shfl_down_sync(0xffffffffu, x[t], 4); if (t < 16) y[t] += __shfl_xor_sync(0xffffu, x[t], 4);",
                 lambda t: np.where(t % 32 < 28, t + 4, t) + np.where(t < 16, t ^ 4, 0)),
    "vectors": ("float4 v = ((const float4*)x)[t & 15]; y[t] = v.x + v.w;", lambda t: 8 * (t & 15) + 3),
    "votes": ("y[t] = __syncthreads_count(t < n) + __popc(__ballot_sync(0xffffffffu, t & 1)) + __syncthreads_or(t == 5) + "
              "__syncthreads_and(t < 5);", lambda t: 0 * t + 48 + 16 + 1),
    "subnormals": ("y[t] = x[t] * 1e-30f * 1e-10f;", lambda t: 0 * t),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("body", "expected"), RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_not_reported(body, expected, seed):
    for mode in emulator.MODES:
        np.testing.assert_array_equal(launch(body, seed=seed, mode=mode), expected(np.arange(64)))


def test_names_that_nvrtc_lacks_are_refused():
    for name in ("INFINITY", "NAN"):
        with pytest.raises(KernelError, match=name):
            launch(f"y[t] = {name};")


def test_a_kernel_may_not_write_to_an_argument_that_is_also_another():
    text = OPENING.format(threads=32) + "y[t] = x[t]; }\n"
    x = np.zeros(64, np.float32)
    with pytest.raises(AssertionError, match="is also another argument"):
        emulator.Module(text).get_function("planted")((1,), (32,), (x, x[:32], np.int32(1)))


# -- our kernels -------------------------------------------------------------------------------------------------------
FUSED = {kernel.module: op for op in OPERATORS for kernel in op.kernels.values() if kernel.device == "cuda"}
FUSED = {module: op for module, op in FUSED.items() if hasattr(import_module(module), "SOURCE")}  # kernels of their own


def _named(source):
    """What the names of its kernels begin with: that of the operator's folder, or of a file that several operators use."""
    return source.path.parent.name if source.path.stem == "gpu" else source.path.stem


MANIFEST = [pytest.param(source, options, id="-".join([_named(source), *options])) for source, options in manifest()]


@pytest.mark.parametrize(("source", "options"), MANIFEST)
def test_signatures_are_read_as_the_compiler_reads_them(source, options):
    module = emulator.Module(source.text, options)
    for name, signature in source.kernels(options).items():
        assert name.startswith(f"mtv_{_named(source)}_") or name == f"mtv_{_named(source)}"
        assert module.deduced(name) == [("const " if p.const else "") + p.dtype + "*" * p.pointer
                                        for p in signature.parameters]


BARRIER = re.compile(r"__syncthreads\(\);|__syncthreads_or(?=\()|__syncwarp\(\);")


def barriers():
    """Every barrier of every kernel, and those of kernel.cuh where they are used: the text without it."""
    for module, op in FUSED.items():
        source = import_module(module).SOURCE
        own = source.text.rindex("#line")
        for number, match in enumerate(BARRIER.finditer(source.text)):
            users = ("block_sum(",) if match.start() < source.text.index("T sum_warps(") else ("sum_warps(", "sum_rows(")
            if match.start() > own or any(user in source.text[own:] for user in users):
                text = source.text[:match.start()] + ";" * match[0].endswith(";") + source.text[match.end():]
                yield pytest.param(op, source, text, id=f"{op.name}-{number}")


def emulated(op):
    """The routes through the emulator."""
    return [f"{kernel} on emulator" for kernel in op.kernels.values() if kernel.device == "cuda"]


def everything(op):
    """Every kernel of an operator, with several tiles, blocks or chunks."""
    if op.name == "adamw":  # its sum of squares is no operator
        with fake_cupy.installed() as cupy:
            sum_gradients([], cupy.ones(9000, np.float32), 0, 9000)
        return
    for route in emulated(op):
        for size in (70, 130):
            for args, params, cotangents in awkward_calls(op, route, size, 6):
                differentiate(op, route, args, params, cotangents)


@pytest.fixture
def mutant(monkeypatch):
    """A function that gives a source another text."""
    def change(source, text):
        monkeypatch.setitem(vars(source), "text", text)
        _forget()

    yield change
    _forget()


def _forget():
    for function in (_prepared, _module):
        function.cache_clear()


@pytest.mark.parametrize(("op", "source", "text"), list(barriers()))
def test_every_barrier_is_needed(op, source, text, mutant):
    """Without it the emulator reports an error, for some call with more than one tile."""
    mutant(source, text)
    with pytest.raises(KernelError, match=r"race|nobody wrote"):
        everything(op)


@pytest.mark.parametrize("op", [op for op in OPERATORS if emulated(op)], ids=lambda op: op.name)
def test_results_do_not_depend_on_the_order_of_threads(op, monkeypatch):
    def results(seed):
        monkeypatch.setattr(fake_cupy.state, "seed", seed)
        _forget()  # a compiled module keeps its order
        for route in emulated(op):
            for args, params, cotangents in awkward_calls(op, route, 70, 3):
                yield from compute(op, route, args, params)
                if differentiable(op, route):
                    yield from differentiate(op, route, args, params, cotangents).values()

    expected = [a.tobytes() for a in results(0)]
    try:
        assert [a.tobytes() for a in results(3)] == expected
    finally:
        _forget()


def test_every_kernel_belongs_to_an_operator():
    sources = {source.path for source, _ in manifest()}
    files = [p for package in (autograd, minitv) for p in Path(package.__file__).parent.rglob("*.cu")]
    assert sources == set(files) and len(sources) >= 8
    assert all(source.text.isascii() for source, _ in manifest())  # CuPy writes it to a file in whatever encoding
    for op in OPERATORS:  # an operator of a paper is fast on both, see below; one of somebody's own may begin with the CPU
        devices = {kernel.device for kernel in op.kernels.values()}
        assert devices in (set(), {"cpu", "cuda"}) or op.definition.__module__.startswith("autograd."), op.name


def test_a_text_that_breaks_the_rules_is_refused():
    good = 'extern "C" __global__ void __launch_bounds__(64)\nf(const float* __restrict__ x, int n)\n{ }\n'
    assert signatures(good)["f"].block == 64
    for bad, words in (('__global__ void f(int n) { }', "of 1 kernels, 0 are declared"),
                       (good.replace("64", "60"), "a multiple of 32"), (good.replace("int n", "short n"), "short n"),
                       (good.replace("const float*", "float**"), "cannot read")):
        with pytest.raises(KernelError, match=re.escape(words)):
            signatures(bad)
