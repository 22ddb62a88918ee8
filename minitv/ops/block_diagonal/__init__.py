"""block_diagonal: a matrix that is 0 but for G blocks on its diagonal, the factor of which Monarch matrices are products.

    y[g O + o] = Σ_j W[g, o, j] x[g J + j]           in blocks: y = diag(W_0, ..., W_(G-1)) x
    y[g O + o] = Σ_j W[g, o, j] x[j G + g]           ``strided``: y = diag(W_0, ..., W_(G-1)) P x

W [G O J] has G blocks W_g of O × J numbers. So it has G times fewer weights than the dense matrix of G O × G J numbers, and
costs G times fewer products. What is lost: an output sees the inputs of its own block alone.

P is the stride permutation. Without it, block g reads J channels side by side. With it, block g reads every G-th channel, from
channel g on. So two products one after the other, the second one strided, mix all channels: each block of the second reads some
outputs of every block of the first, if a block of the first has at least G outputs, where G counts the blocks of the second.
Then every output sees every input. This is the idea of Monarch matrices, see minitv/ops/monarch/__init__.py.

    >>> import numpy as np
    >>> W = np.ones((2, 2, 2))
    >>> for strided in (False, True):
    ...     print(block_diagonal(np.array([1., 2, 30, 40]), W, strided=strided).numpy())
    [ 3.  3. 70. 70.]
    [31. 31. 42. 42.]

Gradients. Let h be the gradient of y. dW is summed over all rows of x.

    dx = diag(W_0, ..., W_(G-1))ᵀ h                  ``strided``: Pᵀ diag(W_0, ..., W_(G-1))ᵀ h
    dW[g, o, j] = h[g O + o] x[g J + j]              ``strided``: h[g O + o] x[j G + g]

The form ``batched`` is one product of matrices for each block, which BLAS computes on views of x. ``dense`` writes the zeros
out, and shows that the operator is an ordinary matrix.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import beside
from autograd.errors import ShapeError
from autograd.laws import law, linear_in
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import linear, matmul, reshape, swapaxes, transpose


@op("x[... I], weight[G O J] -> y[... M]", analytic=True, laws=[linear_in("x"), linear_in("weight")])
def block_diagonal(x, weight, *, strided=False):
    """y[g O + o] = Σ_j weight[g, o, j] x[g J + j] for x[... G·J], weight[G O J]; with ``strided`` block g reads x[j G + g].

    ShapeError if x has not G · J channels.
    """
    groups, outputs, inputs = weight.shape
    y = np.zeros((*x.shape[:-1], groups * outputs), x.dtype)
    for *lead, g, o in np.ndindex(*x.shape[:-1], groups, outputs):
        for j in range(inputs):
            source = j * groups + g if strided else g * inputs + j
            y[(*lead, g * outputs + o)] += weight[g, o, j] * x[(*lead, source)]
    return y


@block_diagonal.form
def batched(x, weight, strided):
    """G products of matrices: time O(G O J) for each row of x."""
    (groups, outputs, inputs), lead = weight.shape, x.shape[:-1]
    rows = int(np.prod(lead, dtype=int))
    if strided:
        parts = transpose(reshape(x, (rows, inputs, groups)), axes=(2, 0, 1))  # [G R J]
    else:
        parts = transpose(reshape(x, (rows, groups, inputs)), axes=(1, 0, 2))  # [G R J]
    y = matmul(parts, swapaxes(weight))  # [G R O]
    return reshape(transpose(y, axes=(1, 0, 2)), (*lead, groups * outputs))


@block_diagonal.form
def dense(x, weight, strided):
    """x Wᵀ with all zeros of W: time O(G² O J) for each row of x."""
    return linear(x, matrix(weight, strided))


def matrix(weight, strided: bool = False):
    """The matrix [G·O, G·J] of weight[G O J], with its zeros; a Tensor."""
    groups, outputs, inputs = weight.shape
    apart = np.eye(groups, dtype=weight.dtype)
    if strided:
        own = Tensor.wrap(beside(apart[:, None, None, :], weight.data))
        return reshape(reshape(weight, (groups, outputs, inputs, 1)) * own, (groups * outputs, inputs * groups))
    own = Tensor.wrap(beside(apart[:, None, :, None], weight.data))
    return reshape(reshape(weight, (groups, outputs, 1, inputs)) * own, (groups * outputs, groups * inputs))


@block_diagonal.validate
def _(x, weight):
    groups, _, inputs = weight.shape
    if x.shape[-1] != groups * inputs:
        raise ShapeError(f"block_diagonal: x {x.shape} has {x.shape[-1]} channels, weight {weight.shape} has {groups} blocks "
                         f"that read {inputs} each; allowed: {groups * inputs} channels")


@block_diagonal.inputs
def _(draw):
    groups, outputs, inputs = draw.size(1, 3), draw.size(0, 3), draw.size(0, 3)
    return (draw.floats(*draw.shape(0, 2, 3), groups * inputs), draw.floats(groups, outputs, inputs)), {
        "strided": draw.boolean()}


@law(block_diagonal, "an output sees the inputs of its own block alone")
def _(case, draw):
    groups, outputs, inputs = case.weight.shape
    block = draw.integer(0, groups - 1)
    channels = np.arange(groups * inputs)
    inside = channels % groups == block if case.strided else channels // max(inputs, 1) == block
    x = case.x.copy()
    x[..., ~inside] = draw.floats(*x[..., ~inside].shape)
    part = slice(block * outputs, (block + 1) * outputs)
    assert_close(case(x=x).y[..., part], case().y[..., part], "a block reads channels of another block")


@law(block_diagonal, "strided is a permutation of the inputs before blocks that lie side by side")
def _(case, draw):
    groups, _, inputs = case.weight.shape
    shuffled = np.swapaxes(case.x.reshape(*case.x.shape[:-1], inputs, groups), -1, -2).reshape(case.x.shape)
    assert_close(case(x=case.x, strided=True).y, case(x=shuffled, strided=False).y, "strided is no permutation")
