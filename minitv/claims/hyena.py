"""Hyena: what its convolutions cost, where they overtake attention, and what its filters are."""

from __future__ import annotations

import math

import numpy as np

from autograd import causal_conv1d, no_grad, use

from ..nn import Module
from ..ops import attention, long_conv
from ..timing import crossover, inference, training
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from .measure import Measure
from .rwkv import error_of

PAPER = "2302.10866"
PLACE = "section Hyena"


def _mixer(measure: Measure, length: int, width: int, order: int = 2) -> Module:
    """The mixer of a new model."""
    return measure.model("hyena", context=length, width=width, layers=1, order=order).blocks[0].mixer


def _call(measure: Measure, length: int, width: int, order: int = 2):
    """A call of a mixer without the tape."""
    return inference(_mixer(measure, length, width, order), measure.normal(1, length, width))


@claim(14, "Hyena", "The time of Hyena grows as N times T times d times (log T + d).", place=PLACE,
       paper=f"It is right: this is proposition 3.2 of {PAPER}.")
def time(measure: Measure) -> Finding:
    """The exponents of the time of a long convolution in T, and those of a mixer in its width d and its order N."""
    lengths = measure.sizes((1024, 2048, 4096, 8192, 16384, 32768), (1024, 2048, 4096, 8192, 16384, 32768, 65536))
    widths, orders = (256, 320, 384, 512, 640, 768), (2, 3, 4, 6, 8, 12)
    in_t = measure.exponent("T", {t: inference(long_conv, measure.normal(1, t, 32), measure.normal(t, 32)) for t in lengths})
    in_d = measure.exponent("d", {d: _call(measure, 128, d) for d in measure.sizes(widths, (*widths, 1024))})
    in_n = measure.exponent("N", {n: _call(measure, 512, 64, n) for n in orders})
    measured = f"The time of a convolution grows as {in_t}, that of a mixer as {in_d} and {in_n}."
    found = (in_t.nearest({"T log T": lambda t: t * math.log(t), "T²": 2}),
             in_d.nearest({"1": 1, "2": 2}), in_n.nearest({"0": 0, "1": 1, "2": 2}))
    verdict = UNDECIDED if None in found else RIGHT if found == ("T log T", "2", "1") else WRONG
    return verdict(measured, convolution_in_T=in_t, mixer_in_d=in_d, mixer_in_N=in_n)


@claim(15, "Hyena", "The space of Hyena grows as T times d.", place=PLACE,
       paper=f"There is no bound for it in {PAPER}; what is kept for the gradients is O(N T d).")
def space(measure: Measure) -> Finding:
    """The exponents of the memory of a mixer with its gradients in T, in d and in the order N."""
    def memory(length: int, width: int, order: int) -> int:
        mixer = _mixer(measure, length, width, order)
        return measure.memory(training(mixer, measure.normal(1, length, width), weights=mixer.parameters()))

    lengths = measure.sizes((512, 768, 1024, 1536, 2048, 3072), (512, 1024, 1536, 2048, 4096, 8192, 16384))
    in_t = measure.exponent("T", {t: memory(t, 64, 2) for t in lengths})
    in_d = measure.exponent("d", {d: memory(512, d, 2) for d in (64, 96, 128, 192, 256, 384)})
    in_n = measure.exponent("N", {n: memory(512, 64, n) for n in (2, 3, 4, 6, 8, 12)})
    measured = f"The memory of a mixer with its gradients grows as {in_t}, {in_d} and {in_n}."
    found = tuple(fit.nearest({"0": 0, "1": 1, "2": 2}) for fit in (in_t, in_d, in_n))
    verdict = {("1", "1", "1"): CONDITIONS, ("1", "1", "0"): RIGHT}.get(found, WRONG)
    if verdict is CONDITIONS:
        measured += " So it is T times d for one order N."
    return (UNDECIDED if None in found else verdict)(measured, in_T=in_t, in_d=in_d, in_N=in_n)


@claim(16, "Hyena", "It is twice as fast as optimised attention at long T, and overtakes attention near 2048 positions and "
       "FlashAttention between 4096 and 8192.", place=PLACE,
       paper=f"It is right for the kernels of that time, order 2 and a batch of 64 ({PAPER}, section 4.4).")
def speed(measure: Measure) -> Finding:
    """Where the time of a mixer of width 128 falls below that of attention, with stored scores and in tiles."""
    lengths = measure.sizes((256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024, 2048, 4096, 8192, 16384))
    stored = [t for t in lengths if t <= measure.sizes(2048, 4096)]

    def dense(length: int, form: bool):
        mixer = measure.model("transformer", context=length, width=128, layers=1, heads=2, positions="none").blocks[0].mixer
        call = inference(mixer, measure.normal(1, length, 128))

        def by_form():
            with use(attention, form="parallel"):
                return call()

        return by_form if form else call

    calls = {("Hyena", t): _call(measure, t, 128) for t in lengths} | {("tiles", t): dense(t, False) for t in lengths}
    calls |= {("stored", t): dense(t, True) for t in stored}
    times = {name: min(each) for name, each in measure.times(calls, measure.sizes(3.0, 12.0)).items()}
    places = {}
    for kind, at in (("stored", stored), ("tiles", lengths)):
        places[kind] = crossover(at, [times["Hyena", t] for t in at], [times[kind, t] for t in at])
    ratios = {kind: times[kind, at[-1]] / times["Hyena", at[-1]] for kind, at in (("stored", stored), ("tiles", lengths))}
    told = [f"{name} {_place(places[kind], ratios[kind], at)}, and at T = {at[-1]} it is {ratios[kind]:.1f} times as fast"
            for kind, name, at in (("stored", "attention that stores its scores", stored),
                                   ("tiles", "attention in tiles", lengths))]
    measured = f"Hyena overtakes {told[0]}; Hyena overtakes {told[1]}."
    claimed = (places["stored"] and 1024 <= places["stored"] <= 4096, places["tiles"] and 2048 <= places["tiles"] <= 16384,
               ratios["tiles"] >= 2)
    verdict = RIGHT if all(claimed) else CONDITIONS if min(ratios.values()) > 1.1 else WRONG
    if not all(claimed) and 0.9 < min(ratios.values()) <= 1.1:
        verdict = UNDECIDED
    return verdict(measured, crossover=places, times_as_fast=ratios,
                   seconds={f"{name}, T = {t}": seconds for (name, t), seconds in times.items()})


def _place(place: float | None, ratio: float, lengths: list[int]) -> str:
    """Where a mixer overtakes another, in words."""
    if place is not None:
        return f"near T = {place:.0f}"
    return f"at T = {lengths[0]} or before" if ratio > 1 else f"not up to T = {lengths[-1]}"


@claim(17, "Hyena", "It needs 20 % less compute at 2048 tokens for the same quality.", place=PLACE,
       paper=f"With 355M parameters it needs 3.93 instead of 4.77 times 10^19 operations ({PAPER}, table 4.4).")
def compute(measure: Measure) -> Finding:
    """The operations for a token, counted from a layer's matrices and the length, beside those of a Transformer's layer."""
    length, vocab, batch = 2048, 50_257, 64
    savings = {}
    for layers, width in ((12, 768), (24, 1024)):
        weights = {name: _matrices(measure, name, width) for name in ("transformer", "hyena")}
        points = 2 * length
        transforms = (2 + 1 / batch) * 2.5 * points * math.log2(points) + 3 * points  # of a channel and a sequence
        hyena = 2 * weights["hyena"] + width * (transforms / length + 2 * 3 * 3 + 2)  # and a short filter and two gates
        head = 2 * vocab * width / layers
        for name, scores in (("half of the scores", 2 * length * width), ("all scores", 4 * length * width)):
            dense = 2 * weights["transformer"] + scores
            savings[f"width {width}, {name}"] = 1 - hyena / dense
            savings[f"width {width}, {name}, with the head"] = 1 - (hyena + head) / (dense + head)
    low, high = min(savings.values()), max(savings.values())
    measured = (f"A model as large and as wide needs {100 * low:.0f} to {100 * high:.0f} % fewer operations at T = 2048, as "
                "the hidden half of the scores and the head are counted or not; whether it is as good was not measured.")
    return (CONDITIONS if low <= 0.2 <= high else WRONG)(measured, savings=savings)


def _matrices(measure: Measure, variant: str, width: int) -> int:
    """The weights of a layer that multiply every token: its matrices, but for those that make filters once for all."""
    block = measure.model(variant, context=4, width=width, layers=1).blocks[0]
    return sum(p.size for name, p in block.named_parameters()
               if p.ndim == 2 and ".filters." not in name and not name.endswith("short"))


@claim(18, "Hyena", "It recalls over very long sequences where others fail.", place=PLACE,
       paper=f"It is right where all learn from 2,000 sequences; short ones Transformers solve too ({PAPER}, table 4.2).")
def recall(measure: Measure) -> Finding:
    """Associative recall after the same steps, by Hyena, attention and RWKV, and by attention with a shift of a token."""
    options = dict(task="associative-recall", symbols=10, context=measure.sizes(66, 130), width=32, layers=2, batch=64,
                   lr=0.005, warmup=20, steps=measure.sizes(120, 150), eval_every=measure.sizes(120, 150), eval_examples=1000)
    runs = {"Hyena": measure.train("hyena", **options), "attention": measure.train("transformer", heads=2, **options),
            "RWKV": measure.train("rwkv", **options),
            "attention with a shift": measure.train("transformer", heads=2, token_shift=True, **options)}
    values = {name: run.value for name, run in runs.items()}
    best = max(values["attention"], values["RWKV"])
    margin = 2 * math.hypot(error_of(values["Hyena"], 1000), error_of(best, 1000))
    base = runs["Hyena"].baselines["commonest value seen"]
    measured = (f"Of sequences of {options['context']} tokens after {options['steps']} steps "
                + ", ".join(f"{name} answers {100 * value:.0f} %" for name, value in values.items())
                + f"; the commonest value gives {100 * base:.0f} %.")
    ahead = values["Hyena"] - best
    shifted = values["attention with a shift"] > values["Hyena"] - margin
    verdict = UNDECIDED if abs(ahead) <= margin else WRONG if ahead < 0 else CONDITIONS if shifted else RIGHT
    if verdict is CONDITIONS:
        measured += " So attention recalls as well where a shift shows it the token before."
    return verdict(measured, accuracy=values, margin=margin, baseline=base)


@claim(19, "Hyena", "The printed code is v = x[o] · fftconv(h, v), with filters that are a window times a network times an "
       "encoding of the position.", place=PLACE,
       paper=f"The recurrence is right; the encoding is what the network reads, and no factor ({PAPER}, (4) and (7)).")
def code(measure: Measure) -> Finding:
    """A mixer's output beside the printed recurrence, and its filter beside both readings of the product."""
    from scipy.signal import fftconvolve  # it takes a moment to import

    length, width = 64, 9  # as wide as the encoding, so that the second reading is a product at all
    mixer = measure.model("hyena", context=length, width=width, layers=1, filter_bands=4, features_lr=0).blocks[0].mixer
    mixer.filters.load({name: measure.normal(*array.shape) for name, array in mixer.filters.state().items()})
    x, f = measure.normal(1, length, width), mixer.filters
    with no_grad():
        y, (h,) = mixer(x).numpy()[0], [filter.numpy() for filter in f(length)]
        encoding, window = f.table.data, f.window.data
        hidden = encoding
        for layer in f.layers:
            hidden = np.sin((hidden @ layer.weight.data.T + layer.bias.data) * f.frequency.data)
        network = hidden @ f.out.weight.data.T
        z = causal_conv1d(mixer.project(x), mixer.short).numpy()[0]
    first, second, v = np.split(z, 3, axis=1)
    v = v * second
    v = fftconvolve(h, v, axes=0)[:length] + mixer.skip.data * v  # the line that is printed, and the term D of the code
    recurrence = _away((first * v) @ mixer.out.weight.data.T, y)
    readings = {"window times network of the encoding": _away(window * network, h),
                "window times network times encoding": _away(window * network * encoding, h)}
    measured = (f"The output is {recurrence:.1e} away from the recurrence. The filter is "
                + " and ".join(f"{value:.1e} away from {name}" for name, value in readings.items()) + ".")
    reads, factor = (value < 1e-4 for value in readings.values())
    verdict = RIGHT if recurrence < 1e-4 and factor else CONDITIONS if recurrence < 1e-4 and reads else WRONG
    return verdict(measured, recurrence=recurrence, filters=readings)


def _away(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
