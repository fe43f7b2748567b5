"""Head, softmax and the sums of the loss, opaque; the streaming argmax: see `effseg.operators.head`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import choose, load
from effseg.algorithms.interface import Sums
from effseg.algorithms.sweeps.head import (
    head_gradients,
    head_segment,
    head_sums_backward,
    head_sums_forward,
    label_dtype,
)
from effseg.expressions.layers import Deferred, Spec
from effseg.operators.checks import unknown_labels
from effseg.operators.compiled.encoding import decode, encode
from effseg.operators.compiled.operator import fake_gradients, gradients, operator, spread


def _classes(spec: Spec, weight: Tensor | None) -> int:
    return spec.shape[1] if weight is None else weight.shape[0]


def _fake(text, numbers, labels, class_weights, weight, bias, tensors):  # type: ignore[no-untyped-def]
    _, spec, _, _ = decode(text, numbers)
    return list(Sums.zeros(spec.shape[0], _classes(spec, weight), labels.device))


@operator(
    "head_sums(str text, SymInt[] numbers, Tensor labels, Tensor? class_weights, Tensor? weight, "
    "Tensor? bias, Tensor[] tensors) -> Tensor[]",
    _fake,
)
def _head_sums(text, numbers, labels, class_weights, weight, bias, tensors):  # type: ignore[no-untyped-def]
    """`Sums`. Raises `ValueError` for labels that are neither a class nor ignored."""
    name, spec, slab_elements, ignore_index = decode(text, numbers)
    ops = load(name)
    head = ops.make_head(spec, weight, bias, labels.device, class_weights, ignore_index)
    sums = head_sums_forward(ops, spec, tensors, head, labels, slab_elements)
    unknown_labels(sums.unknown, head.classes)
    return list(sums)


def _fake_backward(  # type: ignore[no-untyped-def]
    text, numbers, needed, labels, class_weights, weight, bias, tensors, grads
):
    return fake_gradients((weight, bias, *tensors), needed)


@operator(
    "head_sums_backward(str text, SymInt[] numbers, bool[] needed, Tensor labels, Tensor? class_weights, "
    "Tensor? weight, Tensor? bias, Tensor[] tensors, Tensor[] grads) -> Tensor[]",
    _fake_backward,
)
def _head_sums_backward(  # type: ignore[no-untyped-def]
    text, numbers, needed, labels, class_weights, weight, bias, tensors, grads
):
    """The gradients of weight, bias and tensors that are needed."""
    name, spec, slab_elements, ignore_index = decode(text, numbers)
    ops = load(name)
    head = ops.make_head(spec, weight, bias, labels.device, class_weights, ignore_index)
    found = head_sums_backward(ops, spec, tensors, needed[2:], head, labels, Sums(*grads), slab_elements)
    of = (weight, bias, *tensors)
    return gradients((*head_gradients(head, weight, bias), *found), of, needed, (*of, *grads))


def _save(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.text, ctx.numbers, labels, class_weights, weight, bias, tensors = inputs
    ctx.save_for_backward(labels, class_weights, weight, bias, *tensors)


def _pull(ctx: Any, grads: list[Tensor]) -> Any:
    labels, class_weights, weight, bias, *tensors = ctx.saved_tensors
    *_, need_weight, need_bias, need_tensors = ctx.needs_input_grad
    needed = [need_weight, need_bias, *need_tensors]
    given = _head_sums_backward(
        ctx.text, ctx.numbers, needed, labels, class_weights, weight, bias, tensors, grads
    )
    grad_weight, grad_bias, *rest = spread(given, needed)
    return None, None, None, None, grad_weight, grad_bias, rest


_head_sums.register_autograd(_pull, setup_context=_save)


def counts_apart(sums: list[Tensor]) -> Sums:
    """The counts have no gradient, which a custom operator cannot say of one of its outputs."""
    intersection, probability, voxels, nll, smooth_nll, unknown = sums
    return Sums(intersection, probability, voxels.detach(), nll, smooth_nll, unknown.detach())


def head_sums(
    x: Deferred,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int | None,
    slab_elements: int | None,
) -> Sums:
    text, numbers = encode(choose(labels.device, x.dtype), x.spec, slab_elements, ignore_index)
    return counts_apart(
        torch.ops.effseg.head_sums(text, numbers, labels, class_weights, weight, bias, list(x.tensors))
    )


def _fake_segment(text, numbers, weight, bias, tensors):  # type: ignore[no-untyped-def]
    _, spec, _ = decode(text, numbers)
    n, _, *size = spec.shape
    return tensors[0].new_empty(n, *size, dtype=label_dtype(_classes(spec, weight)))


@operator(
    "segment(str text, SymInt[] numbers, Tensor? weight, Tensor? bias, Tensor[] tensors) -> Tensor",
    _fake_segment,
)
def _segment(text, numbers, weight, bias, tensors):  # type: ignore[no-untyped-def]
    name, spec, slab_elements = decode(text, numbers)
    ops = load(name)
    head = ops.make_head(spec, weight, bias, tensors[0].device)
    return head_segment(ops, spec, tensors, head, slab_elements)


def segment(x: Deferred, weight: Tensor | None, bias: Tensor | None, slab_elements: int | None) -> Tensor:
    text, numbers = encode(choose(x.device, x.dtype), x.spec, slab_elements)
    return torch.ops.effseg.segment(text, numbers, weight, bias, list(x.tensors))
