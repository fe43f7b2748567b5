"""Convolution and transposed convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg.conversion import watch
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.rules.registry import Triple, rule, triple
from effseg.conversion.streamed import Layer, Logits, note_head
from effseg.conversion.values import Convolution
from effseg.expressions.joins import transposed_conv
from effseg.expressions.slabs import Window
from effseg.functional import compute_dtype


@rule(torch.conv3d, F.conv3d)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(input, LazyTensor) or groups != 1 or set(triple(dilation)) != {1}:
        return NotImplemented
    kernel = triple(weight.shape[2:])
    same = tuple(k // 2 for k in kernel)
    if not all(k % 2 for k in kernel) or (padding != "same" and _pads(padding) != same):
        return NotImplemented
    watch.took("convolution")
    window = Window(kernel, triple(stride))
    value = input.value
    if isinstance(value, Layer) and window == Window((1, 1, 1)) and _type(weight) == value.dtype:
        note_head(value)
        input.taken()
        return LazyTensor(Logits(value, weight, bias))
    x = input.deferred(_type(weight))
    return LazyTensor(Convolution(x, weight, bias, window))


def _type(weight: Tensor) -> torch.dtype:
    return compute_dtype(weight.device, weight)


def _pads(padding: Any) -> Triple:
    return (0, 0, 0) if padding == "valid" else triple(padding)


@rule(torch.conv_transpose3d, F.conv_transpose3d)
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Taken where the kernel is the stride, so that no two voxels meet."""
    plain_ones = {*triple(padding), *triple(output_padding)} == {0} and set(triple(dilation)) == {1}
    if not isinstance(input, LazyTensor) or groups != 1 or not plain_ones:
        return NotImplemented
    if triple(stride) != triple(weight.shape[2:]):
        return NotImplemented
    found = transposed_conv(input.deferred(_type(weight)), weight, bias)
    watch.took("transposed convolution")
    return LazyTensor(found)
