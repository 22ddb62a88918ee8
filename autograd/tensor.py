"""Tensor: an array, its gradient, and the node that made it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np

from .cpu.process import free_in_forks
from .device import FLOATS, is_cupy, location, move, namespace, plain, read, to_numpy, unscalar
from .errors import DtypeError, GraphError, ShapeError
from .node import Sum, key, place_of, walk
from .registry import REGISTRY
from .state import Switch, switches

_adding = free_in_forks()


def _comparison(name: str) -> Callable:
    def compare(self, other):
        if isinstance(other, list | tuple | np.ndarray):
            other = plain(other, name)
        elif isinstance(other, Tensor):
            other = other.data
        elif not isinstance(other, np.generic | int | float) and not is_cupy(other):
            return NotImplemented
        return getattr(namespace(self.data), name)(self.data, other)

    return compare


class Tensor:
    """A float32 or float64 array that can be differentiated through.

    ``Tensor(x)`` copies a list, a NumPy array or a CuPy array and keeps its dtype; integer and boolean data are not
    differentiable and stay plain arrays. The array ``data`` is immutable by contract: ``numpy()`` is a read-only view,
    and ``assign_`` is the one way to change it. Operators add themselves as methods, ``x + y`` and ``x.sum()`` among them
    (``method=`` in their declarations).
    """

    __slots__ = ("__weakref__", "data", "grad", "index", "node", "requires_grad", "version")
    __array_ufunc__ = None  # ndarray * Tensor calls Tensor.__rmul__ once, not once per element

    data: np.ndarray
    grad: Tensor | None

    def __init__(self, data, *, dtype=None, requires_grad: bool = False):
        data = data.data if isinstance(data, Tensor) else plain(data, "Tensor: the data")
        array = namespace(data).array(data, dtype=dtype, copy=True)
        if array.dtype not in FLOATS and not (switches().complex_step and array.dtype.kind == "c"):
            raise DtypeError(
                f"Tensor: dtype {array.dtype} is not differentiable, allowed: float32, float64. "
                "Pass dtype=np.float32 to convert; keep ids, labels and masks as plain arrays"
            )
        self.data, self.grad = array, None
        self.node, self.index = None, 0  # the recorded call that made it, and which output it is
        self.requires_grad = requires_grad
        self.version = [0]  # counts updates in place; views share it

    @classmethod
    def wrap(cls, array, requires_grad: bool = False, node=None, index: int = 0) -> Tensor:
        """A Tensor around this very array, without a copy: the caller promises not to write to it.

        With a node it is the output ``index`` of that recorded call.
        """
        tensor = cls.__new__(cls)
        tensor.data, tensor.grad = array, None
        tensor.node, tensor.index = node, index
        tensor.requires_grad = requires_grad or node is not None
        tensor.version = [0]
        return tensor

    # -- the array ---------------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """Where the values lie: "cpu" or "cuda:0"."""
        return location(self.data)

    def to(self, device: str) -> Tensor:
        """This tensor if it lies on "cpu", "cuda" (the current card) or "cuda:1", else a copy there; differentiable."""
        return self if move(self.data, device) is self.data else REGISTRY["to_device"](self, device=device)

    def cpu(self) -> Tensor:
        """``to("cpu")``."""
        return self.to("cpu")

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array: a read-only view on the CPU, a copy from a GPU."""
        array = to_numpy(self.data)
        view = array.view()
        view.flags.writeable = False
        return view

    def item(self) -> float:
        """The one value as a Python float; more than one raises ShapeError."""
        if self.size != 1:
            raise ShapeError(f"item() needs one element, this tensor has shape {self.shape}")
        return read(self.data)[0]

    __float__ = item

    def __int__(self) -> int:
        return int(self.item())

    def __format__(self, spec: str) -> str:
        """The one value by a format such as ".3f"; without a format, what str() gives."""
        return format(self.item(), spec) if spec else str(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return (self[i] for i in range(self.shape[0]))

    def __repr__(self) -> str:
        text = np.array2string(to_numpy(self.data), separator=", ", prefix="Tensor(")
        made_by = f", op={self.node.op.name}" if self.node is not None else ""
        flag = ", requires_grad=True" if self.requires_grad and self.node is None else ""
        place = f", device={self.device!r}" if is_cupy(self.data) else ""
        return f"Tensor({text}, dtype={self.dtype}{place}{flag}{made_by})"

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad and switches().recording:
            raise GraphError("a tensor that requires a gradient is not converted to an array silently: use .numpy()")
        if copy is False and (dtype is not None and np.dtype(dtype) != self.dtype):
            raise ValueError("a conversion of dtype needs a copy")
        return self.numpy() if dtype is None and not copy else np.array(self.numpy(), dtype=dtype)

    def __setitem__(self, key, value):
        raise GraphError(
            "tensors are immutable: t[i] = v would change values that backward needs. "
            "Use where(mask, v, t), concat, scatter_add, or fill a NumPy array before Tensor(array)"
        )

    __hash__ = object.__hash__

    # -- the graph ---------------------------------------------------------------------------------------------------
    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operator made this tensor."""
        return self.node is None

    def requires_grad_(self, flag: bool = True) -> Tensor:
        """Switch the gradient of this leaf on or off, and return the tensor."""
        if self.node is not None:
            raise GraphError("requires_grad_() is for leaves: this tensor was made by " + self.node.op.name)
        self.requires_grad = bool(flag)
        return self

    def detach(self) -> Tensor:
        """The same values outside the graph. Shares memory: an ``assign_`` to one is seen, and noticed, by the other."""
        tensor = Tensor.wrap(self.data)
        tensor.version = self.version
        return tensor

    def retain_grad(self) -> Tensor:
        """Keep the gradient of this intermediate tensor in ``.grad`` at the next backward."""
        if not self.requires_grad:
            raise GraphError("retain_grad() on a tensor that requires no gradient")
        if self.node is not None:
            self.node.retained = {**(self.node.retained or {}), self.index: weakref.ref(self)}
        return self

    def assign_(self, values) -> Tensor:
        """Overwrite the values in place (same shape and dtype); a graph that saved the old ones will refuse backward."""
        values = values.data if isinstance(values, Tensor) else namespace(self.data).asarray(plain(values, "assign_: values"))
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ShapeError(
                f"assign_: needs shape {self.shape} and dtype {self.dtype}, got {values.shape} and {values.dtype}"
            )
        _unlocked(self.data)[...] = values
        self.version[0] += 1
        return self

    def accumulate(self, grad: Tensor) -> None:
        """Add to ``.grad``. The sum is a new array, so a gradient somebody else holds never changes."""
        with _adding:  # threads may share a leaf
            self.grad = Tensor(grad.data) if self.grad is None else Tensor.wrap(unscalar(self.grad.data + grad.data))

    def backward(self, seed=None, *, retain: bool = False, sink: Callable | None = None) -> None:
        """Add the gradient of this tensor (times ``seed``) to ``.grad`` of every leaf that requires one.

        A scalar needs no seed; any other shape needs one of its own shape and dtype. The graph is released on the way:
        a second backward raises unless the first had ``retain=True``. ``sink(leaf, gradient)`` receives the leaf
        gradients instead of ``.grad``.
        """
        if not self.requires_grad:
            raise GraphError("backward() on a tensor that does not depend on anything that requires a gradient")
        leaves: dict[int, tuple[Tensor, Sum]] = {}
        retained: list[tuple[Tensor, Tensor]] = []

        def receive(place, gradient):
            if type(place) is not tuple:
                if sink is not None:
                    sink(place, gradient)
                else:
                    leaves.setdefault(id(place), (place, Sum()))[1].add(gradient)
            elif place[0].retained and (tensor := place[0].retained.get(place[1], _nothing)()) is not None:
                retained.append((tensor, gradient))

        walk([(place_of(self), _seed("backward", self, seed))], receive, retain=retain)
        for tensor, total in leaves.values():  # after everything has succeeded
            tensor.accumulate(total.value)
        for tensor, gradient in retained:
            tensor.accumulate(gradient)

    def __deepcopy__(self, memo) -> Tensor:
        if self.node is not None:
            raise GraphError("copying a tensor would copy its graph: use detach() first")
        copy = memo[id(self)] = _rebuild(type(self), self.data, self.requires_grad)
        return copy

    def __reduce__(self):
        if self.node is not None:
            raise GraphError("pickling a tensor would pickle its graph: use detach() first")
        return _rebuild, (type(self), self.data, self.requires_grad)

    # Comparisons return plain boolean arrays: they carry no gradient. Hence `in` and list.index do not work on tensors.
    __eq__, __ne__ = _comparison("equal"), _comparison("not_equal")
    __lt__, __le__ = _comparison("less"), _comparison("less_equal")
    __gt__, __ge__ = _comparison("greater"), _comparison("greater_equal")

    @property
    def T(self) -> Tensor:
        """The last two axes swapped."""
        return REGISTRY["swapaxes"](self, -1, -2)

    def reshape(self, *shape) -> Tensor:
        """The same elements in another shape, given as a tuple or as numbers; one size may be -1."""
        return REGISTRY["reshape"](self, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)

    def transpose(self, *axes) -> Tensor:
        """The axes in another order, given as a tuple or as numbers; reversed without any."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes or None
        return REGISTRY["transpose"](self, order)


def _nothing():
    return None


def _rebuild(kind, data, requires_grad):
    return kind.wrap(namespace(data).array(data), requires_grad)


def _unlocked(array):
    """The array, writeable again if only check mode made it read-only."""
    if type(array) is np.ndarray and not array.flags.writeable and 0 not in array.strides:
        with contextlib.suppress(ValueError):  # a file that is mapped to be read only, for example
            if isinstance(array.base, np.ndarray):
                array.base.flags.writeable = True
            array.flags.writeable = True
    return array


def _seed(name: str, tensor: Tensor, seed) -> Tensor:
    xp = namespace(tensor.data)
    if seed is None:
        if tensor.shape != ():
            raise GraphError(f"{name}: the output has shape {tensor.shape}, only a scalar needs no seed; pass one")
        return Tensor.wrap(xp.ones((), tensor.dtype))
    if not isinstance(seed, Tensor):
        if isinstance(seed, int | float) and not isinstance(seed, np.generic | bool):
            seed = xp.asarray(seed, tensor.dtype)
        seed = Tensor(seed)
    if seed.shape != tensor.shape or seed.dtype != tensor.dtype:
        raise GraphError(
            f"{name}: the seed has shape {seed.shape} and dtype {seed.dtype}, "
            f"the output has shape {tensor.shape} and dtype {tensor.dtype}"
        )
    return seed


def gradients(outputs, inputs, seeds=None, *, create_graph: bool = False, retain: bool = False) -> list[Tensor]:
    """The gradients of ``outputs`` (times ``seeds``) with respect to ``inputs``, without touching any ``.grad``.

    ``inputs`` may be leaves or intermediate tensors; one that is not reached gets zeros. With ``create_graph`` the
    results can be differentiated again; fused kernels refuse that and name the form to use.
    """
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if not isinstance(inputs, tuple | list):
        raise TypeError(f"gradients: inputs must be a list or tuple of Tensors, got {type(inputs).__name__}")
    for x in (*outputs, *inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"gradients: outputs and inputs must be Tensors, got {type(x).__name__}")
    seeds = list(seeds) if isinstance(seeds, tuple | list) else [seeds] * len(outputs)
    if len(seeds) != len(outputs):
        raise GraphError(f"gradients: got {len(seeds)} seeds for {len(outputs)} outputs")
    starts = [_seed("gradients", o, s) for o, s in zip(outputs, seeds, strict=True)]
    if not create_graph:
        starts = [s.detach() for s in starts]
    reached = [(place_of(o), s) for o, s in zip(outputs, starts, strict=True) if o.requires_grad]
    sums = {key(place_of(x)): Sum() for x in inputs}

    def receive(place, gradient):
        if key(place) in sums:
            sums[key(place)].add(gradient, create_graph)

    walk(reached, receive, retain=retain, create_graph=create_graph, targets=sums.keys())
    results = [sums[key(place_of(x))].value for x in inputs]
    return [Tensor.wrap(namespace(x.data).zeros_like(x.data)) if g is None else g if create_graph else Tensor(g.data)
            for x, g in zip(inputs, results, strict=True)]


def grad(f: Callable, argument: int | tuple[int, ...] = 0, *, create_graph: bool | None = None) -> Callable:
    """The function that returns the gradient of the scalar function ``f`` with respect to the given argument(s).

    ``grad(grad(f))`` is the second derivative. Arrays passed as differentiated arguments become Tensors. The result is
    itself differentiable when an outer ``grad`` is active or an argument requires a gradient; ``create_graph`` decides
    otherwise (needed when ``f`` closes over a tensor with respect to which the result is differentiated later).
    """
    positions = (argument,) if isinstance(argument, int) else tuple(argument)

    @wraps(f)
    def gradient(*args, **kwargs):
        args = list(args)
        for position in positions:
            if not -len(args) <= position < len(args):
                raise TypeError(f"grad: argument {position} was not given ({len(args)} positional arguments)")
        state = switches()
        outer = state.recording and (state.depth > 0 or any(isinstance(a, Tensor) and a.requires_grad for a in args))
        with Switch(recording=True, depth=state.depth + 1):
            for position in positions:
                x = args[position]
                connected = isinstance(x, Tensor) and x.requires_grad
                args[position] = REGISTRY["identity"](x) if connected else Tensor(x, requires_grad=True)
            output = f(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise GraphError(f"grad: the function returned {type(output).__name__}, not a Tensor")
            inputs = [args[p] for p in positions]
            results = gradients(output, inputs, create_graph=outer if create_graph is None else create_graph)
        return results[0] if isinstance(argument, int) else tuple(results)

    return gradient

