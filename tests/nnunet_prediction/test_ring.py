"""Sums of weighted logits over planes that pass by. Needs no nnU-Net."""

from itertools import product

import pytest
import torch
from tolerances import EPS

from effseg.nnunet.prediction.ring import Ring

VOLUME, SIZE, CLASSES = (11, 7, 6), (4, 3, 4), 3


@pytest.mark.parametrize("depths", [[0, 2, 5, 7], [0, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_means_of_overlapping_windows(depths):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(SIZE, generator=generator) + 0.01
    total, weight = (
        torch.zeros(CLASSES, *VOLUME, dtype=torch.float64),
        torch.zeros(VOLUME, dtype=torch.float64),
    )
    ring = Ring(CLASSES, SIZE[0], *VOLUME[1:], torch.device("cpu"))
    windows = {}
    for start in product(depths, [0, 2, 4], [0, 2]):
        windows[start] = torch.randn(CLASSES, *SIZE, generator=generator)
        cut = tuple(slice(at, at + size) for at, size in zip(start, SIZE, strict=True))
        total[:, cut[0], cut[1], cut[2]] += windows[start] * weights
        weight[cut] += weights
    expected = total / weight
    for depth, end in zip(depths, [*depths[1:], VOLUME[0]], strict=True):
        for start, logits in windows.items():
            if start[0] == depth:
                ring.add(start, logits, weights)
        for plane in range(depth, end):
            most = len(windows) * EPS * expected.abs().max()
            torch.testing.assert_close(
                ring.logits(plane).double(), expected[:, plane], rtol=0, atol=float(most)
            )
            ring.clear(plane)
    assert not ring.sums.any()
    assert not ring.weights.any()
