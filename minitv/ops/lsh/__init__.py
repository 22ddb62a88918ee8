"""lsh_buckets and bucket_order: which vectors point the same way, and their order by it (Reformer, arXiv 2001.04451).

lsh_buckets is the angular hash of Andoni et al. (2015, arXiv 1509.02897), which Reformer uses in section 2. In round r a random
matrix R_r turns a vector x of K channels, and the bucket is the axis that the turned vector is nearest to, with its sign. With
n buckets R_r is a matrix [K n/2] of independent normal numbers:

    h_r(x) = argmax([x R_r ; -x R_r])                             0 ... n - 1, the first of equals

Two vectors with a small angle between them are nearest to the same axis with a high probability. Only the direction counts:
h(c x) = h(x) for c > 0, and h(-x) = (h(x) + n/2) mod n. One hash separates some neighbours, so every round has a matrix of its
own.

Factors. A hash costs K n/2 products for each vector. Where n grows with the length T, all hashes of a text cost O(T²). With
``factors`` n_1, n_2, ... whose product is n, there are Σ n_i / 2 columns in place of Π n_i / 2. Every factor has columns of its
own and gives a number h_i below n_i, and the bucket is h_1 + n_1 h_2 + n_1 n_2 h_3 + ....

bucket_order sorts positions by (bucket, position), by counting: how many labels are smaller, plus how many equal ones stood
before. That takes O(T + n) steps, where a sort by comparison takes O(T log T), and no key such as bucket · T + t is made, which
would overflow small integers. ``place`` is the inverse: order[place[t]] = t.

Both give integers, so neither has a gradient.
"""

from __future__ import annotations

import math

import numpy as np

from autograd.cuda import blas
from autograd.device import check_range, is_cupy, namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import independent, law
from autograd.op import op


def factors_of(buckets: int) -> tuple[int, ...]:
    """Even factors for about so many buckets: one up to 128, else a power of two near the root, and what is left of it."""
    if buckets <= 128:
        return (buckets,)
    first = 2 ** math.ceil(math.log2(math.sqrt(buckets)))
    return first, 2 * math.ceil(buckets / (2 * first))


@op("x[B H T K], rotations:const[H R K F] -> buckets:int[B H R T]", laws=[independent("B H T")])
def lsh_buckets(x, rotations, *, factors=None):
    """The bucket of every x_t in every round r: argmax([x R_r ; -x R_r]), section 2; the first of equals.

    x[B H T K], rotations[H R K F] with a matrix for each head and round -> buckets[B H R T]. ``factors`` are even
    numbers whose halves sum to F, by default the one number 2 F: DomainError otherwise.
    """
    batch, heads, length, width = x.shape
    buckets = np.zeros((batch, heads, rotations.shape[1], length), np.intp)
    for b, h, r, t in np.ndindex(buckets.shape):
        first, below = 0, 1
        for n in factors or (2 * rotations.shape[3],):
            turned = [sum(x[b, h, t, c].item() * rotations[h, r, c, f].item() for c in range(width))
                      for f in range(first, first + n // 2)]
            signed = turned + [-number for number in turned]  # [x R_r ; -x R_r]
            buckets[b, h, r, t] += below * max(range(n), key=signed.__getitem__)
            first, below = first + n // 2, below * n
    return buckets


@lsh_buckets.primitive
def rotated(x, rotations, factors):
    """All at once: [B H R T F] products, and an argmax for each factor."""
    xp = namespace(x)
    product = blas.matmul if is_cupy(x) else np.matmul
    turned = product(x[:, :, None], rotations.astype(x.dtype))  # x R_r [B H R T F]
    buckets, first, below = xp.zeros(turned.shape[:-1], np.intp), 0, 1
    for n in factors or (2 * rotations.shape[3],):
        part = turned[..., first : first + n // 2]
        buckets += below * xp.concatenate([part, -part], axis=-1).argmax(axis=-1)
        first, below = first + n // 2, below * n
    return buckets


lsh_buckets.kernel("cpu", prefix="hash_")
lsh_buckets.kernel("cuda", prefix="hash_")


@lsh_buckets.validate
def _(rotations, factors):
    columns = rotations.shape[3]
    if not columns:
        raise ShapeError(f"lsh_buckets: rotations {rotations.shape} have no column, allowed: at least 1")
    even = isinstance(factors, tuple | list) and all(type(n) is int and n > 0 and n % 2 == 0 for n in factors)
    if factors is not None and not (even and sum(factors) == 2 * columns):
        raise DomainError(f"lsh_buckets: factors {factors!r}, allowed: even integers whose sum is 2 F = {2 * columns}")


@lsh_buckets.inputs
def _(draw):
    batch, heads, length, width = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 5, "T"), draw.size(0, 4, "K")
    rounds, factors = draw.integer(1, 3), tuple(2 * draw.integer(1, 3) for _ in range(draw.integer(1, 3)))
    # Whole numbers, whose products are exact: every route finds the same ties.
    x, rotations = (np.rint(2 * draw.floats(*shape)).astype(draw.dtype)
                    for shape in ((batch, heads, length, width), (heads, rounds, width, sum(factors) // 2)))
    return (draw.layout(x), rotations), {"factors": draw.choice((factors, None))}


def _generic(case, draw):
    """Vectors without ties, and one column at least for each sign."""
    return draw.floats(*case.x.shape), draw.floats(*case.rotations.shape)


@law(lsh_buckets, "the length of a vector does not count")
def _(case, draw):
    x, rotations = _generic(case, draw)
    scale = x.dtype.type(draw.choice((2.0**-20, 0.5, 2.0**20)))
    assert np.array_equal(case(x=x * scale, rotations=rotations).buckets, case(x=x, rotations=rotations).buckets)


@law(lsh_buckets, "the opposite vector is in the opposite bucket")
def _(case, draw):
    x, rotations = _generic(case, draw)
    if x.shape[3]:
        n = 2 * rotations.shape[3]
        opposite, buckets = (case(x=sign * x, rotations=rotations, factors=None).buckets for sign in (-1, 1))
        assert np.array_equal(opposite, (buckets + n // 2) % n)


@law(lsh_buckets, "a bucket of several factors is made of their buckets")
def _(case, draw):
    total, first, below = 0, 0, 1
    for n in case.factors or (2 * case.rotations.shape[3],):
        total = total + below * case(rotations=case.rotations[..., first : first + n // 2], factors=(n,)).buckets
        first, below = first + n // 2, below * n
    assert np.array_equal(case().buckets, total)


@op("buckets:int[B H R T] -> order:int[B H R T], place:int[B H R T]", laws=[independent("B H R")])
def bucket_order(buckets, *, count=None):
    """The positions sorted by (bucket, position), and where each position stands in that order.

    buckets[B H R T] of integers from 0 up to count - 1; without ``count`` any that are not negative: DomainError.
    """
    order, place = np.empty(buckets.shape, np.intp), np.empty(buckets.shape, np.intp)
    for row in np.ndindex(buckets.shape[:3]):
        order[row] = sorted(range(buckets.shape[3]), key=buckets[row].__getitem__)  # Python's sort keeps the order of equals
        for p, t in enumerate(order[row]):
            place[(*row, t)] = p
    return order, place


@bucket_order.primitive
def argsort(buckets):
    """By a stable sort; the sort of a permutation is its inverse."""
    xp = namespace(buckets)
    order = xp.argsort(buckets, axis=-1, kind="stable")
    return order, xp.argsort(order, axis=-1, kind="stable")


bucket_order.kernel("cpu", prefix="order_")
bucket_order.kernel("cuda", prefix="order_")


@bucket_order.validate
def _(buckets, count):
    if count is not None and (type(count) is not int or count < 1):
        raise DomainError(f"bucket_order: count {count!r}, allowed: an integer from 1")
    check_labels("bucket_order", buckets, count)


def check_labels(name: str, buckets, count: int | None = None) -> None:
    """DomainError unless the labels are integers from 0 up to count - 1."""
    def fail(label):
        limit = "that are not negative" if count is None else f"from 0 up to {count - 1}"
        raise DomainError(f"{name}: a bucket has the number {label}, allowed: integers {limit}")

    most = np.iinfo(np.intp).max if count is None else count - 1
    if is_cupy(buckets) or not buckets.size or buckets.view(np.uintp).max() > most:  # one pass: negative ones are the largest
        check_range(buckets, 0, most, fail)


@bucket_order.inputs
def _(draw):
    count = draw.choice((1, 2, 5, 300))
    buckets = draw.integers(0, count, draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.integer(1, 3), draw.size(0, 8, "T"))
    return (buckets,), {"count": draw.choice((count, None))}


@law(bucket_order, "place is the inverse of order, labels rise along it, and equal ones stay in order")
def _(case, draw):
    order, place = case()
    steps = np.broadcast_to(np.arange(order.shape[-1]), order.shape)
    assert np.array_equal(np.take_along_axis(place, order, -1), steps)
    labels = np.take_along_axis(case.buckets, order, -1)
    later, equal = np.diff(order, axis=-1) > 0, np.diff(labels, axis=-1) == 0
    assert (np.diff(labels, axis=-1) >= 0).all() and later[equal].all()


@law(bucket_order, "labels may be any integers: only their order counts")
def _(case, draw):
    for same, other in zip(case(), case(buckets=case.buckets * 2**40 + 3, count=None), strict=True):
        assert np.array_equal(same, other)
