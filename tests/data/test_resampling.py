"""Labels on another grid: shares, ties, centres of mass, and what must not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from effseg.data.label_centres import BAR, FEW
from effseg.data.resampling import resample_labels

FACTORS = [(2, 2, 2), (3, 3, 3), (4, 4, 4), (1.5, 1.5, 1.5), (1, 1, 2), (1.2, 2.4, 3), (0.5, 0.5, 0.5)]
FACTORS += [(2 / 3, 2 / 3, 2 / 3), (1 / 3, 0.5, 1), (0.7, 0.9, 1.3), (0.4, 0.4, 2.5)]


def organs(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """An ellipsoid of three organs that touch in planes."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    radii = rng.uniform(0.3, 0.4, 3) * shape
    inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)) < 1
    labels = inside.astype(np.uint8)
    labels[inside & (axes[0] > centre[0])] = 2
    labels[inside & (axes[0] > centre[0]) & (axes[1] > centre[1])] = 7
    return labels


def coarser(shape: tuple[int, int, int], factors: tuple[float, ...]) -> tuple[int, int, int]:
    x, y, z = (max(1, round(extent / factor)) for extent, factor in zip(shape, factors, strict=True))
    return x, y, z


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_organ_stays_where_it_is(factors: tuple[float, ...], seed: int) -> None:
    labels = organs((40, 36, 32), seed)
    resampled = resample_labels(labels, coarser(labels.shape, factors))
    step = np.array(labels.shape) / resampled.shape
    for organ in (1, 2, 7):
        before = np.array(ndimage.center_of_mass(labels == organ)) + 0.5
        after = (np.array(ndimage.center_of_mass(resampled == organ)) + 0.5) * step
        size = np.count_nonzero(resampled == organ)
        # One voxel of a few dozen moves their centre by more than the tolerance.
        assert (abs(after - before) / np.minimum(1, step)).max() <= (BAR if size > FEW else 0.15)
        assert size * step.prod() == pytest.approx(
            np.count_nonzero(labels == organ), rel=0.1 if size > FEW else 0.3
        )


def test_a_box_stays_where_it_is_on_a_grid_that_is_hardly_another_one() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[3:20, 4:35, 5:33], labels[20:36, 4:35, 5:33] = 1, 2
    resampled = resample_labels(labels, (39, 39, 39))
    for organ in (1, 2):
        before = np.array(ndimage.center_of_mass(labels == organ)) + 0.5
        after = (np.array(ndimage.center_of_mass(resampled == organ)) + 0.5) * 40 / 39
        assert abs(after - before).max() <= BAR


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    factors=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 1000),
)
def test_up_by_whole_factors_repeats_and_down_again_is_exact(
    shape: tuple[int, ...], factors: tuple[int, ...], seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, shape).astype(np.int16)
    x, y, z = (extent * factor for extent, factor in zip(shape, factors, strict=True))
    up = resample_labels(labels, (x, y, z))
    expected = labels
    for axis, factor in enumerate(factors):
        expected = expected.repeat(factor, axis)
    np.testing.assert_array_equal(up, expected)
    np.testing.assert_array_equal(resample_labels(up, labels.shape), labels)
    np.testing.assert_array_equal(resample_labels(labels, labels.shape), labels)


@pytest.mark.parametrize("wanted", [(5, 7, 9), (9, 6, 11), (30, 8, 3)])
def test_the_largest_share_wins(wanted: tuple[int, int, int]) -> None:
    """Against plain loops over the volumes that voxels share, where one class is clearly ahead."""
    labels = np.random.default_rng(0).integers(0, 3, (13, 12, 11)).astype(np.uint8)
    labels[4:9, 3:8, 2:9] = 1
    overlaps = []
    for old, new in zip(labels.shape, wanted, strict=True):
        edges, cells = np.arange(new + 1) * old / new, np.arange(old)
        high, low = np.minimum(edges[1:, None], cells + 1), np.maximum(edges[:-1, None], cells)
        overlaps.append((high - low).clip(0) * new / old)
    shares = np.stack([np.einsum("ia,jb,kc,abc->ijk", *overlaps, labels == organ) for organ in range(3)])
    second, first = np.sort(shares, 0)[-2:]
    clear = first - second > 0.35
    assert clear.mean() > 0.1
    np.testing.assert_array_equal(resample_labels(labels, wanted)[clear], shares.argmax(0)[clear])


def test_symmetric_organs_give_symmetric_ones_whatever_is_even() -> None:
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[5:25, 7:23, 9:21] = 1  # odd ends: every face of the box is half a voxel of a grid half as fine
    halved = resample_labels(labels, (15, 15, 15))
    np.testing.assert_array_equal(halved, halved[::-1, ::-1, ::-1])
    assert halved.sum() * 8 == pytest.approx(labels.sum(), rel=0.2)


def test_many_classes_and_odd_layouts() -> None:
    labels = np.random.default_rng(1).integers(0, 118, (5, 4, 7)).astype(np.uint8).repeat(3, 0).repeat(3, 1)
    turned = labels.transpose(2, 1, 0)[:, ::-1]
    expected = resample_labels(np.ascontiguousarray(turned), (5, 7, 9))
    np.testing.assert_array_equal(resample_labels(turned, (5, 7, 9)), expected)
    assert expected.dtype == np.uint8
    assert set(np.unique(expected)) <= set(np.unique(labels))
