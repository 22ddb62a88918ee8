"""swish_gate: a value times the swish of its gate, as after RetNet's heads (arXiv 2307.08621, eq. 8).

Swish is Ramachandran et al. 2017, arXiv 1710.05941; gates in feed-forward networks are Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import math

from autograd.laws import linear_in
from autograd.op import op
from autograd.ops import sigmoid
from autograd.ops.elementwise import scalar_loop


@op("x[... D], gate[... D] -> y[... D]", laws=[linear_in("x")])
def swish_gate(x, gate):
    """y = x · gate · sigmoid(gate), elementwise."""
    return scalar_loop(lambda v, g: v * g / (1 + math.exp(-g)) if g > -700 else 0.0, x, gate)


@swish_gate.form
def composed(x, gate):
    return x * (gate * sigmoid(gate))


swish_gate.kernel("cpu", "minitv.ops.swish_gate.cpu")
swish_gate.kernel("cuda", "minitv.ops.swish_gate.gpu")


@swish_gate.inputs
def _(draw):
    lead, width = draw.shape(0, 2), draw.size(0, 5)
    narrow = tuple(1 if n and draw.integer(0, 3) == 0 else n for n in lead)
    return (draw.floats(*lead, width), draw.floats(*narrow, width, low=-4.0, high=4.0)), {}
