"""Probabilities of one or several networks on a scan's own grid, and the most probable class there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effseg.common.formats import label_dtype
from effseg.data.body import Box
from effseg.data.resampling import resample_linear

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Probabilities:
    """values: (K, D, H, W) of a network's own grid, over `box` of the scan; outside all is background."""

    values: np.ndarray
    box: Box


def most_probable(parts: Sequence[Probabilities], shape: Shape) -> np.ndarray:
    """The class with the largest mean probability in every voxel of a scan: (X, Y, Z), uint8 or int16.

    Each part is resampled to its box, linearly or with a triangle filter where the scan is coarser
    (`resample_linear`), as nnU-Net resamples logits; of equal classes the first is taken. Classes are done
    one after the other, those that are nowhere likely left out: 10 bytes a voxel of the scan, and 12 of the
    box, however many there are, and about 30 ns on one core for each.
    """
    count = len(parts[0].values)
    largest = np.full(shape, -1, np.float32)
    classes = np.zeros(shape, np.uint8 if label_dtype(count).itemsize == 1 else np.int16)
    least = 0.99 / count  # the largest mean is at least 1 / count, and so is one of its terms
    for number in range(count):
        if number > 0 and all((part.values[number] < least).all() for part in parts):
            continue
        outside = 1 if number == 0 else 0
        total = np.full(shape, outside * len(parts), np.float32)
        for part in parts:
            total[part.box] += _resampled(part, number) - outside
        better = total > largest
        largest[better] = total[better]
        classes[better] = number
    return classes


def _resampled(part: Probabilities, number: int) -> np.ndarray:
    x, y, z = (side.stop - side.start for side in part.box)
    values = part.values[number].astype(np.float32)
    return values if values.shape == (x, y, z) else resample_linear(values[None], (x, y, z))[0]
