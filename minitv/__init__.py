"""minitv: every Transformer variant from scratch on a minimal autograd engine in NumPy, Numba and CuPy."""

from importlib.util import find_spec
from pathlib import Path

# Another package on the public index is also called autograd. Found without importing it, so that help is immediate.
_spec = find_spec("autograd")
if _spec is None or not any(Path(p, "dispatch.py").exists() for p in _spec.submodule_search_locations or ()):
    raise ImportError(
        f"minitv brings its own package named autograd, but Python found {_spec.origin if _spec else 'none'}.\n"
        "Uninstall the other one (pip uninstall autograd) and reinstall minitv, or use a separate virtual environment."
    )

__version__ = "0.1.0"
