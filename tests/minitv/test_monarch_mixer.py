"""Monarch matrices and Monarch Mixer: projections, causality, what the layers equal, what they see, and what they refuse."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad, use
from autograd.draw import Draw, draw_inputs
from autograd.errors import ShapeError
from autograd.laws import identity
from autograd.random import Random
from autograd.verify import PLACES, check_law, compute
from minitv import variants
from minitv.errors import UserError
from minitv.experiment import default_task, namespace
from minitv.nn import Linear
from minitv.ops import long_conv, monarch
from minitv.ops.long_conv import online
from minitv.ops.monarch import check_causality, factors, matrix, product
from minitv.options import ModelOptions
from minitv.tasks import load as load_task
from minitv.variants.monarch_mixer import (
    Bidirectional,
    CausalOptions,
    FeedForward,
    Mixer,
    MixerBlock,
    MonarchLinear,
    MonarchOptions,
)
from tests.autograd.operator_checks import marks
from tests.minitv import models
from tests.test_goldens import Golden, close, each_way, verify_mixer

VARIANTS = {"monarch-mixer": (Bidirectional, MonarchOptions), "monarch-mixer-causal": (Mixer, CausalOptions)}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def mixer(variant="monarch-mixer-causal", context=24, width=6, **options):
    """A small mixer whose weights are large enough that everything counts."""
    kind, of_options = VARIANTS[variant]
    made = kind(Random(0), ModelOptions(context=context, width=width, bias=True),
                of_options(sine_frequency=2.0, filter_width=8, filter_bands=2, **options), dtype=np.float64)
    return enlarged(made)


def enlarged(made):
    for i, parameter in enumerate(made.parameters()):
        parameter.assign_(parameter.numpy() + 0.3 * normal(*parameter.shape, seed=i))
    return made


# -- matrices ----------------------------------------------------------------------------------------------------------
def test_the_projection_loses_all_but_the_largest_singular_values():
    dense = normal(12, 10)
    first, second = factors.nearest(dense, (2, 5), (3, 4))
    assert first.shape == (5, 3, 2) and second.shape == (3, 4, 5)
    near = matrix(first, second).numpy()
    parts = dense.reshape(4, 3, 2, 5).transpose(1, 3, 0, 2)  # [A Q C P]
    assert_close(np.sum((dense - near) ** 2), np.sum(np.linalg.svd(parts, compute_uv=False)[..., 1:] ** 2), terms=100)
    for seed in range(5):
        other = matrix(first + 0.01 * normal(*first.shape, seed=seed), second + 0.01 * normal(*second.shape, seed=seed)).numpy()
        assert np.linalg.norm(dense - other) > np.linalg.norm(dense - near)


@pytest.mark.parametrize(("columns", "rows"), [((2, 4), (3, 4)), ((2, 5), (3, 5)), ((2, 5), (12,)), ((), ())])
def test_digits_that_do_not_make_the_matrix_are_refused(columns, rows):
    with pytest.raises(ShapeError, match=r"nearest: rows .* and columns .* as many of both are allowed; got"):
        factors.nearest(normal(12, 10), columns, rows)


@pytest.mark.parametrize(("number", "count", "expected"), [
    (128, 2, [16, 8]), (128, 3, [8, 4, 4]), (12, 2, [4, 3]), (7, 2, [7, 1]), (1, 3, [1, 1, 1]), (360, 3, [10, 6, 6])])
def test_digits_are_nearly_equal(number, count, expected):
    assert factors.digits(number, count) == expected


def whole(case_factors):
    """The matrix of an order-3 product by its own indices, [rows, columns]."""
    one, two, three = case_factors
    _, i, a = one.shape
    _, j, b = two.shape
    _, k, c = three.shape
    return np.einsum("bcia,cijb,ijkc->kjiabc", one.reshape(b, c, i, a), two.reshape(c, i, j, b),
                     three.reshape(i, j, k, c)).reshape(i * j * k, a * b * c)


def test_a_product_of_order_three():
    sizes = [(3 * 2, 4, 5), (2 * 4, 2, 3), (4 * 2, 3, 2)]  # digits of inputs 5 3 2, of outputs 4 2 3
    made = [normal(*size, seed=i) for i, size in enumerate(sizes)]
    x = normal(2, 30)
    assert_close(product(Tensor(x), made).numpy(), x @ whole(made).T, terms=100)
    again = factors.nearest(whole(made), (5, 3, 2), (4, 2, 3))
    assert [factor.shape for factor in again] == sizes
    assert_close(whole(again), whole(made), terms=1000)
    with pytest.raises(ShapeError, match="block_diagonal: x"):
        product(Tensor(x), [made[0], made[2]])


@pytest.mark.parametrize("sizes", [(2, 3, 2), (3, 1, 4), (2, 2, 2)])
def test_the_fourier_transform_of_three_factors(sizes):
    made, n = factors.dft(*sizes), int(np.prod(sizes))
    assert_close(np.abs(whole(made) - np.fft.fft(np.eye(n))) + 1, np.ones((n, n)))
    x, total = normal(n), 0
    for parts in itertools.product(*((f.real, 1j * f.imag) for f in made)):  # a Tensor is real
        power = np.prod([1j if np.iscomplexobj(part) else 1 for part in parts])
        total = total + power * product(Tensor(x), [np.ascontiguousarray(np.imag(p) if np.iscomplexobj(p) else p)
                                                    for p in parts]).numpy()
    assert_close(np.stack([total.real, total.imag]), np.stack([np.fft.fft(x).real, np.fft.fft(x).imag]), terms=100)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 63, 130])
def test_convolutions_by_monarch_products_at_larger_sizes(length):
    n1, n2 = factors.sizes(2 * length - 1)
    assert n1 % 2 == 0 and 2 * length - 1 <= n1 * n2 <= 2 * length + 2 * n1 and n2 <= n1
    x, filter, ahead = normal(2, length, 3), normal(length, 3, seed=1), normal(length, 3, seed=2)
    args = x, filter, None, ahead, None
    one, other = (compute(long_conv, f"form {name}", args, {})[0] for name in ("monarch", "direct"))
    assert_close(one, other, terms=4 * length)


def monarch_call():
    return draw_inputs(monarch, Draw.seeded(0))


@pytest.mark.parametrize("route", ["definition", "form blocks"])
@pytest.mark.parametrize("bounded", [True, False])
def test_without_the_bound_on_the_degree_a_product_of_polynomials_is_not_causal(route, bounded):
    """The planted error: the future comes back around the circle of n points. Some draws have nothing to turn around."""
    law, failures = identity("causality", lambda case, draw: check_causality(case, draw, bounded)), 0
    for seed in range(30):
        try:
            check_law(monarch, law, route, *monarch_call(), Draw.seeded(seed))
        except AssertionError as error:
            assert "an output depends on later inputs" in str(error)
            failures += 1
    assert failures == 0 if bounded else failures > 10


def test_the_identity_makes_the_polynomials_of_the_fourier_transform():
    n1, n2 = 4, 3
    low, high = factors.triangular(np.zeros((n2, n2)), np.zeros((n2, n1, n1)))
    for one, other in zip(factors.polynomials(low, high), factors.dft(n1, n2), strict=True):
        assert_close(np.abs(one - other) + 1, np.ones(other.shape))


# -- the layers equal those of PyTorch ------------------------------------------------------------------------------------
GOLDEN = {"once": {}, "twice": dict(lag_zero="twice", permute=True), "alone": dict(residual_conv=False),
          "causal": dict(input_norm=True)}


def layer(golden, case, dtype):
    """The layer of one case, every size from the shapes of its weights."""
    golden.only(case)
    weights = {name: w.astype(dtype) for name, w in golden.below(f"{case}/param/").items()}
    context, features = golden[f"{case}/grad/mixer.filters.0.features"].shape
    blocks, outputs, _ = weights["ffn.up.weight"].shape
    width = len(weights["mixer.out.weight"])
    model = ModelOptions(context=context, width=width, bias=True, ffn_multiple=blocks * outputs / 2 / width)
    kind, of_options = VARIANTS["monarch-mixer-causal" if case == "causal" else "monarch-mixer"]
    options = of_options(filter_width=weights["mixer.filters.0.frequency"].size, filter_bands=features // 2, features_lr=1.0,
                         blocks=blocks, **GOLDEN[case])
    made = MixerBlock(model, kind(Random(0), model, options, dtype=dtype), FeedForward(Random(1), model, options, dtype=dtype),
                      dtype=dtype)
    tables = {name: np.zeros((context, features), dtype) for name, _ in made.named_parameters() if name.endswith("features")}
    made.load({**weights, **tables})
    return made


def verify(golden, case, dtype, place="cpu"):
    verify_mixer(golden, case, layer(golden, case, dtype), dtype, place)


@each_way
@pytest.mark.parametrize("case", GOLDEN)
def test_the_layer_equals_that_of_the_authors(kernel, case, dtype):
    with use(kernel=kernel):
        verify(Golden("monarch_mixer"), case, dtype)


@pytest.mark.parametrize("place", [pytest.param(p, marks=marks(f"kernel cuda on {p}")) for p in ("emulator", "card")])
def test_the_layer_equals_that_of_the_authors_on_a_gpu(place):
    with PLACES[place]():
        verify(Golden("monarch_mixer"), "twice", np.float32, "cuda")


@each_way
def test_the_causal_layer_position_by_position(kernel, dtype):
    golden = Golden("monarch_mixer")
    made = layer(golden, "causal", dtype)
    x, expected = golden["causal/in"].astype(dtype), golden["causal/out"]
    with use(kernel=kernel), no_grad():
        state = made.init_state(len(x))
        for t in range(x.shape[1]):
            y, state = made.prefill(Tensor(x[:, t : t + 1]), state)
            close(y.numpy()[:, 0], expected[:, t], dtype, f"output at position {t}")


@pytest.mark.parametrize("entry", ["once/out", "once/grad", "once/grad/mixer.filters.1.ahead.out.weight",
                                   "once/grad/mixer.filters.0.frequency", "once/grad/ffn.up.weight", "once/grad/mixer.skips.1"])
def test_a_layer_that_is_off_is_noticed(entry):
    golden = Golden("monarch_mixer")
    golden[entry] = golden[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="relative error 1e-09, allowed 1e-10"):
        verify(golden, "once", np.float64)


# -- the mixer ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lag_zero", ["once", "twice"])
def test_two_directions_are_the_sums_of_the_page(lag_zero):
    made = mixer("monarch-mixer", lag_zero=lag_zero, residual_conv=False)
    back, ahead = (f.numpy() for f in made.filters[0].pair(9))
    x, first = normal(9, 6, seed=5), 1 if lag_zero == "once" else 0
    expected = x * made.skips[0].numpy()
    for t, s in np.ndindex(9, 9):
        expected[t] += back[t - s] * x[s] if s <= t else 0
        expected[t] += ahead[s - t - first] * x[s] if s - t >= first else 0
    y, _ = long_conv(Tensor(x[None]), Tensor(back), made.skips[0], made._ahead(Tensor(ahead)))
    assert_close(y.numpy()[0], expected, terms=100)


def test_both_directions_share_what_is_no_matrix():
    made = mixer("monarch-mixer")
    names = [name for name, _ in made.named_parameters() if name.startswith("filters.1")]
    assert {name.removeprefix("filters.1.").partition(".")[0] for name in names} == {"features", "frequency", "layers", "out",
                                                                                     "ahead"}
    inner = {name.removeprefix("filters.1.ahead.").partition(".")[0] for name in names if ".ahead." in name}
    assert inner == {"layers", "out"}


VARIED = {"blocks": 2, "permute": True, "monarch_order": 2, "residual_conv": False, "input_norm": True, "short_filter": 1,
          "filter_width": 7, "filter_depth": 3, "filter_bands": 1, "filter_std": 0.5, "sine_frequency": 1.0, "features_lr": 0.0,
          "window": False, "fast_decay": 0.1, "slow_decay": 3.0, "window_shift": 0.5, "lag_zero": "twice"}


@each_variant
def test_every_option_of_the_mixer_does_something(variant):
    base, x = models.configure(variant, context=12, layers=1, width=8), Tensor(normal(2, 12, 8))
    kind, of_options = VARIANTS[variant]
    names = {field.name for field in fields(of_options)}
    assert names <= set(VARIED)

    def outputs(**options):
        chosen = base.replace(**options)
        made = kind(Random(0), chosen.model, chosen.mixer, dtype=np.float64)
        for name, parameter in made.named_parameters():
            parameter.assign_(parameter.numpy() + 0.1 * normal(*parameter.shape, seed=len(name)))
        ffn = FeedForward(Random(0), chosen.model, chosen.mixer, dtype=np.float64)
        return made(x).numpy(), ffn(x).numpy()

    plain = outputs()
    for name in names:
        assert any(not np.array_equal(a, b) for a, b in zip(outputs(**{name: VARIED[name]}), plain, strict=True)), name


OPTIONS = {"as it is": {}, "without the second": dict(residual_conv=False), "normalised": dict(input_norm=True),
           "monarch projections": dict(monarch_order=2),
           "three factors": dict(monarch_order=3), "one tap": dict(short_filter=1), "fixed": dict(features_lr=0.0)}


@pytest.mark.parametrize("block", [online.BLOCK, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_sequence_in_parts_is_the_whole(options, block, monkeypatch):
    monkeypatch.setattr(online, "BLOCK", block)
    made, x = mixer(**options), Tensor(normal(2, 24, 6, seed=1))
    expected = made(x).numpy()
    for length in (0, 1, 7):
        assert_close(made(x[:, :length]).numpy(), expected[:, :length], terms=1e4)
    for cuts in ((0, 24), (0, 5, 5, 6, 24), tuple(range(25))):
        with no_grad():
            state, ys = made.init_state(2), []
            for start, stop in itertools.pairwise(cuts):
                y, state = made.prefill(x[:, start:stop], state)
                ys.append(y.numpy())
        assert_close(np.concatenate(ys, axis=1), expected, terms=1e4)
    assert not np.allclose(expected, 0, atol=1e-3)


def test_the_state_is_as_large_as_the_page_says():
    """4 t D + 6 D numbers at most, without the filters: a block of past inputs has as many sums."""
    made, x = mixer(context=200), Tensor(normal(1, 192, 6))
    _, state = made.prefill(x, made.init_state(1))
    numbers = state.recent.size + sum(part.size for past in state.pasts for block in past.blocks for part in block)
    assert numbers + sum(past.recent.size for past in state.pasts) == 4 * 192 * 6 + 6 * 6
    assert [f.shape for f in state.filters] == [(200, 6)] * 2


@each_variant
def test_who_sees_whom(variant):
    made, x = mixer(variant), normal(1, 24, 6, seed=1)
    base = made(Tensor(x)).numpy()
    for t in (0, 11, 23):
        changed = x.copy()
        changed[:, t] += 1
        moved = np.abs(made(Tensor(changed)).numpy() - base).max(axis=(0, 2)) > 1e-9
        assert moved[t:].all() and (moved[:t].all() if made.both else not moved[:t].any())


@each_variant
def test_what_the_filters_do_not_reach_is_refused(variant):
    with pytest.raises(ShapeError, match=f"{variant}: the filters have 24 positions; 0 \\+ 25 tokens do not fit"):
        mixer(variant)(Tensor(np.zeros((1, 25, 6))))
    if variant == "monarch-mixer-causal":
        made = mixer(variant)
        _, state = made.prefill(Tensor(np.zeros((1, 24, 6))), made.init_state(1))
        with pytest.raises(ShapeError, match="24 \\+ 1 tokens do not fit"):
            made.prefill(Tensor(np.zeros((1, 1, 6))), state)
    else:
        with pytest.raises(ShapeError, match="monarch-mixer: it has no state"):
            mixer(variant).init_state(1)


@each_variant
def test_a_context_of_one_position(variant):
    assert mixer(variant, context=1)(Tensor(normal(2, 1, 6))).shape == (2, 1, 6)


# -- along the channels ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [1, 7, 12, 64])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("times", [1, 3])
def test_a_monarch_projection(width, order, times):
    """As much variance as the dense one has, for p N^(1 + 1/p) weights instead of N²."""
    made = MonarchLinear(Random(0), width, times * width, order=order, std=0.1, dtype=np.float64)
    made.bias.assign_(normal(times * width))
    x = normal(500, width)
    dense = matrix(*made.factors).numpy() if order == 2 else whole([factor.numpy() for factor in made.factors])
    assert_close(made(Tensor(x)).numpy(), x @ dense.T + made.bias.numpy(), terms=100)
    if width == 64:
        assert sum(factor.size for factor in made.factors) == (order - 1 + times) * 64 * {2: 8, 3: 4}[order]
        other = Linear(Random(1), width, times * width, std=0.1, bias=False, dtype=np.float64)
        assert np.var(x @ dense.T) == pytest.approx(np.var(other(Tensor(x)).numpy()), rel=0.2)


def test_how_weights_grow_with_the_width():
    """Of four widths a Monarch matrix of two factors has 8 times the weights, one of three 6.35 times, four blocks 16 times."""
    def growth(count):
        return count(1024) / count(256)

    def projection(order):
        return lambda width: sum(np.prod(f.shape) for f in MonarchLinear(Random(0), width, width, order=order, std=1.0).factors)

    assert growth(projection(2)) == 8
    assert growth(projection(3)) == pytest.approx(4 ** (4 / 3), rel=0.1)
    assert growth(lambda width: FeedForward(Random(0), ModelOptions(width=width), CausalOptions()).up.weight.size) == 16


def connected(width=16, **options):
    """Which inputs [16] each output of the feed-forward network sees."""
    model = ModelOptions(width=width, context=4, layers=1)
    made = enlarged(FeedForward(Random(0), model, CausalOptions(**options), dtype=np.float64))
    x = normal(1, 1, width, seed=3)
    base, sees = made(Tensor(x)).numpy(), np.zeros((width, width), bool)
    for i in range(width):
        changed = x.copy()
        changed[..., i] += 1
        sees[:, i] = np.abs(made(Tensor(changed)).numpy() - base)[0, 0] > 1e-12
    return sees


def test_what_blocks_of_the_feed_forward_network_see():
    """Half of the outputs see blocks 0 and 2 of four, the others 1 and 3, unless the channels are permuted."""
    expected = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]], bool)
    assert np.array_equal(connected(), np.kron(expected, np.ones((4, 4), bool)))
    assert connected(permute=True).all() and connected(blocks=1).all()


def test_blocks_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="--blocks: 3 blocks do not divide the width 16, allowed: a divisor of 16"):
        models.build("monarch-mixer-causal", width=16, blocks=3)


@pytest.mark.parametrize(("multiple", "hidden"), [(4.0, 64), (0.01, 4), (1.3, 20)])
def test_the_hidden_size_is_a_multiple_of_the_blocks(multiple, hidden):
    made = FeedForward(Random(0), ModelOptions(width=16, ffn_multiple=multiple), CausalOptions())
    assert made.up.weight.shape == (4, hidden // 2, 4) and made.down.weight.shape == (4, 4, hidden // 4)


def test_the_number_of_parameters_of_a_layer():
    """4 D² + 4 D of projections, 12 D of the short filter, 3 D² + D of the feed-forward network, two convolutions, a norm."""
    width, hidden, features = 16, 8, 5
    model = ModelOptions(width=width, context=10, layers=1, bias=True)
    options = MonarchOptions(filter_width=hidden, filter_bands=2, features_lr=0.0)
    made = MixerBlock(model, Bidirectional(Random(0), model, options), FeedForward(Random(0), model, options))
    network = hidden * features + hidden + 2 * (hidden**2 + hidden) + hidden * width
    convolutions = 2 * (2 * network + hidden + width)
    dense = 4 * width**2 + 4 * width + 12 * width + 3 * width**2 + width + 2 * width
    assert sum(p.size for p in made.parameters()) == dense + convolutions


# -- the variants ------------------------------------------------------------------------------------------------------
def test_the_tasks_of_the_variants():
    both, causal = (variants.load(name) for name in VARIANTS)
    assert default_task(both) == "masked" and default_task(causal) == "text"
    with pytest.raises(UserError, match="its convolutions look ahead; monarch-mixer-causal is a relative"):
        namespace(both, load_task("text"))
    with pytest.raises(UserError, match="monarch-mixer-causal sees the past alone"):
        namespace(causal, load_task("masked"))
    with pytest.raises(UserError, match="--stack reversible: the blocks of monarch-mixer normalise the sum"):
        models.build("monarch-mixer", stack="reversible")
