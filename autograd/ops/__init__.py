"""The generic operators, by kind: elementwise, reduce, scan, shape, index, linalg, conv, fft; a folder where kernels exist.

Every module here is imported, and every operator that it declares is a name of this package: a new one is a file or a folder.
"""

import importlib
import pkgutil

from ..registry import operators_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update(operators_of(__name__))
__all__ = sorted(operators_of(__name__))
