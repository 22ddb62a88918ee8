"""Attention sinks: where the weight of a softmax goes, what the first tokens are for, and texts of a hundred contexts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from autograd import no_grad
from autograd.random import Random

from ..compare import state_bytes
from ..evaluate import surprise
from ..ops.attention import visible
from ..sample import generate
from ..stream import Cached, mass
from ..timing import inference
from ..variants.attention_sinks import SINKS, streaming
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure

PAPER = "2309.17453"
SYSTEM, PLACE = "attention sinks", "section attention sinks"
JUMP = 0.05  # bits a token that a loss may rise by, and count as the same


class Reading(NamedTuple):
    """A trained model, the held-out text that it is tried on, and its bits a token."""

    model: Any
    text: np.ndarray
    context: int


def _trained(measure: Measure, kind: str = "first-tokens") -> Reading:
    """A small model with a kind of sink, and as much held-out text as there is."""
    size = measure.sizes(dict(context=32, width=64, layers=2, steps=150), dict(context=64, width=96, layers=4, steps=600))
    run = measure.train("attention-sinks", sink_kind=kind, sample_tokens=0, eval_tokens=20_000, eval_every=size["steps"],
                        **size)
    experiment = run.trained.experiment
    text = np.asarray(experiment.begin(run.trained.saved).corpus.held_out).astype(np.intp)
    return Reading(run.model, text, experiment.model.context)


def _bits(model: Any, text: np.ndarray) -> np.ndarray:
    """The surprise of all tokens of a text after the first, in bits, read on from a cache."""
    with no_grad():
        return Cached(model)(text, 0)[1] / math.log(2)


@claim(55, SYSTEM, "A softmax must sum to one, so the first tokens collect attention.", place=PLACE,
       paper=f"In models of billions of weights most attention above the two lowest layers goes to the first tokens ({PAPER}, "
             "section 3.1 and figure 2).")
def collects(measure: Measure) -> Finding:
    """The weight that the first four positions get in every layer of a trained model, and a key of zeros where there is one."""
    reading = _trained(measure)
    context, half = reading.context, reading.context // 2
    windows = reading.text[: 32 * context].reshape(-1, context)
    layers = [sum(weights) for weights in mass(reading.model, windows, SINKS)]
    equal = float(np.mean(SINKS / np.arange(context - half + 1, context + 1)))
    zero = [weights[-1] for weights in mass(_trained(measure, "zero").model, windows, SINKS)]
    fair = float(np.mean(1 / np.arange(context - half + 2, context + 2)))
    shares = ", ".join(f"{100 * share:.1f} %" for share in layers)
    text = (f"the first {SINKS} positions got {shares} of the weight in the layers of a small model, where equal weights would "
            f"give {100 * equal:.1f} %; a key of zeros beside the others got {', '.join(f'{100 * x:.1f} %' for x in zero)}, "
            f"where its share is {100 * fair:.1f} %")
    numbers = dict(first_positions=layers, equal=equal, zero_key=zero, share_of_a_key=fair)
    if max(layers) > 2 * equal:
        return RIGHT(f"They do: {text}.", **numbers)
    return CONDITIONS(f"The sum is one, but at this size the first tokens collect no more than others: {text}.", **numbers)


@claim(56, SYSTEM, "It is similar to LongNet, with learnable sink tokens at the beginning.", place=PLACE,
       paper=f"Any first tokens do, four line breaks as well (table 1); a learned token is one option (section 3.3). "
             f"There is no dilation, and nothing is trained ({PAPER}).")
def learnable(measure: Measure) -> Finding:
    """What is new in a model that is streamed, the distances that a query sees, and the loss with and without first tokens."""
    reading = _trained(measure)
    model, context = reading.model, reading.context
    window = context - 1 - SINKS
    text = reading.text[: measure.sizes(20, 60) * context]
    ways = {"with the first": streaming(model, window, SINKS), "without them": streaming(model, window + SINKS, 0)}
    new = sum(p.size for p in ways["with the first"].parameters()) - sum(p.size for p in model.parameters())
    bits = {name: float(_bits(way, text)[context:].mean()) for name, way in ways.items()}
    breaks = np.concatenate([np.full(SINKS, text[0]), text])  # one token four times, in place of the beginning
    bits["with one token in their place"] = float(_bits(ways["with the first"], breaks)[context + SINKS:].mean())
    length = 4 * context
    gaps = np.diff(np.flatnonzero(visible(length, length, True, window=window + 1, sinks=SINKS)[-1]))
    gaps = gaps[gaps > 1]  # one, from the first tokens to the recent ones
    steps = np.unique(np.diff(np.flatnonzero(visible(length, length, True, segment=length, dilation=4)[0, -4])))
    any_do = bits["with one token in their place"] - bits["with the first"] < JUMP
    parts = ", ".join(f"{value:.3f} {name}" for name, value in bits.items())
    told = (f"streaming added {new} weights to a trained model; the last of {4 * context} queries saw {SINKS} first and "
            f"{window + 1} recent tokens, each group without a gap, where a dilation of 4 shows every {steps[-1]}th; beyond "
            f"its context of {context} tokens, the bits a token were {parts}")
    numbers = dict(new_weights=new, bits=bits, gaps=gaps, dilated_gaps=steps)
    if new == 0 and len(gaps) == 1 and any_do:
        return WRONG(f"Nothing is learned, nothing is dilated, and any token does: {told}.", **numbers)
    return CONDITIONS(f"In part it is so: {told}.", **numbers)


@claim(57, SYSTEM, "Generation is stable and fast without end.", place=PLACE,
       paper=f"Perplexity is stable over 4 million tokens (figure 5), and a token takes up to 22.2 times less time than with "
             f"recomputation (figure 10) ({PAPER}).")
def endless(measure: Measure) -> Finding:
    """Loss beside short windows, bytes of the cache and time of a token over many contexts of a text, and what is written."""
    reading = _trained(measure)
    model, context = reading.model, reading.context
    contexts = measure.sizes(40, 100)
    text, way = reading.text[: contexts * context + 1], streaming(model, context - 1 - SINKS, SINKS)
    bits, anew = _bits(way, text), surprise(model, text) / math.log(2)
    rises = (bits - anew).reshape(contexts, context).mean(axis=1)  # over windows that begin without a past, in every context
    quarters = [float(part.mean()) for part in np.array_split(rises, 4)]
    error = float(np.std(rises, ddof=1)) * math.sqrt(2 / len(rises[::4]))  # of the difference of two quarters
    steps, sizes = {}, {}
    with no_grad():
        state = way.init_state(1)
        for number, part in enumerate(text[:-1].reshape(contexts, 1, context), 1):
            _, state = way.prefill(part, state)
            if number in (3, contexts):
                sizes[number] = state_bytes(state.blocks)
                steps[number] = inference(way.prefill, text[None, :1], state)
    late = measure.ratio(steps[contexts], steps[3])
    long, length = measure.model("attention-sinks", context=512, width=64, layers=2), 511
    with no_grad():
        ids = measure.ids(1, length + 1)
        _, full = long.prefill(ids[:, :length], long.init_state(1))
    slower = measure.ratio(inference(long, ids, at=np.array([length])), inference(long.prefill, ids[:, length:], full))
    written = np.fromiter(generate(way, text[:1], contexts * context, Random(0)), np.intp)
    variety = len(np.unique(written[-context:]))
    told = (f"over {contexts} contexts of {context} tokens it took {bits.mean():.2f} bits a token; compared with windows that "
            f"begin without a past, its four quarters took {', '.join(f'{x:+.3f}' for x in quarters)} bits more; the cache had "
            f"{sizes[3]} bytes after 3 contexts and {sizes[contexts]} at the end, where a token took {late} times as long; a "
            f"token takes {slower} times as long where 512 tokens are read anew for it; of the last {context} of "
            f"{len(written)} that it wrote, {variety} were different")
    numbers = dict(bits=float(bits.mean()), rises=quarters, error=error, bytes=sizes, time_late=late.value,
                   time_anew=slower.value)
    stable = max(quarters[1:]) - quarters[0] < max(JUMP, 2 * error) and sizes[3] == sizes[contexts]
    if not stable:
        return WRONG(f"It does not stay as it is: {told}.", **numbers)
    if late.low < 1.2 and slower.low > 1 and variety > 1:
        return RIGHT(f"Loss, memory and time stay as they are: {told}.", **numbers)
    return UNDECIDED(f"Loss and memory stay as they are, the times do not tell: {told}.", **numbers)
