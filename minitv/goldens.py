"""Results of other libraries, in files beside the tests: what they hold, and the proof that an operator equals them.

The files are in a checkout of this project only, in tests/goldens; how they were made is said by make_goldens.py there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from autograd import Op, distance
from autograd.metric import TOLERANCE, within
from autograd.verify import compute, differentiate, floats

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "goldens"
LIMITS = {np.float64: 1e-10, np.float32: TOLERANCE[np.dtype(np.float32)]}


class Golden(dict):
    """The arrays of a file; ``unread`` are the names that nothing has asked for."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            super().__init__(file)
        self.unread = set(self)

    def __getitem__(self, key: str) -> np.ndarray:
        self.unread.discard(key)
        return super().__getitem__(key)

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with a prefix, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}

    def add(self, key: str) -> None:
        """Another array, which nothing has asked for."""
        self[key] = np.ones(3)
        self.unread.add(key)

    def only(self, call: str) -> Golden:
        """Leave out all other calls."""
        for key in [key for key in self if not key.startswith(f"{call}/")]:
            del self[key]
            self.unread.remove(key)
        return self


@cache
def calls() -> dict[str, str]:
    """Calls of operators, and the files that hold them; the other files hold layers and models. Empty where there are none."""
    return {call: path.stem for path in sorted(FOLDER.glob("*.npz"))
            for call in sorted({key.partition("/in/")[0] for key in Golden(path.stem) if "/in/" in key})}


def calls_of(op: Op) -> list[str]:
    """The calls of one operator."""
    return [call for call in calls() if call.partition(".")[0] == op.name]


def close(actual: Any, expected: np.ndarray, dtype: Any, what: str) -> None:
    """AssertionError unless an array has the dtype, the shape and the values of another library's."""
    wanted = dtype if expected.dtype.kind == "f" else expected.dtype
    assert actual.dtype == wanted and actual.shape == expected.shape, what
    found = distance(actual, expected)
    assert within(found, LIMITS[dtype]), f"{what}: relative error {found:.3g}, allowed {LIMITS[dtype]:.3g}"


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """An array of floats in this dtype, another one as it is."""
    return array.astype(dtype) if array.dtype.kind == "f" else array


def verify_call(op: Op, call: str, golden: Golden, route: str, dtype: Any) -> None:
    """The outputs and the gradients of one call along one route are those of the other library."""
    names = [a.name for a in op.signature.inputs]
    inputs = golden.below(f"{call}/in/")
    assert set(inputs) <= set(names)
    args = tuple(cast(inputs[name], dtype) if name in inputs else None for name in names)
    params = {name: tuple(value.tolist()) if value.ndim else value.item()
              for name, value in golden.below(f"{call}/param/").items()}
    expected = golden.below(f"{call}/out/")
    outputs = compute(op, route, args, params)
    assert set(expected) == {str(i) for i in range(len(outputs))}
    for i, output in enumerate(outputs):
        close(np.asarray(output), expected[str(i)], dtype, f"{call}, {route}, output {i}")
    cotangents, gradients = golden.below(f"{call}/cotangent/"), golden.below(f"{call}/grad/")
    assert set(cotangents) == (set(expected) if op.differentiable else set())
    assert set(gradients) == ({names[i] for i in floats(op, args)} if op.differentiable else set())
    if op.differentiable and route != "definition":  # a definition is values only
        found = differentiate(op, route, args, params, [cast(cotangents[str(i)], dtype) for i in range(len(outputs))])
        for i, gradient in found.items():
            close(gradient, gradients[names[i]], dtype, f"{call}, {route}, gradient of {names[i]}")
    assert not golden.unread, f"nothing reads {sorted(golden.unread)}"
