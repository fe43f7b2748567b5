"""ReLU and leaky ReLU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import nodes
from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.normed import Normed
from effseg.conversion.rules.registry import IDENTITY, may_change, result, rule
from effseg.conversion.streamed import Layer
from effseg.conversion.values import Value
from effseg.deferred import Conv, Deferred, Raw, Residual


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
        changed = nodes.share(changed)
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
