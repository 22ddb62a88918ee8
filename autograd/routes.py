"""Form and Kernel: the routes along which a call of an operator is computed and differentiated.

**One rule for all functions of an operator** (definition, forms, primitives, vjps, kernels, validators): a function receives
what its parameters name, in any order. What there is to name:

    inputs and static parameters   by their names in the definition, where alone their defaults stand; *others, the inputs that
                                   it does not name
    tuning numbers                 of this form or kernel: tuning={"chunk_size": 64}. They change rounding and speed only;
                                   use(op, form="chunkwise", chunk_size=16) sets them, tests draw them

A *form* is written with Tensor operators, so that the tape makes its gradient, and runs on every device. A *primitive* is
array code (arrays in, arrays out) with a gradient of its own, the *vjp*, which is written with Tensor operators and may name

    g              the gradient of the output; of an operator with several, g_<output> for each float one (zeros where nothing
                   arrived), or g, a list, where their number depends on the call (outputs written ys[*])
    out            the output, or the list of them: what a gradient needs, it names, and nothing else is kept
    <input>_shape  and shapes, of all float inputs
    needs          the names of the inputs that want a gradient (for a variadic operator: a flag each)

    and returns one gradient for each float input, None where it is not wanted. Gradients of broadcast inputs are summed by
    the engine.

A *kernel* is a module with fused functions for one device. Several for one device are candidates in the order of declaration,
each with a name and a prefix of its functions: op.kernel("cpu", name="fft", prefix="fft_").

    forward(inputs and parameters [, recording])   returns (outputs, saved). Without ``recording`` nothing needs to be saved
    backward(saved, g [, needs])                   returns a tuple of one gradient for each float input, None for those not
                                                   wanted; with several outputs, g_<output>, None where nothing arrived
                                                   (autograd.arrays.or_zeros helps). It sees inputs through saved only
    supports(inputs and parameters)                why it cannot run on them, or None; optional
    defers(inputs and parameters)                  why another candidate had better run, or None; optional, ignored if forced

Several outputs are a tuple in the order of the signature; a form returns a Tensor for each float output. Integer and boolean
outputs are plain arrays; they, and inputs that are integer, boolean or const, have no gradient and no place in those lists. A
kernel without backward runs where no gradient is wanted. ``sizes={"T": 1}`` restricts a kernel to calls in which a letter of
the signature has that size: the one-position kernel of an operator with a state.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence

from .device import device_name, unscalar
from .errors import AutogradError, GraphError, KernelError
from .node import zeros
from .state import switches
from .tensor import Tensor

DEVICES = {"cpu": "cpu", "cuda": "gpu"}  # and the name of the module with an operator's kernel


def reader(function: Callable, places: dict[str, int], where: str, inputs: int = 0, note: str = "") -> Callable:
    """The function as one of a list of values: it receives what its parameters name; ``places`` says where each lies.

    ``*others`` are the inputs, the first places, that it does not name.
    """
    positional, named = [], {}
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        name, kind = parameter.name, parameter.kind
        if kind is parameter.VAR_POSITIONAL:
            positional += [i for other, i in places.items() if i < inputs and other not in parameters]
            continue
        if kind is parameter.VAR_KEYWORD:
            raise AutogradError(f"{where}: **{name} is not allowed; name what is needed")
        if name not in places:
            close = difflib.get_close_matches(name, places, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(places)}"
            raise AutogradError(f"{where}: nothing is called {name!r}; {hint}{note}")
        if parameter.default is not parameter.empty:
            raise AutogradError(f"{where}: {name!r} has a default; defaults stand in the definition alone")
        if kind is parameter.KEYWORD_ONLY:
            named[name] = places[name]
        else:
            positional.append(places[name])
    if not named and positional == list(range(len(positional))):  # most forms and kernels name the first values in order
        count = len(positional)
        return lambda values: function(*values[:count])
    if named:
        return lambda values: function(*[values[i] for i in positional], **{n: values[i] for n, i in named.items()})
    return lambda values: function(*[values[i] for i in positional])


class Route:
    """What forms and kernels have in common: a name, and tuning numbers with their defaults."""

    kind = why = ""
    device: str | None = None

    def __init__(self, op, name: str, tuning: dict[str, int] | None):
        self.op, self.name, self.tuning = op, name, dict(tuning or {})
        for key, value in self.tuning.items():
            if key in op.places:
                raise AutogradError(f"{op.name}, {self}: the tuning number {key!r} has the name of an argument")
            self.check_tuning(key, value)
        self.places = {name: i for i, name in enumerate([*op.places, *self.tuning, "recording"])}

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def check_tuning(self, name: str, value) -> None:
        """KernelError unless the route has this tuning number and takes this value."""
        if name not in self.tuning:
            raise KernelError(f"{self.op.name}, {self}: no tuning number {name!r}, it has {', '.join(self.tuning) or 'none'}")
        if type(value) is not int or value < 1:
            raise KernelError(f"{self.op.name}, {self}: {name} must be an integer of at least 1, got {value!r}")

    def values(self, inputs: Sequence, params: Sequence, request, recording: bool) -> list:
        """What the route's functions may name, in the order of ``places``."""
        if not self.tuning:
            return [*inputs, *params, recording]
        chosen = request.tuning if request is not None else {}
        return [*inputs, *params, *(chosen.get(n, default) for n, default in self.tuning.items()), recording]


class Form(Route):
    """An algorithm in Tensor operators, or a primitive: array code whose gradient is a vjp."""

    kind, why = "form", "the default form"

    def __init__(self, op, name: str, function: Callable, primitive: bool = False, tuning: dict[str, int] | None = None):
        super().__init__(op, name, tuning)
        self.function, self.primitive, self.vjp = function, primitive, None
        self._call = reader(function, self.places, f"{op.name}, {self}")
        self._kept_inputs, self._kept_params, self._keeps_outputs = [], [], False  # what the vjp names of the call ...
        self._derived: dict[str, Callable] = {}  # ... and of the node: functions of (node, gradients)

    def differentiate_by(self, vjp: Callable) -> None:
        """State the gradient of this primitive."""
        op = self.op
        known = {"needs": needs, "shapes": lambda node, grads: node.shapes}
        known |= {f"{name}_shape": lambda node, grads, i=i: node.shapes[i] for i, name in enumerate(op.floats)}
        known |= {name: lambda node, grads, i=i: grads[i] for name, i in op.gradients.items()}
        if "g" in known:
            known["g"] = lambda node, grads: grads if len(grads) > 1 else grads[0]
        allowed = [*self.places, "out", *known]
        reader(vjp, {name: i for i, name in enumerate(allowed)}, f"{op.name}, vjp of {self}")
        named = [p.name for p in inspect.signature(vjp).parameters.values()]
        kept = [(n, self.places[n]) for n in named if n in self.places]
        self._kept_inputs = [(n, place) for n, place in kept if place < len(op.signature.inputs)]
        self._kept_params = [(n, place) for n, place in kept if place >= len(op.signature.inputs)]
        self._keeps_outputs = "out" in named
        self._derived = {n: known[n] for n in named if n in known}
        self.vjp = vjp

    def reason_against(self, arrays, params, recording) -> None:
        """A form runs everywhere."""

    def reason_to_defer(self, arrays, params) -> None:
        """A form stands back for none."""

    @property
    def differentiable(self) -> bool:
        """Whether it has a gradient."""
        return not self.primitive or self.vjp is not None

    def run(self, tensors, arrays, params, request, recording):
        """Compute, and record a node if a gradient will be wanted."""
        op = self.op
        if not self.primitive:
            result = self._call(self.values(op.packed(tensors), params, request, recording))
            return op.made_by(self, result)
        values = self.values(op.packed(arrays), params, request, recording)
        result = op.broadcast(self._call, values, arrays)
        if not recording:
            return op.wrap(result, tensors)
        saved, versions = {}, []
        for name, place in self._kept_inputs:
            saved[name] = value = op.packed(tensors)[place]
            versions += [(t.version, t.version[0], name) for t in (value if op.variadic else [value]) if isinstance(t, Tensor)]
        for name, place in self._kept_params:
            saved[name] = _frozen(values[place])
        if self._keeps_outputs:
            saved["out"] = [unscalar(o) for o in result] if type(result) is tuple else [unscalar(result)]
        node = op.record(self, tensors, arrays, result, saved, versions)
        return op.wrap(result, tensors, node, self._keeps_outputs)

    def differentiate(self, node, saved, grads, create_graph):
        """The vjp's gradients, one for each float input."""
        if self.vjp is None:
            raise GraphError(f"{node.op.name} has no gradient: {self} has no vjp")
        if len(grads) > 1:
            example = next(g for g in grads if g is not None)
            grads = [zeros(example, *like) if g is None else g for g, like in zip(grads, node.outputs, strict=True)]
        values = dict(saved)  # what is saved may be needed again
        for name, derive in self._derived.items():
            values[name] = derive(node, grads)
        if "out" in saved:
            outs = [Tensor.wrap(array, node=node if create_graph else None, index=i) if array.dtype.kind in "fc" else array
                    for i, array in enumerate(saved["out"])]
            values["out"] = outs if len(outs) > 1 else outs[0]
        result = self.vjp(**values)
        return result if type(result) in (tuple, list) else (result,)


class Kernel(Route):
    """A fused forward and backward for one device, in a module that is imported at the first call."""

    kind, why = "kernel", "the fused kernel of this device"

    def __init__(self, op, device: str, name: str | None, module: str | None, prefix: str, tuning, sizes):
        if device not in DEVICES:
            raise KernelError(f"{op.name}: no kernels for the device {device!r}, allowed: {', '.join(DEVICES)}")
        super().__init__(op, f"{device} {name}" if name else device, tuning)
        self.device, self.prefix, self.sizes = device, prefix, dict(sizes or {})
        package = sys.modules[op.definition.__module__].__package__  # the folder of the page
        self.module = module or ".".join(filter(None, [package, DEVICES[device]]))
        self._loaded: dict[str, Callable | None] = {}
        self._off: str | None = None
        self._asks = False  # whether backward names ``needs``

    def function(self, name: str) -> Callable | None:
        """The module's function forward, backward, supports or defers, without the prefix; None where there is none."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not self.module.startswith(error.name):
                raise
            raise KernelError(f"{self.op.name}, {self}: there is no module {self.module!r}; its functions stand in "
                              f"{DEVICES[self.device]}.py beside the operator's page, or where module=... says") from error
        return getattr(module, self.prefix + name, None)

    def _get(self, name: str) -> Callable | None:
        """The same as a function of a list of values; at the first use all are read, and what names nothing is an error."""
        if not self._loaded:
            self._off = self._compiler_off()
            if self._off:  # without it the module may not even be imported
                return None
            gradients = {"saved": 0, "needs": 1, **{name: i + 2 for name, i in self.op.gradients.items()}}
            loaded, note = {}, "; it sees inputs and parameters through saved only"
            for function in ("forward", "backward", "supports", "defers"):
                where = f"{self.op.name}, {self}, {self.prefix}{function}"
                kernel = self.function(function)
                if kernel is not None and function == "backward":
                    self._asks = "needs" in inspect.signature(kernel).parameters
                    kernel = reader(kernel, gradients, where, note=note)
                elif kernel is not None:
                    kernel = reader(kernel, self.places, where, len(self.op.signature.inputs))
                loaded[function] = kernel
            if loaded["forward"] is None:
                raise KernelError(f"{self.op.name}, {self}: the module {self.module} has no function {self.prefix}forward")
            self._loaded = loaded
        return self._loaded[name]

    def _compiler_off(self) -> str | None:
        if self.device != "cpu":
            return None
        from .cpu.compile import unavailable

        return unavailable()

    @property
    def differentiable(self) -> bool:
        """Whether it has a backward."""
        return self._get("backward") is not None

    def reason_against(self, arrays, params, recording) -> str | None:
        """Why this kernel cannot run on these arrays, or None."""
        if switches().complex_step:
            return "complex arrays pass only through forms"
        for array in arrays:
            if array is not None:  # all lie on one device
                if device_name(array) != self.device:
                    return f"runs on {self.device} arrays, got {device_name(array)} arrays"
                break
        return self.unsupported(arrays, params, recording)

    def unsupported(self, arrays, params, recording) -> str | None:
        """The same on arrays of any device."""
        for argument, array in zip(self.op.signature.inputs, arrays, strict=True) if self.sizes else ():
            for axis, letter in enumerate(argument.dims, -len(argument.dims)):
                size = self.sizes.get(letter)
                if array is not None and size is not None and array.shape[axis] != size:
                    return f"needs {letter} = {size}, got {array.shape[axis]}"
        supports = self._get("supports")
        if self._off:
            return self._off
        if recording and self._loaded["backward"] is None:
            return "it has no backward, and a gradient is wanted"
        return self._reason("supports", arrays, params, recording) if supports else None

    def reason_to_defer(self, arrays, params) -> str | None:
        """Why another candidate had better run, or None."""
        return self._reason("defers", arrays, params, False) if self._get("defers") else None

    def _reason(self, name: str, arrays, params, recording) -> str | None:
        reason = self._get(name)(self.values(self.op.packed(arrays), params, None, recording))
        if reason is not None and not isinstance(reason, str):
            raise KernelError(f"{self.op.name}, {self}, {self.prefix}{name}: returned {reason!r}, it returns a reason or None")
        return reason

    def run(self, tensors, arrays, params, request, recording):
        """Compute, and record a node if a gradient will be wanted."""
        op = self.op
        returned = self._get("forward")(self.values(op.packed(arrays), params, request, recording))
        if type(returned) is not tuple or len(returned) != 2:
            raise KernelError(f"{op.name}, {self}, {self.prefix}forward: returned {_described(returned)}; it returns (outputs, "
                              "saved)")
        result, saved = returned
        if not recording:
            return op.wrap(result, tensors)
        versions = [(t.version, t.version[0], a.name) for t, a in zip(tensors, op.arguments(tensors), strict=True)
                    if isinstance(t, Tensor)]
        node = op.record(self, tensors, arrays, result, (saved,), versions)
        return op.wrap(result, tensors, node, True)

    def differentiate(self, node, saved, grads, create_graph):
        """The kernel's gradients, one for each float input."""
        if create_graph:
            names = " or ".join(f"form={name!r}" for name in node.op.forms)
            raise GraphError(
                f"{node.op.name}: the fused {self.name} kernel has no second derivative; "
                f"compute the output under use({node.op.name!r}, {names})"
            )
        arrays = [None if g is None else g.data for g in grads]
        if len(node.op.signature.outputs) == 1 < len(arrays):
            arrays = [arrays]
        backward = self._get("backward")
        results = backward([saved[0], needs(node) if self._asks else None, *arrays])
        if type(results) not in (tuple, list):
            raise KernelError(f"{node.op.name}, {self}, {self.prefix}backward: returned {_described(results)}; it returns a "
                              f"tuple of one gradient for each of {', '.join(node.op.floats)}")
        return [None if r is None else Tensor.wrap(unscalar(r)) for r in results]


def needs(node, grads=None):
    """The names of the inputs that want a gradient; for a variadic operator a flag for each."""
    if node.op.variadic:
        return [place is not None for place in node.parents]
    return frozenset([name for name, place in zip(node.op.floats, node.parents, strict=True) if place is not None])


def _described(value) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{len(value)} values" if type(value) in (tuple, list) else kind


def _frozen(value):
    """A parameter with its arrays and lists copied, so that changing them later does not change the gradient."""
    if isinstance(value, tuple | list):
        return type(value)(_frozen(v) for v in value)
    return value.copy() if hasattr(value, "dtype") else value
