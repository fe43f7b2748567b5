"""A deferred expression made into a stored tensor, opaque: see `effseg.operators.materialise`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import choose, load
from effseg.algorithms.interface import CHANNELS_LAST
from effseg.algorithms.sweeps.materialise import materialise_backward, materialise_forward
from effseg.expressions.layers import Deferred
from effseg.operators.compiled.encoding import decode, encode
from effseg.operators.compiled.operator import fake_gradients, gradients, operator, spread


def _fake(text, numbers, tensors):  # type: ignore[no-untyped-def]
    _, spec, _ = decode(text, numbers)
    return torch.empty(spec.shape, dtype=spec.dtype, device=tensors[0].device, memory_format=CHANNELS_LAST)


@operator("materialise(str text, SymInt[] numbers, Tensor[] tensors) -> Tensor", _fake)
def _materialise(text, numbers, tensors):  # type: ignore[no-untyped-def]
    name, spec, slab_elements = decode(text, numbers)
    return materialise_forward(load(name), spec, tensors, slab_elements)


def _fake_backward(text, numbers, needed, tensors, grad):  # type: ignore[no-untyped-def]
    return fake_gradients(tensors, needed)


@operator(
    "materialise_backward(str text, SymInt[] numbers, bool[] needed, Tensor[] tensors, Tensor grad) "
    "-> Tensor[]",
    _fake_backward,
)
def _materialise_backward(text, numbers, needed, tensors, grad):  # type: ignore[no-untyped-def]
    """The gradients of tensors that are needed."""
    name, spec, slab_elements = decode(text, numbers)
    grads = materialise_backward(load(name), spec, tensors, needed, grad, slab_elements)
    return gradients(grads, tensors, needed, (*tensors, grad))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.text, ctx.numbers, tensors = inputs
    ctx.save_for_backward(*tensors)


def _pull(ctx: Any, grad: Tensor) -> Any:
    _, _, needed = ctx.needs_input_grad
    given = _materialise_backward(ctx.text, ctx.numbers, needed, list(ctx.saved_tensors), grad)
    return None, None, spread(given, needed)


_materialise.register_autograd(_pull, setup_context=_save)


def materialise(x: Deferred, slab_elements: int | None) -> Tensor:
    text, numbers = encode(choose(x.device, x.dtype), x.spec, slab_elements)
    return torch.ops.effseg.materialise(text, numbers, list(x.tensors))
