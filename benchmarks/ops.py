"""Time of every operator that has a kernel, by its kernel and by each of its forms.

    python benchmarks/ops.py [--elements 9000000] [--dtype float32] [--seconds 0.3] [--threads N] [OPERATOR ...]

The operators come from the registry and their inputs from what each declares to be drawn, with every axis set to the
largest power of two for which inputs and outputs have at most ``--elements`` values: a new operator with a kernel needs
no line here. ``forward`` is without the tape, ``training`` is forward and backward to all inputs. Kernels are serial,
so BLAS has one thread unless ``--threads`` says more. Times are the fastest of repeated calls in one process, in
milliseconds; ``speed-up`` is a form's training time (forward, if there is no gradient) over the kernel's. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np

import autograd.ops
import minitv.ops
from autograd import REGISTRY, Op, Tensor, gradients, no_grad, use
from autograd.device import blas_threads
from autograd.draw import Draw, draw_inputs
from autograd.shapes import bind


class LargeDraw(Draw):
    """Seeded draws in which every axis has the same large size and as many axes are used as the operator allows."""

    def __init__(self, size: int, seed: int, dtype):
        generator = np.random.default_rng(seed)
        super().__init__(
            lambda low, high: low + int(generator.integers(0, high - low, endpoint=True, dtype=np.uint64)), dtype
        )
        self._size = size

    @classmethod
    def inputs(cls, op: Op, elements: int, seed: int, dtype):
        """Arrays and parameters for ``op`` with at most ``elements`` values in all."""
        best, size = draw_inputs(op, cls(1, seed, dtype)), 2
        while True:
            arrays, params = draw_inputs(op, cls(size, seed, dtype))
            if values(op, arrays) > elements:
                return best
            best, size = (arrays, params), 2 * size

    def size(self, low: int = 0, high: int = 4) -> int:
        return self._size

    def shape(self, low: int = 0, high: int = 3, size: int = 4) -> tuple[int, ...]:
        return (self._size,) * high


def values(op: Op, arrays) -> int:
    """How many values the inputs have, and the outputs, as far as the signature's letters tell."""
    letters: dict = {}
    for argument, array in zip(op.signature.inputs, arrays, strict=True):
        if array is not None and argument.dims != ("*",):
            bind(op.name, argument, array.shape, letters)
    outputs = [[letters.get(letter, 1) for letter in argument.dims] for argument in op.signature.outputs]
    return sum(a.size for a in arrays if a is not None) + sum(
        math.prod(math.prod(size) if isinstance(size, tuple) else size for size in sizes) for sizes in outputs)


def operators() -> list[Op]:
    """Every operator of the engine and of the variants that has a CPU kernel."""
    for package in (autograd.ops, minitv.ops):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return [op for op in REGISTRY.values() if "cpu" in op.kernels]


@contextmanager
def route(op: Op, kind: str, name: str):
    """Run ``op`` by one form or kernel; the operators below a form use forms too."""
    with use(kernel="none"), use(op, **{kind: name}):
        yield


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into ``seconds`` (at least three), after one that is not counted."""
    call()
    best, count, end = float("inf"), 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def measure(op: Op, kind: str, name: str, arrays, params, seconds: float) -> dict[str, float | None]:
    """Milliseconds of the forward pass, and of forward and backward together (None where there is no gradient)."""
    def forward(requires_grad: bool):
        inputs = [a if a is None or a.dtype.kind != "f" else Tensor.wrap(a, requires_grad) for a in arrays]
        return inputs, op(*inputs, **params)

    def inference():
        with no_grad():
            forward(False)

    def training():
        inputs, outputs = forward(True)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients(list(outputs), [x for x in inputs if isinstance(x, Tensor)],
                  [Tensor.wrap(np.ones_like(o.data)) for o in outputs])

    with route(op, kind, name):
        return {"forward_ms": 1e3 * fastest(inference, seconds),
                "training_ms": 1e3 * fastest(training, seconds) if op.differentiable else None}


def described(arrays, params) -> str:
    """The call as a reader would write it: shapes, then the parameters that were drawn."""
    shapes = ["-" if a is None else "x".join(map(str, a.shape)) or "scalar" for a in arrays]
    return ", ".join([*shapes, *(f"{name}={value}" for name, value in params.items() if name != "seed")])


def main() -> None:
    known = {op.name: op for op in operators()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--elements", type=int, default=9_000_000, help="values in the arrays (default: 9000000)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per measurement (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: masks and options too (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of BLAS (default: 1)")
    arguments = parser.parse_args()
    if unknown := set(arguments.operators) - set(known):
        parser.error(f"no operator with a kernel is called {', '.join(sorted(unknown))}, allowed: {', '.join(known)}")

    report = {}
    print(f"{'operator':<16} {'route':<18} {'forward ms':>11} {'training ms':>12} {'speed-up':>9}")
    with blas_threads(arguments.threads), np.errstate(all="ignore"):
        for name in arguments.operators or known:
            op = known[name]
            arrays, params = LargeDraw.inputs(op, arguments.elements, arguments.seed, np.dtype(arguments.dtype))
            print(f"{name}({described(arrays, params)})")
            routes = [("kernel", "cpu"), *(("form", form) for form in op.forms)]
            times = {f"{kind} {label}": measure(op, kind, label, arrays, params, arguments.seconds)
                     for kind, label in routes}
            whole = "training_ms" if op.differentiable else "forward_ms"
            for label, row in times.items():
                training = "" if row["training_ms"] is None else f"{row['training_ms']:.3f}"
                ratio = "" if label == "kernel cpu" else f"{row[whole] / times['kernel cpu'][whole]:.2f}"
                print(f"{'':<16} {label:<18} {row['forward_ms']:>11.3f} {training:>12} {ratio:>9}")
            report[name] = {label: {k: v and round(v, 4) for k, v in row.items()} for label, row in times.items()}
    settings = {name: getattr(arguments, name) for name in ("elements", "dtype", "seed", "threads")}
    print(json.dumps({"benchmark": "ops", **settings, "operators": report}))


if __name__ == "__main__":
    main()
