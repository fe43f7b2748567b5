"""A network whose answer is known for every voxel, and a scan to give it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from effseg.data.labels import LabelMap
from effseg.data.preprocessing import Preprocessing
from effseg.models.base import SegmentationModel

SHAPE = (14, 12, 10)
LABEL_MAP = LabelMap(("background", "soft", "bone"), (0, 4, 300))
PREPROCESSING = Preprocessing(window=(-1000.0, 2000.0), margin=0.0)


class Nearest(SegmentationModel):
    """Class 0, 1, 2 for intensities near -1000, 0 and 2000 HU: an answer that is known for every voxel."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__("nearest", {"in_channels": in_channels, "num_classes": 3})
        self.centres = nn.Parameter(torch.tensor([-1.5, -0.5, 1.5]))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(tuple(image.shape))
        return -((image[:, :1] - self.centres.view(1, 3, 1, 1, 1)) ** 2)


def torso() -> np.ndarray:
    array = np.full(SHAPE, -1000, np.int16)
    array[2:12, 3:11, 1:9] = 0
    array[4:7, 5:7, 2:8] = 2000
    return array


def expected(array: np.ndarray) -> np.ndarray:
    return np.select([array < -500, array < 1000], [0, 4], 300).astype(np.uint16)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.5, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path
