"""The GPU: on a machine without one, through the emulator and a double of CuPy; with the marker ``gpu``, on a card."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import autograd as ag
from autograd import (
    DeviceError,
    DomainError,
    DtypeError,
    GraphError,
    KernelError,
    ShapeError,
    Tensor,
    assert_close,
    gradients,
    use,
)
from autograd.cuda import blas
from autograd.cuda.source import Source, Strided, columns, elements, manifest, warps
from autograd.device import check_range, gpu, location, move, read, select
from autograd.draw import LAYOUTS, Draw, draw_inputs
from autograd.ops import linear
from autograd.philox import philox_int
from autograd.random import Random
from autograd.state import products
from autograd.verify import (
    PLACES,
    check_gradients,
    check_repeatable,
    check_values,
    compute,
    differentiable,
    draw_cotangents,
    forms,
)
from minitv import checkpoint, cli
from minitv.experiment import Experiment
from minitv.ops import attention
from minitv.optim import AdamW
from minitv.task import Batch
from minitv.trainer import Trainer
from tests.autograd import emulator, fake_cupy, nvrtc
from tests.autograd.operator_checks import awkward_calls, marks
from tests.conftest import operators
from tests.minitv import models
from tests.minitv.models import Ids, configure, mean_loss

OPERATORS = operators()
FUSED = [op for op in OPERATORS if "cuda" in op.kernels]
KERNEL = "kernel cuda on {}"
each_place = pytest.mark.parametrize("place", [pytest.param(place, marks=marks(KERNEL.format(place)))
                                               for place in ("emulator", "card")])


def each(cases):
    cases = list(cases)
    ids = ["-".join(getattr(part, "name", str(part)).replace(" ", "_") for part in case) for case in cases]
    return pytest.mark.parametrize("case", cases, ids=ids)


@pytest.fixture
def double():
    """A CuPy without kernels, on any machine."""
    with fake_cupy.installed() as found:
        yield found


@pytest.fixture
def cupy(double):
    """One with kernels."""
    if emulator.missing:
        pytest.skip(emulator.missing)
    return double


# -- operators ---------------------------------------------------------------------------------------------------------
@each_place
@each((op, form) for op in OPERATORS for form in forms(op))
def test_a_form_keeps_to_the_device(case, place):
    op, form = case
    for seed in range(12):
        draw = Draw.seeded(seed, (np.float32, np.float64)[seed % 2], LAYOUTS)
        args, params = draw_inputs(op, draw)
        check_values(op, f"{form} on {place}", args, params)
        if op.differentiable:
            check_gradients(op, f"{form} on {place}", args, params, draw_cotangents(op, args, params, draw))


@each_place
@each((op, str(kernel), size) for op in OPERATORS for kernel in op.kernels.values() if kernel.device == "cuda"
      for size in (0, 1, 31, 33, 257))
def test_kernels_at_awkward_sizes(case, place):
    op, kernel, size = case
    route = f"{kernel} on {place}"
    for args, params, cotangents in awkward_calls(op, route, size, 3):
        check_values(op, route, args, params, reference=forms(op)[0])
        if differentiable(op, route):
            check_gradients(op, route, args, params, cotangents, reference=forms(op)[0])
            check_repeatable(op, route, args, params, cotangents)


SHAPES = [  # B, H, T, S, K, V: around the sizes of tiles, of queries, keys and channels
    (1, 1, 1, 1, 1, 1), (2, 3, 31, 31, 8, 8), (1, 2, 33, 33, 32, 32), (1, 1, 64, 64, 33, 31), (1, 1, 65, 65, 64, 64),
    (1, 1, 70, 130, 16, 48), (1, 1, 130, 33, 64, 5), (1, 1, 5, 257, 3, 2), (1, 1, 257, 5, 2, 3), (1, 1, 33, 47, 65, 1),
    (1, 2, 17, 33, 128, 128), (1, 1, 1, 100, 100, 20), (2, 1, 40, 40, 96, 0),
]


@each_place
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_around_the_sizes_of_tiles(shape, place):
    rng = np.random.default_rng(sum(shape))
    batch, heads, queries, keys, width, out = shape
    q, k, v, *g = (rng.standard_normal(s).astype(np.float32) for s in (
        (batch, queries, heads, width), (batch, keys, heads, width), (batch, heads, keys, out), (batch, heads, queries, out),
        (batch, heads, queries)))
    q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)  # read through their strides
    mask = rng.random((batch, 1, queries, keys)) < 0.7
    for params in ({}, {"causal": False}, {"causal": False, "dropout": 0.3, "seed": 2**40 + 3}, {"dropout": 0.3, "seed": 5}):
        for given in (None, mask, mask[:, :, :1], mask[..., :1]):
            args = q, k, v, given, None, None
            check_values(attention, KERNEL.format(place), args, params, reference="form parallel")
            check_gradients(attention, KERNEL.format(place), args, params, g, reference="form parallel")


EXTREMES = np.array([0.0, -0.0, 1e-30, -9.0, 9.0, 20.0, -20.0, 1e30, -1e30, 3e38, math.inf, -math.inf, math.nan], np.float32)
ROWS = np.stack([EXTREMES, np.full_like(EXTREMES, 3.0), np.linspace(-50, 50, len(EXTREMES), dtype=np.float32),
                 np.where(np.isfinite(EXTREMES), 1, -math.inf).astype(np.float32), np.zeros_like(EXTREMES)])
SPECIAL = {
    "gelu": (ag.gelu, [EXTREMES], {}), "gelu_tanh": (ag.gelu_tanh, [EXTREMES], {}),
    "relu_squared": (ag.relu_squared, [EXTREMES], {}),
    "layer_norm": (ag.layer_norm, [ROWS[1:3]], {}), "layer_norm with nan": (ag.layer_norm, [ROWS], {}),
    "layer_norm of one": (ag.layer_norm, [ROWS[1:2, :1]], {}), "rms_norm": (ag.rms_norm, [ROWS[[1, 2, 4]]], {}),
    "rms_norm with nan": (ag.rms_norm, [ROWS[:3, -1:]], {}),
    "dropout": (ag.dropout, [EXTREMES], {"p": 0.5, "seed": 3}), "dropout of all": (ag.dropout, [EXTREMES], {"p": 1.0}),
    "cross_entropy": (ag.cross_entropy, [ROWS[1:], np.array([0, 3, 0, 2])], {}),
    "cross_entropy with nan": (ag.cross_entropy, [ROWS, np.array([0, 1, 2, 3, 4])], {}),
    "cross_entropy of what is impossible": (ag.cross_entropy, [ROWS[3:4], np.array([10])], {}),
    "cross_entropy, smoothed": (ag.cross_entropy, [ROWS[1:], np.array([0, 3, 0, 2])], {"label_smoothing": 0.25}),
    "cross_entropy, smoothed, with nan": (ag.cross_entropy, [ROWS, np.array([0, 1, 2, -1, 4])],
                                          {"ignore_index": -1, "reduction": "none", "label_smoothing": 0.25}),
    "cross_entropy, a sum": (ag.cross_entropy, [ROWS[1:], np.array([0, 3, 0, 2])], {"reduction": "sum"}),
    "cross_entropy, all ignored": (ag.cross_entropy, [ROWS[1:2], np.array([-1])], {"ignore_index": -1}),
}


@each_place
@pytest.mark.parametrize(("op", "inputs", "params"), SPECIAL.values(), ids=SPECIAL)
def test_extreme_values_give_what_they_give_on_the_cpu(op, inputs, params, place):
    def run(put):
        values = [Tensor.wrap(put(x), requires_grad=True) if x.dtype.kind == "f" else put(x) for x in inputs]
        with np.errstate(all="ignore"):
            y = op(*values, **params)
            y.backward(Tensor.wrap(put(np.full(y.shape, 0.5, np.float32))))
        return y.numpy(), values[0].grad.numpy()

    expected = run(lambda x: x)
    with PLACES[place]() as put:
        found = run(put)
    for a, b in zip(found, expected, strict=True):
        finite = np.isfinite(b)
        assert_close(a[finite], b[finite], terms=16)
        np.testing.assert_array_equal(a[~finite], b[~finite])


@each_place
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["queries", "keys", "values"])
def test_what_attention_hides_may_hold_anything(where, bad, place):
    """A step that no query sees, and the future of the others."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 2, 40, 8)).astype(np.float32) for _ in range(4)]
    mask = np.ones((1, 1, 40, 40), bool)
    mask[..., 3] = False
    spoilt = [a.copy() for a in arrays]
    spoilt[where][:, :, [39] if where == 0 else [3, 39]] = bad
    expected = compute(attention, "form parallel", (*(a.astype(np.float64) for a in arrays[:3]), mask, None, None), {})[0]
    with PLACES[place]() as put, use(attention, kernel="cuda"):
        tensors = [Tensor.wrap(put(a), requires_grad=True) for a in spoilt[:3]]
        y, _ = attention(*tensors, put(mask))
        assert_close(y.numpy()[:, :, :39], expected[:, :, :39], terms=40)
        seed = arrays[3].copy()
        seed[:, :, 39] = 0
        y[:, :, :39].backward(Tensor.wrap(put(np.ascontiguousarray(seed[:, :, :39]))))
        assert np.isfinite(tensors[0].grad.numpy()[:, :, :39]).all()
        assert not tensors[1].grad.numpy()[:, :, 3].any() and not tensors[2].grad.numpy()[:, :, 3].any()


# -- random numbers ----------------------------------------------------------------------------------------------------
WORDS = """#include "kernel.cuh"
extern "C" __global__ void __launch_bounds__(64)
words(const unsigned* __restrict__ counters, unsigned* __restrict__ out, int n, unsigned long long seed)
{
    int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= n) return;
    uint4 four = philox(counters[4 * i], counters[4 * i + 1], counters[4 * i + 2], counters[4 * i + 3], seed);
    out[4 * i] = four.x;
    out[4 * i + 1] = four.y;
    out[4 * i + 2] = four.z;
    out[4 * i + 3] = four.w;
}
"""
KNOWN = [  # Random123's answers for philox4x32-10: counter, seed, words
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@each_place
def test_words_are_the_published_ones_and_those_of_the_cpu(place, tmp_path):
    (tmp_path / "words.cu").write_text(WORDS)
    source = Source(tmp_path / "words.py")

    def draw(counters, seed):
        counters = np.asarray(counters, np.uint32)
        with PLACES[place]() as put:
            out = put(np.zeros(counters.shape, np.uint32))
            source.launch("words", elements(len(counters)), put(counters), out, len(counters), seed)
            return out.get()

    for counter, seed, expected in KNOWN:
        assert tuple(draw([counter], seed)[0].tolist()) == expected
    counters = np.random.default_rng(0).integers(0, 2**32, (200, 4))
    for seed in (1, 2**32, 2**64 - 1):
        assert draw(counters, seed).tolist() == [list(philox_int(tuple(map(int, c)), seed)) for c in counters]
    blocks = np.stack([np.arange(20_000), *np.zeros((3, 20_000), int)], axis=-1)
    assert (draw(blocks, 77).ravel() == Random(77).words(80_000)).all()  # drawn by a Numba kernel


@each_place
def test_masks_of_dropout_are_those_of_the_cpu(place):
    x = np.ones((3, 1001), np.float32)
    q = np.zeros((2, 3, 33, 16), np.float32)
    v = np.broadcast_to(np.eye(70, 60, dtype=np.float32), (2, 3, 70, 60))
    k = np.zeros((2, 3, 70, 16), np.float32)
    with PLACES[place]() as put:
        found = ag.dropout(put(x), p=0.3, seed=2**63 + 5).numpy()
        weights = attention(put(q), put(k), put(np.ascontiguousarray(v)), causal=False, dropout=0.3, seed=2**50)[0].numpy()
    assert ((found != 0) == (ag.dropout(x, p=0.3, seed=2**63 + 5).numpy() != 0)).all()
    expected = attention(q, k, np.ascontiguousarray(v), causal=False, dropout=0.3, seed=2**50)[0].numpy()
    assert ((weights != 0) == (expected != 0)).all() and (weights == 0).any()


# -- the launcher ------------------------------------------------------------------------------------------------------
FILL = """#include "kernel.cuh"
#define STEP 32  // and not 1.5
#define HALF 0.5f
extern "C" __global__ void __launch_bounds__(32)
fill(const float* __restrict__ x, float* __restrict__ y, int n, float scale)
{
    for (int i = threadIdx.x; i < n; i += 32) y[i] = x[i] * scale;
}
"""
MARK = """#include "kernel.cuh"
extern "C" __global__ void __launch_bounds__(64)
mark(int* __restrict__ out)
{
    if (threadIdx.x == 0) out[8 * blockIdx.x + blockIdx.y] += 1;
}
"""


@pytest.fixture
def fill(tmp_path):
    (tmp_path / "fill.cu").write_text(FILL)
    return Source(tmp_path / "fill.py")


@pytest.mark.full
def test_a_launch_converts_python_numbers(fill, cupy):
    x, y = cupy.asarray(np.arange(40, dtype=np.float32)), cupy.empty(40, np.float32)
    fill.launch("fill", 1, x, y, 40, 2)
    assert (y.get() == 2 * np.arange(40)).all()
    fill.launch("fill", (1, 1), Strided(x[::2]), y, np.int64(3), np.float64(0.5))
    fill.launch("fill", 1, None, y, 0, 1.0)  # reads nothing
    with pytest.raises(KernelError, match="out-of-bounds read"):
        fill.launch("fill", 1, None, y, 1, 1.0)


@pytest.mark.full
def test_a_grid_is_made_from_the_work_and_the_size_of_a_block(tmp_path, cupy):
    (tmp_path / "mark.cu").write_text(MARK)
    source = Source(tmp_path / "mark.py")
    for grid, expected in ((elements(129), (3,)), (elements(128), (2,)), (elements(65, 2), (4,)), (warps(5), (3,)),
                           (columns(33), (2,)), ((2, warps(3)), (2, 2)), (7, (7,)), ((2, 0), ()), (elements(0), ()),
                           (warps(0), ()), ((elements(5), 0, 3), ())):
        out = cupy.zeros((8, 8), np.int32)
        source.launch("mark", grid, out)
        marked = np.zeros((8, 8), int)
        if expected:
            marked[:expected[0], :(*expected, 1)[1]] = 1
        assert out.get().tolist() == marked.tolist()


def test_numbers_that_a_source_defines(fill):
    assert fill["STEP"] == 32
    with pytest.raises(KernelError, match=r"fill.cu defines no number 'STEPS', it has STEP"):
        fill["STEPS"]


REFUSED = {
    "an unknown kernel": (("fil", 1), "has no kernel 'fil', it has fill"),
    "too few arguments": (("fill", 1, "x", "y", 1), "takes 4 arguments, got 3"),
    "a NumPy array": (("fill", 1, "numpy", "y", 1, 1.0), "x is a CuPy array, got ndarray"),
    "a number for an array": (("fill", 1, 3, "y", 1, 1.0), "x is a CuPy array, got int"),
    "no array to write to": (("fill", 1, "x", None, 1, 1.0), "y is a CuPy array, got NoneType"),
    "another dtype": (("fill", 1, "double", "y", 1, 1.0), "x has dtype float64, the kernel takes float32"),
    "a strided array": (("fill", 1, "strided", "y", 1, 1.0), "x is not contiguous"),
    "an array of another card": (("fill", 1, "other", "y", 1, 1.0), "x lies on cuda:1, but cuda:0 is selected"),
    "a large number": (("fill", 1, "x", "y", 2**31, 1.0), "n = 2147483648 does not fit into int32"),
    "a float for an int": (("fill", 1, "x", "y", 1.5, 1.0), "n is a number of int32, got float"),
    "an array for a number": (("fill", 1, "x", "y", "x", 1.0), "n is a number of int32, got ndarray"),
    "a bool for a float": (("fill", 1, "x", "y", 1, True), "scale is a number of float32, got bool"),
    "a negative grid": (("fill", elements(-64), "x", "y", 1, 1.0), "a grid of (-2,) blocks"),
    "an empty grid, and too few arguments": (("fill", 0, "x", "y", 1), "takes 4 arguments, got 3"),
    "a grid that is too tall": (("fill", (1, 65536), "x", "y", 1, 1.0), "a grid of (1, 65536) blocks"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_a_launch_refuses(call, words, fill, double):
    with double.cuda.Device(1):
        other = double.ones(64, np.float32)
    arrays = {"x": double.ones(64, np.float32), "y": double.ones(64, np.float32), "double": double.ones(64), "other": other,
              "strided": double.ones(64, np.float32)[::2], "numpy": np.ones(64, np.float32)}
    name, grid, *rest = call
    with pytest.raises(KernelError) as caught:
        fill.launch(name, grid, *(arrays.get(a, a) if isinstance(a, str) else a for a in rest))
    assert words in str(caught.value)


def test_options_that_are_not_declared_are_refused(fill):
    with pytest.raises(KernelError, match="no variant"):
        fill.kernels(("-DWIDTH=8",))


@pytest.mark.full
def test_a_kernel_has_no_double_precision_and_the_form_runs(cupy):
    x = cupy.ones((2, 3))
    assert "kernel cuda: not chosen: needs float32, got float64" in ag.explain("layer_norm", x)
    assert ag.layer_norm(x).data.dtype == np.float64
    wide = cupy.ones((1, 1, 2, 129), np.float32)
    assert "needs 1 to 128 channels" in ag.explain(attention, wide, wide, wide)


# -- the compiler ------------------------------------------------------------------------------------------------------
def needs_nvrtc(test):
    missing = pytest.mark.skipif(nvrtc.library() is None, reason="needs the wheel nvidia-cuda-nvrtc-cu12")
    return pytest.mark.full(missing(test))



@needs_nvrtc
def test_every_kernel_compiles_without_spills_and_fits():
    found = nvrtc.table()
    names = {name for source, options in manifest() for name in source.kernels(options)}
    assert {kernel.split()[0] for kernel in found} == names and len(names) > 15
    for kernel, by in found.items():
        for architecture, needs in by.items():
            assert needs["spilled"] == needs["stack"] == 0, f"{kernel}, {architecture}: {needs}"
            assert needs["shared"] <= nvrtc.LIMIT, f"{kernel}, {architecture}: {needs}"
    if nvrtc.version() == nvrtc.VERSION:
        expected = json.loads(nvrtc.EXPECTED.read_text(encoding="utf-8"))
        assert nvrtc.registers(found) == expected, "if on purpose: python -m tests.autograd.nvrtc --write"


@needs_nvrtc
@pytest.mark.parametrize(("wrong", "words"), [("y[i] = x[i] * scal;", "scal"), ("y[i] = INFINITY;", "INFINITY")])
def test_the_compiler_refuses(wrong, words):
    text = FILL.replace("y[i] = x[i] * scale;", wrong).replace('#include "kernel.cuh"', "")
    good, log = nvrtc.compiled(text, "sm_75")
    assert not good and words in log


@needs_nvrtc
def test_a_spill_is_seen():
    """More values alive at once than there are registers."""
    many = "{ float a[300]; for (int j = 0; j < 300; j++) a[j] = x[i + j]; __syncthreads();" \
           "for (int r = 0; r < n; r++) for (int j = 0; j < 300; j++) a[j] = a[(j + 1) % 300] * a[j];" \
           "float t = 0; for (int j = 0; j < 300; j++) t += a[j]; y[i] = t; }"
    good, log = nvrtc.compiled(FILL.replace("y[i] = x[i] * scale;", many).replace('#include "kernel.cuh"', ""), "sm_75")
    needs = nvrtc.resources(log)["fill"]
    assert good and needs["spilled"] + needs["stack"] > 0


# -- which device ------------------------------------------------------------------------------------------------------
def test_nothing_imports_cupy():
    code = ("import sys, pkgutil, importlib, autograd, minitv\n"
            "for package in (autograd, minitv):\n"
            "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
            "        if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
            "assert not [name for name in sys.modules if name.split('.')[0] in ('cupy', 'cupyx', 'cupy_backends')]\n")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def no_cupy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else find(name, *rest))
    gpu.cache_clear()
    yield
    gpu.cache_clear()


def asked_for(words, capsys):
    """What a user reads who asks for a GPU, in Python and on the command line."""
    for ask in (gpu, lambda: Tensor([1.0]).to("cuda"), lambda: select("cuda:0"), lambda: move(np.ones(2), "cuda")):
        with pytest.raises(DeviceError) as caught:
            ask()
        assert all(word in str(caught.value) for word in words), caught.value
    for command in (["train", "--device", "cuda"], ["sample", "nowhere", "--device", "cuda"], ["info", "--gpu"]):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("minitv: error: cuda: ") and error.count("\n") == 1
        assert all(word in error for word in words), error


def test_without_cupy(no_cupy, capsys):
    asked_for(["CuPy is not installed", 'pip install "minitv[cuda13]"', "minitv[cuda12]"], capsys)
    assert cli.main(["info"]) == 0
    assert 'not installed; for a GPU: pip install "minitv[cuda13]"' in capsys.readouterr().out


def test_without_a_card(double, monkeypatch, capsys):
    monkeypatch.setattr(fake_cupy.state, "devices", 0)
    asked_for(["CuPy finds no NVIDIA GPU (it counts 0)", "driver", "nvidia-smi"], capsys)

    def insufficient():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nfor this runtime")

    monkeypatch.setattr(double.cuda.runtime, "getDeviceCount", insufficient)
    asked_for(["CuPy finds no NVIDIA GPU (cudaErrorInsufficientDriver: CUDA driver version is insufficient)"], capsys)


def test_without_the_compiler_library(double, monkeypatch, capsys):
    def missing(*_):
        raise RuntimeError("Failure finding libnvrtc.so.")

    monkeypatch.setattr(double, "ones", missing)
    asked_for(["there is a GPU", "Failure finding libnvrtc.so", "NVRTC is missing", 'pip install "minitv[cuda13]"'], capsys)


def test_a_cupy_that_cannot_be_imported(no_cupy, monkeypatch, capsys, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: "found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=r"cannot be imported \(libcuda.so.1: cannot open shared object file\)"):
        gpu()


@pytest.mark.full
def test_info_runs_a_kernel_on_every_card(cupy, capsys):
    assert cli.main(["info", "--gpu"]) == 0
    out = capsys.readouterr().out
    assert "cuda:0" in out and "cuda:1" in out and out.count("equal to the CPU") == 2
    assert cli.main(["info"]) == 0
    assert "`minitv info --gpu` tries it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", ""])
def test_an_unknown_device_is_refused(name, capsys):
    with pytest.raises(DeviceError, match="is unknown, allowed: cpu, cuda, cuda:0"):
        select(name)
    assert cli.main(["train", "--device", name]) == 2
    assert "--device: " in capsys.readouterr().err


def test_a_card_that_does_not_exist(double):
    with pytest.raises(DeviceError, match="cuda:2 does not exist: this machine has 2 GPUs, counted from cuda:0"):
        Tensor([1.0]).to("cuda:2")


@each_place
def test_tensors_move(place):
    with PLACES[place]():
        x = Tensor([1.0, 2.0], requires_grad=True)
        assert x.device == "cpu" and x.to("cpu") is x and x.cpu() is x
        y = x.to("cuda")
        assert y.device == "cuda:0" and y.to("cuda") is y and y.to("cuda:0") is y and "device='cuda:0'" in repr(y)
        assert type(y.numpy()) is np.ndarray and y.numpy().tolist() == [1.0, 2.0] and y[1].item() == 2.0
        with pytest.raises(DtypeError, match="mixed"):
            y * x
        loss = (y * y).sum().cpu() * x[0]
        loss.backward()
        assert x.grad.device == "cpu" and x.grad.numpy().tolist() == [7.0, 4.0]
        leaf = Tensor(y.detach().data, requires_grad=True)
        (leaf * 2.0).sum().backward()
        assert leaf.grad.device == "cuda:0" and leaf.grad.numpy().tolist() == [2.0, 2.0]


@pytest.mark.full
def test_gradients_find_their_card(cupy):
    """A piece that nothing uses gets zeros where the others lie."""
    x = Tensor(np.ones(4), requires_grad=True)
    assert x.to("cuda:1").device == "cuda:1"
    select("cuda:1")
    first, _ = ag.split(x.to("cuda"), sizes=2)
    first.sum().cpu().backward()
    assert first.device == "cuda:1" and x.grad.numpy().tolist() == [1, 1, 0, 0]
    assert move(np.ones(2), "cuda").device.id == 1 and location(move(np.ones(2), "cuda")) == "cuda:1"


def test_modules_move(double):
    model = models.build("transformer", 5, np.float32, context=8, layers=1, width=8, heads=2)
    before, tied = model.state(), model.head.weight is model.embed.weight
    assert model.to("cuda") is model and tied and model.head.weight is model.embed.weight
    assert {p.device for p in model.parameters()} == {"cuda:0"}
    assert all(type(a) is np.ndarray and (a == before[name]).all() for name, a in model.state().items())
    model.load({name: a + 1 for name, a in before.items()})
    assert (model.to("cpu").embed.weight.numpy() == before["embed.weight"] + 1).all()


# -- range checks ------------------------------------------------------------------------------------------------------
BAD_INDICES = {
    "embedding": (lambda x, i: ag.embedding(x, i), DomainError, "embedding: id 7 is outside 0 .. 3"),
    "cross_entropy": (lambda x, i: ag.cross_entropy(x, i), DomainError, "cross_entropy: label 7 is outside 0 .. 3"),
    "cross_entropy, some ignored": (lambda x, i: ag.cross_entropy(x, i, ignore_index=1), DomainError, "ignore_index = 1"),
    "gather": (lambda x, i: ag.gather(x, i), ShapeError, "gather: index 7 is out of range for an axis of size 4"),
    "take_along_axis": (lambda x, i: ag.take_along_axis(x, i[:, None]), ShapeError, "take_along_axis: index 7"),
    "scatter_add": (lambda x, i: ag.scatter_add(x, i, x), ShapeError, "scatter_add: index 7"),
    "getitem": (lambda x, i: x[i], ShapeError, "getitem: index 7 is out of range for an axis of size 4"),
    "getitem, second axis": (lambda x, i: x[:, i], ShapeError, "getitem: index 7"),
    "getitem, behind dots": (lambda x, i: x[..., i], ShapeError, "getitem: index 7"),
}


@each_place
@pytest.mark.parametrize(("call", "error", "words"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_an_index_out_of_range_is_reported_at_the_next_read(call, error, words, place):
    ids = np.array([0, 1, 7, 2])
    with PLACES[place]() as put, use(kernel="none"):
        gpu()  # has tried the card, which reads
        x = Tensor.wrap(put(np.ones((4, 4), np.float32)))
        for good in (np.array([0, 1, 3, 2]), ids):
            before = fake_cupy.state.reads
            y = call(x, put(good))
            assert fake_cupy.state.reads == before, "a check that waits"
            if good is not ids:
                y.numpy()
        with pytest.raises(error, match=words):
            y.numpy()
        assert y.numpy().size  # reported once
        call(x, put(ids))
        with pytest.raises(error, match=words):
            x.sum().item()


def test_checks_come_with_the_read_and_are_collected(double):
    def fail(value):
        raise DomainError(str(value))

    ids = double.asarray(np.array([1, 2, 3]))
    check_range(ids, 0, 3, fail)
    check_range(ids, 1, 3, fail)
    assert fake_cupy.state.reads == 0
    assert read(double.ones(()), np.float32(3), double.ones((1, 1))) == [1, 3, 1] and fake_cupy.state.reads == 1
    check_range(ids, 0, 3, fail)
    check_range(ids, 2, 3, fail)
    with pytest.raises(DomainError, match="1"):
        read()
    assert read() == [] and fake_cupy.state.reads == 2
    for _ in range(1000):
        check_range(ids, 0, 3, fail)
    assert fake_cupy.state.reads == 3  # not without end


# -- matrix products ---------------------------------------------------------------------------------------------------
LAYOUTS_OF_STACKS = {
    "rows": lambda a: a, "columns": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "heads": lambda a: np.ascontiguousarray(np.moveaxis(a, -2, 0)).transpose(*range(1, a.ndim - 1), 0, a.ndim - 1),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2], "repeated": lambda a: np.broadcast_to(a[..., :1, :1, :], a.shape),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shapes", [((3, 4, 5), (3, 5, 2)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((2, 1, 4, 5), (1, 3, 5, 6)),
                                    ((4, 5), (3, 5, 2)), ((3, 4, 5), (5, 2)), ((2, 1, 5), (2, 5, 1)), ((2, 4, 1), (2, 1, 3)),
                                    ((0, 4, 5), (0, 5, 2)), ((2, 4, 0), (2, 0, 3)), ((5,), (3, 5, 2)), ((4, 5), (5, 3))],
                         ids=str)
def test_products_of_stacks(shapes, dtype, double):
    rng = np.random.default_rng(0)
    for left in LAYOUTS_OF_STACKS.values():
        for right in LAYOUTS_OF_STACKS.values():
            a, b = (rng.standard_normal(s).astype(dtype) for s in shapes)
            a, b = (f(x) if x.ndim > 2 and x.size else x for f, x in ((left, a), (right, b)))
            found = blas.matmul(fake_cupy.wrapped(a), fake_cupy.wrapped(b))
            assert found.dtype == dtype
            np.testing.assert_allclose(found.get(), np.matmul(a, b), rtol=1e-5)


def test_transposed_operands_are_not_copied(double, monkeypatch):
    q = double.ones((2, 3, 4, 5), np.float32)
    monkeypatch.setattr(double, "ascontiguousarray", None)
    blas.matmul(q, q.transpose(0, 1, 3, 2))
    blas.matmul(q.transpose(0, 1, 3, 2), q)
    blas.matmul(q[:1], q.transpose(0, 1, 3, 2)[1:])


def test_products_of_linear_are_rounded_as_the_switch_says(double, monkeypatch):
    """Forward and both gradients, also where backward runs outside; no other product, and never float64."""
    from cupy_backends.cuda.libs import cublas

    seen, right = [], cublas.gemmStridedBatchedEx

    def product(*arguments):
        seen.append(arguments[-2])
        right(*arguments)

    monkeypatch.setattr(cublas, "gemmStridedBatchedEx", product)
    x, weight = (Tensor(double.ones(shape, np.float32), requires_grad=True) for shape in ((2, 3, 4), (5, 4)))
    for kind, expected in (("float32", []), ("tf32", 3 * [cublas.CUBLAS_COMPUTE_32F_FAST_TF32]),
                           ("bf16", 3 * [cublas.CUBLAS_COMPUTE_32F_FAST_16BF])):
        with products(kind):
            y = linear(x, weight)
        gradients(y.sum(), [x, weight])
        assert seen == expected
        assert y.numpy().tolist() == np.full((2, 3, 5), 4).tolist()
        seen.clear()
    with products("bf16"):
        blas.matmul(x.data, x.data.transpose(0, 2, 1))
        assert seen == [cublas.CUBLAS_COMPUTE_32F]
        with pytest.raises(DtypeError, match=r"'bf16'\): the arrays are float64, allowed: float32"):
            blas.matmul(x.data.astype(np.float64), x.data.astype(np.float64), "bf16")
    monkeypatch.setattr(blas, "_cublas", lambda: None)
    with products("bf16"), pytest.raises(KernelError, match="does not bind gemmStridedBatchedEx"):
        linear(x, weight)


# -- optimizer and training --------------------------------------------------------------------------------------------
class Losses(Ids):
    """Without counting right answers: the double of CuPy has no argmax."""

    key = "loss"


MODEL = dict(context=24, layers=2, width=48, dropout=0.2, bias=True)
RUN = configure("transformer", **MODEL, heads=3, batch=4, steps=100, warmup=2, lr=1e-3, threads=1)


def batches(count):
    rng = np.random.default_rng(0)
    windows = [(np.cumsum(rng.integers(1, 4, (4, 25)), axis=1)) % 31 for _ in range(count)]
    return [Batch(w[:, :-1], w[:, 1:]) for w in windows]


def losses(experiment: Experiment, steps):
    """Losses and norms of the first steps, and how often the host read in each; the scores on other text; the trainer."""
    trainer, found = Trainer(experiment, Losses(31)), []
    try:
        for i, batch in enumerate(batches(steps)):
            before = fake_cupy.state.reads
            found.append((trainer.step(batch, i), trainer.grad_norm, fake_cupy.state.reads - before))
        return np.array(found).T, trainer.evaluate(batches(steps + 1)[-1]), trainer
    finally:
        trainer.close()


@each_place
def test_losses_on_a_gpu_follow_those_on_the_cpu(place):
    """The same weights, batches and dropout: the first losses agree to rounding, and the host reads once a step."""
    steps, run = 100, RUN.replace(micro_batch=RUN.run.batch)
    (expected, norms, _), expected_held_out, _ = losses(run, steps)
    with PLACES[place]():
        fake_cupy.state.mode = "fast"
        (found, found_norms, reads), held_out, trainer = losses(run.replace(device="cuda"), steps)
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        np.testing.assert_allclose(found_norms, norms, rtol=1e-3)
        assert place == "card" or (reads == 1).all()
        assert trainer.workers == 1 and type(trainer.optimizer.param) is not np.ndarray
        assert held_out == pytest.approx(expected_held_out, rel=1e-4)


@pytest.mark.full
def test_micro_batches_on_a_gpu_add_up(cupy, monkeypatch):
    fake_cupy.state.mode = "fast"
    experiment = RUN.replace(dropout=0.0, device="cuda")
    (whole, norms, _), *_ = losses(experiment, 2)
    monkeypatch.setattr(Trainer, "MICRO_BATCH_TOKENS_GPU", 24)
    (parts, found, reads), *_ = losses(experiment, 2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(found, norms, rtol=1e-4)
    assert (reads == 1).all()


@pytest.mark.full
def test_what_is_not_finite_changes_nothing_on_a_gpu(cupy):
    fake_cupy.state.mode = "fast"
    trainer = Trainer(RUN.replace(device="cuda"), Losses(31))
    good = trainer.model.state()
    trainer.model.embed.weight.data[3, 0] = math.nan
    before = trainer.optimizer.param.get()
    assert not math.isfinite(trainer.step(batches(1)[0], 0)) and math.isnan(trainer.grad_norm)
    assert trainer.optimizer.steps == 0
    np.testing.assert_array_equal(trainer.optimizer.param.get(), before)
    assert "embedding" in trainer.find_nonfinite(batches(1)[0], 0)
    trainer.model.load(good)
    assert math.isfinite(trainer.step(batches(1)[0], 0)) and trainer.optimizer.steps == 1
    trainer.close()


@pytest.mark.parametrize("variant", models.NAMES)
@pytest.mark.full
def test_every_variant_on_a_gpu_is_that_of_the_cpu(variant, cupy):
    """Loss and gradients with dropout; logits token by token."""
    fake_cupy.state.mode = "fast"
    inputs, labels = batches(1)[0]

    def run(move_to):
        model = models.build(variant, 31, np.float32, **MODEL).to(move_to)
        loss = mean_loss(model, inputs, labels, Random(1))
        loss.backward()
        logits, state = model.prefill(inputs[:, :3], model.init_state(len(inputs)))
        for t in range(3, 6):
            logits, state = model.prefill(inputs[:, t : t + 1], state)
        slopes = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        return loss.numpy(), logits.numpy(), slopes

    (loss, logits, gradients), (found, found_logits, found_gradients) = run("cpu"), run("cuda")
    assert_close(found, loss, terms=1000)
    assert_close(found_logits, logits, terms=1000)
    assert gradients.keys() == found_gradients.keys()
    for name in gradients:
        assert_close(found_gradients[name], gradients[name], name, terms=1000)


@each_place
def test_adamw_on_a_gpu_is_that_of_the_cpu(place):
    def run(move_to):
        model = RUN.replace(width=12).build(31).to(move_to)
        optimizer, rng = AdamW(model, clip=0.5, buffers=2), np.random.default_rng(0)
        norms = []
        for _ in range(3):
            for buffer in optimizer.buffers:
                for p in model.parameters():
                    buffer(p, Tensor(rng.standard_normal(p.shape).astype(np.float32)).to(move_to))
            norms.append(optimizer.step(0.01))
        return norms, optimizer.state(), model.state()

    expected = run("cpu")
    with PLACES[place]():
        found = run("cuda")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(np.asarray(ours[name], np.float32), np.asarray(theirs[name], np.float32), name)


TINY = ["--context", "16", "--layers", "1", "--width", "16", "--heads", "2", "--batch", "4", "--eval-every", "3",
        "--eval-tokens", "64", "--sample-tokens", "5", "--dropout", "0.1"]


@pytest.mark.parametrize("route", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")], ids=" then ".join)
@pytest.mark.full
def test_a_run_moves_between_devices(route, cupy, tmp_path, capsys):
    fake_cupy.state.mode = "fast"
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    data, out = ["--data", str(tmp_path / "text.txt")], ["--out", str(tmp_path / "run")]
    first, second = route
    assert cli.main(["train", *data, *out, *TINY, "--steps", "3", "--device", first]) == 0
    saved = checkpoint.load(tmp_path / "run")
    assert saved.state["device"] == first
    assert all(type(a) is np.ndarray for a in [*saved.model.values(), *saved.optimizer.values()])
    assert cli.main(["train", "--resume", str(tmp_path / "run"), *data, "--steps", "6", "--device", second]) == 0
    error = capsys.readouterr().err
    assert ("this run was on" in error) == (first != second)
    one = tmp_path / "one"
    assert cli.main(["train", *data, "--out", str(one), *TINY, "--steps", "6", "--device", "cpu", "--threads", "1"]) == 0
    ends = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in (tmp_path / "run", one)]
    assert ends[0]["step"] == ends[1]["step"] == 6
    assert ends[0]["val_loss"] == pytest.approx(ends[1]["val_loss"], rel=0.02)  # the schedule was stretched
    texts = []
    for where in ("cpu", "cuda"):
        capsys.readouterr()
        assert cli.main(["sample", str(tmp_path / "run"), "--tokens", "30", "--prompt", "the", "--device", where]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the")


def test_tf32_concerns_a_gpu(capsys):
    assert cli.main(["train", "--matmul", "tf32"]) == 2
    assert "--matmul tf32: this concerns a GPU, and --device is cpu, allowed: float32, bf16" in capsys.readouterr().err


# -- the double --------------------------------------------------------------------------------------------------------
def test_the_double_refuses_what_cupy_refuses(double):
    x, host = double.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    refused = [lambda: x + host, lambda: host + x, lambda: np.exp(x), lambda: np.sum(x), lambda: np.asarray(x),
               lambda: double.max(x, initial=0), lambda: double.exp(host), lambda: double.where(host > 0, x, x),
               lambda: x[[0, 1]], lambda: double.concatenate([x, host]), lambda: x.__setitem__(0, host[0]),
               lambda: double.sum(x, where=x > 0), lambda: x.sum(initial=1), lambda: x @ host.T]
    for number, call in enumerate(refused):
        try:
            call()
        except TypeError:
            continue
        pytest.fail(f"call {number} went through")
    with pytest.raises(AttributeError):
        double.ogrid  # noqa: B018 - CuPy has it, the library does not use it
    with double.cuda.Device(1):
        other = double.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="devices"):
        x + other


def test_the_double_is_as_odd_as_cupy(double):
    x = double.asarray(np.arange(4.0))
    assert type(x.sum()) is fake_cupy.ndarray and x.sum().shape == () and type(x[1]) is fake_cupy.ndarray
    assert x[double.asarray(np.array([5, -1]))].get().tolist() == [1, 3]  # round and round
    assert np.isnan(double.empty(3).get()).all()
    assert (np.float32(2) * double.ones(2, np.float32)).dtype == np.float32
    assert double.asarray(x) is x and double.array(x) is not x


def test_the_double_has_the_signatures_of_cupy():
    """Compared with the CuPy that is installed, which needs no card."""
    real = pytest.importorskip("cupy")
    for name, signature in fake_cupy.SIGNATURES.items():
        function = getattr(real, name)
        known = inspect.signature(function).parameters
        used = [part.split("=")[0].strip(" *") for part in signature.split(",")]
        assert list(known)[: 1] == used[:1] or "kwargs" in known, name
        assert set(used) - {"kwargs"} <= set(known), f"{name}: CuPy has {list(known)}"
    for name in fake_cupy.UFUNCS:
        assert hasattr(real, name), name
    for name in fake_cupy.METHODS:
        assert hasattr(real.ndarray, name), name
    assert {"runtime", "Device", "device"} <= set(dir(real.cuda)) and hasattr(real, "RawModule")


@pytest.mark.full
def test_a_second_derivative_on_a_gpu_goes_through_forms(cupy):
    x = Tensor(cupy.asarray(np.linspace(-1, 1, 5, dtype=np.float32)), requires_grad=True)
    with pytest.raises(GraphError, match="the fused cuda kernel has no second derivative"):
        ag.grad(ag.grad(lambda t: ag.gelu(t).sum()))(x)


# -- the one command for a machine with a card -------------------------------------------------------------------------
@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.full
def test_the_benchmark_compares_losses(benchmark, cupy):
    fake_cupy.state.mode = "fast"
    found = benchmark.losses(argparse.Namespace(device="cuda"), RUN.replace(width=12), 3)
    assert found["passed"] and max(found["largest_differences"]) < 1e-5 and len(found["last"]) == 2


def test_the_benchmark_says_what_is_missing(benchmark, no_cupy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert benchmark.main() == 1
    assert "CuPy is not installed" in capsys.readouterr().err
    assert list(benchmark.PARTS) == ["tests", "sanitizer", "losses", "small", "nanogpt", "speed"]
    assert not benchmark.nanogpt(argparse.Namespace(data=None))["passed"]
