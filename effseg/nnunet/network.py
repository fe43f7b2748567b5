"""EffSegNet as nnU-Net's trainers hold a network."""

from typing import Any

from torch import Tensor

from effseg.models.effsegnet import EffSegNet


class WholeVolumeNet(EffSegNet):
    """An EffSegNet whose call with labels is its loss: a call is where DistributedDataParallel has its hooks.

    By this class nnU-Net model folders of whole volumes are told from others.
    """

    def forward(self, image: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """The loss, `EffSegNet.loss`, or without labels the logits (N, K, D, H, W)."""
        return super().forward(image) if labels is None else self.loss(image, labels, **options)
