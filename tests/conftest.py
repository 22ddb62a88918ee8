"""What every test shares: the Hypothesis profile, draws for operators, and the list of all operators."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import autograd.ops
import minitv.ops
from autograd import DeviceError, Op
from autograd.device import gpu
from autograd.draw import Draw
from autograd.registry import operators_of

settings.register_profile(
    "minitv",
    max_examples=30,
    deadline=None,  # the first call of a kernel compiles it
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.load_profile("minitv")


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are left out where there is none, and say why."""
    if not (marked := [item for item in items if item.get_closest_marker("gpu")]):
        return
    try:
        if os.environ.get("MINITV_GPU_POOL") == "off":  # a sanitizer then knows where arrays end
            gpu().cuda.set_allocator(None)
        gpu()
    except DeviceError as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


class HypothesisDraw(Draw):
    """Sizes, seeds and layouts that Hypothesis chooses and shrinks: ``data`` is what ``st.data()`` gives a test."""

    def __init__(self, data, dtype=np.float64, layouts=("c",)):
        super().__init__(lambda low, high: data.draw(st.integers(low, high)), dtype, layouts)
        self._arrays = 0

    def generator(self) -> np.random.Generator:
        # Hypothesis likes to repeat itself: the count keeps two arrays of one call from having the same values.
        self._arrays += 1
        return np.random.default_rng((self.integer(0, 2**16), self._arrays))


def operators() -> list[Op]:
    """Every operator of the engine and of the variants."""
    return [*operators_of(autograd.ops.__name__).values(), *operators_of(minitv.ops.__name__).values()]
