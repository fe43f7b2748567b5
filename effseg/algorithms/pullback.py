"""Gradients of an expression's tensors, slab by slab.

A pull-back is linear, so a slab's share of the gradient of a halo row is simply added to its neighbour's:
the result is exact without any exchange of halos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype
from effseg.expressions.base import Rows, Spec, Stored, Use, halos, readable
from effseg.expressions.slabs import Window
from effseg.parallel.halo import Halo, Homeward, send_home
from effseg.parallel.partition import current


class _Rows:
    """The gradient of a stored tensor of which slabs need rows. Rows seen for the first time are written,
    later ones added to; those of other processes are sent home at the end."""

    def __init__(self, tensor: Tensor, halo: Halo | None = None) -> None:
        self.tensor = tensor
        self.homeward = None if halo is None else Homeward(tensor, halo)
        self.start = 0 if halo is None else halo.start
        self.grad: Tensor | None = None
        self.written = [0] * tensor.shape[0]

    def prepare(self, rows: Rows) -> None:
        """Allocate the gradient, unless these rows are all: then they become it."""
        every = self.start, self.start + self.tensor.shape[2]
        if self.grad is None and not (self.tensor.shape[0] == 1 and rows == every):
            self.grad = torch.empty_like(self.tensor, memory_format=self._layout())

    def _layout(self) -> torch.memory_format:
        """What only stands for a value has no strides; any other gradient has its tensor's, or autograd would
        copy it."""
        return torch.preserve_format if any(self.tensor.stride()) else CHANNELS_LAST

    def add(self, rows: Rows, sample: int, part: Tensor) -> None:
        """Of rows of the whole volume."""
        if self.homeward is not None:
            own = self.homeward.add(rows, sample, part)
            if own is None:
                return
            rows, part = own
        self.add_own((rows[0] - self.start, rows[1] - self.start), sample, part)

    def add_own(self, rows: Rows, sample: int, part: Tensor) -> None:
        """Of rows of the tensor."""
        if self.grad is None:
            self.grad, self.written = part, [part.shape[2]]
            return
        (lo, hi), done = rows, self.written[sample]
        grad = self.grad[sample : sample + 1]
        overlap = max(0, min(done, hi) - lo)
        if done < lo:
            grad[:, :, done:lo].zero_()
        if overlap:
            grad[:, :, lo : lo + overlap].add_(part[:, :, :overlap])
        if lo + overlap < hi:
            grad[:, :, lo + overlap : hi].copy_(part[:, :, overlap:])
        self.written[sample] = max(done, hi)

    def result(self) -> Tensor:
        """Without what other processes find for these rows."""
        if self.grad is None:
            return torch.zeros_like(self.tensor, memory_format=self._layout())
        for sample, done in enumerate(self.written):
            if done < self.tensor.shape[2]:
                self.grad[sample, :, done:].zero_()
        return self.grad.to(self.tensor.dtype)


class _Reused(_Rows):
    """The same in the memory of a gradient of which a sweep reads rows [0, read) of a sample before these are
    added to. What comes for later rows waits."""

    def __init__(self, tensor: Tensor, memory: Tensor, halo: Halo | None = None) -> None:
        super().__init__(tensor, halo)
        self.grad = memory
        self.read = 0
        self.waiting: Tensor | None = None

    def prepare(self, rows: Rows) -> None:
        pass

    def without_others(self, parts: Sequence[Tensor], of: Sequence[Any]) -> tuple[Tensor, ...]:
        """parts; others' that lie in the memory, too, are copied: a term of a sum has its gradient."""
        assert self.grad is not None
        memory = self.grad.untyped_storage()._cdata
        return tuple(
            part.clone() if gradient is not self and part.untyped_storage()._cdata == memory else part
            for part, gradient in zip(parts, of, strict=True)
        )

    def add_own(self, rows: Rows, sample: int, part: Tensor) -> None:
        lo, hi = rows
        if self.waiting is not None:
            first = max(self.written[sample] - lo, 0)  # below 0 where an abridged sweep skips slabs
            part[:, :, first : first + self.waiting.shape[2]].add_(self.waiting)
        ready = min(self.read, hi)
        self.waiting = part[:, :, ready - lo :].clone() if ready < hi else None
        super().add_own((lo, ready), sample, part[:, :, : ready - lo])


class _Sum:
    """The gradient of weights, or of numbers per sample, to which every slab adds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.grad: Tensor | None = None

    def target(self, use: Use, sample: int, part: Tensor) -> Tensor | None:
        """What `part` is to be added to; None where it was the first and all that there is."""
        wide = accumulation_dtype(self.tensor.dtype)
        if self.grad is None and part.shape == self.tensor.shape:
            self.grad = part.to(wide, copy=True)
            return None
        if self.grad is None:
            self.grad = torch.zeros_like(self.tensor, dtype=wide)
        return use.cut(self.grad, sample)

    def result(self) -> Tensor:
        return torch.zeros_like(self.tensor) if self.grad is None else self.grad.to(self.tensor.dtype)


class Pullback:
    """Makes an expression's rows with a graph and pulls gradients back to the stored tensors.

    `needed` says which tensors want a gradient; slabs of `thickness` rows are visited in ascending order
    within a sample. memory: of a gradient that nobody needs after its rows have been pulled, for the first
    tensor of its shape; window: of a convolution whose output rows the sweep walks over, without one it walks
    over the expression's. Where the volume is split, rows are those of the whole volume.
    """

    def __init__(
        self,
        ops: Algorithm,
        spec: Spec,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        thickness: int,
        memory: Tensor | None = None,
        window: Window | None = None,
    ) -> None:
        self.ops, self.spec, self.tensors, self.needed = ops, spec, tensors, needed
        self.split = current()
        shared = [None] * len(tensors) if self.split is None else halos(self.split, spec, window)
        self.low = readable(spec, tensors, window, thickness)
        self.any = any(needed)
        uses = spec.uses(0, spec.shape[2])
        self.centres = [i for i, use in enumerate(uses) if use.centre and needed[i]]
        own = {i for i, n in enumerate(needed) if n} - set(self.centres) | {i + 2 for i in self.centres}
        self.sums: dict[int, _Rows | _Sum] = {
            i: _Sum(tensors[i]) if uses[i].rows is None else _Rows(tensors[i], shared[i]) for i in sorted(own)
        }
        self.reused: _Reused | None = None
        for i, gradient in self.sums.items():
            if memory is not None and isinstance(gradient, _Rows) and alike(memory, tensors[i]):
                self.sums[i] = self.reused = _Reused(tensors[i], memory, shared[i])
                break

    def prepare(self, lo: int, hi: int) -> None:
        """Allocate the gradients that outlive the slabs, before the first slab, which has rows [lo, hi).

        Later they would come to lie beside tensors of that slab, whose end leaves holes.
        """
        uses = self.spec.uses(lo, hi)
        for i, gradient in self.sums.items():
            wanted = uses[i].rows
            if isinstance(gradient, _Rows) and wanted is not None:
                gradient.prepare(wanted)

    def rows(self, sample: int, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of one sample; the graph is kept for the next `pull`."""
        self.prepare(lo, hi)
        self.sample, self.uses = sample, self.spec.uses(lo, hi)
        self.leaves = [
            use.cut(t, sample).detach().requires_grad_(i in self.sums)
            for i, (use, t) in enumerate(zip(self.uses, self.low, strict=True))
        ]
        with torch.set_grad_enabled(self.any):
            value = self.spec.rows(self.ops, lo, hi, self.leaves)
        if self.any:
            self.value = value
        return value.detach()

    def pull(self, grad: Tensor, read: int = 0) -> None:
        """Add the gradients that `grad`, the gradient of the latest rows, gives the stored tensors. read: how
        many rows of the sample have been read of `memory`."""
        if self.reused is not None:
            self.reused.read = read
        value, leaves = self.value, [self.leaves[i] for i in self.sums]
        del self.value, self.leaves
        parts = torch.autograd.grad(value, leaves, grad)
        del value, leaves
        if self.reused is not None:
            parts = self.reused.without_others(parts, list(self.sums.values()))
        targets, small = [], []
        for (i, accumulator), part in zip(self.sums.items(), parts, strict=True):
            use = self.uses[i]
            if isinstance(accumulator, _Rows):
                assert use.rows is not None
                accumulator.add(use.rows, self.sample, part)
                continue
            target = accumulator.target(use, self.sample, part)
            if target is not None:
                targets.append(target)
                small.append(part)
        if targets:
            torch._foreach_add_(targets, small)

    def gradients(self) -> list[Tensor | None]:
        """Of what this process's slabs read; those of rows, which belong to it, of all processes' slabs."""
        found = {i: accumulator.result() for i, accumulator in self.sums.items()}
        if self.split is not None:
            away = [(i, s.homeward) for i, s in self.sums.items() if isinstance(s, _Rows) and s.homeward]
            send_home(self.split, [(homeward, found[i]) for i, homeward in away])
        found |= {i: (self.tensors[i + 1] * found[i + 2]).neg_() for i in self.centres}
        return [found[i] if needed else None for i, needed in enumerate(self.needed)]


def alike(memory: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor's gradient may lie in that memory. What only stands for a value has no strides."""
    same = (memory.shape, memory.dtype) == (tensor.shape, tensor.dtype)
    strides = tensor.stride() if any(tensor.stride()) else None
    dense = memory.is_contiguous(memory_format=CHANNELS_LAST)
    return same and dense and (strides is None or strides == memory.stride())


def added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum over slabs and one more, in `dtype`; a part that is nobody else's becomes the sum."""
    return part.to(dtype) if total is None else total.add_(part)


def rows(ops: Algorithm, spec: Spec, tensors: Sequence[Stored], sample: int, lo: int, hi: int) -> Tensor:
    """Rows [lo, hi) of one sample without a graph, from tensors that are `readable`."""
    with torch.no_grad():
        cut = [use.cut(t, sample) for use, t in zip(spec.uses(lo, hi), tensors, strict=True)]
        return spec.rows(ops, lo, hi, cut)
