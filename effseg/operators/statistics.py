"""Mean and variance of what no convolution of ours has made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.algorithms.pullback import Pullback, rows
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.base import Deferred, Spec, readable
from effseg.expressions.layers import plain
from effseg.expressions.slabs import Slab, slabs
from effseg.operators.conv3d import through_statistics
from effseg.operators.materialise import thickness
from effseg.operators.moments import Moments
from effseg.operators.operator import Operator


class Static(NamedTuple):
    spec: Spec
    slab_elements: int | None


def statistics(x: Tensor | Deferred, slab_elements: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of x (N, C, D, H, W) in the accumulation type, differentiable."""
    x = x if isinstance(x, Deferred) else plain(x)
    mean, var = _operator(x.device, x.dtype, Static(x.spec, slab_elements), x.tensors)
    return mean, var


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    spec, device = static.spec, tensors[0].device
    moments = Moments(ops, (spec.shape[0], spec.shape[1]), spec.dtype, device)
    stored = readable(spec, tensors, None, thickness(spec, static.slab_elements, device))
    for sample, lo, hi, _ in _slabs(static, device):
        part = rows(ops, spec, stored, sample, lo, hi)
        moments.add(sample, part.contiguous(memory_format=CHANNELS_LAST))
    return moments.merge(spec.shape), ()


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    (mean,) = own
    terms = through_statistics(static.spec.shape, mean, *grads)
    if terms is None:
        return [None] * len(tensors)
    per_slab = thickness(static.spec, static.slab_elements, mean.device)
    pullback = Pullback(ops, static.spec, tensors, needed, per_slab)
    for sample, lo, hi, _ in _slabs(static, mean.device):
        part = pullback.rows(sample, lo, hi)
        pullback.pull(ops.fold(None, part, *(t[sample] for t in terms)))
    return pullback.gradients()


def _slabs(static: Static, device: torch.device) -> Iterator[Slab]:
    spec = static.spec
    return slabs(spec.shape[0], spec.shape[2], thickness(spec, static.slab_elements, device))


_operator = Operator(
    "statistics", Static, _forward, _backward, outputs=2, own=lambda outputs, _: (outputs[0],)
)
