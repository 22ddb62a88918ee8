"""AFT, the attention free transformer: every channel takes a weighted mean. Zhai et al. 2021, arXiv 2105.14103.

    y_t = sigmoid(q_t) · Σ_s e^(k_s + w_ts) v_s / Σ_s e^(k_s + w_ts)         each channel for itself; eq. 2

over all positions s, or with ``causal`` over s <= t. The operators differ in the bias w of position s as seen from t:

    aft_full     any number                                                            eq. 2
    aft_local    any number within a window around t, 0 outside                        eq. 4
    aft_simple   0                                                                     eq. 5
    aft_conv     a function of t - s within a window, 0 outside; one key for all channels of a head     eq. 6
    aft_conv2d   the same for the pixels of an image

Outside the window the bias is 0, not -∞: what is far away still counts, with weight e^k. The paper writes eq. 6 as a sum over
everything plus window terms with e^w - 1. Where w is very negative that difference of large numbers leaves no digits in
float32, so here all terms are positive: the sum of what has left the window, and the terms of what is in it.

A position that sees no key gives 0 with gradient 0. A ``mask``, True where a key is seen, means keys of -∞ and values of 0
elsewhere. The past enters a call as its *state*: the ``average`` of what has left the window and its ``logsum``, ln Σ e^k,
which together count as one more value and its key; and the newest ``keys`` and ``values``, which the next position still sees
in its window (a key that never was is -∞).
"""

from .band import banded_product
from .conv import aft_conv
from .conv2d import aft_conv2d
from .full import aft_full
from .local import aft_local
from .simple import aft_simple

__all__ = ["aft_conv", "aft_conv2d", "aft_full", "aft_local", "aft_simple", "banded_product"]
