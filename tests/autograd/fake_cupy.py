"""A CuPy without a card, for tests: arrays that keep NumPy arrays inside and are as strict as CuPy's, or stricter.

    with fake_cupy.installed() as cupy: ...

Mixing with NumPy arrays raises, as do implicit conversions, keyword arguments and functions that CuPy does not have;
indices out of range wrap around silently; reductions give 0-d arrays; new memory is full of NaN. ``reads`` counts what
would make Python wait for the GPU. RawModule compiles and runs kernels in the emulator, and cuBLAS's strided batched
product works on raw memory, as the real one does. ``SIGNATURES`` is what the library may use of CuPy: a test compares it
with a real CuPy where one is installed, which needs no card.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import inspect
import sys
import types
from contextlib import contextmanager

import numpy as np
from scipy import fft, special

from tests.autograd import emulator

SIGNATURES = {
    "arange": "start, stop=None, step=1, dtype=None", "argsort": "a, axis=-1, kind=None", "array": "obj, dtype=None, copy=True",
    "asarray": "a, dtype=None", "ascontiguousarray": "a, dtype=None", "broadcast_to": "array, shape",
    "concatenate": "tup, axis=0", "cumprod": "a, axis=None", "cumsum": "a, axis=None", "empty": "shape, dtype=float",
    "empty_like": "prototype, dtype=None", "flip": "a, axis=None", "full": "shape, fill_value, dtype=None",
    "max": "a, axis=None, keepdims=False", "may_share_memory": "a, b", "min": "a, axis=None, keepdims=False",
    "ones": "shape, dtype=float", "pad": "array, pad_width, mode='constant', **kwargs",
    "prod": "a, axis=None, keepdims=False", "roll": "a, shift, axis=None", "searchsorted": "a, v, side='left'",
    "stack": "tup, axis=0", "sum": "a, axis=None, keepdims=False", "take": "a, indices, axis=None",
    "take_along_axis": "a, indices, axis", "where": "condition, x=None, y=None", "zeros": "shape, dtype=float",
    "zeros_like": "a, dtype=None",
}
UFUNCS = ("abs add cos equal exp greater greater_equal isfinite isinf isnan less less_equal log log1p logaddexp maximum "
          "minimum not_equal sign sin sqrt tanh").split()
METHODS = {
    "all": "axis=None, keepdims=False", "any": "axis=None, keepdims=False", "argmax": "axis=None, keepdims=False",
    "argsort": "axis=-1, kind=None", "astype": "dtype, order='K', copy=True", "conj": "", "copy": "order='C'",
    "max": "axis=None, keepdims=False", "min": "axis=None, keepdims=False", "sum": "axis=None, dtype=None, keepdims=False",
    "view": "dtype=None", "reshape": "*shape", "swapaxes": "axis1, axis2", "transpose": "*axes",
}
SCALARS = (bool, int, float, complex, np.generic, np.dtype, type, str, type(None), type(Ellipsis))

state = types.SimpleNamespace(reads=0, device=0, devices=2, mode="check", seed=0)


def _bare(value):
    """What NumPy computes with: the array inside, scalars, and sequences of those."""
    if isinstance(value, ndarray):
        return value._inside
    if isinstance(value, tuple | list):
        return type(value)(map(_bare, value))
    if isinstance(value, slice):
        return slice(*map(_bare, (value.start, value.stop, value.step)))
    if isinstance(value, SCALARS):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _arrays(value):
    if isinstance(value, tuple | list):
        return [x for item in value for x in _arrays(item)]
    return [value] if isinstance(value, ndarray) else []


def wrapped(result, device=None):
    """NumPy arrays as arrays of the card, without a copy, so that strides stay."""
    if isinstance(result, tuple):
        return tuple(wrapped(r, device) for r in result)
    return ndarray(np.asarray(result), state.device if device is None else device)


def _call(function, *arguments, **keywords):
    devices = {a._number for a in _arrays((arguments, tuple(keywords.values())))}
    if devices - {state.device}:
        raise ValueError(f"arrays on devices {devices}, the current one is {state.device}")
    return wrapped(function(*_bare(arguments), **{key: _bare(value) for key, value in keywords.items()}))


class ndarray:
    """Device memory that is a NumPy array."""

    __module__ = "cupy"

    __slots__ = ("__weakref__", "_inside", "_number")
    __hash__ = None

    def __init__(self, inside, number):
        assert type(inside) is np.ndarray
        self._inside, self._number = inside, number

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        if method == "__call__" and len(inputs) == 2 and isinstance(inputs[0], np.generic):
            return _call(ufunc, *inputs, **keywords)  # a NumPy scalar on the left
        raise TypeError("NumPy and CuPy arrays are mixed")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} was called with a CuPy array")

    shape = property(lambda self: self._inside.shape)
    ndim = property(lambda self: self._inside.ndim)
    size = property(lambda self: self._inside.size)
    dtype = property(lambda self: self._inside.dtype)
    strides = property(lambda self: self._inside.strides)
    itemsize = property(lambda self: self._inside.itemsize)
    nbytes = property(lambda self: self._inside.nbytes)
    flags = property(lambda self: self._inside.flags)
    T = property(lambda self: ndarray(self._inside.T, self._number))
    device = property(lambda self: Device(self._number))
    data = property(lambda self: types.SimpleNamespace(ptr=self._inside.ctypes.data, device_id=self._number))
    __cuda_array_interface__ = property(lambda self: {})

    def get(self):
        state.reads += 1
        return self._inside.copy()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __index__(self):
        raise TypeError("only integer scalar arrays can be converted to a scalar index")

    def tolist(self):
        return self.get().tolist()

    def item(self):
        return self.get().item()

    def __len__(self):
        return len(self._inside)

    def __getitem__(self, key):
        return _call(lambda a, k: np.asarray(a[_wrapping(k, a.shape)]), self, key)

    def __setitem__(self, key, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        self._inside[_wrapping(_bare(key), self.shape)] = _bare(value)


def _wrapping(key, shape):
    """The key with indices that count round and round, as CuPy has it for arrays of indices."""
    def axes(part):
        if part is None or part is Ellipsis:
            return 0
        return part.ndim if isinstance(part, np.ndarray) and part.dtype == np.bool_ else 1

    parts, places, axis = key if isinstance(key, tuple) else (key,), [], 0
    for part in parts:
        if isinstance(part, list):
            raise TypeError("a list as an index would be copied to the GPU at every call")
        if isinstance(part, np.ndarray) and part.dtype != np.bool_:
            part = part % max(shape[axis], 1)
        places.append(part)
        axis += len(shape) - sum(map(axes, parts)) if part is Ellipsis else axes(part)
    return tuple(places)


def _binary(name):
    def method(self, other):
        if not isinstance(other, ndarray | int | float | complex | np.generic):
            if isinstance(other, np.ndarray):
                raise TypeError("Unsupported type <class 'numpy.ndarray'>")
            return NotImplemented
        return _call(getattr(np.ndarray, name), self, other)

    return method


def _in_place(name):
    def method(self, other):
        if not isinstance(other, ndarray | int | float | np.generic):
            raise TypeError(f"Unsupported type {type(other)}")
        getattr(self._inside, name)(_bare(other))
        return self

    return method


for _name in ("add sub mul truediv pow floordiv mod and or xor matmul radd rsub rmul rtruediv rpow rmatmul eq ne lt le gt "
              "ge").split():
    setattr(ndarray, f"__{_name}__", _binary(f"__{_name}__"))
for _name in "iadd isub imul itruediv iand ior".split():
    setattr(ndarray, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in ("neg", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", lambda self, _n=f"__{_name}__": _call(getattr(np.ndarray, _n), self))


def _strict(name, signature, function):
    """A function that takes what the signature has and nothing else."""
    empty = {}
    exec(f"def {name}({signature}): pass", empty)
    signature = inspect.signature(empty[name])
    named = {p.name for p in signature.parameters.values() if p.default is not p.empty}  # NumPy has them in another order

    def strict(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        keywords = {key: given.arguments.pop(key) for key in named & given.arguments.keys()}
        return _call(function, *given.args, **given.kwargs, **keywords)

    return strict


for _name, _signature in METHODS.items():
    setattr(ndarray, _name, _strict(_name, f"self, {_signature}".rstrip(", "), lambda a, *args, _name=_name, **keywords:
                                    getattr(a, _name)(*args, **keywords)))


def _garbage(shape, dtype=float):
    made = np.empty(shape, dtype)
    made.reshape(-1).view(np.uint8)[...] = 0xFF
    return made


SPECIAL = {
    "empty": _garbage, "empty_like": lambda a, dtype=None: _garbage(a.shape, dtype or a.dtype),
    "take": lambda a, indices, axis=None: np.take(a, indices, axis, mode="wrap"),
    "take_along_axis": lambda a, indices, axis: np.take_along_axis(a, indices % max(a.shape[axis], 1), axis),
    "arange": lambda start, stop=None, step=1, dtype=None: np.arange(*((start,) if stop is None else (start, stop, step)),
                                                                     dtype=dtype),
    "where": lambda condition, x=None, y=None: np.where(condition, x, y),
}


def _array(a, dtype=None, copy=True):
    """array and asarray, which alone take arrays of the host."""
    bare = a if isinstance(a, np.ndarray) else _bare(a)
    if isinstance(a, ndarray) and a._number == state.device and not copy and bare.dtype == np.dtype(dtype or bare.dtype):
        return a
    return wrapped(np.array(bare, dtype))


class Device:
    """A card; ``with`` and ``use`` make it the current one."""

    def __init__(self, number=None):
        self.id = state.device if number is None else number
        if self.id >= state.devices:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def use(self):
        state.device = self.id
        return self

    def __enter__(self):
        self._before, state.device = state.device, self.id
        return self

    def __exit__(self, *_):
        state.device = self._before


class RawModule:
    """Kernels in the emulator."""

    def __init__(self, *, code, options=()):
        self._module = emulator.Module(code, options, state.mode, state.seed)

    def get_function(self, name):
        function = self._module.get_function(name)
        return lambda grid, block, args: function(grid, block, tuple(map(_bare, args)))


def _scatter_add(a, slices, value):
    np.add.at(a._inside, _wrapping(_bare(slices), a.shape), _bare(value))


def _strided_batched(handle, transposed_a, transposed_b, m, n, k, alpha, a, a_type, lda, a_step, b, b_type, ldb, b_step,
                     beta, c, c_type, ldc, c_step, count, compute, algorithm):
    """C = op(A) op(B) for matrices that lie in memory column by column, each ``step`` elements after the last."""
    assert a_type == b_type == c_type and handle == "handle"
    number, dtype = {0: (ctypes.c_float, np.float32), 1: (ctypes.c_double, np.float64)}[a_type]
    assert [ctypes.cast(p, ctypes.POINTER(number))[0] for p in (alpha, beta)] == [1, 0]

    def matrices(pointer, rows, columns, leading, step):
        assert leading >= max(rows, 1) and (count == 1 or step >= 0)
        span = (count - 1) * step + (columns - 1) * leading + rows
        flat = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(number)), (span,))
        size = np.dtype(dtype).itemsize
        return np.lib.stride_tricks.as_strided(flat, (count, rows, columns), (step * size, size, leading * size))

    left = matrices(a, *((k, m) if transposed_a else (m, k)), lda, a_step)
    right = matrices(b, *((n, k) if transposed_b else (k, n)), ldb, b_step)
    out = matrices(c, m, n, ldc, c_step)
    out[...] = np.matmul(left.swapaxes(1, 2) if transposed_a else left, right.swapaxes(1, 2) if transposed_b else right)


def _module(name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    return module


def _modules():
    functions = {name: _strict(name, signature, SPECIAL.get(name) or getattr(np, name))
                 for name, signature in SIGNATURES.items()}
    functions |= {name: _strict(name, "x, y" if getattr(np, name).nin == 2 else "x", getattr(np, name)) for name in UFUNCS}
    functions |= {"array": _array, "asarray": lambda a, dtype=None: _array(a, dtype, copy=False),
                  "may_share_memory": lambda a, b: np.may_share_memory(_bare(a), _bare(b))}  # by addresses: reads nothing
    properties = {"name": b"a GPU that is not there", "totalGlobalMem": 0, "major": 0, "minor": 0}
    runtime = _module("cupy.cuda.runtime", getDeviceCount=lambda: state.devices, getDevice=lambda: state.device,
                      runtimeGetVersion=lambda: 0, driverGetVersion=lambda: 0, getDeviceProperties=lambda i: properties,
                      CUDA_R_32F=0, CUDA_R_64F=1)
    device = _module("cupy.cuda.device", get_cublas_handle=lambda: "handle")
    cuda = _module("cupy.cuda", Device=Device, runtime=runtime, device=device)
    cublas = _module("cupy_backends.cuda.libs.cublas", gemmStridedBatchedEx=_strided_batched, CUBLAS_GEMM_DEFAULT=-1,
                     CUBLAS_COMPUTE_32F=68, CUBLAS_COMPUTE_32F_FAST_16BF=75, CUBLAS_COMPUTE_32F_FAST_TF32=77,
                     CUBLAS_COMPUTE_64F=70)
    transforms = _module("cupyx.scipy.fft", rfft=_strict("rfft", "x, n=None, axis=-1, norm=None", fft.rfft),
                         irfft=_strict("irfft", "x, n=None, axis=-1, norm=None", fft.irfft))
    functions_of_scipy = _module("cupyx.scipy.special", erf=_strict("erf", "x", special.erf),
                                 expit=_strict("expit", "x", special.expit))
    scipy = _module("cupyx.scipy", fft=transforms, special=functions_of_scipy)
    made = [_module("cupy", __version__="fake", ndarray=ndarray, RawModule=RawModule, cuda=cuda, **functions),
            cuda, runtime, device, _module("cupyx", scatter_add=_scatter_add, scipy=scipy), scipy, transforms,
            functions_of_scipy, _module("cupy_backends"), _module("cupy_backends.cuda"), _module("cupy_backends.cuda.libs"),
            cublas]
    return {module.__name__: module for module in made}


MODULES = _modules()
cupy = MODULES["cupy"]


@contextmanager
def installed(mode="check"):
    """``import cupy`` gives this one inside."""
    from autograd import device

    before = {name: sys.modules.get(name) for name in MODULES}
    sys.modules.update(MODULES)
    device.gpu.cache_clear()
    state.reads, state.device, state.mode = 0, 0, mode
    try:
        yield cupy
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        device.gpu.cache_clear()
        device._waiting.checks.clear()
