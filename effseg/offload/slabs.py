"""Slabs of a tensor in the host's memory: on their way there, and back a slab ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.common.device import kind_of
from effseg.common.formats import CHANNELS_LAST
from effseg.common.settings import Setting
from effseg.offload.link import Mark, link_of


@dataclass
class Traffic:
    """Bytes over the link, in either direction. On a CPU nothing is copied: those that a GPU would copy."""

    to_host: int = 0
    to_device: int = 0


_traffic: Setting[Traffic | None] = Setting("effseg_traffic", None)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Inside, and in the backward pass of what is computed there, bytes are counted."""
    traffic = Traffic()
    with _traffic.set(traffic):
        yield traffic


class Wanted(NamedTuple):
    """Rows [lo, hi) of a sample, of which the slab before has those below `new`; alike: how many slabs these
    rows stand for (`effseg.expressions.slabs.abridged`)."""

    sample: int
    lo: int
    hi: int
    new: int
    alike: int = 1


class Outgoing:
    """A tensor that a sweep makes slab by slab, on its way into the host's memory. While a slab is copied,
    the next one is made."""

    def __init__(self, held: Tensor, device: torch.device) -> None:
        """held: (N, C, D, H, W), channels last, the memory."""
        self.leaving: tuple[Tensor, Mark] | None = None
        self.held = held
        self.link = None if kind_of(device) == "cpu" else link_of(device)

    def put(self, sample: int, here: slice, part: Tensor, alike: int = 1) -> None:
        """part: (1, C, d, H, W), rows `here` of the sample, which nobody changes any more."""
        target, part = self.held[sample : sample + 1, :, here], part.contiguous(memory_format=CHANNELS_LAST)
        _count(to_host=part.nbytes * alike)
        if self.link is None:
            target.copy_(part)
            return
        mark = self.link.send(_flat(target), _flat(part), self.link.mark())
        self.end()
        self.leaving = part, mark

    def end(self) -> None:
        """Give the memory of the slab on its way back once it has been copied."""
        if self.leaving is not None:
            assert self.link is not None
            self.link.wait(self.leaving[1])
            self.leaving = None

    def __del__(self) -> None:
        if self.leaving is not None and self.link is not None:  # an exception ended the sweep
            self.link.join(self.leaving[1])


class Incoming:
    """A tensor in the host's memory, as a sweep cuts slabs from it: two of them are on the device, one that
    is used and the next, which is being copied. Rows that both have are copied once."""

    def __init__(self, held: Tensor, plan: Sequence[Wanted], device: torch.device) -> None:
        """held: (N, C, D, H, W), channels last; plan: what will be cut, in order, once or again and again."""
        self.coming: dict[int, Mark] = {}
        self.held, self.plan, self.position = held, plan, -1
        self.link = None if kind_of(device) == "cpu" else link_of(device)
        self.ring: list[Tensor] = []
        if self.link is None or not plan:
            return
        _, c, _, h, w = held.shape
        shape = (1, c, max(wanted.hi - wanted.lo for wanted in plan), h, w)
        self.ring = [
            torch.empty(shape, dtype=held.dtype, device=device, memory_format=CHANNELS_LAST)
            for _ in range(min(2, len(plan)))
        ]
        self._fetch(0)

    def cut(self, rows: tuple[int, int], sample: int) -> Tensor:
        """(1, C, d, H, W), until the next cut."""
        wanted = self._next(rows, sample)
        if self.link is None:
            _count(to_device=self._copied(wanted).nbytes * wanted.alike)
            return self.held[sample : sample + 1, :, wanted.lo : wanted.hi]
        i = self.position
        if i not in self.coming:
            self._fetch(i)
        self.link.wait(self.coming.pop(i))
        slab = self._slab(i)
        if wanted.new > wanted.lo:
            before = self._slab(i - 1)
            # Less where slabs between the two are not visited.
            end = min(wanted.new - self.plan[i - 1].lo, before.shape[2])
            slab[:, :, : wanted.new - wanted.lo] = before[:, :, end - (wanted.new - wanted.lo) : end]
        if i + 1 < len(self.plan):
            self._fetch(i + 1)
        return slab

    def _next(self, rows: tuple[int, int], sample: int) -> Wanted:
        """What is next in the plan, or first."""
        for position in (self.position + 1, 0):
            if position < len(self.plan) and self.plan[position][:3] == (sample, *rows):
                self.position = position
                return self.plan[position]
        raise RuntimeError(f"rows {rows} of sample {sample} are not the next ones of the plan")

    def _slab(self, i: int) -> Tensor:
        wanted = self.plan[i]
        return self.ring[i % 2][:, :, : wanted.hi - wanted.lo]

    def _copied(self, wanted: Wanted) -> Tensor:
        return self.held[wanted.sample : wanted.sample + 1, :, wanted.new : wanted.hi]

    def _fetch(self, i: int) -> None:
        """Into the memory of the slab before the last, whose use has been asked for."""
        assert self.link is not None
        wanted = self.plan[i]
        source = self._copied(wanted)
        _count(to_device=source.nbytes * wanted.alike)
        target = self._slab(i)[:, :, wanted.new - wanted.lo :]
        self.coming[i] = self.link.fetch(_flat(target), _flat(source), self.link.mark())

    def __del__(self) -> None:
        for mark in self.coming.values():  # an exception ended the sweep
            if self.link is not None:
                self.link.join(mark)


def _count(to_host: int = 0, to_device: int = 0) -> None:
    traffic = _traffic.get()
    if traffic is not None:
        traffic.to_host += to_host
        traffic.to_device += to_device


def _flat(slab: Tensor) -> Tensor:
    """The same in the order of its memory: one piece, which one copy moves."""
    return slab.detach().permute(0, 2, 3, 4, 1)
