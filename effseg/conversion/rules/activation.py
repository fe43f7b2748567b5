"""ReLU and leaky ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import operators
from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.rules.registry import IDENTITY, may_change, result, rule
from effseg.expressions.base import Deferred
from effseg.expressions.layers import Raw, Residual


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


def _activated(input: Tensor, slope: float, inplace: bool) -> Any:
    """Of a normalised tensor, or of the sum of one and another."""
    value = input.value if isinstance(input, LazyTensor) else None
    spec = value.spec if isinstance(value, Deferred) else None
    if not isinstance(spec, (Raw, Residual)) or spec.slope != IDENTITY or not slope >= 0:
        return NotImplemented
    if not may_change(input, inplace):
        return NotImplemented
    assert isinstance(input, LazyTensor)
    value = input.value if inplace else input.taken()
    assert isinstance(value, Deferred)
    if isinstance(spec, Raw):
        changed: Raw | Residual = Raw(spec.shape, spec.dtype, slope)
    else:
        changed = Residual(spec.shape, spec.dtype, slope, spec.inner)
    watch.took("activation")
    found = Deferred(changed, value.tensors)
    return result(input, operators.share(found) if isinstance(changed, Residual) else found, inplace)
