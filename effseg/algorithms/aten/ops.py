"""Differentiable operations on one slab, each a few ATen calls.

All take and give slabs of one sample, (1, C, d, h, w), channels last in memory. They run eagerly on the
CPU (oneDNN) and on CUDA (cuDNN); every reduction has a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from effseg.algorithms.aten.convolution import convolution as convolution
from effseg.algorithms.aten.convolution import convolution_backward as convolution_backward
from effseg.algorithms.aten.convolution import convolution_into as convolution_into
from effseg.algorithms.aten.head import Head
from effseg.algorithms.interface import FusedConv3d, NormActGradients
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype
from effseg.common.settings import Function

aten = torch.ops.aten


# ---------------------------------------------------------------- statistics, normalisation, activation
def _columns(y: Tensor) -> Tensor:
    """(1, C, d, h, w) as (d * h, w * C, 1): every position along W is a channel; a view of channels-last
    memory.

    ATen's kernels add the voxels of a channel one by one in float32, which costs three digits on a slab of
    16 x 128 x 128 voxels; so they are given short columns, whose results are merged in float64.
    """
    _, c, d, h, w = y.shape
    return y.permute(0, 2, 3, 4, 1).reshape(d * h, w * c, 1)


def partial_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Means and (biased) variances of a slab's stored values, (W, C) each, in the accumulation type."""
    _, c, _, _, w = y.shape
    # The running statistics are not used (momentum 0), but on the CPU their type makes the result float32.
    dtype = accumulation_dtype(y.dtype)
    unused = torch.zeros(2, w * c, dtype=dtype) if y.device.type == "cpu" else (None, None)
    means, variances = aten.batch_norm_update_stats(_columns(y), unused[0], unused[1], 0.0)
    return means.view(w, c), variances.view(w, c)


def mean_var(y: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and (biased) variance of a slab's stored values, (C,) each, in the accumulation type.

    Two passes over `_columns`, whose moments are merged by Chan's formula.
    """
    dtype = accumulation_dtype(y.dtype)
    means, variances = (t.double() for t in partial_moments(y))
    mean = means.mean(0)
    return mean.to(dtype), (variances + (means - mean).square()).mean(0).to(dtype)


def affine(y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(y - mean) * scale + shift per channel, in y's type, computed in the accumulation type.

    Batch normalisation with unit variance is the one ATen kernel that reads low precision, computes in
    float32 and writes low precision in a single pass.
    """
    one = torch.ones_like(mean)
    return aten.native_batch_norm(y, scale, shift, mean, one, False, 0.0, 0.0)[0]


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def norm_terms_backward(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor, need_y: bool, need_terms: bool
) -> Gradients:
    """(dz * scale, sum dz (y - mean), sum dz): the gradients of y, scale and beta, sums over the slab.

    Two passes over `_columns`, by batch normalisation's backward at unit variance. On a GPU too it reads y
    and dz once for both sums, centres in float32 and adds in a tree whose shape the sizes alone decide.
    """
    _, c, d, h, w = y.shape
    if not need_terms:
        dy = torch.mul(dz, scale[..., None, None, None], out=torch.empty_like(dz)) if need_y else None
        return dy, None, None
    wide_mean, wide_scale, one = torch.stack((mean[0], scale[0], torch.ones_like(mean[0]))).repeat(1, w)
    dy, *sums = aten.native_batch_norm_backward(
        _columns(dz), _columns(y), wide_scale, wide_mean, one, wide_mean, one, False, 0.0,
        [need_y, True, True],
    )  # fmt: skip
    if need_y:
        dy = dy.view(1, d, h, w, c).permute(0, 4, 1, 2, 3)
    dscale, dbeta = torch.stack(sums).view(2, 1, w, c).sum(2, dtype=torch.float64).to(mean.dtype)
    return dy if need_y else None, dscale, dbeta


def norm_act_backward(
    grad: Tensor,
    y: Tensor,
    a: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: float,
    need_dz: bool = False,
    need_dy: bool = False,
    need_terms: bool = False,
) -> NormActGradients:
    """The activation's sign is that of the activated value."""
    dz = grad if slope == 1.0 else aten.leaky_relu_backward(grad, a, slope, True)
    dy, dscale, dbeta = norm_terms_backward(dz, y, mean, scale, need_dy, need_terms)
    return NormActGradients(dz if need_dz else None, dy, dscale, dbeta)


def fold(grad: Tensor | None, y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """grad + (y - mean) * scale + shift."""
    found = affine(y, mean, scale, shift)
    return found if grad is None else found.add_(grad)


class _NormAct(Function):
    """a = leaky_relu((y - mean) * scale + beta [+ addend]).

    Saved: y, mean, scale, a (of one slab). With dz = g * act'(z), read off the sign of a:
    dy = dz * scale, dscale = sum dz (y - mean), dbeta = sum dz, dmean = -scale * dbeta, daddend = dz.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, y, mean, scale, beta, addend, slope):  # type: ignore[no-untyped-def]
        a = affine(y, mean[0], scale[0], beta[0])
        if addend is not None:
            a.add_(addend)
        if slope != 1.0:
            a = F.leaky_relu_(a, slope)
        ctx.save_for_backward(y, mean, scale, a)
        ctx.slope = slope  # type: ignore[attr-defined]
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, mean, scale, a = ctx.saved_tensors
        need_y, need_mean, need_scale, need_beta, need_addend, _ = ctx.needs_input_grad
        need_terms = need_scale or need_beta or need_mean
        found = norm_act_backward(grad, y, a, mean, scale, ctx.slope, need_addend, need_y, need_terms)
        dmean = -scale * found.dbeta if found.dbeta is not None and need_mean else None
        return found.dy, dmean, found.dscale, found.dbeta, found.dz, None


def norm_act(
    y: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, slope: float, addend: Tensor | None = None
) -> Tensor:
    """leaky_relu((y - mean) * scale + beta + addend, slope); the terms are (1, C). Slope 0 is ReLU, 1 is
    no activation."""
    return _NormAct.apply(y, mean, scale, beta, addend, slope)


# ---------------------------------------------------------------- upsampling
def _empty_like(x: Tensor, dim: int, size: int) -> Tensor:
    shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)


def _double(x: Tensor, dim: int, size: int) -> Tensor:
    """Linear x2 along `dim` (align_corners=False), the first `size` of 2n: out[2i] = (x[i-1] + 3 x[i]) / 4
    and out[2i+1] = (3 x[i] + x[i+1]) / 4, indices clamped."""
    n = x.shape[dim]
    out = _empty_like(x, dim, size)
    even, odd = (out[(slice(None),) * dim + (slice(i, None, 2),)] for i in (0, 1))
    even.narrow(dim, 0, 1).copy_(x.narrow(dim, 0, 1))
    torch.lerp(x.narrow(dim, 1, n - 1), x.narrow(dim, 0, n - 1), 0.25, out=even.narrow(dim, 1, n - 1))
    torch.lerp(x.narrow(dim, 0, n - 1), x.narrow(dim, 1, n - 1), 0.25, out=odd.narrow(dim, 0, n - 1))
    if size == 2 * n:
        odd.narrow(dim, n - 1, 1).copy_(x.narrow(dim, n - 1, 1))
    return out


def _halve(g: Tensor, dim: int) -> Tensor:
    """The transpose of `_double`."""
    size = g.shape[dim]
    n = (size + 1) // 2
    even, odd = (g[(slice(None),) * dim + (slice(i, None, 2),)] for i in (0, 1))
    out = _empty_like(g, dim, n)
    out.narrow(dim, 0, 1).copy_(even.narrow(dim, 0, 1))
    torch.lerp(even.narrow(dim, 1, n - 1), odd.narrow(dim, 0, n - 1), 0.25, out=out.narrow(dim, 1, n - 1))
    out.narrow(dim, 0, n - 1).add_(torch.lerp(odd.narrow(dim, 0, n - 1), even.narrow(dim, 1, n - 1), 0.25))
    if size == 2 * n:
        out.narrow(dim, n - 1, 1).add_(odd.narrow(dim, n - 1, 1))
    return out


class _UpsampleX2(Function):
    """Linear x2 along one axis after the other (D first). Saved: nothing."""

    @staticmethod
    def forward(ctx, x, rows, height, width, factors):  # type: ignore[no-untyped-def]
        ctx.coarse_rows, ctx.fine_rows, ctx.factors = x.shape[2], rows, factors
        if factors[0] == 2:
            x = _double(x, 2, 2 * x.shape[2])[:, :, rows[0] : rows[1]]
        if factors[1] == 2:
            x = _double(x, 3, height)
        return _double(x, 4, width) if factors[2] == 2 else x.contiguous(memory_format=CHANNELS_LAST)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.factors[2] == 2:
            grad = _halve(grad, 4)
        if ctx.factors[1] == 2:
            grad = _halve(grad, 3)
        if ctx.factors[0] == 2:
            lo, hi = ctx.fine_rows
            grad = _halve(F.pad(grad, (0, 0, 0, 0, lo, 2 * ctx.coarse_rows - hi)), 2)
        return grad, None, None, None, None


def upsample_x2(
    x: Tensor,
    rows: tuple[int, int],
    height: int,
    width: int,
    factors: tuple[int, int, int] = (2, 2, 2),
) -> Tensor:
    """Fine rows [rows[0], rows[1]) of trilinear x2 upsampling, cut to `height` and `width` (2n or 2n - 1).

    An axis of factor 1 is left as it is; with factor 1 along D all rows are given.

    Equal to torch's `interpolate(scale_factor=2, mode="trilinear", align_corners=False)`, whose backward
    on CUDA adds atomically and so differs from run to run; this one does not.
    """
    return _UpsampleX2.apply(x, rows, height, width, factors)


def upsample_add(
    x: Tensor,
    rows: tuple[int, int],
    height: int,
    width: int,
    factors: tuple[int, int, int],
    addend: Tensor | None,
) -> Tensor:
    fine = upsample_x2(x, rows, height, width, factors)
    return fine if addend is None else fine.add_(addend)


# ---------------------------------------------------------------- what else an algorithm is
fused: FusedConv3d | None = None
make_head = Head
