"""Classes back on a scan's own grid."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effseg.nnunet import export


@pytest.mark.parametrize("shape", [(7, 11, 9), (3, 4, 5), (6, 8, 20), (1, 8, 10)])
def test_resampling_takes_the_most_probable_class(shape, monkeypatch):
    """Or one of several: the mask of no class is larger after interpolation."""
    monkeypatch.setattr(export, "SLAB_VOXELS", 100)  # several slabs
    classes = np.random.default_rng(0).integers(0, 3, (6, 8, 10)).astype(np.uint8)
    found = export.resample_classes(classes, shape)
    assert found.dtype == np.uint8
    masks = F.one_hot(torch.from_numpy(classes).long()).movedim(-1, 0)[None].float()
    shares = F.interpolate(masks, size=shape, mode="trilinear")[0]
    torch.testing.assert_close(shares.gather(0, torch.from_numpy(found)[None].long())[0], shares.amax(0))


def test_resampling_leaves_a_volume_of_the_same_shape():
    classes = np.ones((2, 3, 4), np.uint8)
    assert export.resample_classes(classes, [2, 3, 4]) is classes


def test_back_to_the_file():
    whole = np.zeros((5, 6, 7), np.uint8)
    whole[1:4, 2:6, 3:5] = 2
    properties = {
        "shape_before_cropping": whole.shape,
        "bbox_used_for_cropping": [[1, 4], [2, 6], [3, 5]],
        "shape_after_cropping_and_before_resampling": (3, 4, 2),
    }
    plans, labels = SimpleNamespace(transpose_backward=[1, 0, 2]), SimpleNamespace(foreground_labels=[1, 2])
    found = export.on_file_grid(np.full((6, 4, 3), 2, np.uint8), plans, labels, properties)
    np.testing.assert_array_equal(found, whole.transpose(1, 0, 2))
