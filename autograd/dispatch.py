"""Which form or kernel runs a call: the array's device decides, ``use`` overrides, ``explain`` tells."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from .errors import KernelError
from .registry import REGISTRY, lookup
from .routes import Route
from .state import Switch, switches


class use(Switch):
    """Force a form or a kernel inside a ``with`` block: it runs or raises, it never falls back silently.

    ``use("attention", form="parallel")`` concerns one operator (several names are allowed). Without a name the request
    concerns every operator that declares such a form or kernel, and one that none declares is an error at once. A device
    names its first kernel that can run; ``use(kernel="none")`` switches kernels off. ``use("retention", form="chunkwise",
    chunk_size=16)`` also sets a tuning number. The innermost request that concerns an operator counts.
    """

    def __init__(self, *ops, form: str | None = None, kernel: str | None = None, **tuning: int):
        super().__init__()
        if (form is None) == (kernel is None):
            raise KernelError("use: give exactly one of form=... and kernel=...")
        self._ops = frozenset(lookup(o).name for o in ops)
        self._kind, self._name = ("form", form) if form is not None else ("kernel", kernel)
        self.tuning = tuning
        concerned = [REGISTRY[n] for n in self._ops] or list(REGISTRY.values())
        choices = [[route for route in op.routes if self.allows(route)] for op in concerned]
        if not all(choices) if self._ops else not any(choices):
            available = sorted({r.name for op in concerned for r in op.routes if r.kind == self._kind})
            close = difflib.get_close_matches(self._name, available, 1)
            raise KernelError(
                f"use: {', '.join(sorted(self._ops)) or 'no operator'} has no {self._kind} {self._name!r}"
                + (f"; did you mean {close[0]!r}?" if close else f", available: {', '.join(available) or 'none'}")
            )
        for routes in choices:
            for name, value in tuning.items():
                routes[0].check_tuning(name, value)

    def allows(self, route: Route) -> bool:
        """Whether the request leaves this route."""
        if self._kind == "kernel" and self._name == "none":
            return route.kind == "form"
        return self.names(route) or (route.kind == self._kind and self._name == route.device
                                     and self._name not in route.op.kernels)

    def names(self, route: Route) -> bool:
        """Whether the request is for this route and no other."""
        return route.kind == self._kind and self._name == route.name

    def concerns(self, op) -> bool:
        """Whether the request is about this operator."""
        return op.name in self._ops if self._ops else any(map(self.allows, op.routes))


def request_for(op) -> use | None:
    """The innermost request that concerns the operator."""
    uses = switches().uses
    return next((request for request in reversed(uses) if request.concerns(op)), None) if uses else None


def candidates(op, arrays, params, request, recording) -> Iterator[tuple[Route, str | None]]:
    """Every route and the reason against it, in order of preference: the first without a reason runs."""
    for route in op.routes:
        if request is not None and not request.allows(route):
            yield route, "use() asks for something else"
        else:
            reason = route.reason_against(arrays, params, recording)
            if reason is None and not (request is not None and request.names(route)):
                reason = route.reason_to_defer(arrays, params)
            yield route, reason


def choose(op, arrays, params, request, recording) -> Route:
    """The route that runs this call."""
    for route in op.routes if request is None else ():  # without reasons, which nobody will read
        if route.reason_against(arrays, params, recording) is None and route.reason_to_defer(arrays, params) is None:
            return route
    reasons = []
    for route, reason in candidates(op, arrays, params, request, recording):
        if reason is None:
            return route
        if request is not None and request.allows(route):
            reasons.append(f"the forced {route.kind} {route.name!r} cannot run: {reason}")
    raise KernelError(f"{op.name}: {'; '.join(reasons) or 'no form is declared'}")


def explain(op, *args, **kwargs) -> str:
    """What would run for these arguments and why not the others, as text; without arguments, what is declared."""
    op = lookup(op)
    lines = [f"{op.name}: {op.signature}"]
    if not args and not kwargs:
        return "\n".join([*lines, *(f"  {route}" for route in op.routes)])
    _, arrays, params, recording = op.accept(args, kwargs)
    request, chosen = request_for(op), None
    for route, reason in candidates(op, arrays, params, request, recording):
        if reason is not None:
            forced = request is not None and request.allows(route)
            note = f"forced by use(), cannot run: {reason}" if forced else f"not chosen: {reason}"
        elif chosen is None:
            chosen = route
            note = "chosen: " + ("forced by use()" if request else route.why)
        else:
            note = f"not chosen: {chosen} comes first"
        lines.append(f"  {route}: {note}")
    return "\n".join(lines)
