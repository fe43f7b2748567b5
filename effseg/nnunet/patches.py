"""nnU-Net as it is, in less memory: its plans' network and its loss on this package's operators."""

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

import effseg
from effseg.errors import InputError
from effseg.nnunet import options
from effseg.nnunet.loss import fused

MEMORY = ("raw", "block", "stream", "auto")


class nnUNetTrainerEffSeg(nnUNetTrainer):
    """nnUNetTrainer with a converted network and a fused loss; everything else is nnU-Net's.

    Weights and checkpoints are those of nnUNetTrainer: `-pretrained_weights` takes either's. EFFSEG_MEMORY
    is "raw" (default), "block", "stream" or "auto", see `effseg.convert`. Regions are trained with nnU-Net's
    own loss, on real logits. Needs a 3D configuration.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net compares signatures
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        options.set_length(self)

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        patch = configuration_manager.patch_size
        if len(patch) != 3:
            raise InputError(f"nnUNetTrainerEffSeg: expected a 3D configuration, got patches of {patch}")
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        return effseg.convert(network, shape=(1, num_input_channels, *patch), **options.memory(MEMORY, "raw"))

    def on_train_start(self) -> None:
        super().on_train_start()
        network: Any = getattr(self.network, "module", self.network)
        saving = str(network.conversion_report).partition("\n")[0]
        self.print_to_log_file(f"effseg: memory {network.effseg_settings.memory}: {saving}")

    def _do_i_compile(self) -> bool:
        return False  # there is little left to compile between the fused operators

    def _build_loss(self) -> nn.Module:
        return fused(super()._build_loss())
