"""Op: everything about an operator, declared once, and the REGISTRY that tests, benchmarks and help enumerate.

    @op("x[... D], weight?[D] -> y[... D]", laws=[...])
    def rms_norm(x, weight=None, *, eps=1e-5): ...       # the definition: loops over NumPy arrays, nothing clever

    @rms_norm.form                                       # differentiable Tensor code: the tape makes its gradient
    def composed(x, weight=None, *, eps=1e-5): ...

    @exp.primitive                                       # or array code ...
    def array(x): ...
    @exp.vjp                                             # ... with a gradient written in operators
    def _(g, out): ...

    rms_norm.kernel("cpu", "autograd.ops.rms_norm.cpu")  # a fused forward and backward, imported at its first call

    @rms_norm.inputs                                     # what tests and benchmarks draw; derived from the shapes if absent
    def _(draw): ...

    @rms_norm.validate                                   # value checks, before any form or kernel runs
    def _(x, weight, *, eps): ...
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .device import FLOATS, device_name, namespace, unscalar
from .errors import AutogradError, DtypeError, GraphError, KernelError, ShapeError
from .node import Node, require_finite
from .shapes import Argument, Signature, bind
from .state import STATE
from .tensor import Tensor

REGISTRY: dict[str, Op] = {}


@dataclass
class Form:
    """One algorithm for an operator: ``composed`` of Tensor operators, or array code with a ``vjp`` (a primitive)."""

    name: str
    function: Callable
    primitive: bool = False
    vjp: Callable | None = None
    plan: tuple = ()  # what the vjp's parameters are, see _plan

    @property
    def saves_outputs(self) -> bool:
        return any(kind == "out" for kind, _, _ in self.plan)


@dataclass
class Kernel:
    """A fused forward and backward for one device, in a module that is imported at the first call."""

    device: str
    module: str
    prefix: str = ""
    _loaded: dict = field(default_factory=dict, repr=False)

    def _get(self, name: str):
        if name not in self._loaded:
            self._loaded[name] = getattr(importlib.import_module(self.module), self.prefix + name, None)
        return self._loaded[name]

    @property
    def forward(self) -> Callable:
        return self._get("forward")

    @property
    def backward(self) -> Callable:
        return self._get("backward")

    @property
    def supports(self) -> Callable | None:
        return self._get("supports")

    def reason_against(self, values, params) -> str | None:
        """Why this kernel cannot run on these arrays, or None."""
        for value in values:
            if value is not None and value.dtype.kind == "f" and value.dtype not in FLOATS:
                return f"needs float32 or float64, got {value.dtype}"
            if value is not None and value.dtype.kind == "c":
                return "complex arrays pass only through forms"
            if value is not None and device_name(value) != self.device:
                return f"runs on {self.device} arrays, got {device_name(value)} arrays"
        return self.supports(*values, **params) if self.supports else None


class Op:
    """A declared operator. Calling it checks the arguments, chooses a form or kernel, and records a node."""

    def __init__(self, definition: Callable, signature: str, *, laws=(), differentiable=True, view=False,
                 variadic=False, analytic=False, tolerance=1.0):
        self.name = definition.__name__
        self.signature = Signature.parse(signature)
        self.definition = definition
        self.__doc__ = definition.__doc__
        self.__wrapped__ = definition
        self.laws = tuple(laws)
        self.differentiable = differentiable
        self.view = view  # outputs may share memory with the first input
        self.variadic = variadic  # the one input is a sequence of arrays
        self.analytic = analytic  # forms accept complex arrays, so derivatives can be checked by a complex step
        self.tolerance = tolerance  # how much cancellation the formula itself has, as a factor on the metric's tolerance
        self.forms: dict[str, Form] = {}
        self.kernels: dict[str, Kernel] = {}
        self.draw: Callable | None = None
        self._validate: Callable | None = None
        self._names = [a.name for a in self.signature.inputs]
        parameters = inspect.signature(definition).parameters.values()
        self.params = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if positional != self._names:
            raise ShapeError(f"{self.name}: the definition takes {positional}, the signature names {self._names}")
        self._elementwise = self.signature.elementwise and not variadic
        self._shaped = [(i, a) for i, a in enumerate(self.signature.inputs) if a.dims != ("*",)]
        self._fitting: set[tuple] = set()  # shapes that were found to agree with the signature
        if self.name in REGISTRY:
            raise AutogradError(f"operator {self.name!r} is declared twice")
        REGISTRY[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}({self.signature})>"

    # -- declaration -------------------------------------------------------------------------------------------------
    def form(self, function: Callable) -> Callable:
        """Declare a form made of Tensor operators; its name is the function's."""
        self._declare(Form(function.__name__, function))
        return function

    def _declare(self, form: Form) -> None:
        if form.name in self.forms:
            raise AutogradError(f"{self.name}: form {form.name!r} is declared twice")
        self.forms[form.name] = form

    def primitive(self, function: Callable) -> Callable:
        """Declare the form "array", made of array code; ``vjp`` states its gradient."""
        self._declare(Form("array", function, primitive=True))
        return function

    def vjp(self, function: Callable) -> Callable:
        """Declare the gradient of the primitive form, written with Tensor operators.

        Its parameters say what backward needs: ``g`` (the gradient of the output, a list for several outputs), the
        names of inputs, ``out`` (the output, or the list of them), ``<input>_shape``, static parameters, and
        ``needs`` (which inputs want a gradient), ``shapes`` (of all inputs).
        """
        form = self.forms.get("array")
        if form is None:
            raise AutogradError(f"{self.name}: declare the primitive before its vjp")
        form.vjp = function
        form.plan = self._plan(function)
        return function

    def kernel(self, device: str, module: str, prefix: str = "") -> None:
        """Declare a fused kernel: ``module`` has ``<prefix>forward``, ``<prefix>backward``, perhaps ``supports``."""
        self.kernels[device] = Kernel(device, module, prefix)

    def inputs(self, function: Callable) -> Callable:
        """Declare how inputs are drawn: ``function(draw) -> (arrays, params)``."""
        self.draw = function
        return function

    def validate(self, function: Callable) -> Callable:
        """Declare checks of values and parameters, called with the arrays before anything runs."""
        self._validate = function
        return function

    def _plan(self, function) -> tuple:
        plan = []
        for name in list(inspect.signature(function).parameters)[1:]:
            if name in self._names:
                plan.append(("input", self._names.index(name), name))
            elif name == "out":
                plan.append(("out", None, name))
            elif name in ("needs", "shapes"):
                plan.append((name, None, name))
            elif name.endswith("_shape") and name[:-6] in self._names:
                plan.append(("shape", self._names.index(name[:-6]), name))
            elif name in self.params:
                plan.append(("param", name, name))
            else:
                raise AutogradError(f"{self.name}: the vjp's parameter {name!r} is neither an input nor a parameter")
        return tuple(plan)

    # -- calling -----------------------------------------------------------------------------------------------------
    def __call__(self, *args, **kwargs):
        values, params = self.bind(args, kwargs)
        tensors, arrays, recording = self._convert(values)
        packed = (arrays,) if self.variadic else arrays
        if self._shaped and not self._elementwise:
            self._check_shapes(arrays)
        if self._validate is not None:
            self._validate(*packed, **params)
        chosen = choose(self, arrays, params)
        if type(chosen) is Form:
            if not chosen.primitive:
                return chosen.function(*((tensors,) if self.variadic else tensors), **params)
            return self._run_primitive(chosen, tensors, arrays, params, recording)
        return self._run_kernel(chosen, tensors, arrays, params, recording)

    def _check_shapes(self, arrays) -> None:
        shapes = tuple([None if a is None else a.shape for a in arrays])
        if shapes in self._fitting:  # the same ones as before, in all but the first step of a training run
            return
        bound: dict = {}
        for i, argument in self._shaped:
            if shapes[i] is not None:
                bind(self.name, argument, shapes[i], bound)
        if len(self._fitting) >= 1000:
            self._fitting.clear()
        self._fitting.add(shapes)

    def bind(self, args, kwargs):
        """The inputs in signature order (None where absent) and all static parameters."""
        names = self._names
        if self.variadic:
            sequence = args[0] if args else kwargs.get(names[0], ())
            if not isinstance(sequence, tuple | list) or len(sequence) == 0:
                raise TypeError(f"{self.name}: {names[0]} must be a non-empty list or tuple of tensors")
            args = (None, *args[1:]) if args else ()
        if len(args) == len(names) and not kwargs:
            return (sequence if self.variadic else args), self.params
        params = dict(self.params)
        extra = args[len(names):]
        if len(extra) > len(params):
            raise TypeError(f"{self.name}: takes {', '.join([*names, *params])}, got {len(args)} arguments")
        for key, value in zip(params, extra, strict=False):  # sum(x, -1): parameters may follow in order
            if key in kwargs:
                raise TypeError(f"{self.name}: {key!r} was given twice")
            params[key] = _plain_number(value)
        args = args[: len(names)]
        values = list(args) + [None] * (len(names) - len(args))
        for key, value in kwargs.items():
            if key in params:
                params[key] = _plain_number(value)
            elif key in names:
                position = names.index(key)
                if position < len(args):
                    raise TypeError(f"{self.name}: {key!r} was given twice")
                values[position] = value
            else:
                close = difflib.get_close_matches(key, [*params, *names], 1)
                hint = f"; did you mean {close[0]!r}?" if close else f", allowed: {', '.join([*names, *params])}"
                raise TypeError(f"{self.name}: no argument {key!r}{hint}")
        return (sequence if self.variadic else values), params

    def _convert(self, values):
        """The inputs as tensors and as arrays, and whether the call is recorded.

        Arrays become constant tensors of their own dtype, which must be that of the others; Python numbers take the
        dtype and the device of the others; integer and boolean inputs stay arrays, copied if backward will need them.
        """
        tensors: list = list(values)
        arrays: list = [None] * len(values)
        arguments = self.signature.inputs * len(values) if self.variadic else self.signature.inputs
        dtype = None
        weak = raw = False
        xp = np
        recording = False
        for i, argument in enumerate(arguments):
            value = values[i]
            if isinstance(value, Tensor):
                if argument.kind != "float":
                    raise DtypeError(f"{self.name}: {argument.name} takes a plain {argument.kind} array, got a Tensor")
                data = arrays[i] = value.data
                if dtype is None:
                    dtype = data.dtype
                elif data.dtype != dtype:
                    self._mixed(argument, data.dtype, dtype)
                if value.requires_grad and STATE.recording:
                    recording = True
                if type(data) is not np.ndarray:
                    xp = None
            elif value is None:
                if not argument.optional:
                    raise TypeError(f"{self.name}: argument {argument.name!r} is missing")
            elif argument.kind == "float" and isinstance(value, int | float) and not isinstance(value, np.generic):
                weak = True
            else:
                raw = True
        if raw or weak:
            owners = [a for a in arrays if a is not None] if xp is None else []
            module = namespace(*owners) if owners else np
            for i, argument in enumerate(arguments):
                if arrays[i] is None and values[i] is not None:
                    value = values[i]
                    if argument.kind != "float":
                        arrays[i] = tensors[i] = self._plain(argument, value, recording)
                    elif not (isinstance(value, int | float) and not isinstance(value, np.generic)):
                        tensors[i] = Tensor(self._floats(argument, value))
                        arrays[i] = tensors[i].data
                        if dtype is None:
                            dtype = arrays[i].dtype
                        elif arrays[i].dtype != dtype:
                            self._mixed(argument, arrays[i].dtype, dtype)
            if weak:
                dtype = dtype or np.dtype(np.float64)
                for i, value in enumerate(values):
                    if value is not None and arrays[i] is None:
                        tensors[i] = Tensor.wrap(module.asarray(value, dtype))
                        arrays[i] = tensors[i].data
            namespace(*arrays)
        elif xp is None:
            namespace(*arrays)
        return tensors, arrays, recording

    def _floats(self, argument, value):
        array = value if isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__") else np.asarray(value)
        if array.dtype not in FLOATS and not (STATE.complex_step and array.dtype.kind == "c"):
            raise DtypeError(
                f"{self.name}: {argument.name} has dtype {array.dtype}, allowed: float32, float64 "
                "(convert with .astype; for a mask use where or the mask argument)"
            )
        return array

    def _plain(self, argument: Argument, value, recording: bool):
        array = value if hasattr(value, "dtype") and not isinstance(value, np.generic) else np.asarray(value)
        if argument.kind == "bool":
            if array.dtype != np.bool_:
                raise DtypeError(f"{self.name}: {argument.name} has dtype {array.dtype}, only boolean masks are allowed")
            return array.copy() if recording else array
        if array.dtype.kind not in "iu" and array.size:
            raise DtypeError(f"{self.name}: {argument.name} has dtype {array.dtype}, allowed: integers")
        if array.dtype == np.uint64:  # what an int64 cannot hold stays out of range instead of becoming negative
            array = np.minimum(array, np.uint64(np.iinfo(np.intp).max)) if type(array) is np.ndarray else array
        return array.astype(np.intp, copy=recording or array.dtype != np.intp)

    def _mixed(self, argument, dtype, expected):
        if STATE.complex_step:
            return
        raise DtypeError(
            f"{self.name}: {argument.name} is {dtype} but another argument is {expected}; dtypes are never widened "
            "silently: convert one with .astype (a NumPy scalar: float(s))"
        )

    def _run_primitive(self, form, tensors, arrays, params, recording):
        if self._elementwise:
            try:
                result = form.function(*arrays, **params)
            except ValueError as error:
                if isinstance(error, AutogradError):
                    raise
                shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(self._names, arrays, strict=True) if a is not None)
                raise ShapeError(f"{self.name}: shapes do not broadcast: {shapes}") from error
        else:
            result = form.function(*((arrays,) if self.variadic else arrays), **params)
        if not self.differentiable:
            return result
        if not recording:
            return self._wrap(result, tensors)
        outputs = result if type(result) is tuple else (result,)
        saved, versions = [], []
        for kind, key, name in form.plan:
            if kind == "input":
                tensor = tensors[key]
                saved.append(tensor)
                if isinstance(tensor, Tensor):
                    versions.append((tensor.version, tensor.version[0], name))
            elif kind == "shape":
                saved.append(arrays[key].shape if arrays[key] is not None else None)
            elif kind == "param":
                saved.append(_frozen(params[key]))
            elif kind == "shapes":
                saved.append(tuple(a.shape for a in arrays))
            elif kind == "needs":
                saved.append(tuple(isinstance(t, Tensor) and t.requires_grad for t in tensors))
            else:
                saved.append([unscalar(o) for o in outputs])
        node = self._node(tensors, arrays, outputs, (form, saved), _differentiate_primitive, versions)
        return self._wrap(result, tensors, node, form.saves_outputs)

    def _run_kernel(self, kernel, tensors, arrays, params, recording):
        result, saved = kernel.forward(*arrays, **params)
        if not self.differentiable:
            return result
        if not recording:
            return self._wrap(result, tensors)
        outputs = result if type(result) is tuple else (result,)
        versions = [(t.version, t.version[0], n) for t, n in zip(tensors, self._names, strict=True) if isinstance(t, Tensor)]
        node = self._node(tensors, arrays, outputs, (kernel, saved), _differentiate_kernel, versions)
        return self._wrap(result, tensors, node, True)

    def _node(self, tensors, arrays, outputs, saved, differentiate, versions):
        parents = [
            None if not isinstance(t, Tensor) or not t.requires_grad else (t.node, t.index) if t.node is not None else t
            for t in tensors
        ]
        shapes = [None if a is None else a.shape for a in arrays]
        node = Node(self, parents, differentiate, saved, shapes, [(o.shape, o.dtype) for o in outputs], versions)
        if STATE.checking:
            for array in arrays:
                if type(array) is np.ndarray:
                    array.flags.writeable = False
        return node

    def _wrap(self, result, tensors, node=None, saved=False):
        if type(result) is tuple:
            return tuple([self._output(o, index, tensors, node, saved) for index, o in enumerate(result)])
        return self._output(result, 0, tensors, node, saved)

    def _output(self, output, index, tensors, node, saved):
        output = unscalar(output)
        if STATE.checking:
            declared = self.signature.outputs[min(index, len(self.signature.outputs) - 1)]
            state = declared.name in self.signature.states  # an empty one may hold ln 0
            require_finite(output, f"the output of {self.name}", empty=state)
        tensor = Tensor.wrap(output)
        if node is not None:
            tensor.requires_grad, tensor.node, tensor.index = True, node, index
        if self.view and isinstance(tensors[0], Tensor):
            tensor.version = tensors[0].version
        if saved:
            node.versions.append((tensor.version, tensor.version[0], None))
            if STATE.checking and type(output) is np.ndarray:
                output.flags.writeable = False
        return tensor


def _plain_number(value):
    """A NumPy scalar as a Python number, which widens nothing; other parameters as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _frozen(value):
    """A parameter with its arrays and lists copied, so that changing them later does not change the gradient."""
    if isinstance(value, tuple | list):
        return type(value)(_frozen(v) for v in value)
    return value.copy() if hasattr(value, "dtype") else value


def _differentiate_primitive(node, grads, create_graph):
    form, saved = node.saved
    if form.vjp is None:
        raise GraphError(f"{node.op.name} has no gradient")
    arguments = []
    for (kind, _, _), value in zip(form.plan, saved, strict=True):
        if kind == "out":
            outs = []
            for index, array in enumerate(value):
                tensor = Tensor.wrap(array)
                if create_graph:
                    tensor.requires_grad, tensor.node, tensor.index = True, node, index
                outs.append(tensor)
            value = outs if len(outs) > 1 else outs[0]
        arguments.append(value)
    result = form.vjp(grads if len(grads) > 1 else grads[0], *arguments)
    return result if type(result) in (tuple, list) else (result,)


def _differentiate_kernel(node, grads, create_graph):
    kernel, saved = node.saved
    if create_graph:
        names = " or ".join(f"form={name!r}" for name in node.op.forms)
        raise GraphError(
            f"{node.op.name}: the fused {kernel.device} kernel has no second derivative; "
            f"compute the output under use({node.op.name!r}, {names})"
        )
    results = kernel.backward(saved, *(g.data for g in grads))
    return [None if r is None else Tensor.wrap(unscalar(r)) for r in results]


def op(signature: str, **options) -> Callable[[Callable], Op]:
    """Declare an operator by its definition; see the module's docstring."""
    return lambda definition: Op(definition, signature, **options)


def lookup(name) -> Op:
    """The operator of that name (or the Op itself); an unknown one raises KernelError with the closest names."""
    if isinstance(name, Op):
        return name
    if name not in REGISTRY:
        close = difflib.get_close_matches(str(name), REGISTRY, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else f", known: {', '.join(sorted(REGISTRY))}"
        raise KernelError(f"no operator {name!r}{hint}")
    return REGISTRY[name]


from .dispatch import choose  # noqa: E402  (dispatch looks operators up in REGISTRY)
