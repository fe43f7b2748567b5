"""The last layer and the head in one operator, of which nothing is stored: convolution, normalisation,
activation, 1x1x1 head, loss sums. Its sweeps over slabs: `effseg.operators.tail_sweeps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, Head, Sums
from effseg.common.formats import accumulation_dtype
from effseg.expressions.base import Deferred, Spec
from effseg.expressions.slabs import Window
from effseg.losses import unknown_labels
from effseg.operators.head import COUNTS, head_gradients
from effseg.operators.norm_backward import NormBackward
from effseg.operators.norm_sums import NormSums
from effseg.operators.normalisation import Merging, Running, layer_terms
from effseg.operators.operator import Operator
from effseg.operators.tail_sweeps import (
    Layer,
    collects,
    sweep_statistics,
    tail_sums_backward,
    tail_sums_forward,
)


class Tail(NamedTuple):
    """leaky_relu(norm(conv(x, weight) + offset + addend), slope), whose convolution is not stored.

    how, running: the norm's settings, see `effseg.operators.normalisation.merging`; gamma, beta: its
    parameters; offset: the convolution's bias (Co,); addend: of the convolution's shape and type; statistics:
    mean and variance (N, Co) of conv(x, weight) + addend, where they are known.
    """

    x: Deferred
    weight: Tensor
    window: Window
    slope: float
    how: Merging
    running: Running
    gamma: Tensor | None
    beta: Tensor | None
    offset: Tensor | None = None
    addend: Deferred | None = None
    statistics: tuple[Tensor, Tensor] | None = None


class Static(NamedTuple):
    """own: how many tensors x has, which those of the addend follow; checks: see
    `effseg.operators.head.Static`."""

    spec: Spec
    window: Window
    slope: float
    slab_elements: int | None
    how: Merging
    addend: Spec | None
    own: int
    ignore_index: int | None
    checks: bool


class LayerStatic(NamedTuple):
    spec: Spec
    window: Window
    slab_elements: int | None
    addend: Spec | None
    own: int


class Parameters(NamedTuple):
    """What the operator takes besides the expressions' tensors."""

    labels: Tensor
    class_weights: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    offset: Tensor | None
    head_weight: Tensor
    head_bias: Tensor | None

    @property
    def running(self) -> Running:
        return _both(self.running_mean, self.running_var)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        return _both(self.mean, self.var)


COUNT = len(Parameters._fields)


def _both(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)


def tail_sums(
    tail: Tail,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> tuple[Sums, Tensor, Tensor]:
    """`Sums` of softmax(head(tail)) against labels (N, D, H, W), and mean and biased variance (N, C) of the
    convolution (and what is added to it), for running statistics.

    Kept for backward besides the arguments: mean and variance, and what stands in for sweep B1. Neither the
    convolution's output nor its gradient exists but for a slab.
    """
    x, addend = tail.x, tail.addend
    running_mean, running_var = tail.running or (None, None)
    mean, var = tail.statistics or (None, None)
    given = Parameters(
        labels, class_weights, running_mean, running_var, mean, var, tail.weight, tail.gamma, tail.beta,
        tail.offset, head_weight, head_bias,
    )  # fmt: skip
    static = Static(
        x.spec, tail.window, tail.slope, slab_elements, tail.how, addend and addend.spec, len(x.tensors),
        ignore_index, torch.compiler.is_compiling(),
    )  # fmt: skip
    tensors = (*given, *x.tensors, *(addend.tensors if addend else ()))
    *sums, mean, var = _tail_sums(labels.device, x.dtype, static, tensors)
    return Sums(*sums), mean, var


@torch.no_grad()
def layer_statistics(
    x: Deferred,
    weight: Tensor,
    window: Window,
    slab_elements: int | None = None,
    addend: Deferred | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(x, weight) + addend, not stored; without a gradient."""
    static = LayerStatic(x.spec, window, slab_elements, addend and addend.spec, len(x.tensors))
    tensors = (weight, *x.tensors, *(addend.tensors if addend else ()))
    mean, var = _layer_statistics(x.device, x.dtype, static, tensors)
    return mean, var


def _layer(
    ops: Algorithm, static: Static | LayerStatic, weight: Tensor, tensors: Sequence[Tensor], slope: float
) -> Layer:
    own, others = tensors[: static.own], tuple(tensors[static.own :])
    addend = None if static.addend is None else Deferred(static.addend, others)
    return Layer(ops, static.spec, own, weight, static.window, slope, static.slab_elements, addend)


def _made(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> tuple[Parameters, Layer, Head]:
    given = Parameters(*tensors[:COUNT])
    layer = _layer(ops, static, given.weight, tensors[COUNT:], static.slope)
    head = ops.make_head(
        layer, given.head_weight, given.head_bias, given.labels.device, given.class_weights,
        static.ignore_index,
    )  # fmt: skip
    return given, layer, head


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    given, layer, head = _made(ops, static, tensors)
    layer.make_room(head)
    known = given.statistics
    mean, var = sweep_statistics(layer) if known is None else (t.clone() for t in known)
    norm = layer_terms(static.how, given.running, mean, var, given.gamma, given.beta, given.offset)
    sums, collected = tail_sums_forward(layer, norm, head, given.labels)
    if static.checks:
        unknown_labels(sums.unknown, head.classes)
    return (*sums, mean, var), () if collected is None else (collected,)


def _own(outputs: Sequence[Tensor], besides: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    *_, mean, var = outputs
    return mean, var, besides[0] if besides else None


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor, Tensor, Tensor | None],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    mean, var, collected = own
    given, layer, head = _made(ops, static, tensors)
    norm = NormBackward(static.how, given.running, mean, var, given.gamma, given.beta, given.offset)
    *sums, _, _ = grads
    grad_weight, found = tail_sums_backward(
        layer, needed[COUNT:], mean, norm.terms, norm, head, given.labels, Sums(*sums), collected
    )
    head_grads = head_gradients(head, given.head_weight, given.head_bias)
    own_grads = (grad_weight, norm.grad_gamma, norm.grad_beta, norm.grad_offset)
    return [*[None] * 6, *own_grads, *head_grads, *found]


def _fake(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    given, layer, head = _made(ops, static, tensors)
    n, c, *_ = layer.shape
    sums = Sums.zeros(n, head.classes, given.labels.device)
    moments = [given.weight.new_empty(n, c, dtype=accumulation_dtype(layer.dtype)) for _ in range(2)]
    return [*sums, *moments, *([NormSums(n, head).total] if collects(layer, head) else [])]


def _statistics_forward(
    ops: Algorithm, static: LayerStatic, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    weight, *inner = tensors
    return sweep_statistics(_layer(ops, static, weight, inner, 1.0)), ()


def _fake_statistics(ops: Algorithm, static: LayerStatic, tensors: Sequence[Tensor]) -> list[Tensor]:
    shape, dtype = (static.spec.shape[0], tensors[0].shape[0]), accumulation_dtype(static.spec.dtype)
    return [tensors[0].new_empty(shape, dtype=dtype) for _ in range(2)]


_SUMS = len(Sums._fields)
_tail_sums = Operator(
    "tail_sums", Static, _forward, _backward, _fake, outputs=_SUMS + 2, constants=(*COUNTS, _SUMS, _SUMS + 1),
    own=_own, zeros=True,
)  # fmt: skip
_layer_statistics = Operator(
    "layer_statistics", LayerStatic, _statistics_forward, None, _fake_statistics, outputs=2
)
