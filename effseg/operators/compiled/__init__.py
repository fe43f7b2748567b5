"""The operators under torch.compile: one opaque operator for each forward and each backward.

Dynamo cannot trace their loops over slabs, and should not: a trace would unroll them. So each is a
`torch.library.custom_op` that runs the sweeps of the autograd node that it stands in for and saves the same
tensors. What is no tensor reaches it as text and numbers (`effseg.operators.compiled.encoding`).
"""

from effseg.operators.compiled.conv3d import conv3d
from effseg.operators.compiled.head import head_sums, segment
from effseg.operators.compiled.materialise import materialise
from effseg.operators.compiled.stem_statistics import stem_statistics
from effseg.operators.compiled.tail import layer_statistics, tail_sums

__all__ = [
    "conv3d",
    "head_sums",
    "layer_statistics",
    "materialise",
    "segment",
    "stem_statistics",
    "tail_sums",
]
