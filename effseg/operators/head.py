"""Head, softmax and the sums of the loss in one node; the streaming argmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import select
from effseg.algorithms.interface import Sums
from effseg.algorithms.sweeps.head import (
    head_gradients,
    head_segment,
    head_sums_backward,
    head_sums_forward,
)
from effseg.common.settings import Function
from effseg.expressions.layers import Deferred
from effseg.operators import compiled
from effseg.operators.backward import backward as node_backward


class HeadSumsFunction(Function):
    """The sums of Dice and cross-entropy over softmax(head(expression)).

    Saved for backward: the expression's tensors, head weight and bias, labels and class weights as given;
    logits, probabilities and one-hot labels of full size never exist.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, spec, slab_elements, ignore_index, labels, class_weights, weight, bias, *tensors
    ) -> tuple[Tensor, ...]:
        ctx.ops = select(labels.device, spec.dtype)
        ctx.device_type = labels.device.type
        ctx.spec, ctx.slab_elements, ctx.ignore_index = spec, slab_elements, ignore_index
        ctx.save_for_backward(labels, class_weights, weight, bias, *tensors)
        head = ctx.ops.make_head(spec, weight, bias, tensors[0].device, class_weights, ignore_index)
        sums = head_sums_forward(ctx.ops, spec, tensors, head, labels, slab_elements)
        ctx.mark_non_differentiable(sums.voxels, sums.unknown)
        return tuple(sums)

    @staticmethod
    @node_backward
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        labels, class_weights, weight, bias, *tensors = ctx.saved_tensors
        head = ctx.ops.make_head(ctx.spec, weight, bias, tensors[0].device, class_weights, ctx.ignore_index)
        grad_tensors = head_sums_backward(
            ctx.ops,
            ctx.spec,
            tensors,
            ctx.needs_input_grad[7:],
            head,
            labels,
            Sums(*grads),
            ctx.slab_elements,
        )
        return None, None, None, None, None, *head_gradients(head, weight, bias), *grad_tensors


def head_sums(
    x: Deferred,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> Sums:
    """`Sums` of head(x) against labels (N, D, H, W); differentiable but for the counts."""
    if torch.compiler.is_compiling():
        return compiled.head_sums(x, weight, bias, labels, class_weights, ignore_index, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        return Sums(
            *HeadSumsFunction.apply(
                x.spec, slab_elements, ignore_index, labels, class_weights, weight, bias, *x.tensors
            )
        )


@torch.no_grad()
def segment(
    x: Deferred, weight: Tensor | None, bias: Tensor | None, slab_elements: int | None = None
) -> Tensor:
    """See `effseg.functional.segment`."""
    if torch.compiler.is_compiling():
        return compiled.segment(x, weight, bias, slab_elements)
    with torch.autocast(x.device.type, enabled=False):
        ops = select(x.device, x.dtype)
        head = ops.make_head(x.spec, weight, bias, x.device)
        return head_segment(ops, x.spec, x.tensors, head, slab_elements)
