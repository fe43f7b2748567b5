"""Mean and variance of what no convolution of ours has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import CHANNELS_LAST
from effseg.algorithms.sweeps.conv3d import through_statistics
from effseg.algorithms.sweeps.materialise import thickness
from effseg.algorithms.sweeps.moments import Moments
from effseg.algorithms.sweeps.pullback import Pullback, rows
from effseg.deferred import Deferred, Spec, in_compute_type, plain
from effseg.nodes.backward import backward as node_backward
from effseg.settings import Function
from effseg.slabs import slabs


class StatisticsFunction(Function):
    """mean, var (N, C) of an expression. Saved for backward: the expression's tensors, and mean."""

    @staticmethod
    def forward(ctx: Any, spec, slab_elements, *tensors):  # type: ignore[no-untyped-def]
        device = tensors[0].device
        ctx.ops = select(device, spec.dtype)
        ctx.device_type, ctx.spec, ctx.slab_elements = device.type, spec, slab_elements
        ctx.set_materialize_grads(False)
        moments, low = Moments(ctx.ops, spec.shape[0], spec.dtype), in_compute_type(spec, tensors)
        for sample, lo, hi in _slabs(spec, slab_elements, device):
            part = rows(ctx.ops, spec, low, sample, lo, hi)
            moments.add(sample, part.contiguous(memory_format=CHANNELS_LAST))
        mean, var = moments.merge()
        ctx.save_for_backward(mean, *tensors)
        return mean, var

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad_mean, grad_var):  # type: ignore[no-untyped-def]
        mean, *tensors = ctx.saved_tensors
        terms = through_statistics(ctx.spec, mean, grad_mean, grad_var)
        if terms is None:
            return None, None, *[None] * len(tensors)
        pullback = Pullback(ctx.ops, ctx.spec, tensors, ctx.needs_input_grad[2:])
        for sample, lo, hi in _slabs(ctx.spec, ctx.slab_elements, mean.device):
            part = pullback.rows(sample, lo, hi)
            pullback.pull(ctx.ops.fold(None, part, *(t[sample] for t in terms)))
        return None, None, *pullback.gradients()


def _slabs(spec: Spec, slab_elements: int | None, device: torch.device):  # type: ignore[no-untyped-def]
    return slabs(spec.shape[0], spec.shape[2], thickness(spec, slab_elements, device))


def statistics(x: Tensor | Deferred, slab_elements: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of x (N, C, D, H, W) in the accumulation type, differentiable."""
    x = x if isinstance(x, Deferred) else plain(x)
    with torch.autocast(x.device.type, enabled=False):
        return StatisticsFunction.apply(x.spec, slab_elements, *x.tensors)
