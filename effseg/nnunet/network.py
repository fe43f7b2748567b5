"""EffSegNet as nnU-Net's trainers hold a network."""

from typing import Any

from torch import Tensor

from effseg.errors import InputError
from effseg.models.effsegnet import EffSegNet


class WholeVolumeNet(EffSegNet):
    """An EffSegNet whose call with labels is its loss: a call is where DistributedDataParallel has its hooks.

    By this class nnU-Net model folders of whole volumes are told from others.
    """

    def forward(self, image: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """The loss, `EffSegNet.loss`. Raises InputError without labels, as nnU-Net's own predictor calls it:
        of windows, of which the network has never seen one, it would give other labels."""
        if labels is None:
            raise InputError(
                "this network was trained on whole volumes and would segment windows wrongly: "
                "predict with `effseg nnunet predict` instead of nnUNetv2_predict"
            )
        return self.loss(image, labels, **options)

    def logits(self, image: Tensor) -> Tensor:
        """(N, K, D, H, W), of whole volumes."""
        return super().forward(image)
