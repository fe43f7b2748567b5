"""Mean and variance of a stored tensor that no convolution of ours has made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.layers import plain
from effseg.expressions.slabs import Slab, rows_per_slab, slabs
from effseg.operators.conv3d import through_statistics
from effseg.operators.moments import Moments
from effseg.operators.operator import Operator


class Static(NamedTuple):
    """shape: (N, C, D, H, W) of the whole volume."""

    shape: tuple[int, ...]
    slab_elements: int | None


def statistics(x: Tensor, slab_elements: int | None = None, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of x (N, C, D, H, W) in the accumulation type, differentiable. rows: as
    for `effseg.expressions.layers.plain`."""
    shape = plain(x, x.dtype, rows).shape
    mean, var = _operator(x.device, x.dtype, Static(shape, slab_elements), (x,))
    return mean, var


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    (x,) = tensors
    moments = Moments(ops, (x.shape[0], x.shape[1]), x.dtype, x.device)
    for slab in _slabs(x, static):
        part = x[slab.one, :, slab.here]
        moments.add(slab.sample, part.contiguous(memory_format=CHANNELS_LAST))
    return moments.merge(static.shape), ()


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None]:
    (mean,), (x,) = own, tensors
    terms = through_statistics(static.shape, mean, *grads)
    if terms is None:
        return (None,)
    grad = torch.empty_like(x, memory_format=CHANNELS_LAST)
    for slab in _slabs(x, static):
        part = x[slab.one, :, slab.here]
        grad[slab.one, :, slab.here] = ops.fold(None, part, *(t[slab.sample] for t in terms))
    return (grad,)


def _slabs(x: Tensor, static: Static) -> Iterator[Slab]:
    n, c, d, h, w = static.shape
    return slabs(n, d, rows_per_slab(d, c * h * w, static.slab_elements, x.device))


_operator = Operator(
    "statistics", Static, _forward, _backward, outputs=2, own=lambda outputs, _: (outputs[0],)
)
