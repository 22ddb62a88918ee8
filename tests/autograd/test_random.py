"""Random numbers: published vectors, the same bits in NumPy and in kernels, and distributions within stated bounds.

A statistical bound is five standard errors of the estimate under the claimed distribution, and seeds are fixed. The
words of Random(0) begin with the published vector of zeros, which gives the exact values that are expected.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import DomainError, DtypeError, Random, ShapeError, dropout, random, use
from autograd.cpu.compile import cpu_kernel
from autograd.cpu.philox import philox as kernel_philox
from autograd.philox import philox, philox_int
from minitv.ops import attention

# Random123's known answers for philox4x32-10: counter, key, result; the key's first word is the low half of the seed.
ZEROS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), ZEROS),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
           (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}  # fmt: skip
words = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)


@cpu_kernel
def four(c0, c1, c2, c3, k0, k1):
    return kernel_philox(c0, c1, c2, c3, k0, k1)


@cpu_kernel
def fill(counters, k0, k1, out):
    for i in range(len(counters)):
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = kernel_philox(
            counters[i, 0], counters[i, 1], counters[i, 2], counters[i, 3], k0, k1
        )


def halves(seed):
    return np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)


def unrelated(a, b):
    """The correlation of two samples is that of independent ones: its standard error is 1/√n."""
    return abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


# -- Philox ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("counter, key, expected", KNOWN.values(), ids=KNOWN)
def test_published_vectors(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert philox_int(counter, seed) == expected
    assert tuple(int(w) for w in philox(*counter, seed)) == expected
    assert tuple(int(w) for w in four(*(np.uint64(w) for w in (*counter, *key)))) == expected


@given(st.tuples(words, words, words, words), seeds)
def test_numpy_python_and_kernels_make_the_same_bits(counter, seed):
    expected = philox_int(counter, seed)
    assert tuple(int(w) for w in philox(*counter, seed)) == expected
    assert tuple(int(w) for w in four(*(np.uint64(w) for w in counter), *halves(seed))) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x299F31D0A4093822])
def test_a_loop_in_a_kernel_makes_the_bits_of_arrays(seed):
    counters = np.random.default_rng(0).integers(0, 2**32, (1000, 4), dtype=np.uint64)
    found = np.zeros_like(counters)
    fill(counters, *halves(seed), found)
    expected = philox(*counters.T, seed)
    assert all(w.dtype == np.uint32 for w in expected)
    assert (found == np.stack(expected, axis=-1)).all()


def test_counters_broadcast():
    found = philox(np.arange(3)[:, None], np.arange(2), 7, np.uint32(2**32 - 1), 5)
    assert [w.shape for w in found] == [(3, 2)] * 4
    for i in range(3):
        for j in range(2):
            assert tuple(int(w[i, j]) for w in found) == philox_int((i, j, 7, 2**32 - 1), 5)
    assert [w.shape for w in philox(np.zeros((0, 2), int), 1, 2, 3, 4)] == [(0, 2)] * 4


def test_words_are_the_counters_in_order():
    found = Random(7).words(10)
    assert found.dtype == np.uint32
    assert found.tolist() == [w for block in range(3) for w in philox_int((block, 0, 0, 0), 7)][:10]
    assert Random(0).words(4).tolist() == list(ZEROS)
    assert Random(7).words(0).shape == (0,)


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 255, 256, 257, 1030, 2**16 + 3])
def test_a_kernel_draws_the_same_bits(seed, count, monkeypatch):
    """Large draws come from kernels: words, and the numbers made of them."""
    draws = [lambda s: s.words(count), lambda s: s.uniform((count,)), lambda s: s.uniform((count,), np.float64),
             lambda s: s.normal((count,)), lambda s: s.integers(-3, 10, (count,)), lambda s: s.keep((count,), 0.3),
             lambda s: s.permutation(count)]
    found = []
    for large in (1, 2**40):
        monkeypatch.setattr(random, "LARGE", large)
        found.append([draw(Random(seed)) for draw in draws])
    for kernel, array in zip(*found, strict=True):
        assert kernel.dtype == array.dtype and kernel.shape == array.shape and (kernel == array).all()


def test_words_have_balanced_and_unrelated_bits():
    bits = np.unpackbits(Random(12).words(40_000).view(np.uint8)).reshape(-1, 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(bits))
    correlations = np.corrcoef(bits.T.astype(float)) - np.eye(32)
    assert np.abs(correlations).max() < 5 / math.sqrt(len(bits))
    assert unrelated(bits[1:].ravel(), bits[:-1].ravel())


@pytest.mark.parametrize(("where", "bit"), [*(("counter", b) for b in range(0, 128, 9)),
                                            *(("seed", b) for b in range(0, 64, 7))])
def test_one_flipped_bit_changes_half_of_the_words(where, bit):
    generator, changed = np.random.default_rng(1), 0
    for _ in range(50):
        counter = [int(w) for w in generator.integers(0, 2**32, 4)]
        seed = int(generator.integers(0, 2**64, dtype=np.uint64))
        before = philox_int(tuple(counter), seed)
        if where == "counter":
            counter[bit // 32] ^= 1 << bit % 32
        else:
            seed ^= 1 << bit
        changed += sum((a ^ b).bit_count() for a, b in zip(before, philox_int(tuple(counter), seed), strict=True))
    assert abs(changed / 6400 - 0.5) < 5 * 0.5 / math.sqrt(6400)


# -- sources -----------------------------------------------------------------------------------------------------------
@given(seeds, st.lists(st.integers(0, 2**64 - 1), max_size=3))
def test_a_source_is_a_value(seed, path):
    source = Random(seed)
    child = source.split(*path)
    assert child.seed == Random(seed).split(*path).seed and source.seed == seed
    assert (source.uniform((5,)) == Random(seed).uniform((5,))).all()
    step = source
    for i in path:
        step = step.split(i)
    assert step.seed == child.seed
    assert repr(Random(seed)) == f"Random({seed})"


@pytest.mark.parametrize("draw", [
    lambda source: source.words(9), lambda source: source.uniform((9,)),
    lambda source: source.uniform((9,), np.float64), lambda source: source.normal((9,)),
    lambda source: source.integers(0, 1000, (9,)),
    lambda source: source.permutation(9), lambda source: source.keep((64,), 0.5),
], ids=["words", "uniform", "uniform float64", "normal", "integers", "permutation", "keep"])
def test_draws_repeat_themselves_and_differ_by_seed(draw):
    source = Random(3)
    first = draw(source)
    source.split(1).normal((4,))
    assert (draw(source) == first).all() and (draw(Random(3)) == first).all()
    others = [draw(other) for other in (Random(4), Random(3 + 2**32), source.split(0), source.split(0, 0))]
    assert all((other != first).any() for other in others)
    first[...] = 0
    assert (draw(source) != first).any()


def test_the_seed_of_a_split_is_the_block_of_its_step():
    """Counters end in 2: apart from the words of the source itself (0) and from those of attention (1)."""
    a, b, _, _ = philox_int((6, 5, 0, 2), 11)
    assert Random(11).split(5 << 32 | 6).seed == a | b << 32
    assert Random(11).split().seed == 11


def test_split_sources_differ_and_do_not_depend_on_each_other():
    children = [Random(5).split(i, j) for i in range(40) for j in range(40)]
    assert len({c.seed for c in children} | {5}) == 1601
    first = np.array([c.uniform((), np.float64) for c in children])
    assert abs(first.mean() - 0.5) < 5 * np.sqrt(1 / 12 / first.size)
    assert unrelated(first[:-1], first[1:]) and unrelated(first[:-40], first[40:])


def test_the_streams_of_a_source_and_of_its_children_are_unrelated():
    source = Random(13)
    streams = [s.uniform((20_000,), np.float64)
               for s in (source, source.split(0), source.split(1), source.split(0, 0), Random(14))]
    assert all(unrelated(a, b) for i, a in enumerate(streams) for b in streams[:i])


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.uint32, np.uint64])
def test_numpy_integers_are_integers(kind):
    assert Random(kind(3)).seed == 3 and type(Random(kind(3)).seed) is int
    assert Random(5).split(kind(3), kind(0)).seed == Random(5).split(3, 0).seed
    assert (Random(5).integers(kind(2), kind(100), (9,)) == Random(5).integers(2, 100, (9,))).all()
    assert (Random(5).permutation(kind(9)) == Random(5).permutation(9)).all()


def test_numpy_limits_do_not_overflow():
    found = Random(5).integers(np.int8(-100), np.int8(100), (50,))
    assert found.dtype == np.int64 and (found == Random(5).integers(-100, 100, (50,))).all()
    with pytest.raises(DomainError, match=r"Random\.integers: .*2\*\*31 values"):
        Random(5).integers(np.int32(-(2**31)), np.int32(5), (3,))


# -- distributions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, step", [(np.float32, 2.0**-24), (np.float64, 2.0**-53)], ids=["float32", "float64"])
def test_uniform(dtype, step):
    u = Random(1).uniform((200, 500), dtype)
    assert u.shape == (200, 500) and u.dtype == dtype
    assert u.min() >= 0 and u.max() < 1 and (np.mod(u, step) == 0).all()
    u = u.astype(np.float64)
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    assert abs(((u - 0.5) ** 2).mean() - 1 / 12) < 5 * np.sqrt(1 / 180 / u.size)
    counts = np.histogram(u, 50, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert unrelated(u.ravel()[:-1], u.ravel()[1:])


def test_uniform_is_the_high_bits_of_the_words():
    assert Random(0).uniform((4,)).tolist() == [(w >> 8) / 2**24 for w in ZEROS]
    pairs = ((ZEROS[0] << 32 | ZEROS[1]) >> 11, (ZEROS[2] << 32 | ZEROS[3]) >> 11)
    assert Random(0).uniform((2,), np.float64).tolist() == [pair / 2**53 for pair in pairs]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_normal(dtype):
    x = Random(2).normal((100_001,), dtype)
    assert x.shape == (100_001,) and x.dtype == dtype and np.isfinite(x).all()
    x = x.astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * np.sqrt(variance / x.size), power
    for bound, share in ((1.959964, 0.025), (0.0, 0.5), (-1.281552, 0.9), (3.090232, 0.001)):
        assert abs((x > bound).mean() - share) < 5 * np.sqrt(share * (1 - share) / x.size), bound
    half = x.size // 2 + 1  # a pair shares one radius: neither its halves nor their squares may be related
    assert unrelated(x[:-half], x[half:]) and unrelated(x[:-half] ** 2, x[half:] ** 2)
    assert unrelated(x[:-1], x[1:])


def test_normal_is_the_box_muller_transform_of_uniforms():
    (a, b), (c, d) = Random(0).uniform((2, 2), np.float64).tolist()
    radii = math.sqrt(-2 * math.log(1 - a)), math.sqrt(-2 * math.log(1 - b))
    expected = [r * f(2 * math.pi * t) for f in (math.cos, math.sin) for r, t in zip(radii, (c, d), strict=True)]
    np.testing.assert_allclose(Random(0).normal((4,), np.float64), expected, rtol=1e-14)
    np.testing.assert_allclose(Random(0).normal((3,), np.float64), expected[:3], rtol=1e-14)
    assert (Random(0).normal((4,)) == Random(0).normal((4,), np.float64).astype(np.float32)).all()


@pytest.mark.parametrize("low, high", [
    (0, 1), (0, 2), (-3, 4), (10, 10 + 2**31), (-2**40, -2**40 + 5), (2**63 - 3, 2**63), (-2**63, -2**63 + 3),
])
def test_integers(low, high):
    x = Random(3).integers(low, high, (70_000,))
    assert x.dtype == np.int64 and min(x.tolist()) >= low and max(x.tolist()) < high
    span, offset = high - low, np.array([value - low for value in x.tolist()])
    assert abs(offset.mean() - (span - 1) / 2) <= 5 * np.sqrt((span**2 - 1) / 12 / x.size)
    if span < 10:
        counts = np.bincount(offset, minlength=span)
        assert np.abs(counts - x.size / span).max() < 5 * np.sqrt(x.size / span)
    assert Random(3).integers(low, high).shape == ()


@pytest.mark.parametrize("low, high", [(0, 10), (-7, 1000), (0, 2**31), (-5, 2**31 - 6), (5, 6)])
def test_integers_are_a_share_of_64_bits(low, high):
    source = Random(0).words(200).tolist()
    shares = [Fraction(a << 32 | b, 2**64) for a, b in zip(source[::2], source[1::2], strict=True)]
    expected = [low + math.floor(share * (high - low)) for share in shares]
    assert Random(0).integers(low, high, (100,)).tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutation(n):
    order = Random(4).permutation(n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    if n == 1000:
        assert unrelated(order, np.arange(n))


def test_permutation_is_the_order_of_uniforms():
    keys = Random(4).uniform((20,), np.float64).tolist()
    assert Random(4).permutation(20).tolist() == sorted(range(20), key=keys.__getitem__)


def test_every_permutation_is_equally_likely():
    found = [tuple(Random(9).split(i).permutation(3).tolist()) for i in range(2400)]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep(p):
    kept = Random(6).keep((100, 300), p)
    assert kept.shape == (100, 300) and kept.dtype == bool
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / kept.size)
    assert p in (0.0, 1.0) or unrelated(kept[:, 1:].ravel(), kept[:, :-1].ravel())


def test_keep_compares_a_word_with_the_probability():
    assert Random(0).keep((4,), ZEROS[3] / 2**32).tolist() == [False, True, True, True]
    assert Random(0).keep((4,), (ZEROS[3] + 1) / 2**32).tolist() == [False, True, True, False]
    assert Random(0).keep((2, 2), ZEROS[2] / 2**32).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("kernel", ["cpu", "none"], ids=["kernel", "form"])
def test_dropout_keeps_what_the_source_keeps(kernel):
    with use(kernel=kernel):
        for size in (0, 1, 3, 4, 5, 1003):
            y = dropout(np.ones(size), p=0.25, seed=2**64 - 1).numpy()
            assert ((y != 0) == Random(2**64 - 1).keep((size,), 0.25)).all()


# -- shapes ------------------------------------------------------------------------------------------------------------
def each_draw(shape):
    source = Random(8)
    return {
        "uniform": source.uniform(shape), "uniform float64": source.uniform(shape, np.float64),
        "normal": source.normal(shape), "normal float64": source.normal(shape, np.float64),
        "integers": source.integers(0, 5, shape), "keep": source.keep(shape, 0.5),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3), (5, 1, 7)], ids=str)
def test_shapes(shape):
    flat = each_draw((math.prod(shape),))
    for name, array in each_draw(shape).items():
        assert type(array) is np.ndarray and array.shape == shape, name
        assert (array == flat[name].reshape(shape)).all(), name


def test_dtypes():
    dtypes = {name: array.dtype for name, array in each_draw((3,)).items()}
    assert dtypes == {"uniform": np.float32, "uniform float64": np.float64, "normal": np.float32,
                      "normal float64": np.float64, "integers": np.int64, "keep": np.bool_}  # fmt: skip
    assert (Random(8).uniform((3,), "float64") == Random(8).uniform((3,), np.float64)).all()


# -- refusals: each names the function and the argument ----------------------------------------------------------------
@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, np.True_, "1", None], ids=repr)
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(DomainError, match=r"Random: seed must be an integer in \[0, 2\*\*64\)"):
        Random(seed)


@pytest.mark.parametrize("kernel", ["cpu", "none"], ids=["kernel", "form"])
@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True], ids=repr)
@pytest.mark.parametrize("name", ["dropout", "attention"])
def test_a_bad_seed_of_an_operator_is_refused_on_every_route(name, seed, kernel):
    x = np.ones((1, 2, 3, 4))
    with use(kernel=kernel), pytest.raises(DomainError, match="seed must be an integer"):
        dropout(x, p=0.5, seed=seed) if name == "dropout" else attention(x, x, x, dropout=0.5, seed=seed)


@pytest.mark.parametrize("step", [-1, np.int64(-1), 2**64, 2**70], ids=repr)
def test_a_step_of_a_split_that_is_no_uint64_is_refused(step):
    with pytest.raises(DomainError, match=r"Random\.split: .*path"):
        Random(0).split(0, step)


@pytest.mark.parametrize("call", [
    lambda: Random(0).split(1.5), lambda: Random(0).split("1"), lambda: Random(0).split(None),
    lambda: Random(0).permutation(2.5), lambda: Random(0).integers(0.5, 3), lambda: Random(0).integers(0, 2.5, (3,)),
    lambda: Random(0).uniform((2.5,)), lambda: Random(0).normal((2.5,)), lambda: Random(0).integers(0, 5, (2.5,)),
    lambda: Random(0).keep((2.5,), 0.5),
], ids=["split a float", "split a text", "split None", "permutation", "low", "high", "uniform's shape",
        "normal's shape", "integers' shape", "keep's shape"])
def test_what_is_no_integer_is_refused(call):
    with pytest.raises((TypeError, DomainError, ShapeError), match="integer"):
        call()


@pytest.mark.parametrize("low, high", [(0, 0), (5, 4), (0, 2**31 + 1)])
def test_a_bad_range_is_refused(low, high):
    with pytest.raises(DomainError, match=r"Random\.integers: needs low < high"):
        Random(0).integers(low, high)


@pytest.mark.parametrize("low, high", [(2**63 - 1, 2**63 + 1), (2**64, 2**64 + 2), (-2**63 - 1, -2**63 + 1)])
def test_integers_beyond_int64_are_refused(low, high):
    with pytest.raises(DomainError, match=r"Random\.integers: .*(low|high)"):
        Random(0).integers(low, high, (3,))


def test_a_negative_length_of_a_permutation_is_refused():
    with pytest.raises(DomainError, match=r"Random\.permutation: n "):
        Random(0).permutation(-1)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_a_probability_outside_0_and_1_is_refused(p):
    with pytest.raises(DomainError, match=r"Random\.keep: p must be a probability in \[0, 1\]"):
        Random(0).keep((3,), p)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.bool_, np.complex128])
@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_another_dtype_is_refused(name, dtype):
    with pytest.raises(DtypeError, match=rf"Random\.{name}: dtype .*{np.dtype(dtype).name}"):
        getattr(Random(0), name)((3,), dtype)


@pytest.mark.parametrize("shape", [(-1,), (-2, -3), (2, -1), -1], ids=str)
@pytest.mark.parametrize("draw", [
    lambda shape: Random(0).uniform(shape), lambda shape: Random(0).normal(shape),
    lambda shape: Random(0).integers(0, 5, shape), lambda shape: Random(0).keep(shape, 0.5),
], ids=["uniform", "normal", "integers", "keep"])
def test_a_negative_size_is_refused(draw, shape):
    with pytest.raises(ShapeError, match=r"Random\..*: shape "):
        draw(shape)
