"""The segmentation head: logits of a few rows at a time, never of the volume.

logits = W a + b per voxel (or a itself where there is no W), p = softmax(logits). Rows are worked on as a
matrix of (classes, voxels), so that softmax and sums run along contiguous voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Features, Sums, VoxelSums
from effseg.common.device import kind_of
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype

# The loss holds about this many arrays of (classes, voxels) at a time; together they have so many elements.
ARRAYS = 4
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


class _Labels(NamedTuple):
    target: Tensor  # (1, voxels) int64, some class where not valid
    valid: Tensor  # (1, voxels) bool: a class that is not ignored
    known: Tensor  # (1, voxels) bool: valid or ignored


class _LossGradients(NamedTuple):
    """Those of `Sums` in the accumulation type: intersection and probability (N, K), nll (N,); smooth:
    g_smooth w_k, (N, K), and its sum over k, (N,)."""

    intersection: Tensor
    probability: Tensor
    nll: Tensor
    smooth: Tensor
    all_smooth: Tensor


class Head:
    """See `effseg.algorithms.interface.Head`."""

    shows_probabilities = True

    def __init__(
        self,
        features: Features,
        weight: Tensor | None,
        bias: Tensor | None,
        device: torch.device,
        class_weights: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        dtype = accumulation_dtype(features.dtype)
        self.classes = features.shape[1] if weight is None else weight.shape[0]
        self.weight = None if weight is None else weight.flatten(1).to(features.dtype)
        self.bias = None if bias is None else bias.to(features.dtype)[:, None]
        self.grad_weight = (
            None if weight is None else torch.zeros(weight.shape[:2], dtype=dtype, device=device)
        )
        self.grad_bias = None if bias is None else torch.zeros(self.classes, dtype=dtype, device=device)
        ones = torch.ones(self.classes, dtype=dtype, device=device)
        self.weighted = class_weights is not None
        self.class_weights = ones if class_weights is None else class_weights.to(dtype)
        self.negative_weights = -self.class_weights[None]
        self._gradients: tuple[Sums, _LossGradients] | None = None
        self.indices = torch.arange(self.classes, device=device)[:, None]
        self.ignore_index = ignore_index

    def add_sums(
        self, sums: Sums, sample: int, a: Tensor, labels: Tensor, also: VoxelSums | None = None
    ) -> None:
        """Add what the slab `a` with its labels (d, h, w) contributes to a sample's sums; `also` is shown
        the voxels' probabilities, (K, voxels) and 0 where ignored, and one-hot labels, bool, part by part."""
        for part in self._chunks(a):
            log_p = self._logits(a[:, :, part]).log_softmax(0)
            target, valid, known = self._labels(labels[part])
            picked = log_p.gather(0, target).mul_(valid)
            if self.weighted:
                picked.mul_(self.class_weights[target])
            smooth = (self.negative_weights @ log_p).mul_(valid)
            p = log_p.exp_().mul_(valid)
            probability = p.sum(1)
            one_hot = (target == self.indices) & valid
            if also is not None:
                also(part, p, one_hot)
            found = (
                p.mul_(one_hot).sum(1), probability, one_hot.sum(1),
                -picked.sum(dtype=torch.float64), smooth.sum(dtype=torch.float64), (~known).sum(),
            )  # fmt: skip
            # One operator makes float64 of all, and one adds them.
            added = torch.cat([t.view(-1) for t in found]).split([t.numel() for t in found])
            torch._foreach_add_([s[sample].view(-1) for s in sums], added)

    def pull(self, grads: Sums, sample: int, a: Tensor, labels: Tensor, parameters: bool = True) -> Tensor:
        """The gradient of the slab from those of the sums; adds the parameters' where asked to."""
        grad = torch.empty_like(a, memory_format=CHANNELS_LAST)
        for part in self._chunks(a):
            grad[:, :, part] = self._pull(
                self._loss_gradients(grads), sample, a[:, :, part], labels[part], parameters
            )
        return grad

    def segment(self, a: Tensor) -> Tensor:
        """argmax over classes, (d, h, w) int64."""
        parts = [self._logits(a[:, :, part]).argmax(0).view(-1, *a.shape[3:]) for part in self._chunks(a)]
        return torch.cat(parts)

    def show(self, a: Tensor, out: Tensor) -> None:
        for part in self._chunks(a):
            p = self._logits(a[:, :, part]).softmax(0)
            out[:, part] = p.view(self.classes, -1, *a.shape[3:]).to(out.dtype)

    def _pull(
        self, grads: _LossGradients, sample: int, a: Tensor, labels: Tensor, parameters: bool
    ) -> Tensor:
        """With u_k = dL/dp_k = g_probability_k + g_intersection_k [label = k], c = g_nll w_label and
        s = g_smooth: dL/dlogit_k = p_k (u_k - sum_j p_j u_j + c + s sum_j w_j) - c [label = k] - s w_k."""
        p = self._logits(a).softmax(0)
        target, valid, _ = self._labels(labels)
        g_inter, g_prob, c, smooth, all_smooth = (g[sample] for g in grads)
        if self.weighted:
            c = self.class_weights[target] * c
        picked = p.gather(0, target).mul_(g_inter[target])
        constant = (c + all_smooth - picked).sub_(g_prob[None] @ p)
        g = p.mul_(constant + g_prob[:, None])
        g.scatter_(0, target, g.gather(0, target).add_(picked).sub_(c))
        g.sub_(smooth[:, None]).mul_(valid)
        if parameters and self.grad_bias is not None:
            self.grad_bias += g.sum(1)
        g = g.to(a.dtype)
        if self.weight is not None:
            if parameters and self.grad_weight is not None:
                self.grad_weight += g @ matrix(a).t()
            g = self.weight.t() @ g
        _, _, d, h, w = a.shape
        return g.t().view(1, d, h, w, -1).permute(0, 4, 1, 2, 3)

    def _loss_gradients(self, grads: Sums) -> _LossGradients:
        """Made once for all slabs of a sweep."""
        if self._gradients is None or self._gradients[0] is not grads:
            dtype = self.class_weights.dtype
            intersection, probability, nll, smooth = (
                g.to(dtype) for g in (grads.intersection, grads.probability, grads.nll, grads.smooth_nll)
            )
            by_class = smooth[:, None] * self.class_weights
            made = _LossGradients(intersection, probability, nll, by_class, by_class.sum(1))
            self._gradients = grads, made
        return self._gradients[1]

    def _logits(self, a: Tensor) -> Tensor:
        """(K, voxels) in the accumulation type; the product runs in the type of a."""
        x = matrix(a)
        if self.weight is not None:
            x = self.weight @ x if self.bias is None else torch.addmm(self.bias, self.weight, x)
        return x.to(accumulation_dtype(a.dtype))

    def _labels(self, labels: Tensor) -> _Labels:
        label = labels.reshape(1, -1).long()
        target = label.clamp(0, self.classes - 1)
        known = target == label
        if self.ignore_index is None:
            return _Labels(target, known, known)
        ignored = label == self.ignore_index
        return _Labels(target, known & ~ignored, known | ignored)

    def _chunks(self, a: Tensor) -> Iterator[slice]:
        """Rows whose logits stay small, in the slab."""
        _, _, d, h, w = a.shape
        elements = CHUNK_ELEMENTS[kind_of(a.device)]
        step = max(1, elements // (ARRAYS * self.classes * h * w))
        return (slice(lo, min(lo + step, d)) for lo in range(0, d, step))


def matrix(a: Tensor) -> Tensor:
    """(1, C, d, h, w) as (C, voxels): a transposed view of channels-last memory."""
    return a.permute(0, 2, 3, 4, 1).reshape(-1, a.shape[1]).t()
