"""lsh_buckets and bucket_order on the CPU: products in a fixed order, a row at a time; a sort by counting."""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner

LABELS = 2**22  # as many are counted; a count of more would take more time than a sort


@cpu_kernel
def _hash(x, rotations, factors, buckets):
    """``rotations`` is [H R K F]; a position's products have the same bits whatever stands around it."""
    batch, heads, rounds, length = buckets.shape
    width, columns = rotations.shape[2:]
    turned = np.empty(columns, x.dtype)
    for b in range(batch):
        for h in range(heads):
            for r in range(rounds):
                matrix = rotations[h, r]
                for t in range(length):
                    turned[:] = 0
                    for c in range(width):
                        number, row = x[b, h, t, c], matrix[c]
                        for f in range(columns):
                            turned[f] += number * row[f]
                    first, below, bucket = 0, 1, 0
                    for n in factors:
                        half, best, largest = n // 2, 0, turned[first]
                        for f in range(1, half):
                            if turned[first + f] > largest:
                                best, largest = f, turned[first + f]
                        for f in range(half):
                            if -turned[first + f] > largest:
                                best, largest = half + f, -turned[first + f]
                        bucket += below * best
                        first, below = first + half, below * n
                    buckets[b, h, r, t] = bucket


@inner
def sort(labels, order, place, starts):
    """Positions by (label, position), the inverse, and in starts[n + 1] where the positions of each label begin."""
    starts[:] = 0
    for t in range(labels.size):
        starts[labels[t] + 1] += 1
    for n in range(1, starts.size):
        starts[n] += starts[n - 1]
    for t in range(labels.size):  # starts[n] moves from the begin of n to its end, which is the begin of the next
        p = starts[labels[t]]
        starts[labels[t]] = p + 1
        order[p] = t
        place[t] = p
    for n in range(starts.size - 1, 0, -1):
        starts[n] = starts[n - 1]
    starts[0] = 0


@cpu_kernel
def _order(buckets, count, order, place):
    starts = np.empty(count + 1, np.int64)
    for row in range(buckets.shape[0]):
        sort(buckets[row], order[row], place[row], starts)


def hash_forward(x, rotations, factors):
    batch, heads, length, _ = x.shape
    buckets = np.empty((batch, heads, rotations.shape[1], length), np.intp)
    factors = np.array(factors or (2 * rotations.shape[3],), np.intp)
    _hash(np.ascontiguousarray(x), np.ascontiguousarray(rotations, x.dtype), factors, buckets)
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
