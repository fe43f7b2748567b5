"""Slabs: how an operator walks through the first spatial axis.

A slab is rows [lo, hi) of one sample. Operators never hold more than one slab of an activated tensor, so
the thickness decides the transient memory: too thick costs memory, too thin costs arithmetic in the halo
(a 3x3x3 convolution of T rows reads T + 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from effseg.common.device import kind_of
from effseg.common.settings import Setting
from effseg.parallel.partition import current, own_rows

# What a slab may hold by default, whatever the volume. On a CPU: tensors under 32 MiB come from glibc's heap
# and are used again at once, where larger ones are mapped and their pages cleared on every allocation, which
# costs more than the arithmetic of an elementwise pass (11 ms against 0.7 ms for 16 x 32 x 128 x 128 floats).
# On a GPU: an elementwise pass over fewer takes less time than its launch.
THICK_SLAB_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
# What a slab holds on a GPU whose memory allows it: launches no longer matter, and halos hardly.
THICKEST_SLAB_ELEMENTS = 2**27
# The share of a tensor that a slab holds where that is more, and everywhere with SHARE.
SLAB_FRACTION = 1 / 40
# Of the finest tensor that a network stores: a slab of what it never stores is as large on the level above.
STORED_FRACTION = 1 / 32
# The most that a slab holds of a tensor, but for LEAST_THICK: a volume of a few thick slabs would need as
# much memory for slabs as for what it keeps.
LARGEST_FRACTION = 1 / 8
# Half of these on a CPU, and a step at 64x64x64 takes a twentieth longer.
LEAST_THICK = {"cpu": 2**21, "cuda": 2**22}
# Thinner slabs are mostly halo.
MIN_ROWS = 4
# Of a process that shares a volume with others, and so has few rows: slabs are to be a small part of them,
# where MIN_ROWS have more elements than it is worth.
MIN_ROWS_OF_SHARED = 2
SMALL_SLAB_ELEMENTS = 2**20
# Rows that a level which is run again reads on either side of a slab: of its three convolutions in a row.
WIDEST_HALO = 3
# As `slab_elements`: slabs of the same share of every tensor, so that what a step needs grows with the volume
# and nothing else. Small volumes run faster in fewer slabs.
SHARE = 0
# On a CPU, of a network that streams: for fewer, halos and calls take longer than what they are for (a step
# at 64x64x64 took 1.8 times as long as raw, and takes 1.2). From 128x128x128 on MIN_ROWS of the finest level
# have as many.
LEAST_ON_CPU = 2**20
# As `slab_elements`: slabs of MIN_ROWS or, if more, of this share of every tensor, where memory is all that
# counts.
THIN = -(2**62)
THIN_FRACTION = 1 / 128


def rows_per_slab(rows: int, row_elements: int, slab_elements: int | None, device: torch.device) -> int:
    """Rows in a slab of a tensor of `rows` rows with `row_elements` elements each.

    `slab_elements` asks for slabs of about so many elements and may give slabs of a single row; SHARE asks
    for SLAB_FRACTION of the tensor, but at least MIN_ROWS, THIN for less, and another negative number for
    SHARE's or, if more, so many elements (`at_least`); None for SHARE's or, if more, `thick_slab` on this
    device. Slabs of one tensor are of equal thickness but for the last. Where a volume is split, rows are
    those of this process.
    """
    lo, hi = own_rows(rows)
    rows = max(hi - lo, 1)
    if slab_elements is None:
        slab_elements = at_least(thick_slab(rows * row_elements, device))
    if slab_elements == THIN:
        thickness = max(MIN_ROWS, int(rows * THIN_FRACTION))
    elif slab_elements > 0:
        thickness = max(1, slab_elements // row_elements)
    else:
        small = current() is None or MIN_ROWS * row_elements <= SMALL_SLAB_ELEMENTS
        least = MIN_ROWS if small else MIN_ROWS_OF_SHARED
        thickness = max(least, int(rows * SLAB_FRACTION), -slab_elements // row_elements)
    # Equal slabs: a thin rest would be all halo, and an allocator finds a hole of its size again.
    return math.ceil(rows / math.ceil(rows / thickness))


def at_least(elements: int) -> int:
    """As `slab_elements`: slabs of so many elements, or of SLAB_FRACTION of the tensor if that is more."""
    return -elements


def slabs_of_levels(finest: int, stored: int, device: torch.device, flat: bool) -> int | None:
    """`slab_elements` for a network of levels that become smaller, by default.

    finest, stored: elements of a tensor of its finest level, and of the finest one that it stores; flat:
    whether the memory for slabs is to be the same share of any volume. On a GPU, where short operators cost
    as much as long ones, slabs hold no fewer elements on the coarse levels than on the finest stored one:
    memory peaks there.
    """
    if kind_of(device) == "cpu":
        return at_least(LEAST_ON_CPU) if flat else None
    share = int(stored * STORED_FRACTION)
    return at_least(share if flat else max(share, thick_slab(finest, device)))


def thick_slab(elements: int, device: torch.device) -> int:
    """THICK_SLAB_ELEMENTS or LARGEST_FRACTION of so many elements, the lesser one; LEAST_THICK at least."""
    kind = kind_of(device)
    return min(THICK_SLAB_ELEMENTS[kind], max(LEAST_THICK[kind], int(elements * LARGEST_FRACTION)))


@dataclass
class Abridgement:
    """alike: how many slabs the one that is being visited stands for."""

    alike: int = 1


_abridgement: Setting[Abridgement | None] = Setting("effseg_abridgement", None)


@contextmanager
def abridged() -> Iterator[Abridgement]:
    """Inside, a sweep visits the first two slabs and the last one of a sample (of slabs of a row or two some
    more), and one of every other sample.

    Results are then meaningless, but their shapes are right, and so are memory and arithmetic: the skipped
    slabs are of the shapes of the one before them, and from it on nothing is allocated that stays. For steps
    on fake tensors.
    """
    abridgement = Abridgement()
    with _abridgement.set(abridgement):
        yield abridgement


class Slab(NamedTuple):
    """Rows [lo, hi) of one sample; here: where they lie in a stored tensor of as many rows, which holds those
    of this process alone where the volume is split."""

    sample: int
    lo: int
    hi: int
    here: slice

    @property
    def one(self) -> slice:
        """The sample, as an axis of 1."""
        return slice(self.sample, self.sample + 1)


def slabs(samples: int, rows: int, thickness: int) -> Iterator[Slab]:
    """This process's slabs of a tensor of so many rows, in the order in which operators visit them."""
    first, last = own_rows(rows)
    starts = range(first, last, thickness)
    typical = math.ceil(WIDEST_HALO / thickness)  # the first slab whose halo the volume's end does not cut
    abridgement = _abridgement.get()
    for n in range(samples):
        for i, lo in enumerate(starts):
            if abridgement is not None:
                if typical < i < len(starts) - 1 or (n > 0 and i > 0):
                    continue
                interior = max(len(starts) - 1 - typical, 1) if i == typical else 1
                abridgement.alike = interior * (samples if i > 0 else 1)
            hi = min(lo + thickness, last)
            yield Slab(n, lo, hi, slice(lo - first, hi - first))
    if abridgement is not None:
        abridgement.alike = 1


def alike() -> int:
    """How many slabs the one that is being visited stands for."""
    abridgement = _abridgement.get()
    return 1 if abridgement is None else abridgement.alike


def slabs_and_those_before(
    samples: int, rows: int, thickness: int
) -> Iterator[tuple[int, int, int, tuple[int, int] | None, int]]:
    """Sample, lo and hi of each of `slabs`, rows of the slab before it, visited or not (None of a sample's
    first), and how many it stands for."""
    first, _ = own_rows(rows)
    for sample, lo, hi, _ in slabs(samples, rows, thickness):
        yield sample, lo, hi, (lo - thickness, lo) if lo > first else None, alike()


@dataclass(frozen=True)
class Window:
    """The axes of a convolution: kernel size, stride and zero padding per spatial axis (D, H, W)."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)

    @property
    def padding(self) -> tuple[int, int, int]:
        kd, kh, kw = self.kernel
        return kd // 2, kh // 2, kw // 2

    def output_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        d, h, w = ((n - 1) // s + 1 for n, s in zip(size, self.stride, strict=True))
        return d, h, w

    def input_rows(self, lo: int, hi: int, rows: int) -> tuple[int, int, tuple[int, int]]:
        """Input rows that output rows [lo, hi) read, and the rows of zeros before and after them."""
        first = self.stride[0] * lo - self.padding[0]
        last = self.stride[0] * (hi - 1) - self.padding[0] + self.kernel[0]
        return max(first, 0), min(last, rows), (max(-first, 0), max(last - rows, 0))
