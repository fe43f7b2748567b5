"""Weight gradient of a convolution: `conv3d_wgrad`.

Loops (`Config.loop`): "pair3", "pair" and "kw" march along D, for 3x3x3 with stride 1; "tap" takes any
window. Of the configuration, block_d is the rows of a march (0: all), block_h x block_w the tile over which
one product contracts (pairs of neighbours along W in "pair" and "pair3", else voxels), splits how many
programs share the voxels; in "tap" alone, block_n is the output channels of a program and block_k its (tap,
input channel)s.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effseg.expressions.slabs import Window
from effseg.kernels.choose import choose
from effseg.kernels.config import Config
from effseg.kernels.conv3d_wgrad_march import march
from effseg.kernels.conv3d_wgrad_tap import tap
from effseg.kernels.launch import (
    DTYPES,
    NormAct,
    channels_last,
    input_precision,
    launch,
    problem,
    sample_stride,
)


class Fold(NamedTuple):
    """The gradient of y through its statistics: g = grad + (y - mean) * scale + shift, written to `out`.

    y and out (N, Co, Do, Ho, Wo); out of grad's type, channels last, and neither grad's memory nor y's. mean,
    scale, shift (N, Co) float32.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    out: Tensor


def conv3d_wgrad(
    x: Tensor,
    grad: Tensor,
    *,
    window: Window,
    front: int,
    prologue: NormAct | None = None,
    fold: Fold | None = None,
    config: Config | None = None,
) -> Tensor:
    """(Co, Ci, kd, kh, kw) float32: the sum over samples and output voxels of input times gradient.

    x (N, Ci, D, H, W), of any type but float64, converted to grad's; grad (N, Co, Do, Ho, Wo). Input row =
    stride * output row + tap - front, and rows outside x are zeros. With `prologue` x stands for its
    normalised activation, with `fold` grad for what that describes.
    """
    _check(x, grad, window, fold)
    if config is None:
        config = choose(
            problem(
                "conv3d_wgrad",
                grad,
                in_channels=x.shape[1],
                kernel=window.kernel,
                stride=window.stride,
                prologue=prologue is not None,
            )
        )
    x, grad = channels_last(x), channels_last(grad)
    kernel = _march if config.loop in ("pair3", "pair", "kw") else _tap
    return kernel(x, grad, window, front, prologue, fold, config)


def marches(loop: str, window: Window, in_channels: int, out_channels: int) -> bool:
    """Whether one of the marching loops can do a convolution."""
    if window.kernel != (3, 3, 3) or window.stride != (1, 1, 1):
        return False
    if loop == "kw":
        return max(in_channels, out_channels) <= 64
    sizes = (in_channels, out_channels)
    return loop in ("pair", "pair3") and all(c in (8, 16, 32) for c in sizes)


def _check(x: Tensor, grad: Tensor, window: Window, fold: Fold | None) -> None:
    if grad.dtype not in DTYPES:
        raise TypeError(f"grad: expected float32, bfloat16 or float16, got {grad.dtype}")
    if x.dtype == torch.float64:
        raise TypeError("x: expected at most 32 bits, got torch.float64")
    _, *plane = window.output_size((1, x.shape[3], x.shape[4]))
    if x.shape[0] != grad.shape[0] or list(grad.shape[3:]) != plane:
        raise ValueError(
            f"grad: {tuple(grad.shape)} is not of the output of x {tuple(x.shape)} under {window}"
        )
    if fold is not None:
        if fold.y.shape != grad.shape or fold.out.shape != grad.shape or fold.out.dtype != grad.dtype:
            raise ValueError("fold: y and out must be of the shape, out also of the type, of grad")
        if channels_last(fold.out) is not fold.out:
            raise ValueError("fold: out must be channels last in memory")


def _operands(
    x: Tensor, grad: Tensor, prologue: NormAct | None, fold: Fold | None, partial: Tensor
) -> tuple[list[Any], dict[str, Any]]:
    """The pointers and strides that both loops take, and their constants."""
    scale = shift = f_scale = f_shift = partial
    y = out = grad
    if prologue is not None:
        scale = prologue.scale.contiguous()
        shift = torch.addcmul(prologue.beta, prologue.mean, prologue.scale, value=-1).contiguous()
    if fold is not None:
        y, out, f_scale = channels_last(fold.y), fold.out, fold.scale.contiguous()
        f_shift = torch.addcmul(fold.shift, fold.mean, fold.scale, value=-1).contiguous()
    pointers = [x, grad, y, out, scale, shift, f_scale, f_shift, partial]
    strides = [sample_stride(t) for t in (x, grad, y, out)]
    constants = {
        "CI": x.shape[1],
        "CO": grad.shape[1],
        "PROLOGUE": prologue is not None,
        "FOLD": fold is not None,
        "SLOPE": 1.0 if prologue is None else float(prologue.slope),
        "PRECISION": input_precision(grad.dtype),
    }
    return [*pointers, *strides], constants


def _padded(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def _march(
    x: Tensor, grad: Tensor, window: Window, front: int, prologue: NormAct | None, fold: Fold | None,
    config: Config,
) -> Tensor:  # fmt: skip
    samples, ci, rows, h, w = x.shape
    co, out_rows = grad.shape[1:3]
    if not marches(config.loop, window, ci, co):
        raise ValueError(f"config: {config.loop!r} cannot do {window} from {ci} to {co} channels")
    pairs = config.loop != "kw"
    block_m, block_n = (4 * ci, 2 * co) if pairs else (_padded(ci), _padded(co))
    groups = 1 if config.loop == "pair3" else 3
    steps = out_rows + 2
    segment = math.ceil(steps / math.ceil(steps / (config.block_d or steps)))
    tiles_w = math.ceil(w / (config.block_w * (2 if pairs else 1)))
    tiles = samples * math.ceil(steps / segment) * math.ceil(h / config.block_h) * tiles_w
    splits = min(config.splits, tiles)
    taps = 3 if config.loop == "kw" else 1
    partial = torch.empty(splits, 3, taps, 3, block_m, block_n, dtype=torch.float32, device=x.device)
    tensors, constants = _operands(x, grad, prologue, fold, partial)
    launch(
        march,
        (groups, splits),
        *tensors,
        *(samples, rows, out_rows, h, w, front, segment, splits),
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        LOOP=config.loop,
        ROTATE=fold is not None or config.num_stages == 1,
        BLOCK_H=config.block_h,
        BLOCK_W=config.block_w,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    total = partial.sum(0, dtype=torch.float64)
    if not pairs:  # (kh, kw, kd, ci, co), padded
        return total[..., :ci, :co].permute(4, 3, 2, 0, 1).float().contiguous()
    total = total.view(3, 3, 4, ci, 2, co)  # (kh, kd, window, ci, of the pair, co)
    total = total[:, :, :3, :, 0] + total[:, :, 1:, :, 1]
    return total.permute(4, 3, 1, 0, 2).float().contiguous()


def _tap(
    x: Tensor, grad: Tensor, window: Window, front: int, prologue: NormAct | None, fold: Fold | None,
    config: Config,
) -> Tensor:  # fmt: skip
    samples, ci, rows, h, w = x.shape
    co, out_rows, out_h, out_w = grad.shape[1:]
    rows_m = ci * math.prod(window.kernel)
    tiles = samples * out_rows * math.ceil(out_h / config.block_h) * math.ceil(out_w / config.block_w)
    splits = min(config.splits, tiles)
    partial = torch.empty(splits, *window.kernel, ci, co, dtype=torch.float32, device=x.device)
    tensors, constants = _operands(x, grad, prologue, fold, partial)
    launch(
        tap,
        (math.ceil(rows_m / config.block_k) * math.ceil(co / config.block_n), splits),
        *tensors,
        *(samples, rows, out_rows, h, w, out_h, out_w, front, splits),
        **constants,
        GROUP=ci & -ci,
        **{f"K{axis}": k for axis, k in zip("DHW", window.kernel, strict=True)},
        **{f"STRIDE_{axis}": s for axis, s in zip("DHW", window.stride, strict=True)},
        BLOCK_H=config.block_h,
        BLOCK_W=config.block_w,
        BLOCK_M=config.block_k,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial.sum(0, dtype=torch.float64).permute(4, 3, 0, 1, 2).float().contiguous()
