"""Forward convolution: normalisation and activation of the input as it is read, statistics of the output
as it is written."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from effseg.expressions.slabs import Window
from effseg.kernels.choose import choose
from effseg.kernels.config import Config
from effseg.kernels.conv3d_host import Positions, check_dtypes, contract
from effseg.kernels.launch import NormAct, channels_last, problem
from effseg.kernels.statistics import merged


def conv3d_forward(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    window: Window,
    front: int,
    prologue: NormAct | None = None,
    bias: Tensor | None = None,
    statistics: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor] | None:
    """out = conv(a(x), weight) + bias, with a the prologue (or nothing); zero padded after a.

    x (N, Ci, D, H, W), float32, bfloat16, float16 or int16; weight (Co, Ci, *window.kernel); out (N, Co, Do,
    Ho, Wo) in the type of the products, sums in float32. Output row o reads rows stride * o + kd - front of
    x, those outside being zero. With `statistics`: mean and biased variance (N, Co) of the stored values,
    float32.
    """
    check_dtypes(out=out)
    if x.dtype != torch.int16:
        check_dtypes(x=x)
    n, ci, _, height, width = x.shape
    kernel, stride, padding = window.kernel, window.stride, window.padding
    _, *plane = window.output_size((1, height, width))
    assert weight.shape == (out.shape[1], ci, *kernel), (weight.shape, out.shape, x.shape, window)
    assert [out.shape[0], *out.shape[3:]] == [n, *plane], (out.shape, x.shape, window)
    size = (out.shape[2], out.shape[3], out.shape[4])
    config = config or choose(
        problem(
            "conv3d_fwd", out, in_channels=ci, kernel=kernel, stride=stride, prologue=prologue is not None
        )
    )
    positions = Positions(size, taps=kernel, offset=(-front, -padding[1], -padding[2]), step=stride)
    target = channels_last(out)
    partial = contract(
        channels_last(x),
        weight,
        target,
        positions,
        config,
        prologue=prologue,
        bias=bias,
        statistics=statistics,
    )
    if target is not out:
        out.copy_(target)
    if partial is None:
        return None
    means, squares, counts = partial.double().unbind(2)
    return merged(counts, means, squares, prod(size))
