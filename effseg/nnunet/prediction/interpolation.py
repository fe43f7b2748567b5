"""nnU-Net's resampling of images, along one axis after the other, in float32."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SLAB_VOXELS = 1 << 22  # interpolated within planes at a time


def resample_image(
    image: np.ndarray, shape: Sequence[int], order: int, separate: int | None = None, separate_order: int = 0
) -> np.ndarray:
    """Splines of `order` through the voxels of (C, D, H, W) float32, on the grid `shape`.

    The values of skimage's `resize` with mode "edge" and without anti-aliasing, clipped to the range of the
    input, which nnU-Net calls for every channel; or, with an axis `separate`, for every slice across it,
    followed by splines of `separate_order` along it. Splines on a grid are the product of splines along its
    axes, each of which is a matrix.
    """
    if image.shape[1:] == tuple(shape):
        return image
    first = separate or 0
    extents = zip(image.shape[1:], shape, strict=True)
    matrices = [
        spline_matrix(extent, wanted, separate_order if axis == separate else order)
        for axis, (extent, wanted) in enumerate(extents)
    ]
    matrices.insert(0, matrices.pop(first))
    found = np.empty((len(image), *shape), np.float32)
    for channel, target in zip(image, found, strict=True):
        volume, wanted = (torch.from_numpy(array).movedim(first, 0) for array in (channel, target))
        _resample(volume, wanted, matrices, separate is not None)
    return found


def spline_matrix(extent: int, wanted: int, order: int) -> Tensor | None:
    """(wanted, extent) float32: what interpolation along an axis makes of unit vectors; None: nothing."""
    if extent == wanted:
        return None
    columns = ndimage.zoom(np.eye(extent), (wanted / extent, 1), order=order, mode="nearest", grid_mode=True)
    return torch.from_numpy(columns.astype(np.float32))


def _resample(volume: Tensor, target: Tensor, matrices: Sequence[Tensor | None], clip_planes: bool) -> None:
    """Fills `target`; clipped to the range of each plane before the first axis, or to the volume's after."""
    along, rows, columns = matrices
    planes = torch.empty(len(volume), *target.shape[1:])
    step = max(1, SLAB_VOXELS // volume[0].numel())
    for start in range(0, len(volume), step):
        part = volume[start : start + step]
        found = part if columns is None else part @ columns.T
        found = found if rows is None else rows @ found
        if clip_planes:
            found = found.clamp(part.amin((1, 2), keepdim=True), part.amax((1, 2), keepdim=True))
        planes[start : start + step] = found
    if along is None:
        target.copy_(planes)
    else:
        for row in range(planes.shape[1]):
            target[:, row] = along @ planes[:, row]
    if not clip_planes:
        target.clamp_(*volume.aminmax())
