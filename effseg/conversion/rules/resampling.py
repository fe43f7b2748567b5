"""Pooling and interpolation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.rules.registry import rule, triple, unfinished
from effseg.conversion.values import Convolution
from effseg.expressions.joins import pooling
from effseg.expressions.layers import upsample_add


@rule(torch.max_pool3d, F.max_pool3d)
def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or set(triple(dilation)) != {1}:
        return NotImplemented
    return _pooled(input, "max", kernel_size, stride, padding, ceil_mode)


@rule(F.avg_pool3d)
def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if ceil_mode or divisor_override is not None:
        return NotImplemented
    return _pooled(input, "average", kernel_size, stride, padding, False)


def _pooled(input: Any, kind: str, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    """Taken where windows neither overlap nor reach over the border."""
    window = triple(kernel)
    if stride not in (None, [], ()) and triple(stride) != window:
        return NotImplemented
    if not isinstance(input, LazyTensor) or set(triple(padding)) != {0}:
        return NotImplemented
    found = pooling(input.deferred(input.dtype), kind, window, ceil)
    watch.took("pooling")
    return LazyTensor(found)


@rule(F.interpolate)
def interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Trilinear x2 of a 1x1x1 convolution, which commutes with it."""
    value = unfinished(input) if isinstance(input, LazyTensor) else None
    doubles = size is None and scale_factor is not None and set(triple(scale_factor)) == {2}
    if not isinstance(value, Convolution) or not value.is_head or not doubles:
        return NotImplemented
    if mode != "trilinear" or align_corners or recompute_scale_factor or antialias:
        return NotImplemented
    assert isinstance(input, LazyTensor)
    input.taken()
    d, h, w = (2 * n for n in value.x.shape[2:])
    watch.took("upsampling")
    return LazyTensor(upsample_add(None, value.x, value.weight, value.bias, (d, h, w)))
