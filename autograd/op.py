"""Op: everything about an operator, declared once; tests, benchmarks and help enumerate the registry of them.

    @op("x[... D], weight?[D] -> y[... D]", laws=[...], method=True)
    def rms_norm(x, weight=None, *, eps=1e-5): ...       # the definition: loops over NumPy arrays, nothing clever

    @rms_norm.form                                       # Tensor operators: the tape makes its gradient
    def composed(x, weight, eps): ...

    @exp.primitive                                       # or array code ...
    def array(x): ...
    @exp.vjp                                             # ... with a gradient written in operators
    def _(g, out): ...

    rms_norm.kernel("cpu")                               # fused functions in cpu.py beside the page, imported at the first call

    @rms_norm.inputs                                     # what tests and benchmarks draw; derived from the shapes if absent
    def _(draw): ...

    @rms_norm.validate                                   # value checks, before any form or kernel runs
    def _(x, eps): ...

What these functions receive and return is the protocol of routes.py; how a signature is written stands in shapes.Signature, the
laws that most operators have (independent, linear_in, causal, shift_invariant, non_finite) in laws.py, and what can be drawn
(floats, distinct for values without ties, integers, masks) in draw.py. ``validate`` sees arrays whose shapes agree with the
signature, and raises DomainError or ShapeError.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence

import numpy as np

from .cpu.team import elementwise
from .device import FLOATS, is_cupy, namespace, overlap, plain, unscalar
from .dispatch import choose, request_for
from .errors import AutogradError, DtypeError, ShapeError
from .node import Node, place_of, require_finite
from .registry import register
from .routes import Form, Kernel, Route, reader
from .shapes import Argument, Signature, bind
from .state import switches, watched
from .tensor import Tensor


class Op:
    """A declared operator. Calling it checks the arguments, chooses a form or kernel, and records a node.

    ``view``: outputs may share memory with an input. ``variadic``: the one input is a sequence of arrays. ``analytic``: forms
    accept complex arrays, so derivatives can be checked by a complex step. ``logs``: outputs that are logarithms, and -∞ where
    there is nothing. ``tolerance``: how much cancellation the formula itself has, as a factor on the metric's tolerance.
    ``method``: True makes the operator a method of Tensor, names such as "matmul __matmul__" those methods; one of two operands
    brings its reflected one along.
    """

    def __init__(self, definition: Callable, signature: str, *, laws=(), differentiable=True, view=False,
                 variadic=False, analytic=False, logs: str = "", tolerance=1.0, method: bool | str = False):
        self.name = definition.__name__
        self.signature = Signature.parse(signature)
        self.definition = definition
        self.__doc__ = definition.__doc__
        self.__wrapped__ = definition
        self.laws = tuple(law for one in laws for law in (one if isinstance(one, tuple) else (one,)))
        for law in self.laws:
            if not hasattr(law, "holds_for"):
                raise AutogradError(f"{self.name}: laws is a list of laws, see autograd.laws; got {law!r} in it")
        self.differentiable = differentiable and any(a.kind == "float" for a in self.signature.outputs)
        self.view, self.variadic, self.analytic, self.tolerance = view, variadic, analytic, tolerance
        self._logs = {*logs.split(), *self.signature.states}  # an empty state may hold ln 0
        self.routes: list[Route] = []  # in order of preference: the kernels, then the forms
        self.draw: Callable | None = None
        self._validate: Callable | None = None
        names = [a.name for a in self.signature.inputs]
        parameters = inspect.signature(definition).parameters.values()
        self.params = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if positional != names:
            raise ShapeError(f"{self.name}: the definition takes {positional}, the signature names {names}")
        self.floats = [a.name for a in self.signature.inputs if a.kind == "float"]  # the inputs that have a gradient
        self._places_of_floats = [i for i, a in enumerate(self.signature.inputs) if a.kind == "float"]
        outputs = self.signature.outputs
        self.gradients = {f"g_{a.name}" if len(outputs) > 1 else "g": i for i, a in enumerate(outputs) if a.kind == "float"}
        self.places = {name: i for i, name in enumerate([*names, *self.params])}
        self._bind, self._defaults = _binder(self), list(self.params.values())
        self._elementwise = self.signature.elementwise and not variadic
        self._shaped = [(i, a) for i, a in enumerate(self.signature.inputs) if a.dims != ("*",)]
        self._fitting: set[tuple] = set()  # shapes that were found to agree with the signature
        register(self)
        if method:
            for name in [self.name] if method is True else method.split():
                setattr(Tensor, name, _method(self, name))
                if name.startswith("__") and len(names) == 2:
                    setattr(Tensor, name.replace("__", "__r", 1), _method(self, name, reflected=True))

    def __repr__(self) -> str:
        return f"<op {self.name}({self.signature})>"

    # -- declaration -------------------------------------------------------------------------------------------------
    def form(self, function: Callable | None = None, *, tuning: dict[str, int] | None = None) -> Callable:
        """Declare a form made of Tensor operators; its name is the function's."""
        if function is None:
            return lambda function: self.form(function, tuning=tuning)
        self._declare(Form(self, function.__name__, function, tuning=tuning))
        return function

    def primitive(self, function: Callable) -> Callable:
        """Declare a form made of array code, named like the function, or "array"; ``vjp`` states its gradient."""
        name = function.__name__ if function.__name__[0].isalpha() else "array"  # not of a lambda, _ or a private helper
        self._declare(Form(self, name, function, primitive=True))
        return function

    def vjp(self, function: Callable) -> Callable:
        """Declare the gradient of the primitive that was declared last, written with Tensor operators."""
        primitives = [form for form in self.forms.values() if form.primitive]
        if not primitives:
            raise AutogradError(f"{self.name}: declare the primitive before its vjp")
        primitives[-1].differentiate_by(function)
        return function

    def kernel(self, device: str, module: str | None = None, *, name: str | None = None, prefix: str = "",
               tuning: dict[str, int] | None = None, sizes: dict[str, int] | None = None) -> None:
        """Declare a fused kernel for "cpu" or "cuda": the functions with this prefix in cpu.py or gpu.py beside the page."""
        self._declare(Kernel(self, device, name, module, prefix, tuning, sizes))

    def _declare(self, route: Route) -> None:
        if str(route) in map(str, self.routes):
            raise AutogradError(f"{self.name}: {route} is declared twice")
        self.routes.append(route)
        self.routes.sort(key=lambda route: route.kind, reverse=True)

    @property
    def forms(self) -> dict[str, Form]:
        """The forms by name; the first one is the default."""
        return {route.name: route for route in self.routes if isinstance(route, Form)}

    @property
    def kernels(self) -> dict[str, Kernel]:
        """The kernels by name."""
        return {route.name: route for route in self.routes if isinstance(route, Kernel)}

    def inputs(self, function: Callable) -> Callable:
        """Declare how inputs are drawn: ``function(draw) -> (arrays, params)``."""
        self.draw = function
        return function

    def validate(self, function: Callable) -> Callable:
        """Declare checks of values and parameters, called with arrays before anything runs."""
        self._validate = reader(function, self.places, f"{self.name}, validate")
        return function

    # -- calling -----------------------------------------------------------------------------------------------------
    def __call__(self, *args, **kwargs):
        current = switches()
        if current.watcher is not None:
            return watched(self, args, kwargs)
        tensors, arrays, params, recording = self.accept(args, kwargs)
        request = request_for(self) if current.uses else None
        route = choose(self, arrays, params, request, recording)
        try:
            return route.run(tensors, arrays, params, request, recording)
        except FloatingPointError:  # asked for by np.errstate: but what is rounded to 0 is rounded as it should be
            with np.errstate(under="ignore"):
                return route.run(tensors, arrays, params, request, recording)

    def accept(self, args, kwargs):
        """The inputs as tensors and as arrays, the static parameters in order, and whether the call is recorded."""
        inputs, params = self.bind(args, kwargs)
        tensors, arrays, recording = self._convert(inputs)
        if self._shaped and not self._elementwise:
            self._check_shapes(arrays)
        if self._validate is not None:
            self._validate([*self.packed(arrays), *params])
        return tensors, arrays, params, recording

    def bind(self, args, kwargs):
        """The inputs in signature order (None where absent), those of a variadic operator flat, and all static parameters."""
        count = len(self.signature.inputs)
        if len(args) == count and not kwargs and not self.variadic:
            return args, self._defaults
        try:
            values = self._bind(*args, **kwargs)
        except TypeError as error:
            raise self._misbound(args, kwargs, error) from None
        inputs, params = values[:count], values[count:]
        if self.variadic:
            inputs = inputs[0]
            if not isinstance(inputs, tuple | list) or len(inputs) == 0:
                raise TypeError(f"{self.name}: {self.signature.inputs[0].name} must be a non-empty list or tuple of tensors")
        return inputs, [p.item() if isinstance(p, np.generic) else p for p in params]  # a NumPy scalar would widen floats

    def _misbound(self, args, kwargs, error) -> TypeError:
        names = list(self.places)
        for name in kwargs:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f", allowed: {', '.join(names)}"
                return TypeError(f"{self.name}: no argument {name!r}{hint}")
            if name in names[: len(args)]:
                return TypeError(f"{self.name}: {name!r} was given twice")
        if len(args) > len(names):
            return TypeError(f"{self.name}: takes {', '.join(names)}, got {len(args)} arguments")
        return TypeError(str(error))

    def packed(self, values: Sequence) -> Sequence:
        """Flat values as a function's arguments: a variadic operator's are one list."""
        return [values] if self.variadic else values

    def arguments(self, values: Sequence) -> Sequence[Argument]:
        """The declared argument of each flat value."""
        return self.signature.inputs * len(values) if self.variadic else self.signature.inputs

    def _convert(self, inputs):
        """Arrays become constant tensors of their own dtype, which must be that of the others; Python numbers take the dtype
        and the device of the others; inputs that are not differentiable stay arrays, copied if backward will need them.
        """
        tensors, arrays, others, like, demand, alike = list(inputs), [None] * len(inputs), [], None, False, True
        for i, argument in enumerate(self.arguments(inputs)):
            value = inputs[i]
            if isinstance(value, Tensor) and argument.kind == "float":
                array = arrays[i] = value.data
                demand |= value.requires_grad
                like = value if like is None else like
                alike &= array.dtype is like.data.dtype and type(array) is np.ndarray
            elif value is not None:
                others.append((i, argument))
            elif not argument.optional:
                raise TypeError(f"{self.name}: argument {argument.name!r} is missing")
        recording = demand and self.differentiable and switches().recording
        if others:
            if like is None:
                like = next((inputs[i] for i, a in others if a.kind == "float" and hasattr(inputs[i], "dtype")), None)
            for i, argument in others:
                if argument.kind != "float":
                    tensors[i] = arrays[i] = self._plain(argument, inputs[i], recording)
                else:
                    tensors[i] = self._constant(argument, inputs[i], like)
                    arrays[i] = tensors[i].data
                alike &= type(inputs[i]) in (int, float)  # they took the dtype and the device of the others
        if not alike:
            self._check_alike(arrays)
        return tensors, arrays, recording

    def _check_alike(self, arrays) -> None:
        """All floats have one dtype, and all arrays lie on one device."""
        dtype = None
        for argument, array in zip(self.arguments(arrays), arrays, strict=True):
            if array is None:
                continue
            if type(array) is not np.ndarray:
                namespace(*arrays)  # refuses a mixture
            if argument.kind == "float" and array.dtype is not dtype:
                if dtype is not None and array.dtype != dtype and not switches().complex_step:
                    raise DtypeError(
                        f"{self.name}: {argument.name} is {array.dtype} but another argument is {dtype}; dtypes are never "
                        "widened silently: convert one with .astype (a NumPy scalar: float(s))"
                    )
                dtype = array.dtype

    def _constant(self, argument: Argument, value, like) -> Tensor:
        """A float input that is no tensor, as one."""
        if isinstance(value, int | float) and not isinstance(value, np.generic):
            if like is None:
                return Tensor.wrap(np.asarray(value, np.float64))
            data = like.data if isinstance(like, Tensor) else like
            return Tensor.wrap(namespace(data).asarray(value, like.dtype))
        array = plain(value, f"{self.name}: {argument.name}")
        if array.dtype not in FLOATS and not (switches().complex_step and array.dtype.kind == "c"):
            raise DtypeError(
                f"{self.name}: {argument.name} has dtype {array.dtype}, allowed: float32, float64 "
                "(convert with .astype; for a mask use where or the mask argument)"
            )
        return Tensor(array)

    def _plain(self, argument: Argument, value, recording: bool):
        """An input that is not differentiable."""
        if isinstance(value, Tensor):
            raise DtypeError(f"{self.name}: {argument.name} takes a plain {argument.kind} array, got a Tensor")
        array = plain(value, f"{self.name}: {argument.name}")
        if argument.kind == "int":
            if array.dtype.kind not in "iu" and array.size:
                raise DtypeError(f"{self.name}: {argument.name} has dtype {array.dtype}, allowed: integers")
            if array.dtype == np.uint64 and not is_cupy(array):  # what an int64 cannot hold stays out of range
                array = np.minimum(array, np.uint64(np.iinfo(np.intp).max))
            return array.astype(np.intp, copy=recording or array.dtype != np.intp)
        if argument.kind == "bool" and array.dtype != np.bool_:
            raise DtypeError(f"{self.name}: {argument.name} has dtype {array.dtype}, only boolean masks are allowed")
        if argument.kind == "const" and array.dtype not in FLOATS:
            raise DtypeError(f"{self.name}: {argument.name} has dtype {array.dtype}, allowed: float32, float64")
        return array.copy() if recording else array

    def _check_shapes(self, arrays) -> None:
        shapes = tuple([None if a is None else a.shape for a in arrays])
        if shapes in self._fitting:  # the same ones as before, in all but the first step of a training run
            return
        self._letters(arrays)
        if len(self._fitting) >= 1000:
            self._fitting.clear()
        self._fitting.add(shapes)

    def _letters(self, arrays) -> dict:
        bound: dict = {}
        for i, argument in self._shaped:
            if arrays[i] is not None:
                bind(self.name, argument, arrays[i].shape, bound)
        return bound

    # -- results -----------------------------------------------------------------------------------------------------
    def broadcast(self, function: Callable, values: Sequence, arrays: Sequence):
        """What a primitive computes; of an elementwise operator, shapes that do not broadcast are named."""
        try:
            return elementwise(function, values, arrays) if self._elementwise and not self.view else function(values)
        except ValueError as error:
            if not self._elementwise or isinstance(error, AutogradError):
                raise
            shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(self.places, arrays, strict=False) if a is not None)
            raise ShapeError(f"{self.name}: shapes do not broadcast: {shapes}") from error

    def record(self, rule: Route, tensors, arrays, result, saved, versions) -> Node:
        """A node for a call that ``rule`` computed."""
        parents, shapes = [], []
        for tensor in tensors if self.variadic else [tensors[i] for i in self._places_of_floats]:
            parents.append(place_of(tensor) if tensor is not None and tensor.requires_grad else None)
            shapes.append(None if tensor is None else tensor.data.shape)
        outputs = [(o.shape, o.dtype) for o in result] if type(result) is tuple else [(result.shape, result.dtype)]
        if switches().checking:
            _lock(arrays)
        return Node(self, rule, parents, saved, shapes, outputs, versions)

    def made_by(self, form: Form, result):
        """What a form of Tensor operators returned, if it is what the signature says."""
        results = result if type(result) is tuple else (result,)
        for argument, output in zip(self._declared(results), results, strict=True):
            if isinstance(output, Tensor) != (argument.kind == "float" and self.differentiable):
                kind = "a Tensor" if argument.kind == "float" else "a plain array"
                raise AutogradError(f"{self.name}, {form}: {argument.name} is {kind}, got {type(output).__name__}; several "
                                    "outputs are a tuple")
        return result

    def wrap(self, result, tensors, node: Node | None = None, saved: bool = False):
        """The outputs as tensors, outputs of a node if there is one; integer and boolean ones, or all of an operator without
        gradients, as they are.
        """
        several = type(result) is tuple
        results = result if several else (result,)
        checking = switches().checking
        if checking:
            self._check_outputs(results, tensors)
        if not self.differentiable:
            return result
        declared = self._declared(results)
        outputs = [Tensor.wrap(unscalar(array), node=node, index=i) if declared[i].kind == "float" else array
                   for i, array in enumerate(results)]
        if self.view:
            for tensor in outputs:
                self._share_version(tensor, tensors)
        if saved:
            node.versions += [(t.version, t.version[0], None) for t in outputs if isinstance(t, Tensor)]
        if saved and checking:
            _lock([t.data for t in outputs if isinstance(t, Tensor)])
        return tuple(outputs) if several else outputs[0]

    def _share_version(self, tensor: Tensor, inputs) -> None:
        """An update in place of an input is one of its view."""
        for other in inputs:
            if isinstance(other, Tensor) and overlap(tensor.data, other.data):
                tensor.version = other.version

    def _declared(self, results: Sequence) -> Sequence[Argument]:
        outputs = self.signature.outputs
        if len(outputs) == len(results):
            return outputs
        if len(outputs) == 1 and outputs[0].dims == ("*",):  # any number
            return outputs * len(results)
        names = ", ".join(a.name for a in outputs)
        raise AutogradError(f"{self.name}: {len(results)} outputs were computed, the signature declares {names} (several "
                            "are a tuple; a kernel's forward returns (outputs, saved))")

    def _check_outputs(self, results, tensors) -> None:
        bound = {} if self.variadic else self._letters(tensors)
        for array, argument in zip(results, self._declared(results), strict=True):
            array = unscalar(array)
            if argument.dims != ("*",):
                bind(f"the output of {self.name}", argument, array.shape, bound)
            require_finite(array, f"the output of {self.name}", empty=argument.name in self._logs)


def op(signature: str, **options) -> Callable[[Callable], Op]:
    """Declare an operator by its definition; see the module's docstring."""
    if not isinstance(signature, str):
        raise AutogradError('op: the signature comes first, as in @op("x[... D] -> y[... D]")')
    return lambda definition: Op(definition, signature, **options)


def _binder(op: Op) -> Callable:
    """A function with the operator's parameters, all of which may follow in order: Python itself binds its arguments."""
    optional = {a.name for a in op.signature.inputs if a.optional}
    heads = [f"{n}=None" if n in optional else f"{n}=params[{n!r}]" if n in op.params else n for n in op.places]
    scope: dict = {"params": op.params}
    exec(f"def {op.name}({', '.join(heads)}): return ({', '.join(op.places)},)", scope)
    return scope[op.name]


def _method(op: Op, name: str, reflected: bool = False) -> Callable:
    if reflected:
        def method(self, other):
            return op(other, self)
    else:
        def method(self, *args, **kwargs):
            return op(self, *args, **kwargs)
    method.__name__, method.__doc__ = name, op.__doc__
    return method


def _lock(arrays) -> None:
    for array in arrays:
        if type(array) is np.ndarray:
            array.flags.writeable = False
