"""minitv: every Transformer variant from scratch on a minimal autograd engine in NumPy, Numba and CuPy.

    import minitv

    model = minitv.build("rwkv", vocab=65, width=64)      a new model, to call, differentiate and train yourself
    run = minitv.train("rwkv", data="my.txt", steps=500)  what `minitv train` does; on_step=... sees every step
    run = minitv.load("runs/rwkv")                        what it left: run.model, run.loss(text), run.write(prompt)
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import Any as _Any

__all__ = ["__version__", "build", "load", "train"]

# Another package on the public index is also called autograd. Found without importing it, so that help is immediate.
_spec = _find_spec("autograd")
if _spec is None or not any(_Path(p, "dispatch.py").exists() for p in _spec.submodule_search_locations or ()):
    raise ImportError(
        f"minitv brings its own package named autograd, but Python found {_spec.origin if _spec else 'none'}.\n"
        "Uninstall the other one (pip uninstall autograd) and reinstall minitv, or use a separate virtual environment."
    )

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """What is offered to Python is imported when it is first used: NumPy and Numba take a moment."""
    if name in __all__:
        return getattr(_import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
