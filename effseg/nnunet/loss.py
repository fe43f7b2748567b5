"""nnU-Net's Dice + cross-entropy on logits that are never made."""

from collections.abc import Sequence
from typing import Any

from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from effseg.criterion import SegmentationLoss

Tensors = Tensor | Sequence[Tensor]


def fused(loss: nn.Module) -> nn.Module:
    """The loss that nnU-Net has built, fused if it is of the kind that can be, else as it is (regions)."""
    one: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    weights = loss.weight_factors if isinstance(loss, DeepSupervisionWrapper) else (1.0,)
    if type(one) is not DC_and_CE_loss or type(one.dc) is not MemoryEfficientSoftDiceLoss:
        return loss
    if one.ce.weight is not None or one.ce.reduction != "mean":
        return loss
    return FusedLoss(
        weights,
        dice_weight=one.weight_dice,
        ce_weight=one.weight_ce,
        label_smoothing=one.ce.label_smoothing,
        ignore_index=one.ignore_label,
        include_background=one.dc.do_bg,
        batch_dice=one.dc.batch_dice,
        smooth=one.dc.smooth,
        process_group=True if one.dc.ddp else None,
    )


class FusedLoss(SegmentationLoss):
    """The value and the gradient of nnU-Net's DC_and_CE_loss, in its DeepSupervisionWrapper or not:
    `SegmentationLoss` less the sum of its weights times that of Dice, as nnU-Net's Dice loss is -Dice, not
    1 - Dice.

    Under DDP every sum is over all processes, where nnU-Net takes the cross-entropy of each process alone:
    the same unless the processes have different numbers of voxels that are not ignored.

    weights: of the outputs; one of weight 0 gets no gradient, and so no weight decay, as in nnU-Net.
    """

    def __init__(self, weights: Sequence[float], **options: Any) -> None:
        super().__init__([weight for weight in weights if weight], **options)
        self._takes = [bool(weight) for weight in weights]
        self._dice = options["dice_weight"] * sum(weights)

    def forward(self, outputs: Tensors, labels: Tensors) -> Tensor:
        """outputs: logits (N, K, D, H, W), lazy or not, or a list of them; labels: (N, 1, D, H, W), or a list
        of them."""
        return super().forward(self._taken(outputs), self._taken(labels)) - self._dice

    def _taken(self, given: Tensors) -> list[Tensor]:
        given = [given] if isinstance(given, Tensor) else given
        return [x for x, takes in zip(given, self._takes, strict=True) if takes]
