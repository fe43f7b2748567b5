"""An expression made into a stored tensor, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.algorithms.interface import CHANNELS_LAST, Algorithm
from effseg.expressions.layers import Spec, in_compute_type
from effseg.expressions.slabs import rows_per_slab, slabs
from effseg.operators.pullback import Pullback, rows


def thickness(spec: Spec, slab_elements: int | None, device: torch.device) -> int:
    _, c, d, h, w = spec.shape
    return rows_per_slab(d, c * h * w, slab_elements, device)


def materialise_forward(
    ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], slab_elements: int | None
) -> Tensor:
    device = tensors[0].device
    y = torch.empty(spec.shape, dtype=spec.dtype, device=device, memory_format=CHANNELS_LAST)
    tensors = in_compute_type(spec, tensors)
    for sample, lo, hi in slabs(
        spec.shape[0], spec.shape[2], thickness(spec, slab_elements, tensors[0].device)
    ):
        y[sample : sample + 1, :, lo:hi] = rows(ops, spec, tensors, sample, lo, hi)
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
    pullback = Pullback(ops, spec, tensors, needed, memory)
    for sample, lo, hi in slabs(
        spec.shape[0], spec.shape[2], thickness(spec, slab_elements, tensors[0].device)
    ):
        pullback.rows(sample, lo, hi)
        pullback.pull(grad[sample : sample + 1, :, lo:hi], read=hi)
    return pullback.gradients()
