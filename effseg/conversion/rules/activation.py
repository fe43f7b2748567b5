"""Activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import operators
from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.rules.registry import IDENTITY, may_change, result, rule
from effseg.conversion.streamed import Layer
from effseg.conversion.values import Value
from effseg.expressions.base import Deferred
from effseg.expressions.joins import Sum, activation
from effseg.expressions.layers import Conv, Raw, Residual
from effseg.expressions.normed import Normed


@rule(F.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _activated(input, negative_slope, inplace)


@rule(F.relu)
def relu(input: Tensor, inplace: bool = False) -> Any:
    return _activated(input, 0.0, inplace)


@rule(torch.relu, Tensor.relu)
def relu_out_of_place(input: Tensor) -> Any:
    return _activated(input, 0.0, False)


@rule(torch.relu_, Tensor.relu_)
def relu_in_place(input: Tensor) -> Any:
    return _activated(input, 0.0, True)


@rule(F.elu)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _followed(input, inplace, "elu", alpha=alpha)


@rule(F.silu)
def silu(input: Tensor, inplace: bool = False) -> Any:
    return _followed(input, inplace, "silu")


@rule(F.gelu)
def gelu(input: Tensor, approximate: str = "none") -> Any:
    return _followed(input, False, "gelu", approximate=approximate)


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(input: Tensor, weight: Tensor) -> Any:
    """Slopes are rounded as autocast rounds them, which is to the type of a normalised tensor."""
    if weight.dim() != 1 or not isinstance(input, LazyTensor):
        return NotImplemented
    low = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    wide = torch.get_autocast_dtype(input.device.type) if low else weight.dtype
    return _followed(input, False, "prelu", weight) if input.dtype == wide else NotImplemented


def _followed(
    input: Tensor, inplace: bool, kind: str, weight: Tensor | None = None, **options: float | str
) -> Any:
    """Of a normalised tensor, or of a sum, by what is not leaky ReLU."""
    value = input.value if isinstance(input, LazyTensor) else None
    spec = value.spec if isinstance(value, Deferred) else None
    normalised = isinstance(spec, Raw | Residual | Conv | Normed) and spec.slope == IDENTITY
    if not (normalised or isinstance(spec, Sum)) or not may_change(input, inplace):
        return NotImplemented
    assert isinstance(input, LazyTensor)
    value = input.value if inplace else input.taken()
    assert isinstance(value, Deferred)
    watch.took("activation")
    found = activation(value, kind, weight, **options)
    return result(input, operators.share(found) if isinstance(spec, Residual | Sum) else found, inplace)


def _activated(input: Tensor, slope: float, inplace: bool) -> Any:
    """Of a normalised tensor, or of the sum of one and another."""
    value = input.value if isinstance(input, LazyTensor) else None
    if not slope >= 0 or not may_change(input, inplace):
        return NotImplemented
    changed = _with_slope(value, slope)
    if changed is None:
        return NotImplemented
    assert isinstance(input, LazyTensor)
    if not inplace:
        input.taken()
    watch.took("activation")
    if isinstance(changed, Deferred) and isinstance(changed.spec, Residual):
        changed = operators.share(changed)
    return result(input, changed, inplace)


def _with_slope(value: Value | None, slope: float) -> Value | None:
    """The value with an activation; None for what cannot have one."""
    if isinstance(value, Layer) and value.tail.slope == IDENTITY:
        return Layer(value.tail._replace(slope=slope))
    spec = value.spec if isinstance(value, Deferred) else None
    if not isinstance(spec, Raw | Residual | Conv | Normed) or spec.slope != IDENTITY:
        return None
    assert isinstance(value, Deferred)
    return Deferred(replace(spec, slope=slope), value.tensors)
