"""banded_product: the bias of aft_local, the part of u vᵀ that lies in the window.

    du_t = Σ_j g_tj v_s,    dv_s = Σ g_tj u_t over all (t, j) that belong to s           g is the gradient of the bias
"""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.errors import DomainError
from autograd.laws import linear_in
from autograd.op import op
from autograd.ops import matmul, pad, swapaxes, where


@op("u[T R], v[S R] -> bias[T W]", laws=[linear_in("u"), linear_in("v")], analytic=True)
def banded_product(u, v, *, window=32, causal=True):
    """The part of u vᵀ that aft_local takes for its bias: bias[t, j] = u_t · v_s for the lags j of the window.

    u[T R], v[S R]; the last row of u belongs to the last of v. With ``causal`` s = t + S - T - j for j = 0 .. window-1, else
    s = t + S - T + window - 1 - j for j = 0 .. 2 window - 2. Where v has no row s, the bias is 0. A window below 1 raises
    DomainError.
    """
    ahead = 0 if causal else window - 1
    bias = np.zeros((len(u), window + ahead), u.dtype)
    for t, j in np.ndindex(bias.shape):
        s = t + len(v) - len(u) + ahead - j
        if 0 <= s < len(v):
            bias[t, j] = np.dot(u[t], v[s])
    return bias


@banded_product.form
def composed(u, v, window, causal):
    xp, ahead = namespace(u.data), 0 if causal else window - 1
    rows = xp.arange(u.shape[0])[:, None]
    s = rows + v.shape[0] - u.shape[0] + ahead - xp.arange(window + ahead)
    inside = (s >= 0) & (s < v.shape[0])
    if not v.shape[0]:
        v = pad(v, widths=((0, 1), (0, 0)))
    return where(inside, matmul(u, swapaxes(v))[rows, xp.where(inside, s, 0)], 0.0)


banded_product.kernel("cpu", prefix="band_")
banded_product.kernel("cuda", prefix="band_")


@banded_product.validate
def _(u, v, window, causal):
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise DomainError(f"banded_product: window must be an integer of at least 1, got {window!r}")


@banded_product.inputs
def _(draw):
    rank, queries = draw.size(0, 4, "R"), draw.size(0, 6, "T")
    params = {"window": draw.integer(1, 4), "causal": draw.boolean()}
    return (draw.floats(queries, rank), draw.floats(draw.size(0, 7, "S"), rank)), params
