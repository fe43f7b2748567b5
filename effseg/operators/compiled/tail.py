"""The last layer, the head and the sums of the loss, opaque: see `effseg.operators.tail`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import choose, load
from effseg.algorithms.interface import Sums, accumulation_dtype
from effseg.algorithms.sweeps.head import head_gradients
from effseg.algorithms.sweeps.tail import Layer, collects, tail_sums_backward, tail_sums_forward
from effseg.algorithms.sweeps.tail import layer_statistics as sweep_statistics
from effseg.expressions.layers import Deferred
from effseg.expressions.slabs import Window
from effseg.operators.checks import unknown_labels
from effseg.operators.compiled.encoding import decode, encode
from effseg.operators.compiled.head import counts_apart
from effseg.operators.compiled.operator import fake_gradients, gradients, operator, spread
from effseg.operators.norm_backward import NormBackward
from effseg.operators.norm_sums import NormSums
from effseg.operators.normalisation import Merging, Running, terms

SUMS = len(Sums._fields)


def _layer(text, numbers, weight, tensors):  # type: ignore[no-untyped-def]
    """The layer, how it is normalised, and the label to ignore."""
    name, spec, window, slope, how, slab_elements, ignore_index = decode(text, numbers)
    return Layer(load(name), spec, tensors, weight, window, slope, slab_elements), how, ignore_index


def _fake(  # type: ignore[no-untyped-def]
    text, numbers, labels, class_weights, running, weight, gamma, beta, head_weight, head_bias, tensors
):
    layer, _, ignore_index = _layer(text, numbers, weight, tensors)
    head = layer.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
    n, c, *_ = layer.shape
    sums = Sums.zeros(n, head.classes, labels.device)
    moments = [weight.new_empty(n, c, dtype=accumulation_dtype(layer.dtype)) for _ in range(2)]
    return [*sums, *moments, *([NormSums(n, head).total] if collects(layer, head) else [])]


@operator(
    "tail_sums(str text, SymInt[] numbers, Tensor labels, Tensor? class_weights, Tensor[] running, "
    "Tensor weight, Tensor? gamma, Tensor? beta, Tensor head_weight, Tensor? head_bias, Tensor[] tensors) "
    "-> Tensor[]",
    _fake,
)
def _tail_sums(  # type: ignore[no-untyped-def]
    text, numbers, labels, class_weights, running, weight, gamma, beta, head_weight, head_bias, tensors
):
    """`Sums`, mean, var, and what backward needs besides where that is collected. Raises `ValueError` for
    labels that are neither a class nor ignored."""
    layer, how, ignore_index = _layer(text, numbers, weight, tensors)
    head = layer.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
    layer.make_room(head)
    mean, var = sweep_statistics(layer)
    norm = terms(how, tuple(running) or None, mean, var, gamma, beta)
    sums, collected = tail_sums_forward(layer, norm, head, labels)
    unknown_labels(sums.unknown, head.classes)
    return [*sums, mean, var, *([] if collected is None else [collected])]


def _of(weight, gamma, beta, head_weight, head_bias, tensors):  # type: ignore[no-untyped-def]
    """What the gradients are of."""
    return [weight, gamma, beta, head_weight, head_bias, *tensors]


def _fake_backward(  # type: ignore[no-untyped-def]
    text, numbers, needed, labels, class_weights, running, weight, gamma, beta, head_weight, head_bias,
    tensors, *_,
):  # fmt: skip
    return fake_gradients(_of(weight, gamma, beta, head_weight, head_bias, tensors), needed)


@operator(
    "tail_sums_backward(str text, SymInt[] numbers, bool[] needed, Tensor labels, Tensor? class_weights, "
    "Tensor[] running, Tensor weight, Tensor? gamma, Tensor? beta, Tensor head_weight, Tensor? head_bias, "
    "Tensor[] tensors, Tensor mean, Tensor var, Tensor? collected, Tensor[] grads) -> Tensor[]",
    _fake_backward,
)
def _tail_sums_backward(  # type: ignore[no-untyped-def]
    text, numbers, needed, labels, class_weights, running, weight, gamma, beta, head_weight, head_bias,
    tensors, mean, var, collected, grads,
):  # fmt: skip
    """The gradients of weight, gamma, beta, the head's weight and bias and tensors that are needed."""
    layer, how, ignore_index = _layer(text, numbers, weight, tensors)
    head = layer.ops.make_head(layer, head_weight, head_bias, labels.device, class_weights, ignore_index)
    norm = NormBackward(how, tuple(running) or None, mean, var, gamma, beta)
    grad_weight, grad_tensors = tail_sums_backward(
        layer, needed[5:], mean, norm.terms, norm, head, labels, Sums(*grads), collected
    )
    found = (
        grad_weight, norm.grad_gamma, norm.grad_beta, *head_gradients(head, head_weight, head_bias),
        *grad_tensors,
    )  # fmt: skip
    of = _of(weight, gamma, beta, head_weight, head_bias, tensors)
    return gradients(found, of, needed, (*of, mean, var, collected, *grads))


def _save(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.text, ctx.numbers, labels, class_weights, running, *parameters, tensors = inputs
    _, mean, var, *collected = output[SUMS - 1 :]
    kept = collected[0] if collected else None
    ctx.save_for_backward(labels, class_weights, mean, var, kept, *parameters, *running, *tensors)
    ctx.tensors = len(tensors)


def _pull(ctx: Any, grads: Sequence[Tensor]) -> Any:
    labels, class_weights, mean, var, collected, *rest = ctx.saved_tensors
    parameters, running, tensors = rest[:5], rest[5 : -ctx.tensors], rest[-ctx.tensors :]
    *_, need_tensors = ctx.needs_input_grad
    needed = [*ctx.needs_input_grad[5:-1], *need_tensors]
    given = _tail_sums_backward(
        ctx.text, ctx.numbers, needed, labels, class_weights, running, *parameters, tensors, mean, var,
        collected, grads[:SUMS],
    )  # fmt: skip
    found = spread(given, needed)
    return None, None, None, None, [None] * len(running), *found[:5], found[5:]


_tail_sums.register_autograd(_pull, setup_context=_save)


def tail_sums(
    x: Deferred,
    weight: Tensor,
    window: Window,
    slope: float,
    how: Merging,
    running: Running,
    gamma: Tensor | None,
    beta: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int | None,
    slab_elements: int | None,
) -> tuple[Sums, Tensor, Tensor]:
    name = choose(labels.device, x.dtype)
    text, numbers = encode(name, x.spec, window, slope, how, slab_elements, ignore_index)
    found = torch.ops.effseg.tail_sums(
        text, numbers, labels, class_weights, list(running or ()), weight, gamma, beta, head_weight,
        head_bias, list(x.tensors),
    )  # fmt: skip
    mean, var = found[SUMS : SUMS + 2]
    return counts_apart(found[:SUMS]), mean.detach(), var.detach()


def _fake_statistics(text, numbers, weight, tensors):  # type: ignore[no-untyped-def]
    _, spec, _, _ = decode(text, numbers)
    shape, dtype = (spec.shape[0], weight.shape[0]), accumulation_dtype(spec.dtype)
    return tuple(weight.new_empty(shape, dtype=dtype) for _ in range(2))


@operator(
    "layer_statistics(str text, SymInt[] numbers, Tensor weight, Tensor[] tensors) -> (Tensor, Tensor)",
    _fake_statistics,
)
def _layer_statistics(text, numbers, weight, tensors):  # type: ignore[no-untyped-def]
    name, spec, window, slab_elements = decode(text, numbers)
    return sweep_statistics(Layer(load(name), spec, tensors, weight, window, 1.0, slab_elements))


def layer_statistics(
    x: Deferred, weight: Tensor, window: Window, slab_elements: int | None
) -> tuple[Tensor, Tensor]:
    text, numbers = encode(choose(x.device, x.dtype), x.spec, window, slab_elements)
    return torch.ops.effseg.layer_statistics(text, numbers, weight, list(x.tensors))
