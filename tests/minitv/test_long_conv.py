"""long_conv beyond what the registry draws: transforms, sizes at which they are used, rounding, blocks; and Hyena's mixer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import next_fast_len

from autograd import Tensor, assert_close, causal_conv1d, concat, explain, no_grad
from autograd.cpu.fft import Plan, forward, inverse
from autograd.cpu.vectors import BYTES
from autograd.draw import Draw
from autograd.errors import ShapeError
from autograd.ops.causal_conv1d.cpu import _add_products
from autograd.random import Random
from autograd.verify import DTYPES, check_gradients, check_values, compute, differentiate
from minitv.ops import long_conv
from minitv.ops.long_conv import cpu, online
from minitv.options import ModelOptions
from minitv.variants import hyena
from tests.autograd.operator_checks import marks
from tests.autograd.test_kernel_math import ARITHMETIC, ROW, assembly, reads_assembly
from tests.conftest import examples

SMOOTH = [n for n in range(2, 130) if next_fast_len(n, real=True) == n]  # products of 2, 3 and 5


# -- transforms --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SMOOTH, 1000, 6750, 8192])
def test_transforms_are_those_of_numpy(n, dtype):
    lanes = BYTES // np.dtype(dtype).itemsize
    x = np.random.default_rng(n).standard_normal((n, 2, lanes)).astype(dtype)
    work, plan = x.copy(), Plan(n, dtype)
    forward(work.reshape(-1), plan.arguments)
    expected = np.fft.fft(x[:, 0].astype(np.float64) + 1j * x[:, 1], axis=0)
    found = work[plan.places]
    assert_close(found[:, 0], expected.real, terms=16 * n)
    assert_close(found[:, 1], expected.imag, terms=16 * n)
    inverse(work.reshape(-1), plan.arguments)
    assert_close(work, n * x.astype(np.float64), terms=16 * n)


@pytest.mark.parametrize("n", [-4, 0, 1, 7, 22, 8191])
def test_other_sizes_are_refused(n):
    with pytest.raises(ValueError, match=f"Plan: {n} is not a product of 2, 3 and 5"):
        Plan(n, np.float32)


# -- kernels -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("route", "dtype"), [
    pytest.param(route, dtype, marks=marks(route)) for way in ("direct", "fft") for route, dtype in (
        *((f"kernel cpu {way}", dtype) for dtype in DTYPES), (f"kernel cuda {way} on emulator", np.float32))])
@examples(12)
@given(data=st.data())
def test_both_ways_of_a_kernel_at_every_width(route, dtype, data):
    """Around the width of vectors and warps, with pairs of them; filters shorter and longer than the sequence."""
    draw = Draw.seeded(data.draw(st.integers(0, 2**16)), dtype)
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2, 7, 8, 9, 31, 65)))
    width = data.draw(st.sampled_from((1, 8, 15, 16, 17, 32, 33, 49)))
    taps = data.draw(st.sampled_from((1, 2, length, length + 3)))
    optional = [data.draw(st.booleans()) for _ in range(3)]
    args = (draw.floats(batch, length, width), draw.floats(taps, width), draw.floats(width) if optional[0] else None,
            draw.floats(data.draw(st.sampled_from((1, 5, length, length + 2))), width) if optional[1] else None,
            draw.floats(batch, data.draw(st.integers(0, 6)), width) if optional[2] else None)
    check_values(long_conv, route, args, {}, reference="form direct")
    cotangents = [draw.floats(*o.shape) for o in compute(long_conv, "form direct", args, {})]
    check_gradients(long_conv, route, args, {}, cotangents, reference="form direct")


@pytest.mark.parametrize("shape", [(3, 300, 33, 9), (1, 1100, 5, 3), (70, 9, 40, 17)], ids=str)
@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_causal_conv1d_with_many_blocks(shape, place):
    batch, length, channels, width = shape
    draw = Draw.seeded(0, np.float32)
    args = draw.floats(batch, length, channels), draw.floats(channels, width), draw.floats(channels)
    check_values(causal_conv1d, f"kernel cuda on {place}", args, {}, reference="form composed")
    cotangents = [draw.floats(batch, length, channels)]
    check_gradients(causal_conv1d, f"kernel cuda on {place}", args, {}, cotangents, reference="form composed")


def test_long_sequences_are_transformed():
    def chosen(length, taps):
        lines = explain(long_conv, np.zeros((1, length, 1)), np.zeros((taps, 1))).splitlines()
        return next(line for line in lines if ": chosen" in line).split()[2].rstrip(":")

    lengths = cpu.DIRECT, 2 * cpu.DIRECT - 1, 2 * cpu.DIRECT + 1, 4096
    assert [chosen(n, n) for n in lengths] == ["direct", "direct", "fft", "fft"]
    assert chosen(4096, cpu.DIRECT) == "direct"  # few taps, however long the sequence
    assert "kernel cpu direct: not chosen: 2048 taps a position, transforms are faster from 64 on" in explain(
        long_conv, np.zeros((1, 4096, 1)), np.zeros((4096, 1)))


@pytest.mark.parametrize(("route", "limit"), [("kernel cpu fft", 1e-6), ("form fft", 5e-6)])
def test_4096_positions_in_float32(route, limit):
    """Values and gradients are right to a few units of rounding of the largest; the form's gradient of skip is a long sum."""
    rng, shape = np.random.default_rng(0), (2, 4096, 20)
    x, filter, skip = (rng.standard_normal(s).astype(np.float32) for s in (shape, shape[1:], shape[2:]))
    args, wide = (x, filter, skip, None, None), (*(a.astype(np.float64) for a in (x, filter, skip)), None, None)
    cotangents = [rng.standard_normal(shape), rng.standard_normal((2, 4095, 20))]
    pairs = [*zip(compute(long_conv, route, args, {}), compute(long_conv, "form fft", wide, {}), strict=True)]
    found, expected = (differentiate(long_conv, r, a, {}, cotangents) for r, a in ((route, args), ("form fft", wide)))
    for a, b in (*pairs, *zip(found.values(), expected.values(), strict=True)):
        assert np.abs(a - b).max() <= limit * np.abs(b).max()


def test_the_sum_is_causal_and_spectra_are_up_to_rounding():
    """A large value in the future leaves no trace in direct sums, and rounding of its own size in products of spectra."""
    rng = np.random.default_rng(0)
    x, filter = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 300, 8), (300, 8)))
    changed = x.copy()
    changed[:, 200:] = 1e6
    for taps, limit in ((filter[:20], 0.0), (filter, 1e6 * 300 * 1e-7)):
        before, after = (compute(long_conv, "kernel cpu", (a, taps, None, None, None), {})[0][:, :200] for a in (x, changed))
        assert np.abs(before - after).max() <= limit


# -- position by position ----------------------------------------------------------------------------------------------
@examples(40)
@given(length=st.integers(0, 40), taps=st.integers(0, 45), block=st.sampled_from((1, 2, 3, 8, 64)), skip=st.booleans(),
       cuts=st.lists(st.integers(0, 40), max_size=4), single=st.booleans())
def test_reading_in_blocks_is_the_convolution(length, taps, block, skip, cuts, single):
    rng = np.random.default_rng(length)
    x, filter, d = (Tensor(rng.standard_normal(s)) for s in ((2, length, 3), (taps, 3), (3,)))
    d = d if skip else None
    past, ys = online.begin(2, filter), [x[:, :0]]
    edges = sorted({0, length, *(c for c in cuts if c < length), *(range(length) if single else ())})
    for start, stop in itertools.pairwise(edges):
        y, past = online.read(x[:, start:stop], past, filter, d, convolve=long_conv, block=block)
        ys.append(y)
    assert_close(concat(ys, axis=1).numpy(), long_conv(x, filter, d)[0].numpy(), terms=64)
    assert past.position == length
    sizes = [b.inputs.shape[1] for b in past.blocks]
    assert sizes == [block << digit for digit in reversed(range(10)) if length // block >> digit & 1]
    assert past.recent.shape[1] == length % block


# -- the mixer ---------------------------------------------------------------------------------------------------------
def mixer(context=24, **options):
    bidirectional = options.pop("bidirectional", False)
    made = hyena.Hyena(Random(0), ModelOptions(context=context, width=5, bias=True),
                       hyena.HyenaOptions(sine_frequency=2.0, **options), dtype=np.float64, bidirectional=bidirectional)
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_(parameter.numpy() + 0.3 * rng.standard_normal(parameter.shape))
    return made


OPTIONS = {"order 2": {}, "order 3": {"order": 3}, "order 5": {"order": 5, "window_order": "filters"},
           "no window": {"window": False}, "a shifted window": {"window_shift": 0.1},
           "fixed features": {"features_lr": 0.0}, "one tap": {"short_filter": 1},
           "one band": {"filter_bands": 1, "filter_depth": 2}}


@pytest.mark.parametrize("block", [online.BLOCK, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_shorter_sequence_has_the_outputs_of_the_beginning_of_a_longer_one(options, block, monkeypatch):
    monkeypatch.setattr(online, "BLOCK", block)
    made = mixer(**options)
    x = Tensor(np.random.default_rng(1).standard_normal((2, 24, 5)))
    whole = made(x).numpy()
    for length in (0, 1, 7, 24):
        assert_close(made(x[:, :length]).numpy(), whole[:, :length], terms=1e4)
    with no_grad():
        state, ys = made.init_state(2), []
        for t in range(24):
            y, state = made.prefill(x[:, t : t + 1], state)
            ys.append(y.numpy())
    assert_close(np.concatenate(ys, axis=1), whole, terms=1e4)
    assert not np.allclose(whole, 0, atol=1e-3)


@pytest.mark.parametrize("run", ["call", "prefill"])
def test_what_the_filters_do_not_reach_is_refused(run):
    made, x = mixer(), Tensor(np.zeros((1, 25, 5)))
    if run == "call":
        with pytest.raises(ShapeError, match="hyena: the filters have 24 positions; 0 \\+ 25 tokens do not fit"):
            made(x)
        return
    _, state = made.prefill(x[:, :24], made.init_state(1))
    with pytest.raises(ShapeError, match="hyena: the filters have 24 positions; 24 \\+ 1 tokens do not fit"):
        made.prefill(x[:, :1], state)


def test_a_context_of_one_position():
    made = mixer(context=1)
    assert np.isfinite(made(Tensor(np.ones((1, 1, 5)))).numpy()).all()


def test_a_bidirectional_mixer_sees_both_directions_and_has_no_state():
    """Without its second filters, it is the causal one."""
    both, causal = mixer(order=3, bidirectional=True), mixer(order=3)
    x = np.random.default_rng(1).standard_normal((1, 9, 5))
    changed = x.copy()
    changed[:, 6] += 1
    assert np.abs(both(Tensor(x)).numpy() - both(Tensor(changed)).numpy())[:, :6].min() > 0
    weights = both.state()
    weights["filters.out.weight"][10:] = 0
    both.load(weights)
    half = both.filters.out.weight.numpy()[:10]
    causal.load({**weights, "filters.out.weight": half})
    causal.filters.window.assign_(both.filters.window.data[:, :10])
    assert_close(both(Tensor(x)).numpy(), causal(Tensor(x)).numpy(), terms=1e4)
    with pytest.raises(ShapeError, match="a bidirectional mixer has no state"):
        both.init_state(1)


def test_filters_fade_to_a_hundredth_where_the_options_say():
    """The slowest at 1.5 times the context, the fastest at 0.3 of it; both orders of several filters."""
    for order in ("channels", "filters"):
        filters = mixer(order=3, context=101, window_order=order).filters
        window = filters.window.data
        rates = -np.log(window[-1]).reshape(2, 5)
        assert rates.min() == pytest.approx(-np.log(0.01) / 1.5) and rates.max() == pytest.approx(-np.log(0.01) / 0.3)
        assert window[30, rates.argmax()] == pytest.approx(0.01)
        assert (np.diff(rates, axis=1) > 0).all() and (rates[0].max() < rates[1].min()) == (order == "filters")


# -- machine code ------------------------------------------------------------------------------------------------------
@pytest.mark.full
@reads_assembly
def test_vectors_are_packed_instructions():
    def products(x, y, z, count):
        _add_products(z, 0, x, 0, y, 0, 1, 1, count)

    import numba

    found = ARITHMETIC.findall(assembly(products, (ROW, ROW, ROW, numba.int64)))
    assert len(found) >= 8 and set(found) == {"s"}
