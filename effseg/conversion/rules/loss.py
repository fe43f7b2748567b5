"""The loss of logits that are not made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effseg.conversion.lazy import LazyTensor
from effseg.conversion.rules.registry import rule
from effseg.losses import LossOptions, dice_cross_entropy


@rule(dice_cross_entropy)
def loss_of_head(logits: Tensor, labels: Tensor, **options: Any) -> Any:
    if not isinstance(logits, LazyTensor) or not logits.has_head:
        return NotImplemented
    return logits.segmentation_loss(labels, LossOptions(**options))
