"""Multi-query attention: what one head of keys and values saves."""

from __future__ import annotations

import numpy as np

from autograd import no_grad

from ..timing import inference
from . import RIGHT, WRONG, Finding, claim
from .measure import Measure


@claim(43, "multi-query", "Keys and values that all heads share make the cache smaller.", place="section multi-query attention",
       paper="The cache has H times fewer numbers; with a beam of 4 a decoder took 32 µs for a token in place of 203 "
             "(1911.02150, table 2).")
def cache(measure: Measure) -> Finding:
    """The bytes of the state after a number of tokens, and the time of one more token."""
    length, heads = measure.sizes(1024, 4096), 8
    lengths, sizes, calls = (length // 4, length // 2, length), {}, []
    for variant in ("transformer", "multi-query"):
        model = measure.model(variant, context=length + 1, width=256, layers=2, heads=heads)
        sizes[variant] = [measure.state_bytes(model, t) for t in lengths]
        with no_grad():
            _, state = model.prefill(measure.ids(1, length), model.init_state(1))
        calls.append(inference(model.prefill, np.zeros((1, 1), np.intp), state))
    smaller = [one / other for one, other in zip(*sizes.values(), strict=True)]
    speed = measure.ratio(*calls)
    text = (f"with {heads} heads the state of {length} tokens has {sizes['multi-query'][-1] / 1024:.0f} KiB in place of "
            f"{sizes['transformer'][-1] / 1024:.0f}, {smaller[-1]:.2f} times fewer, and the next token takes {speed} times as "
            "long without sharing")
    numbers = dict(state_bytes=sizes, times_smaller=smaller, time_ratio=speed.value)
    return (RIGHT if min(smaller) > heads / 2 else WRONG)(f"The cache was counted: {text}.", **numbers)
