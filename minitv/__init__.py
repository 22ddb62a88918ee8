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


def _check_autograd() -> None:
    """Another package on the public index is also called autograd: ImportError says how both can be had.

    It is found without being imported, so that help is immediate. Where pip put both into one folder, one of them has
    overwritten the other's first file.
    """
    spec = _find_spec("autograd")
    folders = [_Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    ours = next((folder for folder in folders if (folder / "dispatch.py").exists()), None)
    if ours is None:
        raise ImportError(
            f"minitv brings its own package named autograd, but Python found {spec.origin if spec else 'none'}.\n"
            "Uninstall the other one (pip uninstall autograd) and reinstall minitv, or use a separate virtual environment."
        )
    first = ours / "__init__.py"
    whole = first.exists() and "from .dispatch import" in first.read_text(encoding="utf-8", errors="replace")
    if not whole or (ours / "tracer.py").exists():
        raise ImportError(
            f"minitv brings its own package named autograd, and another package of that name was put into the same folder,\n"
            f"{ours}, where each overwrites files of the other.\n"
            "Remove both (pip uninstall autograd minitv), and install each in a virtual environment of its own."
        )


_check_autograd()

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """What is offered to Python is imported when it is first used: NumPy and Numba take a moment."""
    if name in __all__:
        return getattr(_import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
