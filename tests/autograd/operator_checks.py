"""What tests of operators add to autograd.verify: a place where CUDA kernels run without a GPU, marks, and awkward draws.

test_operators.py calls the checks for all operators, test_the_tests.py shows that each of them notices planted errors. Behind
a route, " on emulator" means arrays of a double of CuPy whose kernels run in an emulator, and " on card" a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import pytest

from autograd import Op
from autograd.draw import LAYOUTS, Draw, draw_inputs
from autograd.verify import PLACES, compute, draw_call, dtypes, flat, forms, parsed, refuses, split
from tests.autograd import emulator, fake_cupy
from tests.conftest import full


@contextmanager
def _emulator():
    with fake_cupy.installed():
        yield fake_cupy.wrapped


PLACES["emulator"] = _emulator


def marks(route: str, dtype=np.float32) -> list:
    """Of a test that goes along a route: when to leave it out. Kernels are compiled for each dtype, which takes a while."""
    wide = [pytest.mark.full] if route.startswith("kernel") and dtype is np.float64 else []
    return {"host": wide, "card": [pytest.mark.full, pytest.mark.gpu],
            "emulator": [pytest.mark.full, pytest.mark.skipif(bool(emulator.missing), reason=str(emulator.missing))],
            }[parsed(route)[2]]


def each(names: str, cases, group=None):
    """Parametrise over operators, or over tuples of an operator, a route and more: ``names`` are theirs.

    Of all cases with the same ``group(*case)`` one runs without --full, and it is not always the first.
    """
    params, groups = [], defaultdict(list)
    for case in cases:
        case = case if isinstance(case, tuple) else (case,)
        case_marks = marks(case[1]) if len(case) > 1 and isinstance(case[1], str) else []
        if group is not None and not case_marks:
            groups[group(*case)].append(len(params))
        params.append((case, case_marks))
    for number, members in enumerate(groups.values()):
        for member in members:
            if member != members[number % len(members)]:
                params[member][1].append(pytest.mark.full)
    return pytest.mark.parametrize(names.split(", "), [
        pytest.param(*case, marks=case_marks, id="-".join(map(_name, case))) for case, case_marks in params])


def _name(part) -> str:
    return getattr(part, "name", None) or getattr(part, "__name__", None) or str(part).replace(" ", "_")


def tried(op: Op, route: str) -> tuple:
    """The dtypes in which a test tries a route."""
    return tuple(dtype for dtype in dtypes(op, route) if full() or pytest.mark.full not in marks(route, dtype))


def specimen(op: Op, accept=None, dtype=np.float64, layouts=("c",)):
    """The first seeded draw that ``accept(args, params)`` takes; by default one whose arrays all have 2 elements."""
    accept = accept or (lambda args, params: all(x is None or x.size > 1 for x in flat(op, args)))
    for seed in range(400):
        args, params = draw_inputs(op, Draw.seeded(seed, dtype, layouts))
        if accept(args, params):
            return args, params
    raise LookupError(f"{op.name}: none of 400 draws is suitable")


class TooLarge(Exception):
    """A draw with more values than a test has time for."""


class AwkwardDraw(Draw):
    """Seeded draws in which long axes have one of the given sizes, such as those around warps, blocks and tiles."""

    def __init__(self, seed: int, sizes, dtype=np.float32, limit: int = 70_000):
        generator = np.random.default_rng(seed)
        super().__init__(lambda low, high: low + int(generator.integers(0, high - low, endpoint=True, dtype=np.uint64)), dtype,
                         LAYOUTS)
        self.chosen, self._limit = tuple(sizes), limit

    def size(self, low: int = 0, high: int = 4, letter: str = "") -> int:
        low = max(low, self._least)
        return self.integer(low, max(low, high)) if high <= 2 else self.choice([n for n in self.chosen if n >= low] or [low])

    def _checked(self, shape):
        if np.prod(shape, dtype=float) > self._limit:
            raise TooLarge
        return shape

    def floats(self, *shape, **options):
        return super().floats(*self._checked(shape), **options)

    def integers(self, low, high, *shape):
        return super().integers(low, high, *self._checked(shape))

    def mask(self, *shape):
        return super().mask(*self._checked(shape))


def awkward_calls(op: Op, route: str, size: int, count: int, dtype=np.float32, limit: int = 70_000):
    """Calls that a route takes, with an axis of that size, and cotangents for the outputs."""
    seed = found = 0
    while found < count:
        draw = AwkwardDraw(seed, (size, 5), dtype, limit)
        seed += 1
        try:
            args, params = draw_call(op, route, draw)
        except TooLarge:
            continue
        if any(x is not None and size in x.shape for x in args) and not refuses(op, route, args, params):
            found += 1
            outputs = compute(op, forms(op)[0], args, split(op, params)[0])
            yield args, params, [draw.generator().standard_normal(o.shape).astype(dtype) if o.dtype.kind == "f" else None
                                 for o in outputs]
