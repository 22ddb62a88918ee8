"""What the kernels of both devices have in common.

All inputs that are multiplied with x are one filter of *taps*, at lags from first = 1 - R (the future) to L - 1 (the past);
``skip`` adds to the tap at lag 0. Its gradient is one correlation, which holds those of all three.
"""

from __future__ import annotations

from collections.abc import Callable

from scipy.fft import next_fast_len

from autograd.device import namespace


def direct(convolve: Callable, correlate: Callable) -> tuple[Callable, Callable]:
    """forward and backward by direct sums, from ``convolve(x, taps, first) -> y`` and ``correlate(x, g, count, first) ->
    gradient of the taps``.
    """
    return _kernel(lambda x, taps, first, past, future: convolve(x, taps, first),
                   lambda x, taps, first, past, future, g: (convolve(g, taps[::-1], 1 - len(taps) - first),
                                                            correlate(x, g, len(taps), first)))


def transformed(fft: Callable, fft_backward: Callable) -> tuple[Callable, Callable]:
    """forward and backward by spectra, from ``fft(x, taps, first, points) -> y`` and ``fft_backward(x, taps, first, points, g)
    -> gradients of x and of the taps``.
    """
    return _kernel(lambda x, taps, first, past, future: fft(x, taps, first, _points(x.shape[1], past, future)),
                   lambda x, taps, first, past, future, g: fft_backward(x, taps, first, _points(x.shape[1], past, future), g))


def defers(most: int) -> Callable:
    """Why the direct sum leaves a call to the transforms: more than ``most`` taps a position, on average."""
    def reason(x, filter, reverse, history):
        length = x.shape[1] + (0 if history is None else history.shape[1])
        reach = min(len(filter), length), 0 if reverse is None else min(len(reverse), length)
        taps = sum(n - n * (n - 1) / (2 * length) for n in reach) if length else 0
        return f"{taps:.0f} taps a position, transforms are faster from {most} on" if taps > most else None

    return reason


def _kernel(compute: Callable, differentiate: Callable) -> tuple[Callable, Callable]:
    """forward and backward from functions of x with its history, the taps, the first one's lag and how many come from each
    filter.
    """
    def forward(x, filter, skip, reverse, history):
        earlier, keep = 0 if history is None else history.shape[1], max(len(filter) - 1, 0)
        whole = x if history is None else namespace(x).concatenate([history, x], axis=1)
        length = whole.shape[1]
        taps = _taps(filter, skip, reverse, length)
        y = compute(whole, *taps) if whole.size else whole
        lengths = [a if a is None else len(a) for a in (filter, skip, reverse, history)]
        return (y[:, earlier:], whole[:, max(length - keep, 0) :]), (whole, taps, earlier, lengths)

    def backward(saved, g_y, g_history):
        x, taps, earlier, (filter_length, skip, reverse_length, history) = saved
        _, first, past, future = taps
        xp = namespace(x)
        g = xp.zeros((len(x), x.shape[1] - earlier, x.shape[2]), x.dtype) if g_y is None else g_y
        gy = g if history is None else xp.concatenate([xp.zeros((len(x), earlier, x.shape[2]), x.dtype), g], axis=1)
        gx, gtaps = differentiate(x, *taps, gy) if x.size else (xp.zeros_like(x), xp.zeros_like(taps[0]))
        if g_history is not None:
            gx[:, x.shape[1] - g_history.shape[1] :] += g_history
        gfilter, greverse = xp.zeros((filter_length, x.shape[2]), x.dtype), None
        gfilter[:past] = gtaps[-first : past - first]
        if reverse_length is not None:
            greverse = xp.zeros((reverse_length, x.shape[2]), x.dtype)
            greverse[:future] = gtaps[: 1 - first][::-1][:future]
        gskip, ghistory = None if skip is None else gtaps[-first].copy(), None if history is None else gx[:, :earlier]
        return gx[:, earlier:], gfilter, gskip, greverse, ghistory

    return forward, backward


def _taps(filter, skip, reverse, length):
    """All that x is multiplied with as taps[U D], the lag of the first of them, and how many come from each filter."""
    past, future = min(len(filter), length), 0 if reverse is None else min(len(reverse), length)
    first = min(1 - future, 0)
    if skip is None and not future and past:
        return filter[:past], 0, past, 0
    taps = namespace(filter).zeros((max(past, 1) - first, filter.shape[1]), filter.dtype)
    taps[-first : past - first] += filter[:past]
    if future:
        taps[: 1 - first] += reverse[:future][::-1]
    if skip is not None:
        taps[-first] += skip
    return taps, first, past, future


def _points(length, past, future):
    """The size of the transforms, in which nothing may wrap around: of factors 2, 3 and 5."""
    return next_fast_len(max(length + max(past, future, 1) - 1, 2), real=True)
