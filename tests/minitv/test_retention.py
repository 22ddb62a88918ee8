"""retention and rope beyond what the registry draws: sizes of several panels, long sequences, decays that run out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import Tensor, assert_close, gradients, layer_norm, rms_norm, use
from autograd.cpu import panels
from autograd.draw import Draw
from autograd.errors import DomainError, ShapeError
from autograd.verify import DTYPES, check_gradients, check_values, compute, differentiate, draw_cotangents
from minitv.ops import retention, rope
from minitv.ops.retention import NORMALIZATIONS, cpu
from minitv.ops.rope import cpu as rope_cpu
from minitv.ops.rope import rope_angles
from tests.autograd.test_kernel_math import ARITHMETIC, ROW, assembly, reads_assembly
from tests.conftest import examples

SIZES = (1, 8, 31, 32, 33, 64, 70)  # around the edges of panels


def large(data, dtype):
    """Inputs with several panels of everything, and chunks of any size."""
    seed, length = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from((1, 31, 32, 33, 63, 64, 65, 100, 130)))
    width, out = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from(SIZES))
    draw = Draw.seeded(seed, dtype)
    decay = np.exp(-(10.0 ** draw.generator().uniform(-6, 1.3, 2))).astype(dtype)
    carried = draw.floats(1, 2, width, out), draw.floats(1, 2, width), draw.floats(1, 2, low=0.0, high=9.0)
    carried = carried if data.draw(st.booleans()) else (None, None, None)
    q, k, v = (draw.floats(1, 2, length, n) for n in (width, width, out))
    params = {"normalization": data.draw(st.sampled_from(NORMALIZATIONS)),
              "chunk_size": data.draw(st.sampled_from((1, 7, 32, 40, 64, 1000)))}
    return draw, (q, k / k.dtype.type(np.sqrt(width)), v, decay, *carried), params


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@examples(25)
@given(data=st.data())
def test_the_kernel_with_several_panels(dtype, data):
    draw, args, params = large(data, dtype)
    check_values(retention, "kernel cpu", args, params)
    check_gradients(retention, "kernel cpu", args, params, draw_cotangents(retention, args, params, draw))


@pytest.mark.full
@pytest.mark.parametrize(("route", "normalization"), [("form parallel", "paper"), *(
    (route, kind) for route in ("form chunkwise", "kernel cpu") for kind in NORMALIZATIONS)])
def test_4096_positions_in_float32(route, normalization):
    """Keys up to ±100, decays from 1e-6 to 20 a step, a chunk that does not divide the length."""
    rng, length, width = np.random.default_rng(0), 4096, 8
    rates = np.array([1e-6, 1.0] if route == "form parallel" else [1e-6, 1e-2, 0.3, 20])  # 16.8 million weights a head
    q, k, v = (rng.standard_normal((1, len(rates), length, width)).astype(np.float32) for _ in range(3))
    k = np.clip(30 * k, -100, 100)
    decay = np.exp(-rates).astype(np.float32)
    args, params = (q, k, v, decay, None, None, None), {"normalization": normalization, "chunk_size": 100}
    check_values(retention, route, args, params)
    cotangents = [rng.standard_normal(o.shape) for o in compute(retention, "form chunkwise", args, params)]
    wide = tuple(x if x is None else x.astype(np.float64) for x in args)
    expected = differentiate(retention, "form chunkwise", wide, params, cotangents)
    found = differentiate(retention, route, args, params, cotangents)
    for i, gradient in found.items():
        assert_close(gradient, expected[i], f"gradient {i}", terms=length * width)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("route", ["parallel", "cpu"])
def test_a_norm_without_eps_undoes_every_divisor(norm, route):
    """Values and gradients: differentiating the divisor, or taking it as a constant, is then the same."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, 9, 5)) for _ in range(4)]
    decay, outputs = np.array([0.99, 0.9, 0.5]), []
    for normalization in NORMALIZATIONS:
        inputs = [Tensor(x, requires_grad=True) for x in arrays[:3]]
        with use("retention", **{"kernel" if route == "cpu" else "form": route}):
            y = norm(retention(*inputs, decay, normalization=normalization)[0], eps=0.0)
        outputs.append([y.numpy(), *(g.numpy() for g in gradients([y], inputs, [Tensor(arrays[3])]))])
    for other in outputs[1:]:
        for found, expected in zip(other, outputs[0], strict=True):
            assert_close(found, expected, terms=2**12)


def test_a_memory_that_runs_out_leaves_no_subnormal_numbers():
    """After many positions of zeros, and in the powers of decays, small numbers are exactly 0."""
    length, dtype = 3000, np.float32
    q, k, v = (np.ones((1, 3, length, 4), dtype) for _ in range(3))
    k[:, :, 10:] = 0
    y, state, z, _ = compute(retention, "kernel cpu", (q, k, v, np.array([0.9, 0.5, 1e-4], dtype), None, None, None), {})
    for array in (y, state, z):
        assert ((array == 0) | (np.abs(array) >= np.finfo(dtype).tiny)).all()
    assert not state.any() and y[:, :, :10].all()


def test_saved_states_are_those_of_earlier_calls():
    """What forward keeps for backward: the state before each chunk and after the last."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 10, 3)) for _ in range(3))
    decay = np.array([0.8])
    _, (given, _) = cpu.forward(q, k, v, decay, None, None, None, normalization="none", chunk_size=4)
    states, zs = given[-2:]
    assert states.shape == (1, 4, 32 * 32)
    for i, length in enumerate((0, 4, 8, 10)):
        part = slice(0, length)
        _, state, z, _ = compute(retention, "definition", (q[:, :, part], k[:, :, part], v[:, :, part], decay), {})
        assert_close(states[0, i].reshape(32, 32)[:3, :3], state[0, 0])
        assert_close(zs[0, i, :3], z[0, 0])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"normalization": "papre"}, "retention: normalization is 'papre', allowed: none, decay, paper"),
])
def test_wrong_parameters_of_retention(change, sentence):
    x = np.ones((1, 1, 2, 2))
    with pytest.raises(DomainError) as caught:
        retention(x, x, x, np.ones(1), **change)
    assert str(caught.value) == sentence


# -- rope --------------------------------------------------------------------------------------------------------------
def test_the_angles_of_published_models():
    assert rope_angles(8) == pytest.approx((1, 0.1, 0.01, 0.001))
    assert rope_angles(8, closed=True) == pytest.approx((1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4))
    assert rope_angles(4, base=100.0) == pytest.approx((1, 0.1))
    assert rope_angles(2) == rope_angles(2, closed=True) == (1,) and rope_angles(0) == ()
    with pytest.raises(ShapeError, match="rope_angles: the width must be even, got 5"):
        rope_angles(5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["form composed", "kernel cpu"])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("width", [2, 31, 64, 70])
def test_rope_of_wide_heads_far_away(dtype, route, pairing, width):
    draw = Draw.seeded(0, dtype)
    params = {"angles": rope_angles(width // 2 * 2), "pairing": pairing, "scale": 0.7, "start": 10**7}
    args = draw.floats(2, 3, 5, width), None
    check_values(rope, route, args, params)
    check_gradients(rope, route, args, params, draw_cotangents(rope, args, params, draw))


@pytest.mark.parametrize(("change", "sentence"), [
    ({"pairing": "halves"}, "rope: pairing is 'halves', allowed: interleaved, half"),
    ({"angles": (1.0, 2.0)}, "rope: angles must be a tuple of at most 1 numbers, one for each pair of 3 channels, got 2"),
    ({"angles": [1.0]}, "rope: angles must be a tuple of at most 1 numbers, one for each pair of 3 channels, got [1.0]"),
    ({"start": 0.5}, "rope: start must be an integer, got 0.5"),
])
def test_wrong_parameters_of_rope(change, sentence):
    with pytest.raises(DomainError) as caught:
        rope(np.ones((1, 1, 2, 3)), **change)
    assert str(caught.value) == sentence


# -- machine code ------------------------------------------------------------------------------------------------------
NUMBER, INDEX = ROW.dtype, "int64"
LOOPS = {  # kernels that other kernels call, the types of their arguments, and how many packed operations a loop has at least
    cpu._decay_scores: ((ROW, ROW), 1),
    cpu._decay_both: ((ROW, ROW, INDEX, INDEX, ROW, ROW, ROW, ROW, "boolean"), 5),
    panels.scale_rows: ((ROW, INDEX, INDEX, INDEX, ROW), 4),
    cpu._fade: ((ROW, ROW, NUMBER, "float64"), 1),
    panels.dot: ((ROW, ROW), 1),
    panels.dot_rows: ((ROW, ROW, ROW, INDEX, INDEX, INDEX), 1),
    cpu._row_scores: ((ROW, ROW, INDEX, ROW, ROW, ROW, ROW), 1),
    panels.add_rows: ((ROW, ROW, INDEX, ROW), 4),
    cpu._add_carried: ((ROW, ROW, INDEX, INDEX, ROW, ROW, ROW, INDEX), 3),
    cpu._begun: ((ROW, ROW, ROW, ROW, ROW, ROW, ROW), 4),
    rope_cpu._interleaved: ((ROW, ROW, ROW, ROW, NUMBER, NUMBER), 4),
    rope_cpu._half: ((ROW, ROW, ROW, ROW, NUMBER, NUMBER), 4),
}


@pytest.mark.full
@reads_assembly
@pytest.mark.parametrize("kernel", LOOPS, ids=lambda kernel: kernel.__name__)
def test_inner_loops_are_packed(kernel):
    types, least = LOOPS[kernel]
    assert ARITHMETIC.findall(assembly(kernel.py_func, types)).count("s") >= least
