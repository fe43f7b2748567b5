"""Convolution of a deferred expression, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, StatisticsGradient
from effseg.algorithms.pullback import Pullback, added, rows
from effseg.common.device import make_room
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype
from effseg.expressions.base import Deferred, Spec, incoming, readable, stand_in
from effseg.expressions.slabs import Window, alike, rows_per_slab, slabs
from effseg.offload.memory import HostMemory
from effseg.offload.slabs import Outgoing
from effseg.operators.moments import Moments
from effseg.operators.operator import Operator
from effseg.parallel.partition import current, own_shape
from effseg.parallel.reduction import summed_where

Outputs = tuple[Tensor, Tensor | None, Tensor | None]


class Static(NamedTuple):
    """trains, consumes: see `conv3d_forward`, `conv3d`; known: what a forward pass gave that is run again;
    host: where y is kept, None: on its device."""

    spec: Spec
    window: Window
    statistics: bool
    slab_elements: int | None
    trains: bool = False
    consumes: bool = False
    known: Outputs | None = None
    host: HostMemory | None = None


def conv3d(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    statistics: bool = True,
    slab_elements: int | None = None,
    known: Outputs | None = None,
    consumes: bool = False,
) -> Outputs:
    """See `effseg.functional.conv3d`. known: what a forward pass gave that is run again for its graph.
    A gradient of x comes to lie in the memory of the gradient of y where nothing else holds that (not under
    torch.compile, whose operators change nothing). consumes: y is only read by operators of this package, and
    with a normalisation, so that this need not be asked."""
    if torch.compiler.is_compiling():
        static = Static(x.spec, window, statistics, slab_elements)
    else:
        static = Static(x.spec, window, statistics, slab_elements, torch.is_grad_enabled(), consumes, known)
    y, *moments = _operator(weight.device, x.dtype, static, (weight, bias, *x.tensors))
    return (y, moments[0], moments[1]) if statistics else (y, None, None)


def conv3d_to_host(
    x: Deferred, weight: Tensor, window: Window, host: HostMemory, slab_elements: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean and variance of `conv3d`, and y's values in the host's memory, which y only stands for: for
    `raw` and `residual`. Not for torch.compile, nor for a volume that is split."""
    static = Static(x.spec, window, True, slab_elements, torch.is_grad_enabled(), True, None, host)
    y, mean, var, held = _operator(weight.device, x.dtype, static, (weight, None, *x.tensors))
    return y, mean, var, held


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """y, or y, mean, var, or what stands for y, mean, var, and y in the host's memory."""
    weight, bias, *inner = tensors
    if static.host is not None:
        return _forward_to_host(ops, static, static.host, weight, inner), ()
    found: Outputs = static.known or conv3d_forward(
        ops, static.spec, inner, weight, bias, static.window, static.statistics, static.slab_elements,
        static.trains,
    )  # fmt: skip
    # .data: a view may not be changed in place afterwards, and an algorithm may give one.
    return [t.data for t in found if t is not None], ()


def _forward_to_host(
    ops: Algorithm, static: Static, host: HostMemory, weight: Tensor, inner: Sequence[Tensor]
) -> list[Tensor]:
    shape, dtype = output_shape(static.spec, weight, static.window), static.spec.dtype
    held = host.take(shape, dtype, weight.device)
    _, mean, var = conv3d_forward(
        ops, static.spec, inner, weight, None, static.window, True, static.slab_elements, held=held
    )
    assert mean is not None
    assert var is not None
    return [stand_in(shape, dtype, weight.device), mean, var, held]


def _own(outputs: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """y and its mean. The layer that follows keeps the same y, so the count stays one raw output per
    convolution; without statistics y is not needed."""
    if len(outputs) == 4:
        return outputs[3], outputs[1]
    return (outputs[0], outputs[1]) if len(outputs) == 3 else (None, None)


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor | None, Tensor | None],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    alone: bool = False,
) -> list[Tensor | None]:
    (y, mean), (weight, _, *inner) = own, tensors
    need_weight, need_bias, *rest = needed
    grad_y, grad_mean, grad_var = (*grads, None, None)[:3]
    grad_weight, grad_bias, found = conv3d_backward(
        ops, static.spec, inner, rest, weight, static.window, y, mean, grad_y, grad_mean, grad_var,
        need_weight, need_bias, static.slab_elements, alone or static.consumes, static.host is not None,
    )  # fmt: skip
    return [grad_weight, grad_bias, *found]


def _fake(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    weight = tensors[0]
    shape = output_shape(static.spec, weight, static.window)
    y = torch.empty(shape, dtype=static.spec.dtype, device=weight.device, memory_format=CHANNELS_LAST)
    dtype = accumulation_dtype(static.spec.dtype)
    return [y, *(weight.new_empty(shape[:2], dtype=dtype) for _ in range(2 * static.statistics))]


_operator = Operator(
    "conv3d",
    Static,
    _forward,
    _backward,
    _fake,
    outputs=lambda static: 3 if static.statistics else 1,
    constants=(3,),
    own=_own,
    reuses=True,
)


def output_shape(spec: Spec, weight: Tensor, window: Window) -> tuple[int, ...]:
    """(N, Co, D, H, W), of the whole volume."""
    n, _, d, h, w = spec.shape
    return (n, weight.shape[0], *window.output_size((d, h, w)))


def _is_fused(ops: Algorithm, spec: Spec, weight: Tensor, window: Window) -> bool:
    """Kernels that make expressions themselves read one process's rows only."""
    return ops.fused is not None and current() is None and ops.fused.takes(spec, weight, window)


def thickness(
    spec: Spec, out_shape: Sequence[int], window: Window, slab_elements: int | None, device: torch.device
) -> int:
    """Output rows of a slab: the larger of its input and its output sets the size."""
    _, c, _, h, w = spec.shape
    _, co, d, ho, wo = out_shape
    return rows_per_slab(d, max(c * h * w * window.stride[0], co * ho * wo), slab_elements, device)


def conv3d_forward(
    ops: Algorithm,
    spec: Spec,
    tensors: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    statistics: bool,
    slab_elements: int | None,
    trains: bool = False,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = conv(expression, weight) + bias in the expression's type, and the mean and biased variance (N, Co)
    of the stored y. trains: y is kept for a backward pass, so that more tensors of its size will follow;
    held: memory of the host that y comes to lie in."""
    if held is None and _is_fused(ops, spec, weight, window):
        assert ops.fused is not None
        return ops.fused.forward(spec, tensors, weight, bias, window, statistics)
    shape = output_shape(spec, weight, window)
    n, co, d, *_ = own = own_shape(shape)
    rows_of_slab = thickness(spec, shape, window, slab_elements, weight.device)
    y = held  # None: the only slab's
    if y is None and (n > 1 or rows_of_slab < d or d == 0):
        y = torch.empty(own, dtype=spec.dtype, device=weight.device, memory_format=CHANNELS_LAST)
    weight = weight.to(spec.dtype, memory_format=CHANNELS_LAST)
    bias = None if bias is None else bias.to(spec.dtype)
    stored = readable(spec, tensors, window, rows_of_slab)
    moments = Moments(ops, (n, co), spec.dtype, weight.device)
    leaving = None if held is None else Outgoing(held, weight.device)
    if trains and y is not None:
        make_room(y.device, y.nbytes)
    for sample, lo, hi, here in slabs(n, shape[2], rows_of_slab):
        first, last, pad = window.input_rows(lo, hi, spec.shape[2])
        a = rows(ops, spec, stored, sample, first, last)
        if leaving is not None:
            part = ops.convolution(a, weight, bias, window, pad)
            leaving.put(sample, here, part, alike())
        elif y is None:
            part = y = ops.convolution(a, weight, bias, window, pad).contiguous(memory_format=CHANNELS_LAST)
        else:
            own_rows = y[sample : sample + 1, :, here]
            part = ops.convolution_into(a, weight, bias, window, pad, own_rows)
        del a
        if statistics:
            moments.add(sample, part)
        del part
    if leaving is not None:
        leaving.end()
    assert y is not None
    return (y, *moments.merge(shape)) if statistics else (y, None, None)


def conv3d_backward(
    ops: Algorithm,
    spec: Spec,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    weight: Tensor,
    window: Window,
    y: Tensor | None,
    mean: Tensor | None,
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    slab_elements: int | None,
    consumes: bool = False,
    held: bool = False,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of weight, bias and the expression's tensors. y: None where its statistics have no gradient;
    consumes: grad_y is nobody else's, and one of them may come to lie in its memory; held: y lies in the
    host's memory.

    What reaches y through its statistics over M voxels is affine in y, so it is folded in as it is read:
    g = grad_y + grad_mean / M + 2 grad_var (y - mean) / M.
    """
    shape = output_shape(spec, weight, window)
    folded = through_statistics(shape, mean, grad_mean, grad_var)
    rows_of_slab = thickness(spec, shape, window, slab_elements, weight.device)
    in_step = window.stride[0] == 1 and spec.shape[2] == shape[2]  # a row of one is a row of the other
    memory = grad_y if consumes and in_step else None
    if _is_fused(ops, spec, weight, window) and not need_bias and not held:
        assert ops.fused is not None
        y = grad_y if y is None else y  # of its shape
        assert y is not None
        grad_weight, grads = ops.fused.backward(
            spec,
            tensors,
            needed,
            weight,
            window,
            y,
            folded,
            grad_y,
            need_weight,
            rows_of_slab,
            memory,
        )
        return None if grad_weight is None else grad_weight.to(weight.dtype), None, grads
    accumulate = accumulation_dtype(weight.dtype)
    grad_weight = grad_bias = None
    low = weight.to(spec.dtype, memory_format=CHANNELS_LAST)
    pullback = Pullback(ops, spec, tensors, needed, rows_of_slab, memory, window)
    coming = None
    if held and folded is not None:
        assert y is not None
        coming = incoming(y, rows_of_slab, weight.device)
    for sample, lo, hi, here in slabs(shape[0], shape[2], rows_of_slab):
        first, last, pad = window.input_rows(lo, hi, spec.shape[2])
        a = pullback.rows(sample, first, last)
        direct = None if grad_y is None else grad_y[sample : sample + 1, :, here].to(spec.dtype)
        if folded is None:
            assert direct is not None
            grad = direct
        else:
            assert y is not None
            part = y[sample : sample + 1, :, here] if coming is None else coming.cut((lo, hi), sample)
            grad = ops.fold(direct, part, *(t[sample] for t in folded))
        del direct
        grad_a, grad_w = ops.convolution_backward(grad, a, low, window, pad, pullback.any, need_weight)
        if grad_w is not None:
            grad_weight = added(grad_weight, grad_w, accumulate)
        if need_bias:
            grad_bias = added(grad_bias, grad.sum((0, 2, 3, 4), dtype=accumulate), accumulate)
        del a, grad, grad_w
        if grad_a is not None:
            pullback.pull(grad_a, read=here.stop)
        del grad_a
    if need_weight and grad_weight is None:  # no slab was this process's
        grad_weight = torch.zeros_like(weight)
    if need_bias and grad_bias is None:
        grad_bias = weight.new_zeros(weight.shape[0])
    cast = [None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
    return cast[0], cast[1], pullback.gradients()


def through_statistics(
    shape: Sequence[int], mean: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
) -> StatisticsGradient | None:
    """What the gradients of mean and biased variance add to that of y (of this shape), affine in y. Each
    process brings its part of them."""
    if mean is None or (grad_mean is None and grad_var is None):
        return None
    grad_mean, grad_var = summed_where((grad_mean, grad_var))
    voxels = prod(shape[2:])
    zero = torch.zeros_like(mean)
    scale = zero if grad_var is None else grad_var * (2 / voxels)
    return StatisticsGradient(mean, scale, zero if grad_mean is None else grad_mean / voxels)
