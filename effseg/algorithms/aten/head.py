"""The segmentation head: logits of one slab at a time, never of the volume.

logits = W a + b per voxel (or a itself where there is no W), p = softmax(logits). A slab is worked on as a
matrix of (classes, voxels), so that softmax and sums run along contiguous voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.aten import ops
from effseg.algorithms.aten.pullback import Pullback, rows
from effseg.deferred import Spec
from effseg.slabs import rows_per_slab, slabs

# The loss holds about this many arrays of (classes, voxels) at a time, and has no halo: its slabs are thin.
ARRAYS = 4
SLAB_FRACTION = 1 / 128


class Sums(NamedTuple):
    """What Dice and cross-entropy need of a batch, float64, over the voxels that are not ignored.

    intersection, probability, voxels: (N, K), the sums of p [label = k], p, and [label = k];
    nll: (N,), the sum of w_label (-log p_label); smooth_nll: (N,), the sum over k of w_k (-log p_k);
    unknown: (N,), voxels whose label is neither a class nor ignored.
    """

    intersection: Tensor
    probability: Tensor
    voxels: Tensor
    nll: Tensor
    smooth_nll: Tensor
    unknown: Tensor


def thickness(spec: Spec, classes: int, slab_elements: int | None) -> int:
    _, c, d, h, w = spec.shape
    return rows_per_slab(d, max(c, ARRAYS * classes) * h * w, slab_elements, SLAB_FRACTION, min_rows=1)


def _matrix(a: Tensor) -> Tensor:
    """(1, C, d, h, w) as (C, voxels): a transposed view of channels-last memory."""
    return a.permute(0, 2, 3, 4, 1).reshape(-1, a.shape[1]).t()


def _volume(m: Tensor, like: Tensor) -> Tensor:
    """(voxels, C) as (1, C, d, h, w) in channels-last memory."""
    _, _, d, h, w = like.shape
    return m.view(1, d, h, w, m.shape[1]).permute(0, 4, 1, 2, 3)


def _logits(a: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(K, voxels) in the accumulation type; the product runs in the type of a."""
    x = _matrix(a)
    if weight is not None:
        w = weight.flatten(1).to(x.dtype)
        x = w @ x if bias is None else torch.addmm(bias.to(x.dtype)[:, None], w, x)
    return x.to(ops.accumulation_dtype(a.dtype))


class _Labels(NamedTuple):
    target: Tensor  # (1, voxels) int64, 0 where ignored
    valid: Tensor  # (1, voxels) bool
    unknown: Tensor  # number of voxels that are neither


def _labels(labels: Tensor, classes: int, ignore_index: int | None) -> _Labels:
    target = labels.reshape(1, -1).long()
    known = (target >= 0) & (target < classes)
    ignored = torch.zeros_like(known) if ignore_index is None else target == ignore_index
    valid = known & ~ignored
    return _Labels(target.masked_fill(~valid, 0), valid, (~(known | ignored)).sum())


def head_sums_forward(
    spec: Spec,
    tensors: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int | None,
    slab_elements: int | None,
) -> Sums:
    n, k, device = spec.shape[0], spec.shape[1] if weight is None else weight.shape[0], tensors[0].device
    zeros = lambda *shape: torch.zeros(n, *shape, dtype=torch.float64, device=device)  # noqa: E731
    sums = Sums(zeros(k), zeros(k), zeros(k), zeros(), zeros(), zeros())
    w = _weights(class_weights, k, spec, device)
    classes = torch.arange(k, device=device)[:, None]
    for sample, lo, hi in slabs(n, spec.shape[2], thickness(spec, k, slab_elements)):
        logits = _logits(rows(spec, tensors, sample, lo, hi), weight, bias)
        target, valid, unknown = _labels(labels[sample, lo:hi], k, ignore_index)
        sums.unknown[sample] += unknown
        log_p = logits.log_softmax(0)
        del logits
        nll = log_p.gather(0, target).neg_().mul_(w[target]).mul_(valid)
        sums.nll[sample] += nll.sum(dtype=torch.float64)
        sums.smooth_nll[sample] -= (w[None] @ log_p).mul_(valid).sum(dtype=torch.float64)
        p = log_p.exp_().mul_(valid)
        sums.probability[sample] += p.sum(1)
        one_hot = (target == classes) & valid
        sums.voxels[sample] += one_hot.sum(1)
        sums.intersection[sample] += p.mul_(one_hot).sum(1)
        del p, log_p, one_hot
    return sums


def _weights(class_weights: Tensor | None, classes: int, spec: Spec, device: torch.device) -> Tensor:
    dtype = ops.accumulation_dtype(spec.dtype)
    return (
        torch.ones(classes, dtype=dtype, device=device) if class_weights is None else class_weights.to(dtype)
    )


def head_sums_backward(
    spec: Spec,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int | None,
    grads: Sums,
    slab_elements: int | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of weight, bias and the expression's tensors from those of the sums.

    With u_k = dL/dp_k = g_probability_k + g_intersection_k [label = k], c = g_nll w_label and
    s = g_smooth: dL/dlogit_k = p_k (u_k - sum_j p_j u_j + c + s sum_j w_j) - c [label = k] - s w_k.
    """
    k, device = spec.shape[1] if weight is None else weight.shape[0], tensors[0].device
    accumulate = ops.accumulation_dtype(spec.dtype)
    w = _weights(class_weights, k, spec, device)
    grad_weight = None if weight is None else torch.zeros(weight.shape[:2], dtype=accumulate, device=device)
    grad_bias = None if bias is None else torch.zeros(k, dtype=accumulate, device=device)
    pullback = Pullback(spec, tensors, needed)
    for sample, lo, hi in slabs(spec.shape[0], spec.shape[2], thickness(spec, k, slab_elements)):
        a = pullback.rows(sample, lo, hi)
        target, valid, _ = _labels(labels[sample, lo:hi], k, ignore_index)
        g_inter, g_prob, g_nll, g_smooth = (
            g[sample].to(accumulate)
            for g in (grads.intersection, grads.probability, grads.nll, grads.smooth_nll)
        )
        p = _logits(a, weight, bias).softmax(0)
        c = w[target] * g_nll
        picked = p.gather(0, target) * g_inter[target]
        constant = (c + g_smooth * w.sum()).sub_(picked).sub_(g_prob[None] @ p)
        g = p.mul_(constant + g_prob[:, None])
        g.scatter_(0, target, g.gather(0, target).add_(picked).sub_(c))
        g.sub_((g_smooth * w)[:, None]).mul_(valid)
        del p, c, picked, constant, target, valid
        if grad_bias is not None:
            grad_bias += g.sum(1)
        g = g.to(spec.dtype)
        if weight is not None and grad_weight is not None:
            grad_weight += g @ _matrix(a).t()
            g = weight.flatten(1).to(spec.dtype).t() @ g
        g = _volume(g.t().contiguous(), a)
        del a
        if pullback.any:
            pullback.pull(g)
        del g
    if weight is not None and grad_weight is not None:
        grad_weight = grad_weight.view_as(weight).to(weight.dtype)
    return (
        grad_weight,
        None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        pullback.gradients(),
    )


def head_segment(
    spec: Spec,
    tensors: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    slab_elements: int | None,
) -> Tensor:
    """argmax over classes, (N, D, H, W) uint8, or int16 for more than 256 classes."""
    n, c, d, h, w = spec.shape
    k = c if weight is None else weight.shape[0]
    out = torch.empty(n, d, h, w, dtype=torch.uint8 if k <= 256 else torch.int16, device=tensors[0].device)
    for sample, lo, hi in slabs(n, d, thickness(spec, k, slab_elements)):
        a = rows(spec, tensors, sample, lo, hi)
        out[sample, lo:hi] = _logits(a, weight, bias).argmax(0).view(hi - lo, h, w)
    return out
