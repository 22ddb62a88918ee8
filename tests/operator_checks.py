"""What must hold for every operator, as functions that raise AssertionError.

test_operators.py calls them for all operators, test_the_tests.py shows that each of them notices planted errors.
A *route* is one way to compute an operator: "definition", "form <name>" or "kernel <device>", on NumPy arrays; with
" on emulator" behind it, on arrays of a double of CuPy whose kernels run in an emulator, and with " on card", on a GPU.
What is compared with is computed in float64, from contiguous copies of the same values, so a result has to withstand its
own rounding only.
"""

from __future__ import annotations

from contextlib import contextmanager

import emulator
import fake_cupy
import numpy as np
import pytest

from autograd import Op, Tensor, adjoint_test, assert_close, gradcheck, gradients, no_grad, to_numpy, use
from autograd.device import gpu
from autograd.draw import LAYOUTS, Draw, draw_inputs
from autograd.laws import Case
from autograd.routes import Form
from autograd.shapes import bind

DTYPES = (np.float32, np.float64)


def forms(op: Op) -> list[str]:
    return [f"form {name}" for name in op.forms]


def kernels(op: Op) -> list[str]:
    return [f"kernel {name}{place}" for name in op.kernels
            for place in ([""] if name == "cpu" else [" on emulator", " on card"])]


def routes(op: Op) -> list[str]:
    return ["definition", *forms(op), *kernels(op)]


def parsed(route: str) -> tuple[str, str, str]:
    """ "form" or "kernel", its name, and "host", "emulator" or "card"."""
    way, _, place = route.partition(" on ")
    kind, _, name = way.partition(" ")
    return kind, name, place or "host"


def marks(route: str) -> list:
    """Of a test that goes along a route: when to leave it out."""
    return {"host": [], "card": [pytest.mark.gpu],
            "emulator": [pytest.mark.skipif(bool(emulator.missing), reason=str(emulator.missing))]}[parsed(route)[2]]


def dtypes(route: str) -> tuple:
    """What a route takes."""
    return DTYPES[:1] if route.startswith("kernel cuda") else DTYPES


@contextmanager
def device(place: str):
    """Yields what moves an array of the host to that place."""
    if place == "host":
        yield lambda array: array
    elif place == "emulator":
        with fake_cupy.installed():
            yield fake_cupy.wrapped
    else:
        yield _uploaded


def _uploaded(array):
    """On a card, strided if it was: a copy would be contiguous."""
    cupy = gpu()
    if array.flags.c_contiguous or not array.size:
        return cupy.asarray(array)
    wide = cupy.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = cupy.asarray(array)
    return wide[..., ::2]


@contextmanager
def forced(op: Op, route: str):
    """Run ``op`` along one route, and everything below it in forms; yields what moves an array to where the route runs."""
    kind, name, place = parsed(route)
    with device(place) as put, np.errstate(all="ignore"), use(kernel="none"), use(op, **{kind: name}):
        yield put


def declared(op: Op, route: str):
    """The Form or the Kernel of a route."""
    kind, name, _ = parsed(route)
    return op.forms[name] if kind == "form" else op.kernels[name]


# -- arguments: a variadic operator's one argument is a list, the others are flat --------------------------------------
def flat(op: Op, args) -> list:
    return list(args[0]) if op.variadic else list(args)


def unflat(op: Op, values) -> tuple:
    return (list(values),) if op.variadic else tuple(values)


def arguments(op: Op, args) -> list:
    """The declared argument of each flat value."""
    return list(op.signature.inputs) * (len(args[0]) if op.variadic else 1)


def floats(op: Op, args) -> list[int]:
    """The flat positions of the float arrays that are present."""
    pairs = zip(arguments(op, args), flat(op, args), strict=True)
    return [i for i, (a, x) in enumerate(pairs) if a.kind == "float" and x is not None]


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

    def size(self, low: int = 0, high: int = 4) -> int:
        return self.integer(low, high) if high <= 2 else self.choice([n for n in self.chosen if n >= low] or [low])

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


def awkward_calls(op: Op, size: int, count: int, dtype=np.float32):
    """Calls that the CUDA kernel takes, with an axis of that size, and cotangents for the outputs."""
    seed = found = 0
    while found < count:
        draw = AwkwardDraw(seed, (size, 5), dtype)
        seed += 1
        try:
            args, params = draw_inputs(op, draw)
        except TooLarge:
            continue
        supports = op.kernels["cuda"].supports
        if any(x is not None and size in x.shape for x in args) and (supports is None or not supports(*args, **params)):
            found += 1
            shapes = [o.shape for o in compute(op, forms(op)[0], args, params)]
            yield args, params, [draw.generator().standard_normal(s).astype(dtype) for s in shapes]


# -- computing ---------------------------------------------------------------------------------------------------------
def listed(result) -> list:
    return list(result) if isinstance(result, tuple) else [result]


def compute(op: Op, route: str, args, params) -> tuple:
    """The outputs along a route as arrays."""
    if route == "definition":
        with np.errstate(all="ignore"):
            return tuple(np.asarray(o) for o in listed(op.definition(*args, **params)))
    with forced(op, route) as put, no_grad():
        values = [None if x is None else put(x) for x in flat(op, args)]
        for i in floats(op, args):
            values[i] = Tensor.wrap(values[i])  # Tensor(x) would copy, and lose the layout
        result = op(*unflat(op, values), **params)
        return tuple(to_numpy(o) for o in listed(result))


def differentiate(op: Op, route: str, args, params, cotangents, wanted=None) -> dict[int, np.ndarray]:
    """The gradient of <cotangents, outputs> for each float input, or for ``wanted`` when only those need one."""
    wanted = floats(op, args) if wanted is None else wanted
    with forced(op, route) as put:
        values = [None if x is None else put(x) for x in flat(op, args)]
        for i in floats(op, args):
            values[i] = Tensor.wrap(values[i], requires_grad=i in wanted)
        outputs = listed(op(*unflat(op, values), **params))
        seeds = [Tensor.wrap(put(c.astype(o.dtype, copy=False))) for c, o in zip(cotangents, outputs, strict=True)]
        found = gradients(outputs, [values[i] for i in wanted], seeds)
        return {i: to_numpy(g) for i, g in zip(wanted, found, strict=True)}


def draw_cotangents(op: Op, args, params, draw) -> list[np.ndarray]:
    return [draw.floats(*o.shape) for o in compute(op, "definition", args, params)]


# -- checks ------------------------------------------------------------------------------------------------------------
def _terms(op: Op, *arrays) -> float:
    """The tolerance in assert_close's unit: its formula's own cancellation, and the length of the longest sum."""
    return op.tolerance**2 * max((a.size for a in arrays if a is not None), default=1)


def _largest(arrays) -> float:
    return max((float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0)) for a in arrays), default=0.0)


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
    dtype = next(x.dtype for x in present if x.dtype.kind == "f")
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
            assert argument.dims[:1] != ("...",) or output.shape[: output.ndim - len(argument.dims) + 1] == lead
        if argument.kind == "float":
            assert output.dtype == dtype, f"{op.name} made {output.dtype} of {dtype}"
        else:
            assert output.dtype.kind == {"int": "i", "bool": "b"}[argument.kind]
        form = declared(op, route) if route != "definition" else None
        composed = isinstance(form, Form) and not form.primitive  # its parts declare what they share
        shared = any(np.shares_memory(output, x) for x in present)
        assert op.view or composed or not shared, f"{op.name} returns its input's memory"


def check_values(op: Op, route: str, args, params, reference: str = "definition") -> None:
    """The route gives the definition's values, or those of another route."""
    with unwritten(op, args):
        # First the route, then the reference: memory that the route forgets to fill must not hold the right answer.
        outputs = compute(op, route, args, params)
    check_outputs(op, route, args, outputs)
    for output, expected in zip(outputs, compute(op, reference, wide(op, args), params), strict=True):
        assert_close(output, expected, f"{op.name}, {route}, values", terms=_terms(op, *flat(op, args)))


def check_gradients(op: Op, route: str, args, params, cotangents, wanted=None, reference: str = "definition") -> None:
    """The gradients of all inputs, or of ``wanted``, are those of the first form: dtype, shape and values."""
    with unwritten(op, args):
        found = differentiate(op, route, args, params, cotangents, wanted)
    cotangents = [c.astype(np.float64) for c in cotangents]
    expected = differentiate(op, forms(op)[0], wide(op, args), params, cotangents)
    outputs = compute(op, reference, wide(op, args), params)
    for i, gradient in found.items():
        x, name = flat(op, args)[i], arguments(op, args)[i].name
        assert gradient.shape == x.shape, f"{op.name}: the gradient of {name} {x.shape} has shape {gradient.shape}"
        assert gradient.dtype == x.dtype, f"{op.name}: the gradient of {name} {x.dtype} has dtype {gradient.dtype}"
        # What is left of a derivative after cancellation may be tiny (a norm's, of a row of one value): its rounding is
        # relative to the size that its units give it, cotangent times output over input, which joins the comparison.
        size = x.dtype.type(_largest(cotangents) * max(1.0, _largest(outputs)) / max(1.0, _largest([x])))
        assert_close(np.append(gradient, size), np.append(expected[i], size), f"{op.name}, {route}, gradient of {name}",
                     terms=_terms(op, *flat(op, args), *cotangents))


def check_repeatable(op: Op, route: str, args, params, cotangents) -> None:
    """The same call gives the same bits."""
    def bits():
        found = differentiate(op, route, args, params, cotangents).values() if op.differentiable else ()
        return [a.tobytes() for a in (*compute(op, route, args, params), *found)]

    assert bits() == bits(), f"{op.name}, {route}: two calls differ"


def check_derivative(op: Op, route: str, args, params, order: int = 1) -> None:
    """Every gradient of a form is its derivative, by complex step or differences."""
    positions = floats(op, args)

    def function(*tensors):
        values = flat(op, args)
        for i, tensor in zip(positions, tensors, strict=True):
            values[i] = tensor
        return op(*unflat(op, values), **params)

    with forced(op, route):
        gradcheck(function, *(flat(op, args)[i] for i in positions), order=order, analytic=op.analytic)


def check_law(op: Op, law, route: str, args, params, draw) -> None:
    law.check(Case(op, args, params, lambda a, p: compute(op, route, a, p)), draw)


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

    return op.differentiable and all(holds(seed) for seed in range(12))


def check_adjoint(op: Op, route: str, args, params, draw) -> None:
    """<f(x), y> = <x, gradient of f at y> for a linear operator, all inputs and outputs taken as one vector each."""
    positions, outputs = floats(op, args), compute(op, "definition", args, params)

    def split(vector, arrays):
        ends = np.cumsum([a.size for a in arrays])
        return [part.reshape(a.shape) for part, a in zip(np.split(vector, ends[:-1]), arrays, strict=True)]

    def join(arrays):
        return np.concatenate([np.ravel(a) for a in arrays])

    def at(vector):
        values = flat(op, args)
        for i, part in zip(positions, split(vector, [values[i] for i in positions]), strict=True):
            values[i] = part
        return unflat(op, values)

    x = join(flat(op, args)[i] for i in positions)
    y = join(draw.floats(*o.shape) for o in outputs)
    adjoint_test(lambda v: join(compute(op, route, at(v), params)),
                 lambda v: join(differentiate(op, route, at(x), params, split(v, outputs)).values()), x, y)


