"""Planes of logits to labels on another grid, against scipy on whole volumes. Needs no nnU-Net."""

from itertools import product

import pytest
import torch
from scipy import ndimage

from effseg.nnunet.prediction.planes import (
    AlongFirstAxis,
    Axis,
    InPlane,
    most_probable,
    probabilities,
    regions,
)

SHAPE = (6, 7, 5)
LOGITS = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def resampled(logits, axes):
    """(K, D, H, W) on the axes' grid, by way of planes."""
    along, in_plane = AlongFirstAxis(axes[0]), InPlane(axes[1:])
    found = {}
    for index in range(axes[0].extent):
        if index in along.used:
            for target, plane in along.push(index, logits[:, index]):
                found[target] = torch.stack([in_plane(one) for one in plane])
    assert list(found) == list(range(axes[0].wanted))
    return torch.stack(list(found.values()), 1)


def expected(logits, axes):
    """By scipy, in float64, one axis after the other."""
    found = logits.double().numpy()
    for dim, axis in enumerate(axes, start=1):
        zoom = [1.0] * 4
        zoom[dim] = axis.wanted / axis.extent
        found = ndimage.zoom(found, zoom, order=int(axis.linear), mode="nearest", grid_mode=True)
    return torch.from_numpy(found)


@pytest.mark.parametrize("wanted", list(product((3, 6, 13), (4, 7, 12), (5, 9))))
def test_linear(wanted):
    axes = [Axis(*sizes) for sizes in zip(SHAPE, wanted, strict=True)]
    # Three interpolations, whose weights have the error of a float32 coordinate of a few voxels.
    torch.testing.assert_close(resampled(LOGITS, axes).double(), expected(LOGITS, axes), rtol=0, atol=2e-5)


@pytest.mark.parametrize("nearest", [0, 1, 2])
@pytest.mark.parametrize("wanted", [(9, 9, 9), (3, 4, 2), (6, 7, 11)])
def test_nearest_along_one_axis(nearest, wanted):
    axes = [Axis(*sizes, dim != nearest) for dim, sizes in enumerate(zip(SHAPE, wanted, strict=True))]
    torch.testing.assert_close(resampled(LOGITS, axes).double(), expected(LOGITS, axes), rtol=0, atol=2e-5)


def test_a_single_plane():
    axes = [Axis(1, 3), Axis(7, 7), Axis(5, 5)]
    torch.testing.assert_close(resampled(LOGITS[:, :1], axes), LOGITS[:, :1].expand(4, 3, 7, 5))


def test_most_probable_is_the_first_of_equals():
    plane = torch.tensor([[1.0, 2.0, 0.0], [1.0, 3.0, -1.0], [0.0, 3.0, 0.0]])[:, None]
    found = most_probable(plane, InPlane([Axis(1, 1), Axis(3, 3)]))
    assert found.tolist() == [[0, 1, 0]]


def test_most_probable_leaves_the_logits():
    plane = LOGITS[:, 0].clone()
    found = most_probable(plane, InPlane([Axis(7, 7), Axis(5, 5)]))
    assert torch.equal(found, LOGITS[:, 0].argmax(0).to(torch.int16))
    assert torch.equal(plane, LOGITS[:, 0])


def test_later_regions_lie_over_earlier_ones():
    plane = torch.tensor([[1.0, 1.0, -1.0, 1e-9], [1.0, -1.0, 1.0, -1.0]])[:, None]
    found = regions(plane, InPlane([Axis(1, 1), Axis(4, 4)]), [2, 1])
    assert found.tolist() == [[1, 2, 1, 0]]  # the sigmoid of 1e-9 is 0.5 in float32


def test_probabilities():
    grid = InPlane([Axis(7, 7), Axis(5, 5)])
    torch.testing.assert_close(probabilities(LOGITS[:, 0], grid, False), LOGITS[:, 0].softmax(0))
    torch.testing.assert_close(probabilities(LOGITS[:, 0], grid, True), LOGITS[:, 0].sigmoid())
