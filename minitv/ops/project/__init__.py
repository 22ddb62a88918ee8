"""project: a sequence of T rows becomes M rows, each a weighted sum of them (Linformer, Wang et al. 2020, arXiv 2006.04768).

    y_m = Σ_t W_mt x_t,    Y = W X                           the products with E_i and F_i in equation (7), with W [M T]

minitv/variants/linformer.py tells what this is for.

Which weights. The heads may have a matrix each or share one: H heads read G matrices, head h reads matrix h · G / H, rounded
down. W has a column for each of the C positions of the longest sequence, and a shorter sequence uses its first T columns.

Padding. ``seen`` says which rows are part of a sequence. The others count as 0 and are never read. This must happen before the
product: each y_m is a mixture of all positions, so that nothing after it can tell what came from padding.

Gradients. Let g be the gradient of Y in one head of one sequence.

    dX = Wᵀ g        dW = the sum of g Xᵀ over all sequences, and over all heads that share W

The form is one product of matrices, which BLAS computes, or cuBLAS on a GPU. A kernel of its own would gain nothing: Y is far
smaller than X, so it costs little to write Y to memory before attention reads it.
"""

from __future__ import annotations

import numpy as np

from autograd.errors import ShapeError
from autograd.laws import independent, law, linear_in
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import matmul, reshape, where


@op("x[B H T K], weight[G M C], seen?:bool[B T] -> y[B H M K]",
    laws=[independent("B K"), linear_in("x"), linear_in("weight")])
def project(x, weight, seen=None):
    """y_m = Σ_t weight_mt x_t over the positions t that are seen; x[B H T K], weight[G M C], seen[B T] -> y[B H M K].

    Head h reads matrix h · G // H, and of its C columns the first T. All positions are seen unless ``seen`` says less.
    ShapeError if G does not divide H, or if T is above C.
    """
    (batch, heads, length, _), (groups, rows, _) = x.shape, weight.shape
    y = np.zeros((*x.shape[:2], rows, x.shape[3]), x.dtype)
    for b, h, m, t in np.ndindex(batch, heads, rows, length):
        if seen is None or seen[b, t]:
            y[b, h, m] += weight[h * groups // heads, m, t] * x[b, h, t]
    return y


@project.form
def grouped(x, weight, seen):
    """Y = W X for all heads that share W at once: time O(H T M K), memory O(H M K), for each sequence."""
    (batch, heads, length, width), (groups, rows, columns) = x.shape, weight.shape
    if seen is not None:
        x = where(seen[:, None, :, None], x, 0.0)
    if groups > 1:
        x = reshape(x, (batch, groups, heads // groups, length, width))
        weight = reshape(weight, (groups, 1, rows, columns))
    y = matmul(weight if length == columns else weight[..., :length], x)
    return reshape(y, (batch, heads, rows, width))


@project.validate
def _(x, weight):
    (_, heads, length, _), (groups, _, columns) = x.shape, weight.shape
    if not groups or heads % groups:
        raise ShapeError(f"project: weight has {groups} matrices, which do not divide the {heads} heads of x")
    if length > columns:
        raise ShapeError(f"project: x has {length} positions, weight has columns for {columns}; allowed: at most as many")


@project.inputs
def _(draw):
    batch, (groups, heads) = draw.size(0, 2, "B"), draw.multiple("G", "H", 1, 2, 0, 2)
    length, width = draw.size(0, 5, "T"), draw.size(0, 3, "K")
    seen = draw.mask(batch, length) if draw.boolean() else None
    weight = draw.floats(groups, draw.size(0, 4, "M"), length + draw.size(0, 2))
    return (draw.floats(batch, heads, length, width), weight, seen), {}


@law(project, "the identity changes nothing that is seen")
def _(case, draw):
    length, width = case.x.shape[2], case.weight.shape[2]
    identity = np.broadcast_to(np.eye(length, width, dtype=case.x.dtype), (len(case.weight), length, width))
    seen = True if case.seen is None else case.seen[:, None, :, None]
    assert_close(case(weight=identity).y, np.where(seen, case.x, case.x.dtype.type(0)), "the identity changes x")


@law(project, "padding is a shorter sequence, whatever stands in it")
def _(case, draw):
    length = case.x.shape[2]
    short = draw.integer(0, length)
    x, seen = case.x.copy(), np.broadcast_to(np.arange(length) < short, (len(case.x), length))
    x[:, :, short:] = draw.choice((np.nan, np.inf, 1.0))
    assert_close(case(x=x, seen=seen).y, case(x=case.x[:, :, :short], seen=None).y, "padding changes the projection", terms=8)
