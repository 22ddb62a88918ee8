"""Time of every operator that has a kernel, by its kernel and by each of its forms, or against PyTorch.

    python benchmarks/ops.py [--elements 9000000] [--dtype float32] [--seconds 0.3] [--threads N] [OPERATOR ...]
    python benchmarks/ops.py --rivals [--rounds 5] [--seconds 0.3] [--threads N] [--save] [OPERATOR ...]

The operators come from the registry and their inputs from what each declares to be drawn, with every axis set to the
largest power of two for which inputs and outputs have at most ``--elements`` values: a new operator with a kernel needs
no line here. ``forward`` is without the tape, ``training`` is forward and backward to all inputs. Kernels are serial,
so BLAS has one thread unless ``--threads`` says more. Times are the fastest of repeated calls in one process, in
milliseconds; ``speed-up`` is a form's training time (forward, if there is no gradient) over the kernel's. The last line
is JSON.

``--rivals`` measures the operators for which benchmarks/rivals has code in PyTorch, at the sizes given there, in float32
and on all threads: PyTorch as it likes, we as in training, a worker for each thread with its part of the batch. An operator
without a gradient has its forward pass in both columns. Rounds, ratios and ``--save`` as in benchmarks/rounds.py.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import math
import pkgutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import rivals
from rounds import alternate, machine, median, parse, ratios, run, save, warn_if_busy

import autograd.ops
import minitv.ops
from autograd import REGISTRY, Op, Tensor, gradients, no_grad, use
from autograd.cpu.process import blas_threads, cores, keep_memory
from autograd.draw import Draw, draw_inputs
from autograd.registry import operators_of
from autograd.shapes import bind
from minitv.timing import fastest, inference, training


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
    table = {**operators_of(autograd.ops.__name__), **operators_of(minitv.ops.__name__)}
    return [op for op in table.values() if cpu_kernels(op)]


def cpu_kernels(op: Op) -> list[str]:
    """The names of its kernels for the CPU."""
    return [kernel.name for kernel in op.kernels.values() if kernel.device == "cpu"]


@contextmanager
def route(op: Op, kind: str, name: str):
    """Run ``op`` by one form or kernel; the operators below a form use forms too."""
    with use(kernel="none"), use(op, **{kind: name}):
        yield


def measure(op: Op, kind: str, name: str, arrays, params, seconds: float) -> dict[str, float | None]:
    """Milliseconds of the forward pass, and of forward and backward together (None where there is no gradient)."""
    with route(op, kind, name):
        return {"forward_ms": 1e3 * fastest(inference(op, *arrays, **params), seconds),
                "training_ms": 1e3 * fastest(training(op, *arrays, **params), seconds) if op.differentiable else None}


def described(arrays, params) -> str:
    """The call as a reader would write it: shapes, then the parameters that were drawn."""
    shapes = ["-" if a is None else "x".join(map(str, a.shape)) or "scalar" for a in arrays]
    return ", ".join([*shapes, *(f"{name}={value}" for name, value in params.items() if name != "seed")])


def routes(names: list[str], table: dict[str, Op], arguments: argparse.Namespace) -> None:
    """Print the times of each operator's kernel and forms."""
    report = {}
    print(f"{'operator':<16} {'route':<18} {'forward ms':>11} {'training ms':>12} {'speed-up':>9}")
    with blas_threads(arguments.threads), np.errstate(all="ignore"):
        for name in names:
            op = table[name]
            arrays, params = LargeDraw.inputs(op, arguments.elements, arguments.seed, np.dtype(arguments.dtype))
            print(f"{name}({described(arrays, params)})")
            fused = cpu_kernels(op)
            choices = [*(("kernel", name) for name in fused), *(("form", form) for form in op.forms)]
            times = {f"{kind} {label}": measure(op, kind, label, arrays, params, arguments.seconds) for kind, label in choices}
            whole = "training_ms" if op.differentiable else "forward_ms"
            for label, row in times.items():
                training = "" if row["training_ms"] is None else f"{row['training_ms']:.3f}"
                first = f"kernel {fused[0]}"
                ratio = "" if label == first else f"{row[whole] / times[first][whole]:.2f}"
                print(f"{'':<16} {label:<18} {row['forward_ms']:>11.3f} {training:>12} {ratio:>9}")
            report[name] = {label: {k: v and round(v, 4) for k, v in row.items()} for label, row in times.items()}
    settings = {name: getattr(arguments, name) for name in ("elements", "dtype", "seed", "threads")}
    print(json.dumps({"benchmark": "ops", **settings, "operators": report}))


# -- against PyTorch -------------------------------------------------------------------------------------------------
def contests() -> dict[str, object]:
    """By operator: the module of benchmarks/rivals that has it in PyTorch."""
    table = {}
    for module in pkgutil.iter_modules(rivals.__path__):
        rival = importlib.import_module(f"rivals.{module.name}")
        table |= dict.fromkeys(getattr(rival, "OPERATORS", {}), rival)
    return table


def differentiated(op: Op, arrays) -> list[bool]:
    """Which of the arrays have a gradient; the others are constants."""
    return [argument.kind == "float" for argument, _ in zip(op.signature.inputs, arrays, strict=False)]


def ours(op: Op, arrays, params, threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and forward and backward: each worker has a part of the batch, gradients of the rest are added up."""
    keep_memory()
    pool = ThreadPoolExecutor(threads)
    split = [argument.dims[:1] == ("B",) for argument in op.signature.inputs]
    batch = next(array.shape[0] for array, by_batch in zip(arrays, split, strict=False) if by_batch)
    edges = [batch * i // threads for i in range(threads + 1)]
    parts = [[array[a:b] if by_batch else array for array, by_batch in zip(arrays, split, strict=False)]
             for a, b in itertools.pairwise(edges) if a < b]

    def forward(part):
        with no_grad():
            return op(*part, **params)

    variable = differentiated(op, arrays)

    def training(part):
        inputs = [Tensor.wrap(x, True) if wanted else x for x, wanted in zip(part, variable, strict=True)]
        y = op(*inputs, **params)
        y = y[0] if isinstance(y, tuple) else y
        return gradients([y], [x for x in inputs if isinstance(x, Tensor)], [Tensor.wrap(np.ones_like(y.data))])

    def whole():
        results = list(pool.map(training, parts))
        shared = [not by_batch for by_batch, wanted in zip(split, variable, strict=False) if wanted]
        return [sum(g.data for g in grads) for grads, add in zip(zip(*results, strict=True), shared, strict=True) if add]

    def whole_forward():
        return list(pool.map(forward, parts))

    return whole_forward, whole if op.differentiable else whole_forward


def pytorch(op: Op, function: Callable, arrays, params, threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same of a function of benchmarks/rivals."""
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in arrays]
    inputs = [tensor.clone().requires_grad_(wanted) for tensor, wanted in zip(tensors, differentiated(op, arrays), strict=True)]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def forward():
        with torch.no_grad():
            return function(torch, *tensors, **params)

    def training():
        y = function(torch, *inputs, **params)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return forward, training if leaves else forward


def contend(operator: str, contender: str, threads: int, seconds: float) -> dict:
    """Milliseconds of one contender in this process: medians of repeated calls."""
    rival = contests()[operator]
    arrays, params = rival.inputs(np.random.default_rng(0))
    operators()
    if contender == "minitv":
        forward, training = ours(REGISTRY[operator], arrays, params, threads)
    elif importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    else:
        forward, training = pytorch(REGISTRY[operator], rival.OPERATORS[operator][contender], arrays, params, threads)
    with blas_threads(1 if contender == "minitv" else threads):
        return {f"{name}_ms": 1e3 * typical(call, seconds) for name, call in (("forward", forward), ("training", training))}


def typical(call: Callable[[], object], seconds: float) -> float:
    """The median of the calls that fit into ``seconds`` (at least three), after one that is not counted."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(operator: str, rival, arguments: argparse.Namespace) -> dict:
    """All rounds of an operator: prints its rows, returns its part of the JSON."""
    def measure(name: str) -> dict:
        return run(__file__, [operator, "--worker", name, "--threads", arguments.threads, "--seconds", arguments.seconds],
                   arguments.threads)

    results, skipped = alternate(["minitv", *rival.OPERATORS[operator]], measure, arguments.rounds, "training_ms", operator)
    arrays, params = rival.inputs(np.random.default_rng(0))
    report: dict = {"inputs": described(arrays, params), "skipped": skipped, "ratio": {}}
    print(f"{operator}({report['inputs']})")
    for name, rows in results.items():
        report[name] = {key: round(median(rows, key), 2) for key in ("forward_ms", "training_ms")}
        if name != "minitv":
            report["ratio"][name] = {key.removesuffix("_ms"): ratios(rows, results["minitv"], key) for key in report[name]}
        print(f"{'':<4} {name:<28} {report[name]['forward_ms']:>9.2f} {report[name]['training_ms']:>11.2f}",
              *("{:>9.2f} ({:.2f} to {:.2f})".format(*quotient) for quotient in report["ratio"].get(name, {}).values()))
    return report


def main() -> None:
    table = {op.name: op for op in operators()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"default: all of {', '.join(table)}")
    parser.add_argument("--elements", type=int, default=9_000_000, help="values in the arrays (default: 9000000)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per measurement (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: masks and options too (default: 0)")
    parser.add_argument("--threads", type=int, help="of BLAS (default: 1); with --rivals, of all (default: the usable cores)")
    parser.add_argument("--rivals", action="store_true", help="compare with PyTorch instead")
    parser.add_argument("--rounds", type=int, default=5, help="of --rivals: processes per contender (default: 5)")
    parser.add_argument("--save", action="store_true", help="of --rivals: write ops.json for this processor")
    parser.add_argument("--worker", metavar="CONTENDER", help="of --rivals: measure this one in this process")
    arguments = parse(parser)
    against = arguments.rivals or arguments.worker
    table = contests() if against else table
    if unknown := set(arguments.operators) - set(table):
        parser.error(f"no operator with a {'rival' if against else 'kernel'} is called {', '.join(sorted(unknown))}, allowed: "
                     f"{', '.join(table)}")
    names = arguments.operators or list(table)
    arguments.threads = arguments.threads or (cores() if against else 1)
    if arguments.worker:
        print(json.dumps(contend(names[0], arguments.worker, arguments.threads, arguments.seconds)))
    elif arguments.rivals:
        warn_if_busy()
        print(f"{'':<4} {'':<28} {'forward ms':>9} {'training ms':>11}  theirs / ours: forward, training")
        result = {"benchmark": "ops", "threads": arguments.threads, "rounds": arguments.rounds,
                  "operators": {name: compare(name, table[name], arguments) for name in names}}
        if arguments.save:
            save("ops", result, "operators", machine())
        print(json.dumps(result))
    else:
        routes(names, table, arguments)


if __name__ == "__main__":
    main()
