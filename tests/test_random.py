"""Random numbers: published vectors, the same bits in NumPy and in kernels, and distributions within stated bounds.

A bound is five standard errors of the estimate, and seeds are fixed.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import DomainError, Random
from autograd.kernel_random import philox as kernel_philox
from autograd.kernels import cpu_kernel
from autograd.random import philox, philox_int

# Random123's known answers for philox4x32-10: counter, key, result; the key's first word is the low half of the seed.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
words = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)


@cpu_kernel
def four(c0, c1, c2, c3, k0, k1):
    return kernel_philox(c0, c1, c2, c3, k0, k1)


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert philox_int(counter, seed) == expected
    assert tuple(int(w) for w in philox(*counter, seed)) == expected
    assert tuple(int(w) for w in four(*(np.uint32(w) for w in (*counter, *key)))) == expected


@given(st.tuples(words, words, words, words), seeds)
def test_numpy_python_and_kernels_make_the_same_bits(counter, seed):
    expected = philox_int(counter, seed)
    assert tuple(int(w) for w in philox(*counter, seed)) == expected
    kernel = four(*(np.uint32(w) for w in counter), np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32))
    assert tuple(int(w) for w in kernel) == expected


def test_words_are_the_counters_in_order():
    found = Random(7).words(10)
    assert found.dtype == np.uint32
    assert found.tolist() == [w for block in range(3) for w in philox_int((block, 0, 0, 0), 7)][:10]
    assert Random(7).words(0).shape == (0,)


@given(seeds, st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
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


def test_split_sources_differ_and_do_not_depend_on_each_other():
    children = [Random(5).split(i, j) for i in range(40) for j in range(40)]
    assert len({c.seed for c in children} | {5}) == 1601
    first = np.array([c.uniform((), np.float64) for c in children])
    assert abs(first.mean() - 0.5) < 5 * np.sqrt(1 / 12 / first.size)
    pairs = np.corrcoef(first[:-1], first[1:])[0, 1]
    assert abs(pairs) < 5 / np.sqrt(first.size)


@pytest.mark.parametrize("dtype, step", [(np.float32, 2.0**-24), (np.float64, 2.0**-53)])
def test_uniform(dtype, step):
    u = Random(1).uniform((200, 500), dtype)
    assert u.shape == (200, 500) and u.dtype == dtype
    assert u.min() >= 0 and u.max() < 1 and (np.mod(u, step) == 0).all()
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    counts = np.histogram(u, 50, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normal(dtype):
    x = Random(2).normal((100_001,), dtype)
    assert x.shape == (100_001,) and x.dtype == dtype and np.isfinite(x).all()
    n = x.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x.astype(np.float64) ** power).mean() - moment) < 5 * np.sqrt(variance / n), power
    assert abs((x > 1.959964).mean() - 0.025) < 5 * np.sqrt(0.025 / n)
    half = n // 2 + 1  # a pair of one uniform radius: its two halves must not be related
    assert abs(np.corrcoef(x[:n - half], x[half:])[0, 1]) < 5 / np.sqrt(half)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2), (-3, 4), (10, 10 + 2**31), (-2**40, -2**40 + 5)])
def test_integers(low, high):
    x = Random(3).integers(low, high, (70_000,))
    assert x.dtype == np.int64 and x.min() >= low and x.max() < high
    span = high - low
    assert abs(x.mean() - (low + high - 1) / 2) <= 5 * np.sqrt((span**2 - 1) / 12 / x.size)
    if span < 10:
        counts = np.bincount(x - low, minlength=span)
        assert np.abs(counts - x.size / span).max() < 5 * np.sqrt(x.size / span)
    assert Random(3).integers(low, high).shape == ()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutation(n):
    order = Random(4).permutation(n)
    assert sorted(order.tolist()) == list(range(n))
    if n == 1000:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


def test_every_permutation_is_equally_likely():
    found = [tuple(Random(9).split(i).permutation(3).tolist()) for i in range(6000)]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_keep(p):
    kept = Random(6).keep((100, 300), p)
    assert kept.shape == (100, 300) and kept.dtype == bool
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / kept.size)
    assert (kept.reshape(-1) == (Random(6).words(kept.size).astype(np.uint64) >= round(p * 2**32))).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_shapes(shape):
    source = Random(8)
    for array in (source.uniform(shape), source.normal(shape), source.integers(0, 5, shape), source.keep(shape, 0.5)):
        assert array.shape == shape


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(DomainError, match=r"Random: seed must be an integer in \[0, 2\*\*64\)"):
        Random(seed)


@pytest.mark.parametrize("low, high", [(0, 0), (5, 4), (0, 2**31 + 1)])
def test_a_bad_range_is_refused(low, high):
    with pytest.raises(DomainError, match=r"Random.integers: needs low < high"):
        Random(0).integers(low, high)
