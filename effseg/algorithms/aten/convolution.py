"""Convolutions of slabs by ATen: oneDNN on the CPU, where it is sound and fast, and cuDNN on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from effseg.common.device import kind_of
from effseg.common.formats import CHANNELS_LAST
from effseg.common.settings import Function
from effseg.expressions.slabs import Window

aten = torch.ops.aten
Triple = tuple[int, int, int]

LOW_PRECISION = (torch.bfloat16, torch.float16)
# ATen uses oneDNN for one float32 sample where N * C * D * H is more than this.
ONEDNN_ELEMENTS = 20480


FEW_ROWS, LARGE_PLANE = 8, 48 * 48  # see below


def _wgrad_is_broken(x: Tensor, window: Window) -> bool:
    """oneDNN's low-precision weight gradient is wrong, or writes past its buffers, where the first axis is
    shorter than the kernel, with a stride where height or width is one voxel, and on AMX where few rows have
    large planes (seen: 3 to 6 rows of 64x64 or 48x128 voxels and more; not seen: 8 rows, 48x48 voxels). Such
    slabs take float32."""
    if kind_of(x.device) != "cpu" or x.dtype not in LOW_PRECISION:
        return False
    thin = any(size < max(3, kernel) for size, kernel in zip(x.shape[2:], window.kernel, strict=True))
    flat = window.kernel[0] > 1 and x.shape[2] < FEW_ROWS and x.shape[3] * x.shape[4] > LARGE_PLANE
    return thin or flat


def _forward_is_broken(x: Tensor, window: Window) -> bool:
    """oneDNN's bfloat16 convolution on AMX is wrong where a stride leaves a width of one voxel; what is as
    narrow as that takes float32 on every CPU."""
    narrow = window.kernel[2] > 1 and window.stride[2] >= x.shape[4]
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and window.stride[2] > 1 and narrow


def _takes_float32(x: Tensor) -> bool:
    """On CPUs without AVX-512 ATen keeps low precision from oneDNN, and its own convolution takes up to two
    hundred times as long as a float32 slab and its conversion. (Fake tensors stand for any machine's.)"""
    if x.device.type != "cpu" or x.dtype not in LOW_PRECISION or isinstance(x, FakeTensor):
        return False
    return not (_onednn_is_on() and _onednn_takes(x.dtype))


def _onednn_is_on() -> bool:
    """Some builds of torch are without oneDNN, and do not know its operators."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    """Of LOW_PRECISION; what ATen asks before it calls oneDNN."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def _pad_rows(x: Tensor, window: Window, pad: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """x with its rows of zeros, and the padding left to the convolution. Equal rows on both sides need
    no copy."""
    _, ph, pw = window.padding
    if pad[0] != pad[1]:
        return _channels_last(F.pad(x, (0, 0, 0, 0, *pad))), [0, ph, pw]
    return _channels_last(x), [pad[0], ph, pw]


def _channels_last(x: Tensor) -> Tensor:
    """x with strides that say channels last; a single channel's strides may say either, and a convolution
    answers in the layout that it reads there."""
    if x.shape[1] == 1 and x.is_contiguous():
        _, _, d, h, w = x.shape
        return x.as_strided(x.shape, (d * h * w, 1, h * w, w, 1))
    return x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int]) -> Tensor:
    if _forward_is_broken(x, window) or _takes_float32(x):
        bias = None if bias is None else bias.float()
        return _convolve(x.float(), weight.float(), bias, window, pad).to(x.dtype)
    padded, padding = _pad_rows(x, window, pad)
    weight = weight.contiguous(memory_format=CHANNELS_LAST)
    if _avoids_onednn(padded):
        return aten.mkldnn_convolution(padded, weight, bias, padding, window.stride, [1] * 3, 1)
    y = aten.convolution(padded, weight, bias, window.stride, padding, [1] * 3, False, [0] * 3, 1)
    if isinstance(y, FakeTensor):  # whose convolution does not know that five axes can be channels last
        _, c, d, h, w = y.shape
        return y.as_strided(y.shape, (c * d * h * w, 1, h * w * c, w * c, c))
    return y


def _avoids_onednn(x: Tensor) -> bool:
    """ATen sends a float32 sample of few rows to its im2col kernel, which is five times slower than oneDNN;
    so that is called by name. (Fake tensors know only the general operator.)"""
    small = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[:4].numel() <= ONEDNN_ELEMENTS
    return small and _onednn_is_on() and not isinstance(x, FakeTensor)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    window: Window,
    pad: tuple[int, int],
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dgrad (of the rows of x, without the padding) and wgrad of `convolution`."""
    dtype = x.dtype
    if (need_weight and _wgrad_is_broken(x, window)) or _takes_float32(x):
        grad, x, weight = grad.float(), x.float(), weight.float()
    padded, padding = _pad_rows(x, window, pad)
    weight = weight.contiguous(memory_format=CHANNELS_LAST)
    small = _avoids_onednn(padded)
    as_forward = small and need_input and max(window.stride) == 1
    backward = _backward_with_rows_last if small else _backward
    gx, gw = backward(
        grad, padded, weight, window.stride, padding, need_input and not as_forward, need_weight
    )
    if as_forward:
        gx = dgrad_as_forward(grad, weight, padding)
    if gx is not None and pad[0] != pad[1]:
        gx = gx[:, :, pad[0] : gx.shape[2] - pad[1]]
    return (None if gx is None else gx.to(dtype)), gw


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Triple, padding: list[int], input: bool, parameter: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (input or parameter):
        return None, None
    gx, gw, _ = aten.convolution_backward(
        grad, x, weight, None, stride, padding, [1] * 3, False, [0] * 3, 1, [input, parameter, False]
    )
    return (gx if input else None), (gw if parameter else None)


# ATen sends small float32 slabs to kernels that are up to ten times slower than oneDNN, whose backward has no
# name to call it by.


def _backward_with_rows_last(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Triple, padding: list[int], input: bool, parameter: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What ATen's choice reads is N * C * D * H, not W: with the rows last more slabs are large."""
    if x.shape[:2].numel() * x.shape[3:].numel() <= ONEDNN_ELEMENTS:
        return _backward(grad, x, weight, stride, padding, input, parameter)
    grad, x, weight = (
        t.permute(0, 1, 3, 4, 2).contiguous(memory_format=CHANNELS_LAST) for t in (grad, x, weight)
    )
    stride, padding = (*stride[1:], stride[0]), padding[1:] + padding[:1]
    gx, gw = (
        None if t is None else t.permute(0, 1, 4, 2, 3).contiguous(memory_format=CHANNELS_LAST)
        for t in _backward(grad, x, weight, stride, padding, input, parameter)
    )
    return gx, gw


def dgrad_as_forward(grad: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """The gradient of the input of a convolution of stride 1: the convolution of grad with the weight
    mirrored, input and output channels exchanged, which is padded by k - 1 - padding."""
    mirrored = weight.flip(2, 3, 4).transpose(0, 1).contiguous(memory_format=CHANNELS_LAST)
    rest = [kernel - 1 - width for kernel, width in zip(weight.shape[2:], padding, strict=True)]
    return aten.mkldnn_convolution(grad, mirrored, None, rest, [1] * 3, [1] * 3, 1)


class _Convolution(Function):
    """Saved: the slab and the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, window, pad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.pad = window, pad
        return _convolve(x, weight, bias, window, pad)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        gx, gw = convolution_backward(grad, x, weight, ctx.window, ctx.pad, need_x, need_weight)
        return gx, gw, grad.sum((0, 2, 3, 4)) if need_bias else None, None, None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int]
) -> Tensor:
    """Convolution of a slab with `pad` rows of zeros before and after it; weight and bias in its type."""
    return _Convolution.apply(x, weight, bias, window, pad)


def convolution_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int], out: Tensor
) -> Tensor:
    """Neither cuDNN nor oneDNN is given where to write, so this copies, and gives what it copied."""
    part = _convolve(x, weight, bias, window, pad)
    out.copy_(part)
    return part
