"""Operators as users call them: validation here, saved tensors in `effseg.operators`, arithmetic in
`effseg.algorithms`.

Images and features are (N, C, D, H, W); a feature may also be a deferred expression (`effseg.expressions`).
Every operator walks through D slab by slab; `slab_elements` asks for slabs of about so many elements and
by default follows from the size. Internally memory is channels last; other layouts are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effseg import operators
from effseg.algorithms.interface import Sums
from effseg.expressions.base import Deferred, Normalisation
from effseg.expressions.layers import Plain, convolved, plain, raw, residual, upsample_add
from effseg.losses import LossOptions, unknown_labels
from effseg.offload.memory import HostMemory
from effseg.operators import checks
from effseg.operators.checks import convolution_window
from effseg.operators.normalisation import Norm, merging, track

__all__ = [
    "Deferred",
    "Normalisation",
    "compute_dtype",
    "conv3d",
    "convolution_window",
    "convolved",
    "materialise",
    "plain",
    "probabilities",
    "raw",
    "residual",
    "segment",
    "segmentation_loss",
    "stem_statistics",
    "tail_segmentation_loss",
    "upsample_add",
]


def compute_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """The type to convolve and to store in: get_autocast_dtype(device) if autocast is on, else weight.dtype.

    weight: of any shape. As in torch, autocast leaves float64 alone.
    """
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def conv3d(
    x: Tensor | Deferred,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    statistics: bool = True,
    dtype: torch.dtype | None = None,
    slab_elements: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = conv(x, weight) + bias with zero padding kernel // 2, and y's mean and variance per (n, c).

    x: (N, Ci, D, H, W), a tensor or a deferred expression; weight (Co, Ci, kd, kh, kw) with odd kernels.
    Returns y (N, Co, ...) in the compute type (the expression's; of a tensor `dtype`, else `compute_dtype`)
    and, with `statistics`, mean and biased variance (N, Co) in float32 (float64 for float64) over the
    *stored* values of y: differentiable outputs, so that a normalisation made of them needs no backward of
    its own.
    Memory kept for backward: what x stores, and y (which the next layer keeps anyway).
    Raises `ValueError` where the channels or dimensions do not fit.
    """
    return convolve(x, weight, bias, stride, statistics, dtype, slab_elements)


def convolve(
    x: Tensor | Deferred,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    statistics: bool = True,
    dtype: torch.dtype | None = None,
    slab_elements: int | None = None,
    consumes: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`conv3d`; consumes: see `operators.conv3d`."""
    checks.features("x", x)
    if isinstance(x, Tensor):
        x = plain(x, dtype or compute_dtype(x.device, weight))
    elif dtype not in (None, x.dtype):
        raise ValueError(f"dtype: expected None or the expression's {x.dtype}, got {dtype}")
    checks.convolution(weight, bias, x.shape[1])
    window = convolution_window(weight.shape[2:], stride)
    return operators.conv3d(x, weight, bias, window, statistics, slab_elements, consumes=consumes)


def convolve_to_host(
    x: Deferred,
    weight: Tensor,
    stride: int | Sequence[int],
    host: HostMemory,
    slab_elements: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`operators.conv3d_to_host`."""
    checks.features("x", x)
    checks.convolution(weight, None, x.shape[1])
    window = convolution_window(weight.shape[2:], stride)
    return operators.conv3d_to_host(x, weight, window, host, slab_elements)


def materialise(x: Deferred, *, slab_elements: int | None = None) -> Tensor:
    """y = x as a stored tensor (N, C, D, H, W) of the expression's type, for code that needs one.

    Memory kept for backward: what x stores (not the value). Raises `ValueError` for x of other dimensions.
    """
    checks.features("x", x)
    return operators.materialise(x, slab_elements)


def stem_statistics(
    image: Tensor | Deferred,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    *,
    dtype: torch.dtype | None = None,
    slab_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(image, weight) in one sweep that stores no output.

    Differentiable in the weight without another sweep: the gradient is linear in sums that the forward
    sweep collects ((C + 1) * Ci * taps float64 numbers a sample). The image gets no gradient.
    image: (N, Ci, D, H, W) of any float type or int16, or `plain` of one; weight (C, Ci, kd, kh, kw) with odd
    kernels; dtype: the compute type, by default `compute_dtype`. The statistics are those of y rounded to
    it, in float32 (float64 for float64). Raises `ValueError` where shapes do not fit or the image requires a
    gradient.
    """
    checks.features("image", image)
    checks.convolution(weight, None, image.shape[1])
    stored = image.tensors[0] if isinstance(image, Deferred) else image
    if stored.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "image: expected one without gradient where its first layer is not stored, got one with"
        )
    window = convolution_window(weight.shape[2:], stride)
    if isinstance(image, Tensor):
        image = plain(image, dtype or compute_dtype(image.device, weight))
    elif not isinstance(image.spec, Plain):
        raise ValueError("image: expected a stored one, got a deferred expression of another kind")
    return operators.stem_statistics(image, weight, window, slab_elements)


def segmentation_loss(
    x: Tensor | Deferred,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slab_elements: int | None = None,
    **options: Any,
) -> Tensor:
    """dice_weight * (1 - mean soft Dice) + ce_weight * cross-entropy of head(x), a scalar.

    x: features (N, C, D, H, W) with the head's weight (K, C, 1, 1, 1) and bias (K,), or logits
    (N, K, D, H, W) without; labels (N, D, H, W) or (N, 1, D, H, W) of any integer type, values 0..K-1 or
    `ignore_index`. options: those of `effseg.losses.dice_cross_entropy` (class_weights, ignore_index,
    include_background, batch_dice, label_smoothing, dice_weight, ce_weight, smooth, process_group), whose
    value this has:

        Dice_k = (2 sum p_k [label = k] + smooth) / (sum p_k + sum [label = k] + smooth)
        CE     = ((1 - s) sum w_label (-log p_label) + s/K sum_k w_k (-log p_k)) / sum w_label

    Both are functions of a few sums per class, so logits and probabilities are made slab by slab, in
    forward and again in backward, and never stored. Sums are float64, softmax float32 (float64 for
    float64). Memory kept for backward: what x stores, and the labels as given.
    Raises `ValueError` for shapes that do not fit and for labels that are neither a class nor ignored.
    """
    chosen = LossOptions(**options)
    x = _head_input(x, weight)
    classes = checks.head(x.shape[1], weight, bias)
    labels = checks.labels(labels, x)
    checks.vector("class_weights", chosen.class_weights, classes)
    sums = operators.head_sums(
        x, weight, bias, labels, chosen.class_weights, chosen.ignore_index, slab_elements
    )
    return _loss(chosen, sums, x)


def tail_segmentation_loss(
    x: Deferred,
    labels: Tensor,
    layer: tuple[Tensor, Norm, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slab_elements: int | None = None,
    **options: Any,
) -> Tensor:
    """`segmentation_loss` of leaky_relu(norm(conv(x, w)), slope), whose output is not stored either.

    layer: (w, norm, slope) with w (C', C, kd, kh, kw), stride 1, and one of torch's norms, whose running
    statistics are updated. Head and options as in `segmentation_loss`.
    Memory kept for backward: what x stores, and the labels as given. The convolution runs twice in forward
    (statistics; sums) and again in backward, with many classes twice (`effseg.operators.tail_sweeps`).
    Raises `ValueError` as `segmentation_loss` does, and where the layer does not fit x.
    """
    checks.features("x", x)
    kernel, norm, slope = layer
    checks.convolution(kernel, None, x.shape[1])
    window = convolution_window(kernel.shape[2:])
    tail = operators.Tail(x, kernel, window, slope, *merging(norm), norm.weight, norm.bias)
    loss, mean, var = tail_loss(tail, labels, weight, bias, slab_elements, **options)
    track(norm, mean, var, math.prod(x.shape[2:]))
    return loss


def tail_loss(
    tail: operators.Tail,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slab_elements: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of head(tail), and the mean and biased variance (N, C) of what the tail normalises."""
    chosen = LossOptions(**options)
    classes = checks.head(tail.weight.shape[0], weight, bias)
    labels = checks.labels(labels, tail.x)
    checks.vector("class_weights", chosen.class_weights, classes)
    sums, mean, var = operators.tail_sums(
        tail, weight, bias, labels, chosen.class_weights, chosen.ignore_index, slab_elements
    )
    return _loss(chosen, sums, tail.x), mean, var


def segment(
    x: Tensor | Deferred,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slab_elements: int | None = None,
) -> Tensor:
    """argmax over the classes of head(x): (N, D, H, W), uint8, or int16 for more than 256 classes.

    x, weight, bias as in `segmentation_loss`; logits exist a few rows at a time, nothing is kept. Raises
    `ValueError` for shapes that do not fit.
    """
    x = _head_input(x, weight)
    checks.head(x.shape[1], weight, bias)
    return operators.segment(x, weight, bias, slab_elements)


def probabilities(
    x: Tensor | Deferred,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slab_elements: int | None = None,
) -> Tensor:
    """p = softmax over the classes of head(x): (N, K, D, H, W) float16, in the host's memory.

    x, weight, bias as in `segmentation_loss`; logits exist a few rows at a time, nothing is kept for
    backward, and the softmax is float32 (float64 for float64): 2 K bytes a voxel there, on the device what
    `segment` takes. Raises `ValueError` for shapes that do not fit.
    """
    x = _head_input(x, weight)
    checks.head(x.shape[1], weight, bias)
    return operators.probabilities(x, weight, bias, slab_elements)


def _head_input(x: Tensor | Deferred, weight: Tensor | None) -> Deferred:
    """Features in the compute type; logits, which are what a network gave, in their own."""
    checks.features("x", x)
    if isinstance(x, Deferred):
        return x
    return plain(x, x.dtype if weight is None else compute_dtype(x.device, weight))


def _loss(options: LossOptions, sums: Sums, x: Deferred) -> Tensor:
    # Compiled operators check by themselves: whether to raise is not known when they are traced.
    if not torch.compiler.is_compiling() and not isinstance(sums.unknown, FakeTensor):
        unknown_labels(sums.unknown, sums.voxels.shape[1])
    return options.of_sums(sums).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
