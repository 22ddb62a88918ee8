"""sigmoid_gate: a value times the sigmoid of its gate, as RWKV's receptance (Peng et al. 2023, arXiv 2305.13048, eq. 17)."""

from __future__ import annotations

import math

from autograd.laws import linear_in
from autograd.op import op
from autograd.ops import sigmoid
from autograd.ops.elementwise import scalar_loop


@op("x[... D], gate[... D] -> y[... D]", laws=[linear_in("x")])
def sigmoid_gate(x, gate):
    """y = x sigmoid(gate), elementwise."""
    return scalar_loop(lambda v, g: v / (1 + math.exp(-g)) if g > -700 else 0.0, x, gate)


@sigmoid_gate.form
def composed(x, gate):
    return x * sigmoid(gate)


sigmoid_gate.kernel("cpu", "minitv.ops.sigmoid_gate.cpu")
sigmoid_gate.kernel("cuda", "minitv.ops.sigmoid_gate.gpu")


@sigmoid_gate.inputs
def _(draw):
    lead, width = draw.shape(0, 2), draw.size(0, 5)
    narrow = tuple(1 if n and draw.integer(0, 3) == 0 else n for n in lead)
    return (draw.floats(*lead, width), draw.floats(*narrow, width, low=-4.0, high=4.0)), {}
