"""The variants' operators: one folder each, with the formula and forms in __init__.py and kernels in cpu.py and gpu.py.

The operators of the AFT family share a folder, with a module each. Every operator that a module here declares is a name of
this package: a new one is a folder.
"""

import importlib
import pkgutil

from autograd.registry import operators_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update(operators_of(__name__))
__all__ = sorted(operators_of(__name__))
