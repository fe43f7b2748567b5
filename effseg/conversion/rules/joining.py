"""Sums and concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.outputs import convolve
from effseg.conversion.rules.registry import IDENTITY, may_change, result, rule, unfinished
from effseg.conversion.streamed import Summed, is_last
from effseg.conversion.values import Convolution, Value, stored_as
from effseg.expressions.base import Deferred, Normalisation, Spec
from effseg.expressions.joins import Sum, added, concatenation
from effseg.expressions.layers import Raw, Residual, UpAdd, plain, residual, upsample_add


@rule(torch.add, Tensor.add, Tensor.__add__)
def add(input: Any, other: Any, *, alpha: Any = 1, out: None = None) -> Any:
    return NotImplemented if out is not None else _sum(input, other, alpha, inplace=False)


@rule(Tensor.__radd__)
def radd(input: Any, other: Any) -> Any:
    return _sum(other, input, 1, inplace=False)


@rule(Tensor.add_, Tensor.__iadd__)
def add_(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _sum(input, other, alpha, inplace=True)


def _sum(first: Any, second: Any, alpha: Any, inplace: bool) -> Any:
    both = isinstance(first, LazyTensor) and isinstance(second, LazyTensor)
    if not both or alpha != 1 or first.shape != second.shape:
        return NotImplemented
    if not may_change(first, inplace) or (inplace and first.dtype != second.dtype):
        return NotImplemented
    for one, other in ((first, second), (second, first)):
        found = _added(unfinished(one), other) if first.dtype == second.dtype else None
        if found is not None:
            one.taken()
            return result(first, found, inplace)
    if not any(isinstance(each.value, Deferred) for each in (first, second)):
        return NotImplemented
    watch.took("sum")
    return result(first, added(flat(first, first.dtype), flat(second, second.dtype)), inplace)


def _added(value: Value, other: LazyTensor) -> Value | None:
    """value + other, where `value` can carry a sum."""
    if isinstance(value, Convolution) and is_last(value.weight, value.window):
        watch.took("sum")
        return Summed(*value, other.lent(value.dtype))
    if isinstance(value, Convolution):
        y, _, _ = convolve(value.x, value.weight, value.bias, value.window, statistics=False)
        watch.took("sum")
        # A stored sum: nothing keeps y, so that it may become the sum.
        return stored_as(y.add_(other.read()), value.shape[2])
    if not isinstance(value, Deferred):
        return None
    if isinstance(value.spec, Raw) and value.spec.slope == IDENTITY:
        y, *norm = value.tensors
        watch.took("sum")
        return residual(flat(other, value.dtype), y, Normalisation(*norm), IDENTITY)
    if isinstance(value.spec, UpAdd) and value.spec.skip is None:
        end = len(value.tensors) - 1 - value.spec.has_bias
        coarse = Deferred(value.spec.coarse, value.tensors[:end])
        weight, bias = value.tensors[end], value.tensors[end + 1] if value.spec.has_bias else None
        watch.took("sum")
        return upsample_add(other.lent(value.dtype), coarse, weight, bias, factors=value.spec.factors)
    return None


MOST_NESTED = 3


def flat(x: LazyTensor, dtype: torch.dtype) -> Deferred:
    """A deferred expression, stored where it is a sum of sums: every use makes all of them."""
    found = x.lent(dtype)
    return plain(x.stored(), dtype, found.shape[2]) if _nested(found.spec) >= MOST_NESTED else found


def _nested(spec: Spec) -> int:
    """How many sums are inside of each other."""
    inside = [
        part for value in vars(spec).values() for part in (value if isinstance(value, tuple) else (value,))
    ]
    deepest = max((_nested(part) for part in inside if isinstance(part, Spec)), default=0)
    return deepest + isinstance(spec, (Residual, Sum))


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int | None = None, *, axis: int | None = None, out: None = None) -> Any:
    dim = axis if dim is None else dim
    shapes = {(t.shape[0], *t.shape[2:]) for t in tensors if t.dim() == 5}
    if dim not in (1, -4) or out is not None or len(shapes) != 1:
        return NotImplemented
    if not all(isinstance(t, LazyTensor) for t in tensors):
        return NotImplemented
    if any(t.memory_is_seen for t in tensors):
        return NotImplemented  # it may be changed, which a copy does not mind
    found = concatenation([t.lent(t.dtype) for t in tensors])
    watch.took("concatenation")
    return LazyTensor(found)
