"""Convolution of a deferred expression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.conv3d import conv3d_backward, conv3d_forward
from effseg.deferred import Deferred
from effseg.nodes import compiled
from effseg.nodes.backward import backward as node_backward
from effseg.nodes.ownership import is_alone
from effseg.settings import Function
from effseg.slabs import Window

Outputs = tuple[Tensor, Tensor | None, Tensor | None]


class Conv3dFunction(Function):
    """y, mean, var = conv(expression).

    Saved for backward: the expression's tensors, the weight, mean (tiny) and y. The layer that follows
    keeps the same y, so the count stays one raw output per convolution; without statistics y is not
    needed and not saved.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, spec, window, statistics, slab_elements, known, trains, consumes, weight, bias, *tensors
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.ops = select(weight.device, spec.dtype)
        ctx.device_type = weight.device.type
        ctx.spec, ctx.window, ctx.slab_elements, ctx.has_bias = spec, window, slab_elements, bias is not None
        ctx.consumes = consumes
        ctx.set_materialize_grads(False)
        if known is None:
            y, mean, var = conv3d_forward(
                ctx.ops, spec, tensors, weight, bias, window, statistics, slab_elements, trains
            )
        else:
            y, mean, var = known
            y = y.detach()
            mean, var = (None if t is None else t.detach() for t in (mean, var))
        y = y.data  # a view may not be changed in place afterwards, and an algorithm may give one
        ctx.output_shape = y.shape
        ctx.save_for_backward(weight, y if statistics else None, mean, *tensors)
        return y, mean, var

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad_y, grad_mean, grad_var):  # type: ignore[no-untyped-def]
        consumes = ctx.consumes or is_alone(grad_y)
        weight, y, mean, *tensors = ctx.saved_tensors
        need_weight, need_bias, *needed = ctx.needs_input_grad[7:]
        grad_weight, grad_bias, grads = conv3d_backward(
            ctx.ops, ctx.spec, tensors, needed, weight, ctx.window, grad_y if y is None else y, mean,
            grad_y, grad_mean, grad_var, need_weight, need_bias, ctx.slab_elements, consumes,
        )  # fmt: skip
        return *[None] * 7, grad_weight, grad_bias, *grads


def conv3d(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    statistics: bool = True,
    slab_elements: int | None = None,
    known: Outputs | None = None,
    consumes: bool = False,
) -> Outputs:
    """See `effseg.functional.conv3d`. known: what a forward pass gave that is run again for its graph.
    A gradient of x comes to lie in the memory of the gradient of y where nothing else holds that. consumes: y
    is only read by operators of this package, and with a normalisation, so that this need not be asked."""
    if torch.compiler.is_compiling():
        return compiled.conv3d(x, weight, bias, window, statistics, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        return Conv3dFunction.apply(
            x.spec,
            window,
            statistics,
            slab_elements,
            known,
            torch.is_grad_enabled(),
            consumes,
            weight,
            bias,
            *x.tensors,
        )
