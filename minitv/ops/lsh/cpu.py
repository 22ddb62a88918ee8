"""lsh_buckets and bucket_order on the CPU: products of 32 positions at a time, and a sort by counting.

The products of a position have the same bits whatever stands beside it, so that a text has the same buckets in parts.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.panels import LANES, U, flat, load, padded, product, transpose
from autograd.cpu.vectors import scratch

LABELS = 2**22  # as many are counted; a count of more would take more time than a sort


@cpu_kernel
def _hash(x, rotations, factors, shape, like, buckets):
    """``rotations`` is [H R K F]. 32 positions at a time, a lane each: their products meet column after column."""
    B, H, R, T, K, F = shape
    rows, across = scratch(LANES * padded(K, LANES), like), scratch(LANES * padded(K, LANES), like)
    pitch, spare = padded(F, 8), scratch(LANES * LANES, like)
    columns, turned = scratch(R * pitch * padded(K, LANES), like), scratch(pitch * LANES, like)
    one, size = like.dtype.type(1), pitch * padded(K, LANES)
    up, down, bucket = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    highest, lowest = scratch(LANES, like), scratch(LANES, like)
    for h in range(H):
        for r in range(R):  # the transpose of R, [F K], in panels
            for k in range(K):
                for f in range(F):
                    columns[r * size + k // LANES * LANES * pitch + f * LANES + k % LANES] = rotations[h, r, k, f]
        for b in range(B):
            for t in range(0, T, LANES):
                n = min(LANES, T - t)
                load(rows, LANES, x, b, h, t, n, K, one)
                transpose(across, rows, spare)
                for r in range(R):
                    product(turned, columns[r * size :], pitch, across, pitch, K)
                    first, below = 0, 1
                    bucket[:] = 0
                    for part in factors:
                        for e in range(LANES):
                            highest[e] = lowest[e] = turned[first * LANES + e]
                            up[e] = down[e] = 0
                        for f in range(1, part // 2):
                            row = turned[(first + f) * LANES : (first + f + 1) * LANES]
                            for e in range(LANES):
                                up[e] = f if row[e] > highest[e] else up[e]
                                highest[e] = row[e] if row[e] > highest[e] else highest[e]
                                down[e] = f if row[e] < lowest[e] else down[e]
                                lowest[e] = row[e] if row[e] < lowest[e] else lowest[e]
                        for e in range(LANES):
                            bucket[e] += below * (part // 2 + down[e] if -lowest[e] > highest[e] else up[e])
                        first, below = first + part // 2, below * part
                    for e in range(n):
                        buckets[b, h, r, t + e] = bucket[e]


@inner
def sort(labels, order, place, starts):
    """Positions by (label, position), the inverse, and in starts[n + 1] where the positions of each label begin."""
    one, length, count = U(1), U(labels.size), U(starts.size)  # a signed index might count from the end, which is a test
    places, total = np.empty(starts.size, np.int32), np.int32(0)  # of a label: how many there are, then the next one's place
    places[:] = 0
    for t in range(length):
        places[U(labels[t])] += 1
    for n in range(count - one):
        number = places[n]
        starts[n] = places[n] = total
        total += number
    starts[count - one] = total
    for t in range(length):
        label = U(labels[t])
        p = places[label]
        places[label] = p + 1
        order[U(p)] = t
        place[t] = p


@cpu_kernel
def _order(buckets, count, order, place):
    starts = np.empty(count + 1, np.int64)
    for row in range(buckets.shape[0]):
        sort(buckets[row], order[row], place[row], starts)


def hash_forward(x, rotations, factors):
    (B, H, T, K), (_, R, _, F) = x.shape, rotations.shape
    buckets = np.zeros((B, H, R, T), np.intp)  # without channels all are 0
    factors = np.array(factors or (2 * F,), np.intp)
    if x.size:
        _hash(flat(x), np.ascontiguousarray(rotations, x.dtype), factors, (B, H, R, T, K, F), np.empty(0, x.dtype), buckets)
    return buckets, None


def _count(buckets, count):
    return count or int(buckets.max(initial=0)) + 1


def order_supports(buckets, count):
    labels = _count(buckets, count)
    return None if labels <= LABELS else f"counts at most {LABELS} labels, got {labels}"


def order_forward(buckets, count):
    order, place = np.empty(buckets.shape, np.intp), np.empty(buckets.shape, np.intp)
    shape = math.prod(buckets.shape[:3]), buckets.shape[3]
    _order(np.ascontiguousarray(buckets).reshape(shape), _count(buckets, count), order.reshape(shape), place.reshape(shape))
    return (order, place), None
