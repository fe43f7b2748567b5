"""Mean and variance per sample and channel, merged over slabs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm
from effseg.common.formats import accumulation_dtype
from effseg.parallel.partition import Split, current
from effseg.parallel.reduction import gathered

# Slabs whose moments are kept until they are merged in one go: a few short operators, and little memory.
MERGED_AT_ONCE = 16


class _Moments(NamedTuple):
    """Of so many voxels: means and biased variances (P, C) of P equal parts of them."""

    voxels: int
    means: Tensor
    variances: Tensor


class Moments:
    """Moments of the stored (rounded) values of each slab, merged in float64.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, doi
    10.1080/00031305.1983.10483115: mean = sum w_i mean_i, var = sum w_i (var_i + (mean_i - mean)^2) with
    w_i the share of the voxels. Never E[y^2] - E[y]^2.
    """

    def __init__(
        self, ops: Algorithm, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """shape: (N, C); dtype: of the values."""
        self.ops, self.dtype = ops, accumulation_dtype(dtype)
        self.shape, self.device = shape, device
        self.slabs: list[list[_Moments]] = [[] for _ in range(shape[0])]
        self.merged: list[list[_Moments]] = [[] for _ in range(shape[0])]

    def add(self, sample: int, y: Tensor) -> None:
        slabs = self.slabs[sample]
        slabs.append(_Moments(y[0, 0].numel(), *self.ops.partial_moments(y)))
        if len(slabs) == MERGED_AT_ONCE:
            self._merge_slabs(sample)

    def merge(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(mean, biased variance), (N, C) each, in the accumulation type. shape: (N, C, D, H, W) of all that
        was added, in all processes that share the volume."""
        own = self._own()
        split = current()
        if split is not None:
            own = _over_processes(split, own, shape)
        return own[0].to(self.dtype), own[1].to(self.dtype)

    def _own(self) -> tuple[Tensor, Tensor]:
        """Of what this process has added; zeros of nothing."""
        for sample, slabs in enumerate(self.slabs):
            if slabs:
                self._merge_slabs(sample)
        if not all(self.merged):
            zeros = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
            return zeros, zeros
        samples = [found[0] if len(found) == 1 else _merge(found) for found in self.merged]
        mean, var = (torch.cat(values) for values in list(zip(*samples, strict=True))[1:])
        return mean, var

    def _merge_slabs(self, sample: int) -> None:
        self.merged[sample].append(_merge(self.slabs[sample]))
        self.slabs[sample] = []


def _over_processes(split: Split, own: tuple[Tensor, Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Merged in the order of processes, so that all have the same bits."""
    parts = gathered(torch.stack(own).double())
    voxels = [
        (hi - lo) * shape[3] * shape[4] for lo, hi in (split.rows(shape[2], r) for r in range(split.size))
    ]
    n, c = parts[0].shape[1:]
    there = [
        _Moments(count, part[0].reshape(1, n * c), part[1].reshape(1, n * c))
        for count, part in zip(voxels, parts, strict=True)
        if count
    ]
    merged = _merge(there)
    return merged.means.view(n, c), merged.variances.view(n, c)


def _merge(found: list[_Moments]) -> _Moments:
    """Those of all voxels in one part, float64; without a number that the host would have to send."""
    total, parts = sum(one.voxels for one in found), found[0].means.shape[0]
    both = torch.stack([t for one in found for t in (one.means, one.variances)]).double()
    means, variances = both[0::2], both[1::2]
    usual = found[0].voxels
    share = torch.full((len(found), 1, 1), usual / total / parts, dtype=both.dtype, device=both.device)
    for i, one in enumerate(found):
        if one.voxels != usual:
            share[i].fill_(one.voxels / total / parts)
    mean = (share * means).sum((0, 1))
    centred = means - mean
    var = (share * variances.addcmul_(centred, centred)).sum((0, 1))
    return _Moments(total, mean[None], var[None])
