"""Elementwise operators: one table row each. Inputs broadcast like NumPy's; the engine undoes it in the gradient.

Decided where mathematics leaves a choice: |x| has gradient 0 at 0; clip passes the gradient at its bounds;
maximum and minimum share it evenly on ties and propagate NaN; sqrt, log and division follow the limits (an infinite
slope is infinite). x ** 0 is 1 for every x, also 0, infinity and NaN, so its slope by x is 0. The slope of x ** y by y is
its limit, -inf for 0 ** y with y < 0, 0 with y > 0, except that both slopes of 0 ** 0 are 0; it is NaN for a negative x.

NaN and infinities of an argument give what IEEE arithmetic gives. ``where(m, f(x), 0)`` cannot hide a NaN of f's
gradient: make f's argument safe first, ``where(m, f(where(m, x, 1)), 0)``.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import special
from ..device import FLOATS, location, move, namespace
from ..draw import Draw
from ..errors import DomainError, DtypeError
from ..laws import non_finite
from ..op import Op
from ..tensor import Tensor


def ieee(function, *x):
    """The function of Python floats, where Python raises as IEEE arithmetic has it: NaN, or ∞ for what is too large."""
    try:
        return function(*x)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def fsum(values):
    """``math.fsum`` of a list, where it raises the sum in order: infinities of both signs, or more than the largest float."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return sum(values)


def scalar_loop(function, *arrays):
    """Apply a function of Python floats to every element of the broadcast arrays: how definitions are computed."""
    out = np.empty(np.broadcast_shapes(*(a.shape for a in arrays)), next(a.dtype for a in arrays if a.dtype.kind == "f"))
    for index in np.ndindex(out.shape):
        out[index] = ieee(function, *(np.broadcast_to(a, out.shape)[index].item() for a in arrays))
    return out


def unary(name, formula, scalar, array, vjp, *, domain=None, kinks=(), analytic=True, tolerance=1.0,
          method: bool | str = True) -> Op:
    """Declare y = f(x): the formula, the definition on a float, array code, and the gradient in operators."""

    def definition(x):
        return scalar_loop(scalar, x)

    definition.__name__ = name
    definition.__doc__ = f"{formula}, elementwise."
    op = Op(definition, "x[...] -> y[...]", laws=[non_finite()], analytic=analytic, tolerance=tolerance, method=method)
    op.primitive(array)
    op.vjp(vjp)
    low, high = domain or (None, None)
    op.inputs(lambda draw: ((draw.floats(*draw.shape(), low=low, high=high, kinks=kinks),), {}))
    return op


def binary(name, formula, scalar, array, vjp, *, domains=((None, None), (None, None)), separate=False,
           analytic=True, method: bool | str = False) -> Op:
    """Declare out = f(x, y) with broadcasting."""

    def definition(x, y):
        return scalar_loop(scalar, x, y)

    definition.__name__ = name
    definition.__doc__ = f"{formula}, elementwise with broadcasting."
    op = Op(definition, "x[...], y[...] -> out[...]", laws=[non_finite()], analytic=analytic, method=method)
    op.primitive(array)
    op.vjp(vjp)

    def inputs(draw: Draw):
        shape = draw.shape()
        pair = []
        for low, high in domains:
            operand = tuple(1 if n and draw.integer(0, 3) == 0 else n for n in shape)
            operand = operand[draw.integer(0, len(operand)):] if draw.integer(0, 3) == 0 else operand
            pair.append(draw.floats(*operand, low=low, high=high))
        if separate:  # keep away from x = y, where the derivative jumps
            x, y = np.broadcast_arrays(*pair)
            pair = [np.where(np.abs(x - y) < 0.05, x + y.dtype.type(0.2), x), pair[1]]
        return tuple(pair), {}

    op.inputs(inputs)
    return op


def _named(function, name):
    function.__name__ = name
    return function


def _constant(like: Tensor, array) -> Tensor:
    """A plain array as a constant of the tensor's dtype."""
    return Tensor.wrap(namespace(like.data).asarray(array, dtype=like.dtype))


def _sigmoid(x):
    return special(x).expit(x)


def _silu(x):
    return namespace(x).maximum(x, np.finfo(x.dtype).min) * _sigmoid(x)  # -inf · 0 is NaN, its limit is 0


def _softplus(x):
    xp = namespace(x)
    return xp.maximum(x, x.dtype.type(0)) + xp.log1p(xp.exp(-xp.abs(x)))


def _scalar_sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _scalar_divide(x, y):
    return x / y if y else x * math.copysign(math.inf, y)


def _scalar_power(x, y):
    if x == 0 > y:
        return math.copysign(math.inf, math.pow(x, -y))
    try:
        return math.pow(x, y)
    except OverflowError:
        return math.inf * math.pow(math.copysign(1.0, x), y)


def _needed(needs, **makers):
    """The gradients that are needed, None for the others."""
    return tuple(make() if name in needs else None for name, make in makers.items())


def _power_vjp(g, x, y, out, needs):
    def by_x():
        flat = y.data == 0
        if "y" in needs:  # the slope y x^(y-1) has a derivative by y at y = 0, 1/x: of what is too small for it, 0 is left
            flat = flat & ~(namespace(x.data).abs(x.data) >= np.finfo(x.dtype).tiny)
        return g * where(flat, 0.0, y) * power(x, where(flat, 0.0, y - 1.0))

    def by_y():
        still = (x.data == 0) & (y.data >= 0) | (x.data == math.inf) & (y.data < 0)  # where a power of 0 outweighs the log
        return g * out * log(where(still, 1.0, x))

    return _needed(needs, x=by_x, y=by_y)


def _maximum_share(chosen, other):
    """1 where chosen, 1/2 on ties; a NaN is chosen."""
    xp = namespace(chosen.data)
    a, b = chosen.data, other.data
    return _constant(chosen, (a > b) + 0.5 * (a == b) + 1.0 * xp.isnan(a))


def _minimum_share(chosen, other):
    xp = namespace(chosen.data)
    a, b = chosen.data, other.data
    return _constant(chosen, (a < b) + 0.5 * (a == b) + 1.0 * xp.isnan(a))


def _extreme(pick):
    return lambda x, y: math.nan if math.isnan(x) or math.isnan(y) else pick(x, y)


add = binary("add", "x + y", lambda x, y: x + y, lambda x, y: x + y, lambda g: (g, g), method="__add__")
subtract = binary("subtract", "x - y", lambda x, y: x - y, lambda x, y: x - y,
                  lambda g, needs: _needed(needs, x=lambda: g, y=lambda: -g), method="__sub__")
multiply = binary("multiply", "x y", lambda x, y: x * y, lambda x, y: x * y,
                  lambda g, x, y, needs: _needed(needs, x=lambda: g * y, y=lambda: g * x), method="__mul__")
divide = binary("divide", "x / y", lambda x, y: x / y, lambda x, y: x / y,
                lambda g, y, out, needs: _needed(needs, x=lambda: g / y, y=lambda: -g * out / y), method="__truediv__",
                domains=((None, None), (0.5, 2.0)))
power = binary("power", "x ** y", lambda x, y: x**y, lambda x, y: x**y, _power_vjp, domains=((0.3, 2.0), (-2.0, 3.0)),
               method="__pow__")
maximum = binary("maximum", "max(x, y), NaN if either is", _extreme(max), lambda x, y: namespace(x, y).maximum(x, y),
                 lambda g, x, y: (g * _maximum_share(x, y), g * _maximum_share(y, x)), separate=True, analytic=False)
minimum = binary("minimum", "min(x, y), NaN if either is", _extreme(min), lambda x, y: namespace(x, y).minimum(x, y),
                 lambda g, x, y: (g * _minimum_share(x, y), g * _minimum_share(y, x)), separate=True, analytic=False)

negative = unary("negative", "-x", lambda x: -x, lambda x: -x, lambda g: -g, method="__neg__")
exp = unary("exp", "e^x", math.exp, lambda x: namespace(x).exp(x), lambda g, out: g * out)
log = unary("log", "ln x", lambda x: math.log(x) if x else -math.inf, lambda x: namespace(x).log(x),
            lambda g, x: g / x, domain=(0.3, 3.0))
sqrt = unary("sqrt", "√x (infinite slope at 0)", math.sqrt, lambda x: namespace(x).sqrt(x),
             lambda g, out: g * 0.5 / out, domain=(0.3, 3.0))
rsqrt = unary("rsqrt", "1/√x", lambda x: _scalar_divide(1.0, math.sqrt(x)), lambda x: 1 / namespace(x).sqrt(x),
              lambda g, x, out: g * -0.5 * out / x, domain=(0.3, 3.0))
sin = unary("sin", "sin x, x in radians", math.sin, lambda x: namespace(x).sin(x), lambda g, x: g * cos(x))
cos = unary("cos", "cos x, x in radians", math.cos, lambda x: namespace(x).cos(x), lambda g, x: -g * sin(x))
tanh = unary("tanh", "tanh x", math.tanh, lambda x: namespace(x).tanh(x), lambda g, x: g * 4.0 * _bell(x, 2))
sigmoid = unary("sigmoid", "1 / (1 + e^-x)", _scalar_sigmoid, _sigmoid, lambda g, x: g * _bell(x, 1), analytic=False)
silu = unary("silu", "x sigmoid(x), 0 at -∞", lambda x: 0.0 if x == -math.inf else x * _scalar_sigmoid(x), _silu,
             lambda g, x: _silu_vjp(g, x), analytic=False)
softplus = unary("softplus", "ln(1 + e^x); -softplus(-x) is the stable ln(sigmoid(x))",
                 lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))), _softplus, lambda g, x: g * sigmoid(x),
                 analytic=False)
absolute = unary("absolute", "|x|", abs, lambda x: namespace(x).abs(x),
                 lambda g, x: g * _constant(x, namespace(x.data).sign(x.data)), kinks=(0.0,), analytic=False,
                 method="__abs__")
erf = unary("erf", "(2/√π) ∫₀ˣ e^(-t²) dt", math.erf, lambda x: special(x).erf(x),
            lambda g, x: g * (2 / math.sqrt(math.pi)) * exp(-(x * x)))


def _bell(x, rate):
    """e / (1 + e)² with e = e^(-rate |x|), which keeps its digits far out; even in x, so the sign is a constant."""
    number = x.dtype.type
    e = exp(x * Tensor.wrap(namespace(x.data).where(x.data < 0, number(rate), number(-rate))))
    total = 1.0 + e
    return e / (total * total)


def _silu_vjp(g, x):
    x = clip(x, -1e4, 1e4)  # beyond, the slope is 0 or 1, and ∞ · 0 is NaN
    s = sigmoid(x)
    return g * s * (1.0 + x * (1.0 - s))


def _where(condition, x, y):
    """x where the condition holds, else y: out = condition ? x : y, all three broadcast."""
    return scalar_loop(lambda c, a, b: a if c else b, condition, x, y)


where = Op(_named(_where, "where"), "condition:bool[...], x[...], y[...] -> out[...]", laws=[non_finite()], analytic=True)
where.primitive(lambda condition, x, y: namespace(condition, x, y).where(condition, x, y))
where.vjp(lambda g, condition, needs: _needed(
    needs, x=lambda: where(condition, g, 0.0), y=lambda: where(condition, 0.0, g)))


@where.inputs
def _(draw):
    shape = draw.shape()
    squeezed = tuple(1 if n else 0 for n in shape)
    pair = [draw.floats(*(squeezed if draw.integer(0, 3) == 0 else shape)) for _ in range(2)]
    return (draw.mask(*(shape[1:] if draw.boolean() else shape)), *pair), {}


def _clip(x, *, low=None, high=None):
    """min(max(x, low), high); None is no bound. The gradient passes where low <= x <= high."""
    return scalar_loop(lambda v: v if v != v else min(max(v, -math.inf if low is None else low),
                                                      math.inf if high is None else high), x)


clip = Op(_named(_clip, "clip"), "x[...] -> y[...]", laws=[non_finite()], method=True)


@clip.primitive
def _(x, low, high):
    if low is not None:
        x = namespace(x).maximum(x, x.dtype.type(low))
    return namespace(x).minimum(x, x.dtype.type(high)) if high is not None else x.copy()


@clip.vjp
def _(g, x, low, high):
    inside = namespace(x.data).ones(x.shape, bool)
    if low is not None:
        inside &= x.data >= low
    if high is not None:
        inside &= x.data <= high
    return where(inside, g, 0.0)


@clip.inputs
def _(draw):
    return (draw.floats(*draw.shape(), kinks=(-0.5, 0.75)),), {
        "low": draw.choice((None, -0.5)), "high": draw.choice((None, 0.75))}


@clip.validate
def _(x, low, high):
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and not isinstance(bound, int | float):
            raise DtypeError(f"clip: {name} must be a Python number or None, got {type(bound).__name__}")
    if low is not None and high is not None and low > high:
        raise DomainError(f"clip: low {low} is above high {high}")


def _identity(x):
    """x itself, as a new node of the graph."""
    return x.copy()


identity = Op(_named(_identity, "identity"), "x[...] -> y[...]", laws=[non_finite()], view=True, analytic=True)
identity.primitive(lambda x: x)
identity.vjp(lambda g: g)


def _astype(x, *, dtype=np.float32):
    """x converted to float32 or float64; the gradient is converted back."""
    return x.astype(dtype)


astype = Op(_named(_astype, "astype"), "x[...] -> y[...]", laws=[non_finite()], method=True)
astype.primitive(lambda x, dtype: x.astype(dtype))
astype.vjp(lambda g, x: astype(g, dtype=x.dtype))


@astype.inputs
def _(draw):
    return (draw.floats(*draw.shape()),), {"dtype": draw.dtype}


@astype.validate
def _(x, dtype):
    if np.dtype(dtype) not in FLOATS:
        raise DtypeError(f"astype: dtype {np.dtype(dtype)} is not differentiable, allowed: float32, float64")


def _to_device(x, *, device="cpu"):
    """A copy of x on a device: "cpu", "cuda" (the current card) or "cuda:1". The gradient is moved back."""
    return x.copy()


def _copied(x, device):
    moved = move(x, device)
    return x.copy() if moved is x else moved


to_device = Op(_named(_to_device, "to_device"), "x[...] -> y[...]", laws=[non_finite()], analytic=True)
to_device.primitive(lambda x, device: _copied(x, device))
to_device.vjp(lambda g, x: to_device(g, device=location(x.data)))
