"""minitv: every Transformer variant from scratch on a minimal autograd engine in NumPy, Numba and CuPy."""

import autograd as _engine

if not getattr(_engine, "MINITV_ENGINE", False):
    raise ImportError(
        f"minitv brings its own package named autograd, but Python found another one: {_engine.__file__}.\n"
        "Uninstall it (pip uninstall autograd) and reinstall minitv, or use a separate virtual environment."
    )

__version__ = "0.1.0"
