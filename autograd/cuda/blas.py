"""Matrix products on a GPU, by cuBLAS.

CuPy's own product copies transposed operands of stacks (q @ k.T copies k), takes pointers to every matrix where one operand is
broadcast, and rounds no factors there. So stacks go to cuBLAS's strided batched product directly, which takes transposed and
repeated operands as they lie; a stack times one matrix is one product of all its rows.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from ..device import namespace
from ..errors import DtypeError, KernelError

COMPUTE = {"float32": "CUBLAS_COMPUTE_32F", "tf32": "CUBLAS_COMPUTE_32F_FAST_TF32", "bf16": "CUBLAS_COMPUTE_32F_FAST_16BF"}


def matmul(a, b, products: str = "float32"):
    """NumPy's matmul for CuPy arrays of one dtype.

    With ``products``, those of autograd.state, cuBLAS rounds factors on its way: arrays stay float32, and so do sums.
    """
    cupy, cublas, plain = namespace(a, b), _cublas(), products == "float32"
    if not plain and a.dtype != np.float32:
        raise DtypeError(f"products({products!r}): the arrays are {a.dtype}, allowed: float32")
    if not plain and cublas is None:
        raise KernelError(f"products({products!r}): this CuPy does not bind gemmStridedBatchedEx, allowed: products('float32')")
    if a.ndim > 2 and b.ndim == 2 and a.size:
        return matmul(a.reshape(-1, a.shape[-1]), b, products).reshape(*a.shape[:-1], b.shape[-1])
    small = min(a.ndim, b.ndim) < 2 or (plain and max(a.ndim, b.ndim) == 2)
    if small or not a.size or not b.size or cublas is None:
        return a @ b
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (m, k), n = a.shape[-2:], b.shape[-1]
    out = cupy.empty((*lead, m, n), a.dtype)
    if not out.size:
        return out
    a, turned_a, row_a, step_a = _layout(a, lead)
    b, turned_b, row_b, step_b = _layout(b, lead)
    one, zero = np.ones((), a.dtype), np.zeros((), a.dtype)
    if a.dtype == np.float32:
        kind = cupy.cuda.runtime.CUDA_R_32F
        compute = getattr(cublas, COMPUTE[products])
    else:
        kind, compute = cupy.cuda.runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F
    # cuBLAS counts columns first: it computes the transpose of the product, from the transposed factors, swapped.
    cublas.gemmStridedBatchedEx(
        cupy.cuda.device.get_cublas_handle(), turned_b, turned_a, n, m, k, one.ctypes.data, b.data.ptr, kind, row_b, step_b,
        a.data.ptr, kind, row_a, step_a, zero.ctypes.data, out.data.ptr, kind, n, m * n, out.size // (m * n), compute,
        cublas.CUBLAS_GEMM_DEFAULT)
    return out


@cache
def _cublas():
    """CuPy's own binding, or None in a CuPy that has it elsewhere."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError:
        return None
    return cublas if hasattr(cublas, "gemmStridedBatchedEx") else None


def _layout(x, lead):
    """The stack, whether its matrices lie column by column, and how many elements apart rows (columns) and matrices lie.

    It is copied if neither rows nor columns are contiguous, or if the matrices are not evenly spaced, forwards.
    """
    xp = namespace(x)
    x = xp.broadcast_to(x, (*lead, *x.shape[-2:]))
    rows, columns = x.shape[-2:]
    *steps, down, along = [s // x.itemsize for s in x.strides]
    sizes = [(n, s) for n, s in zip(lead, steps, strict=True) if n > 1]
    step = sizes[-1][1] if sizes else 0
    even = step >= 0 and all(s == n * inner for (_, s), (n, inner) in itertools.pairwise(sizes))
    if even and (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return x, 0, max(down if rows > 1 else 0, columns), step
    if even and (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return x, 1, max(along if columns > 1 else 0, rows), step
    return xp.ascontiguousarray(x), 0, columns, rows * columns
