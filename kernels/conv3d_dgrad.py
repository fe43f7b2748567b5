"""Gradient of a convolution's input: the transposed convolution, and the pull-back through the normalisation
and activation that the forward pass read its input with."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from effseg.common.once import made_once
from effseg.expressions.slabs import Window
from effseg.kernels.choose import choose
from effseg.kernels.config import Config, Triple
from effseg.kernels.conv3d_host import Positions, check_dtypes, contract
from effseg.kernels.launch import NormAct, channels_last, problem


@lru_cache(maxsize=256)
def parity_classes(size: Triple, window: Window, front: Triple) -> tuple[tuple[Positions, Triple], ...]:
    """Input voxels by what they leave modulo the stride, and the first tap that reaches each class.

    Input r = stride * o + k - front: for r = stride * q + parity, taps k are first, first + stride, ... with
    first = (parity + front) mod stride, and tap number j is that of o = q + (parity + front - first) / stride
    - j. Taps run backwards, so that positions run forwards.
    """
    classes = []
    for parity in product(*(range(s) for s in window.stride)):
        axes = zip(parity, size, window.kernel, window.stride, front, strict=True)
        count, taps, offset, first = [], [], [], []
        for p, length, kernel, stride, f in axes:
            first.append((p + f) % stride)
            taps.append(len(range(first[-1], kernel, stride)))
            offset.append((p + f) // stride - (taps[-1] - 1))
            count.append(len(range(p, length, stride)))
        positions = Positions(
            _triple(count), _triple(taps), _triple(offset), spread=window.stride, parity=_triple(parity)
        )
        if min(count):
            classes.append((positions, _triple(first)))
    return tuple(classes)


def _triple(values: list[int] | tuple[int, ...]) -> Triple:
    d, h, w = values
    return d, h, w


def _taps(weight: Tensor, first: Triple, stride: Triple) -> Tensor:
    """(Ci, Co, *taps) of those that reach a class, the last one first."""
    d, h, w = (slice(k, None, s) for k, s in zip(first, stride, strict=True))
    return weight.transpose(0, 1)[:, :, d, h, w].flip(2, 3, 4)


def conv3d_dgrad(
    grad: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    window: Window,
    front: int,
    epilogue: tuple[Tensor, NormAct] | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor] | None:
    """out = transposed convolution of grad: row r is the sum over r = stride * o + kd - front, o inside grad.

    grad (N, Co, Do, Ho, Wo); weight (Co, Ci, *window.kernel); out (N, Ci, D, H, W), all of which is written,
    in the type of the products, sums in float32. With epilogue (y, terms), y (N, Ci, D, H, W) the forward
    pass's input and the terms its prologue: out = dz * scale for dz = act'(norm(y)) * what is above, and
    (dscale, dbeta) = (sum dz (y - mean), sum dz), (N, Ci) float32, are given.
    """
    check_dtypes(grad=grad, out=out)
    n, ci, depth, height, width = out.shape
    kernel, stride = window.kernel, window.stride
    _, *plane = window.output_size((1, height, width))
    assert weight.shape == (grad.shape[1], ci, *kernel), (weight.shape, out.shape, grad.shape, window)
    assert [grad.shape[0], *grad.shape[3:]] == [n, *plane], (grad.shape, out.shape, window)
    config = config or choose(
        problem(
            "conv3d_dgrad",
            out,
            out_channels=grad.shape[1],
            kernel=kernel,
            stride=stride,
            prologue=epilogue is not None,
        )
    )
    grad, target = channels_last(grad), channels_last(out)
    if epilogue is not None:
        y, terms = epilogue
        check_dtypes(y=y)
        assert y.shape == out.shape, (y.shape, out.shape)
        epilogue = channels_last(y), terms
    sums: list[Tensor] = []
    for positions, first in parity_classes((depth, height, width), window, (front, *window.padding[1:])):
        if 0 in positions.taps:
            d, h, w = (slice(p, None, s) for p, s in zip(positions.parity, stride, strict=True))
            target[:, :, d, h, w].zero_()
            continue
        taps = made_once(_taps, weight, first, stride)
        partial = contract(grad, taps, target, positions, config, backward=epilogue)
        if partial is not None:
            sums.append(partial.sum(1, dtype=torch.float64))
    if target is not out:
        out.copy_(target)
    if epilogue is None:
        return None
    if not sums:  # no tap reaches any voxel
        return torch.zeros(n, ci, device=out.device), torch.zeros(n, ci, device=out.device)
    dscale, dbeta = sum(sums[1:], sums[0]).float().unbind(1)
    return dscale, dbeta
