"""Other people's networks on this package's operators, without a change to their code.

`convert` hands a network's own `forward` a lazy tensor (`lazy.LazyTensor`), which recognises the operators
that it meets (`rules`): convolution, normalisation, activation, concatenation, transposed convolution,
pooling, sums. They become a deferred expression; whatever else is met gets an ordinary tensor.
"""

from effseg.conversion.convert import convert, restore
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.report import ConversionReport, ModuleReport

__all__ = ["ConversionReport", "LazyTensor", "ModuleReport", "convert", "restore"]
