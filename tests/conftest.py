"""What every test shares: its two speeds, draws for operators, and the list of all operators.

`pytest` alone leaves out the tests marked ``full`` and tries few examples of a property; `pytest --full` is everything.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

import autograd.ops
import minitv.ops
from autograd import DeviceError, Op, use
from autograd.device import gpu
from autograd.draw import Draw
from autograd.registry import operators_of

FEW, MANY = 2, 30  # examples of a property
PROCESSES = 4  # at most: each compiles what the others compile at the same moment, and holds all of it in memory
LEFT_OUT = pytest.StashKey[int]()
SETTINGS: dict[object, settings] = {}  # of the properties, as they are declared


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every test, and every property with many examples")
    parser.addoption("--rest", action="store_true", help="what --full does beyond a run without it")


def pytest_configure(config):
    """Before tests are imported: ``examples`` reads the profile."""
    settings.register_profile(
        "minitv",
        max_examples=MANY if config.getoption("full") or config.getoption("rest") else FEW,
        deadline=None,  # the first call of a kernel compiles it
        derandomize=bool(os.environ.get("CI")),
        # filter_too_much: some routes take few of the calls that are drawn for their operator, such as those of one position.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        print_blob=True,
    )
    settings.load_profile("minitv")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads them
def pytest_cmdline_main(config):
    """The whole suite runs in several processes where pytest-xdist is there; a choice of tests in one, which starts at once."""
    choice = config.args_source is config.ArgsSource.ARGS or config.option.keyword or config.option.markexpr
    if not choice and not hasattr(config, "workerinput") and getattr(config.option, "numprocesses", 1) is None:
        config.option.numprocesses, config.option.maxprocesses = "auto", PROCESSES
        config.option.dist = "worksteal"  # neighbours stay together, and what they share is made once


def full() -> bool:
    """Whether --full was given."""
    try:
        return settings.get_profile("minitv").max_examples == MANY  # inside a property, settings.default is its own
    except InvalidArgument:  # in a process that a test has started
        return False


def examples(many: int):
    """As ``settings(max_examples=many)``; without --full as few as every property has."""
    return settings(max_examples=many if full() else FEW)


@pytest.fixture
def forms_unless_full():
    """Operators compute by forms, for which nothing is compiled; with --full as models do. For what is not about kernels."""
    with nullcontext() if full() else use(kernel="none"):
        yield


def _tries_more(item) -> bool:
    """Whether a test that every run has does more in a full one: a property, or a test of operators, which knows ``full``."""
    return item.nodeid.startswith("tests/autograd/") or getattr(item.function, "is_hypothesis_test", False)


def pytest_collection_modifyitems(config, items):
    """Leave out tests marked full, unless they are asked for; and those that need a GPU where there is none, saying why."""
    if config.getoption("rest"):
        items[:] = [item for item in items if item.get_closest_marker("full") or _tries_more(item)]
    elif not config.getoption("full") and (left := [item for item in items if item.get_closest_marker("full")]):
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        config.stash[LEFT_OUT] = len(left)
    if not (marked := [item for item in items if item.get_closest_marker("gpu")]):
        return
    try:
        if os.environ.get("MINITV_GPU_POOL") == "off":  # a sanitizer then knows where arrays end
            gpu().cuda.set_allocator(None)
        gpu()
    except DeviceError as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A property begins every case with its own settings.

    Hypothesis puts new ones on top of those before for every case of a parametrised property, and goes down through all of them
    by recursion, which Python ends after some 950 cases.
    """
    if hasattr(function := getattr(item, "function", None), "_hypothesis_internal_use_settings"):
        own = SETTINGS.setdefault(function, function._hypothesis_internal_use_settings)
        function._hypothesis_internal_use_settings = own


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """One of several processes has ended: each has collected all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests were left out, and properties had {FEW} examples; "
                                    "pytest --full runs everything")


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
