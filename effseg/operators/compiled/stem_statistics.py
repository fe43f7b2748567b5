"""Statistics of a convolution whose output is never stored, opaque: see `effseg.operators.stem_statistics`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effseg.algorithms import choose, load
from effseg.algorithms.interface import accumulation_dtype
from effseg.algorithms.sweeps.stem_statistics import stem_statistics_backward, stem_statistics_forward
from effseg.expressions.slabs import Window
from effseg.operators.compiled.encoding import decode, encode
from effseg.operators.compiled.operator import operator


def _fake(text, numbers, image, weight):  # type: ignore[no-untyped-def]
    _, _, dtype, _ = decode(text, numbers)
    n, (co, *taps) = image.shape[0], weight.shape
    mean, var = (weight.new_empty(n, co, dtype=accumulation_dtype(dtype)) for _ in range(2))
    return [mean, var, *(weight.new_empty(n, c, *taps, dtype=torch.float64) for c in (1, co))]


@operator("stem_statistics(str text, SymInt[] numbers, Tensor image, Tensor weight) -> Tensor[]", _fake)
def _stem_statistics(text, numbers, image, weight):  # type: ignore[no-untyped-def]
    """mean, var, and the P and Q that backward needs."""
    name, window, dtype, slab_elements = decode(text, numbers)
    mean, var, p, q = stem_statistics_forward(load(name), image, weight, window, dtype, slab_elements)
    return [mean, var, p.clone(memory_format=torch.contiguous_format), q]  # p is part of a tensor


def _save(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    text, numbers, image, weight = inputs
    _, window, _, _ = decode(text, numbers)
    ctx.voxels, ctx.dtype = math.prod(window.output_size(image.shape[2:])), weight.dtype
    ctx.save_for_backward(*output[2:])


def _pull(ctx: Any, grads: list[Tensor]) -> Any:
    """A few numbers: compiled as they are."""
    grad_mean, grad_var, _, _ = grads
    p, q = ctx.saved_tensors
    grad = stem_statistics_backward(p, q, grad_mean, grad_var, ctx.voxels, ctx.dtype)
    return None, None, None, grad


_stem_statistics.register_autograd(_pull, setup_context=_save)


def stem_statistics(
    image: Tensor, weight: Tensor, window: Window, dtype: torch.dtype, slab_elements: int | None
) -> tuple[Tensor, Tensor]:
    text, numbers = encode(choose(image.device, dtype), window, dtype, slab_elements)
    mean, var, _, _ = torch.ops.effseg.stem_statistics(text, numbers, image, weight)
    return mean, var
