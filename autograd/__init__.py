"""A minimal autograd engine in NumPy: tensors, declared-once operators, and proof that their gradients are right.

    >>> from autograd import Tensor, grad
    >>> x = Tensor([1.0, 2.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    Tensor([2., 4.], dtype=float64)
    >>> grad(lambda t: t ** 3)(2.0)
    Tensor(12., dtype=float64)
"""

from . import ops
from .check import adjoint_test, gradcheck
from .device import to_numpy
from .dispatch import explain, use
from .errors import (
    AutogradError,
    DeviceError,
    DomainError,
    DtypeError,
    GraphError,
    KernelError,
    NonFiniteError,
    ShapeError,
)
from .metric import assert_close, distance
from .op import Op, op
from .ops import *  # noqa: F403
from .proof import verify
from .random import Random
from .registry import REGISTRY
from .state import check_mode, enable_grad, no_grad, products
from .tensor import Tensor, grad, gradients

__all__ = [
    "REGISTRY",
    "AutogradError",
    "DeviceError",
    "DomainError",
    "DtypeError",
    "GraphError",
    "KernelError",
    "NonFiniteError",
    "Op",
    "Random",
    "ShapeError",
    "Tensor",
    "adjoint_test",
    "assert_close",
    "check_mode",
    "distance",
    "enable_grad",
    "explain",
    "grad",
    "gradcheck",
    "gradients",
    "no_grad",
    "op",
    "ops",
    "products",
    "to_numpy",
    "use",
    "verify",
]
__all__ += ops.__all__
