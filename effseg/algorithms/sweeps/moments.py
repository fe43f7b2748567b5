"""Mean and variance per sample and channel, merged over slabs."""

from __future__ import annotations

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm


class Moments:
    """Moments of the stored (rounded) values of each slab, merged in float64.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, doi
    10.1080/00031305.1983.10483115: mean = sum w_i mean_i, var = sum w_i (var_i + (mean_i - mean)^2) with
    w_i the share of the voxels. Never E[y^2] - E[y]^2.
    """

    def __init__(self, ops: Algorithm, samples: int) -> None:
        self.ops = ops
        self.parts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(samples)]

    def add(self, sample: int, y: Tensor) -> None:
        self.parts[sample].append((y[0, 0].numel(), *self.ops.mean_var(y)))

    def merge(self) -> tuple[Tensor, Tensor]:
        """(mean, biased variance), (N, C) each, in the accumulation type."""
        merged = [self._merge(parts) for parts in self.parts]
        mean, var = (torch.stack(values) for values in zip(*merged, strict=True))
        dtype = self.parts[0][0][1].dtype
        return mean.to(dtype), var.to(dtype)

    @staticmethod
    def _merge(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        voxels = torch.tensor([p[0] for p in parts], dtype=torch.float64)
        means = torch.stack([p[1] for p in parts]).double()
        variances = torch.stack([p[2] for p in parts]).double()
        share = (voxels / voxels.sum()).to(means.device)[:, None]
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)
