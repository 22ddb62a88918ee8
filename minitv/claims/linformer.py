"""Linformer: what its projections make of attention, and how its time grows."""

from __future__ import annotations

from typing import Any

import numpy as np

from autograd import Tensor
from autograd.metric import distance

from ..ops import attention, project
from ..timing import inference
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure

PAPER = "2006.04768"
SYSTEM, PLACE = "Linformer", "section Linformer"


def _mixed(q: Any, k: Any, v: Any, e: Any, f: Any) -> Tensor:
    """Attention of all queries to mixtures of keys and of values, equation (7)."""
    return attention(q, project(k, e), project(v, f), causal=False)[0]


@claim(44, SYSTEM, "Projections break attention into several smaller attentions.", place=PLACE,
       paper=f"The introduction of {PAPER} says so too. By equation (7) every query has one softmax over k mixtures of all "
             "keys, and the map has the rank k at most.")
def smaller(measure: Measure) -> Finding:
    """The map from values to outputs: its rank, its zeros, and how far it is from one softmax over the mixtures."""
    length, slots, width = measure.sizes(96, 512), measure.sizes(12, 32), 16
    q, k, v = (measure.rng.standard_normal((1, 1, length, width)) for _ in range(3))
    e, f = (measure.rng.standard_normal((1, slots, length)) / np.sqrt(slots) for _ in range(2))
    table = _mixed(q, k, np.eye(length)[None, None], e, f).numpy()[0, 0]  # [T T]
    rank, zeros = int(np.linalg.matrix_rank(table, tol=1e-10 * np.abs(table).max())), int((table == 0).sum())
    scores = np.exp(q[0, 0] @ (e[0] @ k[0, 0]).T / np.sqrt(width))  # [T k]
    one = distance(table, scores / scores.sum(axis=1, keepdims=True) @ f[0])
    whole = np.eye(length)[None]
    full = distance(_mixed(q, k, v, whole, whole).numpy(), attention(q, k, v, causal=False)[0].numpy())
    text = (f"the map of {length} tokens through {slots} mixtures has rank {rank} and {zeros} zeros among {length**2} numbers, "
            f"and differs by {one:.0e} from one softmax over the mixtures; with identities as projections it differs by "
            f"{full:.0e} from full attention")
    numbers = dict(rank=rank, mixtures=slots, zeros=zeros, from_one_softmax=one, from_full_attention=full)
    if zeros >= length**2 // 2:  # two attentions of half the length leave half of the map empty
        return RIGHT(f"The map falls into parts: {text}.", **numbers)
    if rank <= slots and one < 1e-9:
        return WRONG(f"It is one attention of every query to all keys: {text}.", **numbers)
    return CONDITIONS(f"It is neither one attention nor several: {text}.", **numbers)


@claim(45, SYSTEM, "Its time grows linearly with the length.", place=PLACE,
       paper=f"It is O(T k d) for k mixtures, and by the theory k need not grow with T ({PAPER}, theorem 2).")
def time(measure: Measure) -> Finding:
    """The exponents in T of attention to 64 mixtures and of full attention."""
    mixtures, heads, width, calls, full = 64, 4, 32, {}, {}
    for length in measure.sizes((512, 1024, 2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192, 16384, 32768, 65536)):
        e, f = (measure.normal(1, mixtures, length) for _ in range(2))
        calls[length] = inference(_mixed, *(measure.normal(1, heads, length, width) for _ in range(3)), e, f)
    for length in measure.sizes((128, 256, 384, 512, 768, 1024), (256, 512, 1024, 2048, 4096, 8192)):
        full[length] = inference(attention, *(measure.normal(1, heads, length, width) for _ in range(3)), causal=False)
    fit, other = measure.exponent("T", calls), measure.exponent("T", full)
    text = (f"with {mixtures} mixtures its time grew as {fit} at up to {max(calls)} tokens, and that of full attention as "
            f"{other}")
    growth = fit.nearest({"T": 1.0, "T²": 2.0})
    if growth is None:
        return UNDECIDED(f"It may be so or not: {text}.", mixtures=fit, full=other)
    return (RIGHT if growth == "T" else WRONG)(f"It grows as {growth}: {text}.", mixtures=fit, full=other)
