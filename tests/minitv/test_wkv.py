"""wkv beyond what the registry draws: wide rows, long sequences, memories that hardly fade, gradients from call to call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import types

from autograd import Tensor, assert_close, gradients, use
from autograd.errors import ShapeError
from autograd.verify import DTYPES, check_gradients, check_values, compute, differentiate
from minitv.ops import bidirectional_wkv, wkv
from minitv.ops.wkv import cpu
from tests.autograd.test_kernel_math import ARITHMETIC, FLOOR, ROW, assembly, libm_calls, reads_assembly
from tests.conftest import examples

NAMES = "kvwuabp"


def inputs(seed, batch, length, width, dtype, carried=True):
    """Keys up to ±100, decays from 1e-6 to 20 a step, now and then a reset."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((batch, length, width)) for _ in range(2))
    w = -(10.0 ** rng.uniform(-6, 1.3, width))
    state = rng.standard_normal((batch, width)), rng.uniform(1, 3, (batch, width)), rng.uniform(0, 20, (batch, width))
    floats = [x.astype(dtype) for x in (np.clip(30 * k, -100, 100), v, w, rng.standard_normal(width), *state)]
    return (*floats[:4], *(floats[4:] if carried else (None,) * 3), rng.random((batch, length)) < 0.02)


def compare(route, args, params, seed=0):
    """Values and gradients are those of the chunkwise form in float64."""
    wide = tuple(x if x is None or x.dtype == bool else x.astype(np.float64) for x in args)
    terms = args[0].size
    expected = compute(wkv, "form chunkwise", wide, {"chunk_size": 64})
    for name, one, other in zip("yabp", compute(wkv, route, args, params), expected, strict=True):
        assert_close(one, other, f"{route}, {name}", terms=terms)
    cotangents = [np.random.default_rng(seed).standard_normal(o.shape) for o in expected]
    reference = differentiate(wkv, "form chunkwise", wide, {"chunk_size": 64}, cotangents)
    for i, gradient in differentiate(wkv, route, args, params, cotangents).items():
        assert_close(gradient, reference[i], f"{route}, gradient of {NAMES[i]}", terms=terms)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@examples(25)
@given(st.integers(0, 2**16), st.sampled_from((1, 15, 16, 17, 255, 256, 257, 300)), st.sampled_from((1, 31, 32, 33, 70)),
       st.sampled_from((1, 7, 32, 100)), st.booleans())
def test_the_kernel_with_several_blocks_of_channels(dtype, seed, width, length, chunk_size, carried):
    compare("kernel cpu", inputs(seed, 2, length, width, dtype, carried), {"chunk_size": chunk_size}, seed)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), [(1, 129), (70, 17), (33, 300)])
def test_the_kernel_of_both_directions_with_several_blocks_of_channels(length, width, dtype):
    args = inputs(length, 2, length, width, dtype, carried=False)[:4]
    check_values(bidirectional_wkv, "kernel cpu", args, {}, reference="form parallel")
    cotangents = [np.random.default_rng(0).standard_normal(args[0].shape)]
    check_gradients(bidirectional_wkv, "kernel cpu", args, {}, cotangents, reference="form parallel")


@pytest.mark.parametrize("route", [pytest.param("form recurrent", marks=pytest.mark.full), "form chunkwise", "kernel cpu"])
def test_4096_positions_in_float32(route):
    compare(route, inputs(0, 1, 4096, 8, np.float32), {"chunk_size": 100})


def test_a_memory_that_hardly_fades_is_exact_in_float32():
    """A decay of 1e-6 a step is less than half an ulp of a key of 100, yet 50,000 of them count."""
    length = 50_000
    k, v = np.full((1, length, 1), 90, np.float32), np.zeros((1, length, 1), np.float32)
    k[:, 0], v[:, 0] = 100, 1
    w, u = np.full(1, -1e-6, np.float32), np.zeros(1, np.float32)
    y, *_ = compute(wkv, "kernel cpu", (k, v, w, u, *[None] * 4), {})
    age = np.arange(length - 2, -1, -1, dtype=np.float64)  # of each token at the last position; the last but one has age 0
    first = np.exp(10 + age[0] * w.astype(np.float64))
    assert_close(y[0, -1], first / (first + np.exp(age[1:] * w.astype(np.float64)).sum() + 1), terms=64)


@pytest.mark.parametrize("route", [{"form": "recurrent"}, {"form": "chunkwise"}, {"kernel": "cpu"}], ids=str)
def test_gradients_pass_from_call_to_call(route):
    """Through the state: those of three calls are those of one. RWKV's own kernels cut them off."""
    k, v, w, u, *state, _ = inputs(3, 2, 12, 5, np.float64)
    cotangent = np.random.default_rng(1).standard_normal(k.shape)

    def slopes(cuts):
        tensors = [Tensor(x, requires_grad=True) for x in (k / 10, v, w, u, *state)]
        carried, ys = tensors[4:], []
        with use("wkv", **route):
            for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
                y, *carried = wkv(*(x[:, start:stop] for x in tensors[:2]), *tensors[2:4], *carried)
                ys.append(y)
        seeds = [Tensor(cotangent[:, start:stop]) for start, stop in zip([0, *cuts], [*cuts, 12], strict=True)]
        return [g.numpy() for g in gradients(ys, tensors, seeds)]

    for name, whole, parts in zip(NAMES, slopes([]), slopes([4, 5]), strict=True):
        assert_close(parts, whole, f"gradient of {name}", terms=64)


def test_no_gradient_of_the_future_passes_a_reset():
    args = inputs(0, 1, 9, 4, np.float64)
    reset = np.arange(9)[None] == 5
    for route in ("form recurrent", "form chunkwise", "kernel cpu"):
        outputs = compute(wkv, route, (*args[:7], reset), {"chunk_size": 4})
        cotangents = [np.ones_like(o) for o in outputs]
        cotangents[0][:, :5] = 0
        found = differentiate(wkv, route, (*args[:7], reset), {"chunk_size": 4}, cotangents)
        assert not found[0][:, :5].any() and not found[1][:, :5].any() and found[1][:, 5:].all()
        assert not any(found[i].any() for i in (4, 5, 6))


@pytest.mark.parametrize(("change", "error", "sentence"), [
    ({"a": np.ones((1, 3))}, ShapeError, "wkv: a, b and p are one state, give all or none; missing: b, p"),
])
def test_wrong_arguments(change, error, sentence):
    x = np.ones((1, 2, 3))
    with pytest.raises(error) as caught:
        wkv(x, x, -np.ones(3), np.ones(3), **change)
    assert str(caught.value) == sentence


# -- machine code ------------------------------------------------------------------------------------------------------
CUBE, MATRIX = (ROW.copy(ndim=ndim) for ndim in (3, 2))
RESETS = types.Array(types.boolean, 2, "C")
INPUTS, CHANNELS = (CUBE, CUBE, ROW, ROW), types.UniTuple(types.int64, 2)
LOOPS = {  # the types of arguments, and how many packed operations and exponentials there are at least
    cpu._forward: ((*INPUTS, RESETS, "int64", CUBE, CUBE, ROW.copy(ndim=4), MATRIX, CHANNELS), 20, 2),
    cpu._backward: ((*INPUTS, RESETS, "int64", CUBE, CUBE, ROW.copy(ndim=4), MATRIX, CUBE, CUBE, *INPUTS, CHANNELS), 35, 2),
    cpu._bidirectional_forward: ((*INPUTS, CUBE, CHANNELS), 40, 5),
    cpu._bidirectional_backward: ((*INPUTS, CUBE, CUBE, *INPUTS, CHANNELS), 70, 5),
}


@pytest.mark.full
@reads_assembly
@pytest.mark.parametrize("kernel", LOOPS, ids=lambda kernel: kernel.__name__)
def test_inner_loops_are_packed(kernel):
    arguments, operations, exponentials = LOOPS[kernel]
    code = assembly(kernel.py_func, arguments)
    assert ARITHMETIC.findall(code).count("s") >= operations
    assert FLOOR.findall(code).count("s") >= exponentials and not libm_calls(code)
    assert "gather" not in code and "scatter" not in code
