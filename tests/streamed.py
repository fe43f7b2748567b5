"""Streamed networks, batches and slabs that tests of their numbers and of their memory share."""

import warnings

import torch

from effseg import EffSegNet
from effseg.models.levels import Architecture

# All that presets are made of, in three levels: a step costs by the layer. Presets have a test of their own.
FEW = Architecture((16, 32, 24), (0, 1, 2))

# Long along the axis of the slabs. A deepest level of two voxels would not do: normalised, they are +1 and -1
# whatever they were, and what is left of the gradient is rounding, in stock torch as well.
ODD = (2, 1, 67, 9, 10)
SMALL = (1, 1, 67, 7, 6)
PAIR = (2, *SMALL[1:])
WIDTH = 16  # channels of base's full-resolution level
CUBE = (1, 1, 64, 64, 64)


def network(memory, channels, classes, preset="base", *arguments, recompute=0, slab=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ classes are read from")
        model = EffSegNet(channels, classes, preset, *arguments, memory=memory)
    model.recompute_levels, model.slab_elements = recompute, slab
    return model


def batch(shape, classes=5, dtype=torch.float64):
    torch.manual_seed(1)
    size = (shape[0], *shape[2:])
    return torch.randn(shape, dtype=dtype) + 0.5, torch.randint(0, classes, size, dtype=torch.uint8)


def rows(count, shape, channels=WIDTH):
    """slab_elements for slabs of so many rows on the full-resolution level."""
    return count * channels * shape[3] * shape[4]
