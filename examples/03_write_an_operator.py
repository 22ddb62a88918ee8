"""Declare an operator, get its checks: values, gradients to second order, and its laws.

    python examples/03_write_an_operator.py

The operator is the exponential moving average along time, y_t = a y_{t-1} + (1 - a) x_t. Its page states the definition
(a loop that is hard to get wrong) and a form (parallel array code, whose gradient the tape makes). A form that is wrong
by a factor is caught, as the end shows.
"""

import math

import numpy as np

from autograd import REGISTRY, Tensor, assert_close, explain, gradcheck, matmul, op, tril, use
from autograd.draw import Draw, draw_inputs
from autograd.laws import causal, independent, linear_in


@op("x[B T C] -> y[B T C]", analytic=True, laws=[*causal("x"), independent("B"), linear_in("x")])
def moving_average(x, *, decay=0.9):
    """y_t = decay · y_{t-1} + (1 - decay) · x_t with y_{-1} = 0."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        y[:, t] = (decay * y[:, t - 1] if t else 0) + (1 - decay) * x[:, t]
    return y


@moving_average.form
def parallel(x, *, decay=0.9):
    """All steps at once: a lower-triangular matrix of powers of the decay."""
    steps = np.arange(x.shape[1])
    powers = np.exp(math.log(decay) * np.maximum(steps[:, None] - steps, 0)).astype(x.dtype)
    return matmul(tril(Tensor(powers)) * (1 - decay), x)


def verify(operator):
    """What the test suite does for every operator in the registry, in short."""
    for seed in range(20):
        draw = Draw.seeded(seed)
        arrays, params = draw_inputs(operator, draw)
        expected = operator.definition(*arrays, **params)
        for form in operator.forms:
            with use(operator, form=form):
                assert_close(operator(*arrays, **params).numpy(), expected, f"{operator.name}, form {form}", terms=16)
                gradcheck(lambda x, params=params: operator(x, **params), *arrays, analytic=operator.analytic, order=2)

                def run(arrays, params):
                    return (operator(*arrays, **params).numpy(),)

                for law in operator.laws:
                    law.check(operator, arrays, params, run, draw)


verify(REGISTRY["moving_average"])
print(explain("moving_average", np.ones((1, 4, 2))))
print(f"values, gradients and {len(moving_average.laws)} laws hold: {', '.join(map(str, moving_average.laws))}")

correct = moving_average.forms["parallel"].function
moving_average.forms["parallel"].function = lambda x, decay=0.9: correct(x, decay=decay) * 1.001
try:
    verify(moving_average)
except AssertionError as error:
    print("a form that is off by a thousandth is caught:", str(error).splitlines()[0])
else:
    raise SystemExit("the wrong form was not caught")
