"""AFT as a foundation of RWKV and Hyena: what the operators have in common."""

from __future__ import annotations

import numpy as np

from autograd.metric import distance

from ..ops import aft_simple, long_conv, wkv
from . import CONDITIONS, RIGHT, WRONG, Finding, claim
from .measure import Measure


@claim(59, "AFT as a foundation", "AFT is the foundation of RWKV and Hyena.", place="section AFT",
       paper="The paper on RWKV begins with AFT and replaces its biases by a decay (2305.13048). The one on Hyena names AFT "
             "among attention-free models, and builds on the gated long convolutions of H3 (2302.10866).")
def foundation(measure: Measure) -> Finding:
    """How far WKV without decay is from AFT-simple, and what of AFT-simple a gated convolution of Hyena can be."""
    length, width = measure.sizes(64, 512), measure.sizes(8, 32)
    q, k, v = measure.rng.standard_normal((3, 1, length, width))
    nothing = np.zeros(width)
    gate = 1 / (1 + np.exp(-q))
    aft = aft_simple(q, k, v)[0].numpy()
    rwkv = distance(gate * wkv(k, v, nothing, nothing)[0].numpy(), aft)
    ones, keys = np.ones((length, width)), np.exp(k)
    above, below = (long_conv(x, ones)[0].numpy() for x in (keys * v, keys))  # filters of ones, gated by keys
    hyena, quotient = distance(gate * above, aft), distance(gate * above / below, aft)
    text = (f"WKV with w = u = 0 and RWKV's gate differs by {rwkv:.0e} from AFT-simple; Hyena's gated convolution with a "
            f"filter of ones is AFT's sum without its divisor, and differs by {hyena:.1f} times the largest value, but a "
            f"quotient of two of them by {quotient:.0e}")
    numbers = dict(rwkv=rwkv, hyena=hyena, quotient=quotient)
    if rwkv > 1e-9:
        return WRONG(f"Not even RWKV contains it: {text}.", **numbers)
    if hyena < 1e-9:
        return RIGHT(f"Both contain it: {text}.", **numbers)
    return CONDITIONS(f"RWKV contains it; Hyena shares the gates, and has no weights that sum to one: {text}.", **numbers)
