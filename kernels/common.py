"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def leaky_relu(z, SLOPE: tl.constexpr):
    """z where positive, else SLOPE * z; SLOPE 0 is ReLU, 1 no activation."""
    if SLOPE == 1.0:
        return z
    elif SLOPE == 0.0:
        return tl.maximum(z, 0.0)
    elif SLOPE < 1.0:
        return tl.maximum(z, z * SLOPE)
    else:
        return tl.where(z > 0, z, z * SLOPE)


@triton.jit
def leaky_relu_backward(grad, z, SLOPE: tl.constexpr):
    """grad * act'(z), with act'(0) = SLOPE as in torch; z may also be the activated value (SLOPE >= 0)."""
    if SLOPE == 1.0:
        return grad
    else:
        return tl.where(z > 0, grad, grad * SLOPE)
