"""Where the body lies in a CT volume."""

import numpy as np
from scipy import ndimage

Box = tuple[slice, slice, slice]

_VOXELS_AT_A_TIME = 1 << 24


def body_box(volume: np.ndarray, threshold: float) -> Box | None:
    """The bounding box of the largest connected component of `volume` > `threshold`.

    volume: (X, Y, Z), any real dtype and memory order. Voxels are connected across faces. Exact: no
    subsampling, so that the box is never cut and a table that does not touch the body stays outside. Of
    components of one size, the one whose box begins first counts. None where no voxel is above.
    Takes about 15 ns and 5 bytes a voxel.
    """
    # Labelling in memory order is up to six times as fast as across it.
    order = sorted(range(3), key=lambda axis: (-abs(volume.strides[axis]), axis))
    labels, count = ndimage.label(volume.transpose(order) > threshold)
    if count == 0:
        return None
    sizes = np.zeros(count + 1, np.int64)
    flat = labels.reshape(-1)
    for start in range(0, flat.size, _VOXELS_AT_A_TIME):  # bincount makes an int64 copy of what it counts
        sizes += np.bincount(flat[start : start + _VOXELS_AT_A_TIME], minlength=count + 1)
    sizes[0] = 0
    boxes = ndimage.find_objects(labels)
    largest = np.flatnonzero(sizes == sizes.max())
    candidates = [tuple(boxes[label - 1][order.index(axis)] for axis in range(3)) for label in largest]
    x, y, z = min(candidates, key=lambda box: [side.start for side in box])
    return x, y, z


def grow(box: Box, margin: float, spacing: tuple[float, float, float], shape: tuple[int, ...]) -> Box:
    """`box` with at least `margin` mm more on every side, as far as the volume goes."""
    x, y, z = (
        slice(max(0, side.start - extra), min(extent, side.stop + extra))
        for side, extent, extra in (
            (side, extent, int(np.ceil(margin / step)))
            for side, extent, step in zip(box, shape, spacing, strict=True)
        )
    )
    return x, y, z
