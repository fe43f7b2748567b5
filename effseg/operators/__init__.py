"""Operators on deferred expressions, one in each file: its sweep over slabs, its forward and backward, and
what users call. `operator.py` makes of that a node of autograd and an operator of torch.compile. Arithmetic
is in `effseg.algorithms`, validation in `effseg.functional`.
"""

from effseg.operators.conv3d import conv3d, conv3d_to_host
from effseg.operators.head import head_sums, probabilities, segment
from effseg.operators.level import level
from effseg.operators.materialise import materialise
from effseg.operators.share import share
from effseg.operators.statistics import statistics
from effseg.operators.stem_statistics import stem_statistics
from effseg.operators.tail import Tail, layer_statistics, tail_sums

__all__ = [
    "Tail",
    "conv3d",
    "conv3d_to_host",
    "head_sums",
    "layer_statistics",
    "level",
    "materialise",
    "probabilities",
    "segment",
    "share",
    "statistics",
    "stem_statistics",
    "tail_sums",
]
