"""Head, softmax and the sums of the loss in one operator, and the streaming argmax, slab by slab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, Head, Sums
from effseg.algorithms.pullback import Pullback, rows
from effseg.common.formats import label_dtype
from effseg.expressions.base import Deferred, Spec, readable
from effseg.expressions.slabs import slabs
from effseg.losses import unknown_labels
from effseg.operators.materialise import thickness
from effseg.operators.operator import Operator
from effseg.parallel.partition import current, own_shape
from effseg.parallel.reduction import summed

COUNTS = (Sums._fields.index("voxels"), Sums._fields.index("unknown"))
"""Of the sums: they have no gradient."""


class Static(NamedTuple):
    """checks: whether labels that are neither a class nor ignored raise `ValueError`: under torch.compile
    only the operator itself can look."""

    spec: Spec
    slab_elements: int | None
    ignore_index: int | None = None
    checks: bool = False


def head_sums(
    x: Deferred,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> Sums:
    """`Sums` of head(x) against labels (N, D, H, W); differentiable but for the counts.

    Logits, probabilities and one-hot labels of full size never exist.
    """
    tensors = (labels, class_weights, weight, bias, *x.tensors)
    static = Static(x.spec, slab_elements, ignore_index, torch.compiler.is_compiling())
    return Sums(*_head_sums(labels.device, x.dtype, static, tensors))


@torch.no_grad()
def segment(
    x: Deferred, weight: Tensor | None, bias: Tensor | None, slab_elements: int | None = None
) -> Tensor:
    """See `effseg.functional.segment`."""
    return _segment(x.device, x.dtype, Static(x.spec, slab_elements), (weight, bias, *x.tensors))[0]


@torch.no_grad()
def probabilities(
    x: Deferred, weight: Tensor | None, bias: Tensor | None, slab_elements: int | None = None
) -> Tensor:
    """See `effseg.functional.probabilities`."""
    static = Static(x.spec, slab_elements)
    return _probabilities(x.device, x.dtype, static, (weight, bias, *x.tensors))[0]


def _sums_forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[Sums, tuple[Tensor, ...]]:
    labels, class_weights, weight, bias, *inner = tensors
    head = ops.make_head(static.spec, weight, bias, labels.device, class_weights, static.ignore_index)
    sums = head_sums_forward(ops, static.spec, inner, head, labels, static.slab_elements)
    if static.checks:
        unknown_labels(sums.unknown, head.classes)
    return sums, ()


def _sums_backward(
    ops: Algorithm,
    static: Static,
    own: Sequence[Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    labels, class_weights, weight, bias, *inner = tensors
    head = ops.make_head(static.spec, weight, bias, labels.device, class_weights, static.ignore_index)
    found = head_sums_backward(
        ops, static.spec, inner, needed[4:], head, labels, Sums(*grads), static.slab_elements
    )
    return [None, None, *head_gradients(head, weight, bias), *found]


def _segment_forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    weight, bias, *inner = tensors
    head = ops.make_head(static.spec, weight, bias, inner[0].device)
    return (head_segment(ops, static.spec, inner, head, static.slab_elements),), ()


def _probabilities_forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    weight, bias, *inner = tensors
    head = ops.make_head(static.spec, weight, bias, inner[0].device)
    return (head_probabilities(ops, static.spec, inner, head, static.slab_elements),), ()


def _classes(spec: Spec, weight: Tensor | None) -> int:
    return spec.shape[1] if weight is None else weight.shape[0]


def _fake_sums(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> Sums:
    labels, _, weight, *_ = tensors
    return Sums.zeros(static.spec.shape[0], _classes(static.spec, weight), labels.device)


def _fake_segment(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    n, _, *size = static.spec.shape
    dtype = label_dtype(_classes(static.spec, tensors[0]))
    return [tensors[2].new_empty(n, *size, dtype=dtype)]


def _fake_probabilities(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    n, _, *size = static.spec.shape
    shape = (n, _classes(static.spec, tensors[0]), *size)
    return [torch.empty(shape, dtype=torch.float16, device="cpu")]


_head_sums = Operator(
    "head_sums", Static, _sums_forward, _sums_backward, _fake_sums, outputs=len(Sums._fields),
    constants=COUNTS, zeros=True,
)  # fmt: skip
_segment = Operator("segment", Static, _segment_forward, None, _fake_segment)
_probabilities = Operator("probabilities", Static, _probabilities_forward, None, _fake_probabilities)


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
    per_slab = thickness(spec, slab_elements, labels.device)
    stored = readable(spec, tensors, None, per_slab)
    sums = Sums.zeros(n, head.classes, tensors[0].device)
    for sample, lo, hi, here in slabs(n, d, per_slab):
        head.add_sums(sums, sample, rows(ops, spec, stored, sample, lo, hi), labels[sample, here])
    return over_processes(sums)


def over_processes(sums: Sums) -> Sums:
    """Those of all that share the volume."""
    return Sums(*summed(sums))


def each_its_part(grads: Sums) -> Sums:
    """The gradients of the sums, from which each process finds its part of all others; where processes share
    a volume times their number, for the mean that a reducer takes over them (`effseg.losses.GroupSum`)."""
    split = current()
    return grads if split is None else Sums(*(split.size * grad for grad in grads))


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
    per_slab, grads = thickness(spec, slab_elements, labels.device), each_its_part(grads)
    pullback = Pullback(ops, spec, tensors, needed, per_slab)
    for sample, lo, hi, here in slabs(spec.shape[0], spec.shape[2], per_slab):
        a = pullback.rows(sample, lo, hi)
        g = head.pull(grads, sample, a, labels[sample, here])
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


def head_segment(
    ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], head: Head, slab_elements: int | None
) -> Tensor:
    """argmax over classes, (N, D, H, W) uint8, or int16 for more than 256 classes."""
    n, _, d, h, w = own_shape(spec.shape)
    device = tensors[0].device
    per_slab = thickness(spec, slab_elements, device)
    stored = readable(spec, tensors, None, per_slab)
    out = torch.empty(n, d, h, w, dtype=label_dtype(head.classes), device=device)
    for sample, lo, hi, here in slabs(n, spec.shape[2], per_slab):
        out[sample, here] = head.segment(rows(ops, spec, stored, sample, lo, hi))
    return out


def head_probabilities(
    ops: Algorithm, spec: Spec, tensors: Sequence[Tensor], head: Head, slab_elements: int | None
) -> Tensor:
    """softmax over classes, (N, K, D, H, W) float16, on the host."""
    n, _, d, h, w = own_shape(spec.shape)
    per_slab = thickness(spec, slab_elements, tensors[0].device)
    stored = readable(spec, tensors, None, per_slab)
    out = torch.empty(n, head.classes, d, h, w, dtype=torch.float16, device="cpu")
    for sample, lo, hi, here in slabs(n, spec.shape[2], per_slab):
        head.show(rows(ops, spec, stored, sample, lo, hi), out[sample, :, here])
    return out
