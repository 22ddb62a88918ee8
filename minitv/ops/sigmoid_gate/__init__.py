"""sigmoid_gate: a value times the sigmoid of its gate, as RWKV's receptance (Peng et al. 2023, arXiv 2305.13048, eq. 17)."""

from __future__ import annotations

from autograd.laws import linear_in
from autograd.op import op
from autograd.ops import sigmoid
from autograd.ops.elementwise import scalar_loop


@op("x[... D], gate[... D] -> y[... D]", laws=[linear_in("x")])
def sigmoid_gate(x, gate):
    """y = x sigmoid(gate), elementwise."""
    return scalar_loop(lambda v, g: v * sigmoid_of(g), x, gate)
