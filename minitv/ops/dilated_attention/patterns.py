"""The active positions of a pattern: in which pieces they are, how they are taken out of an array, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autograd.device import namespace

from ..attention import offset_of


def heads_by_offset(heads: int, dilation: int, offsets: str) -> dict[int, slice]:
    """The heads that have each offset, in the order of the offsets; both rules give every so many-th head."""
    members: dict[int, list[int]] = {}
    for head in range(heads):
        members.setdefault(offset_of(head, heads, dilation, offsets), []).append(head)
    return {s: slice(group[0], group[-1] + 1, group[1] - group[0] if len(group) > 1 else 1)
            for s, group in sorted(members.items())}


@dataclass(frozen=True)
class Rows:
    """Every ``step``-th of ``length`` positions from ``begin`` on, in each of ``count`` segments that follow each other; the
    first one differs between groups of heads: (heads, first).
    """

    begin: int
    length: int
    count: int
    step: int
    groups: tuple[tuple[slice, int], ...]

    def take(self, x):
        """x[B H T ..] -> what these rows hold [B·count heads rows ..], heads in the order of the groups."""
        parts = [self._of_group(x, heads, first) for heads, first in self.groups]
        part = parts[0] if len(parts) == 1 else namespace(x).concatenate(parts, axis=2)
        return part.reshape(part.shape[0] * self.count, *part.shape[2:])

    def put(self, x, values, add: bool = False) -> None:
        """Write what ``take`` gave to its places in x[B H T ..], or add it there."""
        values, at = values.reshape(x.shape[0], self.count, *values.shape[1:]), 0
        for heads, first in self.groups:
            part = self._of_group(x, heads, first)
            new = values[:, :, at : at + part.shape[2]]
            part[...] = part + new if add else new
            at += part.shape[2]

    def _of_group(self, x, heads, first):
        """A view [B count heads rows ..] of x[B H T ..]."""
        part = x[:, heads, self.begin : self.begin + self.count * self.length]
        part = part.reshape(*part.shape[:2], self.count, self.length, *x.shape[3:])[:, :, :, first :: self.step]
        return part.swapaxes(1, 2)


def pieces(heads, queries, keys, start, segment, dilation, offsets) -> Iterator[tuple[Rows, Rows]]:
    """The active queries and keys of a pattern: which attend to each other, in pieces whose heads have equally many.

    The segments that lie within the queries are one piece, a shorter one at each end another; heads whose offset is beyond its
    last whole step have fewer positions, and are a piece of their own.
    """
    past, stop = start + keys - queries, start + keys
    inner = min(-(-past // segment) * segment, stop)  # the first segment that begins among the queries
    whole = (stop - inner) // segment
    last = inner + whole * segment
    parts = (past // segment * segment, past, inner, 1), (inner, inner, last, whole), (last, last, stop, 1)
    for begin, first, end, count in parts:
        if first == end:
            continue
        length, skip = (end - begin) // count, first - begin  # of a segment, and how much of it is past
        alike: dict[tuple[int, int], list] = {}
        for s, members in heads_by_offset(heads, dilation, offsets).items():
            asks = s + max(-(-(skip - s) // dilation), 0) * dilation  # the first active query
            sizes = len(range(asks, length, dilation)), len(range(s, length, dilation))
            alike.setdefault(sizes, []).append((members, s, asks))
        for (some, _), groups in alike.items():
            if some:
                yield (Rows(first - past, length - skip, count, dilation, tuple((m, asks - skip) for m, _, asks in groups)),
                       Rows(begin - start, length, count, dilation, tuple((m, s) for m, s, _ in groups)))
