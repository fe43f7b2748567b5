"""The least that an operator moves and computes: bytes to and from memory, multiply-accumulates.

Every operand is read once and every result written once, whatever a cache does. Terms of a normalisation and
sums of channels are a few numbers and count nothing.
"""

from __future__ import annotations

import math

from effseg.expressions.slabs import Window
from effseg.kernels.config import Problem, Triple

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TENSORS = {"norm_act": 2, "norm_act_backward": 4, "fold": 3, "moments": 1}
"""Of features, that are read and written: of norm_act_backward two gradients, raw and activated output."""
PRODUCTS = {"head_sums": 1, "head_backward": 3, "head_argmax": 1}
"""Of features with weights: backward makes the logits again, then the gradients of both."""


def bytes_moved(problem: Problem) -> int:
    element, channels, voxels = BYTES[problem.dtype], problem.in_channels, math.prod(problem.size)
    features = channels * voxels * element
    if problem.op.startswith("conv3d"):
        return _convolution_bytes(problem)
    if problem.op.startswith("head"):
        classes = voxels * (1 if problem.out_channels <= 256 else 2)
        return features * (2 if problem.op == "head_backward" else 1) + classes
    if problem.op == "upsample":
        coarse = math.prod((n + 1) // 2 for n in problem.size)
        return 2 * features + channels * coarse * element
    if problem.op == "upsample_transpose":
        return 9 * features
    return TENSORS[problem.op] * features


def macs(problem: Problem) -> int:
    """0 where nothing is a matrix product."""
    products = problem.in_channels * problem.out_channels
    if problem.op.startswith("conv3d"):
        _, outputs = _sizes(problem)
        return products * math.prod(problem.kernel) * math.prod(outputs)
    return PRODUCTS.get(problem.op, 0) * products * math.prod(problem.size)


def _convolution_bytes(problem: Problem) -> int:
    """dgrad's epilogue reads the forward pass's raw input."""
    inputs, outputs = (math.prod(size) for size in _sizes(problem))
    weights = problem.in_channels * problem.out_channels * math.prod(problem.kernel)
    reads = 2 if problem.op == "conv3d_dgrad" and problem.prologue else 1
    features = reads * problem.in_channels * inputs + problem.out_channels * outputs
    weight_bytes = 4 if problem.op == "conv3d_wgrad" else BYTES[problem.dtype]
    return features * BYTES[problem.dtype] + weights * weight_bytes


def _sizes(problem: Problem) -> tuple[Triple, Triple]:
    """Of the forward pass's input and output: `size` is the input's for dgrad, else the output's."""
    window = Window(problem.kernel, problem.stride)
    if problem.op == "conv3d_dgrad":
        return problem.size, window.output_size(problem.size)
    d, h, w = (n * s for n, s in zip(problem.size, problem.stride, strict=True))
    return (d, h, w), problem.size


def layer_bytes(channels: int, size: Triple, dtype: str) -> int:
    """Of a convolution with normalisation and activation and of its backward, as one operator: forward reads
    the input and writes the output; backward reads the input and a gradient and writes another."""
    return 5 * channels * math.prod(size) * BYTES[dtype]


def layer_macs(channels: int, size: Triple) -> int:
    """Of a 3x3x3 convolution and its two gradients."""
    return 3 * 27 * channels**2 * math.prod(size)
