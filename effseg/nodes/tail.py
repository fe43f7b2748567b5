"""The last layer, the head and the sums of the loss in one node that stores no feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import Sums
from effseg.algorithms.sweeps.tail import (
    Layer,
    tail_sums_backward,
    tail_sums_forward,
)
from effseg.algorithms.sweeps.tail import layer_statistics as sweep_statistics
from effseg.deferred import Deferred, Normalisation
from effseg.nodes.backward import backward as node_backward
from effseg.nodes.head import head_gradients
from effseg.normalisation import Norm, terms
from effseg.slabs import Window


class TailSumsFunction(torch.autograd.Function):
    """The sums of Dice and cross-entropy over softmax(head(leaky_relu(norm(conv(expression))))).

    Saved for backward: the expression's tensors, the parameters, the labels as given, mean and variance
    (N, C). Neither the convolution's output nor its gradient exists but for a slab.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, spec, window, slope, norm, slab_elements, ignore_index, labels, class_weights,
        weight, gamma, beta, head_weight, head_bias, *tensors,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.ops = select(labels.device, spec.dtype)
        ctx.device_type = labels.device.type
        ctx.arguments = spec, window, slope, slab_elements, ignore_index
        ctx.norm = norm
        layer = Layer(ctx.ops, spec, tensors, weight, window, slope, slab_elements)
        mean, var = sweep_statistics(layer)
        head = ctx.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
        sums, collected = tail_sums_forward(layer, terms(norm, mean, var, gamma, beta), head, labels)
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
        norm = _NormBackward(ctx.norm, mean, var, gamma, beta)
        grad_weight, grad_tensors = tail_sums_backward(
            layer,
            ctx.needs_input_grad[13:],
            mean,
            norm.terms,
            norm,
            head,
            labels,
            Sums(*grads[:6]),
            collected,
        )
        return (
            *[None] * 8, grad_weight, norm.grad_gamma, norm.grad_beta,
            *head_gradients(head, head_weight, head_bias), *grad_tensors,
        )  # fmt: skip


class _NormBackward:
    """From the gradients of (mean, scale, beta) to those of what they were made of, by autograd on a few
    numbers; those of the norm's weight and bias are kept here."""

    def __init__(
        self, norm: Norm, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> None:
        self.leaves = [None if t is None else t.detach().requires_grad_() for t in (mean, var, gamma, beta)]
        with torch.enable_grad():
            self.graph = terms(norm, *self.leaves)  # type: ignore[arg-type]
        self.terms = Normalisation(*(t.detach() for t in self.graph))
        self.grad_gamma: Tensor | None = None
        self.grad_beta: Tensor | None = None

    def __call__(self, grads: Normalisation) -> tuple[Tensor | None, Tensor | None]:
        live = [i for i, t in enumerate(self.graph) if t.requires_grad]
        present = [t for t in self.leaves if t is not None]
        outputs, weights = [self.graph[i] for i in live], [grads[i] for i in live]
        found = iter(torch.autograd.grad(outputs, present, weights, allow_unused=True) if live else [])
        mean, var, self.grad_gamma, self.grad_beta = (
            None if t is None else next(found, None) for t in self.leaves
        )
        return mean, var


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
    with torch.autocast(x.device.type, enabled=False):
        *sums, mean, var = TailSumsFunction.apply(
            x.spec, window, slope, norm, slab_elements, ignore_index, labels, class_weights,
            weight, norm.weight, norm.bias, head_weight, head_bias, *x.tensors,
        )  # fmt: skip
        return Sums(*sums), mean, var


@torch.no_grad()
def layer_statistics(
    x: Deferred, weight: Tensor, window: Window, slab_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(x, weight), which is not stored; without a gradient."""
    with torch.autocast(x.device.type, enabled=False):
        ops = select(x.device, x.dtype)
        return sweep_statistics(Layer(ops, x.spec, x.tensors, weight, window, 1.0, slab_elements))
