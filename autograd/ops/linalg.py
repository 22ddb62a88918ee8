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


_AXES = tuple(map(chr, range(0xE000, 0xE040)))  # letters for the axes that `...` stands for, the last axis first


def _parse(equation: str, shapes):
    """The term of each operand, that of the output, and the size of every letter; each axis of `...` gets a letter."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise ShapeError(f"einsum: {equation!r} has {len(terms)} terms, but got {len(shapes)} operands")
    letters = left.replace("...", "").replace(",", "")
    for term in (*terms, output):
        if not (term.replace("...", "", 1) or "a").isalpha():
            raise ShapeError(f"einsum: the term {term!r} of {equation!r} must be letters, with at most one '...'")
    if not arrow:
        output = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    named = output.replace("...", "")
    if len(set(named)) != len(named) or not set(named) <= set(letters):
        raise ShapeError(f"einsum: the output {output!r} of {equation!r} must be distinct letters of the inputs")
    most = 0
    for i, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        count = len(term.replace("...", ""))
        more = len(shape) - count
        if more < 0 or (more and "..." not in term):
            raise ShapeError(f"einsum: operand {i} has shape {shape}, its term {term!r} has {count} letters")
        if more > len(_AXES):
            raise ShapeError(f"einsum: '...' stands for at most {len(_AXES)} axes, operand {i} has {more}")
        terms[i], most = term.replace("...", "".join(reversed(_AXES[:more]))), max(most, more)
    if most and "..." not in output:
        raise ShapeError(f"einsum: the output {output!r} of {equation!r} needs '...' for the axes that the operands have there")
    return terms, output.replace("...", "".join(reversed(_AXES[:most]))), _sizes(equation, terms, shapes)


def _sizes(equation, terms, shapes) -> dict[str, int]:
    """The size of each letter; a 1 in one operand is repeated to the size in another."""
    sizes: dict = {}
    for i, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        lengths: dict = {}
        for letter, size in zip(term, shape, strict=True):
            name = letter if letter.isalpha() else "an axis of `...`"
            if lengths.setdefault(letter, size) != size:
                raise ShapeError(f"einsum: {name} is {lengths[letter]} and {size} in operand {i} of {equation!r}")
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
            elif size not in (1, sizes[letter]):
                raise ShapeError(f"einsum: {name} is {sizes[letter]} and {size} in {equation!r}, operand {i} has shape {shape}")
    return sizes


@op("operands[*] -> y[*]", variadic=True, analytic=True)
def einsum(operands, *, equation=""):
    """Einstein's summation: sum over all letters that are not in the output, for example "bik,bkj->bij".

    Letters may repeat within an operand (a diagonal) and vanish (a sum); the products run through matmul. As in NumPy,
    `...` stands for any number of axes, which are broadcast and stay ("...ij,...jk->...ik"), and an axis of size 1 is
    repeated to the size that its letter has in another operand. Without "->" the output is `...`, then the letters that
    stand once, in the order of the alphabet. A wrong term, number of axes or size raises ShapeError.
    """
    terms, output, sizes = _parse(equation, [x.shape for x in operands])
    letters = sorted(sizes)
    out = np.zeros(tuple(sizes[c] for c in output), operands[0].dtype)
    for index in itertools.product(*(range(sizes[c]) for c in letters)):
        at = dict(zip(letters, index, strict=True))
        product = 1.0
        for term, x in zip(terms, operands, strict=True):
            product = product * x[tuple(0 if n == 1 else at[c] for c, n in zip(term, x.shape, strict=True))]
        out[tuple(at[c] for c in output)] += product
    return out


einsum.validate(lambda operands, equation: _parse(equation, [x.shape for x in operands]))


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


def _squeezed(x, term, sizes):
    """Without the axes of size 1 that another operand has larger: a product repeats its other factor over them."""
    kept = [(c, n) for c, n in zip(term, x.shape, strict=True) if n == sizes[c]]
    return reshape(x, shape=tuple(n for _, n in kept)), "".join(c for c, _ in kept)


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
    terms, output, sizes = _parse(equation, [x.shape for x in operands])
    parts = [_squeezed(*_diagonals(x, t), sizes) for x, t in zip(operands, terms, strict=True)]
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
                            "ij,jk,kl->li", "bhtk,bhsk->bhts", "ij,i->j", "i,i,i->i", "ij,kl->ik",
                            "...ij,...jk->...ik", "i...,...i", "...ii->...i", "j...,...->j..."])
    terms = equation.partition("->")[0].split(",")
    sizes = {c: draw.size(0, 3) for c in sorted(set("".join(terms)) - {"."})}
    lead, shapes = draw.shape(0, 2, 3), []
    for term in terms:
        lengths = {c: 1 if draw.integer(0, 5) == 0 else n for c, n in sizes.items()}  # an axis of 1 is repeated
        letters, dots, rest = term.partition("...")
        middle = [1 if draw.integer(0, 3) == 0 else n for n in lead[draw.integer(0, len(lead)):]] if dots else []
        shapes.append((*(lengths[c] for c in letters), *middle, *(lengths[c] for c in rest)))
    return ([draw.floats(*shape) for shape in shapes],), {"equation": equation}
