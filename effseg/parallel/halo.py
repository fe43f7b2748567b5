"""Rows of stored tensors that other processes hold: fetched before a sweep, their gradients sent home after.

Every process knows what the others need, for that follows from shapes alone (`Needs`), so nothing is
negotiated. No tensor is copied to make room: a slab that reaches over a border is put together by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.common.formats import CHANNELS_LAST
from effseg.parallel.partition import Rows, Split, current
from effseg.parallel.transport import Message, Pending

Needs = Callable[[int], Rows | None]
"""What rows of a tensor the process of a rank needs for all of its slabs; None where it has none."""


class Piece(NamedTuple):
    """Rows of a tensor that go to process `peer`, or come from it."""

    peer: int
    rows: Rows


class Halo:
    """What processes exchange of a tensor of `total` rows."""

    def __init__(self, split: Split, total: int, needs: Needs) -> None:
        self.start, self.stop = split.rows(total)
        self.wanted: list[Piece] = []
        """From other processes, in the order of rows."""
        self.given: list[Piece] = []
        """To other processes."""
        own = needs(split.rank)
        for peer in range(split.size):
            if peer == split.rank:
                continue
            rows = _common(own, split.rows(total, peer))
            if rows is not None:
                self.wanted.append(Piece(peer, rows))
            rows = _common(needs(peer), (self.start, self.stop))
            if rows is not None:
                self.given.append(Piece(peer, rows))


def _common(one: Rows | None, other: Rows) -> Rows | None:
    if one is None:
        return None
    lo, hi = max(one[0], other[0]), min(one[1], other[1])
    return (lo, hi) if lo < hi else None


class Shard:
    """This process's rows of a stored tensor (N, C, d, H, W), and those of others that its slabs read.

    stands: the tensor has no values (it stands for some), so that none are fetched.
    """

    def __init__(self, tensor: Tensor, halo: Halo, stands: bool) -> None:
        self.tensor, self.halo, self.stands = tensor, halo, stands
        self._arriving: list[Tensor] = []
        self._pending: Sequence[Pending] = ()
        self._parts: list[tuple[int, Tensor]] | None = None

    def messages(self) -> tuple[list[Message], list[Message]]:
        """What is sent and what is received, to be begun by one exchange for all tensors of a sweep."""
        if self.stands:
            return [], []
        sent = [Message(piece.peer, packed(self.own(piece.rows))) for piece in self.halo.given]
        received = [Message(piece.peer, room(self.tensor, piece)) for piece in self.halo.wanted]
        self._arriving = [message.tensor for message in received]
        return sent, received

    def begun(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def own(self, rows: Rows) -> Tensor:
        """Rows that lie in the tensor."""
        return self.tensor[:, :, rows[0] - self.halo.start : rows[1] - self.halo.start]

    def cut(self, rows: Rows, sample: int) -> Tensor:
        """Rows [lo, hi) of one sample."""
        (lo, hi), one = rows, slice(sample, sample + 1)
        start, stop = self.halo.start, self.halo.stop
        if start <= lo and hi <= stop:
            return self.tensor[one, :, lo - start : hi - start]
        if self.stands:
            return self.tensor.new_empty(()).expand(1, self.tensor.shape[1], hi - lo, *self.tensor.shape[3:])
        parts = [
            part[one, :, max(lo - first, 0) : hi - first]
            for first, part in self._all_parts()
            if first < hi and lo < first + part.shape[2]
        ]
        return torch.cat(parts, 2).contiguous(memory_format=CHANNELS_LAST)

    def _all_parts(self) -> list[tuple[int, Tensor]]:
        """The first row of each part and its rows, in their order: those of others, and the own ones."""
        if self._parts is None:
            for pending in self._pending:
                pending.wait()
            found = [
                (piece.rows[0], unpacked(tensor, self.tensor.dtype))
                for piece, tensor in zip(self.halo.wanted, self._arriving, strict=True)
            ]
            self._parts = sorted([*found, (self.halo.start, self.tensor)], key=lambda part: part[0])
            self._arriving, self._pending = [], ()
        return self._parts


def fetch(split: Split, shards: Sequence[Shard]) -> None:
    """Begin to exchange what the slabs of a sweep need; they wait for it when they come to it."""
    both = [shard.messages() for shard in shards]
    sent = [message for one, _ in both for message in one]
    received = [message for _, one in both for message in one]
    pending = split.transport.exchange(sent, received)
    for shard in shards:
        shard.begun(pending)


class Homeward:
    """Gradients of the rows of other processes, (N, C, rows, H, W), until they are sent home."""

    def __init__(self, tensor: Tensor, halo: Halo) -> None:
        self.tensor, self.halo = tensor, halo
        self._grads = [room(tensor, piece).zero_().view(tensor.dtype) for piece in halo.wanted]
        self._arriving: list[Tensor] = []

    def add(self, rows: Rows, sample: int, part: Tensor) -> tuple[Rows, Tensor] | None:
        """Keep what belongs to others; the rest, if there is any."""
        lo = rows[0]
        for piece, grad in zip(self.halo.wanted, self._grads, strict=True):
            theirs = _common(rows, piece.rows)
            if theirs is not None:
                first, last = theirs
                target = grad[sample, first - piece.rows[0] : last - piece.rows[0]]
                target.add_(part[0, :, first - lo : last - lo].movedim(0, -1))
        own = _common(rows, (self.halo.start, self.halo.stop))
        return None if own is None else (own, part[:, :, own[0] - lo : own[1] - lo])

    def messages(self) -> tuple[list[Message], list[Message]]:
        sent = [
            Message(piece.peer, grad.view(torch.uint8))
            for piece, grad in zip(self.halo.wanted, self._grads, strict=True)
        ]
        received = [Message(piece.peer, room(self.tensor, piece)) for piece in self.halo.given]
        self._arriving = [message.tensor for message in received]
        return sent, received

    def arrived(self, grad: Tensor) -> None:
        """Add to the own rows' gradient what others found for it, in the order of ranks."""
        for piece, tensor in zip(self.halo.given, self._arriving, strict=True):
            lo, hi = piece.rows
            own = grad[:, :, lo - self.halo.start : hi - self.halo.start]
            own.add_(unpacked(tensor, self.tensor.dtype).to(grad.dtype))


def every(step: int, tensor: Tensor, total: int) -> Tensor:
    """Rows 0, `step`, 2 `step`, ... of a tensor (N, D, H, W) of `total` rows: see `picked`."""
    return tensor[:, ::step] if current() is None else picked(range(0, total, step), tensor, total)


def picked(rows: Sequence[int], tensor: Tensor, total: int) -> Tensor:
    """Of these ascending rows of a split volume those that this process holds of a tensor of as many, from
    its part of a tensor (N, D, H, W) of `total` rows; without a gradient."""
    split = current()
    assert split is not None

    def needs(rank: int) -> Rows | None:
        lo, hi = split.rows(len(rows), rank)
        return (rows[lo], rows[hi - 1] + 1) if lo < hi else None

    shard = Shard(tensor[:, None], Halo(split, total, needs), stands=False)
    fetch(split, [shard])
    needed = needs(split.rank)
    if needed is None:
        return tensor[:, :0]
    found = torch.cat([shard.cut(needed, n)[:, 0] for n in range(tensor.shape[0])])
    own = [rows[i] - needed[0] for i in range(*split.rows(len(rows)))]
    return found[:, own]


def send_home(split: Split, gradients: Sequence[tuple[Homeward, Tensor]]) -> None:
    """Exchange the gradients of halos; each is added to the gradient of its process's own rows."""
    both = [homeward.messages() for homeward, _ in gradients]
    sent = [message for one, _ in both for message in one]
    received = [message for _, one in both for message in one]
    for pending in split.transport.exchange(sent, received):
        pending.wait()
    for homeward, grad in gradients:
        homeward.arrived(grad)


def room(tensor: Tensor, piece: Piece) -> Tensor:
    """Memory for a message with rows of that tensor: see `packed`."""
    (n, c, _, h, w), (lo, hi) = tensor.shape, piece.rows
    return torch.empty((n, hi - lo, h, w, c * tensor.itemsize), dtype=torch.uint8, device=tensor.device)


def packed(rows: Tensor) -> Tensor:
    """A copy of (N, C, d, H, W) as bytes in the order of channels-last memory: every backend sends those, and
    the rows may change before they have left."""
    return rows.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpacked(message: Tensor, dtype: torch.dtype) -> Tensor:
    return message.view(dtype).permute(0, 4, 1, 2, 3)
