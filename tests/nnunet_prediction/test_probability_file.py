"""NAME.npz plane by plane. Needs no nnU-Net."""

import numpy as np
import pytest
import torch

from effseg.nnunet.prediction.probabilities import ProbabilityFile

CROP = np.random.default_rng(0).random((3, 2, 4, 3), np.float32)
BOX = [[1, 3], [0, 4], [2, 5]]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("backward", [(0, 1, 2), (2, 0, 1)])
def test_as_numpy_saves_them(tmp_path, background, backward):
    expected = np.zeros((3, 4, 5, 6), np.float32)
    expected[0] = background
    expected[:, 1:3, 0:4, 2:5] = CROP
    with ProbabilityFile(tmp_path / "a.npz", 3, (4, 5, 6), BOX, backward, background) as file:
        for index in (1, 0):
            file.write(1 + index, torch.from_numpy(CROP[:, index]))
        assert not list(tmp_path.iterdir()), "no half of a file under any name"
        file.finish()
    found = np.load(tmp_path / "a.npz")["probabilities"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.transpose(0, *(axis + 1 for axis in backward)))


def test_nothing_is_left_of_a_failure(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        ProbabilityFile(tmp_path / "a.npz", 3, (4, 5, 6), BOX, (0, 1, 2), True),
    ):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
