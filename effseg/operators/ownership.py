"""Whether a gradient that has reached a node is that node's alone: others may come to lie in its memory.

Other readers of a gradient (an input of the operator that made it, a hook, whoever called `backward` with it,
`torch.autograd.grad`, a view) hold a reference to the tensor or to its storage. Autograd's engine adds up in
place where it finds no reference but its own; a node may ask the same. How many references the node, its
decorators and the engine hold themselves depends on the versions of Python and torch, so they are counted
once, of a gradient that nobody else has.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effseg.common.settings import Function
from effseg.common.tensors import storage_use_count
from effseg.operators.backward import once_differentiable


class _References(NamedTuple):
    """How many there are: from Python, to the tensor at all, to its storage."""

    python: int
    tensor: int
    storage: int


def is_alone(grad: Tensor | None) -> bool:
    """For a backward(ctx, *grads) decorated with `once_differentiable` alone, of one of its `grads`, which no
    variable names. False where there is any doubt."""
    if type(grad) not in (Tensor, FakeTensor) or torch.compiler.is_compiling():
        return False
    counts = _references(grad)
    return all(count <= own for count, own in zip(counts, _own(), strict=True))


def _references(grad: Any) -> _References:
    return _References(sys.getrefcount(grad), grad._use_count(), storage_use_count(grad))


@lru_cache(maxsize=1)
def _own() -> _References:
    """Those to a gradient that is a node's alone."""
    found: list[_References] = []
    counting = Thread(target=_count, args=(found,))  # where no mode and no hook of the caller's is active
    counting.start()
    counting.join()
    return found[0]


def _count(found: list[_References]) -> None:
    x = torch.ones(2, requires_grad=True)
    (_Counting.apply(x, found) * torch.ones(2)).sum().backward()


class _Counting(Function):
    """x, which notes down the references to its gradient. Saved: nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[_References]) -> Tensor:
        ctx.found = found
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _note(grads[0], ctx.found)
        return grads[0], None


def _note(grad: Any, found: list[_References]) -> None:
    """From as deep as `is_alone` counts."""
    counts = _references(grad)
    found.append(counts)
