"""Monarch Mixer: how its cost grows with the length and with the width."""

from __future__ import annotations

from typing import Any

from autograd import use

from ..ops import long_conv
from ..timing import inference
from . import CONDITIONS, RIGHT, UNDECIDED, WRONG, Finding, claim
from ._shapes import outline, weights
from .measure import Measure


def _convolution(measure: Measure, length: int, form: str) -> Any:
    """A call of a convolution with a filter as long as the text, by a form."""
    x, taps = measure.normal(1, length, 2), measure.normal(length, 2)

    def call() -> Any:
        with use("long_conv", form=form):
            return long_conv(x, taps)

    return inference(call)


@claim(53, "Monarch", "It is sub-quadratic in the length and in the width.", place="section Monarch Mixer",
       paper="A Monarch matrix of p factors costs O(p N^((p+1)/p)), along the tokens and along the channels (2310.12109, "
             "section 3). The authors' code has dense projections, and 4 blocks at any width.")
def subquadratic(measure: Measure) -> Finding:
    """The exponents in T of a long convolution by three forms, and in d of a layer's products as published and of order 2."""
    lengths = {"monarch": measure.sizes((1024, 2048, 4096, 6144, 8192, 12288), (2048, 4096, 8192, 16384, 32768, 65536)),
               "fft": measure.sizes([2**k for k in range(11, 17)], [2**k for k in range(13, 20)]),
               "direct": measure.sizes((512, 1024, 1536, 2048, 3072, 4096), (2048, 3072, 4096, 6144, 8192, 12288))}
    times = {form: measure.exponent("T", {t: _convolution(measure, t, form) for t in each}) for form, each in lengths.items()}
    mixing, channels = {}, {}
    for kind, options in (("published", {}), ("order 2", dict(monarch_order=2))):
        blocks = {width: outline("monarch-mixer-causal", width=width, layers=1, **options).blocks[0]
                  for width in (64, 144, 256, 576, 1024, 2304, 4096)}
        mixing[kind] = measure.exponent("d", {d: weights(block.mixer.project, block.mixer.out) for d, block in blocks.items()})
        channels[kind] = measure.exponent("d", {d: weights(block.ffn) for d, block in blocks.items()})
    text = (f"the time of a convolution grew as {times['monarch']} by Monarch products, as {times['fft']} by Fourier "
            f"transforms, and as {times['direct']} tap by tap; the products of its projections for a token grow as "
            f"{mixing['published']} as published and as {mixing['order 2']} with Monarch matrices, those of its block-diagonal "
            f"networks as {channels['published']}")
    numbers = dict(times, projections=mixing["published"], monarch_projections=mixing["order 2"], ffn=channels["published"])
    below = {form: times[form].nearest({"less": 1.5, "T²": 2.0}) for form in ("monarch", "fft")}
    if None in below.values():
        return UNDECIDED(f"The times do not tell: {text}.", **numbers)
    if "T²" in below.values() or mixing["order 2"].exponent > 1.9:
        return WRONG(f"It is quadratic: {text}.", **numbers)
    if mixing["published"].exponent > 1.9 or channels["published"].exponent > 1.9:
        return CONDITIONS("It is so in the length; in the width for Monarch matrices, and not as the authors published it: "
                          f"{text}.", **numbers)
    return RIGHT(f"It is so: {text}.", **numbers)
