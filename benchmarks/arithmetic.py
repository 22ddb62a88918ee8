"""The float operations that a training step needs for a token, whoever computes it.

Counted are products: of arrays with weights, of arrays with each other, and in attention of queries with keys and of weights
with values, for the pairs that its formula has. A product of [m, k] and [k, n] is 2 m k n operations, and its gradients are two
more such products. Nothing else is counted: what else a mixer does (recurrences, Fourier transforms, windows), dropout, norms
and the optimizer are a small part of most models, and make the count a lower bound for the others. Recomputation in backward
is not counted either.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from autograd.state import watch
from minitv.ops.attention import visible
from minitv.task import Batch
from minitv.trainer import Trainer


def _attention(q, k, v, mask=None, sink=None, slopes=None, *, causal=True, scale=None, dropout=0.0, seed=0, **pattern) -> float:
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    seen = visible(queries, keys, causal, mask, heads=heads, **pattern)
    pairs = np.broadcast_to(True if seen is None else seen, (batch, heads, queries, keys)).sum()
    return 2 * float(pairs) * (width + v.shape[-1])


def _relative_attention(q, k, v, p, u, w, mask=None) -> float:
    return _attention(q, k, v, causal=False) + 2 * math.prod(q.shape) * k.shape[2]  # and of queries with distances


def _matmul(a, b) -> float:
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return 2 * math.prod(lead) * math.prod(a.shape[-2:]) * (b.shape[-1] if len(b.shape) > 1 else 1)


PRODUCTS: dict[str, Callable[..., float]] = {  # by operator, for its arguments
    "linear": lambda x, weight, bias=None: 2 * math.prod(x.shape) * weight.shape[0],
    "block_diagonal": lambda x, weight, **_: 2 * math.prod(x.shape) * weight.shape[1],
    "project": lambda x, weight, seen=None: 2 * math.prod(x.shape) * weight.shape[1],
    "matmul": _matmul,
    "attention": _attention,
    "relative_attention": _relative_attention,
}


def of_step(trainer: Trainer, batch: Batch) -> float:
    """Of a step on this batch, forward and backward, in all threads."""
    counts: list[float] = []

    def see(op, args: tuple, kwargs: dict, result: object) -> None:
        if op.name in PRODUCTS:
            counts.append(3 * PRODUCTS[op.name](*args, **kwargs))

    with watch(see):
        trainer.step(batch, 0)
    return sum(counts)
