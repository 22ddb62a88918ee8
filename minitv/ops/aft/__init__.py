"""AFT: every channel takes a weighted mean of the values, of which the query lets a part pass (Zhai et al. 2021, 2105.14103).

    m_t = Σ_s e^(k_s + w_ts) v_s / Σ_s e^(k_s + w_ts),    y_t = sigmoid(q_t) m_t         in each channel; equation (2)

s runs over all positions, or with ``causal`` over s ≤ t (footnote 2 of the paper). The operators differ in w_ts, the bias of
position s as position t sees it. minitv/variants/aft.py tells why the paper wants these four kinds of bias.

    aft_full     w_ts is any number                                                                 (2)
    aft_local    w_ts is any number for s in a window around t, and 0 outside                       (4)
    aft_simple   w_ts is 0                                                                          (5)
    aft_conv     w_ts depends on t - s alone, and is 0 outside a window; a head has one key         (6)
    aft_conv2d   as aft_conv, for the pixels of an image                                            (6)

Outside the window the bias is 0 and not -∞: distant positions still count, with weight e^k.

Large exponents. In float32 e^k overflows from k = 89 on. A constant subtracted from all exponents of one mean cancels, so every
form subtracts the largest exponent of what it adds. One maximum for the whole sequence is not enough in causal use: where keys
rise by more than 104 along the sequence, the weights of the first positions relative to it are all 0, and their mean is 0/0.

The sum of (6). The paper adds all keys with weight e^k, and then those of the window with e^k (e^w - 1). If w is very negative,
this subtracts numbers that are equal in float32: for w = -15, values near 1 are wrong by 0.4. Here all terms are positive: the
sum of what has left the window, and the terms in the window with weight e^(k + w).

Masks. ``mask`` is True where a key is seen. A masked position has the key -∞ and the value 0. A position that sees no key
gives 0, and its gradients are 0.

State. What has left the window is kept as its ``average`` and its ``logsum`` = ln Σ e^k. Together they act like one more
position, with ``average`` as its value and ``logsum`` as its key. The newest ``keys`` and ``values`` are kept as they are,
because the next position still sees them in its window; a key that does not exist yet is -∞.

Gradients. Let g_t be the gradient of y_t, a_ts = e^(k_s + w_ts) / Σ_s e^(k_s + w_ts) the weight of s in m_t, and
r_t = g_t sigmoid(q_t) the gradient of m_t. More weight for v_s moves m_t towards v_s, hence the factor v_s - m_t:

    dq_t = g_t m_t sigmoid(q_t) (1 - sigmoid(q_t))
    dv_s = Σ_t a_ts r_t                                 dk_s = Σ_t a_ts r_t (v_s - m_t)
    dw_ts = the sum of a_ts r_t (v_s - m_t) over all sequences, and over all channels that share the bias

A key of a head gets the sum over its channels, and the bias of a lag gets the sum over all pairs at that distance. cpu.py and
gpu.cu state the same for the sums that their kernels keep.
"""

from .band import banded_product
from .conv import aft_conv
from .conv2d import aft_conv2d
from .full import aft_full
from .local import aft_local
from .simple import aft_simple

__all__ = ["aft_conv", "aft_conv2d", "aft_full", "aft_local", "aft_simple", "banded_product"]
