"""Building blocks with parameters: Module, Parameter, Buffer, Linear, Embedding, norms and Dropout.

A module has no training flag: randomness is an argument. ``module(x, rng)`` drops values, ``module(x)`` does not.

A training step begins with ``model.begin_step(step, rng)``, which draws random buffers anew. What modules count while they run,
for running statistics, is collected by ``Statistics``, which changes buffers once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

import numpy as np
import safetensors.numpy

from autograd import (
    Tensor,
    dropout,
    embedding,
    gelu,
    gelu_tanh,
    layer_norm,
    linear,
    relu,
    relu_squared,
    rms_norm,
    silu,
    to_numpy,
)
from autograd.device import beside, move, namespace
from autograd.errors import ShapeError
from autograd.random import Random
from autograd.reversible import replaying

from . import room
from .options import ModelOptions

M = TypeVar("M", bound="Module")
T = TypeVar("T", bound=Tensor)

ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "relu_squared": relu_squared,
                                    "silu": silu}


class Parameter(Tensor):
    """A leaf tensor that an optimiser updates."""

    __slots__ = ()

    def __init__(self, data, *, dtype=None):
        super().__init__(data, dtype=dtype, requires_grad=True)


class Buffer(Tensor):
    """An array that a module computes with: moved, saved and restored like a parameter, and not optimised.

    ``saved=False`` is for what follows from the options alone, such as a table: it is not in checkpoints.
    """

    __slots__ = ("saved",)

    def __init__(self, data, *, dtype=None, saved: bool = True):
        super().__init__(data, dtype=dtype)
        self.saved = saved

    def __deepcopy__(self, memo) -> Buffer:
        copy = memo[id(self)] = Buffer(self.data, saved=self.saved)
        return copy

    def __reduce__(self):
        return _buffer, (self.data, self.saved)


def _buffer(data, saved: bool) -> Buffer:
    return Buffer(data, saved=saved)


class Module:
    """A part of a network: its parameters, buffers and modules are its attributes, or stand in lists that are."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every distinct parameter once, with its dotted name, in the order of declaration; tied ones come once."""
        return ((name, array) for name, array in self._arrays() if isinstance(array, Parameter))

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """The same of buffers."""
        return ((name, array) for name, array in self._arrays() if isinstance(array, Buffer))

    def modules(self) -> Iterator[Module]:
        """The module and all inside it, each once, in the order of declaration."""
        return (value for _, value in self._walk() if isinstance(value, Module))

    def members(self) -> Iterator[tuple[str, Any]]:
        """Names and values in which parameters, buffers and modules are looked for."""
        for name, value in vars(self).items():
            if isinstance(value, list | tuple):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value)
                            if isinstance(item, Module | Parameter | Buffer))
            else:
                yield name, value

    def _walk(self) -> Iterator[tuple[str, Module | Parameter | Buffer]]:
        identities: set[int] = set()

        def visit(name: str, value: Any):
            if isinstance(value, Module | Parameter | Buffer) and id(value) not in identities:
                identities.add(id(value))
                yield name, value
                if isinstance(value, Module):
                    for inner, member in value.members():
                        yield from visit(f"{name}.{inner}" if name else inner, member)

        return visit("", self)

    def _arrays(self, saved: bool = False) -> Iterator[tuple[str, Parameter | Buffer]]:
        """All parameters and buffers, or those that are saved."""
        for name, value in self._walk():
            if not isinstance(value, Module) and not (saved and isinstance(value, Buffer) and not value.saved):
                yield name, value

    def parameters(self) -> list[Parameter]:
        """Every distinct parameter once."""
        return [p for _, p in self.named_parameters()]

    def saved(self) -> dict[str, Parameter | Buffer]:
        """What ``state`` copies, by name."""
        return dict(self._arrays(saved=True))

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and saved buffers by name, as NumPy arrays."""
        return {name: np.array(to_numpy(array.data)) for name, array in self.saved().items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite all that ``state`` gives in place; names and shapes must match exactly (ShapeError lists what does not)."""
        targets = self.saved()
        wrong = [f"{n} is missing" for n in targets if n not in arrays]
        wrong += [f"{n} is unknown" for n in arrays if n not in targets]
        wrong += [f"{n} has shape {arrays[n].shape}, expected {p.shape}" for n, p in targets.items()
                  if n in arrays and arrays[n].shape != p.shape]
        if wrong:
            raise ShapeError("load: " + "; ".join(wrong))
        for name, array in targets.items():
            array.assign_(arrays[name].astype(array.dtype, copy=False))

    def to(self: M, device: str) -> M:
        """Move all arrays to "cpu", "cuda" (the current card) or "cuda:1", forget gradients, and return the module.

        An optimiser made before holds on to the old ones.
        """
        for _, array in self._arrays():
            array.data, array.grad = move(array.data, device), None
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def redraw(self, step: int, rng: Random) -> None:
        """Called before every training step: a module with random buffers may draw them anew by ``rng``, which is its own.

        Between two draws the buffers keep their values, also in a checkpoint.
        """

    def begin_step(self, step: int, rng: Random) -> None:
        """``redraw`` of the module and of all inside it, each with a random source that depends on the step and its place."""
        for i, module in enumerate(self.modules()):
            if type(module).redraw is not Module.redraw:
                module.redraw(step, rng.split(step, i))

    def about(self) -> list[tuple[str, str]]:
        """Lines (label, text) about a model at the beginning of a run, besides its name and size; none by default."""
        return []

    def readings(self) -> dict[str, float]:
        """Numbers of this module alone, by name, that a run writes down at every evaluation and draws; none by default."""
        return {}

    def all_readings(self) -> dict[str, float]:
        """Those of the module and of all inside it, by dotted names."""
        return {f"{place}.{name}": value for place, module in self._walk() if isinstance(module, Module)
                for name, value in module.readings().items()}

    def add_statistics(self, *sums) -> None:
        """Called once after a training step in which the module called ``gather``, with the totals of the whole step."""
        raise NotImplementedError(f"{type(self).__name__} gathers statistics and does not say what becomes of them")


_gathering: ContextVar[dict[Module, tuple] | None] = ContextVar("the sums of this micro-batch", default=None)


class Statistics:
    """What modules count over a training step, the same for one worker and for many.

        statistics = Statistics()
        with statistics.part(i):      # micro-batch i, in any thread: its forward and its backward pass
            ...
        statistics.apply()            # once, after the update

    In its call a module gives sums over a micro-batch to ``gather``; ``apply`` adds them up in the order of micro-batches, and
    gives each module its totals by ``add_statistics``. So buffers stay as they are while a step goes on, and how the step was
    divided changes rounding only.
    """

    def __init__(self) -> None:
        self._parts: dict[int, dict[Module, tuple]] = {}

    @contextmanager
    def part(self, index: int) -> Iterator[None]:
        """Gather what modules count inside as that of micro-batch ``index``."""
        self._parts[index] = {}
        token = _gathering.set(self._parts[index])
        try:
            yield
        finally:
            _gathering.reset(token)

    def encoded(self, modules: list[Module]) -> bytes:
        """What was counted here, for another rank, whose model has the same modules in the same order."""
        places = {module: place for place, module in enumerate(modules)}
        arrays = {f"{index} {places[module]} {k}": to_numpy(np.asarray(value) if np.isscalar(value) else value)
                  for index, sums in self._parts.items() for module, values in sums.items() for k, value in enumerate(values)}
        return safetensors.numpy.save({name: np.ascontiguousarray(array).reshape(array.shape)
                                       for name, array in arrays.items()})

    def decode(self, content: bytes, modules: list[Module], like: Any) -> None:
        """Add what another rank has ``encoded``, as arrays that lie where ``like`` does; what was counted here stays."""
        parts: dict[int, dict[Module, dict[int, Any]]] = {}
        for name, array in safetensors.numpy.load(content).items():
            index, place, k = map(int, name.split())
            parts.setdefault(index, {}).setdefault(modules[place], {})[k] = beside(array, like)
        for index, sums in parts.items():
            counted = {module: tuple(values[k] for k in sorted(values)) for module, values in sums.items()}
            self._parts.setdefault(index, counted)

    def apply(self) -> None:
        """Give each module the sums of the step."""
        totals: dict[Module, tuple] = {}
        for _, sums in sorted(self._parts.items()):
            for module, values in sums.items():
                _add(totals, module, values)
        self._parts.clear()
        for module, values in totals.items():
            module.add_statistics(*values)


def training() -> bool:
    """Whether this is a part of a training step, its forward or its backward pass."""
    return _gathering.get() is not None


def gather(module: Module, *sums) -> None:
    """Count numbers or arrays for ``module.add_statistics``: sums over the micro-batch that is trained on.

    Outside a training step nothing is counted, nor when a reversible stack computes a layer again.
    """
    gathered = _gathering.get()
    if gathered is not None and not replaying():
        _add(gathered, module, sums)


def _add(totals: dict[Module, tuple], module: Module, values: tuple) -> None:
    before = totals.get(module)
    totals[module] = values if before is None else tuple(a + b for a, b in zip(before, values, strict=True))


_undrawn: ContextVar[bool] = ContextVar("whether a checkpoint will be loaded into what is made", default=False)


@contextmanager
def undrawn() -> Iterator[None]:
    """Modules that are made inside have zeros for first weights, which take no time, and no memory until ``load``."""
    token = _undrawn.set(True)
    try:
        yield
    finally:
        _undrawn.reset(token)


def made(kind: type[T], shape: tuple[int, ...], dtype, make: Callable[[], np.ndarray], **kwargs: Any) -> T:
    """A parameter or a buffer [shape] of the new array that ``make()`` gives; UserError if the machine cannot hold it.

    Inside ``undrawn`` what is saved is 0, because a checkpoint will be loaded.
    """
    tensor = kind(np.zeros((), dtype), **kwargs)
    if _undrawn.get() and getattr(tensor, "saved", True):
        def make() -> np.ndarray:
            return np.zeros(shape, dtype)
    tensor.data = room.array(shape, dtype, make)
    return tensor


def normal(rng: Random, shape: tuple[int, ...], std: float, dtype) -> Parameter:
    """A parameter drawn from N(0, std²)."""
    return made(Parameter, shape, dtype, lambda: rng.normal(shape, np.float64) * std)


def uniform(rng: Random, shape: tuple[int, ...], bound: float, dtype) -> Parameter:
    """A parameter drawn from [-bound, bound)."""
    return made(Parameter, shape, dtype, lambda: (2 * rng.uniform(shape, np.float64) - 1) * bound)


def full(shape: tuple[int, ...], value: float, dtype) -> Parameter:
    """A parameter that starts from one value everywhere."""
    return made(Parameter, shape, dtype, lambda: np.full(shape, value, dtype))


class Stateful(Module):
    """What stands in a block: a mixer of positions or of channels, x[B T D] -> y[B T D] by ``module(x, rng)``.

    A causal one can also read a sequence in parts: ``init_state(batch)`` is the state before it, and ``prefill(x, state)``
    gives y[B T D] of a segment and the state after it. States are values. Prefill over any split is the call; a step of
    writing is a prefill of one position. Constructors are ``(rng, model, options, layer, dtype)``.
    """

    bounded: ClassVar[bool] = False  # whether it reads no further than the context
    pointwise: ClassVar[bool] = False  # whether a position of y depends on that position of x alone, and there is no state
    shared: ClassVar[bool] = False  # whether all layers have one object in common
    without_rope: ClassVar[str | None] = "it has no products of queries and keys"  # why not; None: the model may ask for it
    without_alibi: ClassVar[str | None] = "it has no scores that a softmax takes"  # the same

    @classmethod
    def of_layer(cls, options, layer: int) -> type[Stateful] | None:
        """The class in a layer, where not all layers are alike; None: the layer has none."""
        return cls

    def join(self, first: Stateful) -> None:
        """Take over what all layers share from the module of the first layer, which may be this one."""

    def constant(self, value: float, *shape: int) -> Tensor:
        """An array for a state, of the dtype of the module's parameters or buffers, and where they lie."""
        data = next((array.data for _, array in self._arrays()), None)
        if data is None:
            raise TypeError(f"{type(self).__name__} has no parameter and no buffer that says of which dtype its state is")
        return Tensor(namespace(data).full(shape, value, data.dtype))


class Linear(Module):
    """y = x Wᵀ + b with W[out, in] from N(0, std²), or uniform up to ``bound`` if that is given, and b = 0."""

    def __init__(self, rng: Random, inputs: int, outputs: int, *, std: float = 0.0, bound: float | None = None,
                 bias: bool = True, dtype=np.float32):
        shape = outputs, inputs
        self.weight = normal(rng, shape, std, dtype) if bound is None else uniform(rng, shape, bound, dtype)
        self.bias = full((outputs,), 0, dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a table W[vocab, width] from N(0, std²) by integer ids."""

    def __init__(self, rng: Random, vocab: int, width: int, *, std: float, dtype=np.float32):
        self.weight = normal(rng, (vocab, width), std, dtype)

    def __call__(self, ids: np.ndarray) -> Tensor:
        return embedding(self.weight, ids)


class LayerNorm(Module):
    """Rows to mean 0 and variance 1, times a gain that starts at 1, plus an offset that starts at 0."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-5, dtype=np.float32):
        self.weight = full((width,), 1, dtype)
        self.bias = full((width,), 0, dtype) if bias else None
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Module):
    """Rows divided by their root mean square, times a gain that starts at 1."""

    def __init__(self, width: int, *, bias: bool = False, eps: float = 1e-5, dtype=np.float32):
        self.weight = full((width,), 1, dtype)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


NORMS: dict[str, type[Module]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


def norm_of(model: ModelOptions, width: int, dtype: Any) -> Module:
    """The norm that a model's options ask for, of rows of ``width`` numbers."""
    return NORMS[model.norm](width, bias=model.bias, eps=model.norm_eps, dtype=dtype)


class Dropout(Module):
    """Values dropped with probability p when a random source is given, else the identity."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return x if rng is None or not self.p else dropout(x, p=self.p, seed=rng.seed)
