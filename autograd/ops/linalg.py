"""Matrix products: matmul and einsum. (``linear``, with its bias, is an operator of its own.)"""

from __future__ import annotations

import itertools

import numpy as np

from ..cuda import blas
from ..device import is_cupy
from ..errors import ShapeError
from ..op import op
from .elementwise import multiply
from .index import getitem
from .reduce import sum
from .shape import reshape, swapaxes, transpose


@op("a[*], b[*] -> y[*]", analytic=True, method="matmul __matmul__")
def matmul(a, b):
    """Matrix product over the last two axes, the others broadcast: y[.., i, j] = Σ_k a[.., i, k] b[.., k, j].

    A 1-D operand is a vector, as in NumPy. An empty inner size gives zeros.
    """
    left = a[None] if a.ndim == 1 else a
    right = b[:, None] if b.ndim == 1 else b
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (np.broadcast_to(m, lead + m.shape[-2:]) for m in (left, right))
    out = np.zeros((*lead, left.shape[-2], right.shape[-1]), a.dtype)
    for index in np.ndindex(out.shape):
        *batch, i, j = index
        for k in range(left.shape[-1]):
            out[index] += left[(*batch, i, k)] * right[(*batch, k, j)]
    return out.reshape(lead + a.shape[-2:-1] + (b.shape[-1:] if b.ndim > 1 else ()))


matmul.primitive(lambda a, b: blas.matmul(a, b) if is_cupy(a) else np.matmul(a, b))


@matmul.vjp
def _(g, a, b, needs):
    left = reshape(a, shape=(1, -1)) if a.ndim == 1 else a
    right = reshape(b, shape=(-1, 1)) if b.ndim == 1 else b
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    g = reshape(g, shape=(*lead, left.shape[-2], right.shape[-1]))
    ga = gb = None
    if "a" in needs:
        ga = matmul(g, swapaxes(right))
    if "b" in needs:
        gb = matmul(swapaxes(left), g)
        if b.ndim == 1:
            gb = reshape(gb, shape=gb.shape[:-1])
    return ga, gb


@matmul.validate
def _(a, b):
    if not a.ndim or not b.ndim:
        raise ShapeError(f"matmul: a {a.shape} and b {b.shape} need at least one axis each; use * for scalars")
    inner = b.shape[-2] if b.ndim > 1 else b.shape[0]
    if a.shape[-1] != inner:
        raise ShapeError(f"matmul: a {a.shape} and b {b.shape} have different inner sizes, {a.shape[-1]} and {inner}")
    try:
        np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ShapeError(f"matmul: the leading axes of a {a.shape} and b {b.shape} do not broadcast") from None


@matmul.inputs
def _(draw):
    lead, i, k, j = draw.shape(0, 2, 2), draw.size(), draw.size(), draw.size()
    a = (k,) if draw.integer(0, 4) == 0 else (*lead[draw.integer(0, len(lead)):], i, k)
    b = (k,) if draw.integer(0, 4) == 0 else (*(1 if draw.boolean() and n else n for n in lead), k, j)
    return (draw.floats(*a), draw.floats(*b)), {}


def _parse(equation: str, count: int):
    text = equation.replace(" ", "")
    left, arrow, output = text.partition("->")
    terms = left.split(",")
    if len(terms) != count or not all(t.isalpha() or t == "" for t in [*terms, output]):
        raise ShapeError(f"einsum: {equation!r} needs letters only and one term for each of {count} operands")
    if not arrow:
        letters = [c for t in terms for c in t]
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(set(output)) != len(output) or not set(output) <= set("".join(terms)):
        raise ShapeError(f"einsum: the output {output!r} of {equation!r} must be distinct letters of the inputs")
    return terms, output


@op("operands[*] -> y[*]", variadic=True, analytic=True)
def einsum(operands, *, equation=""):
    """Einstein's summation: sum over all letters that are not in the output, for example "bik,bkj->bij".

    Letters may repeat within an operand (a diagonal) and vanish (a sum); the products run through matmul.
    """
    terms, output = _parse(equation, len(operands))
    sizes = {c: n for t, x in zip(terms, operands, strict=True) for c, n in zip(t, x.shape, strict=True)}
    letters = sorted(sizes)
    out = np.zeros(tuple(sizes[c] for c in output), operands[0].dtype)
    for index in itertools.product(*(range(sizes[c]) for c in letters)):
        at = dict(zip(letters, index, strict=True))
        product = 1.0
        for term, x in zip(terms, operands, strict=True):
            product = product * x[tuple(at[c] for c in term)]
        out[tuple(at[c] for c in output)] += product
    return out


@einsum.validate
def _(operands, equation):
    terms, _ = _parse(equation, len(operands))
    sizes: dict = {}
    for i, (term, x) in enumerate(zip(terms, operands, strict=True)):
        if len(term) != x.ndim:
            raise ShapeError(f"einsum: operand {i} has shape {x.shape}, its term {term!r} has {len(term)} letters")
        for letter, size in zip(term, x.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ShapeError(f"einsum: {letter} is {sizes[letter]} and {size} in {equation!r}")


def _diagonals(x, term):
    """Take the diagonal of every repeated letter."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            i = term.index(letter)
            j = term.index(letter, i + 1)
            order = [k for k in range(len(term)) if k not in (i, j)]
            moved = transpose(x, axes=(i, j, *order))
            ids = np.arange(moved.shape[0])
            x, term = getitem(moved, key=(ids, ids)), letter + "".join(term[k] for k in order)
    return x, term


def _contract(x, a, y, b, keep):
    """One product: letters of both that are not kept are summed by matmul, shared kept letters are its batch."""
    for letters, other in ((a, b), (b, a)):
        lone = [i for i, c in enumerate(letters) if c not in other and c not in keep]
        if lone:
            kept = "".join(c for i, c in enumerate(letters) if i not in lone)
            if letters is a:
                x, a = sum(x, axis=tuple(lone)), kept
            else:
                y, b = sum(y, axis=tuple(lone)), kept
    batch = [c for c in a if c in b and c in keep]
    inner = [c for c in a if c in b and c not in keep]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}

    def count(letters):
        return int(np.prod([sizes[c] for c in letters], dtype=int))

    x = transpose(x, axes=tuple(a.index(c) for c in [*batch, *rows, *inner]))
    y = transpose(y, axes=tuple(b.index(c) for c in [*batch, *inner, *columns]))
    x = reshape(x, shape=(count(batch), count(rows), count(inner)))
    y = reshape(y, shape=(count(batch), count(inner), count(columns)))
    product = multiply(x, y) if not inner and count(rows) == count(columns) == 1 else matmul(x, y)
    term = "".join([*batch, *rows, *columns])
    return reshape(product, shape=tuple(sizes[c] for c in term)), term


@einsum.form
def composed(operands, equation):
    terms, output = _parse(equation, len(operands))
    parts = [_diagonals(x, t) for x, t in zip(operands, terms, strict=True)]
    x, term = parts[0]
    for i, (y, other) in enumerate(parts[1:], 1):
        keep = set(output).union(*(t for _, t in parts[i + 1:]))
        x, term = _contract(x, term, y, other, keep)
    lone = tuple(i for i, c in enumerate(term) if c not in output)
    if lone:
        x, term = sum(x, axis=lone), "".join(c for c in term if c in output)
    return transpose(x, axes=tuple(term.index(c) for c in output))


@einsum.inputs
def _(draw):
    equation = draw.choice(["ij,jk->ik", "bij,bkj->bik", "ii->i", "ii", "ij->", "i,j->ij", "iij,jk->ki", "ij,ij->",
                            "ij,jk,kl->li", "bhtk,bhsk->bhts", "ij,i->j", "i,i,i->i", "ij,kl->ik"])
    terms = equation.partition("->")[0].split(",")
    sizes = {c: draw.size(0, 3) for c in sorted(set("".join(terms)))}
    return ([draw.floats(*(sizes[c] for c in t)) for t in terms],), {"equation": equation}
