"""A deferred expression made into a stored tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.materialise import materialise_backward, materialise_forward
from effseg.deferred import Deferred
from effseg.nodes import compiled
from effseg.nodes.backward import backward as node_backward
from effseg.nodes.ownership import is_alone
from effseg.settings import Function


class MaterialiseFunction(Function):
    """y = the expression's value. Saved for backward: the expression's tensors."""

    @staticmethod
    def forward(ctx: Any, spec, slab_elements, *tensors) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.ops = select(tensors[0].device, spec.dtype)
        ctx.device_type = tensors[0].device.type
        ctx.spec, ctx.slab_elements = spec, slab_elements
        ctx.save_for_backward(*tensors)
        return materialise_forward(ctx.ops, spec, tensors, slab_elements)

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        memory = grad if is_alone(grad) else None
        grads = materialise_backward(
            ctx.ops, ctx.spec, ctx.saved_tensors, ctx.needs_input_grad[2:], grad, ctx.slab_elements, memory
        )
        return None, None, *grads


def materialise(x: Deferred, slab_elements: int | None = None) -> Tensor:
    """See `effseg.functional.materialise`."""
    if torch.compiler.is_compiling():
        return compiled.materialise(x, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        return MaterialiseFunction.apply(x.spec, slab_elements, *x.tensors)
