"""The random directions of random features: Gaussian ones, or orthogonal ones with the lengths of Gaussian ones."""

from __future__ import annotations

import numpy as np

from autograd.random import Random


def random_projection(rng: Random, features: int, width: int, *, orthogonal: bool = True, fixed: bool = False) -> np.ndarray:
    """Rows w_f of N(0, I), W[F K] in float64; ``orthogonal`` ones in blocks of K rows, ``fixed`` ones with length √K.

    The rows of a block are a random rotation of the axes: Q of the QR decomposition of a Gaussian matrix, with its columns
    multiplied by the signs of R's diagonal (Mezzadri 2007, arXiv math-ph/0609050). Without the signs the rotation is not
    uniform: LAPACK makes the first coordinate of the first row negative in every draw, and e^(w · x) is biased. A row alone
    is then Gaussian, also with ``orthogonal``, because its length is that of an independent Gaussian vector.
    """
    gaussian = rng.split(0).normal((-(-features // width), width, width), np.float64)
    if orthogonal:
        q, r = np.linalg.qr(gaussian)
        signs = np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1.0, 1.0)
        rows = np.swapaxes(q * signs[:, None, :], 1, 2).reshape(-1, width)[:features]
    else:
        rows = gaussian.reshape(-1, width)[:features]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if fixed:
        return rows * np.sqrt(width)
    return rows * np.linalg.norm(rng.split(1).normal((features, width), np.float64), axis=1, keepdims=True)
