"""One call on several cores: what is independent in it is cut into parts, and threads that have nothing else to do take some.

    team = Team(threads)
    with team:                      in a thread that calls operators
        y = layer_norm(x)           kernels that declare how their calls may be cut are cut
    team.help()                     in other threads: compute parts of such calls, until ``team.dismiss(threads)``

What comes out are independent parts of one array, or sums that are added up in the order of the parts, whose number depends on
the sizes alone: so the bits are the same for any number of threads. A kernel declares its cut, see compile.cpu_kernel; ``each``
and ``elementwise`` cut array code.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from queue import SimpleQueue

import numpy as np

PARTS = 16  # of a sum, at most
EACH = 4  # parts for each thread, so that a slow core may take fewer
WORK = 2**17  # numbers a part, at least: to wake a thread takes as long as the fastest kernels take for so many

Span = tuple[int, int]

_team: ContextVar[Team | None] = ContextVar("whose threads may take parts of a call", default=None)


class Team:
    """Threads that take parts of each other's calls; within ``with team``, calls are cut."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._helpers, self._counting = 0, threading.Lock()

    def __enter__(self) -> Team:
        _team.set(self)
        return self

    def __exit__(self, *_) -> None:
        _team.set(None)

    def help(self) -> None:
        """Compute parts of the others' calls until one of them dismisses this thread."""
        with self._counting:
            self._helpers += 1
        while (call := self._calls.get()) is not None:
            call.context.copy().run(call.work)
            del call  # nothing is kept while there is nothing to do
        with self._counting:
            self._helpers -= 1

    def dismiss(self, threads: int) -> None:
        """Let so many threads return from ``help``, those too that have yet to call it."""
        for _ in range(threads):
            self._calls.put(None)

    def compute(self, part: Callable[[int], None], count: int) -> None:
        """``part(i)`` for every i below the count, by this thread and those that help."""
        call = _Call(part, count)
        for _ in range(min(self._helpers, count - 1)):
            self._calls.put(call)
        call.work()
        call.wait()


class _Call:
    """A call that is cut: threads take its parts one after the other."""

    def __init__(self, part: Callable[[int], None], count: int):
        self.context = copy_context()  # for np.errstate
        self._part, self._count, self._next, self._left = part, count, itertools.count(), count
        self._error: BaseException | None = None
        self._counting, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()

    def work(self) -> None:
        """Take parts until none is left."""
        while (i := next(self._next)) < self._count:
            try:
                self._part(i)
            except BaseException as error:
                self._error = error
            with self._counting:
                self._left -= 1
                last = not self._left  # read here: two threads may both find that nothing is left
            if last:
                self._done.release()

    def wait(self) -> None:
        """Until all parts are there; raises what one of them raised."""
        self._done.acquire()
        self._part = None  # the arrays may go, even if nobody has taken this out of the queue yet
        if self._error is not None:
            raise self._error


@contextmanager
def sharing(threads: int) -> Iterator[None]:
    """Calls inside are shared with so many threads but one, which are started for them."""
    if threads < 2:
        yield
        return
    team = Team(threads)
    helpers = [threading.Thread(target=team.help, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    try:
        with team:
            yield
    finally:
        team.dismiss(threads - 1)
        for helper in helpers:
            helper.join()


def spans(count: int, grain: int = 1, work: float = math.inf, *, sums: bool = False) -> list[Span]:
    """Where the parts of so many units begin and end, with so many numbers in all; one span where calls are not cut.

    A part begins at a multiple of ``grain``. Where ``sums`` of parts are added up, their number depends on the sizes alone,
    also in a team of one; other parts are made for threads that may help.
    """
    team = _team.get()
    if team is None or work < 2 * WORK or (team.threads == 1 and not sums):
        return [(0, count)]
    parts = int(max(1, min(PARTS if sums else EACH * team.threads, count // grain, work // WORK)))
    if grain == 1 and count >= 32 * parts:
        grain = 16  # so that no part ends within a vector
    edges = [count * i // parts // grain * grain for i in range(parts)] + [count]
    return list(itertools.pairwise(edges))


def each(compute: Callable[[int, int, int], None], parts: Sequence[Span]) -> None:
    """``compute(i, start, stop)`` for every span, on all threads of the team."""
    team = _team.get()
    if team is None or len(parts) == 1:
        for i, (start, stop) in enumerate(parts):
            compute(i, start, stop)
    else:
        team.compute(lambda i: compute(i, *parts[i]), len(parts))


class Cut:
    """How the call of a kernel is cut, by the names of its arguments.

    Each of ``parts`` is an array of which a part of the kernel sees some rows, or a pair (start, stop) of which it sees a
    smaller one. Rows are those of the first axis; ``name:1`` are those of the second one where the first has one index, and
    the call is not cut where it has more. Each of ``sums`` is an array to which the kernel adds: every part adds to one of
    its own. A kernel that says whether something holds says so of all parts.
    """

    def __init__(self, function: Callable, parts: str, sums: str, grain: int):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self._parts = [(names.index(name), int(axis or 0)) for name, _, axis in (part.partition(":") for part in parts.split())]
        self._sums, self._grain = [names.index(name) for name in sums.split()], grain

    def __call__(self, kernel: Callable, arguments: tuple):
        """What the kernel returns, computed in parts."""
        team = _team.get()
        if team is None or (team.threads == 1 and not self._sums) or any(
                axis and len(arguments[at]) != 1 for at, axis in self._parts):
            return kernel(*arguments)
        at, axis = self._parts[0]
        whole = arguments[at]
        first, count = (whole[0], whole[1] - whole[0]) if type(whole) is tuple else (0, whole.shape[axis])
        parts = spans(count, self._grain, max(map(_size, arguments)), sums=bool(self._sums))
        if len(parts) == 1:
            return kernel(*arguments)
        results, sums = [None] * len(parts), [[arguments[i]] for i in self._sums]
        for total in sums:
            total += [np.zeros_like(total[0]) for _ in parts[1:]]

        def compute(i: int, start: int, stop: int) -> None:
            mine = list(arguments)
            for at, axis in self._parts:
                x = arguments[at]
                mine[at] = ((first + start, first + stop) if type(x) is tuple else x[:, start:stop] if axis
                            else x[start:stop])
            for at, total in zip(self._sums, sums, strict=True):
                mine[at] = total[i]
            results[i] = kernel(*mine)

        each(compute, parts)
        for total in sums:
            for other in total[1:]:
                total[0] += other
        return None if results[0] is None else all(results)


def _size(argument) -> int:
    """The numbers in an argument of a kernel."""
    return max(map(_size, argument), default=0) if type(argument) is tuple else getattr(argument, "size", 0)


def elementwise(function: Callable[[Sequence], np.ndarray], values: Sequence, inputs: Sequence) -> np.ndarray:
    """What a function of values computes, element by element of the first of them, the ``inputs``, which broadcast."""
    team = _team.get()
    if team is None or team.threads == 1:
        return function(values)
    shape = np.broadcast_shapes(*(x.shape for x in inputs if x is not None))
    axis = next((i for i, n in enumerate(shape) if n > 1), 0)
    parts = spans(shape[axis], 1, math.prod(shape) // 4) if shape else [()]  # sums and products of two numbers are fast
    if len(parts) == 1:
        return function(values)
    out: list[np.ndarray] = []
    making = threading.Lock()

    def part(x, start, stop):
        at = axis - len(shape) + x.ndim
        return x if at < 0 or x.shape[at] == 1 else x[(slice(None),) * at + (slice(start, stop),)]

    def compute(i, start, stop):
        y = function([*(None if x is None else part(x, start, stop) for x in inputs), *values[len(inputs):]])
        with making:
            if not out:
                out.append(np.empty(shape, y.dtype))
        part(out[0], start, stop)[...] = y

    each(compute, parts)
    return out[0]


def column_sums(x: np.ndarray) -> np.ndarray:
    """The sums of the columns of x[N D], [D]."""
    parts = spans(len(x), work=x.size, sums=True)
    if len(parts) == 1:
        return np.add.reduce(x, axis=0)
    out = np.empty((len(parts), x.shape[1]), x.dtype)
    each(lambda i, start, stop: np.add.reduce(x[start:stop], axis=0, out=out[i]), parts)
    return np.add.reduce(out, axis=0)
