"""Checks of an operator along every route, which tests call, and of which ``verify`` (proof.py) makes one table.

A *route* is one way to compute an operator: "definition", "form <name>" or "kernel <name>"; a place may follow: "kernel cuda on
card". What is compared with is computed in float64, from contiguous copies of the same values, so a result has to withstand
its own rounding only.

    check_values(my_operator, "kernel cpu", args, params)      AssertionError, if it is not what the definition gives
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np

from .check import adjoint_test, gradcheck
from .device import gpu, to_numpy
from .dispatch import use
from .draw import LAYOUTS, Draw, draw_inputs
from .laws import Case
from .metric import assert_close
from .op import Op
from .routes import Form, Kernel, Route
from .shapes import bind
from .state import no_grad
from .tensor import Tensor, gradients

DTYPES = (np.float32, np.float64)


# -- routes and places -------------------------------------------------------------------------------------------------
def forms(op: Op) -> list[str]:
    """The routes through forms."""
    return [str(form) for form in op.forms.values()]


def kernels(op: Op) -> list[str]:
    """The routes through kernels, each on every place that its device can be."""
    return [f"{kernel}{place}" for kernel in op.kernels.values()
            for place in ([""] if kernel.device == "cpu" else [f" on {p}" for p in PLACES if p != "host"])]


def routes(op: Op) -> list[str]:
    """All routes."""
    return ["definition", *forms(op), *kernels(op)]


def parsed(route: str) -> tuple[str, str, str]:
    """ "form" or "kernel", its name, and the place."""
    way, _, place = route.partition(" on ")
    kind, _, name = way.partition(" ")
    return kind, name, place or "host"


def declared(op: Op, route: str) -> Route:
    """The Form or the Kernel of a route."""
    kind, name, _ = parsed(route)
    return next(way for way in op.routes if way.kind == kind and way.name == name)


def dtypes(op: Op, route: str) -> tuple:
    """What a route takes."""
    return DTYPES[:1] if parsed(route)[2] != "host" else DTYPES


def differentiable(op: Op, route: str) -> bool:
    """Whether gradients can be computed along a route."""
    return op.differentiable and route != "definition" and declared(op, route).differentiable


@contextmanager
def _host():
    yield lambda array: array


@contextmanager
def _card():
    cupy = gpu()

    def put(array):
        if array.flags.c_contiguous or not array.size:
            return cupy.asarray(array)
        wide = cupy.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)  # strided if it was: a copy would not be
        wide[..., ::2] = cupy.asarray(array)
        return wide[..., ::2]

    yield put


PLACES: dict[str, Callable] = {"host": _host, "card": _card}  # contexts that yield what moves an array there


@contextmanager
def forced(op: Op, route: str, tuning: dict | None = None):
    """Run ``op`` along one route, and everything below it in forms; yields what moves an array to where the route runs.

    Of the tuning numbers, those that the route does not have are left out.
    """
    kind, name, place = parsed(route)
    tuning = {key: value for key, value in (tuning or {}).items() if key in declared(op, route).tuning}
    with PLACES[place]() as put, np.errstate(all="ignore"), use(kernel="none"), use(op, **{kind: name}, **tuning):
        yield put


def importable(op: Op) -> tuple[str, str]:
    """How a line of Python gets the operator: what it imports, and what it calls it. Without a module, it goes by its name."""
    module, name = op.definition.__module__, op.name
    known = getattr(sys.modules.get(module), name, None) is op and module != "__main__"
    return (f"from {module} import {name}; ", name) if known else ("", repr(name))


# -- arguments: a variadic operator's one argument is a list, the others are flat --------------------------------------
def flat(op: Op, args) -> list:
    return list(args[0]) if op.variadic else list(args)


def unflat(op: Op, values) -> tuple:
    return (list(values),) if op.variadic else tuple(values)


def arguments(op: Op, args) -> list:
    """The declared argument of each flat value."""
    return list(op.signature.inputs) * (len(args[0]) if op.variadic else 1)


def floats(op: Op, args) -> list[int]:
    """The flat positions of the arrays that are present and have a gradient."""
    pairs = zip(arguments(op, args), flat(op, args), strict=True)
    return [i for i, (a, x) in enumerate(pairs) if a.kind == "float" and x is not None]


def numbers(op: Op, args) -> list[int]:
    """The flat positions of the arrays that results are computed from: those with a gradient, or all that are present."""
    return floats(op, args) or [i for i, x in enumerate(flat(op, args)) if x is not None]


def wide(op: Op, args) -> tuple:
    """Contiguous copies, the floats in float64."""
    positions = floats(op, args)
    return unflat(op, [None if x is None else np.array(x, np.float64 if i in positions else x.dtype, order="C")
                       for i, x in enumerate(flat(op, args))])


def substitute(op: Op, args, position: int, value) -> tuple:
    """The arguments with one flat value replaced."""
    values = flat(op, args)
    values[position] = value
    return unflat(op, values)


def split(op: Op, params: dict) -> tuple[dict, dict]:
    """Static parameters, and tuning numbers of a route."""
    return {k: v for k, v in params.items() if k in op.params}, {k: v for k, v in params.items() if k not in op.params}


def draw_call(op: Op, route: str, draw: Draw):
    """Inputs and parameters of a call that a route takes: with the sizes of its kernel, and tuning numbers among the latter."""
    args, params = draw_inputs(op, draw)
    if route == "definition":
        return args, params
    way = declared(op, route)
    for letter, size in getattr(way, "sizes", {}).items():
        axes = [a.dims.index(letter) - len(a.dims) if letter in a.dims else None for a in op.signature.inputs]
        if any(at is not None and x is not None and not x.shape[at] for at, x in zip(axes, args, strict=True)):
            with draw.filled():  # there is nothing to repeat
                args, params = draw_inputs(op, draw)
        args = tuple(x if x is None or at is None else np.take(x, [0] * size, axis=at)
                     for at, x in zip(axes, args, strict=True))
    return args, {**params, **{name: draw.choice((1, 2, 3, default)) for name, default in way.tuning.items()}}


def refuses(op: Op, route: str, args, params) -> str | None:
    """Why a kernel does not take a call, or None."""
    way = None if route == "definition" else declared(op, route)
    if not isinstance(way, Kernel):
        return None
    fixed, _ = split(op, params)
    return way.unsupported(flat(op, args), list({**op.params, **fixed}.values()), False)


# -- computing ---------------------------------------------------------------------------------------------------------
def listed(result) -> list:
    return list(result) if isinstance(result, tuple) else [result]


def compute(op: Op, route: str, args, params) -> tuple:
    """The outputs along a route as arrays."""
    params, tuning = split(op, params)
    if route == "definition":
        with np.errstate(all="ignore"):
            return tuple(np.asarray(o) for o in listed(op.definition(*args, **params)))
    with forced(op, route, tuning) as put, no_grad():
        values = [None if x is None else put(x) for x in flat(op, args)]
        for i in floats(op, args):
            values[i] = Tensor.wrap(values[i])  # Tensor(x) would copy, and lose the layout
        result = op(*unflat(op, values), **params)
        return tuple(to_numpy(o) for o in listed(result))


def differentiate(op: Op, route: str, args, params, cotangents, targets=None) -> dict[int, np.ndarray]:
    """The gradient of <cotangents, outputs> for each float input, or for ``targets`` when only those need one."""
    targets = floats(op, args) if targets is None else targets
    params, tuning = split(op, params)
    with forced(op, route, tuning) as put:
        values = [None if x is None else put(x) for x in flat(op, args)]
        for i in floats(op, args):
            values[i] = Tensor.wrap(values[i], requires_grad=i in targets)
        outputs = listed(op(*unflat(op, values), **params))
        pairs = [(o, Tensor.wrap(put(c.astype(o.dtype, copy=False)))) for c, o in zip(cotangents, outputs, strict=True)
                 if isinstance(o, Tensor) and c is not None]
        grads = gradients([o for o, _ in pairs], [values[i] for i in targets], [c for _, c in pairs])
        return {i: to_numpy(g) for i, g in zip(targets, grads, strict=True)}


def draw_cotangents(op: Op, args, params, draw) -> list[np.ndarray | None]:
    """One for each output, None for those without a gradient."""
    outputs = compute(op, "definition", args, split(op, params)[0])
    return [draw.floats(*o.shape) if o.dtype.kind == "f" else None for o in outputs]


# -- checks ------------------------------------------------------------------------------------------------------------
def terms(op: Op, *arrays) -> float:
    """The tolerance in assert_close's unit: its formula's own cancellation, and the length of the longest sum."""
    return op.tolerance**2 * max((a.size for a in arrays if a is not None), default=1)


def _largest(arrays) -> float:
    return max((float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0)) for a in arrays if a is not None), default=0.0)


def beside_its_size(gradient, x, cotangents, outputs) -> np.ndarray:
    """A gradient of x and, behind it, the size that its units give it: cotangent times output over input.

    What is left of a derivative after cancellation may be tiny (a norm's, of a row of one value): its rounding is relative to
    that size, which joins the comparison.
    """
    size = _largest(cotangents) * max(1.0, _largest(outputs)) / max(1.0, _largest([x]))
    return np.append(gradient, x.dtype.type(min(size, np.finfo(x.dtype).max)).astype(gradient.dtype))


@contextmanager
def unwritten(op: Op, args):
    """The inputs are the same bytes afterwards."""
    before = [None if x is None else x.tobytes() for x in flat(op, args)]
    yield
    for argument, x, old in zip(arguments(op, args), flat(op, args), before, strict=True):
        assert x is None or x.tobytes() == old, f"{op.name} wrote to its input {argument.name}"


def check_outputs(op: Op, route: str, args, outputs) -> None:
    """Shapes as the signature's letters say, the dtype of the inputs, and memory of their own."""
    present = [x for x in flat(op, args) if x is not None]
    dtype = next((x.dtype for x in present if x.dtype.kind == "f"), None)
    bound: dict = {}
    if not op.variadic:
        for argument, x in zip(op.signature.inputs, args, strict=True):
            if x is not None and argument.dims != ("*",):
                bind(op.name, argument, x.shape, bound)
    declared_outputs = op.signature.outputs
    if len(declared_outputs) == 1 != len(outputs):
        declared_outputs = declared_outputs * len(outputs)
    for argument, output in zip(declared_outputs, outputs, strict=True):
        if argument.dims != ("*",):
            lead = bound.get("...")
            bind(op.name, argument, output.shape, bound)
            axes = output.shape[: output.ndim - len(argument.dims) + 1]
            fits = argument.dims[:1] != ("...",) or axes == lead
            assert fits, f"{op.name}: {argument.name} has leading axes {axes}, not {lead}"
        if argument.kind == "float":
            assert output.dtype == dtype, f"{op.name} made {output.dtype} of {dtype}"
        else:
            right = output.dtype == {"int": np.intp, "bool": np.bool_}[argument.kind]
            assert right, f"{op.name} made {output.dtype} of its {argument.kind} output {argument.name}"
        form = declared(op, route) if route != "definition" else None
        composed = isinstance(form, Form) and not form.primitive  # its parts declare what they share
        shared = any(np.shares_memory(output, x) for x in present)
        assert op.view or composed or not shared, f"{op.name} returns its input's memory"


def check_definition(op: Op, args, params) -> None:
    """The definition writes to no input, and its outputs are what the signature says."""
    with unwritten(op, args):
        outputs = compute(op, "definition", args, params)
    check_outputs(op, "definition", args, outputs)


def check_values(op: Op, route: str, args, params, reference: str = "definition") -> None:
    """The route gives the definition's values, or those of another route."""
    with unwritten(op, args):
        # First the route, then the reference: memory that the route forgets to fill must not hold the right answer.
        outputs = compute(op, route, args, params)
    check_outputs(op, route, args, outputs)
    for output, expected in zip(outputs, compute(op, reference, wide(op, args), split(op, params)[0]), strict=True):
        assert_close(output, expected, f"{op.name}, {route}, values", terms=terms(op, *flat(op, args)))


def check_gradients(op: Op, route: str, args, params, cotangents, targets=None, reference: str = "definition") -> None:
    """The gradients of all inputs, or of ``targets``, are those of the first form: dtype, shape and values."""
    with unwritten(op, args):
        grads = differentiate(op, route, args, params, cotangents, targets)
    cotangents = [None if c is None else c.astype(np.float64) for c in cotangents]
    fixed, _ = split(op, params)
    expected = differentiate(op, forms(op)[0], wide(op, args), fixed, cotangents)
    outputs = [o for o in compute(op, reference, wide(op, args), fixed) if o.dtype.kind == "f"]
    for i, gradient in grads.items():
        x, name = flat(op, args)[i], arguments(op, args)[i].name
        assert gradient.shape == x.shape, f"{op.name}: the gradient of {name} {x.shape} has shape {gradient.shape}"
        assert gradient.dtype == x.dtype, f"{op.name}: the gradient of {name} {x.dtype} has dtype {gradient.dtype}"
        sized, right = (beside_its_size(g, x, cotangents, outputs) for g in (gradient, expected[i]))
        assert_close(sized, right, f"{op.name}, {route}, gradient of {name}",
                     terms=terms(op, *flat(op, args), *cotangents))


def check_repeatable(op: Op, route: str, args, params, cotangents) -> None:
    """The same call gives the same bits."""
    def bits():
        grads = differentiate(op, route, args, params, cotangents).values() if differentiable(op, route) else ()
        return [a.tobytes() for a in (*compute(op, route, args, params), *grads)]

    assert bits() == bits(), f"{op.name}, {route}: two calls differ"


def check_derivative(op: Op, route: str, args, params, order: int = 1) -> None:
    """Every gradient of a form is its derivative, by complex step or differences."""
    positions = floats(op, args)
    params, tuning = split(op, params)

    def function(*tensors):
        values = flat(op, args)
        for i, tensor in zip(positions, tensors, strict=True):
            values[i] = tensor
        return tuple(o for o in listed(op(*unflat(op, values), **params)) if isinstance(o, Tensor))

    with forced(op, route, tuning):
        gradcheck(function, *(flat(op, args)[i] for i in positions), order=order, analytic=op.analytic)


class _Refused(Exception):
    """A law asks for a call that the kernel does not take."""


def check_law(op: Op, law, route: str, args, params, draw) -> None:
    """The law holds along the route, in what its kernel takes."""
    def computed(args, params):
        if refuses(op, route, args, params):
            raise _Refused
        return compute(op, route, args, params)

    with suppress(_Refused):
        verdict = law.check(Case(op, args, params, computed), draw)
        assert verdict is None or bool(verdict), f"{op.name}: {law}: it does not hold"


def is_linear(op: Op) -> bool:
    """Whether f(2x + y) = 2 f(x) + f(y), together over all float inputs, on seeded draws."""
    def holds(seed):
        args, params = draw_inputs(op, Draw.seeded(seed))
        positions, generator = floats(op, args), np.random.default_rng(seed)
        others = [generator.standard_normal(x.shape) if i in positions else x for i, x in enumerate(flat(op, args))]
        mixed = [2 * x + y if i in positions else x
                 for i, (x, y) in enumerate(zip(flat(op, args), others, strict=True))]
        try:
            parts = [compute(op, "definition", unflat(op, v), params) for v in (flat(op, args), others, mixed)]
        except (TypeError, ValueError, ArithmeticError):  # a linear operator takes every number
            return False
        return all(np.allclose(2 * a + b, c, rtol=1e-9, atol=1e-9) for a, b, c in zip(*parts, strict=True))

    return op.differentiable and all(a.kind == "float" for a in op.signature.outputs) and all(holds(s) for s in range(12))


def check_adjoint(op: Op, route: str, args, params, draw) -> None:
    """<f(x), y> = <x, gradient of f at y> for a linear operator, all inputs and outputs taken as one vector each."""
    positions, outputs = floats(op, args), compute(op, "definition", args, split(op, params)[0])

    def parted(vector, arrays):
        ends = np.cumsum([a.size for a in arrays])
        return [part.reshape(a.shape) for part, a in zip(np.split(vector, ends[:-1]), arrays, strict=True)]

    def join(arrays):
        return np.concatenate([np.ravel(a) for a in arrays])

    def at(vector):
        values = flat(op, args)
        for i, part in zip(positions, parted(vector, [values[i] for i in positions]), strict=True):
            values[i] = part
        return unflat(op, values)

    x = join(flat(op, args)[i] for i in positions)
    y = join(draw.floats(*o.shape) for o in outputs)
    adjoint_test(lambda v: join(compute(op, route, at(v), params)),
                 lambda v: join(differentiate(op, route, at(x), params, parted(v, outputs)).values()), x, y)


# -- all checks of a route ---------------------------------------------------------------------------------------------
LAW, IDENTITY = "law: ", "identity: "  # before their names


@dataclass
class Attempt:
    """A check along a route: ``check(args, params, draw)`` of a call that is drawn."""

    op: Op
    route: str
    name: str
    check: Callable
    exact: bool = False  # it wants float64 and contiguous arrays
    of_any_size: bool = False  # it is meant for large arrays, too

    def layouts(self) -> tuple[str, ...]:
        """What it draws arrays in."""
        return ("c",) if self.exact else LAYOUTS

    def call(self, draw: Draw):
        """Arguments and parameters that the route takes; None where it does not take those that were drawn."""
        with draw.filled() if draw.sizes else nullcontext():
            args, params = draw_call(self.op, self.route, draw)
        return None if refuses(self.op, self.route, args, params) else (args, params)

    def failure(self, args, params, draw) -> Exception | None:
        """What is wrong with a call."""
        try:
            self.check(args, params, draw)
        except Exception as error:  # of whatever kind: a wrong operator fails in many ways
            return error
        return None


def checks(op: Op, route: str, linear: bool = False) -> dict[str, Attempt]:
    """The checks of a route by name."""
    found: dict[str, Attempt] = {}

    def add(name: str, check: Callable, **options: bool) -> None:
        found[name] = Attempt(op, route, name, check, **options)

    if route == "definition":
        add("outputs", lambda a, p, d: check_definition(op, a, p))
    else:
        add("values", lambda a, p, d: check_values(op, route, a, p), of_any_size=True)
    if differentiable(op, route):
        add("gradients", lambda a, p, d: check_gradients(op, route, a, p, draw_cotangents(op, a, p, d)), of_any_size=True)
        if op.variadic or len(op.floats) > 1:
            add("gradients of one input alone", lambda a, p, d: check_gradients(
                op, route, a, p, draw_cotangents(op, a, p, d), targets=[d.choice(floats(op, a))]))
        if route in forms(op):
            add("derivative", lambda a, p, d: check_derivative(op, route, a, p), exact=True)
            add("second derivative", lambda a, p, d: check_derivative(op, route, a, p, order=2), exact=True)
        if linear:
            add("adjoint", lambda a, p, d: check_adjoint(op, route, a, p, d))
    for law in filter(lambda law: law.holds_for(route), op.laws):
        add(f"{IDENTITY if law.edge else LAW}{law}", lambda a, p, d, law=law: check_law(op, law, route, a, p, d))
    if route in kernels(op):
        add("same bits twice", lambda a, p, d: check_repeatable(op, route, a, p, draw_cotangents(op, a, p, d)),
            of_any_size=True)
    return found
