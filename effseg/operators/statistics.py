"""Mean and variance of a stored tensor that no convolution of ours has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import CHANNELS_LAST, Algorithm
from effseg.algorithms.sweeps.conv3d import through_statistics
from effseg.common.settings import Function
from effseg.expressions.slabs import rows_per_slab, slabs
from effseg.operators.backward import backward as node_backward
from effseg.operators.moments import Moments


class StatisticsFunction(Function):
    """mean, var (N, C) of x. Saved for backward: x, and mean."""

    @staticmethod
    def forward(ctx: Any, x, slab_elements):  # type: ignore[no-untyped-def]
        ctx.ops = select(x.device, x.dtype)
        ctx.device_type, ctx.slab_elements = x.device.type, slab_elements
        ctx.set_materialize_grads(False)
        mean, var = _moments(ctx.ops, x, slab_elements)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad_mean, grad_var):  # type: ignore[no-untyped-def]
        x, mean = ctx.saved_tensors
        terms = through_statistics(x, mean, grad_mean, grad_var)
        if terms is None:
            return None, None
        grad = torch.empty_like(x, memory_format=CHANNELS_LAST)
        for sample, lo, hi in _slabs(x, ctx.slab_elements):
            part = x[sample : sample + 1, :, lo:hi]
            grad[sample : sample + 1, :, lo:hi] = ctx.ops.fold(None, part, *(t[sample] for t in terms))
        return grad, None


def _moments(ops: Algorithm, x: Tensor, slab_elements: int | None) -> tuple[Tensor, Tensor]:
    moments = Moments(ops, x.shape[0], x.dtype)
    for sample, lo, hi in _slabs(x, slab_elements):
        part = x[sample : sample + 1, :, lo:hi]
        moments.add(sample, part.contiguous(memory_format=CHANNELS_LAST))
    return moments.merge()


def _slabs(x: Tensor, slab_elements: int | None):  # type: ignore[no-untyped-def]
    n, c, d, h, w = x.shape
    return slabs(n, d, rows_per_slab(d, c * h * w, slab_elements, x.device))


def statistics(x: Tensor, slab_elements: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of x (N, C, D, H, W) in the accumulation type, differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        return StatisticsFunction.apply(x, slab_elements)
