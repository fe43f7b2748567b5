"""An expression of several tensors that several operators read: one gradient for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.expressions.base import Deferred, stand_in
from effseg.expressions.joins import Shared
from effseg.operators.materialise import Static, pulled_back
from effseg.operators.operator import Operator
from effseg.parallel.partition import own_shape


def share(x: Deferred, slab_elements: int | None = None) -> Deferred:
    """The same value. Without it every reader makes a gradient of the expression's size for each of its
    tensors (a residual sum has two); with it each makes one, and autograd adds them. Without a gradient, and
    under torch.compile, x as it is."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x
    standing = _operator(x.device, x.dtype, Static(x.spec, slab_elements), x.tensors)[0]
    tensors = (standing, *(t.detach() for t in x.tensors))
    return Deferred(Shared(x.shape, x.dtype, x.spec), tensors)


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    """A tensor of the expression's shape without memory, for gradients to come to; they are pulled back
    once."""
    return (stand_in(own_shape(static.spec.shape), static.spec.dtype, tensors[0].device),), ()


_operator = Operator("share", Static, _forward, pulled_back, zeros=True, reuses=True)
