"""Checking derivatives: gradcheck, and the adjoint test of linear maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from .device import to_numpy
from .metric import TOLERANCE, assert_close, distance, within  # noqa: F401 - a check of values belongs to one of derivatives
from .state import Switch
from .tensor import Tensor, gradients


def _outputs(result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _dot(cotangents, values) -> float:
    return sum(float(np.sum(c * np.where(c == 0, 0.0, v))) for c, v in zip(cotangents, values, strict=True))


def _central(f, inputs, which, direction, cotangents) -> float:
    """d/dh <cotangents, f(x + h direction)> at 0 by Richardson-extrapolated central differences, error O(h^8)."""
    base = inputs[which].data

    def value(h):
        moved = list(inputs)
        moved[which] = Tensor.wrap(base + h * direction)
        return _dot(cotangents, [o.data for o in _outputs(f(*moved))])

    step = 0.02
    table = [(value(step / 2**i) - value(-step / 2**i)) / (2 * step / 2**i) for i in range(4)]
    for level in range(1, 4):
        table = [(4**level * b - a) / (4**level - 1) for a, b in itertools.pairwise(table)]
    return table[0]


def _complex(f, inputs, which, direction, cotangents) -> float:
    """The same derivative as Im f(x + i h direction) / h: exact to rounding, for analytic functions."""
    moved = [Tensor.wrap(x.data) for x in inputs]
    moved[which] = Tensor.wrap(inputs[which].data + 1e-30j * direction)
    with Switch(complex_step=True, recording=False):
        outputs = _outputs(f(*moved))
    return _dot(cotangents, [np.imag(o.data) for o in outputs]) / 1e-30


def gradcheck(f: Callable, *inputs, order: int = 1, analytic: bool = False, tolerance: float | None = None,
              seed: int = 0) -> None:
    """Check every gradient of ``f`` in float64; AssertionError names the input and both numbers.

    ``f`` maps Tensors to a Tensor or a tuple of them. With random cotangents c and a random direction u for each
    input x, <grad of <c, f>, u> must equal the derivative of <c, f(x + h u)>: by a complex step if ``analytic``
    (relative tolerance 1e-11), by extrapolated central differences otherwise (2e-7). ``order=2`` then checks the
    gradient of the gradient in the same way. The function must be smooth within 0.02 of the inputs.
    """
    tensors, limit = [], tolerance
    for x in inputs:
        x = to_numpy(x)
        if x.dtype != np.float64:
            raise TypeError(f"gradcheck: inputs must be float64, got {x.dtype}")
        tensors.append(Tensor(x, requires_grad=True))
    generator = np.random.default_rng(seed)
    outputs = _outputs(f(*tensors))
    if not outputs:
        raise AssertionError("gradcheck: the function has no differentiable output")
    for which, output in enumerate(outputs):
        if np.isnan(output.data).any():
            raise AssertionError(f"output {which} has NaN at the inputs given, so it has no derivative there")
    # An output that is infinite on purpose (the log of a masked probability) has no derivative to check.
    cotangents = [np.where(np.isfinite(o.data), generator.standard_normal(o.shape), 0.0) for o in outputs]
    if analytic:
        derivative, tolerance = _complex, tolerance or 1e-11
    else:
        derivative, tolerance = _central, tolerance or 2e-7
    grads = gradients(outputs, tensors, [Tensor(c) for c in cotangents])
    for which, (x, gradient) in enumerate(zip(tensors, grads, strict=True)):
        if gradient.shape != x.shape or gradient.dtype != x.dtype:
            raise AssertionError(f"gradient {which}: shape {gradient.shape} and dtype {gradient.dtype} for an input of "
                                 f"shape {x.shape} and dtype {x.dtype}")
        if not x.size:
            continue
        for _ in range(2):
            direction = generator.standard_normal(x.shape)
            direction /= max(1.0, float(np.abs(direction).max()))  # so that no element moves by more than the step
            expected = derivative(f, tensors, which, direction, cotangents)
            slope = float(np.sum(gradient.data * direction))
            scale = max(abs(expected), float(np.sqrt(np.sum(gradient.data**2))), 1e-3)
            if not within(abs(slope - expected) / scale, tolerance):
                raise AssertionError(f"gradient of input {which}: {slope!r}, expected {expected!r} "
                                     f"(shape {x.shape}, tolerance {tolerance:g})")
    if order > 1:
        seeds = [Tensor(c) for c in cotangents]

        def first(*xs):
            xs = [x if x.requires_grad else Tensor(x.data, requires_grad=True) for x in xs]
            return tuple(gradients(_outputs(f(*xs)), xs, seeds, create_graph=True))

        gradcheck(first, *[t.data for t in tensors], order=order - 1, tolerance=limit, seed=seed + 1)


def adjoint_test(forward: Callable, backward: Callable, x, y) -> None:
    """<forward(x), y> = <x, backward(y)> for a linear map and what is claimed to be its adjoint (arrays in, arrays out)."""
    left = float(np.sum(forward(x).astype(np.float64) * y))
    right = float(np.sum(backward(y).astype(np.float64) * x))
    scale = max(abs(left), abs(right), float(np.sqrt(np.sum(np.square(x)) * np.sum(np.square(y)))), 1e-30)
    if not within(abs(left - right) / scale, TOLERANCE[x.dtype]):
        raise AssertionError(f"not adjoint: <Ax, y> = {left!r}, <x, A*y> = {right!r}")
