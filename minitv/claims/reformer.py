"""Reformer: how hashing, sorting and attention grow, and what reversible layers and chunks save."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autograd import Tensor, cross_entropy
from autograd.metric import distance

from ..ops import bucket_order, lsh_attention, lsh_buckets
from ..timing import inference, training
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure

PAPER = "2001.04451"
SYSTEM, PLACE = "Reformer", "section Reformer"
CHUNK = 64


def _step(model: Any, ids: np.ndarray) -> Any:
    """A call of the forward and the backward pass, in which gradients of weights are not kept."""
    return lambda: cross_entropy(model(ids), ids).backward(sink=lambda leaf, gradient: None)


@claim(50, SYSTEM, "Its time grows as T log T times d, its space as T log T + T d.", place=PLACE,
       paper=f"The abstract says O(T log T). The tables are linear in T at a fixed chunk, hashing into T / m buckets costs "
             f"O(T² d / m) in one factor, and the space is max(b l d, b n_h l n_r c) without a logarithm ({PAPER}, table 3).")
def cost(measure: Measure) -> Finding:
    """The exponents in T of hashing in one factor and in two, of sorting, of attention in chunks, and of its memory."""
    width, calls, peaks = 32, {name: {} for name in ("one factor", "two factors", "sorting", "attention")}, {}

    def buckets(length: int) -> np.ndarray:
        return measure.ids(1, 1, 1, length, vocab=2 * length // CHUNK)

    for length in measure.sizes((2048, 3072, 4096, 6144, 8192, 12288), (4096, 6144, 8192, 12288, 16384, 24576)):
        x, count = measure.normal(1, 1, length, width), 2 * length // CHUNK
        first = 2 ** math.ceil(math.log2(math.sqrt(count)))
        two = first, 2 * math.ceil(count / (2 * first))
        for name, factors in (("one factor", (count,)), ("two factors", two)):
            calls[name][length] = inference(lsh_buckets, x, measure.normal(1, 1, width, sum(factors) // 2), factors=factors)
    for length in (2**k for k in measure.sizes(range(13, 19), range(15, 22))):
        calls["sorting"][length] = inference(bucket_order, buckets(length), count=2 * length // CHUNK)
    for length in measure.sizes((512, 1024, 1536, 2048, 3072, 4096), (8192, 12288, 16384, 24576, 32768, 49152)):
        x, v = (measure.normal(1, 1, length, width) for _ in range(2))
        calls["attention"][length] = inference(lsh_attention, x, x, v, buckets(length), chunk=CHUNK, across=True)
        peaks[length] = measure.memory(calls["attention"][length])
    fits = {name: measure.exponent("T", each) for name, each in calls.items()}
    memory = measure.exponent("T", peaks)
    text = ("with chunks of m tokens, the time of hashing into 2 T / m buckets grew as {one factor} with one factor and as "
            "{two factors} with two, that of sorting as {sorting}, that of attention in chunks as {attention}; "
            ).format(**fits) + f"the memory of attention grew as {memory}"
    growths = {"T": 1.0, "T²": 2.0}
    numbers = dict(fits, memory=memory)
    names = {name: fit.nearest(growths) for name, fit in numbers.items()}
    if quadratic := [name for name, growth in names.items() if growth == "T²" and name != "one factor"]:
        return WRONG(f"Not only hashing with one factor grows as T², but also {' and '.join(quadratic)}: {text}.", **numbers)
    if None in names.values():
        return UNDECIDED(f"The times do not tell: {text}.", **numbers)
    if names["one factor"] == "T²":
        return CONDITIONS("It holds for sorting and attention, and for hashes of several factors; T and T log T cannot be told "
                          f"apart: {text}.", **numbers)
    return RIGHT(f"All parts grow nearly linearly: {text}.", **numbers)


@claim(51, SYSTEM, "Reversible layers keep one copy of the activations for all layers.", place=PLACE,
       paper=f"The inputs of a layer are computed again from its outputs, so activations need no memory that grows with the "
             f"depth ({PAPER}, section 3).")
def reversible(measure: Measure) -> Finding:
    """The memory of a training step over the depth, of reversible and of usual layers."""
    ids, peaks = measure.ids(1, measure.sizes(256, 1024)), {}
    for stack in ("reversible", "residual"):
        peaks[stack] = {layers: measure.memory(_step(measure.model(
            "reformer", layers=layers, width=64, context=ids.size, stack=stack), ids)) for layers in (1, 2, 4, 6, 8, 12)}
    each = {stack: (values[12] - values[2]) / 10 for stack, values in peaks.items()}
    share = each["reversible"] / each["residual"]
    text = (f"from 2 to 12 layers the memory of a step grew from {peaks['reversible'][2] / 2**20:.2f} to "
            f"{peaks['reversible'][12] / 2**20:.2f} MiB with reversible layers, and from {peaks['residual'][2] / 2**20:.2f} to "
            f"{peaks['residual'][12] / 2**20:.2f} with usual ones; a layer more keeps {100 * share:.0f} % of what a usual one "
            "keeps, its buckets")
    numbers = dict(peaks, share=share)
    if share < 0.15:
        return RIGHT(f"It is so, but for the buckets: {text}.", **numbers)
    return (CONDITIONS if share < 0.5 else WRONG)(f"A layer more needs more memory: {text}.", **numbers)


@claim(52, SYSTEM, 'Chunks save memory in the feed-forward ("FFT") layers.', place=PLACE,
       paper=f"The layers are feed-forward networks, FFN. They treat positions alone, so parts of the text can be computed one "
             f"after the other ({PAPER}, section 3).")
def chunks(measure: Measure) -> Finding:
    """The memory of a forward and a backward pass over the chunks, of a feed-forward network and of a model with wide ones."""
    ids, width, outputs = measure.ids(1, measure.sizes(1024, 4096)), 64, []
    x, peaks = measure.normal(1, ids.size, width), {"network": {}, "model": {}}
    for count in (1, 2, 4, 8, 16, 32):
        model = measure.model("reformer", layers=2, width=width, context=ids.size, ffn_chunks=count, ffn_width=16.0,
                              chunk=CHUNK, attend="chunks")
        network = model.blocks[0].ffn
        peaks["network"][count] = measure.memory(training(network, x))
        peaks["model"][count] = measure.memory(_step(model, ids))
        outputs.append(inference(network, Tensor(x))().numpy())
    saved = {what: 1 - each[16] / each[1] for what, each in peaks.items()}
    difference = max(distance(y, outputs[0]) for y in outputs)
    text = (f"a network took {peaks['network'][1] / 2**20:.2f} MiB in one chunk, {peaks['network'][4] / 2**20:.2f} in 4 and "
            f"{peaks['network'][16] / 2**20:.2f} in 16, {100 * saved['network']:.0f} % less, and a step of a model with 2 "
            f"layers {100 * saved['model']:.0f} % less; outputs changed by {difference:.0e} of the largest at most")
    numbers = dict(peaks, saved=saved, difference=difference)
    if saved["network"] > 0.1 and difference < 1e-4:
        return RIGHT(f"They do, in feed-forward networks: {text}.", **numbers)
    return WRONG(f"They do not: {text}.", **numbers)
