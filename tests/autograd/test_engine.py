"""The graph engine: recording, backward, memory, state of a thread, choice of forms and kernels, checks, and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autograd as ag
from autograd import (
    REGISTRY,
    AutogradError,
    DtypeError,
    GraphError,
    KernelError,
    NonFiniteError,
    Op,
    ShapeError,
    Tensor,
    adjoint_test,
    assert_close,
    check_mode,
    enable_grad,
    explain,
    grad,
    gradcheck,
    gradients,
    no_grad,
    use,
)
from autograd.state import switches


def leaf(*values, dtype=np.float64) -> Tensor:
    """A vector that requires a gradient."""
    return Tensor(np.array(values, dtype), requires_grad=True)


def scalar(value) -> Tensor:
    return Tensor(float(value), requires_grad=True)


def values(tensor):
    return None if tensor is None else tensor.numpy().tolist()


def recording() -> bool:
    """Whether an operator called now records."""
    return (scalar(1.0) * 2.0).requires_grad


@pytest.fixture
def declare():
    """Declare operators that exist during one test only."""
    names = []

    def make(function, signature="x[...] -> y[...]", **options) -> Op:
        operator = Op(function, signature, **options)
        names.append(operator.name)
        return operator

    yield make
    for name in names:
        del REGISTRY[name]


@pytest.fixture
def probe(declare):
    """An identity that calls ``probe.seen(g)`` when its gradient is computed."""
    def probe(x):
        return x.copy()

    operator = declare(probe)
    operator.seen = lambda g: None
    operator.primitive(lambda x: x.copy())

    def vjp(g):
        operator.seen(g)
        return g

    operator.vjp(vjp)
    return operator


@pytest.fixture
def cube(declare, monkeypatch):
    """x³ with two forms and a kernel, which takes at most one axis."""
    calls = []

    def forward(x):
        calls.append("forward")
        return x**3, (x,)

    def backward(saved, g):
        calls.append("backward")
        return (3 * saved[0] ** 2 * g,)

    def supports(x):
        return "takes at most one axis" if x.ndim > 1 else None

    def cube(x):
        return x**3

    operator = declare(cube)

    @operator.form
    def composed(x):
        calls.append("composed")
        return x * x * x

    @operator.form
    def power(x):
        calls.append("power")
        return x**3.0

    monkeypatch.setitem(sys.modules, "kernel_of_cube",
                        SimpleNamespace(forward=forward, backward=backward, supports=supports))
    operator.kernel("cpu", "kernel_of_cube")
    operator.calls = calls
    return operator


@contextmanager
def without_collector():
    """Only reference counts free memory inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_thread(function):
    """What a function returns in a new thread; its exception is raised here."""
    box = []

    def run():
        try:
            box.append((function(), None))
        except Exception as error:  # handed to the caller
            box.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result, error), = box
    if error is not None:
        raise error
    return result


# -- gradients of graphs -----------------------------------------------------------------------------------------------
def test_a_tensor_used_twice_gets_both_gradients():
    x = leaf(1.0, 2.0)
    (x * x + x).sum().backward()
    assert values(x.grad) == [3.0, 5.0]


def test_a_diamond_adds_up_and_computes_each_gradient_once(probe):
    x, calls = scalar(1.0), []
    probe.seen = lambda g: calls.append(g)
    h = x
    for _ in range(60):  # 2**60 paths
        h = probe(h)
        h = h + h
    h.backward()
    assert x.grad.item() == 2.0**60
    assert len(calls) == 60


def test_a_node_with_ten_thousand_consumers(probe):
    x, calls = leaf(1.0, 2.0), []
    probe.seen = lambda g: calls.append(g)
    h = x * 1.0
    sum([probe(h) for _ in range(10_000)]).sum().backward()
    assert values(x.grad) == [10_000.0, 10_000.0]
    assert len(calls) == 10_000


def test_unused_outputs_get_zero_gradients():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    first, second = x.split((1, 3))
    unused = ag.exp(first)
    (second * second).sum().backward()
    assert values(x.grad) == [0.0, 4.0, 6.0, 8.0]
    assert unused.requires_grad


def test_a_multi_output_kernel_gets_none_for_the_unused_output(declare, monkeypatch):
    seen = []

    def backward(saved, g_a, g_b):
        seen.append((g_a, g_b))
        return (g_a,) if g_b is None else (g_a + 2 * g_b.sum(-1, keepdims=True),)

    monkeypatch.setitem(sys.modules, "kernel_of_pair", SimpleNamespace(
        forward=lambda x: ((x * 1, 2 * x.repeat(2, -1)), ()), backward=backward))

    def pair_of(x):
        return x.copy(), 2 * x.repeat(2, -1)

    operator = declare(pair_of, "x[D 1] -> a[D 1], b[D 2]")
    operator.form(lambda x: (x * 1.0, ag.repeat(x * 2.0, 2)))
    operator.kernel("cpu", "kernel_of_pair")
    x = Tensor(np.ones((3, 1), np.float32), requires_grad=True)
    a, _ = operator(x)
    a.sum().backward()
    (first, second), = seen
    assert first.tolist() == [[1.0]] * 3 and second is None
    assert values(x.grad) == [[1.0]] * 3


def test_broadcasting_is_undone():
    row, column, number = leaf(1.0, 2.0, 3.0), Tensor(np.ones((4, 1)), requires_grad=True), scalar(2.0)
    ((row + column) * number).sum().backward()
    assert values(row.grad) == [8.0, 8.0, 8.0]
    assert values(column.grad) == [[6.0]] * 4
    assert number.grad.shape == () and number.grad.item() == 36.0


def test_gradients_accumulate_over_backward_calls():
    x = leaf(1.0, 2.0)
    for _ in range(3):
        (x * x).sum().backward()
    assert values(x.grad) == [6.0, 12.0]
    x.grad = None
    (x * x).sum().backward()
    assert values(x.grad) == [2.0, 4.0]


def test_micro_batches_add_up_to_one_batch():
    rng = np.random.default_rng(0)
    data, weight = rng.standard_normal((12, 5)), Tensor(rng.standard_normal((5, 3)), requires_grad=True)

    def loss(rows):
        return (ag.tanh(ag.matmul(rows, weight)) ** 2.0).sum() * (1 / 12)

    loss(data).backward()
    whole, weight.grad = weight.grad, None
    for rows in np.split(data, 4):
        loss(rows).backward()
    assert_close(weight.grad, whole)


def test_a_gradient_that_somebody_holds_never_changes():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    held = x.grad
    (x * x).sum().backward()
    assert values(held) == [2.0, 4.0]
    assert values(x.grad) == [4.0, 8.0]


def test_an_unreached_leaf_keeps_no_gradient():
    x, y = leaf(1.0), leaf(2.0)
    (x * 2.0).sum().backward()
    assert y.grad is None
    assert values(gradients((x * 2.0).sum(), [y])[0]) == [0.0]


def test_tensors_without_requires_grad_get_no_gradient():
    x, constant = leaf(1.0), Tensor([2.0])
    (x * constant).sum().backward()
    assert constant.grad is None
    x.requires_grad_(False)
    assert not (x * constant).requires_grad


def test_gradients_that_are_views_are_accumulated_into_nothing_of_others():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    s = x.sum() + (x * y).sum() + x.sum()  # sum's gradient is a zero-stride view
    s.backward()
    assert values(x.grad) == [5.0, 6.0] and values(y.grad) == [1.0, 2.0]
    assert x.grad.data.flags.writeable and x.grad.data.strides == (8,)


def test_leaves_do_not_share_the_memory_of_their_gradients():
    x, y, seed = leaf(1.0, 2.0), leaf(3.0, 4.0), Tensor([1.0, 2.0])
    h = x + y
    h.retain_grad()
    ag.identity(h).backward(seed)
    arrays = [x.grad.data, y.grad.data, h.grad.data, seed.data]
    x.grad.assign_([0.0, 0.0])  # as clipping in place would
    assert values(y.grad) == values(h.grad) == values(seed) == [1.0, 2.0]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_gradients_belong_to_no_graph():
    x, seed = leaf(1.0, 2.0), leaf(3.0, 4.0)
    for _ in range(2):
        (x + 1.0).backward(seed)
    assert values(x.grad) == [6.0, 8.0]
    assert not x.grad.requires_grad and x.grad.node is None
    assert seed.grad is None


def test_backward_of_a_leaf():
    x = scalar(3.0)
    x.backward()
    x.backward(2.0)
    assert x.grad.item() == 3.0


def test_reassigning_names_after_forward_changes_nothing():
    x = leaf(1.0, 2.0)
    first = x
    y = (x * x).sum()
    x = x - 0.5 * x
    y.backward()
    assert values(first.grad) == [2.0, 4.0]


def test_changing_an_array_after_the_call_changes_nothing():
    data, index, mask, other = np.array([1.0, 2.0, 3.0]), np.array([0, 1]), np.array([True, False, False]), np.ones(3)
    x = Tensor(data, requires_grad=True)
    parts = [x[index].sum(), (x * other).sum(), ag.where(mask, x, 0.0).sum(), ag.gather(x, index).sum()]
    data[:], index[:], mask[:], other[:] = 9.0, 2, True, 9.0
    found = []
    for part in parts:
        part.backward()
        found.append(values(x.grad))
        x.grad = None
    assert found == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_changing_a_mask_used_as_an_index_changes_nothing():
    x, mask = leaf(1.0, 2.0, 3.0), np.array([True, False, False])
    y = x[mask].sum()
    mask[1] = True
    y.backward()
    assert values(x.grad) == [1.0, 0.0, 0.0]


def test_a_gradient_has_the_dtype_of_its_leaf():
    x = leaf(1.0, 2.0, dtype=np.float32)
    y = (x * 2.0 + 1).astype(np.float64)
    (y * y).sum().backward()
    assert y.dtype == np.float64 and x.grad.dtype == np.float32


def test_recomputing_with_the_same_seed_replays_the_same_randomness():
    x = Tensor(np.ones(1000), requires_grad=True)
    first, again, other = (ag.dropout(x, p=0.5, seed=s) for s in (7, 7, 8))
    assert np.array_equal(first.numpy(), again.numpy()) and not np.array_equal(first.numpy(), other.numpy())
    again.sum().backward()
    assert np.array_equal(x.grad.numpy(), first.numpy())
    source = ag.Random(3)
    assert np.array_equal(source.split(1).normal((5,)), source.split(1).normal((5,)))


# -- depth -------------------------------------------------------------------------------------------------------------
@pytest.mark.full
def test_a_chain_of_100_000_nodes_runs_backward_and_is_freed():
    x = Tensor([0.0], requires_grad=True)
    first = h = ag.sin(x)
    for _ in range(100_000):
        h = ag.sin(h)  # saves its input, so that nodes hold tensors and tensors hold nodes
    h.sum().backward(retain=True)
    assert values(x.grad) == [1.0]
    early = weakref.ref(first)
    del first
    assert early() is not None
    del h  # the interpreter would crash here if nodes freed each other recursively
    assert early() is None


@pytest.mark.full
def test_a_chain_of_100_000_nodes_that_save_nothing():
    x = h = leaf(1.0)
    for _ in range(100_000):
        h = ag.identity(h)
    h.sum().backward()
    assert values(x.grad) == [1.0]


def test_copying_a_graph_is_refused_at_any_depth():
    x = h = leaf(1.0)
    for _ in range(3_000):
        h = h * 1.0
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(GraphError, match="detach"):
            duplicate(h)
    for duplicate in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        twin = duplicate(x)
        assert twin.requires_grad and values(twin) == [1.0] and not np.shares_memory(twin.data, x.data)
        assert values(duplicate(h.detach())) == [1.0]


# -- memory ------------------------------------------------------------------------------------------------------------
def _dropped(output, x):
    pass


def _backward(output, x):
    output.backward()


def _backward_with_retain(output, x):
    output.backward(retain=True)
    output.backward(retain=True)


def _second_derivative(output, x):
    first, = gradients(output, [x], create_graph=True)
    gradients(first.sum(), [x])


def _failing_backward(output, x):
    def fail(leaf, gradient):
        raise RuntimeError

    try:
        output.backward(sink=fail)
    except RuntimeError:
        pass


@pytest.mark.parametrize("after", [_dropped, _backward, _backward_with_retain, _second_derivative, _failing_backward],
                         ids=lambda f: f.__name__.strip("_"))
def test_reference_counts_alone_free_a_graph(after):
    x = Tensor(np.linspace(0.1, 1.0, 6), requires_grad=True)

    def run():
        h = ag.exp(x)
        left, right = ag.split(h, sizes=2)
        parts = [h, left, right, ag.concat([left, right * right]), ag.softmax(right), left[1], ag.stack([left, left]).T,
                 ag.where(right.data > 1.5, right, left), right.reshape(3, 1), ag.layer_norm(h)]
        output = sum((p * p).sum() for p in parts)
        with use("layer_norm", form=next(iter(ag.layer_norm.forms))):
            output = output + ag.layer_norm(h * 2.0).sum()
        parts[1].retain_grad()
        alive = [weakref.ref(t) for t in (*parts, output)] + [weakref.ref(t.data) for t in (*parts, output)]
        after(output, x)
        return alive

    with use(kernel="none"), without_collector():
        alive = run()
        x.grad = None
        assert [r() for r in alive if r() is not None] == []


def test_a_fused_kernel_is_freed_by_reference_counts_alone(cube):
    def run(backward):
        x = leaf(1.0, 2.0)
        h = ag.exp(x)
        y = cube(h)
        if backward:
            y.sum().backward()
        return [weakref.ref(t) for t in (x, h, y, h.data, y.data)]

    with without_collector():
        for backward in (False, True):
            assert [r() for r in run(backward) if r() is not None] == []


def test_saved_arrays_die_while_backward_goes_on(probe):
    saved, alive = [], []
    probe.seen = lambda g: alive.append(sum(r() is not None for r in saved))
    h = leaf(0.1, 0.2)
    for _ in range(20):
        h = ag.exp(h * 0.1)
        saved.append(weakref.ref(h.data))
        h = probe(h)
    output = h.sum()
    del h
    with without_collector():
        output.backward()
    assert alive == list(range(20, 0, -1))


def test_a_released_graph_does_not_hold_its_leaves():
    x = leaf(1.0, 2.0)
    output = (x + 1.0).sum()
    output.backward()
    alive = weakref.ref(x)
    with without_collector():
        del x
        assert alive() is None and output.item() == 5.0


def test_retain_keeps_saved_arrays():
    x = leaf(1.0, 2.0)
    h = ag.exp(x)
    saved = weakref.ref(h.data)
    output = (h * 2.0).sum()
    del h
    output.backward(retain=True)
    assert saved() is not None
    output.backward()
    assert saved() is None


def test_the_peak_of_backward_is_what_forward_saved_and_a_few_arrays():
    size, steps = 20_000, 50
    one = size * 8
    a, h = Tensor(np.full(size, 0.5), requires_grad=True), Tensor(np.ones(size))
    tracemalloc.start()
    try:
        for _ in range(steps):
            h = ag.sqrt(h * a)  # saves the previous h and the new one
        output = h.sum()
        del h
        saved, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        output.backward()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert saved < (steps + 3) * one
    assert peak < saved + 8 * one
    assert after < 4 * one


def test_a_result_without_a_graph_holds_no_inputs():
    x = leaf(1.0, 2.0)
    h = ag.exp(x)
    with no_grad():
        y = h * 2.0
    alive = weakref.ref(h)
    del h
    assert alive() is None and values(y) == (2 * np.exp([1.0, 2.0])).tolist()


# -- a second backward -------------------------------------------------------------------------------------------------
def test_a_second_backward_is_refused():
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(GraphError, match=r"released.*retain=True"):
        y.backward()
    assert values(x.grad) == [2.0, 4.0]


def test_a_shared_part_is_released_with_the_first_backward():
    x = leaf(1.0, 2.0)
    h = ag.exp(x)
    first, second = h.sum(), (h * h).sum()
    first.backward()
    before = values(x.grad)
    with pytest.raises(GraphError, match=r"exp.*released"):
        second.backward()
    assert values(x.grad) == before


def test_with_retain_gradients_add_exactly():
    x = leaf(0.3, 0.7)
    y = (ag.tanh(x) / x).sum()
    y.backward(retain=True)
    once = x.grad.numpy()
    y.backward(retain=True)
    y.backward()
    assert values(x.grad) == (once + once + once).tolist()
    with pytest.raises(GraphError, match="released"):
        y.backward()


def test_gradients_release_the_graph_too():
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    gradients(y, [x], retain=True)
    gradients(y, [x])
    with pytest.raises(GraphError, match="released"):
        gradients(y, [x])


# -- seeds -------------------------------------------------------------------------------------------------------------
def test_only_a_scalar_needs_no_seed():
    x = leaf(1.0, 2.0)
    with pytest.raises(GraphError, match=r"\(2,\)"):
        (x * x).backward()
    with pytest.raises(GraphError, match=r"gradients.*\(2,\)"):
        gradients(x * x, [x])
    (x * x).backward(np.array([1.0, 10.0]))
    assert values(x.grad) == [2.0, 40.0]


@pytest.mark.parametrize(("seed", "words"), [
    (np.ones(3), r"\(3,\).*\(2,\)"), (np.ones((1, 2)), r"\(1, 2\).*\(2,\)"), (1.0, r"\(\).*\(2,\)"),
    (np.ones(2, np.float32), "float32.*float64")])
def test_a_seed_of_another_shape_or_dtype_is_refused(seed, words):
    x = leaf(1.0, 2.0)
    y = x * x
    with pytest.raises(GraphError, match=words):
        y.backward(seed)
    y.backward(Tensor([1.0, 1.0]))  # the refusal released nothing
    assert values(x.grad) == [2.0, 4.0]


def test_a_number_seeds_a_scalar_of_any_dtype():
    for dtype in (np.float32, np.float64):
        x = leaf(1.0, 2.0, dtype=dtype)
        (x * x).sum().backward(3)
        assert values(x.grad) == [6.0, 12.0] and x.grad.dtype == dtype


def test_backward_without_anything_to_differentiate_is_refused():
    for tensor in (Tensor(1.0), Tensor(1.0) * 2.0, scalar(1.0).detach()):
        with pytest.raises(GraphError, match="requires a gradient"):
            tensor.backward()


# -- retain_grad and sink ----------------------------------------------------------------------------------------------
def test_intermediate_tensors_keep_gradients_on_request():
    x = leaf(1.0, 2.0)
    h, other = x * 3.0, x * 5.0
    assert h.retain_grad() is h
    y = (h * h + other).sum()
    y.backward(retain=True)
    assert values(h.grad) == [6.0, 12.0] and other.grad is None
    y.backward()
    assert values(h.grad) == [12.0, 24.0]
    with pytest.raises(GraphError, match="requires no gradient"):
        Tensor([1.0]).retain_grad()


def test_one_output_of_several_keeps_its_gradient():
    first, second = leaf(1.0, 2.0).split(2)
    second.retain_grad()
    (first * 3.0 + second * 5.0).sum().backward()
    assert first.grad is None and values(second.grad) == [5.0]


def test_a_sink_gets_every_contribution_instead_of_grad():
    x, y, got = leaf(1.0, 2.0), leaf(3.0, 4.0), []
    (x * y + x).sum().backward(sink=lambda tensor, gradient: got.append((tensor, values(gradient))))
    assert x.grad is None and y.grad is None
    totals = [np.sum([g for tensor, g in got if tensor is t], axis=0).tolist() for t in (x, y)]
    assert totals == [[4.0, 5.0], [1.0, 2.0]]
    assert len(got) == 3


def test_a_sink_is_called_while_backward_goes_on(probe):
    events = []
    probe.seen = lambda g: events.append("probe")
    x, y = leaf(1.0), leaf(2.0)
    (probe(x) * 2.0 + y).sum().backward(sink=lambda tensor, gradient: events.append("y" if tensor is y else "x"))
    assert events == ["y", "probe", "x"]


# -- gradients() and grad() --------------------------------------------------------------------------------------------
def test_gradients_touch_no_grad():
    x = leaf(1.0, 2.0)
    h = ag.exp(x)
    by_h, by_x = gradients((h * h).sum(), [h, x])
    assert_close(by_h, 2 * h.numpy())
    assert_close(by_x, 2 * h.numpy() ** 2)
    assert x.grad is None and h.grad is None


def test_gradients_with_respect_to_nothing_touch_no_grad():
    x = leaf(1.0, 2.0)
    assert gradients((x * x).sum(), []) == []
    assert x.grad is None


@pytest.mark.parametrize("of", [lambda x: x, ag.exp], ids=["leaf", "intermediate"])
def test_an_input_named_twice_gets_its_gradient_twice(of):
    h = of(leaf(1.0, 2.0))
    first, second = gradients((h * h).sum(), [h, h])
    assert values(first) == values(second) == (2 * h.numpy()).tolist()


@pytest.mark.parametrize("x", [leaf(2.0), leaf(0.0), leaf(1.0, 2.0)], ids=["one", "zero", "two"])
def test_gradients_want_a_list_of_inputs(x):
    with pytest.raises(TypeError, match="inputs"):
        gradients((x * x).sum(), x)


def test_gradients_of_several_outputs_add_up():
    x = leaf(1.0, 2.0)
    first, second = x * x, x.sum()
    found, = gradients([first, second, Tensor(1.0)], [x], [Tensor([1.0, 10.0]), None, None])
    assert values(found) == [3.0, 41.0]
    again, = gradients([x, x], [x], [Tensor([1.0, 0.0]), Tensor([1.0, 5.0])])
    assert values(again) == [2.0, 5.0]


def test_gradients_stop_at_their_inputs(probe):
    """What lies below the inputs is neither computed nor released."""
    calls = []
    probe.seen = lambda g: calls.append(g)
    x = leaf(1.0, 2.0)
    h = probe(x)
    found, = gradients((h * h).sum(), [h])
    assert values(found) == [2.0, 4.0] and calls == []
    h.sum().backward()
    assert values(x.grad) == [1.0, 1.0]


def test_a_fused_kernel_below_the_input_does_not_stand_in_the_way(cube):
    h = cube(leaf(1.0, 2.0))
    first, = gradients((h * h).sum(), [h], create_graph=True)
    assert values(first) == [2.0, 16.0]
    assert values(grad(lambda h: (h * h).sum())(cube(leaf(1.0, 2.0)))) == [2.0, 16.0]


def test_second_derivatives():
    x = leaf(0.3, 0.7)
    first, = gradients(ag.sin(x).sum(), [x], create_graph=True)
    second, = gradients(first.sum(), [x], create_graph=True)
    third, = gradients(second.sum(), [x])
    assert_close(first, np.cos(x.numpy()))
    assert_close(second, -np.sin(x.numpy()))
    assert_close(third, -np.cos(x.numpy()))
    assert x.grad is None


def test_a_gradient_penalty_reaches_the_leaves():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    slope, = gradients((ag.exp(x) * w).sum(), [x], create_graph=True)
    (slope * slope).sum().backward()
    assert_close(w.grad, 2 * w.numpy() * np.exp(2 * x.numpy()))
    assert_close(x.grad, 2 * w.numpy() ** 2 * np.exp(2 * x.numpy()))


def test_without_create_graph_gradients_are_constants():
    x = leaf(1.0, 2.0)
    found, = gradients((x * x).sum(), [x])
    assert not found.requires_grad
    with pytest.raises(GraphError, match="requires a gradient"):
        found.sum().backward()


def test_a_fused_kernel_refuses_a_second_derivative_and_names_the_way(cube):
    x = leaf(1.0, 2.0)
    with pytest.raises(GraphError, match="cube") as caught:
        gradients(cube(x).sum(), [x], create_graph=True)
    assert "use('cube'" in str(caught.value) and "form='composed'" in str(caught.value)
    with use("cube", form="composed"):
        first, = gradients(cube(x).sum(), [x], create_graph=True)
        second, = gradients(first.sum(), [x])
    assert_close(second, 6 * x.numpy())


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_a_hessian_is_symmetric(seed, size):
    rng = np.random.default_rng(seed)
    a, x = rng.standard_normal((size, size)), Tensor(rng.standard_normal(size), requires_grad=True)
    y = (ag.tanh(ag.matmul(a, x)) * ag.exp(ag.sin(x))).sum() * ag.softmax(x)[0]
    first, = gradients(y, [x], create_graph=True)
    hessian = np.stack([gradients(first[i], [x], retain=True)[0].numpy() for i in range(size)])
    assert_close(hessian, hessian.T)


def test_grad_of_a_function():
    assert values(grad(lambda x: (x * x).sum())(np.array([1.0, 2.0]))) == [2.0, 4.0]
    assert grad(grad(grad(lambda x: x**4.0)))(2.0).item() == pytest.approx(48.0, rel=1e-14)
    both = grad(lambda x, y, scale=1.0: x * y * scale, (0, 1))(2.0, 3.0, scale=10.0)
    assert [v.item() for v in both] == [30.0, 20.0]
    assert grad(lambda x, y: x * y, -1)(2.0, 3.0).item() == 2.0


def test_grad_of_a_constant_is_zero_without_a_warning(recwarn):
    for constant in (lambda x: Tensor(3.0), lambda x: x.detach() * 2.0):
        assert grad(constant)(1.0).item() == 0.0
    assert values(grad(lambda x, y: ag.sum(y * y))(np.ones(3), np.ones(3))) == [0.0, 0.0, 0.0]
    assert not recwarn.list


def test_nested_grads_keep_their_variables_apart():
    assert grad(lambda x: x * grad(lambda y: x + y)(1.0))(1.0).item() == 1.0
    assert grad(lambda x: x * grad(lambda y: x * y)(2.0))(3.0).item() == 6.0


def test_grad_is_connected_to_its_arguments():
    x = scalar(2.0)
    grad(lambda v: v**3.0)(x).backward()
    assert x.grad.item() == pytest.approx(12.0, rel=1e-14)
    w = scalar(5.0)
    grad(lambda v: v * v * w, create_graph=True)(3.0).backward()
    assert w.grad.item() == 6.0


def test_grad_works_within_no_grad():
    with no_grad():
        assert grad(lambda x: x * x)(3.0).item() == 6.0
        assert not recording()


def test_grad_refuses_what_it_cannot_differentiate():
    with pytest.raises(GraphError, match="float"):
        grad(lambda x: 2.0)(1.0)
    with pytest.raises(GraphError, match=r"\(3,\)"):
        grad(lambda x: x * 2.0)(np.ones(3))
    with pytest.raises(TypeError, match="argument 1"):
        grad(lambda x: x, 1)(1.0)
    with pytest.raises(DtypeError, match="int64"):
        grad(lambda x: x.sum())(np.arange(3))


# -- state -------------------------------------------------------------------------------------------------------------
def test_no_grad_nests_and_restores():
    assert recording()
    with no_grad():
        assert not recording()
        with enable_grad():
            assert recording()
            with no_grad():
                assert not recording()
            assert recording()
        assert not recording()
    assert recording()


def test_what_is_made_within_no_grad_is_a_leaf():
    x = leaf(1.0, 2.0)
    with no_grad():
        y = x * x
        z = Tensor([1.0], requires_grad=True)
    assert y.is_leaf and not y.requires_grad
    assert z.is_leaf and z.requires_grad
    (z * 2.0).sum().backward()
    assert values(z.grad) == [2.0] and x.grad is None


def test_a_part_within_no_grad_is_a_constant():
    x = scalar(3.0)
    with no_grad():
        factor = x * x
    (factor * x).backward()
    assert x.grad.item() == 9.0


@pytest.mark.parametrize("switch", [no_grad, check_mode, lambda: use("gelu", form="composed"),
                                    lambda: use(kernel="none")], ids=["no_grad", "check_mode", "use", "use none"])
def test_state_is_restored_after_exceptions(switch):
    before = (switches().recording, switches().checking, switches().uses)
    with pytest.raises(ZeroDivisionError), switch():
        assert (switches().recording, switches().checking, switches().uses) != before
        raise ZeroDivisionError
    assert (switches().recording, switches().checking, switches().uses) == before


@pytest.mark.parametrize("switch", [no_grad, check_mode, lambda: use(kernel="none")], ids=["no_grad", "check", "use"])
def test_switches_are_decorators(switch):
    before = (switches().recording, switches().checking, switches().uses)

    @switch()
    def state(depth):
        inner = state(depth - 1) if depth else None
        return (switches().recording, switches().checking, switches().uses[-1:]), inner

    inside, deeper = state(1)
    assert deeper[0] == inside != (*before[:2], before[2][-1:])
    assert (switches().recording, switches().checking, switches().uses) == before


def test_one_switch_can_be_entered_again():
    switch = no_grad()
    with switch:
        with switch:
            pass
        assert not recording()
    assert recording()


def test_no_grad_inside_a_generator_ends_with_it():
    def generator():
        with no_grad():
            yield recording()
            yield recording()

    assert list(generator()) == [False, False]
    assert recording()
    started = generator()
    next(started)
    started.close()
    assert recording()

    @no_grad()
    def decorated():  # the body runs after the decorator has left, as no_grad's docstring says
        yield recording()

    assert list(decorated()) == [True]


def test_state_belongs_to_a_thread():
    def state():
        return switches().recording, switches().checking, switches().uses, switches().depth

    fresh = state()
    with no_grad(), check_mode(), use(kernel="none"):
        assert in_thread(state) == fresh != state()

    def leave_open():
        no_grad().__enter__()
        use(kernel="none").__enter__()
        return recording()

    assert in_thread(leave_open) is False
    assert state() == fresh


def test_grad_restores_its_depth_after_an_exception():
    def fail(x):
        raise ZeroDivisionError

    with no_grad():
        with pytest.raises(ZeroDivisionError):
            grad(fail)(1.0)
        assert switches().depth == 0 and not switches().recording
    x = scalar(1.0).detach()
    assert not grad(lambda v: v * v)(x).requires_grad


@pytest.mark.parametrize("where", ["forward", "vjp"])
def test_an_exception_leaves_no_half_written_gradients(declare, where):
    def failing(x):
        return x

    def fail(x):
        raise ZeroDivisionError

    operator = declare(failing)
    operator.primitive(fail if where == "forward" else lambda x: x * 1)
    operator.vjp(fail if where == "vjp" else lambda g: g)
    x, y = leaf(1.0), leaf(2.0)
    (x * y).sum().backward()
    h = y * 3.0
    h.retain_grad()
    with pytest.raises(ZeroDivisionError):
        (operator(x) * h + y).sum().backward()
    assert values(x.grad) == [2.0] and values(y.grad) == [1.0] and h.grad is None
    assert recording() and switches().depth == 0


# -- threads -----------------------------------------------------------------------------------------------------------
def _differentiated(seed) -> list[bytes]:
    """Gradients of a graph that depends on the seed."""
    rng = np.random.default_rng(seed)
    a, b = (Tensor(rng.standard_normal((4, 4)), requires_grad=True) for _ in range(2))
    h = a
    for kind in rng.integers(0, 5, 25):
        step = [lambda h: ag.matmul(h, b) * 0.3, ag.tanh, lambda h: h[::-1] + b, lambda h: ag.softmax(h + a),
                lambda h: ag.concat(ag.split(h * b, sizes=2), axis=-1)]
        h = step[kind](h)
        if kind == 1:
            with no_grad():
                assert not (h * 2.0).requires_grad
    (h * h).sum().backward()
    return [a.grad.data.tobytes(), b.grad.data.tobytes()]


def test_threads_differentiate_separate_graphs_at_once():
    serial = [_differentiated(seed) for seed in range(30)]
    found, errors, start = {}, [], threading.Barrier(3)

    def work(first):
        try:
            start.wait()
            for seed in range(first, 30, 3):
                found[seed] = _differentiated(seed)
        except Exception as error:  # raised below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert [found[seed] for seed in range(30)] == serial


def test_parts_of_a_graph_made_by_different_threads_join():
    x = leaf(1.0, 2.0)
    parts = [in_thread(lambda: ag.exp(x)), x * 3.0, in_thread(lambda: x * x)]
    in_thread(lambda: (parts[0] * parts[1] + parts[2]).sum().backward())
    e, v = np.exp(x.numpy()), x.numpy()
    assert_close(x.grad, 3 * v * e + 3 * e + 2 * v)


# -- detach and updates in place ---------------------------------------------------------------------------------------
def test_detach_cuts_the_graph_and_shares_the_memory():
    x = leaf(1.0, 2.0)
    h = x * x
    cut = h.detach()
    assert not cut.requires_grad and cut.is_leaf and np.shares_memory(cut.data, h.data)
    (cut * x).sum().backward()
    assert values(x.grad) == [1.0, 4.0]


def _view(x):
    with no_grad():
        return x[:1]


@pytest.mark.parametrize("alias", [lambda x: x, Tensor.detach, lambda x: x.detach().detach(), _view,
                                   lambda x: x.reshape(2, 1)],
                         ids=["itself", "detached", "detached twice", "a slice", "reshaped"])
def test_backward_refuses_when_a_saved_input_was_updated(alias):
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    same = alias(x)
    same.assign_(np.zeros(same.shape))
    with pytest.raises(GraphError, match=r"multiply: argument 'x' was updated in place"):
        y.backward()
    assert x.grad is None


@pytest.mark.parametrize("alias", [lambda y: y, Tensor.detach], ids=["itself", "detached"])
@pytest.mark.parametrize("function", [ag.exp, ag.sqrt, ag.softmax, ag.logsumexp], ids=lambda f: f.name)
def test_backward_refuses_when_a_saved_output_was_updated(function, alias):
    x = leaf(1.0, 2.0)
    h = function(x)
    y = h.sum()
    with pytest.raises(GraphError, match=function.name):
        alias(h).assign_(np.zeros(h.shape))  # may refuse here, backward has to at the latest
        y.backward()
    assert x.grad is None


def test_backward_refuses_when_an_input_of_a_kernel_was_updated(cube):
    x = leaf(1.0, 2.0)
    y = cube(x).sum()
    assert cube.calls == ["forward"]
    x.assign_(np.zeros(2))
    with pytest.raises(GraphError, match=r"cube: argument 'x' was updated"):
        y.backward()


def test_an_update_of_what_was_not_saved_is_allowed():
    x = leaf(1.0, 2.0)
    y = (x + 1.0).sum()
    x.assign_([5.0, 6.0])
    y.backward()
    assert values(x.grad) == [1.0, 1.0]
    (x * x).sum().backward()  # recorded after the update
    assert values(x.grad) == [11.0, 13.0]


def test_assign_keeps_shape_and_dtype():
    x = leaf(1.0, 2.0)
    for wrong in (np.zeros(1), np.zeros((1, 2)), np.zeros(2, np.float32), [0, 0], 0.0):
        with pytest.raises(ShapeError, match=r"assign_.*\(2,\).*float64"):
            x.assign_(wrong)
    assert values(x) == [1.0, 2.0]


def test_elements_cannot_be_assigned():
    x = leaf(1.0, 2.0)
    with pytest.raises(GraphError, match="where"):
        x[0] = 5.0
    with pytest.raises(ValueError, match="read-only"):
        x.numpy()[0] = 5.0


def test_requires_grad_is_switched_on_leaves_only():
    h = leaf(1.0) * 2.0
    with pytest.raises(GraphError, match="multiply"):
        h.requires_grad_(False)
    assert h.detach().requires_grad_().requires_grad


# -- check mode --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("function", "name"), [
    (lambda x: ag.exp(ag.log(x) * 2.0), "log"), (lambda x: ag.tanh(x / (x + 1.0)), "divide"),
    (lambda x: ag.softplus(ag.exp(x * -1e4)), "exp")], ids=["nan", "division by zero", "overflow"])
def test_check_mode_names_the_first_operator_that_makes_a_nan_or_infinity(function, name):
    x = leaf(-1.0, 2.0)
    with np.errstate(all="ignore"):
        assert not np.isfinite(function(x).numpy()).all() or name == "divide"  # silent without check mode
        with check_mode(), pytest.raises(NonFiniteError, match=rf"the output of {name}: 1 of 2 .*\(2,\)"):
            function(x)
        function(x)


def test_check_mode_names_the_operator_whose_gradient_is_not_finite(declare):
    x = leaf(0.0, 2.0)
    with np.errstate(all="ignore"), check_mode():
        with pytest.raises(NonFiniteError, match=r"gradient of sqrt"):
            ag.sqrt(x).sum().backward()

        def poisonous(x):
            return x

        operator = declare(poisonous)
        operator.primitive(lambda x: x * 1)
        operator.vjp(lambda g: Tensor.wrap(g.data * np.nan))
        with pytest.raises(NonFiniteError, match="gradient of poisonous: 2 of 2"):
            (operator(x) * 3.0).sum().backward()
    assert x.grad is None


def test_check_mode_makes_what_backward_needs_read_only():
    x = leaf(1.0, 2.0)
    with check_mode():
        y = ag.exp(x)
        z = y * x
        for tensor in (x, y):
            with pytest.raises(ValueError, match="read-only"):
                tensor.data[0] = 5.0
        z.sum().backward()
    assert_close(x.grad, np.exp([1.0, 2.0]) * np.array([2.0, 3.0]))


def test_check_mode_makes_a_saved_output_read_only():
    with check_mode():
        y = ag.exp(leaf(1.0, 2.0))
        with pytest.raises(ValueError, match="read-only"):
            y.data[0] = 1.0


def test_a_parameter_can_be_updated_after_a_checked_step():
    x = leaf(1.0, 2.0)
    with check_mode():
        (x * x).sum().backward()
    x.assign_(x.numpy() - x.grad.numpy())
    assert values(x) == [-1.0, -2.0]


# -- use and explain ---------------------------------------------------------------------------------------------------
def test_the_kernel_is_the_default_and_the_first_form_where_it_does_not_apply(cube):
    x = leaf(1.0, 2.0)
    cube(x).sum().backward()
    assert cube.calls == ["forward", "backward"] and values(x.grad) == [3.0, 12.0]
    cube(x.reshape(1, 2))
    assert cube.calls[2:] == ["composed"]


@pytest.mark.parametrize(("request_", "call"), [({"form": "composed"}, "composed"), ({"form": "power"}, "power"),
                                                ({"kernel": "none"}, "composed"), ({"kernel": "cpu"}, "forward")])
@pytest.mark.parametrize("by", ["name", "op", "all"])
def test_use_forces(cube, request_, call, by):
    with use(*{"name": ["cube"], "op": [cube], "all": []}[by], **request_):
        cube(leaf(1.0, 2.0))
    assert cube.calls == [call]


def test_uses_nest_and_the_innermost_that_concerns_an_operator_counts(cube):
    x = leaf(2.0)
    with use("cube", form="power"):
        with use("cube", form="composed"), use("gelu", form="composed"):
            cube(x)
        cube(x)
        with use(kernel="none"):
            cube(x)
        with use("gelu", kernel="none"):
            cube(x)
    cube(x)
    assert cube.calls == ["composed", "power", "composed", "power", "forward"]


def test_use_raises_where_the_forced_kernel_does_not_apply(cube):
    with use(kernel="cpu"), pytest.raises(KernelError, match=r"cube: the forced kernel 'cpu'.*at most one axis"):
        cube(Tensor(np.ones((2, 2))))
    assert cube.calls == []


@pytest.mark.parametrize(("arguments", "request_", "words"), [
    (["cube"], {"form": "compsed"}, "cube has no form 'compsed'; did you mean 'composed'"),
    (["cube"], {"kernel": "cuda"}, "cube has no kernel 'cuda', available: cpu"),
    (["cube", "exp"], {"form": "power"}, "no form 'power'"),
    (["cub"], {"form": "power"}, "no operator 'cub'; did you mean cube"),
    ([], {"form": "no such form"}, "no such form"),
    ([], {}, "exactly one"),
    (["cube"], {"form": "power", "kernel": "cpu"}, "exactly one")])
def test_use_refuses_what_does_not_exist(cube, arguments, request_, words):
    with pytest.raises(KernelError, match=words):
        use(*arguments, **request_)


def test_use_belongs_to_a_thread(cube):
    with use("cube", form="power"):
        in_thread(lambda: cube(leaf(1.0)))
    assert cube.calls == ["forward"]


def test_a_kernel_is_imported_at_its_first_call(declare):
    def lazy(x):
        return x

    operator = declare(lazy)
    operator.form(lambda x: x * 1.0)
    operator.kernel("cpu", "no_such_module")
    with use(kernel="none"):
        operator(leaf(1.0))
    with pytest.raises(KernelError, match="lazy, kernel cpu: there is no module 'no_such_module'"):
        operator(leaf(1.0))


def _lines(text):
    return [line.strip() for line in text.splitlines()]


def test_explain_tells_what_runs_and_why_not_the_others(cube):
    vector, matrix = np.ones(2), np.ones((2, 2))
    head = "cube: x[...] -> y[...]"
    assert _lines(explain("cube")) == [head, "kernel cpu", "form composed", "form power"]
    assert _lines(explain(cube, vector)) == [
        head, "kernel cpu: chosen: the fused kernel of this device",
        "form composed: not chosen: kernel cpu comes first", "form power: not chosen: kernel cpu comes first"]
    assert _lines(explain(cube, leaf(1.0).reshape(1, 1))) == [
        head, "kernel cpu: not chosen: takes at most one axis",
        "form composed: chosen: the default form", "form power: not chosen: form composed comes first"]
    with use(cube, form="power"):
        assert _lines(explain(cube, x=matrix)) == [
            head, "kernel cpu: not chosen: use() asks for something else",
            "form composed: not chosen: use() asks for something else", "form power: chosen: forced by use()"]
    with use(kernel="cpu"):
        assert "kernel cpu: chosen: forced by use()" in _lines(explain(cube, vector))
    assert cube.calls == []


def test_explain_refuses_an_unknown_operator():
    with pytest.raises(KernelError, match="did you mean softmax"):
        explain("softmx", np.ones(2))


# -- declarations ------------------------------------------------------------------------------------------------------
def test_an_operator_is_declared_once(declare):
    def twice(x):
        return x

    first = declare(twice)
    with pytest.raises(AutogradError, match="'twice' is declared twice"):
        Op(twice, "x[...] -> y[...]")
    assert REGISTRY["twice"] is first


@pytest.mark.parametrize("signature", [
    "x[D]", "x[D] -> y[D] -> z[D]", "x[D -> y[D]", "x:text[D] -> y[D]", "x -> y", "weight[D] -> y[D]",
    "x[D], weight[D] -> y[D]", "x[D ...] -> y[D]", "x[... ...] -> y[...]", "x[* D] -> y[D]"])
def test_a_bad_signature_is_refused(signature):
    def unreadable(x):
        return x

    try:
        with pytest.raises(ShapeError):
            Op(unreadable, signature)
        assert "unreadable" not in REGISTRY
    finally:
        REGISTRY.pop("unreadable", None)


def test_a_form_is_declared_once(declare):
    def formed(x):
        return x

    operator = declare(formed)

    def composed(x):
        return x * 1.0

    operator.form(composed)
    with pytest.raises(AutogradError, match=r"formed.*composed"):
        operator.form(composed)


def test_a_bad_vjp_is_refused_at_its_declaration(declare):
    def wrong(x, *, scale=1.0):
        return x

    operator = declare(wrong)
    with pytest.raises(AutogradError, match="wrong"):  # of what?
        operator.vjp(lambda g: g)
    operator.primitive(lambda x, scale: x * scale)
    with pytest.raises(AutogradError, match="'sclae'"):
        operator.vjp(lambda g, sclae: g * sclae)


@pytest.mark.parametrize(("gradient", "words"), [
    (lambda g: (g,), "miscounted"), (lambda g: (g, g, g), "miscounted"),
    (lambda g: (g[:1], g), r"miscounted.*\(1,\).*\(3,\)")], ids=["too few", "too many", "of another shape"])
def test_a_vjp_that_returns_something_else_is_named(declare, gradient, words):
    def miscounted(x, y):
        return x + y

    operator = declare(miscounted, "x[...], y[...] -> out[...]")
    operator.primitive(lambda x, y: x + y)
    operator.vjp(gradient)
    with pytest.raises(AutogradError, match=words):
        operator(leaf(1.0, 2.0, 3.0), leaf(1.0, 2.0, 3.0)).sum().backward()


def test_an_operator_without_a_gradient_says_so(declare):
    def mute(x):
        return x

    operator = declare(mute)
    operator.primitive(lambda x: x * 1)
    with pytest.raises(GraphError, match="mute has no gradient"):
        operator(leaf(1.0)).sum().backward()


# -- arguments: every message names the operator and the argument ------------------------------------------------------
WRONG_CALLS = {
    "wrong rank": (ShapeError, lambda: ag.embedding(np.ones(3), np.zeros(2, int)), ["embedding", "weight", "(3,)"]),
    "wrong size": (ShapeError, lambda: ag.layer_norm(np.ones((2, 3)), np.ones(4)), ["layer_norm", "weight", "D = 4"]),
    "no broadcast": (ShapeError, lambda: ag.add(np.ones(2), np.ones(3)), ["add", "x (2,)", "y (3,)"]),
    "axis": (ShapeError, lambda: ag.sum(np.ones((2, 3)), axis=2), ["sum", "axis 2", "2 axes"]),
    "axis twice": (ShapeError, lambda: ag.sum(np.ones((2, 3)), axis=(0, -2)), ["sum", "twice"]),
    "no axis": (ShapeError, lambda: ag.sum(np.ones((2, 3)), axis=0.5), ["sum", "0.5"]),
    "index": (ShapeError, lambda: leaf(1.0)[3], ["getitem", "3"]),
    "integers": (DtypeError, lambda: ag.exp(np.arange(3)), ["exp", "x", "int64"]),
    "text": (DtypeError, lambda: ag.exp("text"), ["exp", "x"]),
    "an object": (DtypeError, lambda: leaf(1.0) + object(), ["add", "y", "object"]),
    "mixed dtypes": (DtypeError, lambda: leaf(1.0) + leaf(1.0, dtype=np.float32), ["add", "y", "float32", "float64"]),
    "a NumPy scalar": (DtypeError, lambda: leaf(1.0, dtype=np.float32) * np.float64(2), ["multiply", "y", "float64"]),
    "float ids": (DtypeError, lambda: ag.embedding(np.ones((3, 2)), np.ones(2)), ["embedding", "ids", "float64"]),
    "a Tensor as ids": (DtypeError, lambda: ag.embedding(np.ones((3, 2)), leaf(1.0)), ["embedding", "ids", "Tensor"]),
    "an integer mask": (DtypeError, lambda: ag.where(np.arange(2), 1.0, 2.0), ["where", "condition", "int64"]),
    "missing": (TypeError, lambda: ag.add(leaf(1.0)), ["add", "'y'", "missing"]),
    "None": (TypeError, lambda: leaf(1.0) + None, ["add", "'y'", "missing"]),
    "too many": (TypeError, lambda: ag.exp(1.0, 2.0), ["exp", "2 arguments"]),
    "twice": (TypeError, lambda: ag.sum(leaf(1.0), 0, axis=0), ["sum", "'axis'", "twice"]),
    "input twice": (TypeError, lambda: ag.exp(1.0, x=1.0), ["exp", "'x'", "twice"]),
    "misspelt": (TypeError, lambda: ag.sum(leaf(1.0), axs=0), ["sum", "'axs'", "did you mean 'axis'"]),
    "not a list": (TypeError, lambda: ag.concat(leaf(1.0)), ["concat", "xs", "list"]),
    "an empty list": (TypeError, lambda: ag.concat([]), ["concat", "xs", "non-empty"]),
    "a Tensor of integers": (DtypeError, lambda: Tensor([1, 2]), ["int64", "float32, float64", "dtype="]),
}


@pytest.mark.parametrize(("error", "call", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_argument_is_named(error, call, words):
    with pytest.raises(error) as caught:
        call()
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_parameters_may_follow_in_order_and_inputs_have_names():
    x = np.arange(6.0).reshape(2, 3)
    assert values(ag.sum(x, 0)) == values(ag.sum(x, axis=0)) == values(ag.sum(x=x, axis=0)) == [3.0, 5.0, 7.0]


# -- a tensor among other objects --------------------------------------------------------------------------------------
def test_arrays_and_numbers_on_the_left():
    x = Tensor([1.0, 2.0])
    left = np.array([3.0, 4.0])
    for result, expected in [(left + x, left + x.data), (left - x, left - x.data), (left * x, left * x.data),
                             (left / x, left / x.data), (left**x, left**x.data), (left @ x, left @ x.data),
                             (2 + x, 2 + x.data), (2 - x, 2 - x.data), (2 * x, 2 * x.data), (2 / x, 2 / x.data),
                             (2**x, 2**x.data), (np.float64(2) * x, 2 * x.data), (np.float64(2) - x, 2 - x.data)]:
        assert type(result) is Tensor
        assert_close(result, expected)


def test_comparisons_are_plain_and_hashes_are_identities():
    x, y = Tensor([1.0, 2.0]), Tensor([1.0, 2.0])
    assert (x == y).tolist() == [True, True] and (x < 1.5).tolist() == [True, False]
    assert (np.array([1.0, 5.0]) > x).tolist() == [False, True]
    assert x != None and not x == "text"  # noqa: E711
    assert len({x, y}) == 2 and {x: 1}[x] == 1


def test_conversions_follow_numpy():
    one, vector = Tensor([[2.5]]), Tensor([1.0, 2.0])
    assert float(one) == one.item() == 2.5 and bool(one) and not bool(Tensor([0.0]))
    assert len(vector) == 2 and [float(v) for v in vector] == [1.0, 2.0]
    assert (vector.shape, vector.ndim, vector.size, vector.dtype) == ((2,), 1, 2, np.float64)
    assert int(one) == 2 and int(Tensor(-2.5)) == -2 and type(int(one)) is int
    for convert in (float, bool, int, "{:.3f}".format):
        with pytest.raises(ValueError, match=r"\(2,\)"):
            convert(vector)
    with pytest.raises(TypeError):  # a number with a fraction is no index
        [0, 1, 2][one]
    for convert in (len, list, iter):
        with pytest.raises(TypeError, match="0-d"):
            convert(Tensor(1.0))
    assert np.asarray(vector).tolist() == [1.0, 2.0]
    with pytest.raises(GraphError, match="numpy"):
        np.asarray(leaf(1.0))


def test_iteration_is_differentiable():
    x = leaf(1.0, 2.0, 3.0)
    a, b, c = x
    (a * b + c).backward()
    assert values(x.grad) == [2.0, 1.0, 1.0]


def test_a_tensor_prints_its_values_dtype_and_origin():
    assert repr(leaf(1.0)) == "Tensor([1.], dtype=float64, requires_grad=True)"
    assert repr(leaf(1.0) * 2.0) == "Tensor([2.], dtype=float64, op=multiply)"
    assert str(Tensor(1.0, dtype=np.float32)) == "Tensor(1., dtype=float32)"
    assert "..." in repr(Tensor(np.zeros(100_000)))


def test_a_number_is_formatted_like_a_number():
    x = leaf(2.0 / 3.0)
    assert f"{x:.3f}" == f"{x[0] * 1.0:.3f}" == "0.667" and f"{Tensor([[1e-9]]):8.1e}" == " 1.0e-09"
    assert f"{x}" == str(x) and f"{Tensor([1.0, 2.0])}" == "Tensor([1., 2.], dtype=float64)"
    with pytest.raises(ValueError, match="Unknown format code"):
        f"{x:d}"


def test_a_tensor_copies_what_it_is_made_of():
    array = np.array([1.0, 2.0])
    x, wrapped = Tensor(array), Tensor.wrap(array)
    array[0] = 5.0
    assert values(x) == [1.0, 2.0] and values(wrapped) == [5.0, 2.0]
    assert values(Tensor(x, dtype=np.float32)) == [1.0, 2.0] and Tensor([1, 2], dtype=np.float32).dtype == np.float32


# -- the checks notice -------------------------------------------------------------------------------------------------
def _with_vjp(declare, vjp):
    def squared(x):
        return x * x

    operator = declare(squared)
    operator.primitive(lambda x: x * x)
    operator.vjp(vjp)
    return operator


@pytest.mark.parametrize("vjp", [
    lambda g, x: g * x * 2.00001, lambda g, x: g * x * 2.0 + 1e-4, lambda g, x: (g * x * 2.0)[::-1],
    lambda g, x: g * x * -2.0, lambda g, x: None, lambda g, x: g * x * np.nan,
    lambda g, x: Tensor.wrap((g * x * 2.0).data.astype(np.float32))],
    ids=["scaled", "shifted", "reversed", "of the other sign", "missing", "nan", "in float32"])
@pytest.mark.parametrize("analytic", [False, True])
def test_gradcheck_notices_a_wrong_gradient(declare, vjp, analytic):
    with pytest.raises(AssertionError, match="gradient"):
        gradcheck(_with_vjp(declare, vjp), np.array([0.3, -0.7, 1.1]), analytic=analytic)


def test_gradcheck_accepts_right_gradients_of_both_orders(declare):
    operator = _with_vjp(declare, lambda g, x: g * x * 2.0)
    for analytic in (False, True):
        gradcheck(operator, np.array([0.3, -0.7, 1.1]), order=2, analytic=analytic)
    gradcheck(lambda x, y: (ag.sin(x * y), x.sum()), np.ones((2, 1)), np.array([0.3, 0.4, 0.5]), order=2)


def test_gradcheck_notices_a_wrong_second_derivative(declare):
    operator = _with_vjp(declare, lambda g, x: g * x.detach() * 2.0)
    gradcheck(operator, np.array([0.3, -0.7, 1.1]))
    with pytest.raises(AssertionError, match="gradient"):
        gradcheck(operator, np.array([0.3, -0.7, 1.1]), order=2)


def test_gradcheck_names_the_input():
    def function(x, y):
        return x * y + (x * y.detach()) * 0.01

    with pytest.raises(AssertionError, match="input 1"):
        gradcheck(function, np.ones(3), np.ones(3))


def test_gradcheck_wants_float64():
    with pytest.raises(TypeError, match="float32"):
        gradcheck(ag.exp, np.ones(3, np.float32))


def test_the_adjoint_test_notices_a_wrong_adjoint():
    rng = np.random.default_rng(0)
    a, x, y = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal(3)
    for dtype in (np.float32, np.float64):
        m, u, v = a.astype(dtype), x.astype(dtype), y.astype(dtype)
        adjoint_test(lambda x, m=m: m @ x, lambda y, m=m: m.T @ y, u, v)
        for wrong in (lambda y, m=m: m @ y, lambda y, m=m: m.T @ (y + y / 1000), lambda y: y * np.nan):
            with pytest.raises(AssertionError, match="not adjoint"):
                adjoint_test(lambda x, m=m: m @ x, wrong, u, v)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(("actual", "expected"), [
    ([1.0], [1.0]), ([1.0, NAN], [1.0, NAN]), ([INF, -INF], [INF, -INF]), ([], []), (2.0, 2.0), ([0.0], [-0.0]),
    ([1e5, 1e-12], [1e5, 0.0])], ids=str)
def test_assert_close_accepts(actual, expected):
    assert_close(np.array(actual), np.array(expected))
    assert_close(Tensor(actual, dtype=np.float32), np.array(expected))


@pytest.mark.parametrize(("actual", "expected"), [
    ([1.0], [1.001]), ([1.0, NAN], [1.0, 1.0]), ([1.0, 1.0], [1.0, NAN]), ([INF], [-INF]), ([INF], [1.0]),
    ([1.0], [INF]), ([NAN], [INF]), ([INF], [NAN]), ([1.0], [[1.0]]), ([1.0, 1.0], [1.0]), ([], [[]]),
    ([0.0, 1e-5], [0.0, 0.0])], ids=str)
def test_assert_close_refuses(actual, expected):
    for dtype in (np.float32, np.float64):
        with pytest.raises(AssertionError, match="the reason"):
            assert_close(np.array(actual, dtype), np.array(expected), "the reason")


@pytest.mark.parametrize(("actual", "expected", "apart"), [
    ([1.0, 3.0], [1.0, 4.0], 0.25), ([NAN, 2.0], [NAN, 2.0], 0.0), ([1.0, NAN], [1.0, 1.0], INF), ([INF], [1.0], INF),
    ([1.0], [[1.0]], INF), ([], [], 0.0), ([1e-5], [0.0], 1e-2)], ids=str)
def test_distance_is_relative_to_the_largest_expected_value(actual, expected, apart):
    assert ag.distance(np.array(actual), np.array(expected)) == pytest.approx(apart, rel=1e-12)


def test_assert_close_judges_by_the_dtype_of_what_is_tested():
    error = np.array([1.0 + 1e-6])
    assert_close(error.astype(np.float32), np.ones(1))
    with pytest.raises(AssertionError, match="float64"):
        assert_close(error, np.ones(1, np.float32))
    assert_close(np.array([1.0 + 1e-13]), np.ones(1), terms=10_000)
    with pytest.raises(AssertionError):
        assert_close(np.array([1.0 + 1e-13]), np.ones(1))
    with pytest.raises(AssertionError):
        assert_close(np.array([3]), np.array([4]))


# -- copies, threads and nested modes ------------------------------------------------------------------------------------
def test_a_copied_or_pickled_parameter_is_a_parameter():
    class Weight(Tensor):
        __slots__ = ()

    for made in (copy.deepcopy(Weight([1.0, 2.0], requires_grad=True)), copy.deepcopy(leaf(1.0))):
        assert made.requires_grad and made.is_leaf
    assert type(copy.deepcopy(Weight([1.0]))) is Weight


def test_threads_that_share_a_leaf_lose_no_gradient():
    x = leaf(0.0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: (x * 1.0).sum().backward(), range(400)))
    finally:
        sys.setswitchinterval(before)
    assert values(x.grad) == [400.0]


def test_gradients_share_no_memory_with_each_other_or_the_seed():
    x, y, seed = leaf(1.0, 2.0), leaf(3.0, 4.0), Tensor([1.0, 2.0])
    first, second = gradients(x + y, [x, y], [seed])
    first.assign_([0.0, 0.0])
    assert values(second) == values(seed) == [1.0, 2.0]
    gradients((x + y).sum(), [x])[0].assign_([0.0, 0.0])


def test_a_gradient_within_no_grad_is_a_constant():
    def f(x):
        with no_grad():
            slope = grad(lambda t: t**3)(x)
        return slope * x

    assert grad(f)(2.0).item() == 12.0


def test_a_use_that_ends_late_takes_only_itself_away(cube):
    def generator():
        with use("add", form="array"):
            yield

    held = generator()
    next(held)
    with use("cube", form="composed"):
        held.close()
        assert "form composed: chosen" in explain("cube", leaf(1.0))


def test_one_no_grad_may_be_entered_by_several_threads():
    switch, entered, leave = no_grad(), threading.Barrier(2), threading.Barrier(2)

    def run():
        with switch:
            entered.wait()
        leave.wait()
        return (leaf(1.0) * 1.0).requires_grad

    with ThreadPoolExecutor(2) as pool:
        assert [f.result() for f in [pool.submit(run), pool.submit(run)]] == [True, True]


def test_variadic_operators_take_their_name_as_a_keyword():
    assert values(ag.concat(xs=[leaf(1.0), leaf(2.0)])) == [1.0, 2.0]
