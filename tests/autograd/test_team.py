"""One call on several threads: every kernel in parts is the kernel, with the same bits each time; and who helps whom."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from autograd.cpu import gemm, team
from autograd.cpu.compile import unavailable
from autograd.draw import Draw
from autograd.metric import assert_close
from autograd.ops import add, exp
from autograd.verify import compute, declared, differentiable, differentiate, draw_call, kernels, refuses, terms
from minitv.ops.aft import cpu_windows
from tests.conftest import operators

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="there are no kernels without the compiler")
ROUTES = [(op, route) for op in operators() for route in kernels(op) if declared(op, route).device == "cpu"]
ROUTES += [(op, "form array") for op in (add, exp)]


def fine(count, grain=1, work=0, *, sums=False):
    """``team.spans`` with up to three parts of a call, however small it is."""
    if team._team.get() is None or count < 2:
        return [(0, count)]
    edges = sorted({count * i // 3 for i in range(4)})
    return list(itertools.pairwise(edges))


@pytest.fixture
def crew():
    """A team of three, two of whose threads help."""
    made = team.Team(3)
    helpers = [threading.Thread(target=made.help) for _ in range(2)]
    for helper in helpers:
        helper.start()
    yield made
    made.dismiss(2)
    for helper in helpers:
        helper.join(10)
        assert not helper.is_alive()


def results(op, route, args, params, cotangents):
    """The outputs of a call and the gradients of its float inputs."""
    grads = differentiate(op, route, args, params, cotangents).values() if differentiable(op, route) else ()
    return [*compute(op, route, args, params), *grads]


@pytest.mark.parametrize(("op", "route"), ROUTES, ids=[f"{op.name}-{route}" for op, route in ROUTES])
def test_a_call_in_parts_is_the_call(op, route, crew, monkeypatch):
    """For small calls, each cut into three parts, where that can be."""
    monkeypatch.setattr(team, "spans", fine)
    monkeypatch.setattr(cpu_windows, "spans", fine)
    for seed in range(4):
        draw = Draw.seeded(seed, np.float32)
        args, params = draw_call(op, route, draw)
        if refuses(op, route, args, params):
            continue
        outputs = compute(op, route, args, params)
        cotangents = [draw.floats(*y.shape) if y.dtype.kind == "f" else None for y in outputs]
        whole = results(op, route, args, params, cotangents)
        with crew:
            parts, again = (results(op, route, args, params, cotangents) for _ in range(2))
        for one, two, three in zip(parts, whole, again, strict=True):
            assert_close(one, two, f"{op.name}, {route}, in parts", terms=terms(op, *outputs))
            np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(("M", "K", "N"), [(700, 40, 90), (40, 3000, 60), (60, 50, 700)])
def test_a_product_in_parts_is_the_product(M, K, N, crew, monkeypatch):
    """Cut by rows, by the terms of its sums or by columns, with a bias or added to what is there."""
    monkeypatch.setattr(team, "spans", fine)
    rng = np.random.default_rng(0)
    a, b, bias, there = (rng.normal(size=s).astype(np.float32) for s in ((M, K), (K, N), (N,), (M, N)))
    added = {"out": there.copy(), "accumulate": True}
    for more, expected in (({}, a @ b), ({"bias": bias}, a @ b + bias), (added, there + a @ b)):
        with crew:
            assert_close(gemm.product(a, b, **more), expected, f"a product with {', '.join(more) or 'nothing else'}", terms=K)


def test_parts_are_cut_by_the_sizes_alone(monkeypatch):
    """They cover everything once, and those of sums do not depend on the number of threads."""
    assert team.spans(10**6) == [(0, 10**6)]
    for threads in (2, 3, 8):
        with team.Team(threads):
            for count, grain in ((100, 1), (8192, 1), (8192, 512), (130, 64), (1, 1)):
                parts = team.spans(count, grain)
                assert parts[0][0] == 0 and parts[-1][1] == count and all(a[1] == b[0] for a, b in itertools.pairwise(parts))
                assert all(start % grain == 0 and stop > start for start, stop in parts)
            assert len(team.spans(8192, work=100)) == 1
            assert len(team.spans(8192, sums=True)) == team.PARTS


def test_others_take_parts_and_what_one_raises_reaches_the_caller(crew):
    """Three parts that wait for each other are computed by three threads."""
    together, who = threading.Barrier(3), set()

    def part(i, start, stop):
        together.wait(10)
        who.add(threading.get_ident())
        if i == 1:
            raise ZeroDivisionError("part 1")

    with crew, pytest.raises(ZeroDivisionError, match="part 1"):
        team.each(part, [(0, 1), (1, 2), (2, 3)])
    assert len(who) == 3


def test_two_threads_that_finish_at_once_end_a_call_once():
    """Both have counted their part before either of them looks whether it was the last one."""
    class Together:
        def __init__(self):
            self._lock, self._both = threading.Lock(), threading.Barrier(2)

        def __enter__(self):
            self._lock.acquire()

        def __exit__(self, *_):
            self._lock.release()
            self._both.wait(10)

    started = threading.Barrier(2)
    call = team._Call(lambda i: started.wait(10), 2)  # so that each thread has a part
    call._counting, errors = Together(), []

    def work():
        try:
            call.work()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    call.wait()
