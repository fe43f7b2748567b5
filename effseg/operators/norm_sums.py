"""The normalisation's gradient sums, collected before the loss is known.

With a = act(z) the head's input, r = act'(z), W its weight and g the gradient at the logits, the gradients of
beta and scale are S_h = sum_v r h (W^T g) for h = 1 and h = y - mean. g is linear in the gradients of the
loss's sums (`Sums`), 2K + 2 numbers that are known only after the forward sweep:

    dz_c = sum_j g_probability_j p_j (W_jc - q_c) + g_intersection_j p_j [label = j] (W_jc - q_c)
         + g_nll w_label (q_c - W_label,c) + g_smooth (q_c sum_j w_j - sum_j w_j W_jc)     times r_c

with q = W^T p. So the forward sweep collects products of (p, p [label], [label]) with (r, r (y - mean), r q,
r q (y - mean)): one matrix product of 3K x voxels by voxels x 4C, in place of another sweep of the
convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effseg.algorithms.aten.head import ARRAYS, CHUNK_ELEMENTS, matrix
from effseg.algorithms.interface import Head, Sums, VoxelSums
from effseg.common.device import kind_of


class NormSums:
    """total: (N, 3, K, 4, C) float64."""

    def __init__(self, samples: int, head: Head) -> None:
        assert head.weight is not None
        self.head, self.weight = head, head.weight
        shape = (samples, 3, head.classes, 4, head.weight.shape[1])
        self.total = torch.zeros(shape, dtype=torch.float64, device=head.weight.device)

    @staticmethod
    def pays(weight: Tensor, classes: int) -> bool:
        """Whether 12 K C multiplications a voxel are fewer than the convolution's."""
        return 12 * classes <= weight[0].numel()

    @staticmethod
    def nbytes(weight: Tensor, classes: int, voxels: int) -> int:
        """Of the arrays for a part of a slab of so many voxels, and of two that the head holds meanwhile."""
        part = min(voxels, CHUNK_ELEMENTS[kind_of(weight.device)] // (ARRAYS * classes))
        return 4 * part * ((2 + 3) * classes + 4 * weight.shape[0])

    def slab(self, sample: int, y: Tensor, a: Tensor, mean: Tensor, slope: float) -> VoxelSums:
        """What to show a slab's probabilities and one-hot labels to; y: (1, C, d, h, w), a = act(norm(y))."""

        def add(part: slice, p: Tensor, one_hot: Tensor) -> None:
            k, c, voxels = *self.weight.shape, p.shape[1]
            left, right = p.new_empty(3, k, voxels), p.new_empty(4, c, voxels)
            left[0] = p
            left[2] = one_hot
            torch.mul(p, left[2], out=left[1])
            centred = right[3]
            torch.sub(matrix(y[:, :, part]), mean[:, None], out=centred)
            right[0].copy_(matrix(a[:, :, part] > 0)).mul_(1.0 - slope).add_(slope)
            torch.mul(right[0], centred, out=right[1])
            torch.mul(right[0], self.weight.to(p.dtype).t() @ p, out=right[2])
            centred.mul_(right[2])
            found = left.flatten(0, 1) @ right.flatten(0, 1).t()
            self.total[sample].add_(found.view(self.total.shape[1:]))

        return add


def terms_from_sums(total: Tensor, head: Head, grads: Sums) -> tuple[Tensor, Tensor]:
    """Gradients of scale and beta, (N, C) float64, from what was collected and the gradients of the sums."""
    assert head.weight is not None
    weight, w = head.weight.double(), head.class_weights.double()
    r, rq = total[:, :, :, :2], total[:, :, :, 2:]  # (N, 3, K, [1, y - mean], C)
    steps = weight[:, None] * r - rq
    by_class = (
        torch.einsum("nk,nkhc->nhc", grads.probability.double(), steps[:, 0])
        + torch.einsum("nk,nkhc->nhc", grads.intersection.double(), steps[:, 1])
        - grads.nll.double()[:, None, None] * torch.einsum("k,nkhc->nhc", w, steps[:, 2])
    )
    smooth = w.sum() * rq[:, 2].sum(1) - (w @ weight) * r[:, 2].sum(1)
    found = by_class + grads.smooth_nll.double()[:, None, None] * smooth
    return found[:, 1], found[:, 0]
