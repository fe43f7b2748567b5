"""The head over an expression, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, Head, Sums
from effseg.algorithms.sweeps.materialise import thickness
from effseg.expressions.layers import Spec, in_compute_type
from effseg.expressions.slabs import slabs
from effseg.operators.pullback import Pullback, rows


def head_sums_forward(
    ops: Algorithm,
    spec: Spec,
    tensors: Sequence[Tensor],
    head: Head,
    labels: Tensor,
    slab_elements: int | None,
) -> Sums:
    """The sums of softmax(head(expression)) against labels (N, D, H, W)."""
    n, d = spec.shape[0], spec.shape[2]
    tensors = in_compute_type(spec, tensors)
    sums = Sums.zeros(n, head.classes, tensors[0].device)
    for sample, lo, hi in slabs(n, d, thickness(spec, slab_elements, labels.device)):
        head.add_sums(sums, sample, rows(ops, spec, tensors, sample, lo, hi), labels[sample, lo:hi])
    return sums


def head_sums_backward(
    ops: Algorithm,
    spec: Spec,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    head: Head,
    labels: Tensor,
    grads: Sums,
    slab_elements: int | None,
) -> list[Tensor | None]:
    """Gradients of the expression's tensors from those of the sums; the head's add up in `head`."""
    pullback = Pullback(ops, spec, tensors, needed)
    for sample, lo, hi in slabs(spec.shape[0], spec.shape[2], thickness(spec, slab_elements, labels.device)):
        a = pullback.rows(sample, lo, hi)
        g = head.pull(grads, sample, a, labels[sample, lo:hi])
        del a
        if pullback.any:
            pullback.pull(g)
        del g
    return pullback.gradients()


def head_gradients(
    head: Head, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The head's gradients in the shapes and types of its parameters."""
    w, b = head.grad_weight, head.grad_bias
    return (
        None if weight is None or w is None else w.view_as(weight).to(weight.dtype),
        None if bias is None or b is None else b.to(bias.dtype),
    )


def label_dtype(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int16


def head_segment(
    ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], head: Head, slab_elements: int | None
) -> Tensor:
    """argmax over classes, (N, D, H, W) uint8, or int16 for more than 256 classes."""
    n, _, d, h, w = spec.shape
    tensors = in_compute_type(spec, tensors)
    out = torch.empty(n, d, h, w, dtype=label_dtype(head.classes), device=tensors[0].device)
    for sample, lo, hi in slabs(n, d, thickness(spec, slab_elements, tensors[0].device)):
        out[sample, lo:hi] = head.segment(rows(ops, spec, tensors, sample, lo, hi))
    return out
