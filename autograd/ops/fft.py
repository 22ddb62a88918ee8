"""Real Fourier transforms. Tensors are real, so a spectrum carries (real, imaginary) pairs in a last axis of size 2.

rfft and irfft are each other's gradients up to the weights of the bins: every bin except 0 (and n/2 for even n)
stands for itself and its conjugate. The imaginary parts of bin 0 and of bin n/2 (even n) carry no gradient in irfft,
which ignores them.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import transforms
from ..device import beside, namespace
from ..errors import DomainError, ShapeError
from ..op import op
from ..tensor import Tensor
from .index import getitem
from .shape import pad, stack

NORMS = ("backward", "ortho", "forward")


def _scale(n, norm, inverse):
    """The factor a transform of length n applies, and, with inverse, that of the inverse."""
    return {"backward": (1.0, 1 / n), "ortho": (n**-0.5, n**-0.5), "forward": (1 / n, 1.0)}[norm][inverse]


def _check(name, n, norm):
    if n is None or n < 1:
        raise DomainError(f"{name}: a transform needs a length of at least 1, got {n}")
    if norm not in NORMS:
        raise DomainError(f"{name}: norm must be one of {', '.join(NORMS)}, got {norm!r}")


def _bin_weights(n, dtype):
    """1 for bin 0 and, for even n, bin n/2; 2 for the others."""
    weights = np.full((n // 2 + 1, 1), 2, dtype)
    weights[0] = 1
    if n % 2 == 0:
        weights[-1] = 1
    return weights


def _fit(x, size, axis):
    """x cut or zero-padded at the end of an axis."""
    if x.shape[axis] == size:
        return x
    if x.shape[axis] > size:
        return getitem(x, key=(Ellipsis, slice(size)) if axis == -1 else (Ellipsis, slice(size), slice(None)))
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return pad(x, widths=tuple(widths))


@op("x[... N] -> y[... M 2]", analytic=False)
def rfft(x, *, n=None, norm="backward"):
    """Y_k = Σ_t x_t e^(-2πi k t / n) for k = 0 .. n/2, as pairs; x is cut or zero-padded to n (default: its length)."""
    n = x.shape[-1] if n is None else n
    out = np.zeros((*x.shape[:-1], n // 2 + 1, 2), x.dtype)
    for *lead, k in np.ndindex(out.shape[:-1]):
        for t in range(min(n, x.shape[-1])):
            angle = 2 * math.pi * k * t / n
            out[(*lead, k, 0)] += x[(*lead, t)] * math.cos(angle)
            out[(*lead, k, 1)] -= x[(*lead, t)] * math.sin(angle)
    return out * out.dtype.type(_scale(n, norm, False))


@rfft.primitive
def _(x, n, norm):
    if not x.size:
        return namespace(x).zeros((*x.shape[:-1], (x.shape[-1] if n is None else n) // 2 + 1, 2), x.dtype)
    spectrum = transforms(x).rfft(x, n=n, norm=norm)
    return namespace(x).ascontiguousarray(spectrum).view(x.dtype).reshape(*spectrum.shape, 2)


@rfft.vjp
def _(g, x_shape, n, norm):
    n = x_shape[-1] if n is None else n
    # Without factors x̄_t = Re Σ_k ḡ_k e^(2πi k t / n) over the n/2 + 1 bins; irfft sums all n bins, so halve its pairs.
    halved = g * Tensor.wrap(beside(1 / _bin_weights(n, g.dtype), g.data))
    return _fit(irfft(halved, n=n, norm="forward") * _scale(n, norm, False), x_shape[-1], -1)


@rfft.validate
def _(x, n, norm):
    _check("rfft", x.shape[-1] if n is None else n, norm)


@rfft.inputs
def _(draw):
    x = draw.floats(*draw.shape(0, 1), draw.size(1, 7))
    return (x,), {"n": draw.choice((None, draw.size(1, 9))), "norm": draw.choice(NORMS)}


@op("y[... M 2] -> x[... N]", analytic=False)
def irfft(y, *, n=None, norm="backward"):
    """The real x of length n whose rfft is y: x_t = (1/n) Σ_k c_k Re(y_k e^(2πi k t / n)), c_k = 1 or 2.

    n defaults to 2 (M - 1), which is even: give n for an odd length. y is cut or zero-padded to n/2 + 1 bins.
    """
    n = 2 * (y.shape[-2] - 1) if n is None else n
    out = np.zeros((*y.shape[:-2], n), y.dtype)
    weights = _bin_weights(n, y.dtype)[:, 0]
    for *lead, t in np.ndindex(out.shape):
        for k in range(min(n // 2 + 1, y.shape[-2])):
            angle = 2 * math.pi * k * t / n
            real, imaginary = y[(*lead, k, 0)], y[(*lead, k, 1)]
            out[(*lead, t)] += weights[k] * (real * math.cos(angle) - imaginary * math.sin(angle))
    return out * out.dtype.type(_scale(n, norm, True))


@irfft.primitive
def _(y, n, norm):
    if not y.size:
        return namespace(y).zeros((*y.shape[:-2], 2 * (y.shape[-2] - 1) if n is None else n), y.dtype)
    complex_dtype = np.complex64 if y.dtype == np.float32 else np.complex128
    spectrum = namespace(y).ascontiguousarray(y).view(complex_dtype)[..., 0]
    return transforms(y).irfft(spectrum, n=n, norm=norm)


@irfft.vjp
def _(g, y_shape, n, norm):
    n = 2 * (y_shape[-2] - 1) if n is None else n
    weights = Tensor.wrap(beside(_bin_weights(n, g.dtype), g.data))
    return _fit(rfft(g, norm="backward") * weights * _scale(n, norm, True), y_shape[-2], -2)


@irfft.validate
def _(y, n, norm):
    if y.shape[-2] < 1:
        raise ShapeError(f"irfft: needs at least one bin, got shape {y.shape}")
    _check("irfft", 2 * (y.shape[-2] - 1) if n is None else n, norm)


@irfft.inputs
def _(draw):
    bins = draw.size(2, 5)
    return (draw.floats(*draw.shape(0, 1), bins, 2),), {
        "n": draw.choice((None, draw.size(1, 9))), "norm": draw.choice(NORMS)}


@op("a[... 2], b[... 2] -> y[... 2]", analytic=True)
def complex_multiply(a, b):
    """(a₀ + i a₁)(b₀ + i b₁), as pairs: the product of two spectra."""
    out = np.empty(np.broadcast_shapes(a.shape, b.shape), a.dtype)
    a, b = np.broadcast_to(a, out.shape), np.broadcast_to(b, out.shape)
    for index in np.ndindex(out.shape[:-1]):
        (ar, ai), (br, bi) = a[index], b[index]
        out[index] = ar * br - ai * bi, ar * bi + ai * br
    return out


@complex_multiply.form
def composed(a, b):
    ar, ai, br, bi = a[..., 0], a[..., 1], b[..., 0], b[..., 1]
    return stack([ar * br - ai * bi, ar * bi + ai * br], axis=-1)


@complex_multiply.inputs
def _(draw):
    shape = draw.shape(0, 2)
    return (draw.floats(*shape, 2), draw.floats(*shape[draw.integer(0, len(shape)):], 2)), {}
