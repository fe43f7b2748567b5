"""EffSegNet as nnU-Net's trainers hold a network."""

from typing import Any

from torch import Tensor

from effseg.errors import InputError
from effseg.models.effsegnet import EffSegNet


class WindowsRefused(InputError, SystemExit):
    """An InputError that ends a program that does not catch it with its line alone and exit code 1, as
    `nnUNetv2_predict`, whose command line knows nothing of this package."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.code = line


class WholeVolumeNet(EffSegNet):
    """An EffSegNet whose call with labels is its loss: a call is where DistributedDataParallel has its hooks.

    By this class nnU-Net model folders of whole volumes are told from others.
    """

    def forward(self, image: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """The loss, `EffSegNet.loss`. Raises WindowsRefused without labels, as nnU-Net's own predictor calls
        it: of windows, of which the network has never seen one, it would give other labels."""
        if labels is None:
            raise WindowsRefused(
                "this network was trained on whole volumes and would segment windows wrongly: "
                "predict with `effseg nnunet predict` instead of nnUNetv2_predict"
            )
        return self.loss(image, labels, **options)

    def logits(self, image: Tensor) -> Tensor:
        """(N, K, D, H, W), of whole volumes."""
        return super().forward(image)
