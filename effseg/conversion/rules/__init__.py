"""What torch's functions do to lazy tensors.

Each rule has its function's own arguments and returns NotImplemented where it does not take them; then the
function gets ordinary tensors. Importing this package is what makes lazy tensors follow them.
"""

from effseg.conversion.rules import activation, convolution, joining, neutral, normalisation, resampling

__all__ = ["activation", "convolution", "joining", "neutral", "normalisation", "resampling"]
