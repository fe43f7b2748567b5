"""Random changes of whole volumes on the device that trains, slab by slab.

What is changed, and by how much, is drawn on the host as `effseg.data.augmentation` draws it for the CPU, so
a seed means the same there and here; only noise comes from a generator of the device. The host waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from effseg.data.mirroring import Pairs, exchange
from effseg.data.preprocessing import AIR
from effseg.expressions.slabs import slabs

SLAB_VOXELS = 1 << 21  # sampled at a time: a grid costs 12 bytes a voxel

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Changes:
    """matrix: (4, 4) from voxels of the result to voxels of the source, None to leave the pose; the image
    times `factor`, plus `offset`, plus noise of standard deviation `noise`; mirrored: left to right
    (D), where these pairs of classes change places, None: not."""

    matrix: np.ndarray | None = None
    factor: float = 1.0
    offset: float = 0.0
    noise: float = 0.0
    mirrored: Pairs | None = None


def change(
    image: Tensor, labels: Tensor, changes: Changes, seed: int, fill: Tensor | float = AIR
) -> tuple[Tensor, Tensor]:
    """image (C, D, H, W) float32 and labels (D, H, W), integer: the same tensors, changed in place.

    Nothing else stays: a caching allocator, which has placed them, then gives the step that follows the
    blocks it had. seed: of the noise. fill: what comes in where the pose changes, of all channels or
    (C, 1, 1, 1). While this runs a float32 copy of the labels and a copy of both are live, and grids and
    noise of a slab.
    """
    noise = _noise(image, changes.noise, seed)
    if changes.matrix is None:
        for lo, hi in _rows(image):
            _change_intensities(image[:, lo:hi], changes, noise)
        if changes.mirrored is None:
            return image, labels
        image.copy_(image.flip(1))
        labels.copy_(labels.flip(0))
        _exchange(image, labels, changes)
        return image, labels
    labels.copy_(_move_labels(labels, changes, image))
    _exchange(image, labels, changes)
    image.sub_(fill)  # grid_sample fills with 0
    moved = torch.empty_like(image)
    for lo, hi, grid in _grids(changes.matrix, image):
        slab = grid_sample(image[None], grid, align_corners=False)[0].add_(fill)
        _change_intensities(slab, changes, noise)
        _put(moved, 1, lo, hi, slab, changes.mirrored is not None)
    return image.copy_(moved), labels


def normalised(matrix: np.ndarray, shape: Size, slab: Size, start: int) -> np.ndarray:
    """`matrix` for rows from `start` on of the result, in grid_sample's coordinates (W, H, D in -1..1)."""
    to_source, to_slab = (
        _moving([1 / extent - 1 for extent in size]) @ np.diag([*(2 / extent for extent in size), 1.0])
        for size in (shape, slab)
    )
    theta = to_source @ matrix @ _moving([start, 0, 0]) @ np.linalg.inv(to_slab)
    return theta[[2, 1, 0]][:, [2, 1, 0, 3]]


def _moving(by: Sequence[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = by
    return matrix


def _move_labels(labels: Tensor, changes: Changes, image: Tensor) -> Tensor:
    """Those of the nearest voxels."""
    assert changes.matrix is not None
    source, moved = labels[None, None].to(torch.float32), torch.empty_like(labels)
    for lo, hi, grid in _grids(changes.matrix, image):
        slab = grid_sample(source, grid, mode="nearest", align_corners=False)[0, 0]
        _put(moved, 0, lo, hi, slab, changes.mirrored is not None)
    return moved


def _exchange(image: Tensor, labels: Tensor, changes: Changes) -> None:
    exchange((labels[lo:hi] for lo, hi in _rows(image)), changes.mirrored or ())


def _put(target: Tensor, dim: int, lo: int, hi: int, slab: Tensor, mirrored: bool) -> None:
    """Write rows [lo, hi) of the result, or the rows that mirroring makes of them."""
    if mirrored:
        lo, hi, slab = target.shape[dim] - hi, target.shape[dim] - lo, slab.flip(dim)
    target.narrow(dim, lo, hi - lo).copy_(slab)


def _change_intensities(slab: Tensor, changes: Changes, noise: torch.Generator | None) -> None:
    slab.mul_(changes.factor).add_(changes.offset)
    if noise is not None:
        drawn = torch.randn(slab.shape, generator=noise, dtype=slab.dtype, device=slab.device)
        slab.add_(drawn, alpha=changes.noise)


def _noise(image: Tensor, deviation: float, seed: int) -> torch.Generator | None:
    return torch.Generator(image.device).manual_seed(seed) if deviation else None


def _grids(matrix: np.ndarray, image: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows [lo, hi) of the result, and where in the source their voxels come from: (1, d, H, W, 3)."""
    depth, height, width = image.shape[1:]
    planes = _planes(image)
    shapes = [(min(planes, depth - lo), height, width) for lo in range(0, depth, planes)]
    every = [normalised(matrix, (depth, height, width), s, i * planes) for i, s in enumerate(shapes)]
    thetas = torch.tensor(np.stack(every), dtype=image.dtype).to(image.device)  # one copy for all slabs
    for lo, hi in _rows(image):
        slab = (hi - lo, height, width)
        yield lo, hi, affine_grid(thetas[lo // planes][None], [1, 1, *slab], align_corners=False)


def _rows(image: Tensor) -> Iterator[tuple[int, int]]:
    return ((slab.lo, slab.hi) for slab in slabs(1, image.shape[1], _planes(image)))


def _planes(image: Tensor) -> int:
    return max(1, SLAB_VOXELS // (image.shape[2] * image.shape[3]))
