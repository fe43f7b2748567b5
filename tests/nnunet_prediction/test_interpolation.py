"""Resampling of images axis by axis against scipy's on whole volumes. Needs no nnU-Net."""

import numpy as np
import pytest
from scipy import ndimage

from effseg.nnunet.prediction.interpolation import resample_image

IMAGE = np.random.default_rng(0).normal(size=(2, 9, 12, 10)).astype(np.float32)


def zoomed(array, shape, order):
    """skimage's resize: scipy's zoom, clipped."""
    factors = [wanted / extent for extent, wanted in zip(array.shape, shape, strict=True)]
    found = ndimage.zoom(array.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return found.clip(array.min(), array.max())


@pytest.mark.parametrize("shape", [(5, 7, 6), (14, 20, 13), (9, 20, 6), (1, 1, 1), (9, 12, 5)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_whole_volumes(shape, order):
    expected = np.stack([zoomed(channel, shape, order) for channel in IMAGE])
    np.testing.assert_allclose(resample_image(IMAGE, shape, order), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 7, 6), (14, 20, 13), (9, 20, 6)])
def test_slices_and_then_the_axis_across(axis, shape):
    slices_shape = [extent for dim, extent in enumerate(shape) if dim != axis]
    for order_across in (0, 1):
        expected = []
        for channel in IMAGE:
            slices = [zoomed(plane, slices_shape, 3) for plane in np.moveaxis(channel, axis, 0)]
            expected.append(zoomed(np.stack(slices, axis), shape, order_across))
        found = resample_image(IMAGE, shape, 3, axis, order_across)
        np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-5)


def test_the_same_grid():
    assert resample_image(IMAGE, IMAGE.shape[1:], 3) is IMAGE
