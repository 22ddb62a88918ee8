"""Declare an operator with a form, a gradient of your own and a kernel, and have all of it proven.

    python examples/03_write_an_operator.py

The operator is the exponential moving average along time, y_t = a y_{t-1} + (1 - a) x_t. Its page states the definition, a loop
that is hard to get wrong, and then three other ways to compute the same: Tensor operators whose gradient the tape makes,
array code with a gradient, and a compiled kernel. What their functions may name and what they return is said once, in the
docstring of autograd/routes.py. ``verify`` runs every way against the definition, its derivatives and its laws; a form that is
wrong by a thousandth is caught, as the end shows.

In a package of your own the kernel would stand in cpu.py beside the page, and ``moving_average.kernel("cpu")`` finds it there.
"""

import numpy as np

from autograd import Tensor, explain, flip, matmul, op, tril, verify
from autograd.cpu.compile import cpu_kernel
from autograd.device import namespace
from autograd.laws import causal, independent, linear_in


@op("x[B T C] -> y[B T C]", analytic=True, laws=[causal("x", except_for=("parallel",)), independent("B C"), linear_in("x")])
def moving_average(x, *, decay=0.9):
    """y_t = decay · y_{t-1} + (1 - decay) · x_t with y_{-1} = 0."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        y[:, t] = (decay * y[:, t - 1] if t else 0) + (1 - decay) * x[:, t]
    return y


@moving_average.form
def parallel(x, decay):
    """All steps at once, on any device: a lower-triangular matrix of powers of the decay.

    It multiplies later steps by 0, which a NaN there would show: the law of causality leaves that case out for this form.
    """
    xp = namespace(x.data)
    steps = xp.arange(x.shape[1])
    powers = (decay ** xp.maximum(steps[:, None] - steps, 0)).astype(x.dtype)  # [T T]
    return matmul(tril(Tensor(powers)) * (1 - decay), x)


@moving_average.primitive
def scan(x, decay):
    """Step after step, on any device: array code, so that its gradient has to be stated."""
    y = (1 - decay) * x
    for t in range(1, x.shape[1]):
        y[:, t] += decay * y[:, t - 1]
    return y


@moving_average.vjp
def _(g, decay):
    return flip(moving_average(flip(g, axis=1), decay=decay), axis=1)  # the same average, from the end


@cpu_kernel
def _average(x, decay, first, last, step, y):
    rest = x.dtype.type(1) - decay
    for b in range(x.shape[0]):
        for t in range(first, last, step):
            for c in range(x.shape[2]):
                y[b, t, c] = rest * x[b, t, c] + (decay * y[b, t - step, c] if t != first else x.dtype.type(0))


def forward(x, decay):
    x, y = np.ascontiguousarray(x), np.empty(x.shape, x.dtype)  # [B T C]
    _average(x, x.dtype.type(decay), 0, x.shape[1], 1, y)
    return y, decay


def backward(saved, g):
    g, gx = np.ascontiguousarray(g), np.empty(g.shape, g.dtype)
    _average(g, g.dtype.type(saved), g.shape[1] - 1, -1, -1, gx)
    return (gx,)


moving_average.kernel("cpu", module=__name__)

print(explain(moving_average, np.ones((1, 4, 2))))
report = verify(moving_average)
print(report)
if not report.ok:
    raise SystemExit("a right operator was not proven")


@moving_average.form
def wrong(x, decay):
    return parallel(x, decay) * 1.001


failures = [row for row in verify(moving_average).rows if row.failure]
print("\na form that is off by a thousandth is caught:", failures[0].failure.splitlines()[0])
if {row.route for row in failures} != {"form wrong"}:
    raise SystemExit("something else was blamed")
