"""gated: a value times a function of its gate, as in gated linear units (Shazeer 2020, arXiv 2002.05202).

The sigmoid is RWKV's receptance (Peng et al. 2023, arXiv 2305.13048, eq. 17); the swish (Ramachandran et al. 2017, arXiv
1710.05941) stands after RetNet's heads (Sun et al. 2023, arXiv 2307.08621, eq. 8).
"""

from __future__ import annotations

from autograd.errors import DomainError
from autograd.laws import linear_in, non_finite
from autograd.op import op
from autograd.ops import sigmoid, silu
from autograd.ops.elementwise import scalar_loop

FUNCTIONS = ("sigmoid", "swish")


@op("x[... D], gate[... D] -> y[... D]", laws=[linear_in("x"), non_finite()])
def gated(x, gate, *, function="sigmoid"):
    """y = x · sigmoid(gate), elementwise; with ``function="swish"`` y = x · silu(gate)."""
    activation = silu if function == "swish" else sigmoid
    return scalar_loop(lambda v, g: v * g, x, activation.definition(gate))


@gated.form
def composed(x, gate, function):
    return x * (silu(gate) if function == "swish" else sigmoid(gate))


gated.kernel("cpu")
gated.kernel("cuda")


@gated.validate
def _(x, gate, function):
    if function not in FUNCTIONS:
        raise DomainError(f"gated: function is one of {', '.join(FUNCTIONS)}, got {function!r}")


@gated.inputs
def _(draw):
    lead, width = draw.shape(0, 2), draw.size(0, 5)
    narrow = tuple(1 if n and draw.integer(0, 3) == 0 else n for n in lead)
    return (draw.floats(*lead, width), draw.floats(*narrow, width, low=-4.0, high=4.0)), {"function": draw.choice(FUNCTIONS)}
