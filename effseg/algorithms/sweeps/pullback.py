"""Gradients of an expression's tensors, slab by slab.

A pull-back is linear, so a slab's share of the gradient of a halo row is simply added to its neighbour's:
the result is exact without any exchange of halos.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.algorithms.interface import CHANNELS_LAST, Algorithm, accumulation_dtype
from effseg.deferred import Spec, Use


class _Accumulator:
    """The gradient of one stored tensor. Rows seen for the first time are written, later ones added to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.grad: Tensor | None = None
        self.written = [0] * tensor.shape[0]

    def prepare(self, use: Use) -> None:
        """Allocate the gradient, unless the rows are all: then they become it."""
        if self.grad is not None or use.rows is None:
            return
        if self.tensor.shape[0] == 1 and use.rows == (0, self.tensor.shape[2]):
            return
        # What only stands for a value has no strides; any other gradient has its tensor's, or autograd would
        # copy it.
        stands = not any(self.tensor.stride())
        layout = CHANNELS_LAST if stands else torch.preserve_format
        self.grad = torch.empty_like(self.tensor, memory_format=layout)

    def add(self, use: Use, sample: int, part: Tensor) -> None:
        if use.rows is None:
            if self.grad is None:  # many slabs add to it
                wide = accumulation_dtype(self.tensor.dtype)
                self.grad = torch.zeros_like(self.tensor, dtype=wide)
            use.cut(self.grad, sample).add_(part)
            return
        if self.grad is None:
            self.grad, self.written = part, [part.shape[2]]
            return
        (lo, hi), done = use.rows, self.written[sample]
        grad = self.grad[sample : sample + 1]
        grad[:, :, done:lo].zero_()
        overlap = max(0, min(done, hi) - lo)
        grad[:, :, lo : lo + overlap].add_(part[:, :, :overlap])
        grad[:, :, lo + overlap : hi].copy_(part[:, :, overlap:])
        self.written[sample] = max(done, hi)

    def result(self) -> Tensor:
        if self.grad is None:
            return torch.zeros_like(self.tensor)
        for sample, done in enumerate(self.written):
            if self.tensor.dim() == 5 and done:
                self.grad[sample, :, done:].zero_()
        return self.grad.to(self.tensor.dtype)


class Pullback:
    """Makes an expression's rows with a graph and pulls gradients back to the stored tensors.

    `needed` says which tensors want a gradient; slabs are visited in ascending order within a sample.
    """

    def __init__(self, ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.ops, self.spec, self.tensors = ops, spec, tensors
        self.sums = [_Accumulator(t) if n else None for t, n in zip(tensors, needed, strict=True)]
        self.any = any(needed)

    def prepare(self, lo: int, hi: int) -> None:
        """Allocate the gradients that outlive the slabs, before the first slab, which has rows [lo, hi).

        Later they would come to lie beside tensors of that slab, whose end leaves holes.
        """
        for use, accumulator in zip(self.spec.uses(lo, hi), self.sums, strict=True):
            if accumulator is not None:
                accumulator.prepare(use)

    def rows(self, sample: int, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of one sample; the graph is kept for the next `pull`."""
        self.prepare(lo, hi)
        self.sample, self.uses = sample, self.spec.uses(lo, hi)
        self.leaves = [
            use.cut(t, sample).detach().requires_grad_(s is not None)
            for use, t, s in zip(self.uses, self.tensors, self.sums, strict=True)
        ]
        with torch.set_grad_enabled(self.any):
            value = self.spec.rows(self.ops, lo, hi, self.leaves)
        if self.any:
            self.value = value
        return value.detach()

    def pull(self, grad: Tensor) -> None:
        """Add the gradients that `grad`, the gradient of the latest rows, gives the stored tensors."""
        live = [i for i, s in enumerate(self.sums) if s is not None]
        value, leaves = self.value, [self.leaves[i] for i in live]
        del self.value, self.leaves
        parts = torch.autograd.grad(value, leaves, grad)
        del value, leaves
        for i, part in zip(live, parts, strict=True):
            accumulator = self.sums[i]
            assert accumulator is not None
            accumulator.add(self.uses[i], self.sample, part)

    def gradients(self) -> list[Tensor | None]:
        return [None if s is None else s.result() for s in self.sums]


def rows(ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], sample: int, lo: int, hi: int) -> Tensor:
    """Rows [lo, hi) of one sample without a graph."""
    with torch.no_grad():
        cut = [use.cut(t, sample) for use, t in zip(spec.uses(lo, hi), tensors, strict=True)]
        return spec.rows(ops, lo, hi, cut)
