"""What every operator's backward has in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once differentiable, and blind to an autocast that happens to be on: the types are those of forward.

    The forward pass leaves `ctx.device_type`.
    """

    @once_differentiable
    @wraps(function)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.autocast(ctx.device_type, enabled=False):
            return function(ctx, *grads)

    return run
