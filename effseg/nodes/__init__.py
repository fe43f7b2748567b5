"""Operators: autograd nodes over deferred expressions.

Each file holds one `torch.autograd.Function`: what it saves, which algorithm it asks, and nothing else.
Under torch.compile `effseg.nodes.compiled` takes its place.
Arithmetic is in `effseg.algorithms`, validation in `effseg.functional`.
"""

from effseg.nodes.conv3d import conv3d
from effseg.nodes.head import head_sums, segment
from effseg.nodes.level import level
from effseg.nodes.materialise import materialise
from effseg.nodes.share import share
from effseg.nodes.statistics import statistics
from effseg.nodes.stem_statistics import stem_statistics
from effseg.nodes.tail import Tail, layer_statistics, tail_sums

__all__ = [
    "Tail",
    "conv3d",
    "head_sums",
    "layer_statistics",
    "level",
    "materialise",
    "segment",
    "share",
    "statistics",
    "stem_statistics",
    "tail_sums",
]
