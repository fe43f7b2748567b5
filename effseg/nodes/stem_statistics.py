"""Statistics of a convolution whose output is never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.stem_statistics import stem_statistics_forward
from effseg.nodes.backward import backward as node_backward
from effseg.slabs import Window


class StemStatisticsFunction(torch.autograd.Function):
    """mean, var of conv(image, weight), differentiable in the weight.

    Saved for backward: taps + taps * C numbers per sample (float64), so that backward sweeps nothing. The
    image gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, image, weight, window, dtype, slab_elements) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        mean, var, p, q = stem_statistics_forward(
            select(image.device, dtype), image, weight, window, dtype, slab_elements
        )
        ctx.device_type = image.device.type
        ctx.save_for_backward(p, q)
        d, h, w = image.shape[2:]
        out = window.output_size((d, h, w))
        ctx.voxels, ctx.dtype = out[0] * out[1] * out[2], weight.dtype
        return mean, var

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad_mean, grad_var):  # type: ignore[no-untyped-def]
        p, q = ctx.saved_tensors
        mean, var = (g.double()[..., None, None, None, None] for g in (grad_mean, grad_var))
        grad = ((mean * p + 2 * var * q) / ctx.voxels).sum(0)
        return None, grad.to(ctx.dtype), None, None, None


def stem_statistics(
    image: Tensor, weight: Tensor, window: Window, dtype: torch.dtype, slab_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `effseg.functional.stem_statistics`."""
    with torch.autocast(image.device.type, enabled=False):
        return StemStatisticsFunction.apply(image, weight, window, dtype, slab_elements)
