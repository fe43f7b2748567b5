"""The last layer, the head and the sums of the loss in one node that stores no feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import Sums
from effseg.algorithms.sweeps.head import head_gradients
from effseg.algorithms.sweeps.tail import Layer, tail_sums_backward, tail_sums_forward
from effseg.algorithms.sweeps.tail import layer_statistics as sweep_statistics
from effseg.common.settings import Function
from effseg.expressions.layers import Deferred
from effseg.expressions.slabs import Window
from effseg.operators import compiled
from effseg.operators.backward import backward as node_backward
from effseg.operators.norm_backward import NormBackward
from effseg.operators.normalisation import Norm, merging, terms


class TailSumsFunction(Function):
    """The sums of Dice and cross-entropy over softmax(head(leaky_relu(norm(conv(expression))))).

    Saved for backward: the expression's tensors, the parameters, the labels as given, mean and variance
    (N, C). Neither the convolution's output nor its gradient exists but for a slab.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, spec, window, slope, how, running, slab_elements, ignore_index, labels, class_weights,
        weight, gamma, beta, head_weight, head_bias, *tensors,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.ops = select(labels.device, spec.dtype)
        ctx.device_type = labels.device.type
        ctx.arguments = spec, window, slope, slab_elements, ignore_index
        ctx.norm = how, running
        layer = Layer(ctx.ops, spec, tensors, weight, window, slope, slab_elements)
        head = ctx.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
        layer.make_room(head)
        mean, var = sweep_statistics(layer)
        sums, collected = tail_sums_forward(layer, terms(how, running, mean, var, gamma, beta), head, labels)
        ctx.save_for_backward(
            labels, class_weights, weight, gamma, beta, head_weight, head_bias, mean, var, collected, *tensors
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.voxels, sums.unknown, mean, var)
        return (*sums, mean, var)

    @staticmethod
    @node_backward
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        labels, class_weights, weight, gamma, beta, head_weight, head_bias, mean, var, collected, *tensors = (
            ctx.saved_tensors
        )
        spec, window, slope, slab_elements, ignore_index = ctx.arguments
        layer = Layer(ctx.ops, spec, tensors, weight, window, slope, slab_elements)
        head = ctx.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
        how, running = ctx.norm
        norm = NormBackward(how, running, mean, var, gamma, beta)
        grad_weight, grad_tensors = tail_sums_backward(
            layer,
            ctx.needs_input_grad[14:],
            mean,
            norm.terms,
            norm,
            head,
            labels,
            Sums(*grads[:6]),
            collected,
        )
        return (
            *[None] * 9, grad_weight, norm.grad_gamma, norm.grad_beta,
            *head_gradients(head, head_weight, head_bias), *grad_tensors,
        )  # fmt: skip


def tail_sums(
    x: Deferred,
    weight: Tensor,
    window: Window,
    norm: Norm,
    slope: float,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> tuple[Sums, Tensor, Tensor]:
    """`Sums` against labels (N, D, H, W), and mean and biased variance (N, C) of the convolution, for
    running statistics."""
    how, running = merging(norm)
    if torch.compiler.is_compiling():
        return compiled.tail_sums(
            x, weight, window, slope, how, running, norm.weight, norm.bias, head_weight, head_bias, labels,
            class_weights, ignore_index, slab_elements,
        )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        *sums, mean, var = TailSumsFunction.apply(
            x.spec, window, slope, how, running, slab_elements, ignore_index, labels, class_weights,
            weight, norm.weight, norm.bias, head_weight, head_bias, *x.tensors,
        )  # fmt: skip
        return Sums(*sums), mean, var


@torch.no_grad()
def layer_statistics(
    x: Deferred, weight: Tensor, window: Window, slab_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(x, weight), which is not stored; without a gradient."""
    if torch.compiler.is_compiling():
        return compiled.layer_statistics(x, weight, window, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        ops = select(x.device, x.dtype)
        return sweep_statistics(Layer(ops, x.spec, x.tensors, weight, window, 1.0, slab_elements))
