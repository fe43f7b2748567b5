"""Volumes on another number of voxels, the outer faces of the volume kept in place."""

import numpy as np
import torch
from torch.nn.functional import interpolate


def nearest_indices(extent: int, wanted: int) -> np.ndarray:
    """For each of `wanted` voxels that share an axis of `extent` voxels, the one its centre lies in."""
    return np.minimum((np.arange(wanted) + 0.5) * extent / wanted, extent - 1).astype(np.intp)


def resample_linear(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
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
