"""The Transformer: how its time, memory and cache grow."""

from __future__ import annotations

import math
from contextlib import nullcontext

from autograd import use

from ..ops import attention
from ..timing import inference, training
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Fit, Measure

PAPER = "1706.03762"
TILES = "2205.14135"  # FlashAttention
PLACE = "section Transformer"


def qkv(measure: Measure, length: int, width: int = 64) -> tuple:
    """Queries, keys and values of one head."""
    return tuple(measure.normal(1, 1, length, width) for _ in range(3))


@claim(1, "Transformer", "The time of a Transformer grows as T log T times d.", place=PLACE,
       paper=f"Table 1 of {PAPER} has O(T² d) for attention, and the projections add O(T d²).")
def time(measure: Measure) -> Finding:
    """The exponents of the time of attention in T and in d, and those of a whole layer, with its projections."""
    lengths = measure.sizes((512, 768, 1024, 1536, 2048, 3072), (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192))
    widths = measure.sizes((64, 96, 128, 192, 256, 384), (64, 96, 128, 192, 256, 384, 512))
    in_t = measure.exponent("T", {t: inference(attention, *qkv(measure, t)) for t in lengths})
    in_d = measure.exponent("d", {d: inference(attention, *qkv(measure, 512, d)) for d in widths})
    layer_t = measure.exponent("T", {t: measure.layer("transformer", t, 64) for t in lengths})
    layer_d = measure.exponent("d", {d: measure.layer("transformer", 64, d) for d in (*widths, 768, 1024)})
    growth = in_t.nearest({"T": 1, "T log T": lambda t: t * math.log(t), "T²": 2})
    measured = (f"The time of attention grows as {in_t} and {in_d}; that of a layer of width 64 as {layer_t}, and of 64 "
                f"positions as {layer_d}.")
    verdict = UNDECIDED if growth is None else RIGHT if growth == "T log T" else WRONG
    return verdict(measured, attention_in_T=in_t, attention_in_d=in_d, layer_in_T=layer_t, layer_in_d=layer_d)


def memories(measure: Measure, calls: dict[int, object], form: str | None = None) -> Fit:
    """The exponent of the memory of calls over T, by a form of attention or by its kernels."""
    with nullcontext() if form is None else use(attention, form=form):
        return measure.exponent("T", {t: measure.memory(call) for t, call in calls.items()})


LENGTHS = (256, 384, 512, 768, 1024, 1536), (256, 384, 512, 768, 1024, 1536, 2048, 3072)


@claim(2, "Transformer", "Its space grows as T² plus T times d.", place=PLACE,
       paper=f"It holds where all scores are stored; computed in tiles, attention needs O(T d) ({TILES}).")
def space(measure: Measure) -> Finding:
    """The exponents in T of the memory of attention and its gradients, with stored scores and in tiles."""
    calls = {t: training(attention, *qkv(measure, t)) for t in measure.sizes(*LENGTHS)}
    return _of_memory("attention with its gradients", memories(measure, calls, "parallel"), memories(measure, calls))


def _of_memory(what: str, stored: Fit, tiled: Fit) -> Finding:
    """The verdict on memory that grows with T²."""
    growths = {"T": 1, "T²": 2}
    measured = f"The memory of {what} grows as {stored} where the scores are stored, and as {tiled} in tiles."
    found = stored.nearest(growths), tiled.nearest(growths)
    verdict = {("T²", "T²"): RIGHT, ("T²", "T"): CONDITIONS, ("T", "T"): WRONG}.get(found, UNDECIDED)
    return verdict(measured, stored=stored, tiled=tiled)


@claim(3, "Transformer", "The cache of keys and values grows with the context and is a heavy load.", place=PLACE,
       paper="It is right: each layer keeps 2 T d numbers, and every new token reads them all (1911.02150).")
def cache(measure: Measure) -> Finding:
    """The bytes of the state and the time of a new token after t tokens, and from which t on the cache outweighs the model."""
    positions = measure.sizes((128, 256, 512, 1024, 2048, 4096), (128, 256, 512, 1024, 2048, 4096, 8192, 16384))
    model = measure.model("transformer", context=positions[-1] + 64, width=64, layers=2, positions="none")
    weights = sum(parameter.data.nbytes for parameter in model.parameters())
    sizes = {t: measure.state_bytes(model, t) for t in positions}
    in_t = measure.exponent("t", sizes)
    times = {t: min(seconds) for t, seconds in measure.steps(model, positions).items()}
    slower = times[positions[-1]] / times[positions[0]]
    heavy = next((t for t, size in sizes.items() if size > weights), None)
    first, last = positions[0], positions[-1]
    weighs = "stays below" if heavy is None else f"at t = {heavy} it is above"
    measured = (f"The cache of 2 layers of width 64 grows as {in_t}, by {sizes[first] / first:,.0f} bytes a token, and "
                f"{weighs} the {weights / 1e3:.0f} kB of weights; a token takes {1e6 * times[first]:.0f} µs after {first} "
                f"tokens and {1e6 * times[last]:.0f} µs after {last:,}.")
    grows = in_t.nearest({"constant": 0, "t": 1}) == "t"
    verdict = WRONG if not grows else RIGHT if heavy is not None and slower > 1.5 else CONDITIONS
    return verdict(measured, state=in_t, bytes_of_weights=weights, heavier_from=heavy, seconds_of_a_token=times)


@claim(4, "Transformer", "Its memory grows quadratically with the context.", place=PLACE,
       paper=f"It holds where all scores are stored, and for no kernel that computes them in tiles ({TILES}).")
def quadratic(measure: Measure) -> Finding:
    """The exponents in T of the memory of a whole model's logits and gradients, with stored scores and in tiles."""
    lengths = measure.sizes(*LENGTHS)
    model = measure.model("transformer", context=lengths[-1], width=32, layers=1, heads=2)
    calls = {t: training(model, measure.ids(1, t), weights=model.parameters()) for t in lengths}
    return _of_memory("a model with its gradients", memories(measure, calls, "parallel"), memories(measure, calls))
