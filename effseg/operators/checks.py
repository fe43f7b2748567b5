"""What operators ask of their arguments: one line with the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.expressions.base import Deferred
from effseg.expressions.slabs import Window
from effseg.parallel.partition import own_shape

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def three(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """One whole number, or one per axis."""
    values = (value,) * 3 if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name}: expected one whole number or three, got {value}")
    return values[0], values[1], values[2]


def convolution_window(kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1) -> Window:
    """Kernel size (odd) and stride per axis, from one number or three; padding is kernel // 2.

    Raises `ValueError` for even kernels, strides under 1 or another number of axes.
    """
    kernel, strides = three("kernel_size", kernel_size), three("stride", stride)
    if any(k % 2 == 0 or k < 1 for k in kernel):
        raise ValueError(f"kernel_size: expected odd numbers, got {kernel}")
    if any(s < 1 for s in strides):
        raise ValueError(f"stride: expected 1 or more, got {strides}")
    return Window(kernel, strides)


def features(name: str, x: Tensor | Deferred) -> None:
    """(N, C, D, H, W), none of them 0, real numbers."""
    if not isinstance(x, Tensor | Deferred):
        raise TypeError(f"{name}: expected a tensor or a deferred expression, got {type(x).__name__}")
    if len(x.shape) != 5 or 0 in x.shape:
        raise ValueError(f"{name}: expected (N, C, D, H, W), none of them 0, got {tuple(x.shape)}")
    if x.dtype.is_complex or x.dtype == torch.bool:
        raise ValueError(f"{name}: expected real numbers, got {x.dtype}")


def convolution(weight: Tensor, bias: Tensor | None, in_channels: int) -> None:
    if weight.dim() != 5 or weight.shape[1] != in_channels:
        raise ValueError(f"weight: expected (Co, {in_channels}, kd, kh, kw), got {tuple(weight.shape)}")
    vector("bias", bias, weight.shape[0])


def vector(name: str, value: Tensor | None, length: int) -> None:
    if value is not None and tuple(value.shape) != (length,):
        raise ValueError(f"{name}: expected ({length},), got {tuple(value.shape)}")


def head(channels: int, weight: Tensor | None, bias: Tensor | None) -> int:
    """The number of classes, once weight and bias fit the features."""
    classes = channels if weight is None else weight.shape[0]
    if weight is None and bias is not None:
        raise ValueError("bias: expected None without a weight, got a tensor")
    if weight is not None and tuple(weight.shape) != (classes, channels, 1, 1, 1):
        raise ValueError(f"weight: expected (K, {channels}, 1, 1, 1), got {tuple(weight.shape)}")
    vector("bias", bias, classes)
    if classes < 2:
        raise ValueError(f"classes: expected 2 or more, background included, got {classes}")
    return classes


def labels(value: Tensor, x: Deferred) -> Tensor:
    """Labels as (N, D, H, W), of this process's rows of x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(value).__name__}")
    if value.dtype not in INTEGER_DTYPES:
        raise ValueError(f"labels: expected an integer type, got {value.dtype}")
    expected = own_shape((x.shape[0], *x.shape[2:]))
    if value.dim() == 5 and value.shape[1] == 1:
        value = value[:, 0]
    if tuple(value.shape) != expected:
        raise ValueError(f"labels: expected {expected}, got {tuple(value.shape)}")
    return value
