"""Operations on slabs (`effseg.algorithms.interface`), each a kernel or two."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import once_differentiable

from effseg.algorithms.aten import ops as aten
from effseg.algorithms.interface import FusedConv3d, NormActGradients
from effseg.algorithms.triton import choices
from effseg.algorithms.triton.fused import Fused
from effseg.algorithms.triton.head import Head
from effseg.common.settings import Function
from effseg.expressions.slabs import Window
from effseg.kernels import norm_act as norm_act_kernels
from effseg.kernels import upsample as upsample_kernels
from effseg.kernels.conv3d_dgrad import conv3d_dgrad
from effseg.kernels.conv3d_fwd import conv3d_forward
from effseg.kernels.conv3d_wgrad import conv3d_wgrad
from effseg.kernels.launch import NormAct, empty
from effseg.kernels.statistics import moments


class _Convolution(Function):
    """Saved: the slab and the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, window, pad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.pad = window, pad
        config = choices.forward(weight, window, x.shape[2:])
        if config is None:
            return aten.convolution(x, weight, bias, window, pad)
        n, _, rows, height, width = x.shape
        rows = (rows + sum(pad) - window.kernel[0]) // window.stride[0] + 1
        _, *plane = window.output_size((1, height, width))
        out = empty((n, weight.shape[0], rows, *plane), x.dtype, x.device)
        conv3d_forward(x, weight, out, window=window, front=pad[0], bias=bias, config=config)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        gx, gw = convolution_backward(grad, x, weight, ctx.window, ctx.pad, need_x, need_weight)
        gw = None if gw is None else gw.to(weight.dtype)
        return gx, gw, grad.sum((0, 2, 3, 4)) if need_bias else None, None, None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int]
) -> Tensor:
    return _Convolution.apply(x, weight, bias, window, pad)


def convolution_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pad: tuple[int, int], out: Tensor
) -> Tensor:
    config = choices.forward(weight, window, x.shape[2:])
    if config is None:
        return aten.convolution_into(x, weight, bias, window, pad, out)
    conv3d_forward(x, weight, out, window=window, front=pad[0], bias=bias, config=config)
    return out


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    window: Window,
    pad: tuple[int, int],
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    gx = gw = None
    if need_input:
        config = choices.dgrad(weight, window, x.shape[2:])
        if config is None:
            gx, _ = aten.convolution_backward(grad, x, weight, window, pad, True, False)
        else:
            gx = empty(x.shape, x.dtype, x.device)
            conv3d_dgrad(grad, weight, gx, window=window, front=pad[0], config=config)
    if need_weight:
        config = choices.wgrad(weight, window, x.shape[2:])
        if config is None:
            _, gw = aten.convolution_backward(grad, x, weight, window, pad, False, True)
        else:
            gw = conv3d_wgrad(x, grad, window=window, front=pad[0], config=config)
    return gx, gw


def mean_var(y: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = moments(y)
    return mean[0], var[0]


partial_moments = moments


class _NormAct(Function):
    """Saved: y and the terms; with an addend the activated value, whose sign y alone does not tell."""

    @staticmethod
    def forward(ctx, y, mean, scale, beta, addend, slope):  # type: ignore[no-untyped-def]
        out = empty(y.shape, y.dtype, y.device)
        norm_act_kernels.norm_act(y, NormAct(mean, scale, beta, slope), out, addend)
        ctx.save_for_backward(y, mean, scale, beta, None if addend is None else out)
        ctx.slope = slope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, mean, scale, beta, activated = ctx.saved_tensors
        need_y, need_mean, need_scale, need_beta, need_addend, _ = ctx.needs_input_grad
        sums = need_mean or need_scale or need_beta
        terms = NormAct(mean, scale, beta, ctx.slope)
        found = _norm_act_backward(grad, y, terms, activated, need_addend, need_y, sums)
        dmean = -scale * found.dbeta if found.dbeta is not None and need_mean else None
        return found.dy, dmean, found.dscale, found.dbeta, found.dz, None


def norm_act(
    y: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, slope: float, addend: Tensor | None = None
) -> Tensor:
    return _NormAct.apply(y, mean, scale, beta, addend, slope)


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
    # Where a is given beta is not used.
    return _norm_act_backward(grad, y, NormAct(mean, scale, mean, slope), a, need_dz, need_dy, need_terms)


def _norm_act_backward(
    grad: Tensor, y: Tensor, terms: NormAct, a: Tensor | None, need_dz: bool, need_dy: bool, sums: bool
) -> NormActGradients:
    dz, dy = (empty(y.shape, y.dtype, y.device) if needed else None for needed in (need_dz, need_dy))
    if not (need_dz or need_dy or sums):
        return NormActGradients(None, None, None, None)
    found = norm_act_kernels.norm_act_backward(grad, y, terms, activated=a, dy=dy, dz=dz, sums=sums)
    return NormActGradients(dz, dy, *(found or (None, None)))


def fold(grad: Tensor | None, y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = empty(y.shape, y.dtype, y.device)
    norm_act_kernels.fold(grad, y, mean[None], scale[None], shift[None], out)
    return out


class _UpsampleAdd(Function):
    """Saved: nothing."""

    @staticmethod
    def forward(ctx, x, rows, height, width, factors, addend):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.rows, ctx.factors = x.shape, rows, factors
        n, c, depth = x.shape[:3]
        lo, hi = rows if factors[0] == 2 else (0, depth)
        out = empty((n, c, hi - lo, height, width), x.dtype, x.device)
        upsample_kernels.upsample_x2(x, out, rows=(lo, hi), factors=factors, addend=addend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        out = empty(ctx.shape, grad.dtype, grad.device)
        rows = ctx.rows if ctx.factors[0] == 2 else (0, ctx.shape[2])
        upsample_kernels.upsample_x2_transpose(grad, out, rows=rows, factors=ctx.factors)
        return out, None, None, None, None, grad if ctx.needs_input_grad[5] else None


def upsample_add(
    x: Tensor,
    rows: tuple[int, int],
    height: int,
    width: int,
    factors: tuple[int, int, int],
    addend: Tensor | None,
) -> Tensor:
    return _UpsampleAdd.apply(x, rows, height, width, factors, addend)


fused: FusedConv3d | None = Fused()
make_head = Head
