"""How kernels are declared, and device functions that several of them share."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

UNALIGNED = [
    "labels_ptr",
    "grad_intersection_ptr",
    "grad_probability_ptr",
    "grad_nll_ptr",
    "grad_smooth_ptr",
]
"""Of slabs and samples, which begin at any element; none is read in wide loads."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what the host launches: compiled once for tensors of every size.

    Arguments are pointers, named *_ptr, constants, and numbers: sizes, counts and strides. Triton would
    compile again for a number that is 1, or a multiple of 16, or no longer one. None is specialised here, and
    nothing is lost: what makes loads wide is the alignment of pointers and a constant, the channels, of which
    every offset is a multiple. Strides of samples are counted in voxels for that reason; so they also fit 32
    bits (beyond, Triton compiles once more, with 64).
    """
    numbers = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=UNALIGNED)


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


@triton.jit
def operand(
    x,  # [voxels, channels]
    scale, shift,  # [1, channels]
    DTYPE: tl.constexpr, PROLOGUE: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """What a convolution multiplies: x, or with a PROLOGUE leaky_relu(x * scale + shift), in the type of the
    products; where a load is masked that is of 0, not 0."""
    if PROLOGUE:
        return leaky_relu(x.to(tl.float32) * scale + shift, SLOPE).to(DTYPE)
    elif x.dtype == DTYPE:
        return x
    else:
        return x.to(tl.float32).to(DTYPE)
