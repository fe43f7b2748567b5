"""Logits of finished planes to labels on another grid, a plane at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Plane = tuple[int, Tensor]


@dataclass(frozen=True)
class Axis:
    """A grid of `wanted` voxels over the extent of one of `extent`: interpolated linearly, else nearest."""

    extent: int
    wanted: int
    linear: bool = True

    def taps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each wanted voxel the voxels before and after it, and the share of the one after."""
        centres = (np.arange(self.wanted) + 0.5) * (self.extent / self.wanted) - 0.5
        last = self.extent - 1
        if not self.linear:
            nearest = np.clip(np.floor(centres + 0.5), 0, last).astype(np.int64)
            return nearest, nearest, np.zeros(self.wanted)
        centres = np.clip(centres, 0, last)
        before = np.floor(centres).astype(np.int64)
        return before, np.minimum(before + 1, last), centres - before


class AlongFirstAxis:
    """Planes of a grid along D out of planes of another, handed over in order."""

    def __init__(self, axis: Axis) -> None:
        self.before, self.after, self.share = axis.taps()
        self.used = set(self.before) | set(self.after[self.share > 0])
        self.next = 0
        self.last: Plane | None = None

    def push(self, index: int, plane: Tensor) -> Iterator[Plane]:
        """Hand over plane `index` (K, h, w) of those in `used`; yields what can be made now."""
        while self.next < len(self.before):
            before, after, share = self.before[self.next], self.after[self.next], self.share[self.next]
            if (after if share else before) > index:
                break
            yield self.next, self._between(int(before), index, plane, float(share))
            self.next += 1
        self.last = index, plane

    def _between(self, before: int, index: int, plane: Tensor, share: float) -> Tensor:
        if before == index:
            return plane
        assert self.last is not None
        assert self.last[0] == before
        return torch.lerp(self.last[1], plane, share) if share else self.last[1]


class InPlane:
    """One class of a plane (h, w) on a grid (H, W)."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.sizes = [axis.wanted for axis in axes]
        self.nearest = {
            dim: torch.from_numpy(axis.taps()[0]) for dim, axis in enumerate(axes) if not axis.linear
        }

    def __call__(self, plane: Tensor) -> Tensor:
        for dim, taken in self.nearest.items():
            plane = plane.index_select(dim, taken.to(plane.device))
        if list(plane.shape) == self.sizes:
            return plane
        return F.interpolate(plane[None, None], self.sizes, mode="bilinear")[0, 0]


def most_probable(plane: Tensor, resample: InPlane) -> Tensor:
    """(K, h, w) -> (H, W) int16: the class of the greatest logit, the first one of several.

    Goes through the classes one by one: their logits on the finer grid are never held together.
    """
    best = resample(plane[0])
    found = torch.zeros(best.shape, dtype=torch.int16, device=plane.device)
    best = best.clone()
    for index in range(1, len(plane)):
        logits = resample(plane[index])
        found.masked_fill_(logits > best, index)
        torch.maximum(best, logits, out=best)
    return found


def regions(plane: Tensor, resample: InPlane, order: Sequence[int]) -> Tensor:
    """(K, h, w) -> (H, W) int16: the label of each region that is more probable than not, later ones over
    earlier ones, 0 elsewhere. order: the regions' labels."""
    found = torch.zeros(resample.sizes, dtype=torch.int16, device=plane.device)
    for logits, label in zip(plane, order, strict=True):
        found.masked_fill_(resample(logits).sigmoid() > 0.5, label)
    return found


def probabilities(plane: Tensor, resample: InPlane, regional: bool) -> Tensor:
    """(K, h, w) -> (K, H, W) float32."""
    logits = torch.stack([resample(one) for one in plane])
    return logits.sigmoid() if regional else logits.softmax(0)
