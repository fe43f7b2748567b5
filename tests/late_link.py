"""A link whose copies are done as late as its streams allow, on real tensors of the CPU."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Moment:
    """Of the device's stream."""


class Memory:
    """What a contiguous tensor lies in, which this does not hold."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), "a copy of several pieces"
        self.storage = weakref.ref(tensor.untyped_storage())
        self.bytes = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        self.where = (tensor.storage_offset(), tuple(tensor.shape), tensor.dtype)

    def meets(self, other: Memory) -> bool:
        return self.bytes.start < other.bytes.stop and other.bytes.start < self.bytes.stop

    def tensor(self) -> Tensor:
        storage, (offset, shape, dtype) = self.storage(), self.where
        assert storage is not None, "a copy of memory that is no longer held"
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape)


@dataclass(eq=False)
class Copy:
    """One that has been asked for; before: those that are done first."""

    target: Memory
    source: Memory
    before: list[Copy]
    done: bool = False


class LateLink:
    """What is computed is done at once, what is copied only when somebody waits for it. Until then its target
    is full of NaN, so that whoever reads it too early, or overwrites what is still read, spoils the result.
    Raises AssertionError for a copy whose memory nobody holds any more, and for one that is asked for without
    a mark of that moment."""

    def __init__(self) -> None:
        self.now = Moment()
        self.out: list[Copy] = []
        self.back: list[Copy] = []
        self.joined = 0

    def mark(self) -> Moment:
        self.now = Moment()
        return self.now

    def wait(self, mark: Copy) -> None:
        _do(mark)

    def join(self, mark: Copy) -> None:
        self.joined += 1
        _do(mark)

    def send(self, target: Tensor, source: Tensor, after: Any) -> Copy:
        return self._ask(self.out, target, source, after)

    def fetch(self, target: Tensor, source: Tensor, after: Any) -> Copy:
        return self._ask(self.back, target, source, after)

    def _ask(self, stream: list[Copy], target: Tensor, source: Tensor, after: Any) -> Copy:
        assert after is self.now, "a copy after another moment than the one it was asked for at"
        before = stream[-1:]
        _overtake(before, Memory(target))
        stream.append(Copy(Memory(target), Memory(source), before))
        target.fill_(nan)
        return stream[-1]


def _overtake(before: list[Copy], target: Memory) -> None:
    """What uses this memory earlier in the same order is done before it is spoilt."""
    for copy in before:
        if target.meets(copy.source) or target.meets(copy.target):
            _do(copy)
        else:
            _overtake(copy.before, target)


def _do(copy: Copy) -> None:
    if copy.done:
        return
    for earlier in copy.before:
        _do(earlier)
    copy.before = []
    copy.target.tensor().copy_(copy.source.tensor())
    copy.done = True
