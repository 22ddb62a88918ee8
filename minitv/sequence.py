"""Sequences that are split over ranks: each holds a share of the positions, and layers exchange what they need of the others.

Rank n of R holds the positions n T/R .. (n+1) T/R - 1 of every sequence. Whatever a model computes position by position needs
nothing from elsewhere. A mixer of positions does, and there are three ways to get it:

    relay     a state goes from each rank to the next one: what it carries does not grow with the text
    before    the last positions of the share before, for a layer that looks back by a few
    gathered  all positions of some channels, for a layer that treats every channel on its own; ``scattered`` is the way back

All of them, and the keys and values that LongNet's patterns gather, are made of one operation, ``Share.exchange``. It sends
tensors to some ranks and receives others. Its gradient is the same with the directions reversed: it sends the gradients of what
came to where that came from, and receives those of what went. So the gradient of gathering is a reduce-scatter: a rank adds up
what all others return for its own positions, in the order of the ranks. The loss of each rank is that of its own positions, the
loss of the step is their sum, and so is the gradient of every parameter.

Ranks have to send and receive in the same order. They do, because all of them run the same model on one micro-batch after the
other, and the tape goes back in the order in which it was recorded.

A share is a context variable: ``with sharing(Share(...))`` around a forward pass, and what modules ask is ``share()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from autograd import Tensor, concat, reshape, split
from autograd.device import namespace
from autograd.errors import GraphError
from autograd.node import Node, place_of
from autograd.ranks import Communicator
from autograd.state import switches


class Share:
    """The share of a sequence that this rank holds: ``length`` positions from ``start`` on, of ``whole`` in all.

    ``ranks`` are those that hold the shares of the same sequences, in their order, a Communicator of autograd/ranks; it counts
    the bytes that are sent.
    """

    def __init__(self, ranks: Communicator, length: int):
        self.ranks, self.length = ranks, length
        self.rank, self.size = ranks.rank, ranks.size
        self.start, self.whole = self.rank * length, self.size * length

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, tuple[int, ...]],
                 through: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Send a tensor to each rank of ``outgoing``, and receive one of a shape from each rank of ``incoming``.

        ``through`` comes back as it is. The gradients travel when its own gradient is complete, so it is a tensor that this
        layer alone goes on with: with another one, ranks would wait for each other longer. All are of one dtype and lie on one
        device.
        """
        like = through.data
        received = self.travel({rank: tensor.data for rank, tensor in outgoing.items()}, incoming, like)
        inputs = [through, *outgoing.values()]
        if not (switches().recording and any(t.requires_grad for t in inputs)):
            return through, {rank: Tensor.wrap(array) for rank, array in received.items()}
        outputs = [like, *received.values()]
        node = Node(_OP, _RULE, [place_of(t) if t.requires_grad else None for t in inputs],
                    (self, {rank: t.shape for rank, t in outgoing.items()}, list(incoming)), [t.shape for t in inputs],
                    [(array.shape, array.dtype) for array in outputs], [])
        through, *tensors = (Tensor.wrap(array, node=node, index=i) for i, array in enumerate(outputs))
        return through, dict(zip(received, tensors, strict=True))

    def travel(self, outgoing: Mapping[int, Any], incoming: Mapping[int, tuple[int, ...]], like: Any) -> dict[int, Any]:
        """``exchange`` of arrays, without a gradient; ``like`` is an array of their dtype, where they lie."""
        xp = namespace(like)
        received = {rank: xp.empty(shape, like.dtype) for rank, shape in incoming.items()}
        sent = {rank: xp.ascontiguousarray(array) for rank, array in outgoing.items()}
        self.ranks.exchange(*([blocks.get(rank) for rank in range(self.size)] for blocks in (sent, received)))
        return received


class _Rule:
    """What a node of an exchange does in backward."""

    def __str__(self) -> str:
        return "communication"

    def differentiate(self, node, saved, grads, create_graph):
        """The gradient of ``through`` as it is, and from other ranks those of what was sent to them."""
        if create_graph:
            raise GraphError("exchange: there is no second derivative")
        share, sent, sources = saved
        like = next(g.data for g in grads if g is not None)
        xp = namespace(like)
        outgoing = {rank: xp.zeros(shape, dtype) if g is None else g.data
                    for rank, g, (shape, dtype) in zip(sources, grads[1:], node.outputs[1:], strict=True)}
        received = share.travel(outgoing, sent, like)
        return [grads[0], *(Tensor.wrap(received[rank]) for rank in sent)]


_OP, _RULE = SimpleNamespace(name="exchange", floats=["through", "outgoing"]), _Rule()
_share: ContextVar[Share | None] = ContextVar("the share of this rank", default=None)


def share() -> Share | None:
    """The share of a sequence that is computed here; None where sequences are whole."""
    return _share.get()


def position() -> int:
    """The position of the first token that is computed here."""
    part = share()
    return 0 if part is None else part.start


@contextmanager
def sharing(part: Share | None) -> Iterator[None]:
    """What models read inside are the shares of sequences, not whole ones."""
    token = _share.set(part)
    try:
        yield
    finally:
        _share.reset(token)


def relay(function: Callable[..., tuple], through: Tensor, *state: Tensor | None,
          begin: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """(y, state after) = function(through, *state), whose state comes from the rank before and goes on to the next one.

    Where sequences are whole, this is the call alone. Otherwise the first rank begins with ``begin()``, whose shapes are those
    of the state on all ranks. ``through`` is an input that no other layer reads.
    """
    part = share()
    if part is None:
        return function(through, *state)
    first = list(begin())
    if part.rank:
        through, received = part.exchange({}, {part.rank - 1: (sum(t.data.size for t in first),)}, through)
        pieces = split(received[part.rank - 1], sizes=tuple(t.data.size for t in first))
        first = [reshape(piece, t.shape) for piece, t in zip(pieces, first, strict=True)]
    y, *after = function(through, *first)
    if part.rank + 1 < part.size:
        y, _ = part.exchange({part.rank + 1: concat([reshape(t, (-1,)) for t in after])}, {}, y)
    return (y, *after)


def before(x: Tensor, count: int, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x[B T D], and the ``count`` positions before it, [B count D], which other ranks hold: 0 before the first token.

    Where sequences are whole, they are ``past``.
    """
    part = share()
    if part is None:
        return x, past
    def held(rank: int, reader: int) -> slice:
        """The positions within the share of a rank that a later one needs."""
        first = max(0, part.length - (count - (reader - rank - 1) * part.length))
        return slice(min(first, part.length), None)

    reach = -(-count // part.length)  # ranks
    readers = range(part.rank + 1, min(part.rank + reach + 1, part.size))
    sources = range(max(part.rank - reach, 0), part.rank)
    batch, _, width = x.shape
    sizes = {rank: part.length - held(rank, part.rank).start for rank in sources}
    x, received = part.exchange({rank: x[:, held(part.rank, rank)] for rank in readers},
                                {rank: (batch, size, width) for rank, size in sizes.items()}, x)
    nothing = Tensor.wrap(namespace(x.data).zeros((batch, count - sum(sizes.values()), width), x.dtype))
    return x, concat([nothing, *received.values()], axis=1)


def last_before(x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x[B T D], and the position before it, [B D]; where sequences are whole, that is ``past``."""
    if share() is None:
        return x, past
    x, block = before(x, 1, None)
    return x, block[:, 0]


def gathered(x: Tensor) -> Tensor:
    """All positions of some channels, [B whole C], of the positions of this rank x[B T D]: the channels of ``columns``."""
    part = share()
    if part is None:
        return x
    batch, length, width = x.shape
    mine = columns(width)
    others = [rank for rank in range(part.size) if rank != part.rank]
    outgoing = {rank: x[:, :, _block(width, rank)] for rank in others}
    x, received = part.exchange(outgoing, dict.fromkeys(others, (batch, length, mine.stop - mine.start)), x)
    return concat([x[:, :, mine] if rank == part.rank else received[rank] for rank in range(part.size)], axis=1)


def scattered(x: Tensor, width: int) -> Tensor:
    """The positions of this rank with all their channels, [B T D], of all positions of its channels x[B whole C]."""
    part = share()
    if part is None:
        return x
    def rows(rank: int) -> slice:
        return slice(rank * part.length, (rank + 1) * part.length)

    blocks = [_block(width, rank) for rank in range(part.size)]
    others = [rank for rank in range(part.size) if rank != part.rank]
    outgoing = {rank: x[:, rows(rank)] for rank in others}
    x, received = part.exchange(outgoing, {rank: (len(x.data), part.length, blocks[rank].stop - blocks[rank].start)
                                           for rank in others}, x)
    return concat([x[:, rows(rank)] if rank == part.rank else received[rank] for rank in range(part.size)], axis=2)


def columns(width: int) -> slice:
    """The channels that ``gathered`` gives here; where sequences are whole, all."""
    part = share()
    return slice(None) if part is None else _block(width, part.rank)


def _block(width: int, rank: int) -> slice:
    size = share().size
    return slice(width * rank // size, width * (rank + 1) // size)
