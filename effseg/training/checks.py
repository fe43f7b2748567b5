"""Whether a network can learn from a run's data, before its first step."""

import math

from torch import nn

from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.training.config import TrainingConfig
from effseg.training.data import TrainingData


def check_batch_norm(model: SegmentationModel, data: TrainingData, config: TrainingConfig) -> None:
    """Raise InputError where batch norm would get the statistics of one voxel: a process takes those of its
    own cases, and a small one may have no more on the network's lowest level."""
    has_batch_norm = any(isinstance(module, nn.BatchNorm3d) for module in model.modules())
    if config.batch_size > 1 or not has_batch_norm:
        return
    for case in data.training:
        d, h, w = config.patch_size or case.image.shape[1:]
        lowest = model.lowest_level((d, h, w))
        if lowest is None or math.prod(lowest) > 1:
            continue
        named, what, larger = "norm", f"case {case.name}, {d}x{h}x{w} voxels", "volumes"
        if config.patch_size is not None:
            named, what, larger = "patch_size", f"patches of {d}x{h}x{w} voxels", "patches"
        other = ", or norm instance or group" if config.model.startswith("effseg") else ""
        raise InputError(
            f"{named}: expected more than one voxel at the lowest level of {model.name}, which has batch "
            f"norm, got 1 of {what}: use larger {larger}{other}"
        )
