"""gated: a value times a function of a gate (gated linear units: Shazeer 2020, arXiv 2002.05202).

    y = x ∘ s(gate)                 s(z) = sigmoid(z) = 1 / (1 + e^-z), or swish(z) = z sigmoid(z); ∘ is elementwise
    dx = g ∘ s(gate)                where g is the gradient of y
    dgate = g ∘ x ∘ s'(gate)        sigmoid' = s (1 - s),    swish' = sigmoid(z) (1 + z (1 - sigmoid(z)))

A gate lets the present token decide how much of a result passes. The sigmoid lies between 0 and 1: it is the receptance of RWKV
(Peng et al. 2023, arXiv 2305.13048, equations (17) and (18)). The swish (Ramachandran et al. 2017, arXiv 1710.05941) has no
upper limit: it stands after RetNet's heads (Sun et al. 2023, arXiv 2307.08621, equation (8)).
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
    """y = x ∘ sigmoid(gate) for x[... D] and gate[... D]; with ``function="swish"`` y = x ∘ gate ∘ sigmoid(gate).

    Another ``function`` raises DomainError.
    """
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
    lead, width = draw.shape(0, 2), draw.size(0, 5, "D")
    narrow = tuple(1 if n and draw.integer(0, 3) == 0 else n for n in lead)
    return (draw.floats(*lead, width), draw.floats(*narrow, width, low=-4.0, high=4.0)), {"function": draw.choice(FUNCTIONS)}
