"""The segmentation head by kernels: logits never leave the registers."""

from __future__ import annotations

import torch
from torch import Tensor

from effseg.algorithms.aten.head import Head as AtenHead
from effseg.algorithms.interface import Sums, VoxelSums
from effseg.kernels.head import HeadGradients, head_argmax, head_backward, head_sums
from effseg.kernels.launch import empty


class Head(AtenHead):
    """See `effseg.algorithms.interface.Head`; probabilities cannot be shown, as they are not stored."""

    shows_probabilities = False

    def add_sums(
        self, sums: Sums, sample: int, a: Tensor, labels: Tensor, also: VoxelSums | None = None
    ) -> None:
        assert also is None
        found = head_sums(a, self.weight, self._bias(), labels, self.class_weights, self.ignore_index)
        for total, part in zip(sums, found, strict=True):
            total[sample] += part

    def pull(self, grads: Sums, sample: int, a: Tensor, labels: Tensor, parameters: bool = True) -> Tensor:
        out = empty(a.shape, a.dtype, a.device)
        given = HeadGradients(
            *(g[sample] for g in (grads.intersection, grads.probability, grads.nll, grads.smooth_nll))
        )
        grad_weight, grad_bias = head_backward(
            a, self.weight, self._bias(), labels, self.class_weights, self.ignore_index, given, out,
            parameters=parameters,
        )  # fmt: skip
        if grad_weight is not None and self.grad_weight is not None:
            self.grad_weight += grad_weight
        if grad_bias is not None and self.grad_bias is not None:
            self.grad_bias += grad_bias
        return out

    def segment(self, a: Tensor) -> Tensor:
        out = torch.empty(
            a.shape[2:], dtype=torch.uint8 if self.classes <= 256 else torch.int16, device=a.device
        )
        head_argmax(a, self.weight, self._bias(), out)
        return out

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias[:, 0]
