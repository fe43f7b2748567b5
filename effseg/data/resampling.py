"""Volumes on another number of voxels, the outer faces of the volume kept in place."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

Shape = tuple[int, int, int]

_BLOCK = 24  # voxels along each axis of the result that are voted on at a time
_NEIGHBOURS = 0.01  # weight of what lies around a voxel's own share, where two classes are even
_EVEN = 2e-6  # shares that differ by less are even: float32 rounds sums of a few hundred weights to 1e-6


def resample_labels(labels: np.ndarray, shape: Shape) -> np.ndarray:
    """(D, H, W) of any integer dtype -> `shape`: each voxel takes the class with the largest share of it.

    The share is the volume of old voxels of that class inside of the new one. Classes with equal shares
    (often so when voxels double in size) are told apart by what lies around, with a triangle filter; where
    that is even, too, voxels take turns, so that neither class grows and no border moves to one side. A
    mirrored volume gives the mirrored result; up by a whole factor and down again is exact, as is the same
    shape.
    Takes a few MB beside the result and about 20 ns a voxel, however many classes there are.
    """
    if labels.shape == shape:
        return np.ascontiguousarray(labels)
    overlaps = [_Overlaps(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    # Counted from the nearer end, so that a mirrored volume gives the mirrored result.
    turns = [np.minimum(np.arange(extent), np.arange(extent)[::-1]) for extent in shape]
    result = np.empty(shape, labels.dtype)
    for corner in itertools.product(*(range(0, extent, _BLOCK) for extent in shape)):
        target = tuple(
            slice(start, min(start + _BLOCK, extent)) for start, extent in zip(corner, shape, strict=True)
        )
        source, weights = zip(*map(_Overlaps.__call__, overlaps, target), strict=True)
        x, y, z = np.ix_(*(steps[side] for steps, side in zip(turns, target, strict=True)))
        result[target] = _vote(labels[source], weights, (x + y + z) % 2 == 1)
    return result


def resample_linear(image: np.ndarray, shape: Shape) -> np.ndarray:
    """(C, D, H, W) -> (C, *shape): linear interpolation, a triangle filter where an axis gets coarser.

    int16 is rounded back to int16. The axes are done one pair after another, since torch filters in two
    dimensions only.
    """
    channels, depth = image.shape[:2]
    resampled = np.empty((channels, *shape), image.dtype)
    for channel in range(channels):
        planes = torch.from_numpy(image[channel]).to(torch.float32)
        planes = _filtered(planes, shape[1:])
        rows = _filtered(planes.reshape(1, depth, -1), (shape[0], shape[1] * shape[2]))
        volume = rows.reshape(shape).numpy()
        resampled[channel] = np.rint(volume) if image.dtype == np.int16 else volume
    return resampled


def _filtered(planes: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(N, H, W) -> (N, *size)."""
    return interpolate(planes[None], size=size, mode="bilinear", antialias=True)[0]


class _Overlaps:
    """The shares that `old` voxels along an axis have in each of `new` ones."""

    def __init__(self, old: int, new: int) -> None:
        self.old, self.new = old, new

    def __call__(self, side: slice) -> tuple[slice, np.ndarray]:
        """For new voxels of `side`: the old ones that matter, and their weights (new, old), sums 1."""
        factor = self.old / self.new
        if factor == 1:
            return side, np.eye(side.stop - side.start, dtype=np.float32)
        reach = max(factor, 1.0)  # of the triangle filter: as far as that of the image's resampling
        centres = (np.arange(side.start, side.stop) + 0.5) * factor
        first = max(0, int(np.floor(centres[0] - reach)))
        last = min(self.old, int(np.ceil(centres[-1] + reach)))
        cells = np.arange(first, last)
        overlap = np.minimum(centres[:, None] + factor / 2, cells + 1)
        overlap -= np.maximum(centres[:, None] - factor / 2, cells)
        around = 1 - np.abs(cells + 0.5 - centres[:, None]) / reach
        shares = [part.clip(0) / part.clip(0).sum(1, keepdims=True) for part in (overlap, around)]
        weights = (1 - _NEIGHBOURS) * shares[0] + _NEIGHBOURS * shares[1]
        return slice(first, last), weights.astype(np.float32)


def _vote(labels: np.ndarray, weights: Sequence[np.ndarray], turn: np.ndarray) -> np.ndarray | np.generic:
    """The classes with the largest shares in a block; of even ones the highest where it is its `turn`."""
    classes = np.unique(labels)
    if len(classes) == 1:
        return classes[0]
    x, y, z = weights
    shares = np.empty((len(classes), len(x), len(y), len(z)), np.float32)
    for index, number in enumerate(classes[1:], start=1):
        mask = (labels == number).astype(np.float32)
        rows = (x @ mask.reshape(len(mask), -1)).reshape(len(x), *mask.shape[1:])
        shares[index] = (y @ rows) @ z.T
    shares[0] = 1 - shares[1:].sum(0)
    even = shares >= shares.max(0) - _EVEN
    lowest, highest = even.argmax(0), len(classes) - 1 - even[::-1].argmax(0)
    return classes[np.where(turn, highest, lowest)]
