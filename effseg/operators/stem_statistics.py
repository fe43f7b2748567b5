"""Statistics of a convolution whose output is never stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.stem_statistics import stem_statistics_backward, stem_statistics_forward
from effseg.common.settings import Function
from effseg.expressions.slabs import Window
from effseg.operators import compiled
from effseg.operators.backward import backward as node_backward


class StemStatisticsFunction(Function):
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
        ctx.voxels, ctx.dtype = math.prod(window.output_size((d, h, w))), weight.dtype
        return mean, var

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad_mean, grad_var):  # type: ignore[no-untyped-def]
        p, q = ctx.saved_tensors
        grad = stem_statistics_backward(p, q, grad_mean, grad_var, ctx.voxels, ctx.dtype)
        return None, grad, None, None, None


def stem_statistics(
    image: Tensor, weight: Tensor, window: Window, dtype: torch.dtype, slab_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `effseg.functional.stem_statistics`."""
    if torch.compiler.is_compiling():
        return compiled.stem_statistics(image, weight, window, dtype, slab_elements)
    with torch.autocast(image.device.type, enabled=False):
        return StemStatisticsFunction.apply(image, weight, window, dtype, slab_elements)
