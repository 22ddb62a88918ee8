"""long_conv on a GPU: few taps by the direct sum, a kernel of causal_conv1d; many by cuFFT, time innermost.

The gradient of the taps is summed over the batch before its one inverse transform. Backward transforms x and the taps again,
which is less memory than to keep both spectra, four times as large as x.
"""

from autograd.arrays import transforms
from autograd.cuda.source import contiguous, float32_only
from autograd.device import namespace
from autograd.ops.causal_conv1d.gpu import convolve, correlate

from . import common

DIRECT = 64  # taps a position, on average, up to which the sum is direct: where the CPU changes over

direct_supports = fft_supports = float32_only


def _spectrum(x, points):
    """Of every channel of [... T D], as [... D K]."""
    return transforms(x).rfft(contiguous(x.swapaxes(-1, -2)), n=points)


def _inverse(spectrum, points):
    """[... points D], every channel from its spectrum."""
    return transforms(spectrum).irfft(spectrum, n=points).swapaxes(-1, -2)


def _spectrum_of_taps(taps, first, points):
    """Lags below 0 are the last points."""
    xp = namespace(taps)
    placed = xp.zeros((points, taps.shape[1]), taps.dtype)
    placed[: len(taps) + first] = taps[-first:]
    placed[points + first :] = taps[:-first]
    return _spectrum(placed, points)


def _fft(x, taps, first, points):
    spectrum = _spectrum(x, points)
    spectrum *= _spectrum_of_taps(taps, first, points)
    return _inverse(spectrum, points)[:, : x.shape[1]]


def _fft_backward(x, taps, first, points, g):
    spectrum = _spectrum(g, points)
    product = (spectrum * _spectrum(x, points).conj()).sum(axis=0)
    spectrum *= _spectrum_of_taps(taps, first, points).conj()
    lags = _inverse(product, points)
    gtaps = namespace(x).concatenate([lags[points + first :], lags[: len(taps) + first]])
    return contiguous(_inverse(spectrum, points)[:, : x.shape[1]]), gtaps


direct_forward, direct_backward = common.direct(convolve, correlate)
direct_defers = common.defers(DIRECT)
fft_forward, fft_backward = common.transformed(_fft, _fft_backward)
