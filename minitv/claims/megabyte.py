"""MEGABYTE: how its time and memory grow, what feed-forward layers cost, and what its two models are worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autograd import cross_entropy, use
from autograd.random import Random

from ..ops import attention
from ..sample import generate
from ..timing import inference
from . import CONDITIONS, RIGHT, UNDECIDED, UNTESTABLE, WRONG, Finding, claim
from ._shapes import above, products
from .measure import Measure, fitted, span

PAPER = "2305.07185"
SYSTEM, PLACE = "MEGABYTE", "section MEGABYTE"


def _among(measure: Measure, length: int, patch: int, width: int = 64) -> Any:
    """A call of attention among the patches of a text."""
    return inference(attention, *(measure.normal(1, 1, length // patch, width) for _ in range(3)))


def _inside(measure: Measure, length: int, patch: int, width: int = 64) -> Any:
    """A call of attention inside each of them."""
    return inference(attention, *(measure.normal(length // patch, 1, patch, width) for _ in range(3)))


def pairs_of(length: int, patch: int) -> int:
    """The pairs of a query and a key, among patches and inside them."""
    patches = length // patch
    return patches * (patches + 1) // 2 + length * (patch + 1) // 2


@claim(38, SYSTEM, "Its time grows as T^(4/3) times d.", place=PLACE,
       paper=f"Attention costs O(T² / P² + T P), which is O(T^(4/3)) for P = T^(1/3); all other layers cost O(T), and the "
             f"experiments on text have P = 8 ({PAPER}, section 3.1).")
def time(measure: Measure) -> Finding:
    """The exponents in T of attention among and inside patches of T^(1/3) tokens, of its pairs of a query and a key, which are
    counted, of attention among patches of 8, and of a model.
    """
    patches = measure.sizes((16, 20, 24, 28, 32, 36), (24, 28, 32, 40, 48, 56))
    among, inside = (measure.exponent("T", {p**3: call(measure, p**3, p) for p in patches}) for call in (_among, _inside))
    lengths = measure.sizes([2**k for k in range(11, 17)], [2**k for k in range(12, 18)])
    fixed = measure.exponent("T", {length: _among(measure, length, 8) for length in lengths})
    calls = {}
    for length in measure.sizes((256, 512, 1024, 2048, 4096, 8192), (1024, 2048, 4096, 8192, 16384, 24576)):
        model = measure.model("megabyte", context=length, width=64, layers=2, patch="8")
        calls[length] = inference(model, measure.ids(1, length))
    whole = measure.exponent("T", calls)
    pairs = fitted("T", [(p**3, pairs_of(p**3, p)) for p in patches])
    numbers = dict(pairs=pairs, among=among, inside=inside, among_patches_of_8=fixed, model=whole)
    text = (f"with P = T^(1/3) the pairs of a query and a key grow as {pairs}, the time of attention among patches grew as "
            f"{among}, and that inside them, where what a token costs by itself weighs more, as {inside}; with P = 8 the "
            f"time of attention among patches grew as {fixed}, and that of a whole model of up to {max(calls)} tokens as "
            f"{whole}")
    growths = {"T": 1.0, "T^(4/3)": 4 / 3, "T²": 2.0}
    if max(among.low, inside.low) > 5 / 3 or among.high < 1:
        return WRONG(f"Attention does not grow so even with the best patch: {text}.", **numbers)
    if whole.nearest(growths) == fixed.nearest(growths) == "T^(4/3)":
        return RIGHT(f"All of it grows so: {text}.", **numbers)
    if fixed.low <= 4 / 3 and whole.nearest(growths) != "T":
        return UNDECIDED(f"The times do not tell: {text}.", **numbers)
    return CONDITIONS(f"It is so for the pairs of attention alone: {text}.", **numbers)


@claim(39, SYSTEM, "Its space grows as T log T times d.", place=PLACE,
       paper=f"There is no such bound and no logarithm in {PAPER}: activations take O(T (D/P + d)) in each layer, and stored "
             "scores O(T² / P² + T P).")
def space(measure: Measure) -> Finding:
    """The exponent in T of the memory of a training step, beside that of T log T over the same lengths."""
    peaks, stored = {}, {}
    for length in measure.sizes((128, 256, 512, 1024, 2048, 4096), (512, 1024, 2048, 4096, 8192, 16384)):
        model, ids = measure.model("megabyte", context=length, width=64, layers=2, patch="8"), measure.ids(1, length)

        def step(model: Any = model, ids: np.ndarray = ids) -> None:
            cross_entropy(model(ids), ids).backward(sink=lambda leaf, gradient: None)

        peaks[length] = measure.memory(step)
        if length <= 8192:
            with use("attention", form="parallel"):
                stored[length] = measure.memory(step)
    fit, last = measure.exponent("T", peaks), max(stored)
    each = {length: round(peak / length) for length, peak in peaks.items()}
    first, longest = min(peaks), max(peaks)
    text = (f"the memory of a training step grew as {fit}: {each[first]} bytes for each of {first} tokens, {each[longest]} for "
            f"each of {longest}; with T log T they would be {math.log(longest) / math.log(first):.2f} times as many. "
            f"With stored scores, a step of {last} tokens took {stored[last] / peaks[last]:.2f} times the memory")
    numbers = dict(memory=fit, bytes_per_token=each, stored_scores=stored)
    growth = fit.nearest({"T": 1.0, "T log T": lambda t: t * math.log(t), "T^(4/3)": 4 / 3})
    if growth is None:
        return UNDECIDED(f"It may be so or not: {text}.", **numbers)
    return (RIGHT if growth == "T log T" else WRONG)(f"It grows as {growth}: {text}.", **numbers)


@claim(40, SYSTEM, "Feed-forward layers take 98 % of all operations.", place=PLACE,
       paper=f"The introduction of {PAPER} says more than 98 % for GPT-3, and section 3.1 says 1.4 % for attention's own "
             "product. So the 98 % include the projections to queries, keys, values and outputs.")
def feed_forward(measure: Measure) -> Finding:
    """Products for a token, counted from the shapes of the weights of GPT-3 and of the presets."""
    shapes = {"GPT-3": (2048, 96, 12288, 96), "GPT-3 with a context of 32768": (32768, 96, 12288, 96),
              "nanogpt-cpu": (64, 4, 128, 4), "small": (256, 6, 384, 6)}
    counts = {name: products(*shape) for name, shape in shapes.items()}
    alone = {name: each.share("ffn") for name, each in counts.items()}
    both = {name: each.share("ffn", "projections") for name, each in counts.items()}
    parts = "; ".join(f"{name}: {100 * alone[name]:.1f} %, and {100 * both[name]:.1f} % with the projections of attention"
                      for name in shapes)
    numbers = dict(feed_forward={name: round(x, 4) for name, x in alone.items()},
                   with_projections={name: round(x, 4) for name, x in both.items()})
    if alone["GPT-3"] > 0.97:
        return RIGHT(f"Feed-forward networks alone take it ({parts}).", **numbers)
    if both["GPT-3"] > 0.97:
        return CONDITIONS(f"It holds for GPT-3 if the projections of attention count as feed-forward layers ({parts}).",
                          **numbers)
    return WRONG(f"They take less ({parts}).", **numbers)


@claim(41, SYSTEM, "A model of 1.5 billion weights is 40 % faster than a Transformer of 350 million.", place=PLACE,
       paper=f"It is so for writing 8192 bytes: 93 s with models of 1.3 and 0.2 billion weights, 132 s with a Transformer "
             f"whose context is 1024 ({PAPER}, table 9).")
def writing(measure: Measure) -> Finding:
    """The speed of writing of MEGABYTE with as many weights as a Transformer, and with more than four times as many."""
    context, width = measure.sizes((128, 256), (512, 384))
    models = {
        "transformer": measure.model("transformer", context=context, width=width, layers=4),
        "equal": measure.model("megabyte", context=context, width=width, layers=4, patch="8", local_layers="2"),
        "larger": measure.model("megabyte", context=context, width=3 * width, layers=4, patch="8", local_layers="2",
                                local_widths=str(width // 2))}
    sizes = {name: sum(p.size for p in model.parameters()) for name, model in models.items()}

    def write(name: str) -> Any:
        return lambda: sum(1 for _ in generate(models[name], np.zeros(1, np.intp), context - 1, Random(0)))

    equal, larger = (measure.ratio(write("transformer"), write(name)) for name in ("equal", "larger"))
    more = sizes["larger"] / sizes["transformer"]
    text = (f"with P = 8 and as many weights as a Transformer, {sizes['transformer'] / 1e6:.1f} million, it wrote "
            f"{context} tokens {equal} times as fast; with {more:.1f} times as many {larger} times as fast")
    numbers = dict(weights=sizes, equal=equal.value, larger=larger.value)
    if larger.low > 1 and more > 4:
        return CONDITIONS(f"It concerns writing, and holds there at a small size too: {text}.", **numbers)
    return UNTESTABLE(f"Billions of weights do not fit here. Of what does, {text}.", **numbers)


@claim(42, SYSTEM, "It is worse without its local or its global model.", place=PLACE,
       paper=f"Without the local model it has 1.263 bits per byte of articles in place of 0.687, without the global one 1.373 "
             f"({PAPER}, table 10).")
def ablation(measure: Measure) -> Finding:
    """Held-out losses of text and of drawn digits where all blocks are in both models, or in one of them, for equal weights."""
    blocks = {"both": "2", "no local blocks": "0", "no global blocks": "4"}
    size = measure.sizes(dict(width=32, steps=60, seeds=1), dict(width=64, steps=200, seeds=2))
    options = dict(layers=4, width=size["width"], steps=size["steps"], warmup=20, eval_every=size["steps"])
    losses: dict[tuple[str, str], list[float]] = {}
    for task, more in (("text", dict(sample_tokens=0, eval_tokens=20_000)), ("images", dict(eval_examples=200))):
        for name, local in blocks.items():
            losses[task, name] = [measure.train("megabyte", task=task, local_layers=local, seed=seed, **options, **more).loss
                                  for seed in range(size["seeds"])]
    kept = [(task, name) for task, name in losses if name != "both" and not above(losses[task, name], losses[task, "both"])]
    parts = "; ".join(f"{task}: " + ", ".join(f"{name} {span(losses[task, name])}" for name in blocks)
                      for task in ("text", "images"))
    text = f"nats a token after {size['steps']} steps with 4 blocks of width {size['width']}, {parts}"
    numbers = dict(losses={f"{task}, {name}": values for (task, name), values in losses.items()})
    if not kept:
        return RIGHT(f"Both models are needed: {text}.", **numbers)
    if len(kept) < 4:
        where = ", ".join(f"{task} with {name}" for task, name in kept)
        return CONDITIONS(f"It is so in {4 - len(kept)} cases of 4, and not for {where}: {text}.", **numbers)
    return WRONG(f"Nothing is lost: {text}.", **numbers)
