"""lsh_buckets and bucket_order on a GPU; see gpu.cu."""

import math

import numpy as np

from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only
from autograd.device import namespace

from .cpu import LABELS

SOURCE = Source(__file__)


def hash_supports(x):
    return float32_only(x)


def hash_forward(x, rotations, factors):
    xp, (B, H, T, K), (_, R, _, F) = namespace(x), x.shape, rotations.shape
    buckets = xp.empty((B, H, R, T), np.int64)
    factors = xp.asarray(np.array(factors or (2 * F,), np.int64))
    SOURCE.launch("mtv_lsh_hash", elements(buckets.size), contiguous(x), contiguous(rotations.astype(np.float32)), factors,
                  buckets, buckets.size, H, R, T, K, F, factors.size)
    return buckets, None


def order_supports(count):
    if count is None:
        return "needs the number of labels"
    return None if count <= LABELS else f"counts at most {LABELS} labels, got {count}"


def order_forward(buckets, count):
    xp, shape, T = namespace(buckets), buckets.shape, buckets.shape[3]
    rows, chunks = math.prod(shape[:3]), ceil_div(T, SOURCE["CHUNK"])
    order, place = xp.empty(shape, np.int64), xp.empty(shape, np.int64)
    if rows * T:
        buckets, counts = contiguous(buckets), xp.zeros((rows, count * chunks), np.int64)
        sizes = rows * chunks, T, count, chunks
        SOURCE.launch("mtv_lsh_count", elements(rows * chunks), buckets, counts, *sizes)
        ends = xp.cumsum(counts, axis=1)
        SOURCE.launch("mtv_lsh_order", elements(rows * chunks), buckets, ends, counts, order, place, *sizes)
    return (order, place), None
