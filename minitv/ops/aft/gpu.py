"""AFT on a GPU: all weights relative to the largest exponent so far, so no value of keys or biases is read; see gpu.cu."""

import math
from dataclasses import dataclass

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.rows import sum_rows
from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only, warps
from autograd.device import namespace

from .common import everything, negative_lags, newest

SOURCE = Source(__file__)


@dataclass
class _Window:
    """The window of gpu.cu and where its biases lie; ``taps`` [M N] if all positions share them."""

    wide: int
    columns: int
    low: int
    high: int
    rows: int = 1
    up: int = 0
    far: bool = False
    by_head: int = 0
    by_query: int = 0
    by_key: int = 0
    by_row: int = 0
    origin: int = 0
    taps: tuple[int, int] | None = None

    @property
    def arguments(self):
        return (self.wide, self.rows, self.columns, self.low, self.high, self.up, self.far, self.by_head, self.by_query,
                self.by_key, self.by_row, self.origin)


def _sequence(queries, keys, low, high, **others):
    return _Window(max(queries, 1), keys, low, high, **others)


class _Call:
    """q[B T C], k[B S H] and v[B S C] of all that is seen, a bias and its window; ``scans`` is how many sides have a rest."""

    def __init__(self, q, k, v, bias, window, scans=0):
        self.xp = namespace(q, k, v, bias)
        self.q, self.k, self.v, self.bias = (contiguous(x) for x in (q, k, v, bias))
        self.window, self.size = window, v.shape[2] // k.shape[2] if k.shape[2] else 1
        (self.B, self.T, self.C), self.S = q.shape, k.shape[1]
        self.scans = [self._scan(backwards) for backwards in range(scans)] if k.size else []
        self.y, self.tops, self.inverses, self.means = (self._empty(q.shape) for _ in range(4))
        before, after = (self.scans + [None] * 2)[:2]
        SOURCE.launch("mtv_aft_forward", self._grid(self.T), self.q, self.k, self.v, self.bias, before, after, self.y,
                      self.tops, self.inverses, self.means, self.T, self.C, self.size, *window.arguments, len(self.scans) > 0,
                      len(self.scans) > 1)

    def _empty(self, shape):
        return self.xp.empty(shape, np.float32)

    def _grid(self, rows):
        return elements(self.C, self.B), ceil_div(rows, SOURCE["TILE"])

    def _scan(self, backwards):
        scan = self._empty((3, *self.v.shape))
        SOURCE.launch("mtv_aft_scan", (self.B, elements(self.C)), self.k, self.v, scan, self.S, self.C, self.size,
                      backwards)
        return scan

    def state(self, left):
        """average and logsum of the first ``left`` keys, and what backward needs."""
        xp = self.xp
        if not left or not self.scans:
            average = xp.zeros((self.B, self.C), np.float32)
            return average, xp.full((self.B, self.k.shape[2]), -math.inf, np.float32), (average, average)
        top, numerator, total = self.scans[0][:, :, left - 1]
        inverse = xp.where(total > 0, 1 / xp.where(total > 0, total, 1), 0).astype(np.float32)
        average = numerator * inverse
        logsum = xp.where(total > 0, top + xp.log(xp.where(total > 0, total, 1)), -math.inf).astype(np.float32)
        return average, contiguous(logsum[:, ::self.size]), (average, inverse)

    def backward(self, g, left=0, share=None, g_average=None, g_logsum=None):
        """The gradients of q, k, v and bias, and through the state of the first ``left`` keys."""
        xp, window = self.xp, self.window
        gq, p, r = (self._empty(self.q.shape) for _ in range(3))
        gk, gv = self._empty(self.v.shape), self._empty(self.v.shape)
        SOURCE.launch("mtv_aft_backward_queries", elements(gq.size), self.q, contiguous(g), self.inverses, self.means, gq, p, r,
                      gq.size)
        gradients = self.tops, p, r
        SOURCE.launch("mtv_aft_backward_keys", self._grid(self.S), self.k, self.v, self.bias, *gradients, gk, gv, self.T,
                      self.C, self.size, *window.arguments)
        if self.scans:
            state = xp.zeros((2, self.B, self.C), np.float32)
            average, inverse = share
            if g_average is not None:
                state[0] = g_average * inverse
                state[1] = -state[0] * average
            if g_logsum is not None:
                state[1, :, ::self.size] += g_logsum * inverse[:, ::self.size]
            for backwards, scan in enumerate(self.scans):
                offset = window.high + 1 if backwards else window.low - 1
                SOURCE.launch("mtv_aft_scan_backward", (self.B, elements(self.C)), self.k, self.v, scan, *gradients, state, gk,
                              gv, self.T, self.S, self.C, self.size, backwards, offset, -1 if backwards else left - 1)
        if self.size > 1:
            gk = gk.reshape(*self.k.shape, self.size).sum(axis=3)
        of_bias = self._gradient_of_taps if window.taps else self._gradient_of_bias
        return gq, gk, gv, None if self.bias is None else of_bias(gradients)

    def _gradient_of_bias(self, gradients):
        window, gbias, tile = self.window, self.xp.zeros(self.bias.shape, np.float32), SOURCE["TILE"]
        keys = min(window.high - window.low + tile, self.S)
        SOURCE.launch("mtv_aft_backward_bias", (warps(ceil_div(keys, tile)), ceil_div(self.T, tile)), self.k, self.v, self.bias,
                      *gradients, gbias, self.B, self.T, self.S, self.C, window.low, window.high, window.by_query,
                      window.by_key, window.origin)
        return gbias

    def _gradient_of_taps(self, gradients):
        window, (M, N) = self.window, self.window.taps
        taps = sum_rows(SOURCE, "mtv_aft_backward_taps", elements(self.C, M * ceil_div(N, SOURCE["TILE"])), self.B * self.T,
                        (M, N, self.C), (self.k, self.v, self.bias, *gradients),
                        (self.B, self.T, self.C, self.size, window.wide, window.rows, window.columns, window.high, M, N))
        taps = taps.reshape(M, N, -1, self.size).sum(axis=3)
        return taps.transpose(2, 0, 1).reshape(self.bias.shape)


def supports(q, k, v):
    if v.shape[-1] < k.shape[-1]:
        return "needs at least one channel in every head"
    return float32_only(q, k, v)


simple_supports = full_supports = local_supports = conv_supports = conv2d_supports = supports


# -- simple, local and conv: a window, and a scan over what is outside -------------------------------------------------
def _forward(q, k, v, mask, state, causal, window, make):
    """``make(past)`` is the window and its bias, where ``past`` is how many keys there are before the first query's."""
    k, v = everything(k, v, mask, *state)
    lags, bias = make(k.shape[1] - q.shape[1])
    call = _Call(q, k, v, bias, lags, scans=1 if causal else 2)
    reach = max(window - 1 - negative_lags(window, causal), 0)
    left = max(k.shape[1] - reach, 0)
    average, logsum, share = call.state(left)
    outputs = call.y, average, logsum, newest(k, reach, -math.inf), newest(v, reach, 0)
    return outputs, (call, left, share, mask, reach)


def _backward(saved, g_y, g_average, g_logsum, g_keys=None, g_values=None):
    """The gradients of q, k, v and bias, and of the parts of the state."""
    call, left, share, mask, reach = saved
    gq, gk, gv, gbias = call.backward(or_zeros(g_y, call.q), left, share, g_average, g_logsum)
    near = gk.shape[1] - left
    for gx, gradient in ((gk, g_keys), (gv, g_values)):
        if gradient is not None:
            gx[:, left:] += gradient[:, reach - near:]
    past = gk.shape[1] - gq.shape[1]
    present = (x[:, past:] if mask is None else call.xp.where(mask[..., None], x[:, past:], 0) for x in (gk, gv))
    state = (gv[:, 0], gk[:, 0], gk[:, 1:past], gv[:, 1:past]) if past else (None,) * 4
    return (gq, *present, gbias), state


def simple_forward(q, k, v, mask, average, logsum, causal):
    queries = q.shape[1]

    def make(past):
        return _sequence(queries, past + queries, past + 1, past), None

    outputs, saved = _forward(q, k, v, mask, (average, logsum), causal, 0, make)
    return outputs[:3], saved


def simple_backward(saved, g_y, g_average, g_logsum):
    (*gradients, _), state = _backward(saved, g_y, g_average, g_logsum)
    return *gradients, *state[:2]


def local_forward(q, k, v, bias, mask, average, logsum, keys, values, causal):
    queries, window = bias.shape

    def make(past):
        last = past + negative_lags(window, causal)
        return _sequence(queries, past + queries, last - window + 1, last, by_query=window + 1, by_key=-1, origin=last), bias

    return _forward(q, k, v, mask, (average, logsum, keys, values), causal, window, make)


def conv_forward(q, k, v, bias, mask, average, logsum, keys, values, causal):
    queries, window = q.shape[1], bias.shape[1]

    def make(past):
        last = past + negative_lags(window, causal)
        return _sequence(queries, past + queries, last - window + 1, last, by_head=window, by_query=1, by_key=-1, origin=last,
                       taps=(1, window)), bias

    return _forward(q, k, v, mask, (average, logsum, keys, values), causal, window, make)


def local_backward(saved, g_y, g_average, g_logsum, g_keys, g_values):
    gradients, state = _backward(saved, g_y, g_average, g_logsum, g_keys, g_values)
    return *gradients, *state


conv_backward = local_backward


# -- full and conv2d: pairs of all -------------------------------------------------------------------------------------
def full_forward(q, k, v, bias, mask, causal):
    queries, keys = bias.shape
    window = _sequence(queries, keys, -queries, keys - queries if causal else keys, by_query=keys, by_key=1)
    call = _Call(q, *everything(k, v, mask), bias, window)
    return call.y, (call, mask)


def full_backward(saved, g):
    call, mask = saved
    gq, gk, gv, gbias = call.backward(g)
    gk, gv = (x if mask is None else call.xp.where(mask[..., None], x, 0) for x in (gk, gv))
    return gq, gk, gv, gbias


def conv2d_forward(q, k, v, bias, mask):
    rows, columns = image = q.shape[1:3]
    height, width = taps = bias.shape[1:]
    window = _Window(columns, columns, -(width // 2), width // 2, rows, height // 2, True, by_head=height * width, by_query=1,
                     by_key=-1, by_row=width, origin=height // 2 * width + width // 2, taps=taps)
    call = _Call(*(x.reshape(len(x), math.prod(image), x.shape[3]) for x in (q, *everything(k, v, mask))), bias, window)
    return call.y.reshape(q.shape), (call, image, mask)


def conv2d_backward(saved, g):
    call, image, mask = saved
    gq, gk, gv, gbias = call.backward(g.reshape(call.q.shape))
    gq, gk, gv = (x.reshape(len(x), *image, x.shape[2]) for x in (gq, gk, gv))
    gk, gv = (x if mask is None else call.xp.where(mask[..., None], x, 0) for x in (gk, gv))
    return gq, gk, gv, gbias


# -- the bias of aft_local from its factors ----------------------------------------------------------------------------
band_supports = float32_only


def band_forward(u, v, window, causal):
    xp, (u, v), ahead = namespace(u, v), (contiguous(u), contiguous(v)), 0 if causal else window - 1
    last, bias = len(v) - len(u) + ahead, xp.empty((len(u), window + ahead), np.float32)
    SOURCE.launch("mtv_aft_band_forward", elements(bias.size), u, v, bias, len(u), len(v), u.shape[1], bias.shape[1], last)
    return bias, (u, v, last)


def band_backward(saved, g):
    u, v, last = saved
    xp, g = namespace(u, v, g), contiguous(g)
    gu, gv = xp.empty_like(u), xp.empty_like(v)
    for out, other, turned in ((gu, v, False), (gv, u, True)):
        SOURCE.launch("mtv_aft_band_backward", elements(out.size), g, other, out, len(out), len(other), out.shape[1],
                      g.shape[1], last, turned)
    return gu, gv
