"""An expression of several tensors that several operators read: one gradient for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.sweeps.materialise import materialise_backward
from effseg.composed import Shared
from effseg.deferred import Deferred
from effseg.nodes.backward import backward as node_backward
from effseg.nodes.ownership import is_alone
from effseg.settings import Function


class ShareFunction(Function):
    """A tensor of the expression's shape without memory, for gradients to come to; they are pulled back once.

    Saved for backward: the expression's tensors.
    """

    @staticmethod
    def forward(ctx: Any, spec, slab_elements, *tensors) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.ops = select(tensors[0].device, spec.dtype)
        ctx.device_type = tensors[0].device.type
        ctx.spec, ctx.slab_elements = spec, slab_elements
        ctx.save_for_backward(*tensors)
        return torch.empty((), dtype=spec.dtype, device=tensors[0].device).expand(spec.shape)

    @staticmethod
    @node_backward
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        memory = grad if is_alone(grad) else None
        grads = materialise_backward(
            ctx.ops, ctx.spec, ctx.saved_tensors, ctx.needs_input_grad[2:], grad, ctx.slab_elements, memory
        )
        return None, None, *grads


def share(x: Deferred, slab_elements: int | None = None) -> Deferred:
    """The same value. Without it every reader makes a gradient of the expression's size for each of its
    tensors (a residual sum has two); with it each makes one, and autograd adds them. Without a gradient, and
    under torch.compile, x as it is."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x
    with torch.autocast(x.device.type, enabled=False):
        standing = ShareFunction.apply(x.spec, slab_elements, *x.tensors)
    tensors = (standing, *(t.detach() for t in x.tensors))
    return Deferred(Shared(x.shape, x.dtype, x.spec), tensors)
