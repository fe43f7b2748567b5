"""What an algorithm is: the operations on slabs that sweeps are made of.

Slabs are rows of one sample, (1, C, d, h, w), channels last in memory. Modules with these functions are
`effseg.algorithms.aten.ops`, the reference, and `effseg.algorithms.triton.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from effseg.expressions.base import Operations, Spec
from effseg.expressions.slabs import Window


class Sums(NamedTuple):
    """What Dice and cross-entropy need of a batch, float64, over the voxels that are not ignored.

    intersection, probability, voxels: (N, K), the sums of p [label = k], p, and [label = k];
    nll: (N,), the sum of w_label (-log p_label); smooth_nll: (N,), the sum over k of w_k (-log p_k);
    unknown: (N,), voxels whose label is neither a class nor ignored.
    """

    intersection: Tensor
    probability: Tensor
    voxels: Tensor
    nll: Tensor
    smooth_nll: Tensor
    unknown: Tensor

    @classmethod
    def zeros(cls, samples: int, classes: int, device: torch.device) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(samples, *shape, dtype=torch.float64, device=device)

        return cls(zeros(classes), zeros(classes), zeros(classes), zeros(), zeros(), zeros())


class Features(Protocol):
    """What the head needs to know of its input: shape (N, C, D, H, W) and type."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


VoxelSums = Callable[[slice, Tensor, Tensor], None]


class Head(Protocol):
    """The segmentation head on slabs of one kind of feature. Gradients of its parameters add up in
    `grad_weight` (K, C) and `grad_bias` (K,), accumulation type."""

    classes: int
    weight: Tensor | None
    class_weights: Tensor
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    shows_probabilities: bool
    """Whether `add_sums` takes `also`."""

    def add_sums(
        self, sums: Sums, sample: int, a: Tensor, labels: Tensor, also: VoxelSums | None = None
    ) -> None:
        """Add what the slab `a` with its labels (d, h, w) contributes to a sample's sums; `also` is shown
        the voxels' probabilities, (K, voxels) and 0 where ignored, and one-hot labels, bool, part by part."""

    def pull(self, grads: Sums, sample: int, a: Tensor, labels: Tensor, parameters: bool = True) -> Tensor:
        """The gradient of the slab from those of the sums; adds the parameters' where asked to."""

    def segment(self, a: Tensor) -> Tensor:
        """argmax over classes, (d, h, w), any integer type."""

    def show(self, a: Tensor, out: Tensor) -> None:
        """softmax over classes, to `out` (K, d, h, w), which may lie on the host."""


class NormActGradients(NamedTuple):
    """dz = grad * act'(z); dy = dz * scale; dscale = sum dz (y - mean), dbeta = sum dz, (1, C) each. None
    where not asked for."""

    dz: Tensor | None
    dy: Tensor | None
    dscale: Tensor | None
    dbeta: Tensor | None


class StatisticsGradient(NamedTuple):
    """What reaches y through its statistics: (y - mean) * scale + shift, (N, C) each."""

    mean: Tensor
    scale: Tensor
    shift: Tensor


class FusedConv3d(Protocol):
    """A convolution whose kernels make some expressions themselves as they read what is stored."""

    def takes(self, spec: Spec, weight: Tensor, window: Window) -> bool:
        """Whether `forward` and `backward` take it; what they do not, a sweep makes slab by slab."""

    def forward(
        self,
        spec: Spec,
        tensors: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, and mean and biased variance of the stored y: see `effseg.operators.conv3d.conv3d_forward`."""

    def backward(
        self,
        spec: Spec,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        weight: Tensor,
        window: Window,
        y: Tensor,
        through_statistics: StatisticsGradient | None,
        grad_y: Tensor | None,
        need_weight: bool,
        thickness: int,
        memory: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of weight (accumulation type) and tensors, in slabs of `thickness` output rows. memory:
        grad_y's, where the gradient of the first tensor may come to lie in it."""


class Algorithm(Operations, Protocol):
    """`Operations`, which are differentiable, and others, which are not. Terms are (1, C)."""

    fused: FusedConv3d | None

    def convolution_into(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: Window,
        pad: tuple[int, int],
        out: Tensor,
    ) -> Tensor:
        """`convolution`, written to `out`. Gives out, or the same values where they are quicker to read."""

    def convolution_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        window: Window,
        pad: tuple[int, int],
        need_input: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dgrad (of the rows of x, without the padding) and wgrad of `convolution`."""

    def mean_var(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-channel mean and (biased) variance of a slab's stored values, (C,), accumulation type."""

    def partial_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same of equally many voxels each, (P, C)."""

    def norm_act_backward(
        self,
        grad: Tensor,
        y: Tensor,
        a: Tensor,
        mean: Tensor,
        scale: Tensor,
        slope: float,
        need_dz: bool = False,
        need_dy: bool = False,
        need_terms: bool = False,
    ) -> NormActGradients:
        """From the gradient of a = norm_act(y)."""

    def fold(self, grad: Tensor | None, y: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """grad + (y - mean) * scale + shift per channel, terms (C,), in y's type."""

    def make_head(
        self,
        features: Features,
        weight: Tensor | None,
        bias: Tensor | None,
        device: torch.device,
        class_weights: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> Head: ...
