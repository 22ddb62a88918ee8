"""Which form or kernel runs a call: the array's device decides, ``use`` overrides, ``explain`` tells."""

from __future__ import annotations

import difflib
from contextlib import ContextDecorator

from .device import device_name
from .errors import KernelError
from .op import REGISTRY, Op, lookup
from .state import STATE


class use(ContextDecorator):
    """Force a form or a kernel inside a ``with`` block: it runs or raises, it never falls back silently.

    ``use("attention", form="parallel")`` concerns one operator (several names are allowed). Without a name the request
    concerns every operator that declares such a form or kernel, and one that none declares is an error at once.
    ``use(kernel="none")`` switches kernels off. The innermost request that concerns an operator counts.
    """

    def __init__(self, *ops, form: str | None = None, kernel: str | None = None):
        if (form is None) == (kernel is None):
            raise KernelError("use: give exactly one of form=... and kernel=...")
        self._ops = frozenset(lookup(o).name for o in ops)
        self._form, self._kernel = form, kernel
        if kernel == "none":
            return
        key, field = (form, "forms") if form is not None else (kernel, "kernels")
        concerned = [REGISTRY[n] for n in self._ops] or list(REGISTRY.values())
        missing = [o.name for o in concerned if key not in getattr(o, field)]
        if (self._ops and missing) or len(missing) == len(concerned):
            available = sorted({k for o in concerned for k in getattr(o, field)})
            close = difflib.get_close_matches(key, available, 1)
            raise KernelError(
                f"use: {', '.join(sorted(self._ops)) or 'no operator'} has no {field[:-1]} {key!r}"
                + (f"; did you mean {close[0]!r}?" if close else f", available: {', '.join(available) or 'none'}")
            )

    def concerns(self, op: Op) -> bool:
        if self._ops:
            return op.name in self._ops
        return self._kernel == "none" or (self._form in op.forms if self._form else self._kernel in op.kernels)

    def __enter__(self):
        STATE.uses = (*STATE.uses, self)
        return self

    def __exit__(self, *_):
        last = len(STATE.uses) - 1 - STATE.uses[::-1].index(self)  # a generator may leave its block late
        STATE.uses = STATE.uses[:last] + STATE.uses[last + 1:]


def _request(op: Op) -> use | None:
    for request in reversed(STATE.uses):
        if request.concerns(op):
            return request
    return None


def _default_form(op: Op):
    for form in op.forms.values():
        return form
    raise KernelError(f"{op.name}: no form is declared")


def choose(op: Op, arrays, params):
    """The Form or Kernel that runs this call. The first declared form is the default where no kernel applies."""
    request = _request(op) if STATE.uses else None
    if request is not None:
        if request._form is not None:
            return op.forms[request._form]
        if request._kernel != "none":
            kernel = op.kernels[request._kernel]
            reason = kernel.reason_against(arrays, params)
            if reason:
                raise KernelError(f"{op.name}: the forced kernel {request._kernel!r} cannot run: {reason}")
            return kernel
        return _default_form(op)
    if op.kernels and not STATE.complex_step:
        first = next(a for a in arrays if a is not None)
        kernel = op.kernels.get(device_name(first))
        if kernel is not None and (kernel.supports is None or kernel.supports(*arrays, **params) is None):
            return kernel  # dtypes and devices were checked when the arguments were converted
    return _default_form(op)


def explain(op, *args, **kwargs) -> str:
    """What would run for these arguments and why not the others, as text; without arguments, what is declared."""
    op = lookup(op)
    lines = [f"{op.name}: {op.signature}"]
    if not args and not kwargs:
        lines += [f"  form {name}" for name in op.forms] + [f"  kernel {name}" for name in op.kernels]
        return "\n".join(lines)
    values, params = op.bind(args, kwargs)
    _, arrays, _ = op._convert(values)
    try:
        chosen = choose(op, arrays, params)
    except KernelError:  # a forced kernel that cannot run: the line of that kernel says why
        chosen = None
    request = _request(op)
    for name, kernel in op.kernels.items():
        if kernel is chosen:
            note = "chosen" + (": forced by use()" if request else ": the fused kernel of this device")
        elif request is not None and request._kernel != name:
            note = "not chosen: use() asks for something else"
        elif chosen is None:
            note = f"forced by use(), cannot run: {kernel.reason_against(arrays, params)}"
        else:
            note = f"not chosen: {kernel.reason_against(arrays, params)}"
        lines.append(f"  kernel {name}: {note}")
    for name, form in op.forms.items():
        if form is chosen:
            note = "chosen" + (": forced by use()" if request else ": the default form")
        else:
            note = "not chosen: " + ("use() asks for something else" if request else
                                     "a kernel applies" if chosen in op.kernels.values() else "not the default form")
        lines.append(f"  form {name}: {note}")
    return "\n".join(lines)
