"""A prepared case through the network as it is: how validation sees it."""

from collections.abc import Callable

import numpy as np
import torch

from effseg.data.cache import CachedCase
from effseg.models.base import SegmentationModel
from effseg.training.config import TrainingConfig
from effseg.training.optimizer import uses_bf16


class Segmenter:
    """Segments whole volumes, or by a sliding window where the network is trained on patches."""

    def __init__(
        self,
        model: SegmentationModel,
        config: TrainingConfig,
        normalise: Callable[[np.ndarray], torch.Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.patch_size, self.normalise, self.device = model, config.patch_size, normalise, device
        self.autocast = uses_bf16(config, device)

    @torch.no_grad()
    def __call__(self, case: CachedCase) -> np.ndarray:
        """Classes (D, H, W) of `case`, on its prepared grid."""
        image = self.normalise(case.image)[None].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            labels = self.model.segment(image)
        return labels[0].cpu().numpy()
