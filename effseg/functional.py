"""Operators as users call them: validation here, saved tensors in `effseg.nodes`, arithmetic in
`effseg.algorithms`.

Images and features are (N, C, D, H, W); a feature may also be a deferred expression (`effseg.deferred`).
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

from effseg import nodes
from effseg.algorithms.aten.head import Sums
from effseg.deferred import Deferred, Normalisation, convolved, plain, raw, residual, upsample_add
from effseg.losses import GroupSum, mean_dice_of_sums
from effseg.normalisation import Norm, track
from effseg.slabs import Window

__all__ = [
    "Deferred",
    "Normalisation",
    "compute_dtype",
    "conv3d",
    "convolution_window",
    "convolved",
    "materialise",
    "plain",
    "raw",
    "residual",
    "segment",
    "segmentation_loss",
    "stem_statistics",
    "tail_segmentation_loss",
    "upsample_add",
]

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def compute_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """The type to convolve and to store in: autocast's for `device` where it is on, else the weight's.

    As in torch, autocast leaves float64 alone.
    """
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def convolution_window(kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1) -> Window:
    """Kernel size (odd) and stride per axis, from one number or three; padding is kernel // 2.

    Raises `ValueError` for even kernels, strides under 1 or another number of axes.
    """
    kernel, strides = _three("kernel_size", kernel_size), _three("stride", stride)
    if any(k % 2 == 0 or k < 1 for k in kernel):
        raise ValueError(f"kernel_size: expected odd numbers, got {kernel}")
    if any(s < 1 for s in strides):
        raise ValueError(f"stride: expected 1 or more, got {strides}")
    return Window(kernel, strides)


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
    Returns y (N, Co, ...) in the compute type (`dtype`, else that of the expression or of `compute_dtype`)
    and, with `statistics`, mean and biased variance (N, Co) in float32 (float64 for float64) over the
    *stored* values of y: differentiable outputs, so that a normalisation made of them needs no backward of
    its own.
    Memory kept for backward: what x stores, and y (which the next layer keeps anyway).
    Raises `ValueError` where the channels or dimensions do not fit.
    """
    x = _deferred("x", x, weight, dtype)
    if weight.dim() != 5 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected (Co, {x.shape[1]}, kd, kh, kw), got {tuple(weight.shape)}")
    window = convolution_window(weight.shape[2:], stride)
    return nodes.conv3d(x, weight, bias, window, statistics, slab_elements)


def materialise(x: Deferred, *, slab_elements: int | None = None) -> Tensor:
    """The expression's value as a stored tensor (N, C, D, H, W), for code that needs one.

    Memory kept for backward: what x stores (not the value).
    """
    return nodes.materialise(x, slab_elements)


def stem_statistics(
    image: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    *,
    dtype: torch.dtype | None = None,
    slab_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(image, weight) in one sweep that stores no output.

    Differentiable in the weight without another sweep: the gradient is linear in sums that the forward
    sweep collects ((C + 1) * Ci * taps float64 numbers a sample). The image gets no gradient.
    """
    _check_features("image", image.shape)
    window = convolution_window(weight.shape[2:], stride)
    dtype = dtype or compute_dtype(image.device, weight)
    return nodes.stem_statistics(image, weight, window, dtype, slab_elements)


def segmentation_loss(
    x: Tensor | Deferred,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    include_background: bool = False,
    batch_dice: bool = False,
    label_smoothing: float = 0.0,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    smooth: float = 1e-5,
    process_group: Any = None,
    slab_elements: int | None = None,
) -> Tensor:
    """dice_weight * (1 - mean soft Dice) + ce_weight * cross-entropy of head(x), a scalar.

    x: features (N, C, D, H, W) with the head's weight (K, C, 1, 1, 1) and bias (K,), or logits
    (N, K, D, H, W) without; labels (N, D, H, W) or (N, 1, D, H, W) of any integer type, values 0..K-1 or
    `ignore_index`. Options and formula are those of `effseg.losses.dice_cross_entropy`, which this equals:

        Dice_k = (2 sum p_k [label = k] + smooth) / (sum p_k + sum [label = k] + smooth)
        CE     = ((1 - s) sum w_label (-log p_label) + s/K sum_k w_k (-log p_k)) / sum w_label

    Both are functions of a few sums per class, so logits and probabilities are made slab by slab, in
    forward and again in backward, and never stored. Sums are float64, softmax float32 (float64 for
    float64). Memory kept for backward: what x stores, and the labels as given.
    Raises `ValueError` for shapes that do not fit and for labels that are neither a class nor ignored.
    """
    like = weight if weight is not None else x if isinstance(x, Tensor) else x.tensors[0]
    x = _deferred("x", x, like, None)
    labels = _check_head(labels, x, x.shape[1], weight, class_weights)
    sums = nodes.head_sums(x, weight, bias, labels, class_weights, ignore_index, slab_elements)
    _check_unknown(sums, sums.voxels.shape[1])
    return _loss_of_sums(
        sums, class_weights, include_background, batch_dice, label_smoothing, dice_weight, ce_weight, smooth,
        process_group,
    ).to(_accumulate(x))  # fmt: skip


def tail_segmentation_loss(
    x: Deferred,
    labels: Tensor,
    layer: tuple[Tensor, Norm, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    include_background: bool = False,
    batch_dice: bool = False,
    label_smoothing: float = 0.0,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    smooth: float = 1e-5,
    process_group: Any = None,
    slab_elements: int | None = None,
) -> Tensor:
    """`segmentation_loss` of leaky_relu(norm(conv(x, w)), slope), whose output is not stored either.

    layer: (w, norm, slope) with w (C', C, kd, kh, kw), stride 1, and one of torch's norms, whose running
    statistics are updated. Head and options as in `segmentation_loss`.
    Memory kept for backward: what x stores, and the labels as given. The convolution runs twice in forward
    (statistics, sums) and twice more in backward (sums of the normalisation's gradient, gradients).
    """
    kernel, norm, slope = layer
    window = convolution_window(kernel.shape[2:])
    labels = _check_head(labels, x, kernel.shape[0], weight, class_weights)
    sums, mean, var = nodes.tail_sums(
        x, kernel, window, norm, slope, weight, bias, labels, class_weights, ignore_index, slab_elements
    )
    track(norm, mean, var, math.prod(x.shape[2:]))
    _check_unknown(sums, weight.shape[0])
    return _loss_of_sums(
        sums, class_weights, include_background, batch_dice, label_smoothing, dice_weight, ce_weight, smooth,
        process_group,
    ).to(_accumulate(x))  # fmt: skip


def _loss_of_sums(
    sums: Sums,
    class_weights: Tensor | None,
    include_background: bool,
    batch_dice: bool,
    label_smoothing: float,
    dice_weight: float,
    ce_weight: float,
    smooth: float,
    process_group: Any,
) -> Tensor:
    """The loss, float64, from the sums of the batch."""
    group = GroupSum(process_group)
    classes = sums.voxels.shape[1]
    first = 0 if include_background else 1
    dice = mean_dice_of_sums(
        sums.intersection[:, first:],
        sums.probability[:, first:],
        sums.voxels[:, first:],
        batch_dice,
        smooth,
        group,
    )
    w = torch.ones_like(sums.voxels[0]) if class_weights is None else class_weights.double()
    total = (1 - label_smoothing) * sums.nll + label_smoothing / classes * sums.smooth_nll
    ce = group.sum(total.sum()) / group.sum((sums.voxels @ w).sum())
    return dice_weight * (1 - dice) + ce_weight * ce


def segment(
    x: Tensor | Deferred,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slab_elements: int | None = None,
) -> Tensor:
    """argmax over the classes of head(x): (N, D, H, W), uint8, or int16 for more than 256 classes.

    x, weight, bias as in `segmentation_loss`; logits exist one slab at a time, nothing is kept.
    """
    like = weight if weight is not None else x if isinstance(x, Tensor) else x.tensors[0]
    return nodes.segment(_deferred("x", x, like, None), weight, bias, slab_elements)


def _deferred(name: str, x: Tensor | Deferred, weight: Tensor, dtype: torch.dtype | None) -> Deferred:
    _check_features(name, x.shape)
    return plain(x, dtype or compute_dtype(x.device, weight)) if isinstance(x, Tensor) else x


def _check_features(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 5 or 0 in shape:
        raise ValueError(f"{name}: expected (N, C, D, H, W), none of them 0, got {tuple(shape)}")


def _check_head(
    labels: Tensor, x: Deferred, channels: int, weight: Tensor | None, class_weights: Tensor | None
) -> Tensor:
    """Labels as (N, D, H, W), once everything that meets in the head fits."""
    classes = channels if weight is None else weight.shape[0]
    if labels.dtype not in INTEGER_DTYPES:
        raise ValueError(f"labels: expected an integer type, got {labels.dtype}")
    expected = (x.shape[0], *x.shape[2:])
    if labels.dim() == 5 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels: expected {expected}, got {tuple(labels.shape)}")
    if weight is not None and weight[0].numel() != channels:
        raise ValueError(f"weight: expected (K, {channels}, 1, 1, 1), got {tuple(weight.shape)}")
    if class_weights is not None and class_weights.shape != (classes,):
        raise ValueError(f"class_weights: expected ({classes},), got {tuple(class_weights.shape)}")
    if classes < 2:
        raise ValueError(f"classes: expected 2 or more, background included, got {classes}")
    return labels


def _check_unknown(sums: Sums, classes: int) -> None:
    if not isinstance(sums.unknown, FakeTensor) and (unknown := int(sums.unknown.sum())):
        raise ValueError(
            f"labels: expected 0 to {classes - 1} or ignore_index, {unknown} voxels have other values"
        )


def _accumulate(x: Deferred) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _three(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 3:
        raise ValueError(f"{name}: expected one number or three, got {value}")
    return values[0], values[1], values[2]
