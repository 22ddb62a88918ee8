"""LongNet: how its time and memory grow, what its outputs are, and what ranks that share a text send (Ding et al. 2023)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from autograd import Tensor, no_grad, use
from autograd.metric import distance

from ..ops import attention, dilated_attention
from ..ops.dilated_attention import on_rank
from ..timing import crossover, inference
from ..variants.longnet import patterns
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure, lower, span

PAPER = "2307.02486"
PLACE = "section LongNet"
EXACT = 1e-10  # of two sides of an equation in float64
PUBLISHED = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)  # segments and dilations of the paper's language models
PART = 4096  # tokens of a rank
HEADS, WIDTH = 4, 16  # of the attention that ranks share, and of each head
FLOAT = 4  # bytes


def _dilated(measure: Measure, T: int, d: int = 64, form: str | None = None) -> Callable[[], Any]:
    """A call of dilated attention in heads of 16 channels, with the patterns of the variant."""
    segments, dilations = patterns(None, T)
    q, k, v = (measure.normal(1, d // WIDTH, T, WIDTH) for _ in range(3))

    def call() -> Any:
        way = use("dilated_attention", kernel="cpu") if form is None else use("dilated_attention", form=form)
        with no_grad(), way:
            return dilated_attention(q, k, v, segments=segments, dilations=dilations)

    return call


@claim(32, "LongNet", "Time grows as T d.", place=PLACE,
       paper=f"Equation (18) of {PAPER} shows it, where segments and dilations grow by one factor.")
def time(measure: Measure) -> Finding:
    """The exponents in T and d of dilated attention whose longest segment is the text, and where it falls below attention."""
    sizes = measure.sizes((256, 512, 1024, 2048, 4096, 8192), (512, 1024, 2048, 4096, 8192, 16384, 32768))
    in_t = measure.exponent("T", {T: _dilated(measure, T) for T in sizes})
    in_d = measure.exponent("d", {d: _dilated(measure, 2048, d) for d in (32, 64, 96, 128, 192, 256)})
    some = [T for T in sizes if T <= 4096]  # attention to a longer text takes seconds
    dense = measure.times({T: inference(attention, *(measure.normal(1, HEADS, T, WIDTH) for _ in range(3))) for T in some})
    dense, sparse = [min(dense[T]) for T in some], [dict(in_t.points)[T] for T in some]
    below = crossover(some, sparse, dense)
    where = (f"below attention's from T = {below} on" if below else
             f"{'below' if sparse[-1] < dense[-1] else 'above'} attention's at all of {some[0]} to {some[-1]} tokens")
    measured = (f"Time grows as {in_t} and {in_d}. It is {where}, and {dense[-1] / sparse[-1]:.2g} times less at {some[-1]}.")
    numbers = {"T": in_t, "d": in_d, "crossover": below, "attention": dict(zip(some, dense, strict=True))}
    growths = in_t.nearest({"T": 1, "T²": 2}), in_d.nearest({"d": 1, "d²": 2})
    if None in growths:
        return UNDECIDED(measured, **numbers)
    return (RIGHT if growths == ("T", "d") else WRONG)(measured, **numbers)


@claim(33, "LongNet", "Space grows as T/r log(T/r) d.", place=PLACE,
       paper=f"No bound for the space is in {PAPER}. The patterns together keep less than 2 T d numbers; the paper's logarithm "
             "is that of the number of layers between two tokens.")
def space(measure: Measure) -> Finding:
    """The exponents in T of the memory of dilated attention whose patterns grow with the text: of the kernel, which adds up
    all patterns in one output, and of the form that has an output for each.
    """
    sizes = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    measure.progress("memory of dilated attention")
    kernel = measure.exponent("T", {T: measure.memory(_dilated(measure, T)) for T in sizes})
    with use("attention", kernel="cpu"):
        form = measure.exponent("T", {T: measure.memory(_dilated(measure, T, form="mixture")) for T in sizes})
    growths = [fit.nearest({"T": 1, "T log T": lambda T: T * math.log(T), "T²": 2}) for fit in (kernel, form)]
    measured = f"The kernel's memory grows as {kernel}, that of the form which keeps the output of every pattern as {form}."
    numbers = {"kernel": kernel, "form": form}
    if None in growths:
        return UNDECIDED(measured, **numbers)
    if growths == ["T", "T"]:
        return WRONG(measured + " So it is T, without a logarithm.", **numbers)
    if "T²" in growths:
        return WRONG(measured, **numbers)
    return CONDITIONS(measured + f" So it is {growths[0]} in one and {growths[1]} in the other.", **numbers) if (
        "T" in growths) else RIGHT(measured, **numbers)


@claim(34, "LongNet", "The outputs of the pairs of segment and dilation are weighted by their softmax denominators.",
       place=PLACE, paper=f"Equations (9) and (10) of {PAPER} are this.")
def mixture(measure: Measure) -> Finding:
    """The patterns' outputs, weighted by the sums of their softmaxes, and one softmax in which a key counts once for each
    pattern that shows it, beside the operator; and their plain mean.
    """
    T, (segments, dilations) = 96, ((16, 32, 96), (1, 2, 4))
    q, k, v = measure.rng.normal(size=(3, 1, HEADS, T, WIDTH))
    y = dilated_attention(q, k, v, segments=segments, dilations=dilations)[0].numpy()
    parts = [attention(q, k, v, segment=w, dilation=r) for w, r in zip(segments, dilations, strict=True)]
    outputs, sums = np.stack([part[0].numpy() for part in parts]), np.exp([part[1].numpy() for part in parts])
    weighted = (sums[..., None] * outputs).sum(axis=0) / sums.sum(axis=0)[..., None]
    p, counts = np.arange(T), np.zeros((HEADS, T, T))
    for w, r in zip(segments, dilations, strict=True):
        kept = p % w % r == np.arange(HEADS)[:, None] % r  # [H T]
        counts += kept[:, :, None] & kept[:, None] & (p[:, None] // w == p // w) & (p <= p[:, None])
    weights = counts * np.exp(q @ k.swapaxes(2, 3) / math.sqrt(WIDTH))
    errors = {"weighted": distance(weighted, y), "one softmax": distance(weights / weights.sum(axis=3, keepdims=True) @ v, y)}
    plain = distance(outputs.mean(axis=0), y)
    measured = (f"The outputs weighted by the denominators differ from the operator by {errors['weighted']:.1e}, one softmax "
                f"over all that the patterns show by {errors['one softmax']:.1e}, and the plain mean by {plain:.2f}.")
    return (RIGHT if max(errors.values()) < EXACT < plain else WRONG)(measured, errors=errors, plain=plain)


# -- ranks -------------------------------------------------------------------------------------------------------------
def _rank(measure: Measure, segments: tuple[int, ...], dilations: tuple[int, ...], part: int,
          causal: bool = True) -> Callable[[int, int], Any]:
    """A function of a position and a length that computes what the rank with the part there does in a text of that length.

    The text repeats itself after a part, so that it need not be stored; it does not matter which keys a rank gathers. The
    function returns the output, the logarithms of the sums, and the numbers received for each pattern.
    """
    q, k, v = (measure.normal(1, HEADS, part, WIDTH) for _ in range(3))

    def gather(heads: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        return tuple(Tensor.wrap(x[:, heads][:, :, positions % part]) for x in (k, v))

    def call(first: int, length: int) -> Any:
        with no_grad():
            return on_rank(Tensor.wrap(q), gather, first, 0, length, segments, dilations, "modulo", causal, None, own=first)

    return call


def _busy(length: int, dilations: tuple[int, ...], part: int) -> list[int]:
    """Where parts begin that receive much: the first, the last, and for each dilation the last that holds a kept position."""
    return sorted({0} | {(length - max(r, part)) // part * part for r in (1, *dilations) if r <= length})


@claim(35, "LongNet", "Its distributed algorithm communicates the same amount, however long the text is.", place=PLACE,
       paper=f"Section 3.1 of {PAPER}: what a rank gathers for a pattern has w / r keys and values, for any length.")
def communication(measure: Measure) -> Finding:
    """The bytes that a rank receives at most in one layer, counted in the patterns, while text and ranks grow together: with
    the paper's patterns, and with patterns up to the length of the text, in a causal model and in both directions.
    """
    lengths = [2**n for n in range(16, 16 + measure.sizes(5, 8))]
    first, last = lengths[0], lengths[-1]
    received: dict[str, dict[int, int]] = {}
    for name, grows, causal in (("the paper's patterns", False, True), ("patterns up to the length of the text", True, True),
                                ("the same in both directions", True, False)):
        measure.progress(f"ranks with {name}")
        received[name] = {}
        for T in lengths:
            segments, dilations = patterns(None, T) if grows else PUBLISHED
            run = _rank(measure, segments, dilations, PART, causal)
            places = range(0, T, PART) if T == first else _busy(T, dilations, PART)  # of the shortest text all
            received[name][T] = FLOAT * max(sum(run(place, T)[2]) for place in places)
    whole = {T: FLOAT * 2 * HEADS * WIDTH * (T - PART) for T in lengths}  # attention needs all other keys and values
    measured = f"Where a rank has {PART} tokens of a text of {first} or of {last}, it receives at most " + ", ".join(
        f"{sizes[first] / 1e3:.0f} and {sizes[last] / 1e3:.0f} kB with {name}" for name, sizes in (*received.items(),
                                                                                           ("attention", whole))) + "."
    numbers = {"received": received, "attention": whole}
    fixed, *growing = ([sizes[T] for T in lengths] for sizes in received.values())
    if len(set(fixed)) > 1:
        return WRONG(measured, **numbers)
    if all(len(set(sizes[2:])) == 1 for sizes in growing):
        return RIGHT(measured, **numbers)
    return CONDITIONS(measured + " So it is constant for a set of patterns, and grows with their number where that grows.",
                      **numbers)


@claim(36, "LongNet", "It reads texts of a billion tokens.", place=PLACE,
       paper=f"The time of a forward pass is in {PAPER} up to a billion tokens, perplexities up to 32 thousand.")
def billion(measure: Measure) -> Finding:
    """The memory and the time of dilated attention on the busiest of the ranks that share a text, for texts of 65 thousand to a
    billion tokens; and a rank's result beside the same part of the whole.
    """
    error, rows, calls = _rank_error(measure), {}, {}
    for exponent in measure.sizes((16, 20, 30), (16, 18, 20, 22, 24, 26, 28, 30)):
        T = 2**exponent
        segments, dilations = patterns(None, T)
        run = _rank(measure, segments, dilations, PART)
        received = {place: sum(run(place, T)[2]) for place in _busy(T, dilations, PART)}
        calls[T] = partial(run, max(received, key=received.get), T)
        measure.progress(f"a rank of {T // PART}")
        rows[T] = {"ranks": T // PART, "attention": FLOAT * 2 * T * HEADS * WIDTH, "besides": measure.memory(calls[T]),
                   "held": FLOAT * (4 * PART * HEADS * WIDTH + max(received.values()))}  # q, k, v, y, and what is gathered
    for T, seconds in measure.times(calls).items():
        rows[T]["seconds"] = min(seconds)
    short, million, longest = rows[2**16], rows[2**20], rows[2**30]

    def all_of(name: str, unit: float, form: str) -> str:
        return ", ".join(f"{row[name] / unit:{form}}" for row in (short, million, longest))

    measured = (f"With {PART} tokens of a text of 65 thousand, a million and a billion, a rank holds "
                f"{all_of('held', 1e6, '.2f')} MB of queries, keys, values and outputs, with what it gathers. Dilated "
                f"attention takes {all_of('besides', 1e6, '.0f')} MB and {all_of('seconds', 1, '.2g')} s; all keys and values "
                f"of the text are {all_of('attention', 1e6, ',.0f')} MB. What ranks compute differs from the whole by "
                f"{error:.1e}.")
    grows = max(longest[name] / short[name] for name in ("held", "besides", "seconds"))
    if error > EXACT or grows > 4:
        return WRONG(measured, error=error, lengths=rows)
    return CONDITIONS(measured + f" So {longest['ranks']} such ranks can read a billion tokens; what a model would learn from "
                      "them, nobody has measured.", error=error, lengths=rows)


def _rank_error(measure: Measure) -> float:
    """How far the outputs of ranks are from the whole, for a short text in float64."""
    T, part, (segments, dilations) = 256, 64, ((16, 32, 128, 256), (1, 2, 4, 8))
    q, k, v = measure.rng.normal(size=(3, 1, HEADS, T, WIDTH))
    whole = dilated_attention(q, k, v, segments=segments, dilations=dilations)[0].numpy()

    def gather(heads: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        return tuple(Tensor.wrap(x[:, heads][:, :, positions]) for x in (k, v))

    with no_grad():
        parts = [on_rank(Tensor.wrap(q[:, :, first:first + part]), gather, first, 0, T, segments, dilations, "modulo", True,
                         None, own=first)[0].numpy() for first in range(0, T, part)]
    return distance(np.concatenate(parts, axis=2), whole)


@claim(37, "LongNet", "Segment lengths and dilations grow from layer to layer.", place=PLACE,
       paper=f"Section 4.1 of {PAPER} has the same five patterns in every layer; they grow from pattern to pattern.")
def depth(measure: Measure) -> Finding:
    """Held-out losses after as many steps on the same text: of all patterns in every layer, of one pattern in each layer that
    grows with the depth, and of the nearest tokens and such a pattern.
    """
    steps, ladders = measure.sizes(40, 300), {
        "all patterns in every layer": "16:1,32:2,64:4,128:8", "one pattern in each layer": "16:1/32:2/64:4/128:8",
        "the nearest tokens and one pattern in each layer": "16:1/16:1,32:2/16:1,64:4/16:1,128:8"}
    losses = {name: [measure.train("longnet", context=128, width=64, layers=4, heads=8, batch=8, steps=steps, eval_every=steps,
                                   eval_tokens=20_000, sample_tokens=0, segments=segments, seed=seed).loss
                     for seed in range(measure.sizes(2, 3))] for name, segments in ladders.items()}
    every, *growing = losses.values()
    best = min(growing, key=statistics.fmean)
    products = [sum(w / r**2 for each in segments.split("/") for w, r in zip(*patterns(each, 128), strict=True)) * (
        1 if "/" in segments else 4) for segments in ladders.values()]
    measured = "The losses are " + ", ".join(
        f"{span(each)} nats with {name} ({count:.0f} scores a token in all layers)"
        for (name, each), count in zip(losses.items(), products, strict=True)) + ". "
    if lower(best, every):
        return CONDITIONS(measured + "So patterns may grow with the depth, but the paper's do not.", losses=losses)
    rank = "worse" if lower(every, best) else "no better"
    return WRONG(measured + f"So growth with the depth is {rank}, and not what the paper has.", losses=losses)
