"""What every operator must satisfy. The registry is the list of tests: declaring an operator adds its own."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import autograd
import minitv
from autograd import DtypeError, GraphError, KernelError, ShapeError, Tensor, explain, gradients, use
from autograd.draw import LAYOUTS, Draw, draw_inputs
from autograd.verify import (
    check_adjoint,
    check_derivative,
    check_gradients,
    check_law,
    check_repeatable,
    check_values,
    compute,
    differentiable,
    differentiate,
    draw_call,
    draw_cotangents,
    flat,
    floats,
    forced,
    forms,
    is_linear,
    kernels,
    listed,
    numbers,
    parsed,
    refuses,
    routes,
    split,
    substitute,
    unflat,
)
from tests.autograd.operator_checks import each, specimen, tried
from tests.conftest import HypothesisDraw, examples, full, operators

OPERATORS = operators()
DIFFERENTIABLE = [op for op in OPERATORS if op.differentiable]


def with_gradients(op):
    """The routes that have a gradient."""
    return [route for route in forms(op) + kernels(op) if differentiable(op, route)]


def on_host(op):
    """The routes that run on this machine's processor."""
    return [route for route in forms(op) + kernels(op) if parsed(route)[2] == "host"]


def drawn(data, op, route, layouts=LAYOUTS):
    """Inputs of a drawn dtype that the route takes, with sizes from 0, in drawn layouts."""
    draw = HypothesisDraw(data, data.draw(st.sampled_from(tried(op, route))), layouts)
    args, params = draw_call(op, route, draw)
    assume(not refuses(op, route, args, params))
    return draw, args, params


# -- values and gradients ----------------------------------------------------------------------------------------------
@each("op, route", ((op, route) for op in OPERATORS for route in routes(op)))
@given(st.data())
def test_values_are_those_of_the_definition(op, route, data):
    _, args, params = drawn(data, op, route)
    check_values(op, route, args, params)


@each("op, route", ((op, route) for op in DIFFERENTIABLE for route in with_gradients(op)))
@given(st.data())
def test_gradients_are_those_of_the_first_form(op, route, data):
    draw, args, params = drawn(data, op, route)
    check_gradients(op, route, args, params, draw_cotangents(op, args, params, draw))


@each("op, route", ((op, route) for op in DIFFERENTIABLE for route in with_gradients(op)
      if op.variadic or sum(a.kind == "float" for a in op.signature.inputs) > 1))
@examples(15)
@given(st.data())
def test_an_input_has_the_same_gradient_when_the_others_need_none(op, route, data):
    draw, args, params = drawn(data, op, route)
    chosen = draw.choice(floats(op, args))
    check_gradients(op, route, args, params, draw_cotangents(op, args, params, draw), targets=[chosen])


@each("op, route", ((op, route) for op in DIFFERENTIABLE for route in forms(op)), group=lambda op, route: op)
@given(st.data())
def test_gradients_are_derivatives(op, route, data):
    args, params = draw_call(op, route, HypothesisDraw(data))
    check_derivative(op, route, args, params)


@pytest.mark.full
@each("op, route", ((op, route) for op in DIFFERENTIABLE for route in forms(op)), group=lambda op, route: op)
@examples(10)
@given(st.data())
def test_second_derivatives_are_derivatives_of_gradients(op, route, data):
    args, params = draw_call(op, route, HypothesisDraw(data))
    check_derivative(op, route, args, params, order=2)


@each("op, route", ((op, route) for op in DIFFERENTIABLE if is_linear(op) for route in with_gradients(op)))
@examples(15)
@given(st.data())
def test_the_gradient_of_a_linear_operator_is_its_adjoint(op, route, data):
    draw, args, params = drawn(data, op, route)
    check_adjoint(op, route, args, params, draw)


def test_linear_operators_are_recognised():
    linear = {op.name for op in DIFFERENTIABLE if is_linear(op)}
    assert {"add", "sum", "concat", "getitem", "scatter_add", "rfft", "irfft", "cumsum"} <= linear
    assert not {"relu", "multiply", "max", "softmax", "linear", "pad"} & linear


@each("op, route, law", ((op, route, law) for op in OPERATORS for law in op.laws for route in routes(op)
      if law.holds_for(route)), group=lambda op, route, law: (op, law))
@given(st.data())
def test_laws(op, route, law, data):
    draw, args, params = drawn(data, op, route)
    check_law(op, law, route, args, params, draw)


@each("op, route", ((op, route) for op in OPERATORS for route in kernels(op)))
@examples(5)
@given(st.data())
def test_kernels_repeat_themselves_bit_for_bit(op, route, data):
    draw, args, params = drawn(data, op, route)
    check_repeatable(op, route, args, params, draw_cotangents(op, args, params, draw))


@each("op, route", ((op, route) for op in OPERATORS for route in on_host(op)), group=lambda op, route: op)
def test_underflow_is_no_error(op, route):
    """What is rounded to 0, in a call or in its gradients, does not raise where NumPy is told to."""
    for seed, power in itertools.product(range(6), (0.6, 1.05, -0.08)):  # products underflow; subnormal numbers; far apart
        dtype = tried(op, route)[seed % len(tried(op, route))]
        args, params = draw_call(op, route, Draw.seeded(seed, dtype))
        for i in floats(op, args):
            args = substitute(op, args, i, (flat(op, args)[i] * np.float64(np.finfo(dtype).tiny) ** power).astype(dtype))
        if refuses(op, route, args, params):
            continue
        params, tuning = split(op, params)
        with forced(op, route, tuning), np.errstate(under="raise"):
            values = flat(op, args)
            for i in floats(op, args):
                values[i] = Tensor.wrap(values[i], requires_grad=differentiable(op, route))
            outputs = [o for o in listed(op(*unflat(op, values), **params)) if isinstance(o, Tensor)]
            if differentiable(op, route):
                gradients(outputs, [values[i] for i in floats(op, args)], [Tensor.wrap(np.ones_like(o.data)) for o in outputs])


@each("op, route", ((op, route) for op in DIFFERENTIABLE for route in kernels(op) if differentiable(op, route)))
def test_a_fused_kernel_refuses_second_derivatives_and_names_the_forms(op, route):
    args, params = specimen(op, dtype=tried(op, route)[0])
    with forced(op, route) as put:
        values = [x if x is None else put(x) for x in flat(op, args)]
        values[0] = Tensor.wrap(values[0], requires_grad=True)
        outputs = listed(op(*unflat(op, values), **params))
        outputs = [o for o in outputs if isinstance(o, Tensor)]
        seeds = [Tensor.wrap(put(np.ones(o.shape, o.dtype))) for o in outputs]
        with pytest.raises(GraphError) as caught:
            gradients(outputs, [values[0]], seeds, create_graph=True)
    assert op.name in str(caught.value) and all(repr(form) in str(caught.value) for form in op.forms)


def _zero_dimensional(op):
    """Whether some float input has no axis, as a function of a draw."""
    return lambda args, params: any(flat(op, args)[i].ndim == 0 for i in floats(op, args))


@each("op", (op for op in DIFFERENTIABLE if any(_zero_dimensional(op)(*draw_inputs(op, Draw.seeded(s))) for s in range(100))))
def test_a_0d_input_has_a_0d_gradient(op):
    args, params = specimen(op, _zero_dimensional(op))
    for route in on_host(op):
        outputs = compute(op, route, args, params)
        found = differentiate(op, route, args, params, [np.ones_like(o) for o in outputs])
        assert all(type(g) is np.ndarray and g.shape == flat(op, args)[i].shape for i, g in found.items())
        assert all(type(o) is np.ndarray for o in outputs)


# -- declarations ------------------------------------------------------------------------------------------------------
@each("op", OPERATORS)
def test_is_declared_completely(op):
    assert op.__doc__ and op.__doc__.strip(), "no docstring"
    assert op.forms, "no form"
    assert op.draw is not None or all(a.dims != ("*",) for a in op.signature.inputs), "no inputs to draw"
    for form in op.forms.values():
        assert not form.primitive or form.vjp is not None or not op.differentiable, "a primitive without a vjp"
    body, doc = inspect.getsource(op.definition).splitlines(), (op.definition.__doc__ or "").splitlines()
    assert len(body) - len(doc) <= 25, f"the definition has {len(body) - len(doc)} lines: it is not stupid enough"


@each("op", OPERATORS)
def test_has_a_public_name(op):
    package = autograd if op.definition.__module__.startswith("autograd.") else minitv.ops
    assert getattr(package, op.name) is op


@each("op", OPERATORS)
def test_draws_are_legal_and_varied(op):
    sizes, absent, present = set(), set(), set()
    for seed in range(200):
        args, params = draw_inputs(op, Draw.seeded(seed))
        compute(op, forms(op)[0], args, params)
        sizes |= {flat(op, args)[i].size for i in numbers(op, args)}
        if not op.variadic:
            for argument, x in zip(op.signature.inputs, args, strict=True):
                (absent if x is None else present).add(argument.name)
        varied = {"empty": min(sizes) == 0, "large": max(sizes) > 3,
                  "present": op.variadic or present == {a.name for a in op.signature.inputs},
                  "absent": absent == {a.name for a in op.signature.inputs if a.optional}}
        if seed >= 20 and all(varied.values()) and not full():
            return
    assert all(varied.values()), varied


@each("op", (op for op in OPERATORS if op.kernels))
def test_declared_kernels_exist(op):
    for kernel in op.kernels.values():
        for name in ("forward", "backward", "supports"):
            kernel._get(name)  # reads the parameters: one that names nothing is an error
        assert kernel.differentiable or kernel.sizes or not op.differentiable


def test_every_kernel_file_belongs_to_an_operator():
    declared = {kernel.module for op in OPERATORS for kernel in op.kernels.values()}
    for package in (autograd, minitv):
        for path in sorted((Path(package.__file__).parent / "ops").glob("*/[cg]pu.py")):
            assert f"{package.__name__}.ops.{path.parent.name}.{path.stem}" in declared, path


@each("op", OPERATORS)
def test_explain_names_the_one_route_that_runs(op):
    args, params = specimen(op)
    for route in op.routes:
        if route.device == "cuda" or refuses(op, str(route), args, params):
            continue
        with use(op, **{route.kind: route.name}):
            lines = [line for line in explain(op, *args, **params).splitlines() if ": chosen" in line]
        assert len(lines) == 1 and lines[0].strip().startswith(f"{route}:"), lines


# -- refusals: each names the operator and the argument ----------------------------------------------------------------
def _refuses(error, op, args, params, *words):
    for route in on_host(op):
        with pytest.raises(error) as caught, forced(op, route):
            op(*args, **params)
        for word in (op.name, *words):
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@each("op", OPERATORS)
def test_refuses_other_dtypes(op):
    args, params = specimen(op)
    names = [a.name for a in op.signature.inputs]
    for i, x in enumerate(flat(op, args)):
        name = names[0 if op.variadic else i]
        if x is None:
            continue
        kind = {"f": "float", "i": "int", "b": "bool"}[x.dtype.kind]
        wrong = {"float": (np.int64, np.bool_, np.float16, np.complex128), "int": (np.float64, np.bool_),
                 "bool": (np.int64, np.float64)}[kind]
        for dtype in wrong:
            value = np.ones(x.shape, dtype)
            _refuses(DtypeError, op, substitute(op, args, i, value), params, name, value.dtype.name)
        if kind != "float":
            _refuses(DtypeError, op, substitute(op, args, i, Tensor(np.ones(x.shape))), params, name)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float16, np.complex128])
def test_a_tensor_of_another_dtype_is_refused(dtype):
    with pytest.raises(DtypeError, match=np.dtype(dtype).name):
        Tensor(np.ones(3, dtype))


@each("op", (op for op in OPERATORS if op.variadic or sum(a.kind == "float" for a in op.signature.inputs) > 1))
def test_refuses_mixed_dtypes(op):
    args, params = specimen(op, lambda args, params: len(floats(op, args)) > 1)
    for i in floats(op, args)[1:]:
        name = op.signature.inputs[0 if op.variadic else i].name
        mixed = substitute(op, args, i, flat(op, args)[i].astype(np.float32))
        tensors = mixed
        for j in floats(op, args):
            tensors = substitute(op, tensors, j, Tensor(flat(op, mixed)[j]))
        for wrong in (mixed, tensors):
            _refuses(DtypeError, op, wrong, params, name, "float32", "float64")


@each("op", (op for op in OPERATORS if any(len([d for d in a.dims if d not in ("...", "*")]) for a in op.signature.inputs)))
def test_refuses_a_wrong_number_of_axes(op):
    args, params = specimen(op, lambda args, params: all(x is not None and x.size for x in args))
    for i, argument in enumerate(op.signature.inputs):
        letters = [d for d in argument.dims if d not in ("...", "*")]
        if letters:
            _refuses(ShapeError, op, substitute(op, args, i, args[i].ravel()[0:1].reshape(())), params, argument.name)
        if letters and "..." not in argument.dims:
            _refuses(ShapeError, op, substitute(op, args, i, args[i][None]), params, argument.name)


def _shared_letters(op):
    """(flat position, axis from the end, letter) wherever an earlier argument, or a number, fixes that size."""
    seen, places = set(), []
    for i, argument in enumerate(op.signature.inputs):
        for axis, letter in enumerate(argument.dims, -len(argument.dims)):
            if letter not in ("...", "*") and (letter in seen or letter.isdigit()):
                places.append((i, axis, letter))
        seen |= set(argument.dims)
    return places


@each("op", (op for op in OPERATORS if _shared_letters(op)))
def test_refuses_a_size_that_disagrees_and_names_its_letter(op):
    args, params = specimen(op, lambda args, params: all(x is not None and x.size for x in args))
    for i, axis, letter in _shared_letters(op):
        longer = np.concatenate([args[i], np.take(args[i], [0], axis)], axis)
        _refuses(ShapeError, op, substitute(op, args, i, longer), params, op.signature.inputs[i].name, letter)


@each("op", (op for op in OPERATORS if sum("..." in a.dims for a in op.signature.inputs if a.kind == "float") > 1))
def test_refuses_leading_axes_that_do_not_broadcast(op):
    def inner(argument):
        return tuple(int(d) if d.isdigit() else 3 for d in argument.dims[1:])

    args = [np.ones((size, *inner(a)), {"float": float, "bool": bool, "int": int}[a.kind])
            for size, a in zip((2, 3, 3, 3), op.signature.inputs, strict=False)]
    _refuses(ShapeError, op, args, {}, "broadcast")


@each("op", OPERATORS)
def test_refuses_missing_and_unknown_arguments(op):
    args, params = specimen(op)
    name = op.signature.inputs[0].name
    if not op.variadic:
        _refuses(TypeError, op, (None, *args[1:]), params, name)
    _refuses(TypeError, op, args, {**params, "no_such_option": 1}, "no_such_option")
    with pytest.raises(KernelError, match="no_such_form"):
        use(op, form="no_such_form")
