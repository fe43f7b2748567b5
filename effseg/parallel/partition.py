"""Which rows of a tensor a process holds when one volume is split across several processes.

A volume is cut along its first spatial axis. Of a tensor of D rows process r of R holds rows

    [r D // R, (r + 1) D // R)

on every level of a network, whatever its stride: the rows follow from D alone, their numbers differ by one
at most, and no stride need divide them. What a slab reads beyond them comes from neighbours
(`effseg.parallel.halo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from effseg.common.settings import Setting
from effseg.parallel.transport import Pretended, Transport

Rows = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Split:
    """This process's place among those that share a volume."""

    transport: Transport

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    def rows(self, total: int, rank: int | None = None) -> Rows:
        """Those of `rank`, by default this process, among `total`."""
        rank = self.rank if rank is None else rank
        return rank * total // self.size, (rank + 1) * total // self.size


def pretended(rows: int, processes: int) -> Split | None:
    """For fake tensors: the place of a process that needs most among `processes` that share a volume of so
    many rows: one with most of them and two neighbours. None for one process."""
    if processes == 1:
        return None
    splits = [Split(Pretended(rank, processes, rows)) for rank in range(processes)]
    between = splits[1:-1] or splits
    return max(between, key=lambda split: split.rows(rows)[1] - split.rows(rows)[0])


_split: Setting[Split | None] = Setting("effseg_split", None)


def current() -> Split | None:
    """The split that operators run in; None: a process has whole volumes."""
    return _split.get()


def entered(split: Split | None) -> AbstractContextManager[None]:
    """Inside, and in the backward pass of what was computed inside, volumes are split so."""
    return _split.set(split)


def own_rows(total: int) -> Rows:
    """The rows of a tensor of `total` rows that this process holds: all, unless its volume is split."""
    split = current()
    return (0, total) if split is None else split.rows(total)


def own_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(N, C, D, H, W) or (N, D, H, W) of what this process holds of a tensor of that shape."""
    lo, hi = own_rows(shape[-3])
    return (*shape[:-3], hi - lo, *shape[-2:])
