"""The place of a lazy tensor in autograd's graph.

Operators that know lazy tensors take gradients to what those are made of. Code that does not know them (a
torch.autograd.Function, a checkpoint, a hook, the engine itself) sees the nodes below: to them a lazy
tensor is an ordinary one, made by an operator of what its values are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.common.settings import Function
from effseg.conversion.values import Recipe, computed
from effseg.operators.backward import once_differentiable
from effseg.parallel.partition import own_rows


class Standing(Function):
    """A lazy tensor without memory: make(). Its gradient is pulled back through values that are computed
    again.

    Saved for backward: what the values are made of; nothing if they are stored.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], recipe: Recipe | None, *operands: Tensor) -> Tensor:
        _keep(ctx, recipe, operands)
        return make()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *_pulled_back(ctx, grad)


class Changed(Function):
    """A lazy tensor after an operator that worked in place: the same one, made of other operands."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, recipe: Recipe | None, *operands: Tensor) -> Tensor:
        _keep(ctx, recipe, operands)
        ctx.mark_dirty(lazy)
        return lazy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *_pulled_back(ctx, grad)


class Attached(Function):
    """Values, with the gradient of the lazy tensor that they are the values of. Saved: nothing."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _keep(ctx: Any, recipe: Recipe | None, operands: Sequence[Tensor]) -> None:
    """recipe: None for stored values."""
    ctx.recipe = recipe
    if recipe is not None:
        ctx.save_for_backward(*operands)


def _pulled_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[2:]
    if ctx.recipe is None:
        return (grad,)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
    with torch.enable_grad():
        values = computed(ctx.recipe(leaves))
    lo, hi = own_rows(grad.shape[2])
    grad = grad[:, :, lo:hi]  # a lazy tensor is as large as the whole volume, where processes share one
    found = iter(torch.autograd.grad(values, [t for t in leaves if t.requires_grad], grad, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)
