"""Convolutions whose kernels normalise and activate their input as they read it.

Forward writes y once and its statistics with it. Backward walks over slabs of output rows: the gradient of y,
with what reaches it through its statistics, is made into a slab that stays in a GPU's cache (by wgrad itself
where one slab is all); wgrad and dgrad read it from there, and dgrad writes each row of the input's gradient
once, its neighbours' halo included.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import StatisticsGradient
from effseg.algorithms.pullback import alike
from effseg.algorithms.triton import choices
from effseg.expressions.base import Spec
from effseg.expressions.layers import Plain, Raw
from effseg.expressions.slabs import Window, slabs
from effseg.kernels.conv3d_dgrad import conv3d_dgrad
from effseg.kernels.conv3d_fwd import conv3d_forward
from effseg.kernels.conv3d_wgrad import Fold, conv3d_wgrad
from effseg.kernels.launch import NormAct, empty
from effseg.kernels.norm_act import fold as fold_kernel

WIDE = 128


class Fused:
    """See `effseg.algorithms.interface.FusedConv3d`."""

    def takes(self, spec: Spec, weight: Tensor, window: Window) -> bool:
        """A stored tensor, or a stored raw output where the kernels march along D, where no pass is left to
        ATen.

        A march activates a voxel 9 times (6 in wgrad), the other loops once for each of up to 27 taps: there,
        and where the tensor is wide and so small, the slab is activated first.
        """
        if not isinstance(spec, (Plain, Raw)) or (isinstance(spec, Raw) and spec.held):
            return False
        passes = (choices.forward, choices.dgrad, choices.wgrad)
        low, prologue = weight.to(spec.dtype), isinstance(spec, Raw)
        configs = [choice(low, window, spec.shape[2:], prologue) for choice in passes]
        if None in configs:
            return False
        reads_once = prod(window.kernel) == 1
        marches = all(config is not None and config.loop != "tap" for config in configs)
        return not prologue or reads_once or (marches and spec.shape[1] < WIDE)

    def forward(
        self,
        spec: Spec,
        tensors: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, terms = _operands(spec, tensors)
        n, _, d, h, w = spec.shape
        y = empty((n, weight.shape[0], *window.output_size((d, h, w))), spec.dtype, x.device)
        found = conv3d_forward(
            x, weight.to(spec.dtype), y, window=window, front=window.padding[0], prologue=terms, bias=bias,
            statistics=statistics,
        )  # fmt: skip
        return (y, *(found or (None, None)))

    def backward(
        self,
        spec: Spec,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        weight: Tensor,
        window: Window,
        y: Tensor,
        through_statistics: StatisticsGradient | None,
        grad_y: Tensor | None,
        need_weight: bool,
        thickness: int,
        memory: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        low = weight.to(spec.dtype)
        x, terms = _operands(spec, tensors)
        given = _Given(spec, x, terms, window, y, through_statistics, grad_y)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        in_place = memory is not None and alike(memory, x) and x.dtype == spec.dtype and any(needed)
        grad_x = memory if in_place else empty(spec.shape, spec.dtype, x.device) if any(needed) else None
        above: Tensor | None = None  # rows of the gradient of y that are read again, but overwritten
        sums = torch.zeros(2, *spec.shape[:2], dtype=torch.float64, device=x.device)
        for sample, lo, hi, _ in slabs(y.shape[0], y.shape[2], thickness):
            slab = _Slab.of(sample, window, lo, hi, spec.shape[2], y.shape[2])
            g, share = _gradient(given, slab, above, in_place, need_weight)
            if grad_weight is not None and share is not None:
                grad_weight += share
            del share
            if in_place:
                following = _Slab.of(sample, window, hi, y.shape[2], spec.shape[2], y.shape[2])
                kept = slice(following.first_gradient - slab.first_gradient, hi - slab.first_gradient)
                above = g[:, :, kept].clone() if hi < y.shape[2] else None
            if grad_x is not None:
                rows = (slab.sample, slice(None), slice(slab.first, slab.last))
                own_terms = given.terms_of(slab)
                found = conv3d_dgrad(
                    g, low, grad_x[rows], window=window, front=slab.front,
                    epilogue=None if own_terms is None else (x[rows], own_terms),
                )  # fmt: skip
                if found is not None:
                    sums[:, slab.sample] += torch.stack(found)
            del g
        if grad_x is None:
            return grad_weight, [None] * len(tensors)
        return grad_weight, _gradients(tensors, needed, grad_x, sums)


class _Slab(NamedTuple):
    """Output rows [lo, hi) of a sample, and the input rows [first, last) that are theirs alone; the output
    rows [first_gradient, last_gradient), lo and hi inside, whose gradients reach those; `front` between the
    two."""

    sample: slice
    lo: int
    hi: int
    first: int
    last: int
    first_gradient: int
    last_gradient: int
    front: int

    @classmethod
    def of(cls, sample: int, window: Window, lo: int, hi: int, rows: int, output_rows: int) -> _Slab:
        stride, kernel, front = window.stride[0], window.kernel[0], window.padding[0]
        first, last = stride * lo, rows if hi == output_rows else stride * hi
        by_last_tap = -((kernel - 1 - front - first) // stride)  # rounded up
        begin = max(min(by_last_tap, lo), 0)
        end = min(max((last - 1 + front) // stride + 1, hi), output_rows)
        return cls(slice(sample, sample + 1), lo, hi, first, last, begin, end, front + first - stride * begin)


class _Given(NamedTuple):
    """What the forward pass read and wrote, and the gradient of what it wrote."""

    spec: Spec
    x: Tensor
    terms: NormAct | None
    window: Window
    y: Tensor
    through_statistics: StatisticsGradient | None
    grad_y: Tensor | None

    def terms_of(self, slab: _Slab) -> NormAct | None:
        if self.terms is None:
            return None
        mean, scale, beta = (term[slab.sample] for term in self.terms[:3])
        return NormAct(mean, scale, beta, self.terms.slope)


def _gradient(
    given: _Given, slab: _Slab, above: Tensor | None, copied: bool, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The whole gradient of the slab's rows of y, in the type of the products, and its share of the weight's.

    above: its first rows, where they are no longer to be read; copied: not as a part of grad_y.
    """
    if not need_weight:
        return _made(given, slab, above, copied), None
    x, terms, window = given.x[slab.sample], given.terms_of(slab), given.window
    through, direct = given.through_statistics, given.grad_y
    if through is not None and direct is not None and slab.hi - slab.lo == given.y.shape[2]:
        # One slab: a small volume, where launches cost more than arithmetic. wgrad makes it as it reads it.
        y, grad = given.y[slab.sample], direct[slab.sample].to(given.spec.dtype)
        g = empty(y.shape, given.spec.dtype, y.device)
        mean, scale, shift = (term[slab.sample] for term in through)
        fold, front = Fold(y, mean, scale, shift, g), window.padding[0]
        return g, conv3d_wgrad(x, grad, window=window, front=front, prologue=terms, fold=fold)
    g = _made(given, slab, above, copied)
    first, last, pad = window.input_rows(slab.lo, slab.hi, given.spec.shape[2])
    own = g[:, :, slab.lo - slab.first_gradient : slab.hi - slab.first_gradient]
    return g, conv3d_wgrad(x[:, :, first:last], own, window=window, front=pad[0], prologue=terms)


def _made(given: _Given, slab: _Slab, above: Tensor | None, copied: bool) -> Tensor:
    """The gradient of the slab's rows of y by a pass of its own, or grad_y's rows where that is all."""
    known = 0 if above is None else above.shape[2]
    rows = (slab.sample, slice(None), slice(slab.first_gradient + known, slab.last_gradient))
    direct = None if given.grad_y is None else given.grad_y[rows].to(given.spec.dtype)
    through = given.through_statistics
    if through is None and not copied:
        assert direct is not None
        return direct
    part = given.y[rows]
    out = empty((*part.shape[:2], known + part.shape[2], *part.shape[3:]), part.dtype, part.device)
    if above is not None:
        out[:, :, :known] = above
    if through is None:
        assert direct is not None
        out[:, :, known:] = direct
    else:
        mean, scale, shift = (term[slab.sample] for term in through)
        fold_kernel(direct, part, mean, scale, shift, out[:, :, known:])
    return out


def _operands(spec: Spec, tensors: Sequence[Tensor]) -> tuple[Tensor, NormAct | None]:
    if isinstance(spec, Raw):
        y, mean, scale, beta = tensors
        return y, NormAct(mean, scale, beta, spec.slope)
    return tensors[0], None


def _gradients(
    tensors: Sequence[Tensor], needed: Sequence[bool], grad_x: Tensor, sums: Tensor
) -> list[Tensor | None]:
    """In the order of the tensors: of x, and of mean, scale and beta where it is a raw output."""
    found = [grad_x.to(tensors[0].dtype)]
    if len(tensors) > 1:
        dscale, dbeta = sums.to(tensors[1].dtype)
        found += [-tensors[2] * dbeta, dscale, dbeta]
    return [g if need else None for g, need in zip(found, needed, strict=True)]
