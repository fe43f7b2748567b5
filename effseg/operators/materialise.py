"""A deferred expression made into a stored tensor, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.algorithms.pullback import Pullback, rows
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.base import Deferred, Spec, readable
from effseg.expressions.slabs import rows_per_slab, slabs
from effseg.operators.operator import Operator
from effseg.parallel.partition import own_shape


class Static(NamedTuple):
    spec: Spec
    slab_elements: int | None


def materialise(x: Deferred, slab_elements: int | None = None) -> Tensor:
    """See `effseg.functional.materialise`."""
    return _operator(x.device, x.dtype, Static(x.spec, slab_elements), x.tensors)[0]


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    return (materialise_forward(ops, static.spec, tensors, static.slab_elements),), ()


def pulled_back(
    ops: Algorithm,
    static: Static,
    own: Sequence[Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: tuple[Tensor],
    alone: bool = False,
) -> list[Tensor | None]:
    """The gradients of the expression's tensors, as an operator's `backward`."""
    memory = grads[0] if alone else None
    return materialise_backward(ops, static.spec, tensors, needed, grads[0], static.slab_elements, memory)


def _fake(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    shape, dtype = static.spec.shape, static.spec.dtype
    return [torch.empty(shape, dtype=dtype, device=tensors[0].device, memory_format=CHANNELS_LAST)]


_operator = Operator("materialise", Static, _forward, pulled_back, _fake, zeros=True, reuses=True)


def thickness(spec: Spec, slab_elements: int | None, device: torch.device) -> int:
    _, c, d, h, w = spec.shape
    return rows_per_slab(d, c * h * w, slab_elements, device)


def materialise_forward(
    ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], slab_elements: int | None
) -> Tensor:
    device = tensors[0].device
    shape = own_shape(spec.shape)
    y = torch.empty(shape, dtype=spec.dtype, device=device, memory_format=CHANNELS_LAST)
    per_slab = thickness(spec, slab_elements, device)
    stored = readable(spec, tensors, None, per_slab)
    for sample, lo, hi, here in slabs(spec.shape[0], spec.shape[2], per_slab):
        y[sample : sample + 1, :, here] = rows(ops, spec, stored, sample, lo, hi)
    return y


def materialise_backward(
    ops: Algorithm,
    spec: Spec,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
    slab_elements: int | None,
    memory: Tensor | None = None,
) -> list[Tensor | None]:
    """memory: grad, if it is nobody else's: see `Pullback`."""
    per_slab = thickness(spec, slab_elements, tensors[0].device)
    pullback = Pullback(ops, spec, tensors, needed, per_slab, memory)
    for sample, lo, hi, here in slabs(spec.shape[0], spec.shape[2], per_slab):
        pullback.rows(sample, lo, hi)
        pullback.pull(grad[sample : sample + 1, :, here], read=here.stop)
    return pullback.gradients()
