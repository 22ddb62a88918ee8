"""long_conv: a convolution with a filter as long as the sequence, in every channel (Poli et al. 2023, arXiv 2302.10866).

    y_t = Σ_{s < L} filter_s x_{t-s} + skip x_t + Σ_{s < R} reverse_s x_{t+s}            the first sum is equation (1)

``filter`` looks back: tap s meets the input s positions ago. Of a filter that is longer than the sequence, only the first taps
are used, so the outputs of a short sequence are the first outputs of a long one. ``skip`` is one more tap at distance 0, the
term d of Hyena. ``reverse`` is for models that are not causal: it looks ahead, and distance 0 is then in both filters.
``history`` are inputs before x_0. The last L - 1 inputs, which are all that later outputs can need, are returned under the
same name. In one channel, y = S x with the Toeplitz matrix S [T T], which is constant along its diagonals (2):

    S_ts = filter_{t-s} for s < t,    S_tt = filter_0 + skip (+ reverse_0),    S_ts = reverse_{s-t} or 0 for s > t

``direct`` sums as the formula says: T² / 2 products per channel. ``fft`` needs O(T log T), by the convolution theorem: the
transform of a convolution is the product of the transforms.

    y = inverse(transform(x) ∘ transform(filter))            both padded with zeros to n points

``monarch`` computes the same transforms as Monarch products (minitv/ops/monarch/__init__.py), which are products of small
dense matrices, in O(T √T).

A Fourier transform takes its n points as a circle. With n < 2 T - 1, the last inputs would reach the first outputs, and a
model could read the future:

    >>> import numpy as np
    >>> x, h = np.array([1., 3, 4]), np.array([1, 0.5, 0.25])
    >>> for n in (3, 5):
    ...     print(np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(h, n), n)[:3].round(6))
    [3.75 4.5  5.75]
    [1.   3.5  5.75]

Every point of a transform depends on all inputs. So with ``fft`` and ``monarch``, a NaN or an infinity anywhere becomes one in
every output of its channel, and the rounding of an output depends on later inputs too. ``direct`` and ``relaxed`` (online.py)
show an input to its own output and to later ones only.

Gradients. Let g_t be the gradient of y_t. Those of the filters and of skip are summed over the batch. Each sum runs in the
other direction than a convolution, which is a correlation: transforms compute it with the conjugate of one factor.

    dx_t = Σ_s filter_s g_{t+s} + skip g_t + Σ_s reverse_s g_{t-s}            dskip = Σ_t g_t x_t
    dfilter_s = Σ_t g_t x_{t-s}                                               dreverse_s = Σ_t g_t x_{t+s}
"""

from __future__ import annotations

import numpy as np
from scipy.fft import next_fast_len

from autograd.laws import causal, independent, law, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import complex_multiply, concat, flip, getitem, irfft, pad, rfft, swapaxes

from ..monarch import circular_convolution
from ..monarch.factors import sizes
from .online import begin, read


def _rows(x, start, stop=None):
    """x[:, start:stop]."""
    return getitem(x, key=(slice(None), slice(start, stop)))


def _whole(x, history):
    return x if history is None else concat([history, x], axis=1)


def _kept(whole, filter):
    """The last L - 1 inputs."""
    return _rows(whole, max(whole.shape[1] - max(filter.shape[0] - 1, 0), 0))


@op("x[B T D], filter[L D], skip?[D], reverse?[R D], history?[B S D] -> y[B T D], history[B P D]", view=True,
    laws=[causal("x", except_for=("fft", "monarch"), inexact=("monarch",), reverse=None), independent("B D"), linear_in("x"),
          linear_in("filter"), streams("T", reverse=None)])
def long_conv(x, filter, skip=None, reverse=None, history=None):
    """y_t = Σ_s filter_s x_{t-s} + skip x_t + Σ_s reverse_s x_{t+s} in every channel, and the last L - 1 inputs.

    x[B T D], filter[L D], skip[D], reverse[R D], history[B S D]: inputs before x_0. The page has the formulas; the first
    sum is equation (1) of the paper.
    """
    past = np.zeros((len(x), 0, x.shape[2]), x.dtype) if history is None else history
    whole, y = np.concatenate([past, x], axis=1), np.zeros_like(x)
    length, earlier = whole.shape[1], past.shape[1]
    for b, t, c in np.ndindex(x.shape):
        if skip is not None:
            y[b, t, c] += skip[c] * x[b, t, c]
        for s in range(min(len(filter), earlier + t + 1)):
            y[b, t, c] += filter[s, c] * whole[b, earlier + t - s, c]  # (1)
        for s in range(0 if reverse is None else min(len(reverse), x.shape[1] - t)):
            y[b, t, c] += reverse[s, c] * x[b, t + s, c]
    return y, whole[:, max(length - max(len(filter) - 1, 0), 0):]


def _both_ways(causal, x, filter, skip, reverse, history):
    """The outputs of a form from its causal part ``causal(x[B T D], filter[L D]) -> y``."""
    whole = _whole(x, history)
    y = _rows(causal(whole, filter), whole.shape[1] - x.shape[1])
    if skip is not None:
        y = y + skip * x
    if reverse is not None:
        y = y + flip(causal(flip(x, axis=1), reverse), axis=1)
    return y, _kept(whole, filter)


@long_conv.form
def fft(x, filter, skip, reverse, history):
    """y = inverse(transform(x) ∘ transform(filter)) on n ≥ T + L - 1 points: time O(T log T) and memory O(T) per channel."""

    def causal(x, filter):
        length, taps = x.shape[1], min(x.shape[1], filter.shape[0])
        if not taps or not length:
            return x * 0.0
        points = next_fast_len(length + taps - 1, real=True)  # of factors 2, 3 and 5; fewer points would wrap around
        spectrum = complex_multiply(rfft(swapaxes(x), n=points), rfft(swapaxes(filter[:taps]), n=points))  # of [B D points]
        return swapaxes(irfft(spectrum, n=points)[..., :length])  # [B T D]

    return _both_ways(causal, x, filter, skip, reverse, history)


@long_conv.form
def monarch(x, filter, skip, reverse, history):
    """The same transforms, as products of dense matrices of about √T rows: time O(T √T) per channel (arXiv 2310.12109)."""

    def causal(x, filter):
        length, taps = x.shape[1], min(x.shape[1], filter.shape[0])
        if not taps or not length:
            return x * 0.0
        n1, n2 = sizes(length + taps - 1)
        padded = [pad(swapaxes(part), widths=(*[(0, 0)] * (part.ndim - 1), (0, n1 * n2 - part.shape[-2])))
                  for part in (x, filter[:taps])]  # [B D n₁n₂], [D n₁n₂]
        return swapaxes(circular_convolution(*padded, (n1, n2))[..., :length])  # [B T D]

    return _both_ways(causal, x, filter, skip, reverse, history)


@long_conv.form
def direct(x, filter, skip, reverse, history):
    """y_t = Σ_s filter_s x_{t-s}, one tap after the other for all positions: time O(T L) per channel."""

    def causal(x, filter):
        y, length = x * 0.0, x.shape[1]
        for s in range(min(length, filter.shape[0])):
            y = y + filter[s] * pad(_rows(x, 0, length - s), widths=((0, 0), (s, 0), (0, 0)))
        return y

    return _both_ways(causal, x, filter, skip, reverse, history)


@long_conv.form
def relaxed(x, filter, skip, reverse, history):
    """Every output as soon as its input is known, as online.py explains: time O(T log² T) per channel."""
    def causal(x, filter):
        past, ys = begin(len(x), filter), [x[:, :0]]
        for t in range(x.shape[1]):
            y, past = read(_rows(x, t, t + 1), past, filter, block=1, convolve=fft)
            ys.append(y)
        return concat(ys, axis=1)

    return _both_ways(causal, x, filter, skip, reverse, history)


long_conv.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
for _device in ("cpu", "cuda"):
    long_conv.kernel(_device, name="direct", prefix="direct_")
    long_conv.kernel(_device, name="fft", prefix="fft_")


@long_conv.inputs
def _(draw):
    batch, length, width = draw.size(0, 2, "B"), draw.size(0, 9, "T"), draw.size(0, 3, "D")
    taps = draw.choice((length, draw.size(0, 12, "L")))
    return (draw.floats(batch, length, width), draw.floats(taps, width), draw.floats(width) if draw.boolean() else None,
            draw.floats(draw.size(0, 6), width) if draw.boolean() else None,
            draw.floats(batch, draw.size(0, 6), width) if draw.boolean() else None), {}


@law(long_conv, "one tap delays")
def _(case, draw):
    x = case.x
    if not x.shape[1]:
        return
    lag = draw.integer(0, x.shape[1] - 1)
    tap = np.zeros((lag + 1, x.shape[2]), x.dtype)
    tap[lag] = 1
    y = case.anew(filter=tap, skip=None, reverse=None).y
    assert_close(y, np.concatenate([np.zeros_like(x[:, :lag]), x[:, : x.shape[1] - lag]], axis=1), "a tap does not delay")


@law(long_conv, "a longer filter is cut")
def _(case, draw):
    ahead, past = case.x.shape[1], 0 if case.history is None else case.history.shape[1]
    cut = {name: x[: ahead if name == "reverse" else past + ahead] for name, x in case.present("filter reverse").items()}
    assert_close(case(**cut).y, case().y, "taps beyond the sequence are used")


@law(long_conv, "reverse mirrors filter")
def _(case, draw):
    backward = case.anew(x=np.ascontiguousarray(case.x[:, ::-1]), filter=0.0, reverse=case.filter).y
    assert_close(backward[:, ::-1], case.anew(reverse=None).y, "reverse is not the mirror image of filter", terms=8)
