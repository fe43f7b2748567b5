"""Volumes on another number of voxels, the outer faces of the volume kept in place."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from effseg.data.label_centres import CONTESTED, Undecided, keep_centres

Shape = tuple[int, int, int]

_BLOCK = 24  # voxels along each axis of the result that are voted on at a time
_NEIGHBOURS = 0.01  # weight of what lies around a voxel's own share, where two classes are even
_EVEN = 2e-6  # shares that differ by less are even: float32 rounds sums of a few hundred weights to 1e-6


def resample_labels(labels: np.ndarray, shape: Shape) -> np.ndarray:
    """(D, H, W) of any integer dtype -> `shape`: each voxel takes the class with the largest share of it.

    The share is the volume of old voxels of that class inside of the new one. Classes with equal shares
    (often so when voxels double in size) are told apart by what lies around, with a triangle filter; where
    that is even, too, voxels take turns, so that neither class grows and no border moves to one side. Then
    every class above 0 gets its centre of mass back, see `keep_centres`. Up by a whole factor and down again
    is exact, as is the same shape.
    Takes about 30 ns a voxel, however many classes there are, and 20 bytes for each that is nearly even.
    """
    if labels.shape == shape:
        return np.ascontiguousarray(labels)
    overlaps = [_Overlaps(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    # Counted from the nearer end, so that a mirrored volume gives the mirrored result.
    turns = [np.minimum(np.arange(extent), np.arange(extent)[::-1]) for extent in shape]
    result = np.empty(shape, labels.dtype)
    undecided: list[Undecided] = []
    for corner in itertools.product(*(range(0, extent, _BLOCK) for extent in shape)):
        target = tuple(
            slice(start, min(start + _BLOCK, extent)) for start, extent in zip(corner, shape, strict=True)
        )
        source, weights = zip(*map(_Overlaps.__call__, overlaps, target), strict=True)
        classes = np.unique(labels[source])
        if len(classes) == 1:
            result[target] = classes[0]
            continue
        x, y, z = np.ix_(*(steps[side] for steps, side in zip(turns, target, strict=True)))
        shares = _shares(labels[source], classes, weights)
        first, second, margin = _two_largest(shares, (x + y + z) % 2 == 1)
        result[target] = classes[first]
        voxels = np.argwhere(margin < CONTESTED)
        where = tuple(voxels.T)
        undecided.append(
            Undecided(
                (voxels + corner).astype(np.int32),
                classes[first[where]],
                classes[second[where]],
                margin[where],
            )
        )
    if undecided:
        fields = ("voxels", "taken", "other", "margin")
        every = Undecided(*(np.concatenate([getattr(part, name) for part in undecided]) for name in fields))
        keep_centres(result, every, labels)
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


def _shares(labels: np.ndarray, classes: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """The shares of K `classes` in the voxels of a block: (K, D, H, W)."""
    x, y, z = weights
    shares = np.empty((len(classes), len(x), len(y), len(z)), np.float32)
    for index, number in enumerate(classes[1:], start=1):
        mask = (labels == number).astype(np.float32)
        rows = (x @ mask.reshape(len(mask), -1)).reshape(len(x), *mask.shape[1:])
        shares[index] = (y @ rows) @ z.T
    shares[0] = 1 - shares[1:].sum(0)
    return shares


def _two_largest(shares: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the largest and the second share, and their difference; of even ones `turn` has the last."""
    even = shares >= shares.max(0) - _EVEN
    first = np.where(turn, len(shares) - 1 - even[::-1].argmax(0), even.argmax(0))
    largest = np.take_along_axis(shares, first[None], 0)[0]
    np.put_along_axis(shares, first[None], -1, 0)
    second = shares.argmax(0)
    return first, second, np.maximum(largest - np.take_along_axis(shares, second[None], 0)[0], 0)
