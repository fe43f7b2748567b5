"""Head, softmax and the sums of the loss in one node; the streaming argmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effseg.algorithms import select
from effseg.algorithms.aten.head import Sums
from effseg.deferred import Deferred


class HeadSumsFunction(torch.autograd.Function):
    """The sums of Dice and cross-entropy over softmax(head(expression)).

    Saved for backward: the expression's tensors, head weight and bias, labels and class weights as given;
    logits, probabilities and one-hot labels of full size never exist.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, spec, slab_elements, ignore_index, labels, class_weights, weight, bias, *tensors
    ) -> tuple[Tensor, ...]:
        ctx.algorithm = select("head")
        ctx.spec, ctx.slab_elements, ctx.ignore_index = spec, slab_elements, ignore_index
        ctx.save_for_backward(labels, class_weights, weight, bias, *tensors)
        sums = ctx.algorithm.head_sums_forward(
            spec, tensors, weight, bias, labels, class_weights, ignore_index, slab_elements
        )
        ctx.mark_non_differentiable(sums.voxels, sums.unknown)
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):  # type: ignore[no-untyped-def]
        labels, class_weights, weight, bias, *tensors = ctx.saved_tensors
        grad_weight, grad_bias, grad_tensors = ctx.algorithm.head_sums_backward(
            ctx.spec, tensors, ctx.needs_input_grad[7:], weight, bias, labels, class_weights,
            ctx.ignore_index, Sums(*grads), ctx.slab_elements,
        )  # fmt: skip
        return None, None, None, None, None, grad_weight, grad_bias, *grad_tensors


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
    with torch.autocast(x.device.type, enabled=False):
        return select("head").head_segment(x.spec, x.tensors, weight, bias, slab_elements)
