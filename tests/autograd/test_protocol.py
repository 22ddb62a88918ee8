"""The protocol of forms and kernels, by operators that exist in these tests only: everything that routes.py promises."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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
    assert_close,
    check_mode,
    explain,
    no_grad,
    use,
    verify,
)
from autograd.laws import causal, identity, linear_in, streams
from autograd.state import switches


@pytest.fixture
def declare(monkeypatch):
    """Declare operators that exist during one test only; ``kernel(op, device, functions)`` gives them kernels."""
    names = []

    def make(function, signature="x[...] -> y[...]", **options) -> Op:
        operator = Op(function, signature, **options)
        names.append(operator.name)
        return operator

    def kernel(operator, functions, device="cpu", **options):
        module = f"kernel_{len(operator.routes)}_of_{operator.name}"
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))
        operator.kernel(device, module, **options)

    make.kernel = kernel
    yield make
    for name in names:
        del REGISTRY[name]


def holds(operator, *words):
    """Every row of its report holds, on some draws; the words are among the checks."""
    report = verify(operator, draws=8)
    assert report.ok, str(report)
    assert all(row.draws for row in report.rows), str(report)
    assert set(words) <= {f"{row.route}: {row.check}" for row in report.rows}, str(report)


# -- outputs and inputs of every kind ----------------------------------------------------------------------------------
@pytest.fixture
def top(declare):
    """The largest of each row and where it stands: a float output and an integer one, with a form and a kernel."""
    def top(x):
        y, index = np.empty(x.shape[0], x.dtype), np.empty(x.shape[0], np.intp)
        for b in range(x.shape[0]):
            index[b] = max(range(x.shape[1]), key=lambda d: x[b, d])
            y[b] = x[b, index[b]]
        return y, index

    operator = declare(top, "x[B D] -> y[B], index:int[B]")

    @operator.primitive
    def array(x):
        index = x.argmax(axis=1)
        return np.take_along_axis(x, index[:, None], axis=1)[:, 0], index

    @operator.vjp
    def _(g_y, x, out):
        return ag.where(out[1][:, None] == np.arange(x.shape[1]), g_y.reshape(-1, 1), 0.0)

    def forward(x, recording):
        y, index = operator.forms["array"].function(x)
        return (y, index), (x.shape, index) if recording else None

    def backward(saved, g_y):
        shape, index = saved
        gx = np.zeros(shape, g_y.dtype)
        np.put_along_axis(gx, index[:, None], g_y[:, None], axis=1)
        return gx

    declare.kernel(operator, {"forward": forward, "backward": lambda saved, g_y: (backward(saved, g_y),)})
    operator.inputs(lambda draw: ((draw.distinct(draw.size(0, 3), draw.size(1, 4)),), {}))
    return operator


def test_an_integer_output_stands_beside_a_float_one(top):
    x = Tensor(np.array([[1.0, 3.0], [4.0, 2.0]]), requires_grad=True)
    for kernel in ("cpu", "none"):
        with use(kernel=kernel):
            y, index = top(x)
        assert isinstance(y, Tensor) and type(index) is np.ndarray and index.tolist() == [1, 0]
        x.grad = None
        (y * Tensor([10.0, 100.0])).sum().backward()
        assert x.grad.numpy().tolist() == [[0.0, 10.0], [100.0, 0.0]]
    holds(top, "form array: gradients", "kernel cpu: gradients", "form array: second derivative")


def test_a_kernel_is_told_whether_it_is_recorded_and_what_is_wanted(declare):
    seen = []

    def scaled(x, y, z=None):
        return x * y if z is None else x * y * z

    operator = declare(scaled, "x[N], y[N], z?[N] -> out[N]")
    operator.form(lambda x, y, z: x * y if z is None else x * y * z)

    def forward(x, y, z, recording):
        seen.append(recording)
        return scaled(x, y, z), (x, y, z)

    def backward(saved, g, needs):
        x, y, z = saved
        seen.append(set(needs))
        rest = {"x": (y, z), "y": (x, z), "z": (x, y)}
        return [np.prod([g, *(f for f in rest[n] if f is not None)], axis=0) if n in needs else None for n in "xyz"]

    declare.kernel(operator, {"forward": forward, "backward": backward})
    x, y = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0])
    operator(x, y).sum().backward()
    with no_grad():
        operator(x, y)
    operator(y, y)
    assert seen == [True, {"x"}, False, False]
    holds(operator)


def test_an_output_gradient_that_never_arrived_is_none_for_a_kernel_and_zeros_for_a_vjp(declare):
    seen = []

    def both(x):
        return x * 2, x * 3

    operator = declare(both, "x[N] -> a[N], b[N]")
    operator.primitive(lambda x: (x * 2, x * 3))

    @operator.vjp
    def _(g_a, g_b):
        seen.append(g_b.numpy().tolist())
        return g_a * 2.0 + g_b * 3.0

    def backward(saved, g_a, g_b):
        seen.append(g_b)
        return (sum(g * f for g, f in ((g_a, 2), (g_b, 3)) if g is not None),)

    declare.kernel(operator, {"forward": lambda x: ((x * 2, x * 3), None), "backward": backward})
    for kernel, expected in (("cpu", None), ("none", [0.0])):
        with use(kernel=kernel):
            x = Tensor([1.0], requires_grad=True)
            operator(x)[0].sum().backward()
        assert seen.pop() == expected and x.grad.numpy().tolist() == [2.0]
    holds(operator)


def test_a_variadic_operator_has_a_kernel(declare):
    def total(xs):
        return sum(xs[1:], xs[0]) * 1

    operator = declare(total, "xs[*] -> y[*]", variadic=True)
    operator.form(lambda xs: ag.sum(ag.stack(xs), axis=0))
    seen = []

    def backward(saved, g, needs):
        seen.append(needs)
        return [g if wanted else None for wanted in needs]

    declare.kernel(operator, {"forward": lambda xs: (total(xs), None), "backward": backward})
    operator.inputs(lambda draw: (([*(draw.floats(*shape) for _ in range(draw.integer(1, 3)))],), {})
                    if (shape := draw.shape()) is not None else None)
    a, b = Tensor([1.0], requires_grad=True), Tensor([2.0])
    operator([a, b, a]).sum().backward()
    assert seen == [[True, False, True]] and a.grad.numpy().tolist() == [2.0]
    holds(operator, "kernel cpu: gradients")


def test_an_operator_may_have_two_primitives(declare):
    def square(x):
        return x * x

    operator = declare(square)

    @operator.primitive
    def product(x):
        return x * x

    @operator.vjp
    def _(g, x):
        return g * x * 2.0

    @operator.primitive
    def power(x):
        return x**2

    @operator.vjp
    def _(g, x):
        return 2.0 * x * g

    assert list(operator.forms) == ["product", "power"]
    holds(operator, "form product: gradients", "form power: second derivative")
    with pytest.raises(AutogradError, match=r"square: form power is declared twice"):
        operator.primitive(power)


def test_a_constant_is_an_array_of_its_own_dtype_without_gradient(declare):
    def turned(x, angles):
        return x * np.cos(angles).astype(x.dtype)

    operator = declare(turned, "x[N], angles:const[N] -> y[N]")
    operator.primitive(lambda x, angles: x * np.cos(angles).astype(x.dtype))
    operator.vjp(lambda g, angles: g * Tensor(np.cos(angles).astype(g.dtype)))
    x, angles = Tensor(np.ones(2, np.float32), requires_grad=True), np.array([0.0, 1e6])
    y = operator(x, angles)
    assert y.dtype == np.float32
    assert_close(y, np.cos(angles).astype(np.float32))
    angles[:] = 0  # what backward needs was copied
    y.sum().backward()
    assert_close(x.grad, np.cos([0.0, 1e6]).astype(np.float32))
    holds(operator, "form array: gradients")
    with pytest.raises(DtypeError, match=r"turned: angles takes a plain const array, got a Tensor"):
        operator(x, x)
    with pytest.raises(DtypeError, match=r"turned: angles has dtype int64, allowed: float32, float64"):
        operator(x, np.zeros(2, int))


# -- candidates --------------------------------------------------------------------------------------------------------
@pytest.fixture
def running(declare):
    """A running sum with a chunked form, two kernels and one for a single position."""
    def running(x, state=None):
        total = (np.zeros(x.shape[0], x.dtype) if state is None else state).copy()
        y = np.empty_like(x)
        for t in range(x.shape[1]):
            total = total + x[:, t]
            y[:, t] = total
        return y, total

    operator = declare(running, "x[B T], state?[B] -> y[B T], state[B]", laws=[causal("x"), streams()])

    @operator.form(tuning={"chunk_size": 4})
    def chunkwise(x, state, chunk_size):
        operator.chunk_sizes.append(chunk_size)
        start = Tensor(np.zeros(x.shape[0], x.dtype)) if state is None else state
        parts = [x[:, :0]]
        for t in range(0, x.shape[1], chunk_size):
            part = ag.cumsum(x[:, t : t + chunk_size], axis=1) + start.reshape(-1, 1)
            parts.append(part)
            start = part[:, -1]
        return ag.concat(parts, axis=1), start * 1.0

    def forward(x, state):
        operator.calls.append(x.shape)
        return running(x, state), state is not None

    def backward(saved, g_y, g_state):
        gx = 0 if g_y is None else np.cumsum(g_y[:, ::-1], axis=1)[:, ::-1]
        gx = gx + (0 if g_state is None else g_state[:, None])
        gstate = (0 if g_y is None else g_y.sum(axis=1)) + (0 if g_state is None else g_state)
        return np.broadcast_to(gx, operator.shape).copy(), gstate if saved else None

    def remember(x, state):
        operator.shape = x.shape
        return forward(x, state)

    declare.kernel(operator, {"forward": lambda x, state: (running(x, state), None)}, name="step", sizes={"T": 1})
    declare.kernel(operator, {"forward": remember, "backward": backward,
                              "defers": lambda x: "more than 4 positions" if x.shape[1] > 4 else None}, name="short")
    declare.kernel(operator, {"forward": remember, "backward": backward})
    operator.calls, operator.chunk_sizes = [], []
    return operator


def lines(text):
    return [line.strip() for line in text.splitlines()][1:]


def test_kernels_of_one_device_are_candidates_in_order(running):
    assert list(running.kernels) == ["cpu step", "cpu short", "cpu"]
    for length, expected in ((1, "cpu step"), (3, "cpu short"), (9, "cpu")):
        assert f"kernel {expected}: chosen: the fused kernel of this device" in lines(explain(running, np.ones((2, length))))
    x = Tensor(np.ones((2, 1)), requires_grad=True)
    assert "kernel cpu step: not chosen: it has no backward, and a gradient is wanted" in lines(explain(running, x))
    assert "kernel cpu short: not chosen: more than 4 positions" in lines(explain(running, np.ones((2, 9))))
    assert "kernel cpu: not chosen: kernel cpu short comes first" in lines(explain(running, np.ones((2, 3))))
    assert "kernel cpu step: not chosen: needs T = 1, got 3" in lines(explain(running, np.ones((2, 3))))


def test_every_candidate_can_be_forced(running):
    long, short = np.ones((2, 9)), np.ones((2, 1))
    for kernel in running.kernels.values():
        with use(running, kernel=kernel.name):
            assert f"{kernel}: chosen: forced by use()" in lines(explain(running, short))
    with use(running, kernel="cpu short"):  # what it would rather leave to another, it does when it is asked to
        assert_close(running(long)[0], np.cumsum(long, axis=1))
    with use(running, kernel="cpu step"), pytest.raises(KernelError, match="forced kernel 'cpu step' cannot run: needs T = 1"):
        running(long)
    with use(kernel="none"):
        assert "form chunkwise: chosen: forced by use()" in lines(explain(running, short))


def test_a_kernel_of_one_position_is_proven_like_any_other(running):
    holds(running, "kernel cpu step: values", "kernel cpu step: law: causal in x over T", "kernel cpu short: gradients",
          "form chunkwise: law: streams over T")
    assert {1, 2, 3, 4} == set(running.chunk_sizes)  # tuning numbers are drawn


def test_tuning_numbers_belong_to_a_route_and_are_checked(running):
    x = np.ones((2, 7))
    with use(running, form="chunkwise", chunk_size=2):
        assert_close(running(x)[0], np.cumsum(x, axis=1))
    assert set(running.chunk_sizes) == {2}
    for wrong in (0, -1, 2.5, True, "4"):
        with pytest.raises(KernelError, match=r"running, form chunkwise: chunk_size must be an integer of at least 1, got "):
            use(running, form="chunkwise", chunk_size=wrong)
    with pytest.raises(KernelError, match=r"running, form chunkwise: no tuning number 'chunk', it has chunk_size"):
        use(running, form="chunkwise", chunk=2)
    with pytest.raises(KernelError, match=r"running, kernel cpu: no tuning number 'chunk_size', it has none"):
        use(running, kernel="cpu", chunk_size=2)
    with pytest.raises(TypeError, match="running: no argument 'chunk_size'"):
        running(x, chunk_size=2)


def test_forms_run_where_the_compiler_is_switched_off():
    code = "import numpy, autograd; x = numpy.ones((1, 2)); print(autograd.explain('layer_norm', x)); autograd.layer_norm(x)"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(ag.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "kernel cpu: not chosen: Numba's compiler is switched off by NUMBA_DISABLE_JIT" in found.stdout
    assert "form composed: chosen" in found.stdout


# -- declarations ------------------------------------------------------------------------------------------------------
def plain(x, *, scale=1.0):
    return x * scale


@pytest.mark.parametrize(("declaration", "error", "words"), [
    (lambda op: op.kernel("tpu"), KernelError, "plain: no kernels for the device 'tpu', allowed: cpu, cuda"),
    (lambda op: (op.kernel("cpu"), op.kernel("cpu")), AutogradError, "plain: kernel cpu is declared twice"),
    (lambda op: op.form(lambda x, scale=1.0: x), AutogradError,
     "plain, form <lambda>: 'scale' has a default; defaults stand in the definition alone"),
    (lambda op: op.form(lambda x, sclae: x), AutogradError,
     "plain, form <lambda>: nothing is called 'sclae'; did you mean 'scale'?"),
    (lambda op: op.validate(lambda y: None), AutogradError, "plain, validate: nothing is called 'y'"),
    (lambda op: op.form(lambda **others: 0), AutogradError, "plain, form <lambda>: **others is not allowed"),
    (lambda op: ag.op(plain), AutogradError, "op: the signature comes first"),
    (lambda op: Op(lambda x: x, "x[...] -> y[...]", laws=[plain]), AutogradError, "<lambda>: laws is a list of laws"),
    (lambda op: op.form(tuning={"scale": 3})(lambda x: x), AutogradError,
     "plain, form <lambda>: the tuning number 'scale' has the name of an argument"),
    (lambda op: op.form(tuning={"chunk_size": 0})(lambda x: x), KernelError,
     "plain, form <lambda>: chunk_size must be an integer of at least 1, got 0"),
])
def test_a_wrong_declaration_is_refused(declare, declaration, error, words):
    operator = declare(plain)
    with pytest.raises(error) as caught:
        declaration(operator)
    assert words in str(caught.value)


@pytest.mark.parametrize(("functions", "words"), [
    ({}, "plain, kernel cpu: the module kernel_1_of_plain has no function forward"),
    ({"forward": lambda x, size: (x, None)}, "plain, kernel cpu, forward: nothing is called 'size'"),
    ({"forward": lambda x: (x, None), "backward": lambda saved, slope: None},
     "plain, kernel cpu, backward: nothing is called 'slope'; allowed: saved, needs, g; it sees inputs and parameters through"),
    ({"forward": lambda x: x}, "plain, kernel cpu, forward: returned numpy.ndarray; it returns (outputs, saved)"),
    ({"forward": lambda x: (x, x, x)}, "plain, kernel cpu, forward: returned 3 values; it returns (outputs, saved)"),
    ({"forward": lambda x: (x, None), "supports": lambda x: True},
     "plain, kernel cpu, supports: returned True, it returns a reason or None"),
    ({"forward": lambda x: (x, None), "backward": lambda saved, g: g},
     "plain, kernel cpu, backward: returned numpy.ndarray; it returns a tuple of one gradient for each of x"),
    ({"forward": lambda x: (x, None), "backward": lambda saved, g: (g, g)},
     "plain, kernel cpu: its gradient has 2 values, one is wanted for each of x"),
], ids=["no forward", "a wrong name", "a wrong name in backward", "no saved", "three values", "supports", "no tuple",
        "two gradients"])
def test_a_wrong_kernel_is_named_at_its_first_use(declare, functions, words):
    operator = declare(plain)
    operator.form(lambda x, scale: x * scale)
    declare.kernel(operator, functions)
    with pytest.raises(AutogradError) as caught:
        with use(operator, kernel="cpu"):
            operator(Tensor([1.0]))
        operator(Tensor([1.0], requires_grad=True)).sum().backward()
    assert words in str(caught.value)


@pytest.mark.parametrize(("result", "error", "words"), [
    (lambda x: x[:1], ShapeError, "the output of shaped: y[N] has N = 1, but N is 2"),
    (lambda x: x[:, None], ShapeError, "the output of shaped: y[N] has 1 axes"),
    (lambda x: (x, x), AutogradError, "shaped: 2 outputs were computed, the signature declares y"),
    (lambda x: x / 0, NonFiniteError, "the output of shaped")], ids=["size", "axes", "number", "value"])
def test_check_mode_compares_outputs_with_the_signature(declare, result, error, words):
    def shaped(x):
        return x

    operator = declare(shaped, "x[N] -> y[N]")
    operator.primitive(result)
    with np.errstate(all="ignore"), check_mode(), pytest.raises(error) as caught:
        operator(np.ones(2))
    assert words in str(caught.value)


def test_an_operator_that_is_a_method(declare):
    def thrice(x, *, offset=0.0):
        return 3 * x + offset

    operator = declare(thrice, method=True)
    try:
        operator.form(lambda x, offset: x * 3.0 + offset)
        assert Tensor([2.0]).thrice(offset=1.0).item() == 7.0
        assert Tensor.thrice.__name__ == "thrice"
    finally:
        del Tensor.thrice


# -- switches in other threads -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("switch", [no_grad, check_mode, lambda: use("exp", form="array"), lambda: use(kernel="none")],
                         ids=["no_grad", "check_mode", "use", "use none"])
def test_a_switch_holds_in_a_pool_that_works_in_copies_of_the_context(switch):
    with ThreadPoolExecutor(2) as pool:
        with switch():
            inside = switches()
            assert [f.result() for f in [pool.submit(copy_context().run, switches) for _ in range(4)]] == [inside] * 4
        assert pool.submit(switches).result() == switches() != inside


# -- faults that the core had ------------------------------------------------------------------------------------------
def test_two_backwards_over_one_trunk_never_both_succeed():
    """Without ``retain``, whichever comes second finds it released, however they interleave."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(100):
                trunk = x = Tensor([0.5, 0.25], requires_grad=True)
                for _ in range(10):
                    trunk = ag.tanh(trunk)
                heads = [(trunk * 2.0).sum(), (trunk * 3.0).sum()]
                results = [pool.submit(head.backward, sink=lambda leaf, gradient: None) for head in heads]
                errors = [r.exception() for r in results]
                assert sum(e is None for e in errors) <= 1 and all(e is None or type(e) is GraphError for e in errors), errors
                assert x.grad is None
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("function", [lambda x: x.reshape(-1), lambda x: x[:1], lambda x: x.T, lambda x: ag.flip(x, 0)],
                         ids=["reshape", "slice", "T", "flip"])
def test_a_view_shares_the_version_of_its_input(function):
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    y = function(x)
    loss = (y * y).sum()
    y.detach()
    x.detach().assign_(np.zeros((2, 3)))
    with pytest.raises(GraphError, match="updated in place"):
        loss.backward()


def test_a_copy_made_by_an_operator_that_may_give_views_has_a_version_of_its_own():
    x = Tensor(np.asfortranarray(np.ones((2, 3))), requires_grad=True)
    y = x.reshape(-1)  # Fortran order: it has to be copied
    assert not np.shares_memory(y.data, x.data)
    loss = (y * y).sum()
    x.detach().assign_(np.zeros((2, 3)))
    loss.backward()
    assert x.grad.numpy().tolist() == [[2.0] * 3] * 2


# -- what verify must not overlook -------------------------------------------------------------------------------------
def test_a_form_without_tensors_is_refused(declare):
    def bare(x):
        return np.exp(x)

    operator = declare(bare)
    operator.form(lambda x: np.exp(x.data))
    with pytest.raises(AutogradError, match="bare, form <lambda>: y is a Tensor, got ndarray; several outputs are a tuple"):
        operator(np.ones(2))
    assert not verify(operator).ok


def test_verify_says_what_it_did_not_prove(declare):
    def half(x):
        return x / 2

    operator = declare(half)
    assert not verify(operator).ok and "half has no form" in str(verify(operator))
    operator.primitive(lambda x: x / 2)
    assert "form array has no gradient" in str(verify(operator))
    operator.vjp(lambda g: g / 2.0)
    declare.kernel(operator, {"forward": lambda x: (x / 2, None), "supports": lambda x: "never"})
    report = verify(operator)
    assert not report.ok and "kernel cpu has no gradient" in str(report)
    assert {row.verdict for row in report.rows if row.route == "kernel cpu"} == {"not run"}


@pytest.mark.parametrize(("change", "route", "check"), [
    ({"forward": lambda x: ((x / 2).astype(np.float32), None)}, "kernel cpu", "values"),
    ({"forward": lambda x: (x / 2 + 1e-3, None)}, "kernel cpu", "values"),
    ({"forward": lambda x: (np.divide(x, 2, out=x), None)}, "kernel cpu", "values"),
    ({"backward": lambda saved, g: (g / 2.001,)}, "kernel cpu", "gradients"),
    ({"backward": lambda saved, g: (None,)}, "kernel cpu", "gradients")],
    ids=["a dtype", "a value", "a written input", "a gradient", "no gradient"])
def test_verify_notices(declare, change, route, check):
    def half(x):
        return x / 2

    operator = declare(half)
    operator.form(lambda x: x * 0.5)
    right = {"forward": lambda x: (x / 2, None), "backward": lambda saved, g: (g / 2,)}
    declare.kernel(operator, {**right, **change})
    report = verify(operator)
    assert not report.ok
    assert any(row.failure and (row.route, row.check) == (route, check) for row in report.rows), str(report)
    assert all(row.route == route for row in report.rows if row.failure)


def test_verify_notices_a_wrong_law_and_a_wrong_definition(declare):
    def squares(x):
        return (x * x).astype(np.float64)

    operator = declare(squares, laws=[linear_in("x"), identity("it is nothing", lambda case, draw: not case().y.any())])
    operator.form(lambda x: x * x)
    failed = {(row.route, row.check) for row in verify(operator).rows if row.failure}
    assert {("definition", "outputs"), ("form <lambda>", "law: linear in x"), ("form <lambda>", "law: it is nothing")} <= failed
