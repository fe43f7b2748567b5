"""The segmentation head: 1x1x1 convolution, softmax, sums of Dice and cross-entropy; no logits in memory.

Slabs are (1, C, d, h, w) in channels last, so that their voxels are the rows of a (voxels, C) matrix. Without
a weight the features are the logits. A configuration's block_w is the voxels of a tile, its splits the number
of programs; its loop is "tile", or "classes" where a tile's logits lie with a row for each class, not voxel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effseg.kernels.choose import choose
from effseg.kernels.config import Config, blocks, power_of_two
from effseg.kernels.head_argmax import _head_argmax_kernel
from effseg.kernels.head_backward import _head_backward_kernel
from effseg.kernels.head_sums import _head_sums_kernel
from effseg.kernels.launch import DTYPES, channels_last, input_precision, launch, problem

CLASS_AXIS = {"classes": 0, "tile": 1}
# Tiles whose values are added up in float32 before a sum that keeps its rounding errors takes them: with a
# tree over at most 128 voxels that is at most 14 roundings, a relative error below 1e-6.
CHUNK = 8
# Gradients of the parameters, of either sign, ask for less, and their rows are larger.
GRADIENT_CHUNK = 32


class HeadSums(NamedTuple):
    """What Dice and cross-entropy need of a slab, float64, over voxels that are neither ignored nor unknown.

    intersection, probability, voxels: (K,), the sums of p [label = k], p, and [label = k];
    nll: (), the sum of w_label (-log p_label); smooth_nll: (), the sum over k of w_k (-log p_k);
    unknown: (), voxels whose label is neither a class nor ignored.
    """

    intersection: Tensor
    probability: Tensor
    voxels: Tensor
    nll: Tensor
    smooth_nll: Tensor
    unknown: Tensor


class HeadGradients(NamedTuple):
    """The loss's gradients with respect to a sample's sums, (K,), (K,), () and (), of any float type."""

    intersection: Tensor
    probability: Tensor
    nll: Tensor
    smooth_nll: Tensor


class _Head(NamedTuple):
    """Checked operands of one launch."""

    features: Tensor
    operands: tuple[Tensor | None, ...]  # the kernels' first arguments
    voxels: int
    constants: dict[str, Any]
    config: Config

    @property
    def programs(self) -> int:
        return min(self.config.splits, blocks(self.voxels, self.config.block_w))

    @property
    def options(self) -> dict[str, Any]:
        return {
            **self.constants,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }


def head_sums(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor,
    ignore_index: int | None,
    *,
    config: Config | None = None,
) -> HeadSums:
    """The sums of softmax(weight @ a + bias) against labels.

    a: (1, C, d, h, w); weight: (K, C) or None; bias: (K,) or None; labels: (d, h, w), any integer type;
    class_weights: (K,) float32.
    """
    head = _prepare("head_sums", a, weight, bias, config)
    k, block_k = head.constants["K"], head.constants["BLOCK_K"]
    labels = _labels(labels, a)
    _check_class_weights(class_weights, k)
    sums = torch.empty(head.programs, 2, 2 * block_k + 2, dtype=torch.float32, device=a.device)
    counts = torch.empty(head.programs, block_k + 1, dtype=torch.int32, device=a.device)
    launch(
        _head_sums_kernel,
        (head.programs,),
        *head.operands,
        labels,
        class_weights,
        sums,
        counts,
        head.voxels,
        IGNORE=ignore_index,
        CHUNK=CHUNK,
        **head.options,
    )
    total = sums.sum((0, 1), dtype=torch.float64)
    count = counts.sum(0, dtype=torch.float64)
    intersection, probability = total[:k], total[block_k : block_k + k]
    return HeadSums(intersection, probability, count[:k], total[-2], total[-1], count[-1])


def head_backward(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor,
    ignore_index: int | None,
    grads: HeadGradients,
    out: Tensor,
    *,
    parameters: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The loss's gradients from those of the sums: into `out`, like a, that of the features.

    Returned, float32, are the gradients of weight (K, C) and bias (K,): None where there is none, or where
    `parameters` is false.

    Other arguments as for `head_sums`.
    """
    head = _prepare("head_backward", a, weight, bias, config)
    c, k = head.constants["C"], head.constants["K"]
    block_c, block_k = head.constants["BLOCK_C"], head.constants["BLOCK_K"]
    labels = _labels(labels, a)
    _check_class_weights(class_weights, k)
    if out.shape != a.shape or out.dtype != a.dtype or channels_last(out) is not out:
        raise ValueError(
            f"out: {tuple(a.shape)} {a.dtype} in channels last, not {tuple(out.shape)} {out.dtype}"
        )
    for name, grad, shape in zip(grads._fields, grads, ((k,), (k,), (), ()), strict=True):
        if grad.shape != shape:
            raise ValueError(f"grads.{name}: {shape}, not {tuple(grad.shape)}")
    grad_weight = grad_bias = None
    if parameters and weight is not None:
        grad_weight = torch.empty(head.programs, block_k, block_c, dtype=torch.float32, device=a.device)
    if parameters and bias is not None:
        grad_bias = torch.empty(head.programs, block_k, dtype=torch.float32, device=a.device)
    launch(
        _head_backward_kernel,
        (head.programs,),
        *head.operands,
        labels,
        class_weights,
        *(grad.contiguous() for grad in grads),
        out,
        grad_weight,
        grad_bias,
        head.voxels,
        IGNORE=ignore_index,
        CHUNK=GRADIENT_CHUNK,
        **head.options,
    )
    if grad_weight is not None:
        grad_weight = grad_weight.sum(0, dtype=torch.float64)[:k, :c].float()
    if grad_bias is not None:
        grad_bias = grad_bias.sum(0, dtype=torch.float64)[:k].float()
    return grad_weight, grad_bias


def head_argmax(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """The class of the largest logit, the lowest one of several, into out (d, h, w) uint8 or int16.

    Other arguments as for `head_sums`.
    """
    head = _prepare("head_argmax", a, weight, bias, config)
    if out.shape != a.shape[2:] or not out.is_contiguous():
        raise ValueError(f"out: {tuple(a.shape[2:])} and contiguous, not {tuple(out.shape)}")
    if out.dtype not in (torch.uint8, torch.int16) or head.constants["K"] > torch.iinfo(out.dtype).max + 1:
        raise TypeError(f"out: {out.dtype} cannot hold {head.constants['K']} classes")
    launch(_head_argmax_kernel, (head.programs,), *head.operands, out, head.voxels, **head.options)


def _prepare(
    op: str,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    config: Config | None,
) -> _Head:
    if a.dtype not in DTYPES:
        raise TypeError(f"a: float32, bfloat16 or float16, not {a.dtype}")
    n, c, *size = a.shape
    if n != 1:
        raise ValueError(f"a: one sample, not {n}")
    voxels = size[0] * size[1] * size[2]
    if voxels >= 2**31 - 2**16:
        raise ValueError(f"a: fewer than 2^31 voxels a slab, not {voxels}")
    if weight is None and bias is not None:
        raise ValueError("bias: None where weight is None")
    k = c if weight is None else weight.shape[0]
    if weight is not None and weight.shape != (k, c):
        raise ValueError(f"weight: (K, {c}), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"bias: ({k},), not {tuple(bias.shape)}")
    config = config or choose(problem(op, a, out_channels=k))
    features = channels_last(a)
    constants = {
        "C": c,
        "K": k,
        "CLASS_AXIS": CLASS_AXIS[config.loop],
        "BLOCK_V": config.block_w,
        "BLOCK_C": max(16, power_of_two(c)),
        "BLOCK_K": max(16, power_of_two(k)),
        "PRECISION": input_precision(a.dtype),
    }
    parameters = (None if p is None else p.contiguous() for p in (weight, bias))
    return _Head(features, (features, *parameters), voxels, constants, config)


def _labels(labels: Tensor, a: Tensor) -> Tensor:
    if labels.shape != a.shape[2:]:
        raise ValueError(f"labels: {tuple(a.shape[2:])}, not {tuple(labels.shape)}")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels: an integer type, not {labels.dtype}")
    return labels.contiguous()


def _check_class_weights(class_weights: Tensor, k: int) -> None:
    if (
        class_weights.shape != (k,)
        or class_weights.dtype != torch.float32
        or not class_weights.is_contiguous()
    ):
        raise ValueError(
            f"class_weights: ({k},) float32, not {tuple(class_weights.shape)} {class_weights.dtype}"
        )
