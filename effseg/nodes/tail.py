"""The last layer, the head and the sums of the loss in one node that stores no feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import Algorithm, Sums
from effseg.algorithms.sweeps.head import head_gradients
from effseg.algorithms.sweeps.norm_backward import NormBackward
from effseg.algorithms.sweeps.tail import Layer, tail_sums_backward, tail_sums_forward
from effseg.algorithms.sweeps.tail import layer_statistics as sweep_statistics
from effseg.deferred import Deferred, Spec
from effseg.nodes import compiled
from effseg.nodes.backward import backward as node_backward
from effseg.normalisation import Merging, Running, layer_terms
from effseg.settings import Function
from effseg.slabs import Window


class Tail(NamedTuple):
    """leaky_relu(norm(conv(x, weight) + offset + addend), slope), whose convolution is not stored.

    how, running: the norm's settings, see `effseg.normalisation.merging`; gamma, beta: its parameters;
    offset: the convolution's bias (Co,); addend: of the convolution's shape and type; statistics: mean and
    variance (N, Co) of conv(x, weight) + addend, where they are known.
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


class TailSumsFunction(Function):
    """The sums of Dice and cross-entropy over softmax(head(tail)).

    Saved for backward: the expressions' tensors, the parameters, the labels as given, mean and variance
    (N, C). Neither the convolution's output nor its gradient exists but for a slab.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, settings, slab_elements, ignore_index, known, labels, class_weights,
        weight, gamma, beta, offset, head_weight, head_bias, *tensors,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.device_type, ctx.settings = labels.device.type, settings
        ctx.ops = select(labels.device, settings.spec.dtype)
        ctx.options = slab_elements, ignore_index
        layer = settings.layer(ctx.ops, weight, tensors, slab_elements)
        head = ctx.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
        layer.make_room(head)
        mean, var = sweep_statistics(layer) if known is None else (t.clone() for t in known)
        norm = layer_terms(settings.how, settings.running, mean, var, gamma, beta, offset)
        sums, collected = tail_sums_forward(layer, norm, head, labels)
        ctx.save_for_backward(
            labels, class_weights, weight, gamma, beta, offset, head_weight, head_bias, mean, var, collected,
            *tensors,
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.voxels, sums.unknown, mean, var)
        return (*sums, mean, var)

    @staticmethod
    @node_backward
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        (
            labels, class_weights, weight, gamma, beta, offset, head_weight, head_bias, mean, var, collected,
            *tensors,
        ) = ctx.saved_tensors  # fmt: skip
        settings, (slab_elements, ignore_index) = ctx.settings, ctx.options
        layer = settings.layer(ctx.ops, weight, tensors, slab_elements)
        head = ctx.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
        norm = NormBackward(settings.how, settings.running, mean, var, gamma, beta, offset)
        grad_weight, grad_tensors = tail_sums_backward(
            layer,
            ctx.needs_input_grad[12:],
            mean,
            norm.terms,
            norm,
            head,
            labels,
            Sums(*grads[:6]),
            collected,
        )
        return (
            *[None] * 6, grad_weight, norm.grad_gamma, norm.grad_beta, norm.grad_offset,
            *head_gradients(head, head_weight, head_bias), *grad_tensors,
        )  # fmt: skip


class _Settings(NamedTuple):
    """What a tail is but for its tensors (running statistics, which get no gradient, are here). addend: its
    specification; own: how many tensors x has, which the addend's follow."""

    spec: Spec
    window: Window
    slope: float
    how: Merging
    running: Running
    addend: Spec | None
    own: int

    def layer(
        self, ops: Algorithm, weight: Tensor, tensors: Sequence[Tensor], slab_elements: int | None
    ) -> Layer:
        own, others = tensors[: self.own], tuple(tensors[self.own :])
        addend = None if self.addend is None else Deferred(self.addend, others)
        return Layer(ops, self.spec, own, weight, self.window, self.slope, slab_elements, addend)


def tail_sums(
    tail: Tail,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> tuple[Sums, Tensor, Tensor]:
    """`Sums` against labels (N, D, H, W), and mean and biased variance (N, C) of the convolution (and what is
    added to it), for running statistics. Under torch.compile without offset, addend and known statistics."""
    x, addend = tail.x, tail.addend
    if torch.compiler.is_compiling():
        return compiled.tail_sums(
            x, tail.weight, tail.window, tail.slope, tail.how, tail.running, tail.gamma, tail.beta,
            head_weight, head_bias, labels, class_weights, ignore_index, slab_elements,
        )  # fmt: skip
    settings = _Settings(
        x.spec, tail.window, tail.slope, tail.how, tail.running, addend and addend.spec, len(x.tensors)
    )
    with torch.autocast(x.device.type, enabled=False):
        *sums, mean, var = TailSumsFunction.apply(
            settings, slab_elements, ignore_index, tail.statistics, labels, class_weights,
            tail.weight, tail.gamma, tail.beta, tail.offset, head_weight, head_bias,
            *x.tensors, *(addend.tensors if addend else ()),
        )  # fmt: skip
        return Sums(*sums), mean, var


@torch.no_grad()
def layer_statistics(
    x: Deferred,
    weight: Tensor,
    window: Window,
    slab_elements: int | None = None,
    addend: Deferred | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(x, weight) + addend, which is not stored; without a gradient.
    Under torch.compile without addend."""
    if torch.compiler.is_compiling():
        return compiled.layer_statistics(x, weight, window, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        ops = select(x.device, x.dtype)
        return sweep_statistics(Layer(ops, x.spec, x.tensors, weight, window, 1.0, slab_elements, addend))
