"""Backward passes that have no backward of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ONCE = (
    "a second derivative through an operator of effseg: expected the first alone; effseg.restore(network) "
    "gives a converted network back, and effseg.StockEffSegNet is an EffSegNet in stock torch"
)


def once_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients raise `RuntimeError` where they are differentiated again.

    torch's decorator of that name cuts the graph, so that whoever allows unused inputs (hessian) gets zeros.
    """

    @wraps(function)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = function(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        depends = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        if not depends:
            return found
        return tree_map(lambda g: _Once.apply(g, *depends) if isinstance(g, Tensor) else g, found)

    return run


class _Once(torch.autograd.Function):
    """The gradient, which depends on the others in a way that nobody has written down. Saved: nothing."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(ONCE)
