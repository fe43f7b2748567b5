"""Classes on the network's grid to a label file on the scan's own, as nnU-Net writes it."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

SLAB_VOXELS = 1 << 20  # interpolated at a time


def on_file_grid(classes: np.ndarray, plans: Any, labels: Any, properties: dict[str, Any]) -> np.ndarray:
    """Undo nnU-Net's resampling, crop and transposition; background outside of the crop.

    classes: (D, H, W) on the preprocessed grid; plans, labels: nnU-Net's managers; properties: of the case.
    """
    found = resample_classes(classes, properties["shape_after_cropping_and_before_resampling"])
    dtype = np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
    whole = np.zeros(properties["shape_before_cropping"], dtype)
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = found
    return whole.transpose(plans.transpose_backward)


def resample_classes(classes: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Classes (D, H, W) on a grid of another shape over the same volume.

    What is most probable after linear interpolation of every class's mask: of the eight voxels around a
    point, the class with the greatest share of the weights. Time and memory do not depend on the number of
    classes.
    """
    if classes.shape == tuple(shape):
        return classes
    axes = [_neighbours(extent, wanted) for extent, wanted in zip(classes.shape, shape, strict=True)]
    found = np.empty(tuple(shape), classes.dtype)
    planes = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], planes):
        rows = slice(start, start + planes)
        found[rows] = _vote(classes, [[(at[rows], w[rows]) for at, w in axes[0]], *axes[1:]])
    return found


Corner = tuple[np.ndarray, np.ndarray]


def _neighbours(extent: int, wanted: int) -> list[Corner]:
    """For `wanted` voxels along an axis of `extent`: indices and weights of the voxels before and after."""
    centres = np.clip((np.arange(wanted) + 0.5) * extent / wanted - 0.5, 0, extent - 1)
    before = centres.astype(np.intp)
    after = np.minimum(before + 1, extent - 1)
    share = (centres - before).astype(np.float32)
    return [(before, 1 - share), (after, share)]


def _vote(classes: np.ndarray, axes: Sequence[Sequence[Corner]]) -> np.ndarray:
    corners = []
    for (d, wd), (h, wh), (w, ww) in product(*axes):
        weights = wd[:, None, None] * wh[:, None] * ww
        corners.append((classes[np.ix_(d, h, w)], weights))
    best, most = corners[0][0].copy(), np.zeros(corners[0][0].shape, np.float32)
    for candidate, _ in corners:
        votes = np.zeros_like(most)
        for other, weights in corners:
            votes += np.where(other == candidate, weights, 0)
        better = votes > most
        best[better], most[better] = candidate[better], votes[better]
    return best
