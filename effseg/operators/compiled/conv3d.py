"""Convolution of a deferred expression, opaque: see `effseg.operators.conv3d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import choose, load
from effseg.algorithms.interface import CHANNELS_LAST, accumulation_dtype
from effseg.algorithms.sweeps.conv3d import conv3d_backward, conv3d_forward
from effseg.expressions.layers import Deferred
from effseg.expressions.slabs import Window
from effseg.operators.compiled.encoding import decode, encode
from effseg.operators.compiled.operator import fake_gradients, gradients, operator, spread


def _fake(text, numbers, weight, bias, tensors):  # type: ignore[no-untyped-def]
    _, spec, window, statistics, _ = decode(text, numbers)
    n, _, *size = spec.shape
    shape = (n, weight.shape[0], *window.output_size(size))
    y = torch.empty(shape, dtype=spec.dtype, device=weight.device, memory_format=CHANNELS_LAST)
    dtype = accumulation_dtype(spec.dtype)
    return [y, *(weight.new_empty(shape[:2], dtype=dtype) for _ in range(2 if statistics else 0))]


@operator(
    "conv3d(str text, SymInt[] numbers, Tensor weight, Tensor? bias, Tensor[] tensors) -> Tensor[]", _fake
)
def _conv3d(text, numbers, weight, bias, tensors):  # type: ignore[no-untyped-def]
    """y, or y, mean, var."""
    name, spec, window, statistics, slab_elements = decode(text, numbers)
    found = conv3d_forward(load(name), spec, tensors, weight, bias, window, statistics, slab_elements)
    return [t for t in found if t is not None]


def _of(weight: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the gradients are of; the bias' are in the weight's type."""
    return [weight, weight.new_empty(weight.shape[0]), *tensors]


def _fake_backward(text, numbers, needed, weight, tensors, *_):  # type: ignore[no-untyped-def]
    return fake_gradients(_of(weight, tensors), needed)


@operator(
    "conv3d_backward(str text, SymInt[] numbers, bool[] needed, Tensor weight, Tensor[] tensors, Tensor? y, "
    "Tensor? mean, Tensor? grad_y, Tensor? grad_mean, Tensor? grad_var) -> Tensor[]",
    _fake_backward,
)
def _conv3d_backward(  # type: ignore[no-untyped-def]
    text, numbers, needed, weight, tensors, y, mean, grad_y, grad_mean, grad_var
):
    """The gradients of weight, bias and tensors that are needed."""
    name, spec, window, _, slab_elements = decode(text, numbers)
    need_weight, need_bias, *rest = needed
    grad_weight, grad_bias, grads = conv3d_backward(
        load(name), spec, tensors, rest, weight, window, grad_y if y is None else y, mean,
        grad_y, grad_mean, grad_var, need_weight, need_bias, slab_elements,
    )  # fmt: skip
    inputs = (weight, *tensors, y, mean, grad_y, grad_mean, grad_var)
    return gradients((grad_weight, grad_bias, *grads), _of(weight, tensors), needed, inputs)


def _save(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.text, ctx.numbers, weight, _, tensors = inputs
    ctx.set_materialize_grads(False)
    y, mean, _ = output if len(output) == 3 else (None, None, None)
    ctx.save_for_backward(weight, y, mean, *tensors)


def _pull(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    weight, y, mean, *tensors = ctx.saved_tensors
    _, _, need_weight, need_bias, need_tensors = ctx.needs_input_grad
    needed = [need_weight, need_bias, *need_tensors]
    grad_y, grad_mean, grad_var = (*grads, None, None)[:3]
    given = _conv3d_backward(
        ctx.text, ctx.numbers, needed, weight, tensors, y, mean, grad_y, grad_mean, grad_var
    )
    grad_weight, grad_bias, *rest = spread(given, needed)
    return None, None, grad_weight, grad_bias, rest


_conv3d.register_autograd(_pull, setup_context=_save)


def conv3d(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    statistics: bool,
    slab_elements: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    name = choose(weight.device, x.dtype)
    text, numbers = encode(name, x.spec, window, statistics, slab_elements)
    y, *moments = torch.ops.effseg.conv3d(text, numbers, weight, bias, list(x.tensors))
    return (y, *moments) if statistics else (y, None, None)
